"""Where in the network a frozen program leaves the reference: the first module whose output is beyond its limit.

Everything comes from the artifact: where the program has the outputs of the network's modules, and statistics of what
the network gave there. Neither the network nor its weights are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from npu_runtime.artifact.schema import Boundary, Manifest, Probes, Tolerance
from npu_runtime.artifact.store import Array, Artifact
from npu_runtime.backends.base import Options
from npu_runtime.backends.probed import open_probed, require_places
from npu_runtime.backends.table import find_backend
from npu_runtime.encoder import RunOptions, load
from npu_runtime.errors import UsageError
from npu_runtime.parity.measure import Measurement
from npu_runtime.parity.places import PlaceError, measure_places
from npu_runtime.parity.records import BoundaryError, Localisation
from npu_runtime.steps import Steps

if TYPE_CHECKING:
    from typing_extensions import Unpack

AT_ONCE = 8
"""Boundaries whose values are held in memory together."""


def localise(
    artifact: Artifact, *, backend: str, watch: Steps | None = None, **how: Unpack[RunOptions]
) -> Localisation:
    """Find the first module of the source network whose output in a frozen program is beyond its limit.

    The program of the probes' batch size runs on every recorded image: once as it is, then with the outputs of
    at most `AT_ONCE` modules at a time, of which statistics are kept. Raises UsageError when the artifact was
    exported without probes or the backend has no program, ArtifactError when the program lacks what the probes
    name, and what `load` raises.
    """
    probes = require_probes(artifact)
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
    numerics = how.get("numerics", "strict")
    tolerances = artifact.manifest.tolerances_on(device.kind, numerics)
    failed_plain = _beyond(artifact.manifest, tolerances, outputs, expected)

    options = Options(
        (probes.batch,),
        threads=how.get("threads"),
        numerics=numerics,
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
        for part in measure_places(program, places, given, inputs, probes.batch, AT_ONCE, watch):
            failed_probed.update(dict.fromkeys(_beyond(artifact.manifest, tolerances, part.outputs, expected)))
            errors += part.errors
    limits = [probes.limit_on(boundary, device.kind, options.numerics) for boundary in boundaries]
    judged = tuple(map(_judge, boundaries, limits, errors))
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
    manifest: Manifest, tolerances: Sequence[Tolerance], outputs: Mapping[str, Array], expected: Mapping[str, Array]
) -> tuple[str, ...]:
    """The outputs that are beyond a tolerance, in themselves or in a kind of tokens, or hold NaN or infinity."""
    measurement = Measurement(manifest.outputs, expected)
    measurement.add(outputs, expected)
    results = measurement.results(tolerances)
    beyond = (o.output for o in results if not o.passed and (o.group is None or o.checks))
    return tuple(dict.fromkeys(beyond))


def require_probes(artifact: Artifact) -> Probes:
    """The artifact's probes; raises UsageError when it was exported without."""
    probes = artifact.manifest.probes
    if probes is None:
        raise UsageError(
            "the artifact was exported without probes, so nothing is known of the network inside",
            where=artifact.path,
            hint="export again with --probes",
        )
    return probes
