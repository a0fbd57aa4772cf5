"""Ranges and modules kept in float32, by the commands: the plan, the export, inspect, verify and the report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pages import Page
from safetensors.torch import save_file

from npu_export.pipeline import export
from npu_export.weights import find_weights
from npu_runtime.artifact.store import open_artifact
from npu_runtime.report.messages import LANGUAGES

OVER = ["blocks.0", "blocks.1", "norm"]
"""What receives the massive activation of the weights below."""


@pytest.fixture(scope="module")
def massive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ViT's seeded weights, one channel of the residual stream 1e5 from the first block on."""
    seeded = find_weights(tiny.TINY, "random:0")
    state = {name: torch.as_tensor(seeded.read(name)).clone() for name in seeded.shapes}
    state["encoder.layer.0.output.dense.bias"][7] = 1e5
    file = tmp_path_factory.mktemp("massive") / "model.safetensors"
    save_file(state, file)
    return file


@pytest.fixture(scope="module")
def kept(massive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in fp16 of these weights, what float16 does not hold kept in float32. Not to be changed."""
    output = tmp_path_factory.mktemp("kept") / "tiny-vit"
    return export("tiny-vit", weights=str(massive), precision="fp16", keep_fp32="auto", output=output)


@pytest.fixture
def npu_export(call: Callable[..., Any], massive: Path, tmp_path: Path) -> Callable[..., Any]:
    def run(*arguments: str | Path) -> Any:
        base = ("npu-export", "--model", "tiny-vit", "--weights", massive, "--output", tmp_path / "a" / "out")
        return call(*base, *arguments)

    return run


def test_an_export_that_would_overflow_fails_with_every_module_and_leaves_nothing(
    npu_export: Callable[..., Any], tmp_path: Path
) -> None:
    result = npu_export("--precision", "fp16")
    assert (result.code, result.out) == (1, "")
    for name in OVER:
        assert re.search(rf"^ +(got: +)?{name}: 100,\d+ by .+, headroom 0.66$", result.err, re.MULTILINE), result.err
    assert "patch_embed:" not in result.err
    assert "--keep-fp32 auto" in result.err
    assert not any((tmp_path / "a").iterdir())


def test_what_was_kept_and_what_it_cost_is_told(npu_export: Callable[..., Any], tmp_path: Path) -> None:
    result = npu_export("--precision", "fp16", "--keep-fp32", "auto", "--format", "torchscript")
    assert result.code == 0, result.err
    assert re.search(r"✓ measure the ranges .* least headroom 0.655 at blocks.0 \(", result.err)
    assert re.search(r"✓ keep modules in float32 .* 0.2 MB more, -1 conversions of type in a call", result.err)
    assert "float32   blocks.0, blocks.1, norm\n" in result.out
    assert list(open_artifact(tmp_path / "a" / "out").manifest.keep_fp32) == OVER


def test_names_come_with_commas_and_repeatedly(npu_export: Callable[..., Any], tmp_path: Path) -> None:
    names = ("--keep-fp32", "norm,blocks.1", "--keep-fp32", "blocks.0")
    result = npu_export("--precision", "fp16", *names, "--format", "torchscript")
    assert result.code == 0, result.err
    assert list(open_artifact(tmp_path / "a" / "out").manifest.keep_fp32) == OVER


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "fp16", "--keep-fp32", "block.0"), "no such module to keep"),
        (("--precision", "fp16", "--keep-fp32", ""), "no such module to keep"),
        (("--keep-fp32", "auto"), "nothing to keep in float32"),
        (("--precision", "bf16", "--format", "torchscript", "--keep-fp32", "auto"), "bfloat16 holds whatever float32"),
        (("--images", "a.png"), "fp16 alone"),
    ],
)
def test_what_does_not_fit_is_wrong_usage(
    arguments: tuple[str, ...], message: str, npu_export: Callable[..., Any]
) -> None:
    result = npu_export(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_a_dry_run_shows_the_ranges_and_that_the_export_would_be_refused(
    npu_export: Callable[..., Any], tmp_path: Path
) -> None:
    result = npu_export("--precision", "fp16", "--dry-run")
    assert result.code == 0, result.err
    assert "  ranges    least headroom 0.655 at blocks.0" in result.out
    assert re.search(r"^norm +float16 +input +output +100,002 +0.655 ", result.out, re.MULTILINE)
    assert "This export would be refused: float16 does not hold what the network computes" in result.out
    assert not (tmp_path / "a").exists()


def test_a_dry_run_shows_what_auto_keeps_and_the_sizes_with_it(npu_export: Callable[..., Any]) -> None:
    result = npu_export("--precision", "fp16", "--keep-fp32", "auto", "--dry-run")
    assert result.code == 0, result.err
    assert re.search(
        r"^  float32   blocks.0, blocks.1, norm; \d+\.\d kB more in each format$", result.out, re.MULTILINE
    )
    assert re.search(r"^norm +float32 ", result.out, re.MULTILINE)
    assert "refused" not in result.out


def test_a_dry_run_as_json_has_the_ranges_and_what_auto_would_keep(npu_export: Callable[..., Any]) -> None:
    plain = npu_export("--precision", "fp16", "--dry-run", "--json").json
    auto = npu_export("--precision", "fp16", "--keep-fp32", "auto", "--dry-run", "--json").json
    for shown, refused, keep in ((plain, True, []), (auto, False, OVER)):
        ranges = shown["ranges"]
        assert (ranges["auto"], list(ranges["not_held"]), ranges["refused"]) == (OVER, OVER, refused)
        assert shown["keep_fp32"] == keep
        by_name = {found["module"]: found for found in ranges["modules"]}
        assert by_name["norm"]["headroom"] == 65504 / by_name["norm"]["largest"]["value"] < 1
        assert by_name["patch_embed"]["headroom"] > 1000
    assert auto["nbytes"]["model.ts"] > 1.5 * plain["nbytes"]["model.ts"]
    assert npu_export("--dry-run", "--json").json["ranges"] is None


def test_an_artifact_with_kept_modules_is_verified_and_compared_with_eager(
    call: Callable[..., Any], kept: Path
) -> None:
    verified = call("npu-runtime", "verify", kept)
    assert verified.code == 0, verified.out + verified.err
    record = call("npu-runtime", "parity", kept, "--seeds", "1,2", "--json")
    assert record.code == 0, record.out + record.err
    assert {step["status"] for step in record.json["steps"]} == {"passed"}
    assert "eager" in {step["backend"] for step in record.json["steps"]}


def test_inspect_shows_the_ranges_and_what_is_float32(
    call: Callable[..., Any], kept: Path, tiny_artifact: Path
) -> None:
    shown = call("npu-runtime", "inspect", kept).out
    assert "ranges    least headroom 0.655 at blocks.0" in shown
    assert "float32   blocks.0, blocks.1, norm\n" in shown
    assert re.search(r"^blocks.1 +float32 .* 0.655 ", shown, re.MULTILINE)
    assert re.search(r"^patch_embed +float16 ", shown, re.MULTILINE)
    other = call("npu-runtime", "inspect", tiny_artifact).out
    assert "headroom" not in other
    assert "float32   " not in other


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_report_has_the_ranges_and_the_kept_modules(
    language: str, call: Callable[..., Any], kept: Path, tmp_path: Path
) -> None:
    messages = LANGUAGES[language]
    files = ("--output", tmp_path / "report.html", "--markdown", tmp_path / "report.md", "--lang", language)
    written = call("npu-runtime", "report", kept, *files)
    assert written.code == 0, written.err
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    heads = [head.text for head in page.all("h2")]
    assert heads.count(messages["section.ranges"]) == 1
    text = (tmp_path / "report.md").read_text("utf-8")
    modules = messages["list separator"].join(OVER)
    assert messages["ranges.kept"].format(modules=modules) in text.replace("\\", "")
    rows = [line for line in text.splitlines() if re.match(r"\| `(blocks\.\d|norm)` \| `float32` \|", line)]
    assert len(rows) == 3
    assert all("| 0.655 |" in row for row in rows), rows
    assert "--keep-fp32 blocks.0,blocks.1,norm" in text


def test_the_report_of_an_artifact_without_ranges_says_nothing_of_them(
    call: Callable[..., Any], tiny_artifact: Path, tmp_path: Path
) -> None:
    assert call("npu-runtime", "report", tiny_artifact, "--output", tmp_path / "report.html").code == 0
    heads = [head.text for head in Page((tmp_path / "report.html").read_text("utf-8")).all("h2")]
    assert LANGUAGES["en"]["section.ranges"] not in heads


def test_the_report_of_many_modules_shows_those_with_the_least_headroom(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    output = export(
        "tiny-convnext", weights="random:0", precision="fp16", formats=("torchscript",), output=tmp_path / "out"
    )
    manifest = json.loads((output / "manifest.json").read_text("utf-8"))
    modules = manifest["ranges"]["modules"]
    extra = {**modules[0], "module": "more", "headroom": 1e6}
    manifest["ranges"]["modules"] = [*modules, extra, {**extra, "module": "most"}]
    (output / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    files = ("--output", tmp_path / "report.html", "--markdown", tmp_path / "report.md")
    assert call("npu-runtime", "report", output, *files).code == 0
    text = (tmp_path / "report.md").read_text("utf-8")
    assert f"of the 10 modules with the least headroom, of {len(modules) + 2}" in text
    assert "| `most` |" not in text
    assert "| `stem` |" in text
    assert LANGUAGES["en"]["ranges.none kept"] in text
