"""Parity step by step, so that the first step beyond its tolerance names what is to blame.

Eager fp32 on the CPU is the baseline of every later step: eager in the artifact's precision, the exported programs on
the CPU, eager on the device, the exported programs there. Where the checkpoint is not at hand, as on a machine that
only runs artifacts, the programs on the CPU answer to the stored reference, and those on the device to them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from npu_runtime.artifact.schema import Manifest, Precision
from npu_runtime.artifact.store import Artifact, Images
from npu_runtime.backends.base import SessionReport
from npu_runtime.backends.table import EAGER, FORMATS, backend_names, require_replay
from npu_runtime.devices import CPU, parse_device
from npu_runtime.encoder import Encoder, RunOptions, load
from npu_runtime.errors import (
    ArtifactError,
    Error,
    NumericsError,
    ProgramError,
    UnavailableError,
    UsageError,
    WeightsError,
)
from npu_runtime.parity.baselines import Baseline, LiveBaseline, StoredReference
from npu_runtime.parity.inputs import Inputs
from npu_runtime.parity.measure import Measurement, Outputs
from npu_runtime.parity.profiles import Profile
from npu_runtime.parity.records import Cause, OutputParity, Status, Step, step_title
from npu_runtime.steps import Silent, Steps

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True)
class Rung:
    """A step to be made."""

    cause: Cause
    backend: str
    device: str
    precision: Precision

    @property
    def title(self) -> str:
        return step_title(self.backend, self.precision, self.device)


def plan_ladder(manifest: Manifest, device: str, backends: Sequence[str] = ()) -> tuple[Rung, ...]:
    """The steps from the reference to the exported programs on a device, in order.

    `backends` are those of exported programs, each of the artifact's formats without it.
    """
    exported = tuple(backends) or tuple(FORMATS[format] for format in manifest.formats() if format in FORMATS)
    precision = manifest.precision
    rungs = [Rung("checkpoint", EAGER, "cpu", "fp32")]
    if precision != "fp32":
        rungs.append(Rung("precision", EAGER, "cpu", precision))
    rungs += [Rung("export", backend, "cpu", precision) for backend in exported]
    target = parse_device(device)
    if target != CPU:
        rungs.append(Rung("device", EAGER, str(target), precision))
        rungs += [Rung("export", backend, str(target), precision) for backend in exported]
    return tuple(rungs)


def options_on(device: str, how: RunOptions) -> RunOptions:
    """How a step on a device is run: as was asked for on the run's own device, and elsewhere with its threads alone."""
    if parse_device(device) == parse_device(how.get("device", "cpu")):
        return {**how, "device": device}
    return RunOptions(device=device, threads=how.get("threads"))


@dataclass(frozen=True, slots=True)
class WorstInput:
    """The image that is farthest off in a step, with its outputs."""

    name: str
    pixel_values: Images
    actual: Outputs
    expected: Outputs


