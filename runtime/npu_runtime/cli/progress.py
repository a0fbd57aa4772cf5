"""How far a step is: its rate and the time left, as a line that runs on a terminal and as lines in a log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from npu_runtime.steps import BYTES

NAME_WIDTH = 44
"""Characters of a step's name, after which its figures stand."""
LEAST_BAR, WIDEST_BAR = 8, 30
"""Characters of a bar; where fewer are left, its count stands alone."""
WINDOW_S = 30.0
"""The time over which a rate is measured, so that it follows a change."""
FIRST_WORD_S, RAREST_WORD_S = 10.0, 60.0
"""After what time a log is told that a step still runs; then after twice as long each time, up to the second."""


class Count:
    """How many of how many are done, and how fast. Threads may share it."""

    def __init__(self, total: int, unit: str) -> None:
        self.total = total
        self.unit = unit
        self.done = 0
        self._step = 1
        self._lock = threading.Lock()
        self._start_s = time.monotonic()
        self._last = (self._start_s, 0)
        self._marks = deque([self._last])

    def advance(self, done: int) -> None:
        with self._lock:
            self.done += done
            self._step = done
            self._last = time.monotonic(), self.done
            if self._last[0] - self._marks[-1][0] >= 1:
                self._marks.append(self._last)
            while len(self._marks) > 2 and self._last[0] - self._marks[1][0] >= WINDOW_S:
                self._marks.popleft()

    def rate(self) -> float | None:
        """How many a second of late, as of the last one done; None before the first."""
        with self._lock:
            (start_s, before), (end_s, now) = self._marks[0], self._last
        return (now - before) / (end_s - start_s) if now > before and end_s > start_s else None

    def left_s(self) -> float | None:
        """Seconds that the rest will take at this rate; None before there is one. They run down while one is done."""
        rate = self.rate()
        if rate is None:
            return None
        left_s = (self.total - self.done) / rate
        of_the_next = min(time.monotonic() - self._last[0], self._step / rate)
        return max(left_s - of_the_next, 0.0)

    def __str__(self) -> str:
        """`0 of 125 rounds after 3 s`, then `40 of 125 rounds, 2.10 rounds/s, 40 s left`."""
        rate, left_s = self.rate(), self.left_s()
        told = f"{self._spell(self.done)} of {self._spell(self.total)} {self._unit}"
        if rate is None or left_s is None:
            return f"{told} after {spell_seconds(time.monotonic() - self._start_s)}"
        return f"{told}, {self._spell_rate(rate)}, {spell_seconds(left_s)} left"

    def summary(self) -> str:
        """What was done in all, and at what rate from the beginning."""
        if self.done < self.total:
            return f"{self._spell(self.done)} of {self._spell(self.total)} {self._unit}"
        seconds = max(self._last[0] - self._start_s, 1e-3)
        return f"{self._spell(self.done)} {self._unit}, {self._spell_rate(self.done / seconds)}"

    @property
    def _unit(self) -> str:
        return "MB" if self.unit == BYTES else self.unit

    def _spell(self, number: float) -> str:
        return spell_number(number / 1e6) if self.unit == BYTES else f"{number:,.0f}"

    def _spell_rate(self, rate: float) -> str:
        return f"{spell_number(rate / 1e6 if self.unit == BYTES else rate)} {self._unit}/s"


class RunningLine:
    """A step that runs: a spinner with its name and seconds; with a bar while there is something left of a count."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: list[Count] = []
        self._start_s = time.monotonic()
        self._spinners = Spinner("dots", style="cyan"), Spinner("line", style="cyan")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start_s

    @property
    def count(self) -> Count | None:
        """What is being counted now."""
        return self.counts[-1] if self.counts and self.counts[-1].done < self.counts[-1].total else None

    def summary(self) -> str:
        """What was counted; empty where that was nothing, or several things."""
        return self.counts[0].summary() if len(self.counts) == 1 else ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Table.grid(padding=(0, 1, 0, 0))
        room = options.max_width - 2
        spinner = self._spinners[options.ascii_only].render(console.get_time())
        count = self.count
        if count is None:
            line.add_row(spinner, _fit(self.name, room - 10, NAME_WIDTH), Text(f"{self.seconds:6.1f} s"))
        elif room < len(told := str(count)) + LEAST_BAR + 3:
            line.add_row(spinner, _fit(told, room))
        else:
            wide = room >= NAME_WIDTH + WIDEST_BAR + 50
            name = _fit(self.name, room - len(told) - LEAST_BAR - 3, NAME_WIDTH if wide else 0)
            width = min(room - len(name) - len(told) - 3, WIDEST_BAR)
            bar = ProgressBar(count.total, count.done, width=width, complete_style="cyan")
            line.add_row(spinner, name, bar, Text(told))
        yield line


def _fit(text: str, room: int, padded: int = 0) -> Text:
    """The text, cut to the room there is, and padded where there is room for it."""
    fitted = Text(text, no_wrap=True)
    fitted.truncate(max(room, 1), overflow="ellipsis")
    fitted.pad_right(max(min(padded, room) - len(fitted), 0))
    return fitted


@contextlib.contextmanager
def told_now_and_then(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` from a thread while the block takes long; the thread ends with the block."""
    ended = threading.Event()

    def wait_and_tell() -> None:
        wait_s = FIRST_WORD_S
        while not ended.wait(wait_s):
            with contextlib.suppress(OSError, ValueError):  # nobody reads the log any longer
                tell()
            wait_s = min(2 * wait_s, RAREST_WORD_S)

    thread = threading.Thread(target=wait_and_tell, name="progress", daemon=True)
    try:
        thread.start()
        yield
    finally:
        ended.set()
        thread.join()


def spell_number(number: float) -> str:
    """Three digits at most behind a number's first: 12,345; 350; 12.3; 2.10; 0.05."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def spell_seconds(seconds: float) -> str:
    """`40 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
