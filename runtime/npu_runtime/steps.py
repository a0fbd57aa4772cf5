"""Who is told of the steps of a long task."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol


class Steps(Protocol):
    """`step` is entered around each step; within it, `detail` says what came of it."""

    def step(self, name: str) -> AbstractContextManager[None]: ...

    def detail(self, text: str) -> None: ...


class Silent:
    """Steps that nobody watches."""

    def step(self, name: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def detail(self, text: str) -> None:
        pass
