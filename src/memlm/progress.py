"""Progress: bars on a terminal or in a notebook; elsewhere, as in a log, a plain line now and then. All on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from memlm.ranks import speaks

Listener = Callable[[str, float, float], None]
"""Told a bar's description, what is done and the total, whenever either changes."""

LINE_SECONDS = 30.0
"""Between two lines of a log, where no bar can be drawn; the first comes after a sixth, so that one sees it go on."""
_listener: Listener | None = None  # of the process, not of a thread: a stage may move its bar from any


class _ToldBar(tqdm):
    """A bar that draws nothing and tells a listener instead."""

    def __init__(self, listener: Listener, description: str, total: int, initial: int) -> None:
        super().__init__(total=total, initial=initial, disable=True)
        self._listener, self._description = listener, description
        self.update(0)

    def update(self, n: float | None = 1) -> None:
        self.n += n or 0
        self._listener(self._description, self.n, self.total or 0)


class _LineBar(tqdm):
    """A bar for a log: what is done, the rate, what is left, in a line soon, then every `seconds`, and at the end."""

    def __init__(self, description: str, total: int, initial: int, unit: str, seconds: float) -> None:
        super().__init__(total=total, initial=initial, disable=True)
        self._description, self._unit, self._seconds = description, unit, seconds
        self._first, self._start, self._last = initial, time.monotonic(), time.monotonic()
        self._told: float | None = None  # what was said last
        self._closed = False
        self.postfix = None  # a bar that draws nothing has none until it is set

    def update(self, n: float | None = 1) -> None:
        self.n += n or 0
        if time.monotonic() - self._last >= self._seconds / (6 if self._told is None else 1):
            self._tell()

    def close(self) -> None:
        if self._told not in (None, self.n) and not self._closed:  # what was too short for a line needs none at the end
            self._tell()
        self._closed = True
        super().close()

    def _tell(self) -> None:
        self._told, self._last = self.n, time.monotonic()
        count = f"{self.n:,.0f}"
        if self.total:
            count += f" of {self.total:,.0f}"
        line = f"{self._description}: {count} {self._unit}"
        rate = (self.n - self._first) / max(self._last - self._start, 1e-9)
        if rate > 0:
            line += f", {rate:,.0f} {self._unit}/s"
            if self.total and self.n < self.total:
                line += f", {tqdm.format_interval(max(0, self.total - self.n) / rate)} left"
        if self.postfix:
            line += f", {self.postfix}"
        print(line, file=sys.stderr, flush=True)


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Within the block `listener` is told of all progress and no bar is drawn, so that one bar may stand for many."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def progress_bar(total: int, description: str, *, unit: str = "tok", initial: int = 0) -> tqdm:
    """A bar over `total` units.

    Args:
        total: All there is to do; 0 where nobody knows.
        description: What is done.
        unit: What is counted; one bar has one rate.
        initial: What an earlier run has done already; it is in no rate.
    """
    if _listener is not None:
        return _ToldBar(_listener, description, total, initial)
    drawn = sys.stderr.isatty() or "ipykernel" in sys.modules
    if speaks() and not drawn:
        return _LineBar(description, total, initial, unit, LINE_SECONDS)
    return tqdm(
        total=total or None,
        desc=description,
        unit=unit,
        unit_scale=True,
        initial=initial,
        disable=not speaks(),
        dynamic_ncols=True,
    )


def note(line: str) -> None:
    """Say something that a user may want to know and no result holds, where no listener stands in for the bars."""
    if _listener is None and speaks():
        print(line, file=sys.stderr, flush=True)
