"""Speed and memory as ratios, both sides of each in one run. Prints a table, writes a record.

Run it on an idle machine: `.venv/bin/python scripts/benchmark.py --output build/benchmark.json` measures vit-base;
`--encoders` the exports, builds and calls of all five instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from npu_runtime import Encoder, load
from npu_runtime.environment import describe_environment

HERE = Path(__file__).resolve().parent
LAYOUT_FOLDER = HERE.parent / "tests/data/layouts"
FIRST_ONNX = """
import sys, numpy, npu_runtime
npu_runtime.load(sys.argv[1])(numpy.zeros((1, 3, 224, 224), numpy.float32))
"""
FIRST_EAGER = """
import sys, torch
from npu_export.checkpoint import open_checkpoint
from npu_export.encoders import find_encoder
from npu_export.network import load_network, plan_weights
from pathlib import Path
encoder = find_encoder("vit-base")
network = load_network(plan_weights(encoder, open_checkpoint(Path(sys.argv[1]))))
with torch.inference_mode():
    encoder.with_outputs(network)(torch.zeros(1, 3, 224, 224))
"""


LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
# Linux counts what a process was forked from in the peak of its children, and the benchmark itself grows large.
EXPORT_BY_HAND = """
import sys, warnings, torch
from pathlib import Path
from npu_export.checkpoint import open_checkpoint
from npu_export.encoders import find_encoder
from npu_export.network import load_network, plan_weights
encoder, folder = find_encoder(sys.argv[1]), Path(sys.argv[3])
module = encoder.with_outputs(load_network(plan_weights(encoder, open_checkpoint(Path(sys.argv[2])))))
x = torch.zeros(encoder.inputs[0].of_batch(1))
warnings.simplefilter("ignore")
with torch.no_grad():
    torch.jit.save(torch.jit.trace(module, x), folder / "hand.ts")
    torch.onnx.export(module, (x,), folder / "hand.onnx", dynamo=True, verbose=False)
"""
BUILD = """
import sys, time
from npu_export.encoders import find_encoder
from npu_export.network import network_shapes
from npu_export.timm_import import import_timm
import_timm()
import timm
timm.create_model("vit_tiny_patch16_224", img_size=32)  # what the first build of any network imports
encoder = find_encoder(sys.argv[1])
for build in (lambda: network_shapes(encoder.layouts[0]), lambda: timm.create_model(sys.argv[2])):
    start = time.perf_counter()
    build()
    print(1000 * (time.perf_counter() - start))
