"""Export all five encoders at full size, each from seeded checkpoints in two layouts, and print a table in Markdown.

`.venv/bin/python scripts/export_table.py --output build/table` takes about a quarter of an hour on two cores and
10 GB of disk for a while. The record `table.json` beside it holds every figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark import installed, run

from npu_runtime.environment import describe_environment

HERE = Path(__file__).resolve().parent
LAYOUTS = HERE.parent / "tests/data/layouts"
CHECKPOINTS = (
    ("vit-base", "hf", "vit.hf.tsv"),
    ("vit-base", "jax", "vit.jax.tsv"),
    ("pe-lang-l14-448", "meta", "pe-lang.meta.tsv"),
    ("pe-lang-l14-448", "timm", "pe-lang.timm.tsv"),
    ("convnext-base-clip", "timm", "convnext.timm.tsv"),
    ("convnext-base-clip", "openclip", "convnext.openclip.tsv"),
    ("dinov2-small-reg4", "timm", "dinov2.timm.tsv"),
    ("dinov2-small-reg4", "meta", "dinov2.meta.tsv"),
    ("aimv2-large-distilled", "hf", "aimv2.hf.tsv"),
    ("aimv2-large-distilled", "apple", "aimv2.apple.tsv"),
)
COLUMNS = (
    "encoder",
    "layout",
    "parameters",
    "outputs",
    "keys matched / transformed / dropped",
    "TorchScript",
    "ONNX",
    "model.ts + weights.onnx.data",
    "seconds",
    "peak memory",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the record")
    parser.add_argument("--only", help="one encoder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    print_row(COLUMNS)
    print_row(["---"] * len(COLUMNS))
    for encoder, layout, keys in CHECKPOINTS:
        if arguments.only in (None, encoder):
            with tempfile.TemporaryDirectory(dir=arguments.output) as work:
                rows.append(export(encoder, layout, LAYOUTS / keys, Path(work)))
            print_row(spell(rows[-1]))
    record = {"record": "export-table", "environment": describe_environment(), "rows": rows}
    (arguments.output / "table.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def export(encoder: str, layout: str, keys: Path, work: Path) -> dict[str, Any]:
    """One export in a process of its own, both formats, and its figures; its files are removed."""
    checkpoint, artifact = work / "checkpoint", work / "artifact"
    run([sys.executable, str(HERE / "make_checkpoint.py"), str(keys), str(checkpoint)])
    start = time.monotonic()
    peak_mb = run(
        [installed("npu-export"), "--model", encoder, "--weights", str(checkpoint), "--output", str(artifact)]
    )
    seconds = time.monotonic() - start
    verified = json.loads(
        subprocess.run(
            [installed("npu-runtime"), "verify", str(artifact), "--json"], check=True, capture_output=True, text=True
        ).stdout
    )
    manifest = json.loads((artifact / "manifest.json").read_text("utf-8"))
    weights = manifest["provenance"]["weights"]
    if weights["layout"] != layout:
        raise SystemExit(f"{keys.name} was taken for layout {weights['layout']}, not {layout}")
    shutil.rmtree(checkpoint)
    return {
        "encoder": encoder,
        "layout": layout,
        "coverage": weights["coverage"],
        "outputs": manifest["outputs"],
        "differences": {
            f"{step['backend']} {output['output']}": output["metrics"]["max_abs_error"]
            for step in verified["steps"]
            for output in step["outputs"]
            if output["group"] is None
        },
        "files": {record["file"]: record["nbytes"] for record in manifest["files"]},
        "seconds": seconds,
        "peak_mb": peak_mb,
    }


def spell(row: dict[str, Any]) -> list[str]:
    """The cells of a row; differences are the largest of all outputs, from the fp32 eager reference."""
    coverage = row["coverage"]

    def worst(backend: str) -> str:
        largest = max(value for name, value in row["differences"].items() if name.startswith(backend))
        return "0" if largest == 0 else f"{largest:.1e}"

    return [
        row["encoder"],
        row["layout"],
        f"{coverage['parameters']:,}",
        ", ".join(f"{spec['name']} [{', '.join(map(str, spec['shape']))}]" for spec in row["outputs"]),
        f"{coverage['matched']} / {coverage['transformed']} / {coverage['dropped']}",
        worst("torchscript"),
        worst("onnxruntime"),
        " + ".join(f"{row['files'][name] / 1e6:,.0f}" for name in ("model.ts", "weights.onnx.data")) + " MB",
        f"{row['seconds']:.0f}",
        f"{row['peak_mb'] / 1e3:.2f} GB",
    ]


def print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
