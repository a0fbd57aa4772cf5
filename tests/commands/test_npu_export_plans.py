"""npu-export --list and --dry-run: every encoder, layout, precision and image size, as text and as data."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from npu_export.encoders import ENCODERS
from npu_runtime.artifact.store import open_artifact

FIVE = {
    "vit-base": {"hf", "timm", "jax"},
    "pe-lang-l14-448": {"meta", "timm"},
    "convnext-base-clip": {"timm", "openclip"},
    "dinov2-small-reg4": {"timm", "meta", "hf"},
    "aimv2-large-distilled": {"hf", "apple", "timm"},
}
"""Name -> layouts."""
BASE = ("npu-export", "--model", "tiny-vit", "--weights", "random:5")


@pytest.fixture
def dry_run(call: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """The plan for the tiny encoder with random weights of seed 5, where no other weights are given, as data."""

    def run(*arguments: str | Path) -> Any:
        before = {path.name for path in tmp_path.iterdir()}
        result = call(*BASE, *arguments, "--output", tmp_path / "a", "--dry-run", "--json")
        assert result.code == 0, result.err
        assert {path.name for path in tmp_path.iterdir()} == before
        assert result.json["output"] == str(tmp_path / "a")
        return result.json

    return run


@pytest.fixture
def two_towers(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A file with the network twice, the second with its last norm doubled."""
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    towers = {
        tower + name.removeprefix("vit."): tensor.clone()
        for tower in ("image_encoder.", "visual.")
        for name, tensor in tensors.items()
    }
    towers["visual.layernorm.weight"] *= 2
    save_file(towers, tmp_path / "towers.safetensors")
    return tmp_path / "towers.safetensors"


def test_the_list_names_every_encoder_with_its_aliases_and_layouts(call: Callable[..., Any]) -> None:
    result = call("npu-export", "--list")
    assert (result.code, result.err) == (0, "")
    for encoder in ENCODERS:
        for text in (encoder.name, *encoder.aliases, *(known.about for known in encoder.layouts)):
            assert text in result.out
    shown = dict(zip(FIVE, re.split(rf"^(?:{'|'.join(FIVE)})$", result.out, flags=re.MULTILINE)[1:]))
    for name, layouts in FIVE.items():
        own = shown[name].partition("\ntiny-vit\n")[0]
        assert set(re.findall(r"^  layout +(\S+)", own, re.MULTILINE)) == layouts
    assert re.search(r"formats +torchscript, onnx\nprecisions +fp32, fp16, bf16\n", result.out)


def test_the_list_as_json_holds_what_the_text_shows(call: Callable[..., Any]) -> None:
    listed = call("npu-export", "--list", "--json").json
    rows = {row["encoder"]: row for row in listed["encoders"]}
    assert {name: set(rows[name]["layouts"]) for name in FIVE} == FIVE
    for encoder in ENCODERS:
        row = rows[encoder.name]
        assert row["aliases"] == [encoder.published.hub_id, *encoder.published.aliases]
        assert row["parameters"] == encoder.published.parameters
        assert [output["name"] for output in row["outputs"]] == [output.name for output in encoder.outputs]
        assert all(about and all(about) for about in row["layouts"].values())
    assert rows["tiny-vit"]["aliases"] == ["tests/tiny-vit", "tiny-vit-for-tests"]
    assert (listed["formats"], listed["precisions"]) == (["torchscript", "onnx"], ["fp32", "fp16", "bf16"])


def test_a_dry_run_as_json_is_the_effective_plan(dry_run: Callable[..., Any]) -> None:
    shown = dry_run("--format", "onnx", "--batch", "4,1")
    names = ("encoder", "weights", "layout", "prefix", "precision", "stored_dtypes", "formats", "batches", "opset")
    assert {name: shown[name] for name in names} == {
        "encoder": "tiny-vit",
        "weights": "random:5",
        "layout": "hf",
        "prefix": "",
        "precision": "fp32",
        "stored_dtypes": ["float32"],
        "formats": ["onnx"],
        "batches": [4, 1],
        "opset": 18,
    }
    assert shown["why"].startswith("38 of 38 keys are those of layout hf")
    assert set(shown["nbytes"]) == {"weights.onnx.data", "reference.safetensors"}


