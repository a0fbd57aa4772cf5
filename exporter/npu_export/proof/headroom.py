"""What of a network float16 does not hold: refused by name, or kept in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from npu_export.errors import PrecisionError
from npu_export.key_folding import fold_keys
from npu_export.network import load_network
from npu_export.plan import AUTO, REFERENCE_SEEDS, ExportPlan
from npu_export.reference import normalised
from npu_runtime.artifact.range_text import spell_magnitude, spell_module, spell_ranges
from npu_runtime.artifact.schema import ModuleRange, Ranges
from npu_runtime.artifact.store import Images
from npu_runtime.devices import CPU
from npu_runtime.devices.ambient import torch_defaults
from npu_runtime.devices.numerics import HeldNumerics
from npu_runtime.parity.inputs import image_inputs, seeded_images
from npu_runtime.steps import Steps

if TYPE_CHECKING:
    from torch import nn

MARGIN = 2.0
"""How many times as large as on the images measured a value may be on others. In trained transformers a massive
activation is much the same for every image; what depends on the image was measured on a few."""
LEAST = 2.0**-14
"""float16's smallest number of full precision, 6.1e-5. Below it the error of rounding is 2**-25 however small the
number: once the root mean square is smaller, it is more than the 2**-11 of the value that float16 costs elsewhere."""


def measure_plan(plan: ExportPlan, steps: Steps) -> Ranges:
    """The ranges of the network that a plan is for, from its weights."""
    with torch_defaults(), HeldNumerics(CPU, "strict"):
        with steps.step("load the weights"):
            module = plan.request.encoder.with_outputs(load_network(plan.weights, steps))
        return measure_ranges(plan, module, steps)


def measure_ranges(plan: ExportPlan, module: nn.Module, steps: Steps) -> Ranges:
    """The ranges of a float32 network on the reference's images and on those of the request.

    Raises InputError for an image that cannot be read.
    """
    from npu_export.proof.ranges import Spelling, measure_modules

    request = plan.request
    given = image_inputs(request.images, plan.preprocessing)
    with steps.step("measure the ranges"):
        advance = steps.count(len(REFERENCE_SEEDS) + len(given), "images")

        def images() -> Iterator[Images]:
            spec = request.inputs[0]
            for image in seeded_images(REFERENCE_SEEDS, spec.of_batch(1)[1:], spec.dtype):
                yield normalised(image, plan.preprocessing)
                advance(1)
            for source in given:
                yield source.read()
                advance(1)

        spelling = Spelling("onnx" in request.formats, request.opset)
        modules = measure_modules(module, request.encoder.inputs[0], images(), spelling)
        ranges = Ranges(REFERENCE_SEEDS, len(given), MARGIN, LEAST, modules)
        steps.detail(spell_ranges(ranges))
    return ranges


def settle_kept(plan: ExportPlan, ranges: Ranges) -> ExportPlan:
    """The plan with all modules that stay float32, in the order in which they run."""
    keep = set(plan.keep_fp32) | (set(keepable(ranges)) if AUTO in plan.request.keep_fp32 else set())
    return replace(plan, keep_fp32=tuple(found.module for found in ranges.modules if found.module in keep))


def check_headroom(plan: ExportPlan, ranges: Ranges) -> None:
    """Raise PrecisionError unless float16 holds every module, with its margin, but for those kept in float32."""
    kept = plan.keep_fp32
    faults = {module: fault for module, fault in find_faults(ranges).items() if module not in kept}
    if not faults:
        return
    if "" in faults:
        hint = "--precision bf16 has the range of float32; weights outside of the blocks cannot be kept in float32"
    else:
        hint = f"--keep-fp32 {AUTO} keeps what float16 does not hold in float32; --precision bf16 has float32's range"
    raise PrecisionError(
        "float16 does not hold what the network computes" + (", beside what is kept in float32" if kept else ""),
        where=plan.request.encoder.name,
        expected=f"values up to 65,504 / {ranges.margin:g} = {65504 / ranges.margin:,.0f}, a margin for images not "
        f"measured, and none of a root mean square below {ranges.least:.1e}",
        got="\n".join(f"{spell_module(module)}: {fault}" for module, fault in faults.items()),
        hint=hint,
    )


def find_faults(ranges: Ranges) -> Mapping[str, str]:
    """The modules that float16 does not hold, in their order, and what is lost in each."""
    faults = {measured.module: "; ".join(_faults_of(measured, ranges)) for measured in ranges.modules}
    return {module: fault for module, fault in faults.items() if fault}


def keepable(ranges: Ranges) -> Sequence[str]:
    """The modules that float16 does not hold and that may be kept in float32, in their order."""
    return [module for module in find_faults(ranges) if module]


def _faults_of(measured: ModuleRange, ranges: Ranges) -> Iterator[str]:
    largest, smallest = measured.largest, measured.smallest
    if measured.headroom < ranges.margin:
        yield f"{spell_magnitude(largest.value)} by {largest.operator}, headroom {measured.headroom:.2g}"
    if smallest is not None and smallest.value < ranges.least:
        yield f"a root mean square of {smallest.value:.1e} by {smallest.operator}, which loses its small values"


def describe_cost(plan: ExportPlan, casts: int) -> str:
    """What it costs that modules stay float32: their names, bytes and conversions."""
    names = ", ".join(" ".join(line.split()) for line in fold_keys(dict.fromkeys(plan.keep_fp32, "")))
    each = "" if len(plan.request.formats) == 1 else " in each format"
    return f"{names}: {plan.kept_nbytes() / 1e6:,.1f} MB more{each}, {casts:+d} conversions of type in a call"
