from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

from npu_export.encoders import ENCODERS
from npu_export.encoders.spec import EncoderSpec
from npu_export.errors import CheckpointError
from npu_export.network import plan_weights
from npu_export.plan import PUBLISHERS, make_request, plan_export
from npu_export.preprocessor_config import resolve_preprocessing
from npu_export.timm_import import import_timm
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import Preprocessing, Publisher
from npu_runtime.errors import UsageError

DEFAULT = tiny.TINY.preprocessing[0]
NORMALISED = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def resolve(
    settings: dict[str, object] | None,
    encoder: EncoderSpec = tiny.TINY,
    config: dict[str, object] | None = None,
    publisher: Publisher | None = None,
) -> Preprocessing:
    checkpoint = find_weights(encoder, "random:0")
    return resolve_preprocessing(
        plan_weights(encoder, dataclasses.replace(checkpoint, preprocessor=settings, config=config)), publisher
    )


def test_without_settings_the_encoders_default_holds() -> None:
    assert resolve(None) == DEFAULT


def test_settings_are_taken_over_and_named_as_the_source() -> None:
    assert resolve(NORMALISED) == Preprocessing(
        size=(32, 32),
        shortest_edge=None,
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        source="preprocessor_config.json",
        publisher="hf",
    )


def test_the_settings_that_hugging_face_published_for_vit_are_its_default_in_other_words() -> None:
    published = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 32, "width": 32},
    }
    got = resolve(published)
    assert (got.size, got.interpolation, got.mean, got.std) == (
        DEFAULT.size,
        DEFAULT.interpolation,
        DEFAULT.mean,
        DEFAULT.std,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 32},
        {"size": {"height": 32, "width": 32}},
        {"rescale_factor": 1 / 255},
        {"do_center_crop": False, "do_pad": None},
        {"do_center_crop": False, "crop_size": {"height": 24, "width": 24}},
        {"resample": 2},
    ],
)
def test_settings_that_say_the_same_are_accepted(settings: dict[str, object]) -> None:
    assert resolve({**NORMALISED, **settings}) == resolve(NORMALISED)