class Ladder:
    """The steps that were made, kept when the climb is interrupted."""

    def __init__(
        self,
        artifact: Artifact,
        inputs: Inputs,
        *,
        watch: Steps | None = None,
        batch: int | None = None,
        weights: str | None = None,
        profile: Profile | None = None,
        **how: Unpack[RunOptions],
    ) -> None:
        """`how` is for the steps on its device; those on the CPU before a device take its threads.

        One batch size is run, the smallest of the artifact without `batch`: ONNX Runtime holds weights for each.
        """
        self._artifact = artifact
        self._inputs = inputs
        self._watch = watch or Silent()
        self._weights = weights
        self._profile = profile
        self._how = how
        self._batch = batch or min(program.batch for program in artifact.manifest.programs)
        self._reference: Outputs | None = None
        self.steps: list[Step] = []
        self.worst: WorstInput | None = None
        """Of the first step beyond its tolerance; of the last one where none is."""

    def climb(self, rungs: Sequence[Rung]) -> None:
        """Make the steps in order, with two networks in memory at most.

        A step that cannot be made here is listed with the reason. Raises UsageError for what no machine can do,
        and CheckpointError when the weights were named and cannot be used.
        """
        stored = StoredReference(self._artifact)
        self._reference = stored.outputs(0, len(stored.inputs))
        eager: Baseline | None = None
        exported: Baseline | None = None
        with contextlib.ExitStack() as stack:
            for rung in rungs:
                if rung.cause == "checkpoint":
                    encoder = self._make(rung, stored)
                    if encoder is not None:
                        eager = LiveBaseline(rung.title, stack.enter_context(encoder), self._inputs)
                elif rung.device == "cpu":
                    encoder = self._make(rung, eager or stored)
                    if encoder is not None and eager is None and exported is None:
                        exported = LiveBaseline(rung.title, stack.enter_context(encoder), self._inputs)
                    elif encoder is not None:
                        encoder.close()
                else:
                    encoder = self._make(rung, eager or exported or stored)
                    if encoder is not None:
                        encoder.close()

    @property
    def first_failure(self) -> Step | None:
        """The first step beyond its tolerance."""
        return next((step for step in self.steps if step.status == "failed"), None)

    def _make(self, rung: Rung, baseline: Baseline) -> Encoder | None:
        """Make one step; returns its encoder, open, where one was opened and measured whole."""
        measurement = Measurement(self._artifact.manifest.outputs, self._reference)
        draft = _Draft(rung, baseline.name, measurement, time.monotonic())
        try:
            count = len(baseline.inputs)
            with self._watch.step(f"{rung.title}, {count} image{'s' if count > 1 else ''}"):
                encoder = self._open(rung)
                try:
                    self._run(draft, encoder, baseline)
                except BaseException:
                    encoder.close()
                    raise
        except KeyboardInterrupt:
            self._finish(draft, baseline, "interrupted", "the run was interrupted")
            raise
        except _NotRunError as absent:
            self._finish(draft, baseline, "not run", str(absent))
            return None
        except UnavailableError as absent:
            self._finish(draft, baseline, "not run", _in_a_line(absent))
            return None
        except (ProgramError, ArtifactError, WeightsError) as error:
            self._finish(draft, baseline, "failed", _in_a_line(error), error)
            return None
        self._finish(draft, baseline, "passed", None)
        return encoder

    def _open(self, rung: Rung) -> Encoder:
        artifact = self._artifact
        how = options_on(rung.device, self._how)
        weights = None
        if how.get("graph") is True:
            try:
                require_replay(rung.backend, parse_device(rung.device))
            except UsageError as error:
                if rung.device == "cpu":
                    raise
                raise _NotRunError(error.what) from error
        if rung.backend == EAGER:
            weights = self._weights
            before = next((step for step in self.steps if step.backend == EAGER and step.conditions is None), None)
            if before is not None:
                raise _NotRunError(f"as {before.title}: {before.reason}")
            if EAGER not in backend_names():
                raise _NotRunError("eager comes with npu-export's extra `export`, which is not installed")
            artifact = replace(artifact, manifest=replace(artifact.manifest, precision=rung.precision))
        try:
            return load(artifact, backend=rung.backend, batches=(self._batch,), weights=weights, **how)
        except (UnavailableError, ProgramError, ArtifactError, WeightsError):
            raise
        except Error as error:  # an encoder or checkpoint that is not here is no reason to stop, unless it was named
            if rung.backend != EAGER or weights is not None:
                raise
            raise _NotRunError(_in_a_line(error)) from error

    def _run(self, draft: _Draft, encoder: Encoder, baseline: Baseline) -> None:
        draft.batches = encoder.batches
        draft.conditions = encoder.report()
        count = len(baseline.inputs)
        advance = self._watch.count(count, "images")
        for start in range(0, count, self._batch):
            stop = min(start + self._batch, count)
            pixel_values = baseline.inputs.rows(start, stop)
            expected = baseline.outputs(start, stop)
            draft.measurement.add(encoder.run(pixel_values, allow_nonfinite=True), expected)
            draft.names += [record.name for record in baseline.inputs.records[start:stop]]
            advance(stop - start)
        draft.conditions = encoder.report()

    def _finish(
        self, draft: _Draft, baseline: Baseline, status: Status, reason: str | None, error: Error | None = None
    ) -> None:
        """Judge what was measured and keep it."""
        rung = draft.rung
        numerics = options_on(rung.device, self._how).get("numerics", "strict")
        tolerances = self._artifact.manifest.tolerances_on(parse_device(rung.device).kind, numerics)
        outputs = draft.measurement.results(tolerances, self._profile)
        if status == "passed":
            status, reason = judge_outputs(outputs)
        index = draft.measurement.worst
        worst = None if index is None else baseline.inputs.records[index].name
        step = Step(
            cause=self._blame(draft, error) if status == "failed" else rung.cause,
            backend=rung.backend,
            device=rung.device,
            precision=rung.precision,
            batches=draft.batches,
            baseline=draft.baseline,
            inputs=tuple(draft.names),
            status=status,
            reason=reason,
            outputs=outputs,
            conditions=draft.conditions,
            worst=worst,
            seconds=time.monotonic() - draft.start,
        )
        if index is not None and worst is not None and self.first_failure is None:
            actual, expected = draft.measurement.worst_outputs
            self.worst = WorstInput(worst, baseline.inputs.rows(index, index + 1), actual, expected)
        self.steps.append(step)

    def _blame(self, draft: _Draft, error: Error | None) -> Cause:
        """What a step that failed is due to, where it shows more than its place in the ladder."""
        rung = draft.rung
        if rung.device == "cpu":
            return rung.cause
        if isinstance(error, NumericsError):
            return "precision" if error.operator in ("matmul", "conv") else "device"
        arithmetic = draft.conditions.arithmetic if draft.conditions is not None else None
        if arithmetic is not None and {"matmul", "conv"} & set(arithmetic.inexact()):
            return "precision"
        eager_ran = any(s.backend == EAGER and s.device == rung.device and s.conditions is not None for s in self.steps)
        return rung.cause if eager_ran else "device"


@dataclass(slots=True)
class _Draft:
    """A step while it is made."""

    rung: Rung
    baseline: str
    measurement: Measurement
    start: float
    batches: tuple[int, ...] = ()
    names: list[str] = field(default_factory=list)
    conditions: SessionReport | None = None


class _NotRunError(Exception):
    """Why a step cannot be made on this machine."""


def _in_a_line(error: Error) -> str:
    return f"{error.what}: {error.got}" if error.got else error.what


def judge_outputs(outputs: Sequence[OutputParity]) -> tuple[Status, str | None]:
    """Whether every whole output was judged, and all that was judged is within its limits, and else why not."""
    whole = [output for output in outputs if output.group is None]
    failed = [check for output in outputs for check in output.checks if not check.passed]
    if whole and all(output.checks for output in whole) and not failed:
        return "passed", None
    told = [f"{check.name}: {check.reason}" for check in failed]
    told += [f"{output.output} has no tolerance" for output in whole if not output.checks]
    return "failed", "; ".join(told) or "nothing was compared"