def test_a_dry_run_as_json_carries_the_coverage_with_operations_and_reasons(
    dry_run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    save_file({**tensors, "classifier.bias": torch.zeros(3)}, tmp_path / "with_head.safetensors")
    coverage = dry_run("--weights", tmp_path / "with_head.safetensors")["coverage"]
    assert coverage == {
        "matched": 26,
        "transformed": 12,
        "dropped": 1,
        "parameters": tiny.TINY.published.parameters,
        "missing": 0,
        "unexpected": 0,
        "mismatched": 0,
        "operations": {
            f"blocks.{block}.attn.qkv.{leaf}": "concatenate 3" for block in (0, 1) for leaf in ("weight", "bias")
        },
        "reasons_dropped": {"classifier.bias": "the encoder ends at the final norm"},
    }


def test_a_dry_run_shows_what_is_transformed_and_each_dropped_key_with_the_reason(
    call: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    save_file({**tensors, "classifier.bias": torch.zeros(3)}, tmp_path / "with_head.safetensors")
    result = call("npu-export", "--model", "tiny-vit", "--weights", tmp_path / "with_head.safetensors", "--dry-run")
    assert "26 matched, 12 transformed, 1 dropped" in result.out
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "transformed blocks.{0-1}.attn.qkv.weight by concatenate 3 (2)" in lines
    assert "dropped classifier.bias (the encoder ends at the final norm)" in lines


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_plan_has_the_precision_that_is_asked_for(precision: str, dry_run: Callable[..., Any]) -> None:
    shown = dry_run("--precision", precision, "--format", "torchscript")
    nbytes = {"fp32": 4, "fp16": 2, "bf16": 2}[precision]
    assert shown["precision"] == precision
    assert shown["nbytes"]["model.ts"] == nbytes * tiny.TINY.published.parameters
    assert {spec["dtype"] for spec in (*shown["inputs"], *shown["outputs"])} == {"float32"}


@pytest.mark.parametrize(("layout", "transformed"), [("hf", 12), ("timm", 0), ("jax", 19)])
def test_random_weights_have_the_layout_that_is_asked_for(
    layout: str, transformed: int, dry_run: Callable[..., Any]
) -> None:
    shown = dry_run("--layout", layout)
    assert (shown["layout"], shown["weights"]) == (layout, "random:5")
    assert shown["coverage"]["transformed"] == transformed


def test_another_image_size_is_in_the_plan_and_resamples_the_checkpoints_positions(
    dry_run: Callable[..., Any], tiny_checkpoint: Path
) -> None:
    shown = dry_run("--weights", tiny_checkpoint, "--image-size", "48")
    assert shown["inputs"][0]["shape"] == ["B", 3, 48, 48]
    assert [output["shape"] for output in shown["outputs"]] == [["B", 64], ["B", 37, 64]]
    assert shown["preprocessing"]["size"] == [48, 48]
    assert "4" in shown["coverage"]["operations"]["pos_embed"]
    assert "pos_embed" not in dry_run("--weights", tiny_checkpoint, "--image-size", "32")["coverage"]["operations"]


def test_two_networks_in_a_file_are_refused_and_a_prefix_chooses_one(
    call: Callable[..., Any], two_towers: Path, tmp_path: Path
) -> None:
    command = ("npu-export", "--model", "tiny-vit", "--weights", two_towers, "--format", "torchscript", "--json")
    refused = call(*command, "--output", tmp_path / "none")
    assert (refused.code, refused.json["exit_code"]) == (1, 1)
    assert "--prefix" in refused.json["error"]["next"]
    digests = set()
    for name, prefix in (("first", "image_encoder."), ("second", "visual.")):
        result = call(*command, "--prefix", prefix, "--output", tmp_path / name)
        assert result.code == 0, result.err
        weights = open_artifact(tmp_path / name).manifest.provenance.weights
        assert (weights.prefix, weights.layout) == (prefix, "hf")
        digests.add(weights.state_sha256)
    assert len(digests) == 2


def test_a_prefix_drops_what_lies_outside_and_says_so(dry_run: Callable[..., Any], two_towers: Path) -> None:
    shown = dry_run("--weights", two_towers, "--prefix", "visual.")
    assert shown["prefix"] == "visual."
    assert shown["coverage"]["dropped"] == 38
    assert set(shown["coverage"]["reasons_dropped"].values()) == {"outside of the prefix 'visual.' that was asked for"}


def test_a_prefix_that_no_key_has_is_refused(call: Callable[..., Any], tiny_checkpoint: Path) -> None:
    result = call("npu-export", "--model", "tiny-vit", "--weights", tiny_checkpoint, "--prefix", "text.", "--dry-run")
    assert (result.code, result.out) == (1, "")
    assert "no key of the checkpoint starts with 'text.'" in result.err
    assert "keys that start with vit." in result.err


@pytest.mark.parametrize(
    ("chosen", "publisher", "shown"),
    [
        ((), "hf", "squashed to 32 x 32, bilinear"),
        (("--preprocess", "hf"), "hf", "squashed to 32 x 32, bilinear"),
        (("--preprocess", "timm"), "timm", "shorter side to 35, centre 32 x 32, bicubic"),
    ],
)
def test_a_dry_run_says_whose_preparation_of_images_would_be_recorded(
    dry_run: Callable[..., Any],
    call: Callable[..., Any],
    tmp_path: Path,
    chosen: tuple[str, ...],
    publisher: str,
    shown: str,
) -> None:
    assert dry_run(*chosen)["preprocessing"]["publisher"] == publisher
    text = call(*BASE, *chosen, "--output", tmp_path / "a", "--dry-run").out
    assert re.search(rf"^  images +{shown}, mean 0\.5/0\.5/0\.5, .*\({publisher}: ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("chosen", "told"), [("upstream", ("hf, timm", "upstream")), ("openclip", ("'hf', 'timm', 'upstream'", "openclip"))]
)
def test_a_publisher_that_an_encoder_or_the_table_does_not_have_is_wrong_usage(
    call: Callable[..., Any], tmp_path: Path, chosen: str, told: tuple[str, str]
) -> None:
    result = call(*BASE, "--preprocess", chosen, "--output", tmp_path / "a", "--dry-run")
    assert (result.code, result.out) == (2, "")
    for text in told:
        assert text in result.err


def test_the_list_shows_how_each_publisher_prepares_images(call: Callable[..., Any]) -> None:
    rows = {row["encoder"]: row for row in call("npu-export", "--list", "--json").json["encoders"]}
    text = call("npu-export", "--list").out
    for encoder in ENCODERS:
        listed = rows[encoder.name]["preprocessing"]
        assert [steps["publisher"] for steps in listed] == [steps.publisher for steps in encoder.preprocessing]
        assert all(f"({steps.publisher}: {steps.source})" in text for steps in encoder.preprocessing)
