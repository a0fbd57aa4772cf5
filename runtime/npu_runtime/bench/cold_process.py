"""The process that `start_cold` starts: prints the times of one start as a line of JSON. Nothing imports this."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npu_runtime.encoder import Encoder


def main() -> None:
    """Answer the request in the first argument; the second is the clock when the process was asked for."""
    request, began_ns = json.loads(sys.argv[1]), int(sys.argv[2])
    from npu_runtime.errors import Error

    try:
        answer = _start(request, began_ns)
    except (Error, ImportError) as error:
        got = getattr(error, "got", None)
        answer = {"error": str(getattr(error, "what", error)) + ("" if got is None else f": {got}")}
    print(json.dumps(answer))


def _start(request: dict[str, Any], began_ns: int) -> dict[str, object]:
    import numpy as np

    from npu_runtime.artifact.random_images import draw_images
    from npu_runtime.backends.table import find_backend
    from npu_runtime.encoder import load

    find_backend(request["backend"])
    importlib.import_module("onnxruntime" if request["backend"] == "onnxruntime" else "torch")
    import_ms = (time.monotonic_ns() - began_ns) / 1e6
    loaded: list[Encoder] = []
    load_ms = _time_ms(
        lambda: loaded.append(
            load(request["artifact"], backend=request["backend"], batches=[request["batch"]], **request["options"])
        )
    )
    encoder = loaded[0]
    spec = encoder.manifest.inputs[0]
    pixel_values = draw_images(np.random.default_rng(0), spec.of_batch(request["batch"]), spec.dtype)
    first_ms, *later_ms = [_time_ms(lambda: encoder(pixel_values)) for _ in range(1 + request["calls"])]
    return {
        "import_ms": import_ms,
        "load_ms": load_ms,
        "first_ms": first_ms,
        "steady_ms": statistics.median(later_ms),
        "host_peak_nbytes": _host_peak_nbytes(),
        "device_peak_nbytes": _device_peak_nbytes(encoder),
    }


def _time_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def _host_peak_nbytes() -> int | None:
    # ru_maxrss would be that of the process which started this one, where it was larger (Linux keeps it over exec).
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * sizes[0] if sizes else None


def _device_peak_nbytes(encoder: Encoder) -> int | None:
    if encoder.device.kind == "cpu" or encoder.backend == "onnxruntime":
        return None
    from npu_runtime.devices.accelerator import Accelerator

    return Accelerator(encoder.device).memory().peak_nbytes


if __name__ == "__main__":
    main()
