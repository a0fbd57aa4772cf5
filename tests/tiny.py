"""A real but tiny ViT for tests, and the commands with it among the encoders.

`python tests/tiny.py npu-export --model tiny-vit …` runs the real command line in a process of its own.
"""

from __future__ import annotations

import sys

import npu_export.encoders
from npu_export.encoders.vit import VIT_BASE, VitShape, vit_encoder

TINY = vit_encoder(
    "tiny-vit",
    VitShape(image=32, patch=8, width=64, depth=2, heads=4),
    hub_id="tests/tiny-vit",
    aliases=("vit_tiny_for_tests",),
    tolerances=VIT_BASE.tolerances,
)


def register() -> None:
    """Add the tiny encoder to the table; a second call does nothing."""
    if TINY not in npu_export.encoders.ENCODERS:
        npu_export.encoders.ENCODERS = (*npu_export.encoders.ENCODERS, TINY)


if __name__ == "__main__":
    register()
    program = sys.argv.pop(1)
    if program == "npu-export":
        from npu_export.cli import main
    else:
        from npu_runtime.cli import main
    main()
