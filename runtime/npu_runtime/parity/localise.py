"""Where in the network a frozen program leaves the reference: the first module whose output is beyond its limit.

Everything comes from the artifact: where the program has the outputs of the network's modules, and statistics of what
the network gave there. Neither the network nor its weights are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from npu_runtime.artifact.schema import Boundary, Manifest, Probes
from npu_runtime.artifact.store import Array, Artifact
from npu_runtime.backends.base import Options
from npu_runtime.backends.probed import open_probed, require_places
from npu_runtime.backends.table import find_backend
from npu_runtime.devices import Device
from npu_runtime.encoder import RunOptions, load
from npu_runtime.errors import UsageError
from npu_runtime.parity.places import PlaceError, Progress, measure_places

if TYPE_CHECKING:
    from typing_extensions import Unpack

AT_ONCE = 8
"""Boundaries whose values are held in memory together."""


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
            error = f"relative L2 error {found.relative_l2_error:.1e}, limit {found.limit:.1e}"
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


def localise(
    artifact: Artifact, *, backend: str, progress: Progress | None = None, **how: Unpack[RunOptions]
) -> Localisation:
    """Find the first module of the source network whose output in a frozen program is beyond its limit.

    The program of the probes' batch size runs on every recorded image: once as it is, then with the outputs of
    at most `AT_ONCE` modules at a time, of which statistics are kept. Raises UsageError when the artifact was
    exported without probes or the backend has no program, ArtifactError when the program lacks what the probes
    name, and what `load` raises.
    """
    probes = _require_probes(artifact)
    format = find_backend(backend).format
    if format is None:
        raise UsageError(
            f"the backend {backend} has no program to look into",
            expected=" or ".join(artifact.manifest.formats()),
            got=backend,
        )
    records = artifact.read_probes(probes)
    inputs, expected = artifact.read_reference()
    with load(artifact, backend=backend, batches=[probes.batch], **how) as encoder:
        name, device = encoder.backend, encoder.device
        outputs = encoder.run(inputs, allow_nonfinite=True)
    failed_plain = _beyond(artifact.manifest, device, outputs, expected)

    options = Options(
        (probes.batch,),
        threads=how.get("threads"),
        numerics=how.get("numerics", "strict"),
        graph=False,
        allow_fallback=how.get("allow_fallback", False),
    )
    boundaries = [boundary for boundary in probes.boundaries if format in boundary.places]
    failed_probed: dict[str, None] = {}
    errors: list[PlaceError] = []
    with open_probed(artifact, device, options, backend=name) as program:
        places = [boundary.places[format] for boundary in boundaries]
        require_places(program, places, artifact.path)
        given = [records[boundary.module] for boundary in boundaries]
        for part in measure_places(program, places, given, inputs, probes.batch, AT_ONCE, progress):
            failed_probed.update(dict.fromkeys(_beyond(artifact.manifest, device, part.outputs, expected)))
            errors += part.errors
    judged = tuple(_judge(b, probes.limit_on(b, device.kind), error) for b, error in zip(boundaries, errors))
    return Localisation(
        backend=name,
        device=str(device),
        format=format,
        batch=probes.batch,
        boundaries=judged,
        first=next((boundary.module for boundary in judged if not boundary.passed), None),
        failed_plain=failed_plain,
        failed_probed=tuple(output for output in expected if output in failed_probed),
    )


def _judge(boundary: Boundary, limit: float, error: PlaceError) -> BoundaryError:
    passed = error.nonfinite == 0 and error.relative_l2_error <= limit
    return BoundaryError(boundary.module, error.relative_l2_error, limit, error.nonfinite, passed)


def _beyond(
    manifest: Manifest, device: Device, outputs: Mapping[str, Array], expected: Mapping[str, Array]
) -> tuple[str, ...]:
    """The outputs that are beyond a tolerance of the kind of device, or hold NaN or infinity."""
    beyond: dict[str, None] = {}
    for tolerance in manifest.tolerances_on(device.kind):
        got, wanted = (arrays[tolerance.output].astype(np.float64) for arrays in (outputs, expected))
        with np.errstate(divide="ignore", invalid="ignore"):  # infinity - infinity is NaN, which never passes
            difference = (got - wanted).reshape(len(got), -1)
            if tolerance.metric == "max_abs_error":
                value = np.abs(difference).max()
            else:
                norms = np.linalg.norm(wanted.reshape(len(wanted), -1), axis=1)
                value = (np.linalg.norm(difference, axis=1) / norms).max()
        if not (np.isfinite(got).all() and value <= tolerance.limit):
            beyond[tolerance.output] = None
    return tuple(beyond)


def _require_probes(artifact: Artifact) -> Probes:
    probes = artifact.manifest.probes
    if probes is None:
        raise UsageError(
            "the artifact was exported without probes, so nothing is known of the network inside",
            where=artifact.path,
            hint="export again with --probes",
        )
    return probes
