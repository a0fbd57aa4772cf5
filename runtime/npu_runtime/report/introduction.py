"""What was exported from which weights, how to use it, and its files."""

from __future__ import annotations

import json
from collections.abc import Iterator

from npu_runtime.artifact.schema import Manifest, TensorSpec, Weights
from npu_runtime.report.context import Context
from npu_runtime.report.document import Block, Code, Commands, Section, Table, Text, columns, paragraph
from npu_runtime.report.spell import absent, number, spell_size


def introduction(context: Context) -> Section:
    say, subject = context.say, context.subject
    manifest = subject.manifest
    blocks: list[Block] = []
    if subject.weights.random_seed is not None:
        blocks.append(paragraph(Text(say("random weights", seed=subject.weights.random_seed), "warn")))
    if manifest is None:
        blocks.append(paragraph(say("introduction.no manifest", encoder=subject.encoder, precision=subject.precision)))
    else:
        batches = say.join(sorted({program.batch for program in manifest.programs}))
        said = say(
            "introduction.exported",
            encoder=manifest.encoder,
            precision=manifest.precision,
            formats=say.join(manifest.formats()),
            batches=batches,
        )
        blocks.append(paragraph(said))
    facts = context.facts(say("table.artifact"), _facts(context), context.export_command)
    weights = context.facts(say("table.weights"), _weights(context, subject.weights), context.export_command)
    return context.section("introduction", *blocks, weights, facts)


def _weights(context: Context, weights: Weights) -> Iterator[tuple[str, Text]]:
    say, coverage = context.say, weights.coverage
    yield say("fact.source"), Text(weights.source, "code")
    yield say("fact.layout"), Text(weights.layout, "code")
    if weights.prefix:
        yield say("fact.prefix"), Text(weights.prefix, "code")
    for file in weights.files:
        yield say("fact.checkpoint"), Text(f"{file.path} ({spell_size(file.nbytes)})", "code")
        yield say("fact.checkpoint sha256"), Text(file.sha256, "code")
    told = say(
        "coverage", matched=coverage.matched, transformed=coverage.transformed, dropped=coverage.dropped
    )  # fmt: skip
    yield say("fact.coverage"), Text(told)
    yield say("fact.parameters"), number(f"{coverage.parameters:,}")
    yield say("fact.state"), Text(weights.state_sha256, "code")


def _facts(context: Context) -> Iterator[tuple[str, Text]]:
    say, subject = context.say, context.subject
    yield say("fact.encoder"), Text(subject.encoder, "code")
    yield say("fact.precision"), Text(subject.precision, "code")
    yield say("fact.path"), Text(subject.path, "code")
    yield say("fact.digest"), Text(subject.digest, "code")
    manifest = subject.manifest
    if manifest is None:
        for fact in ("programs", "inputs", "outputs", "preprocessing", "revision"):
            yield say(f"fact.{fact}"), absent(say, "not given")
        return
    opsets = sorted({program.opset for program in manifest.programs if program.opset is not None})
    programs = say.join(manifest.formats())
    yield say("fact.programs"), Text(programs if not opsets else say("programs", formats=programs, opset=opsets[-1]))
    yield say("fact.inputs"), Text(say.join(map(spell_tensor, manifest.inputs)), "code")
    yield say("fact.outputs"), Text(say.join(map(spell_tensor, manifest.outputs)), "code")
    yield say("fact.preprocessing"), Text(_preprocessing(context, manifest))
    yield say("fact.preprocessing source"), Text(manifest.preprocessing.source, "quoted")
    yield say("fact.probes"), Text(say("yes") if manifest.probes is not None else say("no"))
    revision = manifest.provenance.revision
    yield say("fact.revision"), absent(say, "not recorded") if revision is None else Text(revision, "code")


def _preprocessing(context: Context, manifest: Manifest) -> str:
    how = manifest.preprocessing
    key = "preprocessing.squashed" if how.shortest_edge is None else "preprocessing.cropped"
    return context.say(
        key,
        height=how.size[0],
        width=how.size[1],
        edge=how.shortest_edge,
        interpolation=context.say(f"interpolation.{how.interpolation}"),
        mean=", ".join(f"{value:g}" for value in how.mean),
        std=", ".join(f"{value:g}" for value in how.std),
    )


def spell_tensor(spec: TensorSpec) -> str:
    """`embedding float32 [B, 768]`."""
    return f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]"


def quick_start(context: Context) -> Section:
    say, manifest = context.say, context.subject.manifest
    device = next((given.record.device for given in context.records if given.record.device != "cpu"), "cpu")
    given = json.dumps(context.subject.path, ensure_ascii=False)
    placed = "" if device == "cpu" else f', device="{device}"'
    lines = ["import npu_runtime", "", f"with npu_runtime.load({given}{placed}) as encoder:"]
    if manifest is None:
        lines += ["    features = encoder(pixel_values)", "    outputs = encoder.run(pixel_values)"]
    else:
        shapes = [f"{spec.name} {[*spec.shape]}".replace("'B'", "N") for spec in (*manifest.inputs, *manifest.outputs)]
        first, rest = shapes[0], shapes[1:]
        lines += [
            f"    features = encoder(pixel_values)  # {first} -> {rest[0]}",
            f"    outputs = encoder.run(pixel_values)  # {', '.join(rest)}",
        ]
    code = Code("\n".join(lines), say("code.load"))
    blocks: list[Block] = [paragraph(say("quick start.commands")), Commands(context.commands)]
    if manifest is None:
        blocks.append(paragraph(absent(say, "quick start.no export")))
    return context.section("quick start", *blocks, code)


def files(context: Context) -> Section:
    say, manifest = context.say, context.subject.manifest
    if manifest is None:
        return context.section("files", paragraph(absent(say, "files.not given")))
    heads = columns([say("column.file")], [say("column.size")]) + columns(["sha256"])
    rows = tuple(
        (Text(file.file, "code"), number(spell_size(file.nbytes)), Text(file.sha256, "code")) for file in manifest.files
    )
    return context.section("files", Table(say("table.files"), heads, rows, context.export_command))
