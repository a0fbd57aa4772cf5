"""Find the outputs of the network's modules in the frozen programs, and set the most that their errors may be."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from npu_export.boundaries import BoundaryRecorder, is_block
from npu_export.plan import PROBES_FILE, REFERENCE_SEEDS
from npu_export.proof.limits import FLOAT64_IMAGES, MARGINS, PROBE_FACTORS, TF32_ROUNDOFF, UNIT_ROUNDOFF, to_two_digits
from npu_runtime.artifact.codec import encode_manifest
from npu_runtime.artifact.schema import MANIFEST_NAME, Boundary, Precision, Probes
from npu_runtime.artifact.store import Artifact, Images, ProbeRecord, open_artifact, record_file
from npu_runtime.backends.base import Options
from npu_runtime.backends.probed import ProbedProgram, open_probed, rows_of
from npu_runtime.backends.table import FORMATS
from npu_runtime.devices import CPU
from npu_runtime.errors import Error
from npu_runtime.parity.places import compare_rows, measure_places
from npu_runtime.parity.sketch import relative_errors
from npu_runtime.steps import Steps

AT_ONCE = 16
"""Values of a program that are held in memory together."""
ADDITIONS = ("Add", "aten::add", "aten::add_")
"""Operators that make a network's residual stream, x + f(x)."""
NEAREST = 10
"""How many times its limit a value may differ from the output of the module that it is taken for, when the program is
searched for it; blocks differ from each other by a tenth of their norm and more."""
FARTHEST = 0.5
"""The most that it may differ whatever the limit, as a relative L2 error."""


@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
    """What the network gave at its boundaries, in the order in which it computes them."""

    reference: Mapping[str, ProbeRecord]
    """Of all reference images, from the unmodified fp32 network."""
    in_precision: Mapping[str, ProbeRecord]
    """Of the first reference image, in the arithmetic of the export."""
    sizes: Mapping[str, int]
    """Elements of an image's output."""
    rounding: Mapping[str, float]
    """What rounding does there: the largest relative L2 error of an image, each channel over its scale."""
    fast: Mapping[str, float]
    """The same of fast numerics; empty where they are the precision's own."""

    def limit(self, module: str, precision: Precision) -> float:
        """The most that a right program's error may be there by rounding."""
        return PROBE_FACTORS[precision] * self.rounding[module]


class Found(NamedTuple):
    """The value of a program that is nearest to a module's output."""

    position: int
    """Among the places of the program."""
    name: str
    error: float


def collect_statistics(
    precision: Precision,
    recorder: BoundaryRecorder,
    exact: BoundaryRecorder,
    fast: BoundaryRecorder | None,
    narrow: BoundaryRecorder | None,
) -> Statistics:
    """What was recorded of the reference, of the network in float64, with a device's shortcuts on one image, and in the
    half precision of the export."""
    reference = recorder.records(len(REFERENCE_SEEDS))
    rounded, true = (reference, exact.records(FLOAT64_IMAGES))
    if narrow is not None:
        rounded, true = narrow.records(len(REFERENCE_SEEDS)), reference
    first = {name: ProbeRecord(r.sketch[:1], r.norm[:1], r.scale) for name, r in rounded.items()}
    rounding = _largest_errors(rounded, true, UNIT_ROUNDOFF[precision])
    shortened = {} if fast is None else _largest_errors(fast.records(1), reference, TF32_ROUNDOFF)
    return Statistics({n: r for n, r in reference.items() if n in rounding}, first, recorder.sizes, rounding, shortened)


def _largest_errors(
    rounded: Mapping[str, ProbeRecord], true: Mapping[str, ProbeRecord], least: float
) -> dict[str, float]:
    """At each boundary of both the largest relative L2 error of an image that both have."""
    errors = {}
    for name, record in true.items():
        if name in rounded:
            count = min(len(record.norm), len(rounded[name].norm))
            found = relative_errors(rounded[name].sketch[:count], record.sketch[:count], record.norm[:count])
            errors[name] = max(float(found.max()), least)
    return errors


