"""What a parity run found, as data; parity/record_files.py writes and reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from npu_runtime.artifact.schema import Manifest, Precision, Tolerance, Weights
from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import GraphChoice, SessionReport
from npu_runtime.devices import parse_device
from npu_runtime.environment import AcceleratorRecord, describe_accelerator, describe_environment
from npu_runtime.parity.inputs import InputRecord, SkippedInput
from npu_runtime.parity.metrics import Check, ImageMetrics, Metrics
from npu_runtime.parity.token_errors import TokenErrors

Cause = Literal["checkpoint", "precision", "export", "device"]
"""What a step of the ladder adds, and so what is to blame when it is the first beyond its tolerance."""
Status = Literal["passed", "failed", "not run", "interrupted"]


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output, or the tokens of one kind in it, against the baseline's."""

    output: str
    group: str | None
    """Kind of tokens; None for the whole output. Before 1.3 the whole alone is judged."""
    metrics: Metrics
    neighbours_kept: float | None
    """Of outputs [B, D]; None for others and where there are too few images."""
    images: tuple[ImageMetrics, ...]
    """In the order of the step's inputs."""
    checks: tuple[Check, ...]
    profile: tuple[Check, ...]
    """Criteria of the profile that was asked for; they decide nothing."""
    token_errors: TokenErrors | None = None
    """Of outputs [B, T, D]; None for others and in records before 1.1."""

    @property
    def passed(self) -> bool:
        """Every check passed; an output without a tolerance is not judged and does not pass."""
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True, slots=True)
class Step:
    """One session against a baseline."""

    cause: Cause
    """What it adds to the step before; where it failed, what the figures blame."""
    backend: str
    device: str
    precision: Precision
    batches: tuple[int, ...]
    baseline: str
    """What the outputs were compared with: `stored reference`, or a session by its title."""
    inputs: tuple[str, ...]
    """Names of the images that were run, those of a batch that was repeated as often as they were."""
    status: Status
    reason: str | None
    """Why it failed or was not run; None where it passed."""
    outputs: tuple[OutputParity, ...]
    conditions: SessionReport | None
    """None where nothing was opened."""
    worst: str | None
    """The input whose outputs are farthest off, by relative L2 error; None where none was run."""
    seconds: float

    @property
    def title(self) -> str:
        """`torchscript fp16 on npu:0`."""
        return step_title(self.backend, self.precision, self.device)

    @property
    def checks(self) -> tuple[Check, ...]:
        """All that was judged."""
        return tuple(check for output in self.outputs for check in output.checks)

    @property
    def whole_outputs(self) -> tuple[OutputParity, ...]:
        """Those of all tokens."""
        return tuple(output for output in self.outputs if output.group is None)


@dataclass(frozen=True, slots=True)
class BoundaryError:
    """How far a program is from the reference at the output of a module."""

    module: str
    relative_l2_error: float
    """The largest over images, estimated from sketches; NaN or infinite where the program gives no number."""
    limit: float
    nonfinite: int
    """Values that are NaN or infinite, over all images."""
    passed: bool

    @property
    def share(self) -> float:
        """The error as a share of the limit."""
        return self.relative_l2_error / self.limit

    def of_the_limit(self) -> str:
        """The share as text: `12%`, `419 x`."""
        return f"{self.share:,.0f} x" if self.share >= 10 else f"{self.share:.0%}"


@dataclass(frozen=True, slots=True)
class Localisation:
    """Where a program leaves the reference, and whether it does so when nobody looks inside."""

    backend: str
    device: str
    format: str
    batch: int
    boundaries: tuple[BoundaryError, ...]
    """In the order in which the network computes them."""
    first: str | None
    """The first module whose output is beyond its limit; None where none is."""
    failed_plain: tuple[str, ...]
    """Outputs beyond a tolerance of the manifest when the program runs as it is."""
    failed_probed: tuple[str, ...]
    """Outputs beyond a tolerance in any of the runs that gave values from inside, which keep operators from being
    fused."""

    def describe(self) -> str:
        """The finding in a sentence or two."""
        return f"{self._where()}; {self._persists()}"

    def _where(self) -> str:
        if self.first is not None:
            index = next(i for i, boundary in enumerate(self.boundaries) if boundary.module == self.first)
            found = self.boundaries[index]
            after = f", {self.boundaries[index - 1].module} before it is within its own" if index else ""
            count = f", {found.nonfinite} values are NaN or infinite" if found.nonfinite else ""
            error = f"relative L2 error {found.relative_l2_error:.1e}, {found.share:.3g} times its limit"
            return f"the first boundary beyond its limit is {self.first}: {error}{count}{after}"
        within = f"all {len(self.boundaries)} boundaries are within their limits"
        if self.failed_probed:
            return f"{within}: the fault lies behind the last, {self.boundaries[-1].module}"
        return within

    def _persists(self) -> str:
        plain, probed = ", ".join(self.failed_plain), ", ".join(self.failed_probed)
        if plain and probed:
            return f"{plain} beyond tolerance without instrumentation, and the error persists under it ({probed})"
        if plain:
            return (
                f"{plain} beyond tolerance, and the error vanishes under instrumentation: "
                "suspect what is fused, replayed or reused without it"
            )
        if probed:
            return f"{probed} beyond tolerance under instrumentation alone"
        return "the outputs are within their tolerances"


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """Which artifact was run."""

    path: str
    digest: str
    """sha256 of its manifest.json, which holds the hash of every other file."""
    encoder: str
    precision: Precision
    weights: Weights
    summary: str
    """One line: whose weights these are."""


