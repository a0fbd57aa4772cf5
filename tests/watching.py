"""Steps that remember what they were told, and what a log tells of steps."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from npu_runtime.steps import Advance


@dataclass
class Counted:
    """A count of a step."""

    step: str
    total: int
    unit: str
    told: list[int] = field(default_factory=list)


@dataclass
class Watching:
    """The steps in order, and their counts."""

    steps: list[str] = field(default_factory=list)
    counts: list[Counted] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.steps.append(name)
        yield

    def count(self, total: int, unit: str) -> Advance:
        self.counts.append(Counted(self.steps[-1] if self.steps else "", total, unit))
        return self.counts[-1].told.append

    def detail(self, text: str) -> None:
        self.details.append(text)

    def assert_all_done(self) -> None:
        """Each count came to its total."""
        assert self.counts
        wrong = [count for count in self.counts if sum(count.told) != count.total or min(count.told, default=1) < 0]
        assert not wrong, wrong


def ended_steps(log: str) -> list[str]:
    """The lines of a log, less those that it tells of a step after 10 s and more, as on a slow machine."""
    return [line for line in log.splitlines() if not re.match(r"… .+? +\d{2,}\.\d s", line)]
