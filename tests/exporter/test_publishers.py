"""Pixels of the five encoders beside those of the publishers' own libraries, in levels of 255 before normalisation."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import npu_runtime.preprocess
from npu_export.encoders import ENCODERS
from npu_export.encoders.spec import EncoderSpec
from npu_export.timm_import import import_timm
from npu_runtime.artifact.schema import Preprocessing
from npu_runtime.preprocess import preprocess

Array = npt.NDArray[np.float32]
PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data" / "photographs").glob("*.jpg"))
TIMM = {
    "vit-base": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "pe-lang-l14-448": "vit_pe_lang_large_patch14_448.fb",
    "convnext-base-clip": "convnext_base.clip_laion2b",
    "dinov2-small-reg4": "vit_small_patch14_reg4_dinov2.lvd142m",
    "aimv2-large-distilled": "aimv2_large_patch14_224.apple_pt_dist",
}
"""Encoder -> timm's name of it."""
PROCESSORS = {
    "vit-base": "ViTImageProcessor",
    "dinov2-small-reg4": "BitImageProcessor",
    "aimv2-large-distilled": "CLIPImageProcessor",
}
"""Encoder -> the class that Hugging Face's preprocessor_config.json beside its weights names."""
SIZES = [(1, 1), (3, 500), (223, 225), (231, 224), (1001, 61), (3000, 2000)]
FIVE = [encoder for encoder in ENCODERS if encoder.name in TIMM]
by_name = pytest.mark.parametrize("encoder", FIVE, ids=lambda encoder: encoder.name)


def photographs() -> list[Image.Image]:
    """The demo's, as they are and enlarged to 12 megapixels."""
    opened = [Image.open(path).convert("RGB") for path in PHOTOGRAPHS]
    return [*opened, opened[0].resize((4000, 3000), Image.Resampling.BICUBIC)]


def odd_images() -> list[Image.Image]:
    """Parts of a photograph, tiny to huge: smooth where noise would be clipped at each step of a bicubic resize."""
    photograph = Image.open(PHOTOGRAPHS[0]).convert("RGB")
    return [photograph.resize(size, Image.Resampling.BILINEAR) for size in SIZES]


def by(encoder: EncoderSpec, publisher: str) -> Preprocessing:
    return next(steps for steps in encoder.preprocessing if steps.publisher == publisher)


def levels(got: Array, expected: Array, steps: Preprocessing) -> Array:
    """How far apart values were before normalisation, of 255."""
    assert got.shape == expected.shape == (3, *steps.size)
    return np.abs(got - expected) * np.array(steps.std, np.float32).reshape(3, 1, 1) * 255


def timm_transform(name: str) -> Callable[[Image.Image], Array]:
    timm = import_timm()
    settings = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**settings)
    return lambda image: transform(image).numpy()


def has_transformers_5() -> bool:
    """Whose classes on torchvision bear the plain names, which version 4 gives to those on pillow."""
    import_timm()
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def hugging_face(name: str, steps: Preprocessing, *, on_torchvision: bool) -> Callable[[Image.Image], Array]:
    """Transformers' class with an encoder's settings; the one on pillow, or the one on torchvision."""
    five = has_transformers_5()
    import transformers

    if five and not on_torchvision:
        family = name.removesuffix("ImageProcessor").lower()
        module = f"transformers.models.{family}.image_processing_pil_{family}"
        kind = getattr(importlib.import_module(module), f"{name}Pil")
    else:
        kind = getattr(transformers, name if five or not on_torchvision else f"{name}Fast")
    height, width = steps.size
    settings: dict[str, Any] = {"size": {"height": height, "width": width}}
    if steps.shortest_edge is not None:
        settings = {"size": {"shortest_edge": steps.shortest_edge}, "crop_size": {"height": height, "width": width}}
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[steps.interpolation]
    processor = kind(resample=resample, image_mean=list(steps.mean), image_std=list(steps.std), **settings)

    # Without it numpy's arrays of odd sizes are ambiguous; torchvision's are not, and version 4 would turn them twice.
    layout = {} if on_torchvision else {"input_data_format": "channels_last"}

    def run(image: Image.Image) -> Array:
        given = processor(image, return_tensors="pt", **layout)
        pixel_values: Array = given["pixel_values"][0].numpy()
        return pixel_values

    return run


