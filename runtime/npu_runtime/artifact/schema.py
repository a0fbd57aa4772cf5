"""What a manifest holds. Immutable, and true once parsed: nothing inside checks it again.

Versions of the schema:
    1.0  first: encoder, inputs, outputs, programs, files, reference, preprocessing, tolerances, provenance.
    2.0  preprocessing.shortest_edge for preprocessing.resize, coverage.matched for coverage.renamed,
         weights.prefix; precisions fp16 and bf16.
    2.1  reference.numerics, which 2.0 lacks.
    2.2  tolerances[].device, outputs[].groups, probes.
    2.3  preprocessing.publisher and .crop_offset, which was always even.
    2.4  an input of uint8 [B, H, W, 3], which the programs normalise.
    2.5  tolerances[].group, .numerics, .measured and the scaled metrics; margins in place of tolerances for each
         device; probes of outputs over the scale of each channel; ranges, keep_fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

SCHEMA_MAJOR = 2
SCHEMA_MINOR = 5

MANIFEST_NAME = "manifest.json"

Precision = Literal["fp32", "fp16", "bf16"]
"""Type of weights and compute inside of the programs; what goes in and comes out is the same whatever it is."""

InputDtype = Literal["float32", "uint8"]
"""float32: images [B, 3, H, W], normalised. uint8: their pixels [B, H, W, 3], which the programs normalise."""


def variant_name(encoder: str, precision: Precision, dtype: InputDtype) -> str:
    """What folders are named after: ENCODER-PRECISION, and -uint8 where the programs take that."""
    return f"{encoder}-{precision}" if dtype == "float32" else f"{encoder}-{precision}-{dtype}"


DeviceKind = Literal["cpu", "cuda", "npu"]

Numerics = Literal["strict", "fast"]
"""strict: float32 is float32, GELU is exact. fast: the device's own shortcuts for float32."""

ToleranceMetric = Literal["max_abs_error", "max_relative_l2_error", "max_scaled_error", "max_scaled_rmse"]

Publisher = Literal["hf", "timm", "upstream"]
"""Whose processor prepares images: Hugging Face's, timm's, or that of those who trained the encoder."""


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """Tokens of one kind: rows `start` to `stop` of an output [B, N, D]."""

    name: Literal["cls", "registers", "patches"]
    start: int
    stop: int
    """Exclusive."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of every program. `shape` starts with the batch, spelled "B"."""

    name: str
    dtype: InputDtype
    """Of outputs always float32."""
    shape: tuple[int | Literal["B"], ...]
    groups: tuple[TokenGroup, ...] = ()
    """Kinds of tokens in an output [B, N, D], in order; empty where it has none or they were not recorded."""

    def of_batch(self, batch: int) -> tuple[int, ...]:
        """The shape at a batch size."""
        return tuple(batch if size == "B" else size for size in self.shape)

    def nbytes(self, batch: int) -> int:
        """Bytes at a batch size."""
        return (1 if self.dtype == "uint8" else 4) * math.prod(self.of_batch(batch))


