"""npu-runtime pack: a Triton model repository, read as Triton's schema has it and run as its backends would."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch

import npu_runtime
from npu_runtime.artifact.store import Artifact, open_artifact, sha256_file
from npu_runtime.errors import ArtifactError
from npu_runtime.pack import forward
from npu_runtime.torch_interop import without_jit_deprecation

FORMATS = {"onnxruntime": "onnx", "pytorch": "torchscript"}
FILES = {"onnxruntime": "model.onnx", "pytorch": "model.pt"}
DTYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}


@pytest.fixture
def pack(call: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Pack an artifact for Triton in tmp_path/models."""

    def run(artifact: Path, *options: str | Path) -> Any:
        return call("npu-runtime", "pack", artifact, "--for", "triton", "--output", tmp_path / "models", *options)

    return run


@pytest.fixture(scope="module")
def read_config() -> Callable[[Path], Any]:
    """The ModelConfig in a config.pbtxt, by the schema that NVIDIA's client brings along."""
    client = importlib.util.find_spec("tritonclient")
    if client is None or client.submodule_search_locations is None:
        pytest.skip("tritonclient is not installed")
    # By its path: the package around it imports grpc, which nothing here needs.
    file = Path(client.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)

    from google.protobuf import text_format

    return lambda path: text_format.Parse(path.read_text("ascii"), schema.ModelConfig())


def others(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def reference_images(artifact: Artifact, batch: int) -> npt.NDArray[Any]:
    return np.resize(artifact.read_reference()[0], artifact.manifest.inputs[0].of_batch(batch))


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("device", "kind", "gpus"), [("cpu", "KIND_CPU", []), ("cuda:1", "KIND_GPU", [1])])
def test_every_field_of_a_config_is_as_the_manifest_says(
    device: str,
    kind: str,
    gpus: list[int],
    pack: Callable[..., Any],
    tiny_artifact: Path,
    read_config: Any,
    tmp_path: Path,
) -> None:
    assert pack(tiny_artifact, "--device", device).code == 0
    opened = open_artifact(tiny_artifact)
    manifest = opened.manifest
    found = set()
    for folder in (path for path in (tmp_path / "models").iterdir() if path.is_dir()):
        config = read_config(folder / "config.pbtxt")
        batch = next(b for b in (1, 4) if folder.name.endswith(f"-b{b}"))
        found.add((FORMATS[config.backend], batch))
        assert folder.name == config.name == f"tiny-vit-fp32-{config.backend}-b{batch}"
        assert config.default_model_filename == FILES[config.backend]
        assert config.max_batch_size == 0
        for specs, tensors in ((manifest.inputs, config.input), (manifest.outputs, config.output)):
            got = [(t.name, tuple(t.dims), type(config).DESCRIPTOR.file.enum_types_by_name) for t in tensors]
            assert [(name, dims) for name, dims, _ in got] == [(spec.name, spec.of_batch(batch)) for spec in specs]
            types = got[0][2]["DataType"].values_by_name
            assert [t.data_type for t in tensors] == [types[DTYPES[spec.dtype]].number for spec in specs]
        (group,) = config.instance_group
        assert (group.count, type(group).Kind.Name(group.kind), list(group.gpus)) == (1, kind, gpus)
        accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
        options = [(a.name, dict(a.parameters)) for a in accelerators]
        on_gpu = device != "cpu" and config.backend == "onnxruntime"
        assert options == ([("cuda", {"use_tf32": "0"})] if on_gpu else [])
        assert {key: value.string_value for key, value in config.parameters.items()} == {
            "artifact_digest": opened.digest,
            "weights": manifest.weights_summary(),
        }
        told = {field.name for field, _ in config.ListFields()}
        assert told - {"optimization"} == {
            *("name", "backend", "default_model_filename", "input", "output", "instance_group", "parameters"),
        }
        assert (folder / "manifest.json").read_bytes() == (tiny_artifact / "manifest.json").read_bytes()
        assert others(folder) == {"1", "config.pbtxt", "manifest.json"}
    assert found == {(program.format, program.batch) for program in manifest.programs}


