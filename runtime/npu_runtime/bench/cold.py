"""What the first result costs: each backend started in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass

from npu_runtime.encoder import RunOptions
from npu_runtime.errors import Error, first_line

STEADY_CALLS = 10
"""Calls after the first, whose median is the steady latency."""


@dataclass(frozen=True, slots=True)
class ColdStart:
    """One start of a fresh process; the artifact's files may be in the page cache."""

    backend: str
    batch: int
    import_ms: float
    """From before the process was started until Python, the runtime and torch or onnxruntime are imported."""
    load_ms: float
    """`load`, which hashes the files; what else is imported by it is inside."""
    first_ms: float
    """The first call, numpy to numpy."""
    steady_ms: float
    """Median of the STEADY_CALLS calls after it."""
    host_peak_nbytes: int | None
    """The most resident memory of the process (VmHWM); None where the system does not tell."""
    device_peak_nbytes: int | None
    """The most that torch's tensors held on the accelerator; None on the CPU and for other packages than torch."""


def start_cold(artifact: str, backend: str, batch: int, weights: str | None, how: RunOptions) -> ColdStart:
    """Time a start in a fresh process. Raises Error with its reason where that fails."""
    request = {"artifact": artifact, "backend": backend, "batch": batch, "calls": STEADY_CALLS}
    options = json.dumps({**request, "options": {**how, "weights": weights}})
    began = time.monotonic_ns()  # the clock is the system's, so that the process can subtract it
    command = [sys.executable, "-m", "npu_runtime.bench.cold_process", options, str(began)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        answer = {"error": f"the process ended with {done.returncode}: {first_line(last)}"}
    if "error" in answer:
        raise Error("the backend did not start in a fresh process", where=backend, got=answer["error"])
    return ColdStart(backend, batch, **answer)
