"""Errors that say what, where, expected, got, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


def first_line(said: object) -> str:
    """The first line that says something, of a text or of an error's message; an error without one gives its type."""
    lines = (line.strip() for line in str(said).splitlines())
    return next(filter(None, lines), type(said).__name__ if isinstance(said, BaseException) else "")


class Error(Exception):
    """Base of every error that this project raises on purpose.

    `exit_code` is what the commands return for it: 1 failed, 2 wrong usage, 3 parity failed,
    4 device or dependency missing.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.got = None if got is None else str(got)
        self.hint = hint
        super().__init__(what)

    def fields(self) -> dict[str, str]:
        """The parts of the message that are known, in the order in which they are read."""
        parts = {
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "next": self.hint,
        }
        return {name: text for name, text in parts.items() if text is not None}

    def __str__(self) -> str:
        lines = [self.what]
        for name, text in self.fields().items():
            if name != "what":
                lines.append(f"  {name + ':':<10}" + text.replace("\n", "\n" + " " * 12))
        return "\n".join(lines)


class UsageError(Error):
    """The caller asked for something that does not exist or does not fit together."""

    exit_code = 2


class InputError(Error, ValueError):
    """An array or an image that the encoder cannot take."""


@dataclass(frozen=True, slots=True)
class BadImage:
    """An image that could not be read, in the place of its row."""

    index: int
    """Which image it is, from 0."""
    name: str
    """Its path, or `image N`."""
    error: InputError

    @property
    def reason(self) -> str:
        """Why, on a line of a list of bad images."""
        return self.error.what if self.error.got is None else f"{self.error.what}: {self.error.got}"


class ArtifactError(Error):
    """The artifact on disk is missing something, changed, or newer than this reader."""


class ProgramError(Error):
    """A program ran and gave what no correct program gives, such as NaN."""


class NumericsError(ProgramError):
    """Strict numerics are not to be had: `operator` is not exact float32 on the device."""

    def __init__(self, what: str, *, operator: str, **parts: Any) -> None:
        super().__init__(what, **parts)
        self.operator = operator


class WeightsError(Error):
    """The checkpoint was read whole, and its weights are others than those that the artifact was exported from."""


class ParityError(Error):
    """Outputs are farther from the reference than the tolerance allows."""

    exit_code = 3


class UnavailableError(Error):
    """A device, a backend or a package that was asked for is not on this machine, or a device has no memory left or
    stopped working."""

    exit_code = 4
