"""Parity of an artifact's programs against its stored reference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.table import find_backend
from npu_runtime.encoder import RunOptions, load
from npu_runtime.parity.baselines import STORED
from npu_runtime.parity.ladder import judge_outputs
from npu_runtime.parity.measure import Measurement
from npu_runtime.parity.records import Step
from npu_runtime.steps import Silent, Steps

if TYPE_CHECKING:
    from typing_extensions import Unpack


def measure_parity(
    artifact: Artifact,
    *,
    backend: str,
    watch: Steps | None = None,
    **how: Unpack[RunOptions],
) -> Iterator[Step]:
    """A step for each frozen batch size, one file open at a time, so that memory holds few weights.

    Each batch size runs every recorded image, so a program that gives one answer to all is caught. Every
    row of a batch is a recorded image, in another order each time they repeat, so a program that mixes
    its rows is caught. Raises what `load` raises.
    """
    manifest = artifact.manifest
    inputs, expected = artifact.read_reference()
    seeds = manifest.reference.seeds
    format = find_backend(backend).format
    sizes_of: dict[str, list[int]] = {}
    for program in manifest.programs_for(format):
        sizes = sizes_of.setdefault(program.file if format else "", [])
        if program.batch not in sizes:  # a backend that opens no file runs each size once
            sizes.append(program.batch)
    for sizes in sizes_of.values():
        with load(artifact, backend=backend, batches=sizes, **how) as encoder:
            advance = (watch or Silent()).count(sum(-(-len(inputs) // size) * size for size in sizes), "images")
            for size in encoder.batches:
                start = time.monotonic()
                runs = -(-len(inputs) // size)
                row = np.arange(runs * size)
                rows = (row + row // len(inputs)) % len(inputs)
                measurement = Measurement(manifest.outputs, expected)
                for part in np.split(rows, runs):
                    actual = encoder.run(inputs[part], allow_nonfinite=True)
                    measurement.add(actual, {name: array[part] for name, array in expected.items()})
                    advance(size)
                numerics = how.get("numerics", "strict")
                outputs = measurement.results(manifest.tolerances_on(encoder.device.kind, numerics))
                status, reason = judge_outputs(outputs)
                names = tuple(f"reference {seeds[row]}" for row in rows)
                yield Step(
                    cause="export" if encoder.device.kind == "cpu" else "device",
                    backend=encoder.backend,
                    device=str(encoder.device),
                    precision=manifest.precision,
                    batches=(size,),
                    baseline=STORED,
                    inputs=names,
                    status=status,
                    reason=reason,
                    outputs=outputs,
                    conditions=encoder.report(),
                    worst=None if measurement.worst is None else names[measurement.worst],
                    seconds=time.monotonic() - start,
                )