@by_name
def test_timms_pixels_are_those_of_its_transform(encoder: EncoderSpec) -> None:
    transform, steps = timm_transform(TIMM[encoder.name]), by(encoder, "timm")
    for image in (*photographs(), *odd_images()):
        assert levels(preprocess(image, steps), transform(image), steps).max() < 0.001, image.size


@pytest.mark.parametrize("name", PROCESSORS)
def test_hugging_faces_pixels_are_those_of_its_processor_on_pillow(name: str) -> None:
    encoder = next(encoder for encoder in FIVE if encoder.name == name)
    steps = by(encoder, "hf")
    processor = hugging_face(PROCESSORS[name], steps, on_torchvision=False)
    for image in (*photographs(), *odd_images()):
        assert levels(preprocess(image, steps), processor(image), steps).max() < 0.001, image.size


@pytest.mark.parametrize("name", PROCESSORS)
def test_on_photographs_its_processor_on_torchvision_differs_by_a_level_at_most(name: str) -> None:
    encoder = next(encoder for encoder in FIVE if encoder.name == name)
    steps = by(encoder, "hf")
    processor = hugging_face(PROCESSORS[name], steps, on_torchvision=True)
    for image in photographs():
        difference = levels(preprocess(image, steps), processor(image), steps)
        assert difference.max() <= 1.001
        assert (difference > 0.5).mean() < 0.05


def test_pe_langs_pixels_are_those_of_perception_lms_single_tile() -> None:
    five = has_transformers_5()
    family = importlib.import_module("transformers.models.perception_lm")
    kind = family.PerceptionLMImageProcessor if five else family.PerceptionLMImageProcessorFast
    processor = kind(vision_input_type="vanilla", tile_size=448)
    steps = by(next(encoder for encoder in FIVE if encoder.name == "pe-lang-l14-448"), "hf")
    for image in photographs():
        theirs = processor(image, return_tensors="pt")["pixel_values"].numpy().reshape(3, 448, 448)
        difference = levels(preprocess(image, steps), theirs, steps)
        # Version 4 does not round between the two directions of a resize, which shows where a bicubic one clips.
        assert difference.max() <= (2.001 if five else 7.001)
        assert (difference > 1.001).mean() < (1e-4 if five else 1e-3)


@pytest.mark.parametrize("name", ["pe-lang-l14-448", "convnext-base-clip", "dinov2-small-reg4"])
def test_upstream_pixels_are_those_of_the_authors_transforms(name: str) -> None:
    import_timm()
    transforms = pytest.importorskip("torchvision.transforms")
    steps = by(next(encoder for encoder in FIVE if encoder.name == name), "upstream")
    size, mode = steps.size[0], transforms.InterpolationMode
    resize = {
        "pe-lang-l14-448": [transforms.Resize((size, size), interpolation=mode.BILINEAR)],
        "convnext-base-clip": [transforms.Resize(size, interpolation=mode.BICUBIC), transforms.CenterCrop(size)],
        "dinov2-small-reg4": [transforms.Resize(592, interpolation=mode.BICUBIC), transforms.CenterCrop(size)],
    }[name]
    normalise = transforms.Normalize(steps.mean, steps.std)
    transform = transforms.Compose([*resize, transforms.ToTensor(), normalise])
    for image in (*photographs(), *odd_images()):
        assert levels(preprocess(image, steps), transform(image).numpy(), steps).max() < 0.001, image.size


def test_convnexts_upstream_is_open_clips_transform() -> None:
    import_timm()
    open_clip = pytest.importorskip("open_clip")
    settings = open_clip.get_pretrained_cfg("convnext_base_w", "laion2b_s13b_b82k")
    steps = by(next(encoder for encoder in FIVE if encoder.name == "convnext-base-clip"), "upstream")
    transform = open_clip.image_transform(
        256, is_train=False, mean=settings["mean"], std=settings["std"], interpolation=settings["interpolation"]
    )
    for image in photographs():
        assert levels(preprocess(image, steps), transform(image).numpy(), steps).max() < 0.001


