"""Eager, TorchScript and graph replay of the five on one accelerator, in turn. Prints a table, writes a record.

`.venv/bin/python scripts/benchmark_device.py --device npu:0 --output build/npu.json` exports each encoder from seeded
weights, checks it against the reference on the device, and times calls from numpy to numpy and, on the device's own
clock, transfer in, compute and transfer out. Numerics are strict. TorchScript and eager as such are plain calls; the
last is TorchScript captured as a graph.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmark import TIMM_NAMES

from npu_export import export
from npu_runtime import Encoder, load
from npu_runtime.artifact.store import open_artifact
from npu_runtime.bench.measure import measure_latency, measure_stages
from npu_runtime.devices import parse_device
from npu_runtime.devices.accelerator import Accelerator
from npu_runtime.devices.probe import probe_device
from npu_runtime.environment import describe_environment
from npu_runtime.parity.verify import measure_parity
from npu_runtime.structured import to_json

WAYS = {"eager": ("eager", False), "torchscript": ("torchscript", False), "graph": ("torchscript", True)}
"""Name -> backend, and whether calls replay a captured graph."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One way to run one encoder; medians in milliseconds."""

    encoder: str
    precision: str
    batch: int
    way: str
    call_ms: float
    """From numpy to numpy."""
    transfer_in_ms: float
    compute_ms: float
    transfer_out_ms: float
    eager_over_this: float
    """Median over rounds of eager's call / this one's."""
    samples_ms: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True, help="cuda:N or npu:N")
    parser.add_argument("--output", type=Path, required=True, help="where the record is written")
    parser.add_argument("--encoders", nargs="+", choices=TIMM_NAMES, default=list(TIMM_NAMES))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "fp16", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    probe = probe_device(parse_device(arguments.device))
    if probe.error is not None:
        raise SystemExit(str(probe.error))
    timings: list[Timing] = []
    conditions = {}
    columns = "| encoder | precision | batch | way | call ms | in ms | compute ms | out ms | eager / this |"
    print(f"{probe.name}\n\n{columns}\n{'|---' * columns.count(' | ')}|---|")
    for encoder in arguments.encoders:
        for precision in arguments.precision:
            with tempfile.TemporaryDirectory() as folder:
                artifact = export(
                    encoder,
                    weights="random:0",
                    formats=("torchscript",),
                    batch=arguments.batch,
                    precision=precision,
                    output=Path(folder) / encoder,
                )
                with open_all(artifact, arguments.device, arguments.batch) as (encoders, memory):
                    for timing in time_all(encoders, precision, arguments.batch, arguments.rounds):
                        timings.append(timing)
                        print_timing(timing)
                    conditions[f"{encoder} {precision}"] = {
                        way: {**to_json(opened.report()), **memory[way]} for way, opened in encoders.items()
                    }
    record = {
        "record": "benchmark on a device",
        "device": arguments.device,
        "name": probe.name,
        "environment": describe_environment(),
        "conditions": conditions,
        "timings": [asdict(timing) for timing in timings],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


@contextlib.contextmanager
def open_all(
    path: Path, device: str, batches: Sequence[int]
) -> Iterator[tuple[dict[str, Encoder], dict[str, dict[str, int]]]]:
    """Every way to run the artifact, each checked against the stored reference first, and the memory that it takes."""
    artifact, accelerator = open_artifact(path), Accelerator(parse_device(device))
    with contextlib.ExitStack() as stack:
        encoders, memory = {}, {}
        for way, (backend, graph) in WAYS.items():
            steps = measure_parity(artifact, backend=backend, device=device, graph=graph)
            if far := [step for step in steps if step.status != "passed"]:
                raise SystemExit(f"{way} is farther from the reference than its tolerance: {far[0].reason}")
            before = accelerator.memory().allocated_nbytes
            accelerator.reset_peak()
            opened = load(artifact, backend=backend, device=device, batches=batches, graph=graph)
            encoders[way] = stack.enter_context(opened)
            now = accelerator.memory()
            memory[way] = {"held_nbytes": now.allocated_nbytes - before, "peak_nbytes": now.peak_nbytes - before}
        yield encoders, memory


def time_all(encoders: dict[str, Encoder], precision: str, batches: Sequence[int], rounds: int) -> Iterator[Timing]:
    """Each way at each batch size, round by round in turn."""
    samples = measure_latency(encoders, batches, iterations=rounds, warmup=5)
    times = measure_stages(encoders, batches, rounds=rounds)
    for batch in batches:
        for way, encoder in encoders.items():
            calls, stages = samples[way, batch], times[way, batch]
            yield Timing(
                encoder.manifest.encoder,
                precision,
                batch,
                way,
                median(calls),
                median(stage.transfer_in_ms for stage in stages),
                median(stage.compute_ms for stage in stages),
                median(stage.transfer_out_ms for stage in stages),
                median(eager / own for eager, own in zip(samples["eager", batch], calls)),
                calls,
            )


def print_timing(timing: Timing) -> None:
    print(
        f"| {timing.encoder} | {timing.precision} | {timing.batch} | {timing.way} | {timing.call_ms:.2f} "
        f"| {timing.transfer_in_ms:.3f} | {timing.compute_ms:.3f} | {timing.transfer_out_ms:.3f} "
        f"| {timing.eager_over_this:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