"""
TIMM_NAMES = {
    "vit-base": "vit_base_patch16_224",
    "pe-lang-l14-448": "vit_pe_lang_large_patch14_448",
    "convnext-base-clip": "convnext_base.clip_laion2b",
    "dinov2-small-reg4": "vit_small_patch14_reg4_dinov2",
    "aimv2-large-distilled": "aimv2_large_patch14_224",
}
LAYOUTS = {
    "vit-base": "vit.hf.tsv",
    "pe-lang-l14-448": "pe-lang.meta.tsv",
    "convnext-base-clip": "convnext.timm.tsv",
    "dinov2-small-reg4": "dinov2.timm.tsv",
    "aimv2-large-distilled": "aimv2.hf.tsv",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. `ratio` is the median over rounds of ours / other, so that drift cancels."""

    what: str
    ours: float
    other: float
    unit: str
    ratio: float
    limit: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="where the record is written")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each comparison")
    parser.add_argument(
        "--encoders",
        nargs="*",
        choices=LAYOUTS,
        metavar="NAME",
        help="these, or all five, instead of vit-base in depth",
    )
    arguments = parser.parse_args()
    rows: list[Row] = []
    by_encoder = arguments.encoders is not None
    names = arguments.encoders or list(LAYOUTS)
    for measured in measure_encoders(names, arguments.rounds) if by_encoder else measure_vit_base(arguments.rounds):
        rows.append(measured)
        what, ours, other = measured.what, measured.ours, measured.other
        print(
            f"{what:<68} {ours:>9.1f} {other:>9.1f} {measured.unit} {measured.ratio:>7.3f}   {measured.limit}",
            flush=True,
        )
    record = {
        "record": "benchmark",
        "environment": describe_environment(),
        "rows": [asdict(row) for row in rows],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def measure_vit_base(rounds: int) -> Iterator[Row]:
    """Exports, processes and calls of vit-base."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint, artifact = work / "checkpoint", work / "artifact"
        run(
            [
                sys.executable,
                str(HERE / "make_checkpoint.py"),
                str(LAYOUT_FOLDER / LAYOUTS["vit-base"]),
                str(checkpoint),
            ]
        )
        yield from compare_exports(checkpoint, artifact, work)
        yield from compare_processes(checkpoint, artifact, rounds)
        yield from compare_calls(checkpoint, artifact, work, rounds, batches=(1, 4))


def measure_encoders(names: Sequence[str], rounds: int) -> Iterator[Row]:
    """Of each encoder: building, one export against torch's two exporters by hand, and calls at batch 1."""
    for encoder in names:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            checkpoint, artifact = work / "checkpoint", work / "artifact"
            make_checkpoint(encoder, checkpoint)
            yield compare_builds(encoder)
            yield from compare_with_hand(encoder, checkpoint, artifact, work)
            for row in compare_calls(checkpoint, artifact, work, rounds, batches=(1,)):
                yield replace(row, what=f"{encoder}: {row.what}")


def make_checkpoint(encoder: str, folder: Path) -> None:
    run([sys.executable, str(HERE / "make_checkpoint.py"), str(LAYOUT_FOLDER / LAYOUTS[encoder]), str(folder)])


def compare_builds(encoder: str) -> Row:
    """Milliseconds to build a network that is about to be filled, and by timm's create_model, each three times."""
    output = [
        subprocess.run(
            [sys.executable, "-c", BUILD, encoder, TIMM_NAMES[encoder]], check=True, capture_output=True, text=True
        ).stdout.split()
        for _ in range(3)
    ]
    ours, other = ([float(pair[index]) for pair in output] for index in (0, 1))
    return compare(f"{encoder}: build / timm.create_model", ours, other, "below 1")


def compare_with_hand(encoder: str, checkpoint: Path, artifact: Path, work: Path) -> list[Row]:
    """One export of both formats against torch.jit.trace and torch.onnx.export, and its memory against the weights."""
    seconds = []
    hand = [sys.executable, "-c", EXPORT_BY_HAND, encoder, str(checkpoint), str(work)]
    ours = [installed("npu-export"), "--model", encoder, "--weights", str(checkpoint), "--output", str(artifact)]
    peaks_mb = []
    for command in (ours, hand):
        start = time.perf_counter()
        peaks_mb.append(run(command))
        seconds.append(time.perf_counter() - start)
    limit_mb = sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e6 + 1500
    times = Row(
        f"{encoder}: export / trace and onnx.export by hand", *seconds, "s", seconds[0] / seconds[1], "at most 1.5"
    )
    peak = Row(
        f"{encoder}: peak memory / fp32 weights + 1500 MB",
        peaks_mb[0],
        limit_mb,
        "MB",
        peaks_mb[0] / limit_mb,
        "at most 1",
    )
    return [times, peak]


def compare_exports(checkpoint: Path, artifact: Path, work: Path) -> list[Row]:
    """Peak memory of an export, and disk for weights of four batch sizes against one."""
    command = [installed("npu-export"), "--model", "vit-base", "--weights", str(checkpoint)]
    peak_mb = run([*command, "--batch", "1,4", "--output", str(artifact)])
    weights_mb = sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e6
    run([*command, "--format", "onnx", "--batch", "1,2,4,8", "--output", str(work / "four")])
    one, four = ((folder / "weights.onnx.data").stat().st_size / 1e6 for folder in (artifact, work / "four"))
    limit_mb = weights_mb + 1200
    return [
        Row(
            "peak memory of an export / fp32 weights + 1200 MB",
            peak_mb,
            limit_mb,
            "MB",
            peak_mb / limit_mb,
            "at most 1",
        ),
        Row("disk for ONNX weights, four batch sizes / two", four, one, "MB", four / one, "1"),
    ]


def compare_processes(checkpoint: Path, artifact: Path, rounds: int) -> list[Row]:
    """Import time, and a fresh process up to its first embedding."""

    def process(code: str, *arguments: object) -> Callable[[], object]:
        return lambda: run([sys.executable, "-c", code, *map(str, arguments)])

    imports = interleave([process("import npu_runtime"), process("import numpy")], rounds)
    first = interleave([process(FIRST_ONNX, artifact), process(FIRST_EAGER, checkpoint)], max(3, rounds // 3))
    return [
        compare("import npu_runtime / import numpy, fresh process", *imports, "at most 1.5"),
        compare("process to first embedding, ONNX / eager", *first, "at most 0.25"),
    ]


def compare_calls(checkpoint: Path, artifact: Path, work: Path, rounds: int, batches: Sequence[int]) -> list[Row]:
    """A call through this project against the raw session, an export by hand, and eager."""
    import onnxruntime
    import torch

    threads = len(os.sched_getaffinity(0))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    eager = load(artifact, backend="eager", threads=threads)
    ours = load(artifact, threads=threads)
    torchscript = load(artifact, backend="torchscript", threads=threads)
    program = torch.jit.load(artifact / "model.ts")
    rows: list[Row] = []
    for batch in batches:
        x = np.random.default_rng(0).standard_normal(ours.manifest.inputs[0].of_batch(batch), np.float32)
        ours(x)
        raw = ours._session._open[batch]  # type: ignore[union-attr]
        hand = onnxruntime.InferenceSession(str(export_by_hand(eager, x, work)), options)

        def run_raw(x: np.ndarray = x, raw: onnxruntime.InferenceSession = raw) -> object:
            return raw.run(["embedding"], {"pixel_values": x})

        def run_hand(x: np.ndarray = x, hand: onnxruntime.InferenceSession = hand) -> object:
            return hand.run([hand.get_outputs()[0].name], {hand.get_inputs()[0].name: x})

        def run_raw_torchscript(x: np.ndarray = x, method: str = f"b{batch}") -> object:
            with torch.inference_mode():
                return getattr(program, method)(torch.from_numpy(x))[0].numpy()

        mine, by_raw, by_hand, by_eager, by_torchscript, by_raw_torchscript = interleave(
            [
                lambda x=x: ours(x),
                run_raw,
                run_hand,
                lambda x=x: eager(x),
                lambda x=x: torchscript(x),
                run_raw_torchscript,
            ],
            rounds * 2,
        )
        rows += [
            compare(f"call / raw onnxruntime session, batch {batch}", mine, by_raw, "at most 1.02, or 0.1 ms more"),
            compare(f"ONNX artifact / torch.onnx.export by hand, batch {batch}", mine, by_hand, "at most 1"),
            compare(f"ONNX artifact / eager, batch {batch}", mine, by_eager, "below 1"),
            compare(
                f"call / raw TorchScript, batch {batch}",
                by_torchscript,
                by_raw_torchscript,
                "at most 1.02, or 0.1 ms more",
            ),
        ]
    return rows


def compare(what: str, ours: Sequence[float], other: Sequence[float], limit: str) -> Row:
    """A row of two lists of milliseconds, taken in the same rounds."""
    ratio = median(a / b for a, b in zip(ours, other))
    return Row(what, median(ours), median(other), "ms", ratio, limit)


def export_by_hand(eager: Encoder, x: np.ndarray, work: Path) -> Path:
    """What a user writes without this project: torch.onnx.export of the network with its defaults."""
    import torch

    path = work / f"hand.b{len(x)}.onnx"
    module = eager._session._calls[len(x)]  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.from_numpy(x),), str(path), dynamo=True, verbose=False)
    return path


def interleave(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Milliseconds of each call, one of each a round in random order, after a warm-up round."""
    samples: list[list[float]] = [[] for _ in calls]
    generator = np.random.default_rng(0)
    for index in range(rounds + 1):
        for which in generator.permutation(len(calls)):
            time.sleep(0.02)  # threads of the call before spin for work a while
            start = time.perf_counter()
            calls[which]()
            if index:
                samples[which].append(1000 * (time.perf_counter() - start))
    return samples


def installed(name: str) -> str:
    """A command of this project in the environment of the running Python."""
    return str(Path(sys.executable).with_name(name))


def run(command: Sequence[str]) -> float:
    """Run a process, its output kept back, and return its own peak memory in MB."""
    done = subprocess.run([sys.executable, "-c", LAUNCH, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}\n{done.stderr}")
    return int(done.stdout) * 1024 / 1e6


if __name__ == "__main__":
    main()