def add_probes(artifact: Artifact, statistics: Statistics, steps: Steps) -> Artifact:
    """Write the statistics, and where each program has the boundaries, into an artifact that is being made.

    Raises Error when a block is not found in a program, or the program holds no numbers there.
    """
    from safetensors.numpy import save

    manifest = artifact.manifest
    factor = PROBE_FACTORS[manifest.precision]
    batch = min(program.batch for program in manifest.programs)
    places: dict[str, Mapping[str, str]] = {}
    errors: dict[str, float] = {}
    for format in manifest.formats():
        with steps.step(f"find the blocks in {format}"):
            places[format], measured = _probe_program(artifact, format, batch, statistics, steps)
            for module, error in measured.items():
                errors[module] = max(errors.get(module, 0.0), error)
            blocks = sum(map(is_block, measured))
            steps.detail(f"{blocks} blocks and {len(measured) - blocks} other boundaries, batch {batch}")
    with steps.step("write the probes"):
        kept = {module: record for module, record in statistics.reference.items() if module in errors}
        tensors = {f"{m}.{kind}": getattr(r, kind) for m, r in kept.items() for kind in ProbeRecord._fields}
        (artifact.path / PROBES_FILE).write_bytes(save(tensors))
        record = record_file(artifact.path, PROBES_FILE).record
        boundaries = tuple(
            Boundary(
                module,
                to_two_digits(max(statistics.limit(module, manifest.precision), 2 * errors[module])),
                {format: found[module] for format, found in places.items() if module in found},
                None if module not in statistics.fast else to_two_digits(factor * statistics.fast[module]),
            )
            for module in kept
        )
        manifest = dataclasses.replace(
            manifest,
            files=tuple(sorted((*manifest.files, record), key=lambda listed: listed.file)),
            probes=Probes(
                record.file,
                batch,
                MARGINS["npu"][manifest.precision],
                _basis(statistics, kept, manifest.precision),
                boundaries,
            ),
        )
        (artifact.path / MANIFEST_NAME).write_text(encode_manifest(manifest), "utf-8")
        steps.detail(f"{len(boundaries)} boundaries, largest error {max(errors.values()):.1e}")
    return open_artifact(artifact.path)


def _basis(statistics: Statistics, modules: Collection[str], precision: Precision) -> str:
    least, most = (choose(modules, key=lambda module: statistics.rounding[module]) for choose in (min, max))
    of = statistics.rounding
    return (
        f"{PROBE_FACTORS[precision]:g} times what rounding does there: the largest relative L2 error of an image, each "
        f"channel over its scale, {of[least]:.1e} at {least} to {of[most]:.1e} at {most}; at least twice what a format "
        "was off on this CPU"
    )


def _probe_program(
    artifact: Artifact, format: str, batch: int, statistics: Statistics, steps: Steps
) -> tuple[dict[str, str], dict[str, float]]:
    """For each boundary that is found in a format's program its place, and the largest relative L2 error there."""
    inputs, _ = artifact.read_reference()
    options = Options((batch,), graph=False)
    precision = artifact.manifest.precision
    nearest = {m: min(NEAREST * statistics.limit(m, precision), FARTHEST) for m in statistics.reference}
    with open_probed(artifact, CPU, options, backend=FORMATS[format]) as program:
        found = find_places(program, statistics, inputs[:1], batch, nearest, steps)
        if lost := [module for module in statistics.reference if is_block(module) and module not in found]:
            raise Error(
                f"blocks of the network were not found in the {format} program",
                where=artifact.manifest.encoder,
                expected="for each block, in order, a value as near to its output as rounding allows",
                got=f"none for {', '.join(f'{module} within {nearest[module]:.0e}' for module in lost)}",
                hint="export without --probes; this is a fault of the export or of a library, please report it",
            )
        modules = [module for module in statistics.reference if module in found]
        names = [found[module].name for module in modules]
        records = [statistics.reference[module] for module in modules]
        runs = measure_places(program, names, records, inputs, batch, AT_ONCE, steps)
        errors = dict(zip(modules, (error for run in runs for error in run.errors)))
    if wrong := [module for module, error in errors.items() if error.nonfinite]:
        raise Error(
            f"the {format} program holds NaN or infinity where the network holds numbers",
            where=", ".join(wrong),
            hint="this is a fault of the export or of a library, please report it",
        )
    return dict(zip(modules, names)), {module: error.relative_l2_error for module, error in errors.items()}


