"""What a backend and a session are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.schema import Numerics, Program
from npu_runtime.artifact.store import Artifact, Images
from npu_runtime.devices import Device
from npu_runtime.devices.arithmetic import Arithmetic
from npu_runtime.errors import ArtifactError, UnavailableError, UsageError, first_line

Array = npt.NDArray[np.float32]
GraphChoice = Literal["auto"] | bool
"""Whether to replay captured graphs: where it works and is faster, always, or never."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a program is opened. A backend honours each field or refuses it."""

    batches: tuple[int, ...]
    """The batch sizes to open, all of them frozen in the artifact."""
    threads: int | None = None
    """CPU threads for one operator; None leaves the backend's choice, within the cores that the process may use."""
    weights: str | None = None
    """Where the checkpoint lies now, for backends that rebuild the network; None as recorded."""
    numerics: Numerics = "strict"
    graph: GraphChoice = "auto"
    allow_fallback: bool = False
    """Run operators for which the device has no kernel on the CPU; they are in the session's report."""


@dataclass(frozen=True, slots=True)
class GraphReport:
    """How one batch size runs on an accelerator."""

    batch: int
    replayed: bool
    reason: str | None
    """Why plain calls are made instead; None where a graph is replayed."""
    max_abs_difference: float | None
    """Of replays from plain calls on the same inputs, 0 when equal bit for bit; infinite where one alone gives NaN or
    infinity. None where none was captured."""
    speedup: float | None
    """Time of a plain call over a replay's, median; None where none was captured, or replays were wrong."""


@dataclass(frozen=True, slots=True)
class SessionReport:
    """The conditions under which a session runs, for every record."""

    numerics: Mapping[str, object]
    """The choice, and each setting by its name in the library."""
    arithmetic: Arithmetic | None = None
    """As measured on the accelerator; None on the CPU."""
    fallback: tuple[str, ...] | None = ()
    """Operators, or nodes of a graph, that run on the CPU because that was allowed; None where it was allowed and the
    library does not tell which do."""
    graphs: tuple[GraphReport, ...] = ()
    """One for each batch size where replay was tried."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Milliseconds of one call on the device's clock, on which waiting for the host counts as well."""

    transfer_in_ms: float
    compute_ms: float
    transfer_out_ms: float


class Session(Protocol):
    """Programs opened on a device. Threads may share one."""

    def run(self, pixel_values: Images, outputs: Sequence[str]) -> list[Array]:
        """The outputs asked for, in that order, for a C-contiguous batch of a size that was opened.

        Arrays belong to the caller. Shapes are the manifest's; the values are not checked here.
        """
        ...

    def time_stages(self, pixel_values: Images, outputs: Sequence[str]) -> StageTimes | None:
        """The stages of a call as `run` makes it; None where they cannot be told apart."""
        ...

    def report(self) -> SessionReport:
        """The conditions it runs under. Raises ProgramError when something in the process changed them since."""
        ...

    def close(self) -> None:
        """Release the memory; a second call does nothing."""
        ...


class Backend(Protocol):
    """Opens programs of one format, or, like eager, needs none."""

    format: str | None
    """The format of program that it opens; None where it rebuilds the network from the checkpoint."""
    replays_graphs: bool
    """Whether it can replay captured graphs on an accelerator. One that does not say is asked when it opens."""

    def open(self, artifact: Artifact, device: Device, options: Options) -> Session:
        """A session of programs whose files were checked.

        Raises UnavailableError when a package is missing, ArtifactError when a file is wrong or does
        not hold what the manifest says.
        """
        ...


def programs_of(artifact: Artifact, format: str, options: Options) -> list[Program]:
    """The programs to open, files checked; refuses the checkpoint, which a frozen program does not read."""
    if options.weights is not None:
        raise UsageError(
            f"a frozen {format} program carries its weights",
            expected="weights only with a backend that rebuilds the network, such as eager",
            got=f"weights {options.weights}",
        )
    programs = [p for p in artifact.manifest.programs_for(format) if p.batch in options.batches]
    for program in programs:
        artifact.check_files((program.file, *program.needs))
    return programs


def missing_package(package: str, extra: str, backend: str) -> UnavailableError:
    """The error of a backend whose package is not installed."""
    return UnavailableError(
        f"the backend {backend} needs the package {package}, which is not installed",
        hint=f"pip install 'npu-export[{extra}]'",
    )


def unreadable_program(file: object, error: Exception, package: str) -> ArtifactError:
    """The error of a program, hash as recorded, that the package still does not open."""
    return ArtifactError(
        f"{package} does not open this program",
        where=file,
        got=first_line(error),
        hint=f"compare the version of {package} here with the one in the manifest's provenance",
    )
