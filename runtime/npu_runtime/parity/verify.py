"""Parity of an artifact's programs against its stored reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import SessionReport
from npu_runtime.backends.table import find_backend
from npu_runtime.encoder import RunOptions, load
from npu_runtime.parity.metrics import Check, Metrics, compare, judge

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True)
class ProgramParity:
    """One output of one program against the reference."""

    backend: str
    device: str
    batch: int
    output: str
    metrics: Metrics
    checks: tuple[Check, ...]
    conditions: SessionReport

    @property
    def passed(self) -> bool:
        """Every check passed; an output without a tolerance is not judged and does not pass."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def measure_parity(
    artifact: Artifact,
    *,
    backend: str,
    **how: Unpack[RunOptions],
) -> Iterator[ProgramParity]:
    """Parity of each frozen batch size, one file open at a time, so that memory holds few weights.

    Each batch size runs every recorded image, so a program that gives one answer to all is caught. Every
    row of a batch is a recorded image, in another order each time they repeat, so a program that mixes
    its rows is caught. Raises what `load` raises.
    """
    inputs, expected = artifact.read_reference()
    format = find_backend(backend).format
    sizes_of: dict[str, list[int]] = {}
    for program in artifact.manifest.programs_for(format):
        sizes = sizes_of.setdefault(program.file if format else "", [])
        if program.batch not in sizes:  # a backend that opens no file runs each size once
            sizes.append(program.batch)
    for sizes in sizes_of.values():
        with load(artifact, backend=backend, batches=sizes, **how) as encoder:
            tolerances = artifact.manifest.tolerances_on(encoder.device.kind)
            for size in encoder.batches:
                runs = -(-len(inputs) // size)
                row = np.arange(runs * size)
                rows = (row + row // len(inputs)) % len(inputs)
                parts = [encoder.run(inputs[part], allow_nonfinite=True) for part in np.split(rows, runs)]
                for output in parts[0]:
                    metrics = compare(np.concatenate([part[output] for part in parts]), expected[output][rows])
                    checks = judge(output, metrics, tolerances)
                    report = encoder.report()
                    yield ProgramParity(encoder.backend, str(encoder.device), size, output, metrics, checks, report)
