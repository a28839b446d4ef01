"""Many queries search lists of keys, those of an inverted file or all there are: list by list, not query by query.

A list is compared with all queries that probe it by one matrix product. Each query's nearest lists come first; the k-th
distance among what was met bounds what other lists can add, so that few of their entries are looked at again.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.datastore.ranking import LARGEST_NUMBER, MISSING, distances_in, pack, unpack

MOST_QUERIES = 1 << 16
_FIRST = 2  # times k: entries in the lists that come first
_CANDIDATES = 1 << 25  # compared before the nearest are picked
_ROWS = 128  # queries whose nearest are picked at a time: what they found fits a core's cache

ReadList = Callable[[int], tuple[NDArray[np.float16], NDArray[np.int64]]]
"""Number of a list to its keys `(B, D)`, not read-only, which torch does not take, and their ids `(B,)`."""


def search_lists(
    queries: NDArray[np.float32], probed: NDArray[np.int64] | None, sizes: NDArray[np.int64], read: ReadList, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The nearest entries of the lists that each query probes; of equally near ones, those with the smallest ids.

    Args:
        queries: `(P, D)`, at most `MOST_QUERIES`.
        probed: `(P, nprobe)` numbers of lists, nearest first; None: all lists.
        sizes: `(nlist,)` entries of each list.
        read: Gives a list; called by several threads.
        k: Neighbours wanted.

    Returns:
        As `Index.search`.
    """
    found = _Nearest(queries, k)
    if probed is None:
        all_rows = np.arange(len(queries))
        phases = [((number, all_rows) for number in range(len(sizes)))]
    else:
        entries = sizes[probed]
        first = entries.cumsum(1) - entries < _FIRST * k
        phases = [_visits(probed, first), _visits(probed, ~first)]
    pool = _pool(torch.get_num_threads())
    for phase in phases:
        for visits in _in_groups(phase, sizes, _FIRST * k * len(queries)):
            results = list(pool.map(lambda visit: found.compare(*read(visit[0]), visit[1]), visits))
            found.pick(results, pool)
    list(pool.map(lambda start: found.best[start : start + _ROWS].sort(1), range(0, len(queries), _ROWS)))
    return unpack(found.best)


def fits(queries: int, entries: int) -> bool:
    """Whether `search_lists` can number so many queries and entries."""
    return queries <= MOST_QUERIES and entries <= LARGEST_NUMBER


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """As many threads, in each of which torch computes alone: sharing out every small product costs more than it saves.

    torch hands a thread's number on to threads that start later, so it is put back once all of these have started.
    """
    started = threading.Barrier(threads + 1)

    def compute_alone() -> None:
        torch.get_num_threads()  # a thread's first question takes over the number of threads to come
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "memlm-search", compute_alone)
    try:
        for _ in range(threads):
            pool.submit(int)
        started.wait()
    except BaseException:
        started.abort()  # those that did start would wait for ever
        raise
    finally:
        torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def _visits(probed: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each list with the queries that probe it, of the pairs chosen."""
    rows, ranks = np.nonzero(chosen)
    lists = probed[rows, ranks]
    order = np.argsort(lists, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(lists[order])) + 1):
        if len(part):
            yield int(lists[part[0]]), rows[part]


def _in_groups(
    visits: Iterable[tuple[int, NDArray[np.int64]]], sizes: NDArray[np.int64], room: int
) -> Iterator[list[tuple[int, NDArray[np.int64]]]]:
    """The visits to lists that hold something, in runs of `room` comparisons, then of twice as many each, to a limit.

    As many as were made before: while a bound tells little, what it lets through stays few.
    """
    group: list[tuple[int, NDArray[np.int64]]] = []
    candidates = 0
    for number, rows in visits:
        if not sizes[number]:
            continue
        candidates += int(sizes[number]) * len(rows)
        if candidates > min(room, _CANDIDATES) and group:
            yield group
            group, candidates = [], int(sizes[number]) * len(rows)
            room *= 2
        group.append((number, rows))
    if group:
        yield group


class _Nearest:
    """The k nearest entries that each query has met so far."""

    def __init__(self, queries: NDArray[np.float32], k: int) -> None:
        self._queries = torch.from_numpy(queries)
        self._norms = self._queries.square().sum(1)
        self._bound = np.full(len(queries), np.inf, np.float32)
        self._buffers = threading.local()
        self.best = np.full((len(queries), k), MISSING)
        """`(P, k)` packed; the last is the furthest."""

    def compare(
        self, keys: NDArray[np.float16], ids: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Entries within the bound of a query in `rows`: the query's number, and distance and id packed."""
        chosen = torch.from_numpy(rows)
        table = self._buffer("table", *keys.shape).copy_(torch.from_numpy(keys))
        asked = self._buffer("asked", len(rows), keys.shape[1])
        torch.index_select(self._queries, 0, chosen, out=asked)  # in half the time of indexing
        squares = torch.linalg.vector_norm(table, dim=1).square_()  # in half the time of squares and their sum
        product = self._buffer("product", len(rows), len(keys))
        torch.addmm(squares, asked, table.T, alpha=-2, out=product)
        distances = product.add_(self._norms[chosen, None]).numpy()
        near = np.flatnonzero(distances <= self._bound[rows, None])
        which, columns = np.divmod(near, len(keys))
        return rows[which].astype(np.uint16), pack(distances.reshape(-1)[near], ids[columns])

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory of this thread: taken anew each time, it would leave holes between the entries that are kept."""
        size = math.prod(shape)
        held = getattr(self._buffers, name, None)
        if held is None or len(held) < size:
            held = torch.empty(size)
            setattr(self._buffers, name, held)
        return held[:size].view(shape)

    def pick(self, found: list[tuple[NDArray[np.uint16], NDArray[np.int64]]], pool: ThreadPoolExecutor) -> None:
        """Keep the nearest of `best` and what was found."""
        rows = np.concatenate([part for part, _ in found])
        packed = np.concatenate([part for _, part in found])
        packed = packed[np.argsort(rows, kind="stable")]  # a radix sort, as they have 16 bits
        counts = np.bincount(rows, minlength=len(self.best))
        ends = counts.cumsum()
        k = self.best.shape[1]

        def pick_rows(start: int) -> None:
            here = slice(start, start + _ROWS)
            width = int(counts[here].max())
            merged = np.full((len(counts[here]), k + width), MISSING)
            merged[:, :k] = self.best[here]
            merged[:, k:][np.arange(width) < counts[here, None]] = packed[ends[start] - counts[start] : ends[here][-1]]
            merged.partition(k - 1, axis=1)
            self.best[here] = merged[:, :k]

        list(pool.map(pick_rows, range(0, len(self.best), _ROWS)))
        self._bound = distances_in(self.best[:, -1])