@dataclass(frozen=True, slots=True)
class ParityRecord:
    """A run of `verify` or `parity`."""

    command: Literal["verify", "parity"]
    artifact: ArtifactRecord
    environment: Mapping[str, object]
    device: str
    inputs: tuple[InputRecord, ...]
    skipped: tuple[SkippedInput, ...]
    tolerances: tuple[Tolerance, ...]
    """Those in force on the CPU and on the device."""
    overridden: tuple[Tolerance, ...]
    """Those of them that were given in place of the manifest's."""
    profile: str | None
    steps: tuple[Step, ...]
    first_failure: str | None
    """Title of the first step beyond its tolerance."""
    cause: Cause | None
    """Of that step."""
    localised: tuple[Localisation, ...]
    """Where in the programs faults begin; empty where that was not asked for."""
    partial: bool
    """Whether the run was interrupted; what was measured until then is kept."""
    passed: bool
    """Every step that ran passed, one ran on the device, and the run was not interrupted."""
    seconds: float
    accelerator: AcceleratorRecord | None = None
    """Behind the device; None on the CPU, where nothing ran on the device, and in records before 1.1."""
    threads: int | None = None
    """Asked for; None where each backend chose, and in records before 1.1."""
    graph: GraphChoice = "auto"
    """Asked for; `auto` in records before 1.1."""
    weights: str | None = None
    """Where the checkpoint was said to lie; None where it was taken from where the export recorded it."""


def not_run(backend: str, device: str, precision: Precision, reason: str, cause: Cause = "export") -> Step:
    """A step that this machine cannot make."""
    return Step(cause, backend, device, precision, (), "-", (), "not run", reason, (), None, None, 0.0)


def make_record(
    command: Literal["verify", "parity"],
    artifact: Artifact,
    device: str,
    steps: Sequence[Step],
    *,
    inputs: Sequence[InputRecord],
    seconds: float,
    skipped: Sequence[SkippedInput] = (),
    overridden: Sequence[Tolerance] = (),
    profile: str | None = None,
    localised: Sequence[Localisation] = (),
    partial: bool = False,
    threads: int | None = None,
    graph: GraphChoice = "auto",
    weights: str | None = None,
) -> ParityRecord:
    """The record of steps that were made here and now."""
    manifest, device = artifact.manifest, str(parse_device(device))
    failed = next((step for step in steps if step.status == "failed"), None)
    accelerator = None
    if any(step.device == device and step.conditions is not None for step in steps):
        accelerator = describe_accelerator(parse_device(device))
    ran = any(step.status == "passed" and step.device == device and step.cause != "checkpoint" for step in steps)
    return ParityRecord(
        command,
        ArtifactRecord(
            str(artifact.path),
            artifact.digest,
            manifest.encoder,
            manifest.precision,
            manifest.provenance.weights,
            manifest.weights_summary(),
        ),
        describe_environment(),
        device,
        tuple(inputs),
        tuple(skipped),
        _in_force(manifest, device, steps),
        tuple(overridden),
        profile,
        tuple(steps),
        None if failed is None else failed.title,
        None if failed is None else failed.cause,
        tuple(localised),
        partial,
        failed is None and ran and not partial,
        seconds,
        accelerator,
        threads,
        graph,
        weights,
    )


def _in_force(manifest: Manifest, device: str, steps: Sequence[Step]) -> tuple[Tolerance, ...]:
    """The tolerances of the CPU, and those of the device under the numerics that its steps had."""
    ran = [step.conditions.numerics for step in steps if step.conditions is not None and step.device == device]
    asked = {str(numerics.get("numerics")) for numerics in ran}
    of_device = manifest.tolerances_on(parse_device(device).kind, "fast" if asked == {"fast"} else "strict")
    return tuple(dict.fromkeys((*manifest.tolerances_on("cpu"), *of_device)))


def step_title(backend: str, precision: str, device: str) -> str:
    """How a session is called everywhere: `eager fp32 on cpu`."""
    return f"{backend} {precision} on {device}"