def test_bicubic_is_read() -> None:
    assert resolve({**NORMALISED, "resample": 3}).interpolation == "bicubic"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", [32, 32]),
        ("size", {"shortest_edge": 32}),
        ("size", {"height": 32, "width": 64}),
        ("size", None),
        ("resample", 0),
        ("resample", 1),
        ("resample", "lanczos"),
        ("resample", [3]),
        ("resample", None),
        ("rescale_factor", 1 / 127.5),
        ("rescale_factor", 1),
        ("do_resize", False),
        ("do_rescale", False),
        ("do_normalize", False),
        ("do_center_crop", True),
        ("do_pad", True),
        ("do_flip_channel_order", True),
        ("rescale_offset", True),
        ("image_mean", None),
        ("image_mean", 0.5),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", ["0.5", "0.5", "0.5"]),
        ("image_mean", [0.5, 0.5, float("nan")]),
        ("image_std", [0.5, 0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", [0.5, -0.5, 0.5]),
        ("image_std", [True, True, True]),
        ("image_std", [float("inf"), 1.0, 1.0]),
    ],
)
def test_settings_that_give_other_pixels_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json") as raised:
        resolve({**NORMALISED, name: value})
    assert str(raised.value.got).startswith(f"{name} = ")
    assert ";" not in str(raised.value.got)


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_means_and_deviations_are_not_guessed(name: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        resolve({key: value for key, value in NORMALISED.items() if key != name})
    assert name in str(raised.value.got)


def test_every_unsupported_setting_is_listed_at_once() -> None:
    with pytest.raises(CheckpointError) as raised:
        resolve({"size": [7, 7], "do_pad": True, "resample": 9})
    for name in ("size", "do_pad", "resample", "image_mean", "image_std"):
        assert name in str(raised.value.got)


CROPPED = {**NORMALISED, "do_center_crop": True, "resample": 3}
"""As CLIPImageProcessor and BitImageProcessor write their settings."""


@pytest.mark.parametrize("encoder", [tiny.TINY, tiny.TINY_DINOV2], ids=lambda encoder: encoder.name)
@pytest.mark.parametrize("longer", [0, 1, 36])
@pytest.mark.parametrize("spelling", ["objects", "numbers"])
def test_a_centre_crop_of_the_encoders_size_is_taken_over(encoder: EncoderSpec, longer: int, spelling: str) -> None:
    size = encoder.image_size
    settings: dict[str, object] = {"size": size + longer, "crop_size": size}
    if spelling == "objects":
        settings = {"size": {"shortest_edge": size + longer}, "crop_size": {"height": size, "width": size}}
    got = resolve({**CROPPED, **settings}, encoder)
    assert (got.size, got.shortest_edge, got.interpolation) == ((size, size), size + longer, "bicubic")
    assert (got.publisher, got.crop_offset) == ("hf", "down")
    assert got.source == "preprocessor_config.json"


@pytest.mark.parametrize(
    ("encoder", "settings"),
    [
        (tiny.TINY, {**CROPPED, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}),
        (tiny.TINY, {**NORMALISED, "resample": 3, "size": {"height": 224, "width": 224}}),
        (tiny.TINY_DINOV2, {**CROPPED, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}),
        (tiny.TINY_DINOV2, {**NORMALISED, "resample": 3, "size": 224}),
    ],
    ids=["squashing encoder, crop", "squashing encoder, squash", "cropping encoder, crop", "cropping encoder, squash"],
)
def test_settings_for_another_size_give_all_but_the_resize(encoder: EncoderSpec, settings: dict[str, object]) -> None:
    got = resolve(settings, encoder)
    default = encoder.preprocessing[0]
    assert (got.size, got.shortest_edge) == (default.size, default.shortest_edge)
    assert (got.interpolation, got.mean, got.std) == ("bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert got.source == "preprocessor_config.json, which is for 224 pixels"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, ("do_center_crop",)),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 24}}, ("size", "crop_size")),
        ({"size": {"shortest_edge": 31}, "crop_size": 32}, ("size", "crop_size")),
        ({"size": {"height": 36, "width": 36}, "crop_size": 32}, ("size", "crop_size")),
        ({"size": {"shortest_edge": "36"}, "crop_size": 32}, ("size", "crop_size")),
        ({"size": {"shortest_edge": 36}, "crop_size": 0}, ("size", "crop_size")),
        ({"crop_size": 32}, ("crop_size",)),
        ({"size": {"shortest_edge": 31}}, ("size",)),
    ],
)
def test_a_centre_crop_that_cannot_be_cut_or_is_not_given_whole_is_refused(
    settings: dict[str, object], named: tuple[str, ...]
) -> None:
    with pytest.raises(CheckpointError, match="what this version does not do") as raised:
        resolve({**CROPPED, **settings})
    assert [problem.partition(" = ")[0] for problem in str(raised.value.got).split("; ")] == list(named)


TIMM = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic", "crop_pct": 0.9}


@pytest.mark.parametrize(
    ("crop", "edge"),
    [({"crop_pct": 0.9}, 35), ({"crop_pct": 1.0}, 32), ({"crop_pct": 1}, 32), ({"crop_pct": 0.875}, 36)],
)
def test_timms_settings_are_taken_over_and_named_as_the_source(crop: dict[str, object], edge: int) -> None:
    config = {"architecture": "vit", "pretrained_cfg": {**TIMM, "crop_mode": "center", **crop}}
    assert resolve(None, config=config) == Preprocessing(
        size=(32, 32),
        shortest_edge=edge,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        source="pretrained_cfg in config.json",
        publisher="timm",
    )


def test_timms_resize_is_the_one_that_timm_builds() -> None:
    timm = import_timm()
    for crop_pct in (0.875, 0.9, 0.95, 0.96, 1.0):
        steps = timm.data.create_transform(224, crop_pct=crop_pct, crop_mode="center").transforms
        got = resolve(None, tiny.TINY.at_size(224), {"pretrained_cfg": {**TIMM, "crop_pct": crop_pct}})
        assert (got.shortest_edge, got.size) == (steps[0].size, steps[1].size)


