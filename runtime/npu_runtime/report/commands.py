"""Command lines that give a record's figures again, from what it holds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from npu_runtime.artifact.schema import Manifest
from npu_runtime.backends.base import GraphChoice
from npu_runtime.backends.table import EAGER
from npu_runtime.bench.records import BenchRecord
from npu_runtime.parity.inputs import DEFAULT_SEEDS
from npu_runtime.parity.records import ParityRecord


def export_command(manifest: Manifest, output: str) -> str:
    """The export of an artifact; `output` is its folder."""
    weights = manifest.provenance.weights
    parts = ["npu-export", "--model", manifest.encoder, "--weights", weights.source]
    if weights.random_seed is None or not weights.source.startswith("random:"):
        parts += ["--layout", weights.layout]
    parts += ["--precision", manifest.precision]
    for format in manifest.formats():
        parts += ["--format", format]
    parts += ["--batch", _list(sorted({program.batch for program in manifest.programs}))]
    opsets = {program.opset for program in manifest.programs if program.opset is not None}
    if opsets:
        parts += ["--opset", str(max(opsets))]
    parts += ["--image-size", str(manifest.preprocessing.size[0])]
    parts += ["--input", manifest.inputs[0].dtype] if manifest.inputs[0].dtype != "float32" else []
    publisher = manifest.preprocessing.publisher
    parts += ["--preprocess", publisher] if publisher is not None else []
    parts += ["--probes"] if manifest.probes is not None else []
    parts += ["--keep-fp32", ",".join(manifest.keep_fp32)] if manifest.keep_fp32 else []
    return shlex.join([*parts, "--output", output])


def parity_command(record: ParityRecord) -> str:
    """The run of verify or parity."""
    parts = ["npu-runtime", record.command, record.artifact.path]
    if record.command == "verify":
        return shlex.join([*parts, *_conditions(record), "--json"])
    backends = dict.fromkeys(step.backend for step in record.steps if step.backend != EAGER)
    for backend in backends:
        parts += ["--backend", backend]
    batches = sorted({batch for step in record.steps for batch in step.batches})
    parts += ["--batch", str(batches[0])] if len(batches) == 1 else []
    seeds = [given.name.removeprefix("seed ") for given in record.inputs if given.kind == "seed"]
    if seeds != [str(seed) for seed in DEFAULT_SEEDS] or len(seeds) != len(record.inputs):
        parts += ["--seeds", ",".join(seeds)] if seeds else []
    images = [given.name for given in record.inputs if given.kind == "image"]
    for image in _folded([*images, *(skipped.name for skipped in record.skipped)]):
        parts += ["--images", image]
    arrays = dict.fromkeys(re.sub(r"\[[0-9]+\]$", "", i.name) for i in record.inputs if i.kind == "array")
    for array in arrays:
        parts += ["--arrays", array]
    given = dict.fromkeys(f"{t.output}.{t.metric}={t.limit:g}" for t in record.overridden)
    for tolerance in given:
        parts += ["--tolerance", tolerance]
    parts += ["--profile", record.profile] if record.profile is not None else []
    parts += ["--localise"] if record.localised else []
    parts += ["--weights", record.weights] if record.weights is not None else []
    return shlex.join([*parts, *_conditions(record), "--record", "parity.json"])


def bench_command(record: BenchRecord) -> str:
    parts = ["npu-runtime", "bench", record.artifact]
    backends = [*(row.backend for row in record.rows), *(row.backend for row in record.throughput)]
    for backend in dict.fromkeys(backends):
        parts += ["--backend", backend]
    parts += ["--batch", _list(record.batches)]
    parts += ["--iterations", str(record.iterations), "--warmup", str(record.warmup)]
    parts += ["--adaptive"] if record.adaptive else []
    if record.throughput:
        parts += ["--callers", _list(dict.fromkeys(row.callers for row in record.throughput))]
    if record.load_seconds is not None:
        parts += ["--seconds", f"{record.load_seconds:g}"]
    parts += ["--cold"] if record.cold or record.cold_not_run else []
    parts += ["--threads", str(record.threads), *_device(record.device)]
    parts += ["--numerics", record.numerics] if record.numerics != "strict" else []
    parts += _graph(record.graph)
    parts += ["--allow-fallback"] if record.allow_fallback else []
    return shlex.join([*parts, "--record", "bench.json"])


def _list(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _device(device: str) -> Sequence[str]:
    return () if device == "cpu" else ("--device", device)


def _graph(graph: GraphChoice) -> Sequence[str]:
    return () if graph == "auto" else ("--graph", "on" if graph else "off")


def _conditions(record: ParityRecord) -> Sequence[str]:
    """Where and how the steps ran, where that is not the default."""
    conditions = [step.conditions for step in record.steps if step.conditions is not None]
    chosen = {str(c.numerics.get("numerics")) for c in conditions} - {"strict", "None"}
    allowed = any(c.fallback != () for c in conditions)
    return (
        *_device(record.device),
        *(("--threads", str(record.threads)) if record.threads is not None else ()),
        *_graph(record.graph),
        *(("--numerics", chosen.pop()) if chosen else ()),
        *(("--allow-fallback",) if allowed else ()),
    )


def _folded(paths: Sequence[str]) -> list[str]:
    """Files one by one; where they are many, the folders that they lie in."""
    return list(dict.fromkeys(paths if len(paths) <= 8 else [str(Path(path).parent) for path in paths]))
