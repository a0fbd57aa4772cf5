"""A Triton model repository of an artifact: a model for each program, its backend onnxruntime or pytorch.

What Triton and its backends expect was read in their sources of June 2026 (triton-inference-server: core,
onnxruntime_backend/src/onnxruntime.cc, pytorch_backend/src/pt/); no Triton has run what is written here.

- Programs have fixed shapes, so `max_batch_size` is 0 and the batch is the first of `dims`: with more than 0 the
  onnxruntime backend asks for a batch of any size. Each batch size is a model of its own, since all versions of a
  model share one configuration. A model is a folder that stands alone, so each has its own copy of the weights.
- The onnxruntime backend opens `1/model.onnx` by its path, so that external weights are found beside it.
- The pytorch backend calls `forward` and no other method, so each entry point is saved again as the `forward` of a
  file. Outputs are told apart by `NAME__INDEX`, or else by their order in the configuration (since Triton 22.06),
  which is the manifest's: names are the same for both backends.
- Triton takes the folders in a repository for models and leaves files alone, such as a model's manifest.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from npu_runtime.artifact.schema import MANIFEST_NAME, FileRecord, Program, TensorSpec, variant_name
from npu_runtime.artifact.staging import Kind
from npu_runtime.artifact.store import Artifact, record_file
from npu_runtime.devices import Device
from npu_runtime.errors import ArtifactError, UsageError
from npu_runtime.pack.forward import ForwardSaver
from npu_runtime.steps import BYTES, Silent, Steps

INDEX_NAME = "pack.json"
PACK = Kind("a pack", INDEX_NAME, frozenset({"pack", "artifact_digest"}))
CONFIG, VERSION = "config.pbtxt", "1"

BACKENDS = {"onnx": ("onnxruntime", "model.onnx"), "torchscript": ("pytorch", "model.pt")}
"""Format -> Triton's backend, and the file of a version that it opens."""
DATA_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}
"""The manifest's types -> Triton's."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the repository: one program under Triton's names."""

    name: str
    backend: str
    file: str
    program: Program
    config: str
    """The text of config.pbtxt."""


def plan_models(artifact: Artifact, formats: Iterable[str], device: Device) -> list[Model]:
    """A model for each program of these formats, to be run on a device.

    Raises UsageError for a format that the artifact does not hold or Triton has no backend for, and for an NPU.
    """
    manifest = artifact.manifest
    if device.kind == "npu":
        raise UsageError("Triton's backends run on no NPU", expected="cpu or cuda:N", got=device)
    if not re.fullmatch(r"[\w.-]+", manifest.encoder, re.ASCII):
        raise ArtifactError("the encoder's name is none for a folder", where=artifact.path, got=repr(manifest.encoder))
    of = variant_name(manifest.encoder, manifest.precision, manifest.inputs[0].dtype)
    models = []
    for format in formats:
        programs = manifest.programs_for(format)
        if format not in BACKENDS or not programs:
            raise UsageError(
                f"the artifact holds no program of the format {format} for Triton",
                where=artifact.path,
                expected=" or ".join(name for name in manifest.formats() if name in BACKENDS) or " or ".join(BACKENDS),
                hint=f"export it again with --format {format}" if format in BACKENDS else None,
            )
        backend, file = BACKENDS[format]
        for program in programs:
            name = f"{of}-{backend}-b{program.batch}"
            config = _configure(artifact, name, backend, file, program.batch, device)
            models.append(Model(name, backend, file, program, config))
    return models


def write_repository(
    artifact: Artifact, models: Sequence[Model], folder: Path, watch: Steps | None = None
) -> list[FileRecord]:
    """The files of the models, written into a folder. Every byte of the artifact is checked against the manifest.

    Raises ArtifactError where a file of the artifact is damaged, UnavailableError where an entry point is to be saved
    again and torch is not installed, and ProgramError where what was saved computes something else.
    """
    watch = watch or Silent()
    saver = ForwardSaver(artifact)
    files: list[FileRecord] = []
    for model in models:
        version = f"{model.name}/{VERSION}"
        (folder / version).mkdir(parents=True)
        (folder / model.name / CONFIG).write_text(model.config, "utf-8")
        (folder / model.name / MANIFEST_NAME).write_bytes(artifact.manifest_bytes())
        files += [record_file(folder, f"{model.name}/{name}").record for name in (CONFIG, MANIFEST_NAME)]
        with watch.step(f"write {model.name}"):
            if model.backend == "pytorch":
                saver.save(model.program, folder / version / model.file)
                files.append(record_file(folder, f"{version}/{model.file}").record)
            else:
                files += _copy_graph(artifact, model, folder, version, watch)
    return files


def _copy_graph(artifact: Artifact, model: Model, folder: Path, version: str, watch: Steps) -> Iterator[FileRecord]:
    names = {model.program.file: model.file, **{name: name for name in model.program.needs}}
    sizes = {record.file: record.nbytes for record in artifact.manifest.files}
    advance = watch.count(sum(sizes[name] for name in names), BYTES)
    for name, target in names.items():
        copy = f"{version}/{target}"
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        yield replace(artifact.copy_file(name, folder / copy, advance), file=copy)


def _configure(artifact: Artifact, name: str, backend: str, file: str, batch: int, device: Device) -> str:
    """The text of config.pbtxt, by model_config.proto of triton-inference-server/common."""
    manifest = artifact.manifest
    instance = "kind: KIND_CPU" if device.kind == "cpu" else f"kind: KIND_GPU gpus: [ {device.index} ]"
    lines = [
        f"name: {_quote(name)}",
        f"backend: {_quote(backend)}",
        f"default_model_filename: {_quote(file)}",
        "max_batch_size: 0",
        *(f"input [ {_describe(spec, batch)} ]" for spec in manifest.inputs),
        *(f"output [ {_describe(spec, batch)} ]" for spec in manifest.outputs),
        f"instance_group [ {{ count: 1 {instance} }} ]",
    ]
    if device.kind == "cuda" and backend == "onnxruntime":  # which computes products in TF32 unless it is told
        option = 'parameters { key: "use_tf32" value: "0" }'
        accelerator = f'gpu_execution_accelerator: [ {{ name: "cuda" {option} }} ]'
        lines.append(f"optimization {{ execution_accelerators {{ {accelerator} }} }}")
    for key, value in (("artifact_digest", artifact.digest), ("weights", manifest.weights_summary())):
        lines.append(f"parameters {{ key: {_quote(key)} value: {{ string_value: {_quote(value)} }} }}")
    return "\n".join(lines) + "\n"


def _describe(spec: TensorSpec, batch: int) -> str:
    dims = ", ".join(map(str, spec.of_batch(batch)))
    return f"{{ name: {_quote(spec.name)} data_type: {DATA_TYPES[spec.dtype]} dims: [ {dims} ] }}"


def _quote(text: str) -> str:
    """A string of protobuf's text format, in ASCII."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
