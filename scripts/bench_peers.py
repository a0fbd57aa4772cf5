"""The ONNX artifacts of the five beside what else runs them on a CPU, and beside the floor. Run by scripts/bench_peers.

Each encoder, from seeded weights in fp32, at each batch size: this project's artifact, eager torch, torch.compile,
torch.onnx.export with onnxruntime by hand, and OpenVINO on that same graph, from numpy to numpy, with the same
threads, once a round in random order. The floor is the time of the encoder's multiply-adds at the rate of a large
matrix product, which is measured in every round too. Prints a table in Markdown, writes a record with every sample.
Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from benchmark import LAYOUTS, installed, interleave, make_checkpoint, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from npu_export.checkpoint import open_checkpoint
from npu_export.encoders import find_encoder
from npu_export.network import load_network, plan_weights
from npu_runtime import load
from npu_runtime.artifact.staging import write_file
from npu_runtime.bench.statistics import Comparison, compare_paired
from npu_runtime.devices import cpu_count
from npu_runtime.environment import describe_environment, package_versions
from npu_runtime.structured import to_json

Call = Callable[[np.ndarray], np.ndarray]

OURS = "npu-export"
PEERS = ("eager", "torch.compile", "onnxruntime by hand", "OpenVINO")
PRODUCT = "matrix product"
SIDE = 2048
"""Of the square matrices whose product gives the rate: 17 GFLOP on 50 MB."""
AGREEMENT = 1e-3
"""Largest relative L2 error from eager at which a way is timed: what computes something else is no peer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One encoder at one batch size."""

    encoder: str
    batch: int
    flops: int
    """Of a call: two for each multiply-add of its products and convolutions, those of attention included."""
    over: Mapping[str, Comparison]
    """By peer: how many times as fast as it this project is."""
    floor_share: float
    """Median over rounds of the floor's time over ours."""
    samples_ms: Mapping[str, Sequence[float]]
    """By way, and of the matrix product; one for each round."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench_peers", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="where the record is written")
    parser.add_argument("--encoders", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], metavar="N")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each batch size; intervals need 6")
    parser.add_argument("--threads", type=int, default=cpu_count())
    arguments = parser.parse_args()
    environment = describe_environment()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    columns = ("encoder", "batch", f"{OURS}, ms", *(f"over {peer}" for peer in PEERS), "of the floor's rate")
    print_row(columns)
    print_row(["---"] * len(columns))
    for encoder in arguments.encoders:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(encoder, Path(folder), arguments):
                rows.append(row)
                print_row(spell(row))
        # After each encoder, so that what took long stays where a later one fails.
        means = {peer: fmean(math.log(row.over[peer].speedup) for row in rows) for peer in PEERS}
        record = {
            "record": "peers",
            "environment": environment,
            "peers": package_versions(("torch", "onnxruntime", "openvino")),
            "threads": arguments.threads,
            "rows": to_json(rows),
            "geometric_means": {peer: math.exp(mean) for peer, mean in means.items()},
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_file(arguments.output, (json.dumps(record, indent=2) + "\n").encode())
    print_row(["geometric mean", "", "", *(f"{math.exp(means[peer]):.2f}" for peer in PEERS), ""])


def measure(encoder: str, work: Path, arguments: argparse.Namespace) -> list[Row]:
    """An export of one encoder, and a row for each batch size."""
    checkpoint, artifact = work / "checkpoint", work / "artifact"
    make_checkpoint(encoder, checkpoint)
    batches = ",".join(map(str, arguments.batch))
    command = [installed("npu-export"), "--model", encoder, "--weights", str(checkpoint), "--format", "onnx"]
    run([*command, "--batch", batches, "--output", str(artifact)])
    spec = find_encoder(encoder)
    network = spec.with_outputs(load_network(plan_weights(spec, open_checkpoint(checkpoint))))
    rows = []
    for batch in arguments.batch:
        generator = np.random.default_rng(batch)
        x = generator.standard_normal(spec.inputs[0].of_batch(batch), np.float32)
        ways = open_ways(artifact, network, x, work, arguments.threads)
        check_agreement(encoder, {way: call(x) for way, call in ways.items()})
        matrix = torch.from_numpy(generator.standard_normal((SIDE, SIDE), np.float32))
        taken = interleave(
            [*(partial(call, x) for call in ways.values()), partial(torch.mm, matrix, matrix)], arguments.rounds
        )
        samples = dict(zip((*ways, PRODUCT), taken))
        flops = count_flops(network, x)
        floors = [ms * flops / (2 * SIDE**3) for ms in samples[PRODUCT]]
        over = {peer: compare_paired(samples[peer], samples[OURS]) for peer in PEERS}
        share = median(floor / ours for floor, ours in zip(floors, samples[OURS]))
        rows.append(Row(encoder, batch, flops, over, share, samples))
        del ways
        torch.compiler.reset()
        gc.collect()
    return rows


def open_ways(artifact: Path, network: torch.nn.Module, x: np.ndarray, work: Path, threads: int) -> dict[str, Call]:
    """Each way to run the encoder at the batch size of `x`, from numpy to numpy, with its name."""
    import onnxruntime
    import openvino

    graph = work / f"by-hand.b{len(x)}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (torch.from_numpy(x),), str(graph), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(graph), options)
    compiled = torch.compile(network, dynamic=False)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(str(graph), "CPU", settings).create_infer_request()

    def by_torch(module: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> Call:
        def call(x: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return module(torch.from_numpy(x))[0].numpy()

        return call

    def by_hand(x: np.ndarray) -> np.ndarray:
        return session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: x})[0]

    def by_openvino(x: np.ndarray) -> np.ndarray:
        return request.infer({0: x}, share_inputs=True)[0].copy()

    ours = load(artifact, batches=[len(x)], threads=threads)
    return dict(zip((OURS, *PEERS), (ours, by_torch(network), by_torch(compiled), by_hand, by_openvino)))


def check_agreement(encoder: str, embeddings: Mapping[str, np.ndarray]) -> None:
    """Stop where a way's embedding is not eager's."""
    expected = embeddings["eager"].astype(np.float64)
    for way, actual in embeddings.items():
        error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
        if not error <= AGREEMENT:
            raise SystemExit(f"{way} gives another embedding of {encoder}: relative L2 error {error:.1e}")


def count_flops(network: torch.nn.Module, x: np.ndarray) -> int:
    """Floating-point operations of a call; attention is run unfused for it, since fused it is not counted on a CPU."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(torch.from_numpy(x))
    return int(counter.get_total_flops())


def spell(row: Row) -> list[str]:
    """The cells of a row: `1.12 [1.08, 1.15]`, with the verdict where that is not `faster`."""
    cells = []
    for peer in PEERS:
        comparison = row.over[peer]
        told = f"{comparison.speedup:.2f}"
        if comparison.interval is not None:
            told += f" [{comparison.interval.low:.2f}, {comparison.interval.high:.2f}]"
        cells.append(told if comparison.verdict == "faster" else f"{told} {comparison.verdict}")
    return [
        row.encoder,
        str(row.batch),
        f"{median(row.samples_ms[OURS]):.0f}",
        *cells,
        f"{100 * row.floor_share:.0f} %",
    ]


def print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