def input_spec(dtype: InputDtype, size: tuple[int, int]) -> TensorSpec:
    """`pixel_values` of RGB images of this height and width."""
    return TensorSpec("pixel_values", dtype, ("B", *size, 3) if dtype == "uint8" else ("B", 3, *size))


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the artifact, its path relative to the folder and spelled with slashes."""

    file: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Program:
    """One frozen entry that a backend runs at one batch size."""

    format: str
    file: str
    batch: int
    sha256: str
    needs: tuple[str, ...]
    """Other files of the artifact that `file` reads, such as shared weights."""
    entry_point: str | None
    """Name of the TorchScript method; None where a file holds one program."""
    opset: int | None
    """ai.onnx opset; None where the format has none."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Seeded inputs and the outputs of the unmodified fp32 eager network on the CPU."""

    file: str
    seeds: tuple[int, ...]
    """One image a seed, drawn from `numpy.random.default_rng(seed)` as `draw_images` does."""
    numerics: Mapping[str, str] = field(default_factory=dict)
    """Settings of the libraries that the eager network ran under, by name; empty where that was not recorded."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image file becomes `pixel_values`: resize, crop, scale to 0..1, subtract mean, divide by std.

    With an input of uint8 it is `pixel_values` once it is cut, and the rest is frozen into the programs.
    """

    size: tuple[int, int]
    """Height and width in pixels."""
    shortest_edge: int | None
    """Pixels of the shorter side after a resize that keeps the aspect ratio, before `size` is cut from the
    centre; None resizes to `size` itself, whatever the aspect ratio."""
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str
    """Where these values come from."""
    publisher: Publisher | None = None
    """Whose processor they are; None where that was not recorded."""
    crop_offset: Literal["even", "down"] = "even"
    """How half a pixel is rounded where the margin before the crop is odd: to the even neighbour as torchvision
    does, or down as transformers does, which is a shift by one pixel for margins of 3, 7, 11, …"""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The most that a metric of an output may be, set before the run that it judges."""

    output: str
    metric: ToleranceMetric
    limit: float
    basis: str
    """How the limit was set."""
    device: DeviceKind = "cpu"
    """Kind of device that ran the program; the reference is always the CPU's."""
    group: str | None = None
    """Kind of tokens; None for the whole output."""
    numerics: Numerics = "strict"
    """What the device was asked for. On the CPU both are the same."""
    measured: float | None = None
    """What rounding alone does to the metric in this network with these weights, of which the limit is a multiple;
    None in manifests before 2.5, whose limits were the same for all weights."""

    @property
    def name(self) -> str:
        """`tokens.cls.max_scaled_error`, by which a limit is named on the command line."""
        return ".".join(filter(None, (self.output, self.group, self.metric)))


@dataclass(frozen=True, slots=True)
class Margin:
    """How many times the CPU's limits those of another kind of device are, and what that allows for."""

    device: DeviceKind
    factor: float
    basis: str


@dataclass(frozen=True, slots=True)
class Boundary:
    """The output of a module of the source network, found again inside of the frozen programs."""

    module: str
    """Its name in the source network, such as `blocks.5`."""
    limit: float
    """The most that the relative L2 error of an image may be there on the CPU, estimated from sketches."""
    places: Mapping[str, str]
    """Format -> where the value is in the program: its name in an ONNX graph, or `KIND:INDEX`, the number of
    the operator among those of its kind, in TorchScript."""
    fast_limit: float | None = None
    """The limit for fast numerics, before the margin of the device; None where it is the same."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Statistics of the reference network inside, by which a fault is found in a program without the weights."""

    file: str
    """safetensors: for each boundary `MODULE.sketch` [N, K] and `MODULE.norm` [N], float64, of the reference's N
    images, from the unmodified fp32 eager network on the CPU, and `MODULE.scale`, by which its output was divided."""
    batch: int
    """Batch size of the programs that the places are of."""
    accelerator_margin: float
    """How many times the CPU's limits those of other devices are, as with the tolerances."""
    basis: str
    """How the limits were set."""
    boundaries: tuple[Boundary, ...]
    """In the order in which the network computes them."""

    def limit_on(self, boundary: Boundary, device: str, numerics: Numerics = "strict") -> float:
        """The limit of a boundary on a kind of device under a choice of numerics."""
        if device == "cpu":
            return boundary.limit
        fast = boundary.fast_limit if numerics == "fast" else None
        return self.accelerator_margin * (boundary.limit if fast is None else fast)


@dataclass(frozen=True, slots=True)
class Extreme:
    """A value, and the operator that gives it, or `parameter NAME`, `input` or `output`."""

    value: float
    operator: str


