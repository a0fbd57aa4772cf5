"""What an export would do, decided from names, shapes and settings before anything heavy runs."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from npu_export.boundaries import boundary_names
from npu_export.encoders import find_encoder
from npu_export.encoders.spec import EncoderSpec
from npu_export.network import WeightsPlan, network_shapes, plan_weights
from npu_export.precision import check_kept, require_kernels
from npu_export.preprocessor_config import resolve_preprocessing
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import (
    InputDtype,
    Precision,
    Preprocessing,
    Publisher,
    TensorSpec,
    input_spec,
    variant_name,
)
from npu_runtime.artifact.staging import check_output
from npu_runtime.devices.ambient import torch_defaults
from npu_runtime.devices.torch_import import import_torch
from npu_runtime.errors import UnavailableError, UsageError
from npu_runtime.parity.sketch import WIDTH
from npu_runtime.steps import Silent, Steps

FORMATS = ("torchscript", "onnx")
PRECISIONS: Mapping[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Precision -> bytes of a weight."""
PACKAGES = {"torchscript": ("torch",), "onnx": ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime")}
"""Format -> modules that freezing to it, and checking the result, imports."""
INPUTS: tuple[InputDtype, ...] = ("float32", "uint8")
PUBLISHERS: tuple[Publisher, ...] = ("hf", "timm", "upstream")
AUTO = "auto"
"""In place of modules to keep in float32: those that float16 does not hold."""
DEFAULT_OPSET = 18
LEAST_OPSET = 11
"""The oldest ai.onnx opset that ATC documents."""
MAX_BATCH = 1024
MAX_IMAGE_SIZE = 4096
PROBES_FILE = "probes.safetensors"
REFERENCE_SEEDS = (0, 1, 2, 3)
"""One reference image each. Four differ enough to show a program that mixes its rows."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for, checked for sense alone."""

    encoder: EncoderSpec
    formats: tuple[str, ...]
    batches: tuple[int, ...]
    """In the order given: `forward` of a TorchScript program is the first."""
    layout: str
    prefix: str | None
    """The part of the checkpoint to use; None finds it."""
    resample: bool
    """Whether positions for another image size may be resampled: only where a size was asked for."""
    precision: Precision
    input: InputDtype
    opset: int
    preprocess: Publisher | None
    """Whose preparation of images to record; None for the settings beside the weights, then the encoder's first."""
    probes: bool
    keep_fp32: tuple[str, ...]
    """Modules of the network that stay float32; AUTO among them adds those that float16 does not hold."""
    images: tuple[Path, ...]
    """Files and folders of images on which ranges are measured beside the reference's."""
    output: Path
    force: bool

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the programs take."""
        return (input_spec(self.input, (self.encoder.image_size, self.encoder.image_size)),)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """A request and the checkpoint that fills it wholly."""

    request: Request
    weights: WeightsPlan
    preprocessing: Preprocessing
    keep_fp32: tuple[str, ...] = ()
    """Modules that stay float32. What AUTO adds to those of the request is not known before ranges are measured."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes that each file takes, about: weights and reference as they are, graphs left out."""
        encoder, nbytes = self.request.encoder, {}
        weights_nbytes = PRECISIONS[self.request.precision] * self.weights.parameters + self.kept_nbytes()
        if "torchscript" in self.request.formats:
            nbytes["model.ts"] = weights_nbytes
        if "onnx" in self.request.formats:
            nbytes["weights.onnx.data"] = weights_nbytes
        specs = (*self.request.inputs, *encoder.outputs)
        nbytes["reference.safetensors"] = sum(spec.nbytes(len(REFERENCE_SEEDS)) for spec in specs)
        if self.request.probes:
            nbytes[PROBES_FILE] = len(self.boundaries()) * len(REFERENCE_SEEDS) * 8 * (WIDTH + 1)
        return nbytes

    def kept_nbytes(self) -> int:
        """Bytes that the weights of a program take more, for modules that stay float32."""
        if not self.keep_fp32:
            return 0
        kept = tuple(f"{name}." for name in self.keep_fp32)
        elements = [
            math.prod(shape) for name, shape in network_shapes(self.weights.layout).items() if name.startswith(kept)
        ]
        return (PRECISIONS["fp32"] - PRECISIONS[self.request.precision]) * sum(elements)

    def boundaries(self) -> list[str]:
        """Modules with weights whose outputs are recorded where probes are asked for, and which may stay float32."""
        keys = [target for move in self.weights.keymap.moves for target in move.targets]
        parents = dict.fromkeys(
            ".".join(key.split(".")[:depth]) for key in keys for depth in range(1, key.count(".") + 1)
        )
        return boundary_names(parents)


def make_request(
    model: str | EncoderSpec,
    *,
    formats: Sequence[str] = FORMATS,
    batch: Sequence[int] = (1,),
    layout: str = "auto",
    prefix: str | None = None,
    image_size: int | None = None,
    precision: str = "fp32",
    input: str = "float32",
    opset: int = DEFAULT_OPSET,
    preprocess: str | None = None,
    probes: bool = False,
    keep_fp32: str | Sequence[str] = (),
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    output: str | Path | None = None,
    force: bool = False,
) -> Request:
    """The request, or UsageError for what does not exist or does not fit together."""
    published = find_encoder(model) if isinstance(model, str) else model
    encoder = published if image_size is None else _at_size(published, image_size)
    for what, values, choices in (
        ("format", formats, FORMATS),
        ("precision", (precision,), tuple(PRECISIONS)),
        ("input", (input,), INPUTS),
        ("layout", (layout,), ("auto", *encoder.layout_names())),
        ("publisher", (preprocess or PUBLISHERS[0],), PUBLISHERS),
    ):
        unknown = [value for value in values if value not in choices]
        if unknown or not values:
            raise UsageError(
                f"unknown {what}" if unknown else f"no {what} was given",
                expected=", ".join(choices),
                got=", ".join(unknown) or None,
            )
    wrong = [size for size in batch if type(size) is not int or not 1 <= size <= MAX_BATCH]
    if wrong or not batch or len(set(batch)) != len(batch):
        raise UsageError(
            "wrong batch sizes",
            expected=f"different whole numbers from 1 to {MAX_BATCH}, such as 1,4,8",
            got=",".join(map(str, batch)) or "none",
        )
    keep = tuple(dict.fromkeys([keep_fp32] if isinstance(keep_fp32, str) else keep_fp32))
    paths = tuple(Path(path) for path in ([images] if isinstance(images, (str, os.PathLike)) else images))
    _check_ranges(precision, keep, paths)
    size = "" if encoder.image_size == published.image_size else f"-{encoder.image_size}"
    variant = cast(Precision, precision), cast(InputDtype, input)
    return Request(
        encoder,
        tuple(format for format in FORMATS if format in formats),
        tuple(batch),
        layout,
        prefix,
        image_size is not None,
        *variant,
        opset,
        cast("Publisher | None", preprocess),
        probes,
        keep,
        paths,
        Path(variant_name(f"{encoder.name}{size}", *variant) if output is None else output),
        force,
    )


def _check_ranges(precision: str, keep_fp32: Sequence[str], images: Sequence[Path]) -> None:
    """Refuse what has no meaning in a precision: ranges matter to fp16 alone, and fp32 has nothing to keep."""
    if precision == "fp32" and keep_fp32:
        raise UsageError(
            "there is nothing to keep in float32: in fp32 everything is",
            expected="--precision fp16 or bf16 beside --keep-fp32",
            got=", ".join(keep_fp32),
        )
    if precision == "bf16" and AUTO in keep_fp32:
        raise UsageError(
            f"--keep-fp32 {AUTO} keeps what float16 does not hold, and bfloat16 holds whatever float32 does",
            expected="names of modules, or --precision fp16",
            got=f"{AUTO} in bf16",
        )
    if precision != "fp16" and images:
        raise UsageError(
            "images are for measuring ranges, which matter to fp16 alone",
            expected="--precision fp16 beside --images",
            got=f"{precision} and {', '.join(map(str, images))}",
            hint="npu-runtime parity --images compares a finished artifact on images",
        )


def _at_size(encoder: EncoderSpec, image_size: int) -> EncoderSpec:
    stride = encoder.stride
    if not stride <= image_size <= MAX_IMAGE_SIZE or image_size % stride:
        near = min(max(round(image_size / stride), 1) * stride, MAX_IMAGE_SIZE // stride * stride)
        raise UsageError(
            f"{encoder.name} takes no images of this size",
            expected=f"a multiple of {stride} pixels up to {MAX_IMAGE_SIZE}",
            got=image_size,
            hint=f"the nearest is {near}",
        )
    return encoder.at_size(image_size)


def plan_export(request: Request, weights: str | None, steps: Steps | None = None) -> ExportPlan:
    """The plan for a request; finds the checkpoint, reads its keys and settings, and no tensor.

    Raises UsageError when the output exists or a module to keep does not, UnavailableError when a package is missing,
    CheckpointError when the weights cannot be had or used whole, InputError for images that do not exist.
    """
    from npu_runtime.parity.inputs import image_inputs

    watch = steps or Silent()
    with watch.step("find the weights and plan the keys"):
        check_output(request.output, force=request.force)
        _check_packages(request.formats)
        if "onnx" in request.formats:
            _check_opset(request.opset)
            require_kernels(request.precision)
        with torch_defaults():
            checkpoint = find_weights(request.encoder, weights, request.layout, watch)
            plan = plan_weights(
                request.encoder, checkpoint, request.layout, prefix=request.prefix, resample=request.resample
            )
        watch.detail(f"{checkpoint.source}: {plan.why}")
        named = tuple(name for name in request.keep_fp32 if name != AUTO)
        export = ExportPlan(request, plan, resolve_preprocessing(plan, request.preprocess), named)
        check_kept(named, export.boundaries())
        image_inputs(request.images, export.preprocessing)
        return export


def _check_packages(formats: Sequence[str]) -> None:
    """Refuse at once what would stop half-way for want of a package."""
    wanted = dict.fromkeys(package for format in formats for package in PACKAGES[format])
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    if missing:
        raise UnavailableError(
            f"an export to {' and '.join(formats)} needs packages that are not installed",
            expected=", ".join(wanted),
            got=f"no {', '.join(missing)}",
            hint="pip install 'npu-export[export]'",
        )
    import_torch()


def _check_opset(opset: int) -> None:
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if not LEAST_OPSET <= opset <= newest:
        raise UsageError("unknown opset", expected=f"{LEAST_OPSET} to {newest}; ATC reads up to 18", got=opset)
