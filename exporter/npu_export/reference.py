"""The reference of an artifact: seeded images, and what the unmodified fp32 eager network gives for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from npu_export.errors import CheckpointError
from npu_export.plan import REFERENCE_SEEDS, ExportPlan
from npu_runtime.artifact.schema import Preprocessing
from npu_runtime.artifact.store import Array, Images
from npu_runtime.parity.inputs import seeded_images
from npu_runtime.preprocess import Pixels, normalise
from npu_runtime.steps import Steps

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the reference holds, as the network itself takes and gives it."""

    inputs: Images
    """As the programs take them."""
    pixel_values: Images
    """Normalised float32 [N, 3, H, W], whatever a program takes."""
    outputs: Mapping[str, Array]
    """By name, float32 [N, ...]."""


def write_reference(plan: ExportPlan, module: nn.Module, path: Path, steps: Steps) -> Recorded:
    """Run the eager network one image at a time, which is what batch 1 must give bit for bit.

    Pixels are normalised for it as `npu_runtime` prepares images, so that programs which do so themselves are judged.
    """
    from safetensors.numpy import save

    from npu_export.eager import run_eager

    encoder, spec = plan.request.encoder, plan.request.inputs[0]
    inputs = seeded_images(REFERENCE_SEEDS, spec.of_batch(1)[1:], spec.dtype)
    advance = steps.count(len(inputs), "images")
    rows = []
    pixel_values = np.stack([normalised(image, plan.preprocessing) for image in inputs])
    for image in pixel_values:
        rows.append(run_eager(module, image[None]))
        advance(1)
    outputs = {spec.name: np.concatenate(arrays) for spec, arrays in zip(encoder.outputs, zip(*rows))}
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"the eager network's own output {name} holds NaN or infinity",
                where=encoder.name,
                expected="finite values",
                hint="the checkpoint is damaged or not this encoder's",
            )
    path.write_bytes(save({spec.name: inputs, **outputs}))
    return Recorded(inputs, pixel_values, outputs)


def normalised(image: Images, preprocessing: Preprocessing) -> Images:
    """An image's `pixel_values` as the network itself takes them."""
    if image.dtype != np.uint8:
        return image
    pixel_values = np.empty((3, *preprocessing.size), np.float32)
    normalise(cast(Pixels, image), preprocessing, out=pixel_values)
    return pixel_values
