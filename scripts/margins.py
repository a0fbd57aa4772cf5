"""How near right programs of the five come to the limits that an export sets, and how far beyond wrong ones are.

`scripts/margins --output build/margins` builds each encoder at full size from seeded weights, plants massive channels
into them, freezes the network and runs it, then puts each fault of the tests into it. It writes the table to
docs/margins.md and every figure to the folder. Twenty minutes on two cores; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from gate import Gate, gate_of, largest_share  # noqa: E402
from mutations import MUTATIONS, mean_of_patches  # noqa: E402
from outliers import NONE, Outliers  # noqa: E402

from npu_export import onnx  # noqa: E402
from npu_export.encoders import find_encoder  # noqa: E402
from npu_runtime.artifact.schema import Precision, TensorSpec  # noqa: E402
from npu_runtime.artifact.staging import write_file  # noqa: E402
from npu_runtime.environment import package_versions  # noqa: E402
from npu_runtime.parity.measure import Outputs  # noqa: E402

PAGE = ROOT / "docs/margins.md"
FAMILIES = {
    "pe-lang-l14-448": "pe_lang",
    "aimv2-large-distilled": "aimv2",
    "vit-base": "vit",
    "dinov2-small-reg4": "dinov2",
    "convnext-base-clip": "convnext",
}
PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "pe-lang-l14-448": ("fp32", "bf16"),
    "aimv2-large-distilled": ("fp32", "fp16"),
}
"""Those in which an encoder is shown; all three for the others."""
OUTLIERS = (NONE, Outliers(100), Outliers(1000))
"""The tests have them in four channels and in a few tokens as well."""
HEAD = """# Margins of the limits

What `npu-export` measures of a network decides how far a program of it may be from the eager reference. This table
shows both sides of these limits on the CPU: how near the program of the **right** network comes to the nearest of them,
and how far beyond it the program of a **wrong** one is that is hardest to tell. All five encoders at full size (PE-Lang
at 224 pixels), seeded weights, one image; torch {torch}, onnxruntime {onnxruntime}, timm {timm}.

- *massive channels*: planted into the residual stream of an early block, as trained encoders have them.
- *right*: the largest of all checks as a share of its limit; above 1 a right export would be refused. In fp32 and fp16
  the ONNX program in ONNX Runtime (TorchScript is equal to eager in fp32), in bf16 the model of that precision, since
  not every CPU has such arithmetic.
- *wrong*: the same of the fault that comes nearest to passing, and which that is; below 1 it would be missed. In half
  precision that is of two checks the one that sees more: with the precision's rounding, and without it.

`scripts/margins --output build/margins` makes this page.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--only", choices=FAMILIES, help="one encoder; the page is not written")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for encoder in FAMILIES if arguments.only is None else (arguments.only,):
        for outliers in OUTLIERS:
            rows += measure(encoder, outliers, arguments.output)
    if arguments.only is None:
        versions = package_versions(("torch", "onnxruntime", "timm"))
        head = HEAD.format(**versions)
        write_file(PAGE, "\n".join([head, *table(rows), ""]).encode())


def measure(encoder: str, outliers: Outliers, output: Path) -> list[dict[str, Any]]:
    """The rows of an encoder with outliers, kept in the folder."""
    kept = output / f"{encoder}-{outliers.value:g}.json"
    if not kept.exists():
        spec = find_encoder(encoder)
        gate = gate_of(spec.at_size(224) if encoder == "pe-lang-l14-448" else spec, outliers, (0,))
        rows = [
            row_of(encoder, outliers, precision, gate)
            for precision in PRECISIONS.get(encoder, ("fp32", "fp16", "bf16"))
        ]
        write_file(kept, (json.dumps(rows, indent=2) + "\n").encode())
    rows = cast("list[dict[str, Any]]", json.loads(kept.read_text("utf-8")))
    print("\n".join(table(rows)[2:]), flush=True)
    return rows


def row_of(encoder: str, outliers: Outliers, precision: Precision, gate: Gate) -> dict[str, Any]:
    faults = {}
    for fault in MUTATIONS[FAMILIES[encoder]]:
        share = largest_share(gate.judge(gate.outputs(precision, fault), precision))
        if precision != "fp32":
            unrounded = gate.judge_unrounded(gate.unrounded(precision, fault), precision)
            share = max(share, largest_share(unrounded))
        faults[fault.__name__] = share
    prefix = gate.specs[-1].groups[-1].start if gate.specs[-1].groups else 0
    if prefix:
        pooled = mean_of_patches(gate.outputs(precision), prefix)
        faults["mean_of_patches"] = largest_share(gate.judge(pooled, precision))
    outputs = gate.outputs(precision) if precision == "bf16" else in_onnxruntime(gate, precision)
    right = largest_share(gate.judge(outputs, precision))
    return {"encoder": encoder, "precision": precision, "outliers": str(outliers), "right": right, "faults": faults}


def in_onnxruntime(gate: Gate, precision: Precision) -> Outputs:
    """What the right network's ONNX program gives."""
    import onnxruntime

    shape = ("B", *gate.images.shape[1:])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        with (path.parent / onnx.WEIGHTS_FILE).open("wb") as file:
            spec = TensorSpec("pixel_values", "float32", cast(Any, shape))
            model, _ = onnx.export_graph(gate.module(precision), spec, gate.specs, 1, 18)
            onnx.write_graph(model, onnx.WeightsFile(file), path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        runs = [session.run(None, {"pixel_values": image[None]}) for image in gate.images]
    return {spec.name: np.concatenate(arrays) for spec, arrays in zip(gate.specs, zip(*runs))}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    lines = [
        "| encoder | precision | massive channels | right | wrong | the fault that comes nearest |",
        "|" + "---|" * 6,
    ]
    for row in rows:
        name, share = min(row["faults"].items(), key=lambda fault: fault[1])
        cells = (row["encoder"], row["precision"], row["outliers"], f"{row['right']:.2f}", f"{share:,.1f}")
        lines.append(f"| {' | '.join(cells)} | {name.replace('_', ' ')} |")
    return lines


if __name__ == "__main__":
    main()