@dataclass(frozen=True, slots=True)
class ModuleRange:
    """How large, and how small, the values of a module of the source network are in float32."""

    module: str
    """Its name, such as `blocks.5`; what runs after it and before the next module is counted to it. Empty for weights
    that stand outside of every module, such as positions."""
    largest: Extreme
    """The largest |x| of what the programs hold in float16, were the module not kept in float32."""
    headroom: float
    """65504, the largest number of float16, over `largest`."""
    smallest: Extreme | None
    """The least root mean square, zeros left out, of what must keep its small values: matrices, what comes in and goes
    out, and what is divided by its own size. None where there is nothing but zeros."""
    inside: Extreme | None
    """The largest |x| inside of operators that hold it in float32 whatever the type of their inputs, or lose nothing
    where it overflows; None where there is no such operator."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """What the network computes, against what float16 holds; measured on the float32 eager network before freezing."""

    seeds: tuple[int, ...]
    """Reference images that it was measured on."""
    images: int
    """How many images of the user's own beside them."""
    margin: float
    """The least headroom that is let through: how many times as large other images may make a value."""
    least: float
    """The least `smallest` that is let through."""
    modules: tuple[ModuleRange, ...]
    """In the order in which the network runs them; at least one."""

    def nearest(self) -> ModuleRange:
        """The module with the least headroom."""
        return min(self.modules, key=lambda measured: measured.headroom)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the checkpoint. None of the artifact's own files."""

    path: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """How the checkpoint's tensors were used; each is counted once. None is ever left over or missing."""

    matched: int
    """Tensors that are as the network has them, whatever their names."""
    transformed: int
    dropped: int
    parameters: int
    """Elements of all tensors that the network received."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Which weights went in."""

    source: str
    """As asked for: a path, `hf:ID@REVISION` or `random:SEED`."""
    layout: str
    prefix: str
    """Before the layout's keys in the file: `visual.`, or a dict inside of it with a slash, `model_ema/`."""
    files: tuple[SourceFile, ...]
    """Empty for random weights."""
    random_seed: int | None
    """Seed of random weights, asked for by name; None for a published checkpoint."""
    state_sha256: str
    """Digest of the loaded state dict: names, dtypes, shapes and bytes in order of name."""
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class Provenance:
    weights: Weights
    versions: Mapping[str, str]
    revision: str | None
    """Git revision of this project, with `-dirty` where it had local changes; None outside a checkout."""


@dataclass(frozen=True, slots=True)
class Manifest:
    encoder: str
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    programs: tuple[Program, ...]
    files: tuple[FileRecord, ...]
    reference: Reference
    preprocessing: Preprocessing
    tolerances: tuple[Tolerance, ...]
    provenance: Provenance
    probes: Probes | None = None
    """None where the artifact was exported without them."""
    margins: tuple[Margin, ...] = ()
    """One for each kind of device but the CPU; empty before 2.5, whose tolerances name the device."""
    ranges: Ranges | None = None
    """None but for fp16, and in manifests before 2.5."""
    keep_fp32: tuple[str, ...] = ()
    """Modules of the source network whose weights and compute stayed float32."""

    def tolerances_on(self, device: str, numerics: Numerics = "strict") -> tuple[Tolerance, ...]:
        """The tolerances of a kind of device under a choice of numerics.

        Those of fast numerics where the manifest has any, else the strict ones. Where none name the device they are
        the CPU's times its margin, and before 2.2, which has no margin, the CPU's.
        """
        of_device = [t for t in self.tolerances if t.device == device]
        found = of_device or [t for t in self.tolerances if t.device == "cpu"]
        wanted: Numerics = "strict" if device == "cpu" else numerics
        chosen = [t for t in found if t.numerics == wanted] or [t for t in found if t.numerics == "strict"]
        margin = next((m for m in self.margins if m.device == device), None)
        if of_device or margin is None:
            return tuple(chosen)
        return tuple(
            replace(
                t,
                limit=margin.factor * t.limit,
                device=margin.device,
                basis=f"{t.basis}; {margin.factor:g} times that on {device}, {margin.basis}",
            )
            for t in chosen
        )

    def formats(self) -> tuple[str, ...]:
        """Formats of the programs, each once, in the manifest's order."""
        return tuple(dict.fromkeys(program.format for program in self.programs))

    def programs_for(self, format: str | None) -> tuple[Program, ...]:
        """The programs of a format; all of them for None, a backend that needs none."""
        return tuple(program for program in self.programs if format in (None, program.format))

    def weights_summary(self) -> str:
        """One line that every shown result repeats: whose weights these are."""
        weights = self.provenance.weights
        if weights.random_seed is not None:
            return f"RANDOM weights (seed {weights.random_seed}), not a trained encoder"
        return f"{weights.source} (layout {weights.layout})"