def test_a_packed_graph_runs_where_it_lies_and_gives_the_encoders_rows(
    pack: Callable[..., Any], artifact_copy: Path, tmp_path: Path
) -> None:
    assert pack(artifact_copy, "--backend", "onnxruntime").code == 0
    opened = open_artifact(artifact_copy)
    for batch in (1, 4):
        images = reference_images(opened, batch)
        with npu_runtime.load(artifact_copy, batches=[batch]) as encoder:
            expected = encoder.run(images)
        session = onnxruntime.InferenceSession(tmp_path / f"models/tiny-vit-fp32-onnxruntime-b{batch}/1/model.onnx")
        got = session.run(list(expected), {opened.manifest.inputs[0].name: images})
        for array, name in zip(got, expected):
            np.testing.assert_array_equal(array, expected[name])


def test_the_forward_of_a_packed_program_gives_the_encoders_rows(
    pack: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    assert pack(tiny_artifact, "--backend", "torchscript").code == 0
    opened = open_artifact(tiny_artifact)
    for batch in (1, 4):
        images = reference_images(opened, batch)
        with npu_runtime.load(tiny_artifact, backend="torchscript", batches=[batch]) as encoder:
            expected = encoder.run(images)
        file = tmp_path / f"models/tiny-vit-fp32-pytorch-b{batch}/1/model.pt"
        with without_jit_deprecation(), torch.inference_mode():
            program = torch.jit.load(file)
            got = program.forward(torch.from_numpy(images))
        assert isinstance(got, tuple)  # which Triton reads by the order of its configuration
        assert [argument.name for argument in program.forward.schema.arguments] == ["self", "pixel_values"]
        for tensor, name in zip(got, expected, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), expected[name])
        assert not hasattr(program, "b1")
        assert str(Path.cwd()).encode() not in file.read_bytes()
        assert file.stat().st_size < 1.1 * (tiny_artifact / "model.ts").stat().st_size


