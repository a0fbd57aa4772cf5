"""Reports of real records of tiny encoders, by the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frozen_faults
import pytest
from chromium import Chromium, find_chromium, start_chromium
from markdown_it import MarkdownIt
from pages import Page, markdown_tables

from npu_export.pipeline import export
from npu_runtime.bench.record_files import read_record as read_bench
from npu_runtime.parity.record_files import read_record as read_parity
from npu_runtime.report.messages import LANGUAGES

TINY = Path(__file__).parents[1] / "tiny.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TINY), "npu-runtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """A folder with an artifact, `tiny-vit`, and its records `parity.json` and `bench.json`. Not to be changed."""
    folder = tmp_path_factory.mktemp("measured")
    artifact = export("tiny-vit", weights="random:3", batch=(1, 4), probes=True, output=folder / "tiny-vit")
    looked = ("--images", photographs, "--localise", "--profile", "reports")
    for line in (
        ("parity", artifact, *looked, "--record", folder / "parity.json"),
        ("bench", artifact, "--iterations", "7", "--warmup", "1", "--cold", "--record", folder / "bench.json"),
    ):
        done = run(*line)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module", params=list(LANGUAGES))
def written(request: pytest.FixtureRequest, measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named for a language with `report.html` and `report.md` of everything in `measured`."""
    folder = tmp_path_factory.mktemp("written") / request.param
    folder.mkdir()
    given = [measured / name for name in ("tiny-vit", "parity.json", "bench.json")]
    files = ("--output", folder / "report.html", "--markdown", folder / "report.md", "--lang", request.param)
    done = run("report", *given, *files)
    assert done.returncode == 0, done.stderr
    assert f"written   {folder / 'report.html'}" in done.stdout
    return folder


@pytest.fixture
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text("utf-8"))


def test_the_page_has_the_sections_of_adaptation_reports_in_its_language(page: Page, written: Path) -> None:
    messages = LANGUAGES[written.name]
    names = ("summary", "introduction", "environment", "quick start", "evidence")
    names += ("accuracy", "performance", "files", "notes", "conclusion")
    assert [head.text for head in page.all("h2")] == [messages[f"section.{name}"] for name in names]
    (html,) = page.all("html")
    assert html.attributes["lang"] == {"en": "en", "zh": "zh-Hans"}[written.name]
    links = {link.attributes["href"] for nav in page.all("nav") for link in nav.all("a")}
    assert links == {f"#{section.attributes['id']}" for section in page.all("section")}


def test_what_is_on_the_page_is_what_the_records_hold(page: Page, written: Path, measured: Path) -> None:
    parity, bench = read_parity(measured / "parity.json"), read_bench(measured / "bench.json")
    manifest = json.loads((measured / "tiny-vit" / "manifest.json").read_text("utf-8"))
    expected = [parity.artifact.digest, bench.environment["processor"], parity.environment["system"]]
    expected += [file["sha256"] for file in manifest["files"]] + [given.sha256 for given in parity.inputs]
    spans = [*(row.latency.median_ms for row in bench.rows), *(start.first_ms for start in bench.cold)]
    expected += [f"{ms:,.2f}" if ms < 1000 else f"{ms:,.1f}" for ms in spans]
    expected += [f"{r.over_eager.speedup:.2f} " for r in bench.rows if r.over_eager is not None]
    for step in parity.steps:
        for output in step.outputs:
            expected += [f"{check.value:.2e}" for check in output.checks if check.value]
            expected += [f"{q:.2e}" for q in (output.token_errors.quantiles if output.token_errors else ()) if q]
    expected += [b.module for localised in parity.localised for b in localised.boundaries]
    markdown = (written / "report.md").read_text("utf-8").replace("\\", "")
    for text in map(str, expected):
        assert text in page.words
        assert text in markdown


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(page: Page) -> None:
    check_self_contained(page)


