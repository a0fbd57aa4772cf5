from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

from npu_export.errors import CheckpointError
from npu_export.plan import make_request, plan_export
from npu_export.preprocessor_config import resolve_preprocessing
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import Preprocessing

DEFAULT = tiny.TINY.preprocessing
NORMALISED = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def resolve(settings: dict[str, object] | None) -> Preprocessing:
    checkpoint = find_weights(tiny.TINY, "random:0")
    return resolve_preprocessing(dataclasses.replace(checkpoint, preprocessor=settings), DEFAULT)


def test_without_settings_the_encoders_default_holds() -> None:
    assert resolve(None) == DEFAULT


def test_settings_are_taken_over_and_named_as_the_source() -> None:
    assert resolve(NORMALISED) == Preprocessing(
        size=(32, 32),
        resize="squash",
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        source="preprocessor_config.json",
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
        ("size", 64),
        ("size", [32, 32]),
        ("size", {"shortest_edge": 32}),
        ("size", {"height": 32, "width": 64}),
        ("size", None),
        ("resample", 0),
        ("resample", 1),
        ("resample", "bicubic"),
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
        resolve({"size": 7, "do_pad": True, "resample": 9})
    for name in ("size", "do_pad", "resample", "image_mean", "image_std"):
        assert name in str(raised.value.got)


def test_a_plan_carries_the_settings_beside_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_file(load_file(tiny_checkpoint / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**NORMALISED, "resample": 3}))
    request = make_request("tiny-vit", output=tmp_path / "out")
    plan = plan_export(request, str(tmp_path))
    assert plan.preprocessing.interpolation == "bicubic"
    assert plan.preprocessing.source == "preprocessor_config.json"
