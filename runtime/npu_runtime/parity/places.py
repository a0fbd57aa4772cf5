"""How far values inside of a frozen program are from recorded ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.store import Array, Images, ProbeRecord
from npu_runtime.backends.probed import ProbedProgram, Value, rows_of
from npu_runtime.parity.sketch import over_scale, relative_errors, sketch_rows
from npu_runtime.steps import Silent, Steps


@dataclass(frozen=True, slots=True)
class PlaceError:
    """How far a value of a program is from the recorded one."""

    relative_l2_error: float
    """The largest over images, estimated from sketches; infinite for a value without a row for each image."""
    nonfinite: int
    """Elements that are NaN or infinite, over all images."""


@dataclass(frozen=True, slots=True)
class PlacesMeasured:
    """What runs over all images with some places as outputs gave."""

    outputs: Mapping[str, Array]
    """The program's own, [N, ...] each."""
    errors: tuple[PlaceError, ...]
    """One for each place."""


def measure_places(
    program: ProbedProgram,
    places: Sequence[str],
    records: Sequence[ProbeRecord],
    inputs: Images,
    batch: int,
    at_once: int,
    watch: Steps | None = None,
) -> Iterator[PlacesMeasured]:
    """Run a program of a batch size over all `inputs` [N, 3, H, W], with at most `at_once` places at a time."""
    starts = range(0, len(places), at_once)
    advance = (watch or Silent()).count(len(starts), "passes")
    for start in starts:
        part = slice(start, start + at_once)
        measured = _measure(program, places[part], records[part], inputs, batch)
        advance(1)
        yield measured


def compare_rows(value: Value, record: ProbeRecord, images: Sequence[int], batch: int) -> npt.NDArray[np.float64]:
    """Relative L2 errors of the first rows of a value [B, ...], which are of these images of the record."""
    rows = rows_of(value, batch)
    if rows is None:
        return np.full(len(images), np.inf)
    chosen = list(images)
    given = rows[: len(chosen)]
    return relative_errors(sketch_rows(over_scale(given, record.scale)), record.sketch[chosen], record.norm[chosen])


def _measure(
    program: ProbedProgram, places: Sequence[str], records: Sequence[ProbeRecord], inputs: Images, batch: int
) -> PlacesMeasured:
    errors: list[list[npt.NDArray[np.float64]]] = [[] for _ in places]
    nonfinite = [0] * len(places)
    runs: list[dict[str, Array]] = []
    with program.open(places) as call:
        for start in range(0, len(inputs), batch):
            images = range(start, min(start + batch, len(inputs)))
            rows = np.arange(start, start + batch) % len(inputs)  # the last batch is filled up with the first images
            outputs, values = call(inputs[rows])
            runs.append({name: output[: len(images)] for name, output in outputs.items()})
            for index, record in enumerate(records):
                errors[index].append(compare_rows(values[index], record, images, batch))
                nonfinite[index] += int((~np.isfinite(values[index][: len(images)])).sum())
            del values
    return PlacesMeasured(
        {name: np.concatenate([run[name] for run in runs]) for name in runs[0]},
        tuple(PlaceError(float(np.concatenate(e).max()), count) for e, count in zip(errors, nonfinite)),
    )