@pytest.mark.parametrize("encoder", [tiny.TINY, tiny.TINY_DINOV2], ids=lambda encoder: encoder.name)
def test_timms_settings_hold_at_any_size(encoder: EncoderSpec) -> None:
    got = resolve(None, encoder.at_size(112), {"pretrained_cfg": {**TIMM, "input_size": [3, 224, 224]}})
    assert (got.size, got.shortest_edge) == ((112, 112), 124)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_mode", "border"),
        ("crop_mode", "squash"),
        ("crop_pct", 0),
        ("crop_pct", -0.9),
        ("crop_pct", 1.1),
        ("crop_pct", "0.9"),
        ("crop_pct", None),
        ("crop_pct", float("nan")),
        ("interpolation", "nearest"),
        ("interpolation", "random"),
        ("interpolation", ["bicubic"]),
        ("mean", None),
        ("std", [0.5, 0.5, 0]),
    ],
)
def test_timms_settings_that_give_other_pixels_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"pretrained_cfg in config\.json") as raised:
        resolve(None, config={"pretrained_cfg": {**TIMM, name: value}})
    assert raised.value.got == f"{name} = {value!r}"


def test_hugging_faces_settings_come_before_timms() -> None:
    assert resolve(NORMALISED, config={"pretrained_cfg": TIMM}) == resolve(NORMALISED)


@pytest.mark.parametrize("config", [{}, {"pretrained_cfg": None}, {"pretrained_cfg": "vit"}, {"crop_pct": 0.9}])
def test_a_config_without_settings_for_images_leaves_the_encoders_default(config: dict[str, object]) -> None:
    assert resolve(None, config=config) == DEFAULT


def test_a_publisher_that_was_asked_for_is_taken_alone() -> None:
    both: tuple[dict[str, object], EncoderSpec, dict[str, object]] = (
        {**NORMALISED, "resample": 2},
        tiny.TINY,
        {"pretrained_cfg": TIMM},
    )
    assert resolve(*both, "hf") == resolve(both[0])
    assert resolve(*both, "timm") == resolve(None, config=both[2])
    assert resolve(*both[:2], None, "timm") == tiny.TINY.preprocessing[1]
    assert resolve(None, *both[1:], "hf") == tiny.TINY.preprocessing[0]
    upstream = resolve({**NORMALISED, "resample": 3}, tiny.TINY_PE_LANG, both[2], "upstream")
    assert upstream == tiny.TINY_PE_LANG.preprocessing[0]


@pytest.mark.parametrize("encoder", [tiny.TINY, tiny.TINY_CONVNEXT, tiny.TINY_AIMV2], ids=lambda e: e.name)
def test_a_publisher_with_no_way_of_its_own_is_refused_with_those_that_have_one(encoder: EncoderSpec) -> None:
    known = [steps.publisher for steps in encoder.preprocessing]
    absent = next(name for name in PUBLISHERS if name not in known)
    with pytest.raises(UsageError) as raised:
        resolve(None, encoder, publisher=absent)
    assert (raised.value.expected, raised.value.got) == (", ".join(map(str, known)), absent)


def test_settings_for_another_size_are_resized_in_proportion_where_their_publisher_is_asked_for() -> None:
    published = {**CROPPED, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    got = resolve(published, tiny.TINY_DINOV2, publisher="hf")
    assert (got.size, got.shortest_edge, got.crop_offset) == ((56, 56), 64, "down")


@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder.name)
def test_every_publisher_is_named_once_and_prepares_images_of_the_encoders_size(encoder: EncoderSpec) -> None:
    publishers = [steps.publisher for steps in encoder.preprocessing]
    assert None not in publishers
    assert len(set(publishers)) == len(publishers) > 1
    assert {steps.size for steps in encoder.preprocessing} == {(encoder.image_size, encoder.image_size)}


def test_a_plan_carries_the_settings_beside_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_file(load_file(tiny_checkpoint / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**NORMALISED, "resample": 3}))
    request = make_request("tiny-vit", output=tmp_path / "out")
    plan = plan_export(request, str(tmp_path))
    assert plan.preprocessing.interpolation == "bicubic"
    assert plan.preprocessing.source == "preprocessor_config.json"
