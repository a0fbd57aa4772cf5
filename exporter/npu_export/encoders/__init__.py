"""The encoders. One module a family, one entry in `ENCODERS` each."""

from __future__ import annotations

import difflib

from npu_export.encoders.aimv2 import AIMV2_LARGE_DISTILLED
from npu_export.encoders.convnext import CONVNEXT_BASE_CLIP
from npu_export.encoders.dinov2 import DINOV2_SMALL_REG4
from npu_export.encoders.pe_lang import PE_LANG_L14_448
from npu_export.encoders.spec import EncoderSpec
from npu_export.encoders.vit import VIT_BASE
from npu_runtime.errors import UsageError

ENCODERS: tuple[EncoderSpec, ...] = (
    VIT_BASE,
    PE_LANG_L14_448,
    CONVNEXT_BASE_CLIP,
    DINOV2_SMALL_REG4,
    AIMV2_LARGE_DISTILLED,
)


def find_encoder(name: str) -> EncoderSpec:
    """The encoder of a name, hub id or alias; raises UsageError with the choices and the nearest one."""
    names = {alias: e for e in ENCODERS for alias in (e.name, *e.aliases)}
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=1)
    raise UsageError(
        f"unknown encoder {name!r}",
        expected=", ".join(e.name for e in ENCODERS),
        hint=f"did you mean {near[0]}?" if near else "npu-export --list shows every encoder and its aliases",
    )