def find_places(
    program: ProbedProgram,
    statistics: Statistics,
    image: Images,
    batch: int,
    nearest: Mapping[str, float],
    steps: Steps,
) -> dict[str, Found]:
    """For each boundary the value of the program that is nearest to the network's on an image [1, ...].

    The residual additions are tried first: additions to what another operator reads as well. For what is not among
    them, every value between the places of the boundaries before and after it is. What has no value as near as
    `nearest`, a relative L2 error by module, is left out, and so is what stands in another order than the network
    computes.
    """
    images = np.repeat(image, batch, axis=0)
    places = program.places()
    modules = list(statistics.in_precision)
    readers = Counter(name for place in places for name in place.inputs)
    residual = [
        position
        for position, place in enumerate(places)
        if place.kind in ADDITIONS and any(readers[name] > 1 for name in place.inputs)
    ]
    candidates = dict.fromkeys(modules, residual)
    found = _in_order(_nearest_values(program, images, statistics, candidates, nearest, steps), modules)
    rest = {m: _between(modules.index(m), modules, found, len(places)) for m in modules if m not in found}
    found |= _nearest_values(program, images, statistics, rest, nearest, steps)
    return _in_order(found, modules)


def _nearest_values(
    program: ProbedProgram,
    images: Images,
    statistics: Statistics,
    candidates: Mapping[str, Sequence[int]],
    nearest: Mapping[str, float],
    steps: Steps,
) -> dict[str, Found]:
    """For each module the nearest of its candidates, which are positions of places, if it is near enough."""
    places = program.places()
    best: dict[str, Found] = {}
    tried = sorted({position for positions in candidates.values() for position in positions})
    wanted_at = {position: [m for m, positions in candidates.items() if position in positions] for position in tried}
    starts = range(0, len(tried), AT_ONCE)
    advance = steps.count(len(starts), "passes")
    for start in starts:
        positions = tried[start : start + AT_ONCE]
        with program.open([places[position].name for position in positions]) as call:
            _, values = call(images)
        for position, value in zip(positions, values):
            rows = rows_of(value, len(images))
            size = None if rows is None else rows[0].size
            modules = [module for module in wanted_at[position] if statistics.sizes[module] == size]
            if rows is None or not modules:
                continue
            for module in modules:
                error = float(compare_rows(value, statistics.in_precision[module], [0], len(images))[0])
                if error <= nearest[module] and (module not in best or error < best[module].error):
                    best[module] = Found(position, places[position].name, error)
        advance(1)
    return best


def _between(index: int, modules: Sequence[str], found: Mapping[str, Found], count: int) -> range:
    """The positions between the nearest boundaries before and after one that were found."""
    before = [found[module].position for module in modules[:index] if module in found]
    after = [found[module].position for module in modules[index + 1 :] if module in found]
    return range(max(before, default=-1) + 1, min(after, default=count))


def _in_order(found: Mapping[str, Found], modules: Sequence[str]) -> dict[str, Found]:
    """Those that stand in the order in which the network computes them: the nearest first, blocks before others."""
    order = {module: index for index, module in enumerate(modules)}
    kept: dict[str, Found] = {}
    for module in sorted(found, key=lambda module: (not is_block(module), found[module].error)):
        position = found[module].position
        if all(
            (position > kept[m].position) if order[module] > order[m] else (position < kept[m].position) for m in kept
        ):
            kept[module] = found[module]
    return kept