def test_a_pack_lists_its_files_with_hashes_and_prints_what_it_holds(
    pack: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    record = pack(tiny_artifact, "--json", "--quiet")
    assert (record.code, record.err) == (0, "")
    index = json.loads((tmp_path / "models" / "pack.json").read_text("utf-8"))
    assert record.json == {"record": "pack", "output": str(tmp_path / "models"), **index}
    assert index["artifact_digest"] == open_artifact(tiny_artifact).digest
    assert {model["name"] for model in index["models"]} == others(tmp_path / "models") - {"pack.json"}
    assert {file["file"]: file["sha256"] for file in index["files"]} == {
        str(path.relative_to(tmp_path / "models")): sha256_file(path)
        for path in (tmp_path / "models").glob("*/**/*")
        if path.is_file()
    }
    text = pack(tiny_artifact, "--force")
    assert text.code == 0
    assert text.out.splitlines()[0] == f"weights   {open_artifact(tiny_artifact).manifest.weights_summary()}"
    assert ["tiny-vit-fp32-pytorch-b4", "pytorch", "4"] in [line.split()[:3] for line in text.out.splitlines()]
    assert "✓ write tiny-vit-fp32-onnxruntime-b1" in text.err


def test_weights_that_were_changed_afterwards_do_not_reach_the_pack(
    pack: Callable[..., Any], artifact_copy: Path, tmp_path: Path
) -> None:
    assert pack(artifact_copy, "--backend", "onnx").code == 0
    packed = tmp_path / "models/tiny-vit-fp32-onnxruntime-b1/1/weights.onnx.data"
    before = sha256_file(packed)
    flip_a_byte(artifact_copy / "weights.onnx.data")
    assert sha256_file(packed) == before


@pytest.mark.parametrize("damaged", ["model.b4.onnx", "weights.onnx.data", "model.ts"])
def test_a_damaged_artifact_leaves_no_pack(
    damaged: str, pack: Callable[..., Any], artifact_copy: Path, tmp_path: Path
) -> None:
    flip_a_byte(artifact_copy / damaged)
    result = pack(artifact_copy, "--json")
    assert result.code == 1
    assert result.json["error"]["what"] == "a file of the artifact has changed"
    assert result.json["error"]["where"].endswith(damaged)
    assert others(tmp_path) == {"artifact"}


def test_a_lost_file_leaves_no_pack(pack: Callable[..., Any], artifact_copy: Path, tmp_path: Path) -> None:
    (artifact_copy / "weights.onnx.data").unlink()
    assert "the artifact lacks a file" in pack(artifact_copy).err
    assert others(tmp_path) == {"artifact"}


def test_a_manifest_that_was_replaced_meanwhile_is_refused(artifact_copy: Path) -> None:
    opened = open_artifact(artifact_copy)
    flip_a_byte(artifact_copy / "manifest.json")
    with pytest.raises(ArtifactError, match="the manifest has changed"):
        opened.manifest_bytes()


def test_a_forward_that_computes_something_else_is_refused(
    pack: Callable[..., Any],
    tiny_artifact: Path,
    random_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        forward, "write_torchscript", lambda _program, target, _: shutil.copy(random_artifact / "model.ts", target)
    )
    result = pack(tiny_artifact, "--backend", "torchscript")
    assert result.code == 1
    assert "what was saved as forward computes something else" in result.err
    assert others(tmp_path) == set()


def test_an_output_that_exists_is_replaced_by_force_where_it_is_a_pack(
    pack: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    assert pack(tiny_artifact).code == 0
    again = pack(tiny_artifact, "--backend", "onnx")
    assert again.code == 2
    assert "--force to replace a pack" in again.err
    assert pack(tiny_artifact, "--backend", "onnx", "--force").code == 0
    assert others(tmp_path / "models") == {
        *("pack.json", "tiny-vit-fp32-onnxruntime-b1", "tiny-vit-fp32-onnxruntime-b4"),
    }
    (tmp_path / "models" / "another-model").mkdir()
    (tmp_path / "models" / "another-model" / "config.pbtxt").write_text("")
    mixed = pack(tiny_artifact, "--force")
    assert mixed.code == 2
    assert "another-model/config.pbtxt" in mixed.err


def test_force_does_not_replace_an_artifact_by_a_pack(
    call: Callable[..., Any], tiny_artifact: Path, artifact_copy: Path
) -> None:
    result = call(
        "npu-runtime", "pack", tiny_artifact, "--for", "triton", "--output", artifact_copy, "--force", "--json"
    )
    assert result.code == 2
    assert "is not just a pack" in result.json["error"]["what"]
    assert open_artifact(artifact_copy).digest == open_artifact(tiny_artifact).digest


def test_what_is_no_artifact_is_refused(pack: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = pack(tmp_path / "empty", "--json")
    assert (result.code, result.json["error"]["what"]) == (1, "there is no artifact here")
    assert others(tmp_path) == {"empty"}


@pytest.mark.parametrize("backend", ["eager", "onnx", "nonsense"])
def test_a_backend_that_the_artifact_has_no_program_for_is_refused(
    backend: str, pack: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None], tmp_path: Path
) -> None:
    rewrite(
        artifact_copy,
        lambda manifest: manifest.update(programs=[p for p in manifest["programs"] if p["format"] == "torchscript"]),
    )
    result = pack(artifact_copy, "--backend", backend, "--json")
    assert (result.code, result.json["error"]["expected"]) == (2, "torchscript")
    assert others(tmp_path) == {"artifact"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--for", "torchserve"), "'torchserve' is not 'triton'"),
        (("--device", "npu:0"), "Triton's backends run on no NPU"),
        (("--device", "tpu"), "unknown device"),
    ],
)
def test_what_triton_cannot_serve_is_refused(
    options: tuple[str, str], said: str, pack: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    result = pack(tiny_artifact, *options)
    assert result.code == 2
    assert said in result.err
    assert others(tmp_path) == set()


def test_an_encoder_whose_name_leaves_the_folder_is_refused(
    pack: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None], tmp_path: Path
) -> None:
    rewrite(artifact_copy, lambda manifest: manifest.update(encoder="../vit"))
    result = pack(artifact_copy)
    assert result.code == 1
    assert "'../vit'" in result.err
    assert others(tmp_path) == {"artifact"}


def test_any_text_comes_back_from_a_config_as_it_was(
    pack: Callable[..., Any], artifact_copy: Path, rewrite: Callable[..., None], read_config: Any, tmp_path: Path
) -> None:
    source = 'weights/"ünïcode"\\ \n 文件'
    rewrite(artifact_copy, lambda manifest: manifest["provenance"]["weights"].update(source=source))
    assert pack(artifact_copy, "--backend", "onnx").code == 0
    config = read_config(tmp_path / "models/tiny-vit-fp32-onnxruntime-b1/config.pbtxt")
    assert config.parameters["weights"].string_value == f"{source} (layout hf)"


def test_the_help_says_what_a_pack_is(call: Callable[..., Any]) -> None:
    result = call("npu-runtime", "pack", "--help")
    assert result.code == 0
    for text in ("--for [triton]", "config.pbtxt", "a model repository", "--force", "--json", "--quiet"):
        assert text in " ".join(result.out.split())
