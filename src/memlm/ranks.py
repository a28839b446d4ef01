"""Ranks: the processes that a launcher such as torchrun starts to do one piece of work together.

The first among all machines' writes files and tells the user; the others only work. An error of one ends all.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

from memlm.errors import MemlmError, TrainingError

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)  # a rank waits for one that works; what ends the wait is an error, or a lost connection
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 1.0  # in which a rank comes upon the same error by itself
_ERROR = "memlm/error"
_LEFT = "memlm/left"


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
    store, ended, heard = dist.distributed_c10d._get_default_store(), threading.Event(), list[str]()
    watch = threading.Thread(target=_watch, args=(store, ended, heard), daemon=True)
    watch.start()
    try:
        yield _here
    except Exception as error:
        ended.set()
        watch.join()
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "TCPStore"))
        reason = str(error) if isinstance(error, MemlmError | OSError) else f"rank {_here.index}: {error!r}"
        if lost:
            reason = "another rank is gone; the same command goes on where this one was"
        with contextlib.suppress(RuntimeError):  # the store went with the rank that keeps it
            reason = heard[0] if heard else store.compare_set(_ERROR, "", reason).decode()
        _leave(store, heard)
        if not _here.first:
            time.sleep(3 * _GRACE_SECONDS)  # a launcher ends all ranks with this one, and the first is to speak before
        if lost:
            raise TrainingError(reason) from None
        raise
    else:
        ended.set()
        watch.join()
        _leave(store, heard)
    finally:
        ended.set()
        watch.join()


def _leave(store: Any, heard: list[str]) -> None:
    """Ask nothing more of the store; the first rank, with which it goes, waits a moment for the others to do so."""
    with contextlib.suppress(RuntimeError):
        if not _here.first:
            if not heard:  # else it said so when it heard
                store.add(_LEFT, 1)
            return
        last = time.monotonic() + 3 * _GRACE_SECONDS
        while store.add(_LEFT, 0) < _here.count - 1 and time.monotonic() < last:
            time.sleep(_POLL_SECONDS / 10)
        store.add(_LEFT, 1 - _here.count)  # for another piece of work


def _join() -> Ranks:
    import warnings

    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the number of threads that it chooses
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    return Ranks(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=_PATIENCE))


def _watch(store: Any, ended: threading.Event, heard: list[str]) -> None:
    """End this process when another rank has failed, for it may wait for that rank in the middle of a step.

    Args:
        store: Of the launcher, where ranks leave word.
        ended: Set when this rank's work is over.
        heard: Gets another rank's error; the store is left alone from then on.
    """
    while not ended.wait(_POLL_SECONDS):
        try:
            if not store.check([_ERROR]):
                continue
            heard.append(store.get(_ERROR).decode())
            if not _here.first:
                store.add(_LEFT, 1)
        except RuntimeError:
            return
        if ended.wait(_GRACE_SECONDS):
            return
        if _here.first:
            print(f"memlm: error: {' '.join(heard[0].split())}", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * _GRACE_SECONDS)
        os._exit(2)