def check_self_contained(page: Page) -> None:
    named = {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}
    for element in page.elements():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), element.tag
            if name in named:
                assert value.startswith(("#", "data:")), f"{element.tag} {name}={value[:60]}"
            if name == "style":
                assert "url(" not in value.replace("url(#", ""), value
    assert not page.all("script", "iframe", "object", "embed", "form")
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text


def test_every_id_is_one_and_every_link_has_its_place(page: Page) -> None:
    elements = page.elements()
    ids = [element.attributes["id"] for element in elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    targets = {e.attributes["href"][1:] for e in elements if e.attributes.get("href", "").startswith("#")}
    assert targets <= set(ids)
    clipped = {element.attributes["clip-path"] for element in elements if "clip-path" in element.attributes}
    assert clipped <= {f"url(#{name})" for name in ids}


def test_images_and_plots_are_told_in_words(page: Page, written: Path) -> None:
    images = page.all("img")
    assert len(images) == 4  # two photographs, as published and as the network is given them
    assert len({image.attributes["alt"] for image in images}) == 4
    assert any("chelsea.jpg" in image.attributes["alt"] for image in images)
    plots = [div for figure in page.all("figure") for div in figure.all("div") if div.attributes.get("role") == "img"]
    assert len(plots) == len(page.all("svg")) == 5
    assert all(len(plot.attributes["aria-label"]) > 20 for plot in plots)
    assert all(figure.all("figcaption") for figure in page.all("figure"))


def test_tables_name_their_columns_rows_and_commands(page: Page) -> None:
    commands = {item.attributes["id"] for item in page.all("li") if "id" in item.attributes}
    assert commands == {"command-1", "command-2", "command-3"}
    for table in page.all("table"):
        assert len(table.all("caption")) == 1
        assert all(head.attributes["scope"] in ("col", "row", "rowgroup") for head in table.all("th"))
    referred = {link.attributes["href"] for table in page.all("table") for link in table.all("a")}
    assert referred == {f"#{command}" for command in commands}


def test_the_commands_are_those_that_were_run(page: Page, measured: Path, photographs: Path) -> None:
    first, second, third = (code.text for item in page.all("ol") for li in item.all("li") for code in li.all("code"))
    assert first.startswith("npu-export --model tiny-vit --weights random:3 --precision fp32")
    assert first.endswith(f"--image-size 32 --preprocess hf --probes --output {measured / 'tiny-vit'}")
    assert "--batch 1,4 --opset 18" in first
    assert f"parity {measured / 'tiny-vit'} --backend torchscript --backend onnxruntime --batch 1" in second
    assert f"--images {photographs / 'chelsea.jpg'} --images {photographs / 'coffee.jpg'} --profile reports" in second
    assert "--batch 1,4 --iterations 7 --warmup 1 --cold --threads" in third


def test_markdown_has_the_same_tables_with_equal_columns(page: Page, written: Path) -> None:
    tables = markdown_tables((written / "report.md").read_text("utf-8"))
    assert len(tables) == len(page.all("table"))
    for cells, table in zip(tables, page.all("table")):
        assert len({len(row) for row in cells}) == 1
        assert len(cells) - 1 == len(table.all("tr"))
        assert all(set(cell) <= set("-:") for cell in cells[1])


def test_what_was_not_measured_says_so(
    call: Callable[..., Any], tiny_artifact: Path, measured: Path, tmp_path: Path
) -> None:
    result = call("npu-runtime", "report", tiny_artifact, "--output", tmp_path / "r.html")
    assert result.code == 0, result.err
    words = Page((tmp_path / "r.html").read_text("utf-8")).words
    assert "Accuracy: not measured." in words
    assert "Performance: not measured." in words
    assert "Not measured on Ascend hardware." in words
    bare = call("npu-runtime", "report", measured / "bench.json", "--output", tmp_path / "b.html")
    assert "manifest not given" in bare.out
    words = Page((tmp_path / "b.html").read_text("utf-8")).words
    assert "Throughput under the load of several callers: not measured." in words
    assert "How it was exported is in the manifest, which was not given." in words
    assert "npu-export --model" not in words


def test_random_weights_are_called_so_and_a_checkpoints_are_not(
    call: Callable[..., Any], tiny_artifact: Path, measured: Path, tmp_path: Path
) -> None:
    for given, random in ((measured / "tiny-vit", True), (tiny_artifact, False)):
        assert call("npu-runtime", "report", given, "--output", tmp_path / "r.html", "--force").code == 0
        assert ("RANDOM" in Page((tmp_path / "r.html").read_text("utf-8")).words) is random


def test_a_failed_parity_is_the_conclusion(
    call: Callable[..., Any], measured: Path, rewrite: Callable[..., None], tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(measured / "tiny-vit", tmp_path / "broken"))
    frozen_faults.change_weight(broken, "onnx", "blocks.1", frozen_faults.scale)
    rewrite(broken)
    failed = call("npu-runtime", "parity", broken, "--seeds", "1", "--localise", "--record", tmp_path / "r.json")
    assert failed.code == 3
    result = call("npu-runtime", "report", broken, tmp_path / "r.json", "--output", tmp_path / "r.html")
    assert result.code == 0
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    conclusion = next(s.text for s in page.all("section") if s.attributes["id"].endswith("-conclusion"))
    assert "parity FAILED at onnxruntime fp32 on cpu; it blames export." in conclusion
    assert "passed" not in conclusion
    assert "the first boundary beyond its limit is blocks.1" in page.words
    (summary,) = (section for section in page.all("section") if section.attributes["id"] == "summary")
    assert [strong.attributes["class"] for strong in summary.all("strong")] == ["warn", "fail"]


def test_records_of_other_artifacts_stand_apart_and_alike_ones_together(
    call: Callable[..., Any], tiny_artifact: Path, measured: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        line = ("parity", tiny_artifact, "--seeds", "5", "--record", tmp_path / f"{name}.json")
        assert call("npu-runtime", *line).code == 0
    given = [tmp_path / "one.json", measured / "bench.json", tmp_path / "two.json", measured / "tiny-vit"]
    result = call("npu-runtime", "report", *given, "--output", tmp_path / "r.html", "--json")
    assert result.code == 0
    assert [[Path(file).name for file in a["records"]] for a in result.json["artifacts"]] == [
        ["one.json", "two.json"],
        ["bench.json"],
    ]
    assert result.json["page"] == str(tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    assert page.all("h1")[0].text == "Adaptation report: 2 encoders"
    parts = [head.text for head in page.all("h2")]
    assert parts[0] == "Summary"
    assert [part.split(" (")[0] for part in parts[1:]] == ["tiny-vit fp32", "tiny-vit fp32"]
    assert {head.text for head in page.all("h4")} == {"parity on cpu (1)", "parity on cpu (2)"}


HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>\'"&amp; | `$x_1$` [a](http://b) 中文/路径'


def test_texts_of_records_are_shown_and_never_obeyed(call: Callable[..., Any], measured: Path, tmp_path: Path) -> None:
    document = json.loads((measured / "parity.json").read_text("utf-8"))
    document["artifact"]["path"] = document["artifact"]["encoder"] = HOSTILE
    document["artifact"]["weights"].update(source=HOSTILE, random_seed=None)
    document["environment"].update(host=HOSTILE, versions={HOSTILE: HOSTILE}, variables={HOSTILE: HOSTILE})
    document["inputs"][0]["name"] = HOSTILE
    document["skipped"] = [{"name": HOSTILE, "reason": HOSTILE}]
    document["tolerances"][0]["basis"] = HOSTILE
    for step in document["steps"]:
        step.update(backend=HOSTILE, reason=HOSTILE, inputs=[HOSTILE, *step["inputs"][1:]], status="not run")
    for localised in document["localised"]:
        localised["boundaries"][0]["module"] = HOSTILE
    (tmp_path / "r.json").write_text(json.dumps(document), "utf-8")
    files = ("--output", tmp_path / "r.html", "--markdown", tmp_path / "r.md")
    result = call("npu-runtime", "report", tmp_path / "r.json", *files)
    assert result.code == 0, result.err
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    check_self_contained(page)
    assert len(page.all("img")) == 4
    assert page.words.count(HOSTILE) > 10
    assert any('<script>alert("1")' in text.text for svg in page.all("svg") for text in svg.all("text"))
    markdown = (tmp_path / "r.md").read_text("utf-8")
    assert all(len({len(row) for row in table}) == 1 for table in markdown_tables(markdown))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    assert not Page(html).all("script", "img", "a")
    assert html.count("&lt;script&gt;") > 10


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        ("[]", "no record that a report is made of"),
        ("{}", "no record that a report is made of"),
        ('{"record": "embed"}', '"record": "embed"'),
        ('{"record": "parity", "schema": "2.0"}', "schema 1.x"),
        ('{"record": "bench", "schema": "9.0"}', "schema 1.x"),
        ('{"record": "parity", "schema": "1.0"}', "wrong fields"),
        ('{"schema": "3.0", "encoder": "", "programs": []}', "another major schema version"),
        ('{"name": "a browser extension", "manifest_version": 3}', "no record that a report is made of"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_record_is_named_and_nothing_is_written(
    call: Callable[..., Any], measured: Path, tmp_path: Path, text: str | None, told: str
) -> None:
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text, "utf-8")
    output = tmp_path / "r.html"
    result = call("npu-runtime", "report", measured / "parity.json", bad, "--output", output)
    assert result.code == 1
    assert told in result.err
    assert str(bad) in result.err
    assert not output.exists()


def test_files_are_not_replaced_without_force_nor_by_each_other(
    call: Callable[..., Any], measured: Path, tmp_path: Path
) -> None:
    (tmp_path / "kept").write_text("kept", "utf-8")
    record = measured / "bench.json"
    for line in (
        ("--output", tmp_path / "kept"),
        ("--output", tmp_path / "r.html", "--markdown", tmp_path / "kept"),
        ("--output", tmp_path / "r.html", "--markdown", tmp_path / "r.html"),
        ("--output", tmp_path / "absent" / "r.html"),
    ):
        assert call("npu-runtime", "report", record, *line).code == 2
    assert call("npu-runtime", "report", record, record, "--output", tmp_path / "r.html").code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert call("npu-runtime", "report", record, "--output", tmp_path / "kept", "--force").code == 0
    assert (tmp_path / "kept").read_text("utf-8").startswith("<!doctype html>")


def test_the_same_records_give_the_same_bytes(call: Callable[..., Any], measured: Path, tmp_path: Path) -> None:
    for name in ("1.html", "2.html"):
        assert call("npu-runtime", "report", measured / "bench.json", "--output", tmp_path / name).code == 0
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Any:
    browser = find_chromium()
    if browser is None:
        pytest.skip("no Chromium is installed")
    with start_chromium(browser, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_complaint_or_sideways_scroll(
    chromium: Chromium, written: Path, width: int, scheme: str
) -> None:
    chromium.resize(width)
    chromium.prefer(scheme)
    chromium.open(written / "report.html")
    complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed")
    assert [event for event in chromium.events if event.get("method") in complaints] == []
    asked = [e["params"]["request"]["url"] for e in chromium.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url[:40] for url in asked if not url.startswith(("file:", "data:"))] == []
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate(OUTSIDE_OF_PLOTS) == []
    assert chromium.evaluate(BROKEN_NUMBERS) == []
    assert chromium.evaluate(LOW_CONTRAST) == []


OUTSIDE_OF_PLOTS = """
[...document.querySelectorAll('figure.plot svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1 || own.bottom > box.bottom + 1;
  }).map(text => text.textContent);
})
"""
"""Words of plots that are cut."""

BROKEN_NUMBERS = """
(() => {
  const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
  const broken = [], range = document.createRange();
  for (let node; node = walker.nextNode();)
    for (const found of node.data.matchAll(/[0-9.]+e-[0-9]+/g)) {
      range.setStart(node, found.index);
      range.setEnd(node, found.index + found[0].length);
      if (new Set([...range.getClientRects()].map(line => line.top)).size > 1) broken.push(found[0]);
    }
  return broken;
})()
"""
"""Numbers that begin on one line and end on the next."""

LOW_CONTRAST = """
(() => {
  const luminance = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return luminance(colour);
    }
    return 1;
  };
  const told = new Set();
  for (const element of document.querySelectorAll('h1, h2, p, a, li, td, th, code, strong, em, q, text, figcaption')) {
    const style = getComputedStyle(element);
    const own = luminance(element.tagName === 'text' ? style.fill : style.color), back = behind(element);
    const ratio = (Math.max(own, back) + 0.05) / (Math.min(own, back) + 0.05);
    if (ratio < 4.5) told.add(`${element.tagName} ${element.className} ${ratio.toFixed(2)}`);
  }
  return [...told];
})()
"""
"""Text whose contrast is below 4.5, which WCAG 2.2 asks for (1.4.3)."""


def test_every_letter_of_the_page_has_a_glyph(chromium: Chromium, written: Path) -> None:
    if written.name == "zh" and "zh" not in installed_languages():
        pytest.skip("no font for Chinese is installed")
    chromium.resize(1280)
    chromium.open(written / "report.html")
    root = chromium.send("DOM.getDocument", depth=-1)["root"]
    missing = []
    for node in _text_parents(root):
        fonts = chromium.send("CSS.getPlatformFontsForNode", nodeId=node)["fonts"]
        missing += [font["familyName"] for font in fonts if "LastResort" in font.get("postScriptName", "")]
    assert missing == []
    # What no font has is drawn as a box, which is as wide for one letter as for another and for U+10FFFE.
    assert chromium.evaluate(BOXES) == ""


BOXES = """
(() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const draw = letter => {
    context.canvas.width = context.canvas.height = 40;
    context.font = '28px ' + getComputedStyle(document.body).fontFamily;
    context.fillText(letter, 4, 32);
    return context.getImageData(0, 0, 40, 40).data.join();
  };
  const box = draw('\\u{10FFFE}');
  const letters = new Set([...document.body.innerText].filter(letter => letter.trim()));
  return [...letters].filter(letter => draw(letter) === box).join('');
})()
"""


def _text_parents(node: dict[str, Any]) -> list[int]:
    found = []
    for child in node.get("children", ()):
        if child["nodeType"] == 3 and child["nodeValue"].strip():
            found.append(node["nodeId"])
        found += _text_parents(child)
    return list(dict.fromkeys(found))


def installed_languages() -> set[str]:
    """Of the fonts that fontconfig lists, those of `zh` alone."""
    if shutil.which("fc-list") is None:
        return set()
    listed = subprocess.run(["fc-list", ":lang=zh-cn", "family"], capture_output=True, text=True, check=True)
    return {"zh"} if listed.stdout.strip() else set()


CUT_TABLES = """
[...document.querySelectorAll('table')].filter(table => table.getBoundingClientRect().right > 689)
  .map(table => table.caption.textContent)
"""


def test_the_page_is_printed_on_paper_without_what_is_cut(chromium: Chromium, written: Path) -> None:
    chromium.resize(688)  # A4 without its margins, at 96 pixels an inch
    chromium.prefer("light", "print")
    chromium.open(written / "report.html")
    assert chromium.evaluate("document.documentElement.scrollWidth") <= 688
    assert chromium.evaluate(CUT_TABLES) == []
    pdf = chromium.print()
    assert pdf.startswith(b"%PDF-")
