"""All five encoders at full size on the vendor's torch_npu over the emulated CANN: what runs, how far off, launches.

`scripts/npu_table --output build/npu` exports each from seeded weights, runs the commands of npu-runtime on it with
`--device npu:0` and writes the table to docs/emulated-npu.md and every record to the folder. Half an hour on two cores.
Times mean nothing there, since the emulation computes on the CPU, so the benchmark makes three rounds. A run that was
interrupted goes on with the encoder that it was at: a record that is in the folder is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark import installed

from npu_runtime.artifact.staging import write_file
from npu_runtime.environment import package_versions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from emulated_cann.build import build_emulated_cann, cann_environment  # noqa: E402

PAGE = ROOT / "docs/emulated-npu.md"
PHOTOGRAPHS = ROOT / "tests/data/photographs"
ENCODERS = ("vit-base", "pe-lang-l14-448", "convnext-base-clip", "dinov2-small-reg4", "aimv2-large-distilled")
COUNT = """
import json, sys, numpy, torch, npu_runtime
artifact, backend, log = sys.argv[1:]
with npu_runtime.load(artifact, device="npu:0", backend=backend, graph=False) as encoder:
    images = numpy.zeros(encoder.manifest.inputs[0].of_batch(1), numpy.float32)
    for _ in range(3):
        encoder(images)
    before = len(open(log).readlines())
    encoder(images)
    lines = open(log).read().splitlines()[before:]
print(json.dumps({
    "launches": sum(line.startswith("launch ") for line in lines),
    "copied_in": sum(int(line.split()[2]) for line in lines if line.startswith("copied host_to_device")),
    "device_peak_nbytes": torch.npu.max_memory_allocated(0),
}))
"""
HEAD = """# On the emulated NPU

All five encoders at full size, seeded weights, batch 1, fp32, through the vendor's own torch_npu {torch_npu} (torch
{torch}) **over an emulated CANN** (`tests/emulated_cann`), which computes with torch's kernels of the CPU. No NPU was
involved: this shows that torch_npu takes what the runtime asks of it, launch by launch, and that nothing falls back to
the CPU. It says nothing of an NPU's kernels, their accuracy or their time. `scripts/npu_table --output build/npu` makes
this page.

Every command ran with its default flags, but for `--iterations 3 --warmup 1` of `bench`; the export had `--probes`.
Differences are the largest of all outputs and inputs: of `verify` from the stored reference, of `parity` from eager on
the CPU (five seeds). Launches are calls of aclnn in one call of the encoder without graph replay. Device memory is the
most that torch_npu's allocator held.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the records")
    parser.add_argument("--only", choices=ENCODERS, help="one encoder, printed and not written to the page")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    cann = cann_environment(build_emulated_cann(ROOT / "build" / "emulated-cann"))
    rows = []
    for encoder in ENCODERS if arguments.only is None else (arguments.only,):
        record = arguments.output / f"{encoder}.json"
        if not record.exists():
            with tempfile.TemporaryDirectory(dir=arguments.output) as work:
                write_file(record, (json.dumps(measure(encoder, Path(work), cann), indent=2) + "\n").encode())
        rows.append(json.loads(record.read_text("utf-8")))
        print(" | ".join(spell(rows[-1])), flush=True)
    if arguments.only is None:
        table = [COLUMNS, ["---"] * len(COLUMNS), *map(spell, rows)]
        versions = package_versions(("torch", "torch-npu"))
        page = HEAD.format(torch=versions["torch"], torch_npu=versions["torch-npu"])
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page + "".join(f"| {' | '.join(cells)} |\n" for cells in table), "utf-8")


def measure(encoder: str, work: Path, cann: dict[str, str]) -> dict[str, Any]:
    """Export an encoder, run every command on it, and keep what they said."""
    artifact = work / "artifact"
    export = ("--format", "torchscript", "--batch", "1", "--probes", "--weights", "random:0", "--output", artifact)
    run([installed("npu-export"), "--model", encoder, *map(str, export)], dict(os.environ))
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"} | cann

    def command(name: str, *options: str | Path) -> Any:
        line = [installed("npu-runtime"), name, str(artifact), *map(str, options), "--device", "npu:0", "--json"]
        return json.loads(run(line, environment))

    said = {
        "encoder": encoder,
        "verify": command("verify"),
        "parity": command("parity", "--localise"),
        "bench": command("bench", "--iterations", "3", "--warmup", "1"),
        "embed": command("embed", PHOTOGRAPHS, "--output", work / "features.npy"),
        "counts": {},
    }
    for backend in ("eager", "torchscript"):
        log = work / f"{backend}.log"
        line = [sys.executable, "-c", COUNT, str(artifact), backend, str(log)]
        said["counts"][backend] = json.loads(run(line, {**environment, "EMULATED_CANN_LOG": str(log)}))
    return said


def run(line: Sequence[str], environment: dict[str, str]) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} exited with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


COLUMNS = [
    "encoder",
    "verify",
    "parity: eager, TorchScript",
    "localise",
    "graph",
    "fell back",
    "launches: eager, TorchScript",
    "device memory: eager, TorchScript",
    "bench, embed",
]


def spell(said: dict[str, Any]) -> list[str]:
    """The cells of a row."""
    on_device = [step for step in said["parity"]["steps"] if step["device"] == "npu:0"]
    graphs = [g for step in said["verify"]["steps"] for g in step["conditions"]["graphs"]]
    reports = [step["conditions"] for step in [*said["verify"]["steps"], *on_device]]
    fallback = sorted({name for report in reports for name in report["fallback"]})
    counts = [said["counts"][backend] for backend in ("eager", "torchscript")]
    found = [at["first"] for at in said["parity"]["localised"]]
    embedded = said["embed"]["counts"]
    return [
        said["encoder"],
        largest(said["verify"]["steps"]),
        ", ".join(largest([step]) for step in on_device),
        ", ".join(name or "no block" for name in found),
        ", ".join(spell_graph(graph) for graph in graphs),
        ", ".join(fallback) or "nothing",
        ", ".join(f"{count['launches']}" for count in counts),
        ", ".join(f"{count['device_peak_nbytes'] / 1e6:,.0f} MB" for count in counts),
        f"{len(said['bench']['rows'])} rows, {embedded['embedded']} images",
    ]


def spell_graph(graph: dict[str, Any]) -> str:
    """Whether replays gave what plain calls give; which of them is faster means nothing here."""
    if graph["max_abs_difference"] is None or not (graph["replayed"] or "slower" in graph["reason"]):
        return str(graph["reason"])
    return f"replays differ by {graph['max_abs_difference']:.0e}".replace("0e+00", "0")


def largest(steps: Sequence[dict[str, Any]]) -> str:
    """The largest absolute difference of all outputs of steps, or why one was not made."""
    if missing := [step["reason"] for step in steps if not step["outputs"]]:
        return str(missing[0])
    return f"{max(output['metrics']['max_abs_error'] for step in steps for output in step['outputs']):.1e}"


if __name__ == "__main__":
    main()
