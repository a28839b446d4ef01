"""Ranks: the processes that a launcher such as torchrun starts to do one piece of work together.

The first among all machines' writes files and tells the user; the others only work. An error of one ends all.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

from memlm.errors import MemlmError, TrainingError

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)  # a rank waits for one that works; what ends the wait is an error, or a lost connection
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 1.0  # in which a rank comes upon the same error by itself


class Ranks:
    """This process among those that work together; by default it is alone."""

    def __init__(self, index: int = 0, count: int = 1, group: Any = None) -> None:
        self.index, self.count = index, count
        self.first = index == 0
        self._group = group

    def from_first(self, value: _T) -> _T:
        """What the first rank gives for `value`, on every rank; waits for the first."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        box = [value if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]  # type: ignore[return-value]

    def once(self, work: Callable[[], _T]) -> _T:
        """What `work` gives on the first rank, on every rank; only the first does it."""
        return self.from_first(work() if self.first else cast(_T, None))


ALONE = Ranks()
_here = ALONE


def speaks() -> bool:
    """Whether this process is the one that tells the user anything."""
    return _here.first


@contextlib.contextmanager
def together() -> Iterator[Ranks]:
    """The ranks that a launcher started, or this process alone where none did; what one raises in the block ends all.

    Raises:
        TrainingError: Another rank failed, or is gone.
    """
    global _here
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield ALONE
        return
    import torch.distributed as dist

    if _here is ALONE:
        _here = _join()
    board = _Board(dist.distributed_c10d._get_default_store(), _here)
    try:
        yield _here
    except Exception as error:
        board.unwatch()
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "TCPStore"))
        reason = str(error) if isinstance(error, MemlmError | OSError) else f"rank {_here.index}: {error!r}"
        if lost:
            reason = "another rank is gone; the same command goes on where this one was"
        reason = board.tell(reason)
        board.leave()
        if not _here.first:
            time.sleep(3 * _GRACE_SECONDS)  # a launcher ends all ranks with this one, and the first is to speak before
        if lost:
            raise TrainingError(reason) from None
        raise
    else:
        board.unwatch()
        board.leave()
    finally:
        board.unwatch()


class _Board:
    """Where ranks leave word for each other: a store that the first rank's process keeps, and that goes with it."""

    _made = 0

    def __init__(self, store: Any, ranks: Ranks) -> None:
        """
        Args:
            store: Of torch's default group.
            ranks: That work together; each makes a board for each piece of work, which is watched from now on.
        """
        _Board._made += 1
        self._error, self._left = (f"memlm/{_Board._made}/{word}" for word in ("error", "left"))
        self._store, self._ranks = store, ranks
        self._heard: str | None = None
        self._gone = False
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def unwatch(self) -> None:
        """Watch no longer: this rank's work is over."""
        self._ended.set()
        self._watching.join()

    def tell(self, reason: str) -> str:
        """Leave word of an error; returns the one that was first, whoever had it."""
        with contextlib.suppress(RuntimeError):  # the store went with the rank that keeps it
            if self._heard is None and not self._gone:
                return self._store.compare_set(self._error, "", reason).decode()
        return self._heard or reason

    def leave(self) -> None:
        """Ask nothing more of the store; the first rank waits a moment until the others do so too."""
        if self._gone:
            return
        with contextlib.suppress(RuntimeError):
            if not self._ranks.first:
                if self._heard is None:  # else it left when it heard
                    self._store.add(self._left, 1)
                return
            last = time.monotonic() + 3 * _GRACE_SECONDS
            while self._store.add(self._left, 0) < self._ranks.count - 1 and time.monotonic() < last:
                time.sleep(_POLL_SECONDS / 10)

    def _watch(self) -> None:
        """End this process when another rank has failed, for it may wait for that rank in the middle of a step."""
        while not self._ended.wait(_POLL_SECONDS):
            try:
                if not self._store.check([self._error]):
                    continue
                self._heard = heard = self._store.get(self._error).decode()
                if not self._ranks.first:
                    self._store.add(self._left, 1)
            except RuntimeError:
                self._gone = True
                return
            if self._ended.wait(_GRACE_SECONDS):
                return
            if self._ranks.first:
                print(f"memlm: error: {' '.join(heard.split())}", file=sys.stderr, flush=True)
            else:
                time.sleep(2 * _GRACE_SECONDS)
            os._exit(2)


def _join() -> Ranks:
    import warnings

    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the number of threads that it chooses
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    return Ranks(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=_PATIENCE))
