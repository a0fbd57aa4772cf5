"""From weights to a verified artifact, step by step."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from npu_export.boundaries import BoundaryRecorder, Scale, record_boundaries
from npu_export.encoders.spec import EncoderSpec
from npu_export.network import load_network, state_sha256
from npu_export.plan import DEFAULT_OPSET, FORMATS, PRECISIONS, REFERENCE_SEEDS, ExportPlan, make_request, plan_export
from npu_export.precision import in_precision, torch_dtype
from npu_export.probes import Statistics, add_probes, collect_statistics
from npu_export.proof.headroom import check_headroom, describe_cost, measure_ranges, settle_kept
from npu_export.proof.limits import margins
from npu_export.proof.unrounded import check_unrounded
from npu_export.provenance import describe_provenance
from npu_export.reference import write_reference
from npu_runtime.artifact.codec import encode_manifest
from npu_runtime.artifact.schema import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Program,
    Provenance,
    Ranges,
    Reference,
)
from npu_runtime.artifact.staging import stage
from npu_runtime.artifact.store import Artifact, RecordedFile, open_artifact, record_file
from npu_runtime.devices import CPU
from npu_runtime.devices.ambient import torch_defaults
from npu_runtime.devices.numerics import HeldNumerics
from npu_runtime.errors import Error, ParityError
from npu_runtime.parity.measure import Outputs
from npu_runtime.parity.records import Step
from npu_runtime.parity.verify import measure_parity
from npu_runtime.steps import BYTES, Silent, Steps

if TYPE_CHECKING:
    import torch
    from torch import nn

    from npu_export.proof.rounding import RoundingStudy

TORCHSCRIPT_FILE = "model.ts"
REFERENCE_FILE = "reference.safetensors"
NOT_HASHED = ""
"""In place of a program's hash until every file of the artifact is hashed, once."""
DISK_MARGIN_NBYTES = 64 << 20


def export(
    model: str | EncoderSpec,
    *,
    weights: str | None = None,
    formats: Sequence[str] = FORMATS,
    batch: Sequence[int] = (1,),
    layout: str = "auto",
    prefix: str | None = None,
    image_size: int | None = None,
    precision: str = "fp32",
    input: str = "float32",
    opset: int = DEFAULT_OPSET,
    preprocess: str | None = None,
    probes: bool = False,
    keep_fp32: str | Sequence[str] = (),
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    output: str | Path | None = None,
    force: bool = False,
    steps: Steps | None = None,
) -> Path:
    """Export an encoder and return the artifact's folder; nothing is left of an export that failed.

    `model` is a name, hub id or alias; `weights` a path, `hf:ID[@REVISION]`, `ms:ID[@REVISION]` or
    `random:SEED`, the hub's own without it. `layout` and `prefix` insist on how the checkpoint's keys are
    spelled; `image_size`, in pixels, may have its positions resampled. `precision` is that of weights and
    compute: fp32, fp16 or bf16. `input` is what the programs take: float32, images that were normalised, or uint8,
    pixels [B, H, W, 3] that they normalise. `preprocess` says whose preparation of images to record: hf, timm or
    upstream, the settings beside the weights without it. `probes` records statistics of every block, by which
    `localise` finds a fault in the artifact later. `keep_fp32` names modules, such as `blocks.5`, that keep float32
    in fp16 and bf16; "auto" those that float16 does not hold, as was measured on the reference's images and on
    `images`, files or folders. `output` is the artifact folder itself; without it,
    `./NAME-PRECISION`, with `-uint8` for that input. Raises UsageError for arguments that do not fit,
    CheckpointError for weights that cannot be used whole, PrecisionError where float16 does not hold what the network
    computes and that is not kept in float32, LintError for a program that would not run on Ascend,
    ParityError when a frozen program differs from the reference by more than its tolerance, ArtifactError or Error
    when files cannot be written.
    """
    request = make_request(
        model,
        formats=formats,
        batch=batch,
        layout=layout,
        prefix=prefix,
        image_size=image_size,
        precision=precision,
        input=input,
        opset=opset,
        preprocess=preprocess,
        probes=probes,
        keep_fp32=keep_fp32,
        images=images,
        output=output,
        force=force,
    )
    watch = steps or Silent()
    return run_export(plan_export(request, weights, watch), watch)


@torch_defaults()
def run_export(plan: ExportPlan, steps: Steps) -> Path:
    """Carry out a plan; see `export`."""
    request = plan.request
    _check_disk(plan)
    with stage(request.output, force=request.force, watch=steps) as folder:
        written = write_artifact(plan, folder, steps)
        _return_freed_memory()
        check_parity(written.artifact, steps)
        if written.unrounded is not None:
            check_unrounded(written.artifact, written.unrounded, written.study.float32_tolerances(), steps)
        if written.statistics is not None:
            add_probes(written.artifact, written.statistics, steps)
    return request.output


class Written(NamedTuple):
    """An artifact that is whole but for its proof, and what that needs of the network."""

    artifact: Artifact
    study: RoundingStudy
    unrounded: Outputs | None
    """What the eager network gives in float32 with weights of half precision; None where there is no rounding to take
    away."""
    statistics: Statistics | None
    """For the probes, which are not among its files yet; None where none are asked for."""


