"""The parts of a report, on records made for the case."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import string
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from pages import Page, markdown_tables

import npu_runtime.report
from npu_runtime.artifact.schema import MANIFEST_NAME
from npu_runtime.backends.base import SessionReport
from npu_runtime.bench.records import BenchRecord, LoadRow, Stages
from npu_runtime.cli import bench as bench_command_line
from npu_runtime.cli import parity as parity_command_line
from npu_runtime.parity.inputs import InputRecord
from npu_runtime.parity.localise import BoundaryError
from npu_runtime.parity.records import Localisation
from npu_runtime.report.commands import bench_command, parity_command
from npu_runtime.report.compose import compose
from npu_runtime.report.document import Column, Report, Section, Table, Text, walk
from npu_runtime.report.html import write_html
from npu_runtime.report.markdown import write_markdown
from npu_runtime.report.messages import LANGUAGES, Say
from npu_runtime.report.plots import LimitedRow, Measured, Series, SpreadRow, draw_bars, draw_limits, draw_quantiles
from npu_runtime.report.spell import spell_cosine, spell_error, spell_limit, spell_size
from npu_runtime.report.subjects import Given, Subject, read_subjects

DATA = Path(__file__).parents[1] / "data"
SOURCES = sorted(Path(npu_runtime.report.__path__[0]).rglob("*"))


@pytest.fixture(scope="module")
def bench() -> BenchRecord:
    """Made by an older version: batch 1 of eager and both formats, with cold starts."""
    (subject,) = read_subjects([DATA / "records" / "bench-1.0.json"])
    return subject.benches[0]


@pytest.fixture(scope="module")
def parity(tiny_artifact: Path) -> Any:
    """A real run on two seeds."""
    from npu_runtime.artifact.store import open_artifact
    from npu_runtime.parity.inputs import Inputs, seeded_inputs
    from npu_runtime.parity.ladder import Ladder, plan_ladder
    from npu_runtime.parity.records import make_record

    artifact = open_artifact(tiny_artifact)
    inputs = Inputs(seeded_inputs((1, 2), artifact.manifest.inputs[0]))
    ladder = Ladder(artifact, inputs, threads=1)
    ladder.climb(plan_ladder(artifact.manifest, "cpu"))
    return make_record("parity", artifact, "cpu", ladder.steps, inputs=inputs.records, seconds=1.0)


def report_of(*records: Any, language: str = "en") -> tuple[Report, str, str]:
    """The report of records of one artifact, its page and its Markdown."""
    subject = Subject("0" * 64, records=[Given(f"{index}.json", record) for index, record in enumerate(records)])
    report, say = compose([subject], language), Say(language)
    return report, write_html(report, say), write_markdown(report, say)


def fields_of(message: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(message) if name is not None}


def test_every_language_has_the_same_messages_with_the_same_places() -> None:
    english = LANGUAGES["en"]
    for messages in LANGUAGES.values():
        assert list(messages) == list(english)
        for key, message in messages.items():
            assert message.strip(), key
            assert fields_of(message) == fields_of(english[key]), key


def test_chinese_messages_are_chinese() -> None:
    same = {key for key, text in LANGUAGES["zh"].items() if text == LANGUAGES["en"][key]}
    assert {key for key in same if not re.fullmatch(r"group\.cls|command\.run|column\.p9[059]", key)} == set()


def test_every_message_is_used_and_every_one_that_is_used_is_there() -> None:
    sources = [path for path in SOURCES if path.suffix in (".py", ".j2") and path.stem not in LANGUAGES]
    code = "".join(path.read_text("utf-8") for path in sources)
    quoted = {text for text in LANGUAGES["en"] if f'"{text}"' in code or f"'{text}'" in code}
    prefixes = tuple(set(re.findall(r'f"([a-z ]+\.)\{', code)))
    unused = {key for key in LANGUAGES["en"] if key not in quoted and not key.startswith(prefixes)}
    assert unused == set()
    said = set(re.findall(r'\bsay\(\s*"([^"]+)"', code))
    said |= set(re.findall(r'absent\((?:context\.)?say, "([^"]+)"', code))
    assert said <= set(LANGUAGES["en"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_a_record_lacks_is_told_and_nothing_fails(bench: BenchRecord, language: str) -> None:
    messages = LANGUAGES[language]
    bare = dataclasses.replace(
        bench,
        environment={},
        rows=bench.rows[2:3],
        cold=(),
        file_nbytes={},
        not_run={"eager": "no checkpoint"},
        accelerator=None,
    )
    for record in (bench, bare, dataclasses.replace(bare, rows=())):
        _, page, markdown = report_of(record, language=language)
        for key in ("load.none", "conclusion.no parity", "note.no ascend", "not given"):
            assert messages[key] in Page(page).words
        assert all(len({len(row) for row in table}) == 1 for table in markdown_tables(markdown))


def test_loads_and_stages_are_shown(bench: BenchRecord) -> None:
    row = bench.rows[0]
    loads = tuple(
        LoadRow("onnxruntime", 1, callers, 5.0, 10 * callers, 2.0 * callers, row.latency, row.samples_ms)
        for callers in (1, 2, 4)
    )
    staged = dataclasses.replace(row, stages=Stages(0.125, 7.5, 0.25))
    record = dataclasses.replace(
        bench, device="npu:0", rows=(staged, *bench.rows[1:]), throughput=loads, load_seconds=5.0, partial=True
    )
    assert "--callers 1,2,4 --seconds 5 --cold" in bench_command(record)
    _, html, _ = report_of(record)
    page = Page(html)
    tables = {table.all("caption")[0].text: table for table in page.all("table")}
    load = next(table for caption, table in tables.items() if caption.startswith("Under load"))
    assert [[cell.text for cell in row.all("td")][:5] for row in load.all("tr")[1:]] == [
        ["1", "1", "10", "5.0", "2.00"],
        ["1", "2", "20", "5.0", "4.00"],
        ["1", "4", "40", "5.0", "8.00"],
    ]
    stages = next(table for caption, table in tables.items() if caption.startswith("Medians of the stages"))
    assert [cell.text for cell in stages.all("td")] == ["1", "0.12", "7.50", "0.25"]
    assert "the run was interrupted" in page.words
    assert "No record here was made on an Ascend NPU" not in page.words


def test_a_localisation_is_told_in_the_language_of_the_report(parity: Any) -> None:
    boundaries = (BoundaryError("blocks.0", 1e-7, 1e-6, 0, True), BoundaryError("blocks.1", math.inf, 1e-6, 3, False))
    for first, plain, probed, told in (
        ("blocks.1", ("embedding",), ("embedding",), "首个超出容差的层边界为 blocks.1"),
        (None, ("embedding",), (), "读取内部数值时误差消失"),
        (None, (), ("embedding",), "仅在读取内部数值时输出超出容差"),
    ):
        localised = Localisation("onnxruntime", "cpu", "onnx", 1, boundaries, first, plain, probed)
        _, page, _ = report_of(dataclasses.replace(parity, localised=(localised,)), language="zh")
        assert told in Page(page).words


@pytest.mark.parametrize(("language", "told"), [("en", "is unknown"), ("zh", "未知")])
def test_a_fallback_that_is_unknown_is_told_and_the_command_allows_it(
    bench: BenchRecord, parity: Any, language: str, told: str
) -> None:
    step = parity.steps[-1]
    unknown = dataclasses.replace(step, conditions=dataclasses.replace(step.conditions, fallback=None))
    parity = dataclasses.replace(parity, steps=(*parity.steps[:-1], unknown))
    bench = dataclasses.replace(
        bench, conditions={**bench.conditions, "onnxruntime": SessionReport({"numerics": "strict"}, fallback=None)}
    )
    assert "--allow-fallback" in parity_command(parity)
    for record in (parity, bench):
        _, page, markdown = report_of(record, language=language)
        assert told in Page(page).words
        assert told in markdown


def test_figures_that_are_not_finite_are_shown_and_fail(parity: Any) -> None:
    step = parity.steps[-1]
    outputs = []
    for output in step.outputs:
        metrics = dataclasses.replace(output.metrics, max_relative_l2_error=math.nan, max_abs_error=math.inf)
        images = tuple(dataclasses.replace(image, relative_l2_error=math.nan) for image in output.images)
        errors = output.token_errors
        if errors is not None:
            errors = dataclasses.replace(errors, quantiles=(*errors.quantiles[:-1], math.inf))
        outputs.append(dataclasses.replace(output, metrics=metrics, images=images, token_errors=errors))
    broken = dataclasses.replace(step, outputs=tuple(outputs), status="failed", reason="2 values are NaN")
    record = dataclasses.replace(
        parity, steps=(*parity.steps[:-1], broken), first_failure=broken.title, cause="export", passed=False
    )
    _, html, _ = report_of(record)
    words = Page(html).words
    assert "∞" in words
    assert "NaN" in words
    assert "parity FAILED at onnxruntime fp32 on cpu" in words


def test_an_interrupted_parity_has_no_verdict(parity: Any) -> None:
    cut = dataclasses.replace(parity.steps[-1], status="interrupted", reason="the run was interrupted")
    record = dataclasses.replace(parity, steps=(*parity.steps[:-1], cut), partial=True, passed=False)
    report, html, _ = report_of(record)
    words = Page(html).words
    assert "no verdict; nothing ran whole on cpu" in words
    assert "parity passed" not in words
    ladder = next(b for b in walk(report.sections) if isinstance(b, Table) and b.caption.startswith("Steps"))
    verdicts = [row[5].text for row in ladder.rows if row[0].text.startswith("onnxruntime")]
    assert set(verdicts) == {"interrupted"}


def test_commands_are_quoted_and_are_taken_by_the_command_line(bench: BenchRecord, parity: Any) -> None:
    odd = "/data/my images/中文 $(rm -rf ~)';.jpg"
    record = dataclasses.replace(
        parity,
        artifact=dataclasses.replace(parity.artifact, path="/a b/vit"),
        inputs=(*parity.inputs, InputRecord(odd, "image", ""), InputRecord("x.npy[0]", "array", "")),
        profile="reports",
        threads=3,
        graph=False,
        weights="/c d",
    )
    words = shlex.split(parity_command(record))
    assert words[:3] == ["npu-runtime", "parity", "/a b/vit"]
    assert words[words.index("--images") + 1] == odd
    assert words[words.index("--seeds") + 1] == "1,2"
    assert words[words.index("--arrays") + 1] == "x.npy"
    with parity_command_line.command.make_context("parity", words[2:]) as context:
        assert context.params["images"] == (odd,)
        how = [context.params[name] for name in ("threads", "graph", "weights")]
    assert how == [3, False, "/c d"]
    slow = dataclasses.replace(
        bench, device="npu:0", graph=False, adaptive=True, numerics="fast", allow_fallback=True, artifact="-x y"
    )
    words = shlex.split(bench_command(slow))
    for option in ("--cold", "--adaptive", "--allow-fallback"):
        assert option in words
    assert words[words.index("--graph") + 1] == "off"
    with bench_command_line.command.make_context("bench", ["--", *words[2:3]]) as context:
        assert context.params["artifact"] == "-x y"
    words = shlex.split(bench_command(bench))
    with bench_command_line.command.make_context("bench", words[2:]) as context:
        assert context.params["batch"] == bench.batches
        assert context.params["iterations"] == bench.iterations
        assert context.params["threads"] == bench.threads


def test_default_seeds_are_left_out_of_the_command(parity: Any) -> None:
    default = tuple(InputRecord(f"seed {seed}", "seed", "") for seed in (42, 123, 256, 789, 1024))
    assert "--seeds" not in parity_command(dataclasses.replace(parity, inputs=default))
    assert "--seeds 42,123" in parity_command(dataclasses.replace(parity, inputs=default[:2]))


@pytest.mark.parametrize("paint", ["bars", "limits", "quantiles"])
@pytest.mark.parametrize("values", [(0.0,) * 9, (1e-7,) * 9, (0.0, *(math.inf,) * 8), (math.nan,) * 9])
def test_plots_bear_every_value_without_a_warning(paint: str, values: tuple[float, ...]) -> None:
    name = "昇腾 $x^2$ <&> 中文"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if paint == "bars":
            finite = [Measured(batch, 2.0, 1.0, 3.0) for batch in (1, 8)]
            svg = draw_bars("p", [Series(name, tuple(finite))] * 7, x_title="批", y_title="时延 ms")
        elif paint == "limits":
            svg = draw_limits("p", [LimitedRow(name, values[-1], 1e-5, 9)], x_title="误差", limit_title="容差")
        else:
            svg = draw_quantiles("p", [SpreadRow(name, values, 0)], x_title="误差")
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("text")]
    assert name in texts
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert all(identifier.startswith("p-") for identifier in ids)
    assert not re.search(r"#0[0-9a-f]{5}|font-family|DejaVu", svg), "colours and fonts are the page's"


def test_a_drawing_leaves_matplotlibs_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_bars("p", [Series("a", (Measured(1, 1.0, 1.0, 1.0),))], x_title="x", y_title="y")
    assert dict(matplotlib.rcParams) == before


def test_equal_cells_below_each_other_are_one_where_the_table_groups_them() -> None:
    rows = [("a", "x", "1"), ("a", "x", "2"), ("a", "y", "2"), ("b", "y", "2")]
    table = Table("t", (Column("1"), Column("2"), Column("3")), tuple(tuple(map(Text, row)) for row in rows), grouped=2)
    assert [[(cell.text, span) for _, cell, span in row] for row in table.placed()] == [
        [("a", 3), ("x", 2), ("1", 1)],
        [("2", 1)],
        [("y", 1), ("2", 1)],
        [("b", 1), ("y", 1), ("2", 1)],
    ]
    with pytest.raises(ValueError, match="other lengths"):
        Table("t", (Column("1"),), ((Text("a"), Text("b")),))


def test_figures_are_spelled_without_losing_what_matters() -> None:
    assert [spell_error(v) for v in (0.0, 3.14e-6, math.inf, math.nan)] == ["0", "3.14e-06", "∞", "NaN"]
    assert [spell_limit(v) for v in (5e-5, 1.25e-5, 0.0, 0.001, 10.0)] == ["5e-05", "1.25e-05", "0", "0.001", "10"]
    assert [spell_cosine(v) for v in (1.0, 1 - 4e-13, 0.99987654)] == ["1", "1 − 4.0e-13", "0.99987654"]
    assert [spell_size(n) for n in (12, 203_765, 343_238_961)] == ["12 B", "203.76 kB", "343.24 MB"]


def test_a_folder_and_its_manifest_are_the_artifact(tiny_artifact: Path) -> None:
    for path in (tiny_artifact, tiny_artifact / MANIFEST_NAME):
        (subject,) = read_subjects([path])
        assert subject.encoder == "tiny-vit"
        assert subject.path == str(tiny_artifact)
        assert subject.records == []


def test_sections_have_anchors_of_their_own(bench: BenchRecord, parity: Any) -> None:
    report, _, _ = report_of(bench, bench, parity, parity)
    anchors = [block.anchor for block in walk(report.sections) if isinstance(block, Section)]
    assert len(anchors) == len(set(anchors))
    assert all(re.fullmatch(r"[a-z0-9-]+", anchor) for anchor in anchors)
    assert json.dumps(anchors)