@pytest.mark.parametrize("name", ["vit-base", "pe-lang-l14-448", "dinov2-small-reg4", "aimv2-large-distilled"])
def test_where_publishers_disagree_their_pixels_differ(name: str) -> None:
    encoder = next(encoder for encoder in FIVE if encoder.name == name)
    size = encoder.image_size
    image = photographs()[0].resize((size + 3, size))  # a margin of 3: the offset is 2 for timm, 1 for Hugging Face
    first = encoder.preprocessing[0]
    for steps in encoder.preprocessing[1:]:
        assert levels(preprocess(image, steps), preprocess(image, first), first).max() > 2, steps.publisher


def test_convnexts_publishers_agree() -> None:
    upstream, timm = next(encoder for encoder in FIVE if encoder.name == "convnext-base-clip").preprocessing
    assert dataclasses.replace(timm, source=upstream.source, publisher=upstream.publisher) == upstream


@pytest.mark.parametrize("margin", range(8))
def test_the_offset_of_the_crop_is_rounded_as_each_library_rounds_it(margin: int) -> None:
    image = photographs()[0].resize((224 + margin, 224))
    encoder = next(encoder for encoder in FIVE if encoder.name == "aimv2-large-distilled")
    down, even = by(encoder, "hf"), by(encoder, "timm")
    theirs = hugging_face("CLIPImageProcessor", down, on_torchvision=False)(image)
    assert levels(preprocess(image, down), theirs, down).max() < 0.001
    assert levels(preprocess(image, even), timm_transform(TIMM[encoder.name])(image), even).max() < 0.001
    assert np.array_equal(preprocess(image, down), preprocess(image, even)) is (margin % 4 != 3)


@pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
def test_a_strip_of_pixels_that_would_fill_the_memory_is_cut_before_it_is_enlarged(turned: bool) -> None:
    steps = by(next(encoder for encoder in FIVE if encoder.name == "vit-base"), "timm")
    strip = Image.linear_gradient("L").convert("RGB").resize((1, 60_000))  # to 248 x 14,880,000, 14 GB
    got = preprocess(strip.transpose(Image.Transpose.ROTATE_90) if turned else strip, steps)
    np.testing.assert_allclose(got, 0, atol=0.01)


@pytest.mark.parametrize("size", [(3, 500), (500, 3), (40, 3000), (100, 120)])
def test_what_is_cut_before_it_is_enlarged_differs_by_two_levels_at_most(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photographs()[0].resize(size)
    for encoder in FIVE:
        steps = encoder.preprocessing[-1]
        monkeypatch.undo()
        whole = preprocess(image, steps)
        monkeypatch.setattr(npu_runtime.preprocess, "MOST_PIXELS", size[0] * size[1] + 1)
        difference = levels(preprocess(image, steps), whole, steps)
        assert difference.max() <= 2.001
        assert (difference > 1.001).mean() < 1e-3


@pytest.mark.parametrize(("interpolation", "apart"), [("bilinear", 1.001), ("bicubic", 32)])
@pytest.mark.parametrize("size", [(223, 225), (3, 500), (500, 3)])
def test_on_noise_pixels_are_pillows_and_those_of_torchvision_stay_near_unless_a_bicubic_clips(
    size: tuple[int, int], interpolation: Literal["bilinear", "bicubic"], apart: float
) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    steps = dataclasses.replace(by(FIVE[0], "hf"), interpolation=interpolation)
    pixels = preprocess(noise, steps)
    on_pillow, on_torchvision = (
        hugging_face("ViTImageProcessor", steps, on_torchvision=chosen)(noise) for chosen in (False, True)
    )
    assert levels(pixels, on_pillow, steps).max() < 0.001
    assert levels(pixels, on_torchvision, steps).max() <= apart