def write_artifact(plan: ExportPlan, folder: Path, steps: Steps) -> Written:
    """Write the whole artifact into a folder, the manifest last, and open it. Parity is not checked here.

    What is already whole is hashed beside the work: the freezing leaves a core free, and sha256 of the
    checkpoint, the state and the programs would take a third of the time of a large export.
    """
    from npu_export.normalisation import with_input
    from npu_export.proof.rounding import RoundingStudy

    request = plan.request
    # The reference is float32 as float32, whatever the process that called asked torch for.
    with HeldNumerics(CPU, "strict") as held, ThreadPoolExecutor(1, "hash") as pool:
        with steps.step("load the weights"):
            network = load_network(plan.weights, steps)
            provenance = pool.submit(lambda: describe_provenance(plan.weights, state_sha256(network)))
            module = request.encoder.with_outputs(network)
            steps.detail(f"{plan.weights.parameters:,} parameters")
        with steps.step("record the reference"), _recorder(plan, network) as recorder:
            recorded = write_reference(plan, module, folder / REFERENCE_FILE, steps)
        study = RoundingStudy(recorded, request.encoder.outputs)
        scales = None if recorder is None else recorder.scales
        fast = None
        with steps.step("measure what rounding does"):
            with _recorder(plan, network, scales) as exact:
                study.run_float64(module)
            if request.precision == "fp32":
                with _recorder(plan, network, scales) as fast:
                    study.run_fast(module)
            steps.detail(f"float32 is {study.float32.worst():.1e} of each channel from float64")
        if request.precision != "fp32":
            provenance.result()  # the weights are put aside for a moment, and then changed
        ranges = None
        if request.precision == "fp16":
            ranges = measure_ranges(plan, module, steps)
            plan = settle_kept(plan, ranges)
            check_headroom(plan, ranges)
        module, narrow = _round(plan, module, steps), None
        if request.precision != "fp32":
            with steps.step(f"measure what {request.precision} rounds"), _recorder(plan, network, scales) as narrow:
                narrow_rounding = study.run_narrow(module, request.precision)
                steps.detail(f"{narrow_rounding.worst():.1e} of each channel")
        module = with_input(module, request.input, plan.preprocessing)
        unrounded = None if request.precision == "fp32" else study.run_unrounded(module, recorded.inputs)
        statistics = None
        if recorder is not None and exact is not None:
            statistics = collect_statistics(request.precision, recorder, exact, fast, narrow)
        programs: list[Program] = []
        records: dict[str, Future[RecordedFile]] = {}
        if "torchscript" in request.formats:
            kept = [parameter for name in plan.keep_fp32 for parameter in network.get_submodule(name).parameters()]
            programs += _freeze_torchscript(plan, module, kept, folder, steps)
            records[TORCHSCRIPT_FILE] = pool.submit(record_file, folder, TORCHSCRIPT_FILE)
        if "onnx" in request.formats:
            programs += _freeze_onnx(plan, module, folder, steps)
        with steps.step("hash the files and write the manifest"):
            nbytes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            begun = {name for name, record in records.items() if not record.done()}
            advance = steps.count(sum(nbytes[name] for name in nbytes if name not in records or name in begun), BYTES)
            for name in nbytes:
                if name not in records:
                    records[name] = pool.submit(record_file, folder, name, advance)
            hashed_files = []
            for name in sorted(records):
                hashed_files.append(records[name].result())
                advance(nbytes[name] if name in begun else 0)
            files = {record.file: record for record, _ in hashed_files}
            hashed = [dataclasses.replace(p, sha256=files[p.file].sha256) for p in programs]
            numerics = {name: str(value) for name, value in held.describe().items()}
            reference = Reference(REFERENCE_FILE, REFERENCE_SEEDS, numerics)
            manifest = _describe(plan, hashed, tuple(files.values()), reference, study, provenance.result(), ranges)
            (folder / MANIFEST_NAME).write_text(encode_manifest(manifest), "utf-8")
            steps.detail(f"{sum(record.nbytes for record in files.values()) / 1e6:,.0f} MB in {len(files)} files")
    return Written(open_artifact(folder, hashed_files), study, unrounded, statistics)


def check_parity(artifact: Artifact, steps: Steps) -> None:
    """Load the artifact as production does and compare each program with the reference.

    Raises ParityError, with every failed limit, when one is too far.
    """
    failed: list[Step] = []
    for format in artifact.manifest.formats():
        with steps.step(f"check parity of {format}"):
            measured = list(measure_parity(artifact, backend=format, watch=steps))
            failed += [step for step in measured if step.status != "passed"]
            worst = max(output.metrics.max_abs_error for step in measured for output in step.whole_outputs)
            steps.detail(f"largest difference {worst:.1e}")
    if failed:
        raise ParityError(
            "a frozen program differs from the eager reference by more than its tolerance",
            where=artifact.manifest.encoder,
            expected="every metric within its limit",
            got="\n".join(f"{step.backend} batch {step.batches[0]} {step.reason}" for step in failed),
            hint="nothing was kept; this is a fault of the export or of a library, please report it",
        )


