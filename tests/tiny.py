"""Real but tiny encoders of each family for tests, and the commands with them among the encoders.

`python tests/tiny.py npu-export --model tiny-vit …` runs the real command line in a process of its own.
"""

from __future__ import annotations

import dataclasses
import sys

import npu_export.encoders
from npu_export.encoders.aimv2 import AIMV2_LARGE_DISTILLED, Aimv2Shape, aimv2_encoder
from npu_export.encoders.convnext import CONVNEXT_BASE_CLIP, ConvNextShape, convnext_encoder
from npu_export.encoders.dinov2 import DINOV2_SMALL_REG4, dinov2_encoder
from npu_export.encoders.pe_lang import PE_LANG_L14_448, pe_lang_encoder
from npu_export.encoders.spec import EncoderSpec, Lookalike, Published
from npu_export.encoders.vit import VIT_BASE, VitShape, vit_encoder


def _published(full: EncoderSpec, name: str, parameters: int, **changes: object) -> Published:
    """The publication of a full-size encoder under a tiny one's name."""
    return dataclasses.replace(
        full.published,
        name=name,
        hub_id=f"tests/{name}",
        aliases=(f"{name}-for-tests",),
        parameters=parameters,
        **changes,
    )


TINY = vit_encoder(_published(VIT_BASE, "tiny-vit", 113_600), VitShape(image=32, patch=8, width=64, depth=2, heads=4))
TINY_PE_LANG = pe_lang_encoder(
    _published(PE_LANG_L14_448, "tiny-pe-lang", 139_136),
    VitShape(image=56, patch=14, width=64, depth=2, heads=4),
    reference_grid=4,
)
TINY_CONVNEXT = convnext_encoder(
    _published(
        CONVNEXT_BASE_CLIP,
        "tiny-convnext",
        32_420,
        lookalikes=(Lookalike("head.proj.weight", (12, 32), "a projection to 12: without _w"),),
    ),
    ConvNextShape(image=64, depths=(1, 1, 2, 1), widths=(8, 16, 24, 32), embedding=20),
)
TINY_DINOV2 = dinov2_encoder(
    _published(DINOV2_SMALL_REG4, "tiny-dinov2", 139_392), VitShape(image=56, patch=14, width=64, depth=2, heads=4)
)
TINY_AIMV2 = aimv2_encoder(
    _published(AIMV2_LARGE_DISTILLED, "tiny-aimv2", 139_456),
    Aimv2Shape(image=56, patch=14, width=64, depth=2, heads=4, hidden=176),
)
FAMILIES = (TINY, TINY_PE_LANG, TINY_CONVNEXT, TINY_DINOV2, TINY_AIMV2)
"""One tiny encoder of each family."""
BOUNDARIES = {
    "tiny-vit": ["patch_embed", "blocks.0", "blocks.1", "norm"],
    "tiny-pe-lang": ["patch_embed", "norm_pre", "blocks.0", "blocks.1"],
    "tiny-convnext": [
        "stem",
        "stages.0.blocks.0",
        "stages.1.downsample",
        "stages.1.blocks.0",
        "stages.2.downsample",
        "stages.2.blocks.0",
        "stages.2.blocks.1",
        "stages.3.downsample",
        "stages.3.blocks.0",
        "head",
    ],
    "tiny-dinov2": ["patch_embed", "blocks.0", "blocks.1", "norm"],
    "tiny-aimv2": ["patch_embed", "blocks.0", "blocks.1", "norm"],
}
"""By encoder the modules whose outputs are boundaries, in the order in which they run; all have weights."""


def register() -> None:
    """Add the tiny encoders to the table; a second call does nothing."""
    if TINY not in npu_export.encoders.ENCODERS:
        npu_export.encoders.ENCODERS = (*npu_export.encoders.ENCODERS, *FAMILIES)


if __name__ == "__main__":
    register()
    program = sys.argv.pop(1)
    if program == "npu-export":
        from npu_export.cli import main
    else:
        from npu_runtime.cli import main
    main()
