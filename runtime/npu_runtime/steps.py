"""Who is told of the steps of a long task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

BYTES = "bytes"
"""The unit of what is read, hashed or fetched."""

Advance = Callable[[int], None]
"""Told how many more are done; from any thread, and in vain when their step is over."""


class Steps(Protocol):
    """`step` is entered around each step; within it, `detail` says what came of it."""

    def step(self, name: str) -> AbstractContextManager[None]: ...

    def count(self, total: int, unit: str) -> Advance:
        """Say how many there are to do from here on, of BYTES or a plural such as images; a count before it ends."""
        ...

    def detail(self, text: str) -> None: ...


class Silent:
    """Steps that nobody watches."""

    def step(self, name: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def count(self, total: int, unit: str) -> Advance:
        return unwatched

    def detail(self, text: str) -> None:
        pass


def unwatched(done: int) -> None:
    """What is done is told to nobody."""
