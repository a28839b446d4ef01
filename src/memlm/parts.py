"""What a long piece of work has of a file that is not whole yet, kept about once a minute: a stop loses no more."""

import contextlib
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from memlm.files import erase, replacing

PARTS = "parts"  # folder in a stage's own
KEEP_SECONDS = 60.0
_SHARE = 0.05  # of the time at most that goes into keeping


class Due:
    """Says when it is time to keep what there is: every so many seconds, or less often where keeping is slow."""

    def __init__(self, seconds: float = KEEP_SECONDS) -> None:
        """
        Args:
            seconds: From the end of one keeping to the begin of the next, at least; 0 keeps at every occasion.
        """
        self._seconds = self._wait = seconds
        self._last = time.monotonic()

    def __bool__(self) -> bool:
        return time.monotonic() - self._last >= self._wait

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Around what keeps."""
        start = time.monotonic()
        yield
        self._last = time.monotonic()
        if self._seconds:
            self._wait = max(self._seconds, (self._last - start) / _SHARE)


@contextlib.contextmanager
def noting(kept: Callable[[], str | None]) -> Iterator[None]:
    """What stops the block from outside (Ctrl-C, a signal) takes a note with it of what is kept, where anything is."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if words := kept():
            stop.add_note(words)
        raise


class Part:
    """Arrays that grow step by step, to become a file."""

    def __init__(self, folder: Path, name: str, due: Due) -> None:
        """
        Args:
            folder: The stage's.
            name: Of the file that is to be.
            due: When to keep.
        """
        self._path, self._due = folder / PARTS / f"{name}.npz", due

    def load(self) -> tuple[int, dict[str, NDArray[Any]]]:
        """Steps that an earlier run has kept, and its arrays; 0 and none where there is nothing of use."""
        try:
            with self._path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = dict(file)
            return int(arrays.pop("steps")), arrays
        except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
            return 0, {}

    def offer(self, steps: int, arrays: Callable[[], dict[str, NDArray[Any]]]) -> bool:
        """Keep what is there after `steps` if it is time to; says whether it was."""
        if not self._due:
            return False
        with self._due.keeping(), replacing(self._path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, steps=np.int64(steps), **cast(dict[str, Any], arrays()))
        return True

    def remove(self) -> None:
        """Of no more use: the file is whole."""
        erase(self._path)