def _return_freed_memory() -> None:
    """Give what was freed back to the system where the C library can.

    glibc keeps memory between blocks that still live: of PE-Lang's network and graphs 1.1 GB, which the
    sessions of the parity check would come on top of.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def _check_disk(plan: ExportPlan) -> None:
    parent = plan.request.output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed = sum(plan.sizes().values()) + DISK_MARGIN_NBYTES
    if "onnx" in plan.request.formats and plan.request.precision != "fp32":
        needed += PRECISIONS["fp32"] * plan.weights.parameters  # a copy that is checked without its rounding
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise Error(
            "the disk has too little room for the artifact",
            where=parent,
            expected=f"{needed / 1e6:,.0f} MB free",
            got=f"{free / 1e6:,.0f} MB free",
            hint="free some room, or pass --output on another disk",
        )


def _round(plan: ExportPlan, module: nn.Module, steps: Steps) -> nn.Module:
    """The module in the precision of the plan, and what it costs where modules stay float32."""
    request = plan.request
    if not plan.keep_fp32:
        return in_precision(module, request.precision)
    from npu_export.proof.ranges import count_casts

    with steps.step("keep modules in float32"):
        _check_disk(plan)  # which may need more than was known when it was first checked
        spec = request.encoder.inputs[0]
        without = count_casts(module, spec, torch_dtype(request.precision))
        changed = in_precision(module, request.precision, plan.keep_fp32)
        steps.detail(describe_cost(plan, count_casts(changed, spec) - without))
    return changed


def _recorder(
    plan: ExportPlan, network: nn.Module, scales: Mapping[str, Scale] | None = None
) -> AbstractContextManager[BoundaryRecorder | None]:
    """Records what the network gives at its boundaries where probes are asked for."""
    return record_boundaries(network, scales) if plan.request.probes else contextlib.nullcontext()


def _freeze_torchscript(
    plan: ExportPlan, module: nn.Module, kept: Sequence[torch.Tensor], folder: Path, steps: Steps
) -> list[Program]:
    from npu_export.lint import lint_torchscript
    from npu_export.torchscript import empty_constants, entry_point, trace_frozen
    from npu_runtime.torch_interop import write_torchscript

    batches = plan.request.batches
    with steps.step(f"freeze torchscript, batch {', '.join(map(str, batches))}"):
        program = trace_frozen(module, plan.request.inputs[0], batches)
        lint_torchscript(program, [entry_point(b) for b in batches], plan.request.precision, kept)
        write_torchscript(program, folder / TORCHSCRIPT_FILE, plan.sizes()[TORCHSCRIPT_FILE])
        empty_constants(program, [entry_point(b) for b in batches])
        steps.detail(f"device-clean, {plan.request.precision}, no float64")
    return [
        Program("torchscript", TORCHSCRIPT_FILE, b, NOT_HASHED, needs=(), entry_point=entry_point(b), opset=None)
        for b in batches
    ]


def _freeze_onnx(plan: ExportPlan, module: nn.Module, folder: Path, steps: Steps) -> list[Program]:
    from npu_export import onnx
    from npu_export.lint import lint_onnx

    request, programs = plan.request, list[Program]()
    with (folder / onnx.WEIGHTS_FILE).open("wb") as file:
        weights = onnx.WeightsFile(file)
        for batch in request.batches:
            name = onnx.graph_file(batch)
            with steps.step(f"freeze onnx, batch {batch}"):
                model, applied = onnx.export_graph(
                    module, request.inputs[0], request.encoder.outputs, batch, request.opset
                )
                lint_onnx(model, name, request.precision, plan.keep_fp32)
                onnx.write_graph(model, weights, folder / name)
                rewrites = ", ".join(f"{name} {count}" for name, count in applied.items()) or "none"
                what = f"opset {request.opset}, fixed shapes, {request.precision}, no float64"
                steps.detail(f"{what}; rewrites: {rewrites}")
            needs = (onnx.WEIGHTS_FILE,)
            programs.append(Program("onnx", name, batch, NOT_HASHED, needs, entry_point=None, opset=request.opset))
    for program in programs:
        onnx.check_graph(folder / program.file)
    return programs


def _describe(
    plan: ExportPlan,
    programs: Sequence[Program],
    files: tuple[FileRecord, ...],
    reference: Reference,
    study: RoundingStudy,
    provenance: Provenance,
    ranges: Ranges | None,
) -> Manifest:
    encoder = plan.request.encoder
    return Manifest(
        encoder=encoder.name,
        precision=plan.request.precision,
        inputs=plan.request.inputs,
        outputs=encoder.outputs,
        programs=tuple(programs),
        files=files,
        reference=reference,
        preprocessing=plan.preprocessing,
        tolerances=study.tolerances(plan.request.precision),
        provenance=provenance,
        margins=margins(plan.request.precision),
        ranges=ranges,
        keep_fp32=plan.keep_fp32,
    )
