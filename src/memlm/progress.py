"""Progress bars: what is done, tokens a second and time left; silent when output is piped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Listener = Callable[[str, float, float], None]
"""Told a bar's description, what is done and the total, whenever either changes."""

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
    """A bar over `total` units, shown on a terminal only (stderr)."""
    if _listener is not None:
        return _ToldBar(_listener, description, total, initial)
    return tqdm(
        total=total, desc=description, unit=unit, unit_scale=True, initial=initial, disable=None, dynamic_ncols=True
    )
