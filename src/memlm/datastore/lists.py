"""Search for many queries at once, list by list: the lists of an inverted file, or runs of all keys.

A list is compared with all queries that probe it by one matrix product. Each query's nearest lists come first; the k-th
distance found there bounds what other lists can add, so that few of their entries are looked at again.

The product gives distances as |q|² + |k|² - 2qk, which loses digits where vectors are long beside their distances. So
what keys have in common is taken from both first, and queries that are still long are compared in float64.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.datastore.ranking import LARGEST_NUMBER, MISSING, Floats, Ints, Neighbors, distances_in, pack, unpack

MOST_QUERIES = 1 << 16
_FIRST = 2  # times k: entries in the lists that come first
_LONG = 256  # squared length over the furthest distance from which float32 keeps fewer than some 14 bits of it

Visit = tuple[int, Ints]
"""Number of a list, and the queries that are compared with it."""
ReadList = Callable[[int], tuple[NDArray[np.float16], Ints]]
"""Gives the list of a number: keys `(B, D)`, writable because torch takes no read-only array, and their ids `(B,)`."""


@dataclass(frozen=True)
class SearchSizes:
    """How much a search handles at a time. It decides speed and memory, not what is found."""

    queries: int = 4096
    filled: int = 131_072  # keys read at a time to fill an index
    device_keys: int = 32_768  # compared at a time on an accelerator: half a gigabyte of distances
    core_keys: int = 1024  # compared at a time by one core: as float32 they fit its cache
    shared: int = 32  # queries per list from which on a list is better compared with all of them at once
    candidates: int = 1 << 25  # compared before the nearest are picked
    picked: int = 128  # queries whose nearest are picked at a time: what they found fits a core's cache
    ranked: int = 512  # queries re-ranked at a time: as float32 they fit a core's cache
    pairs: int = 16_384  # of a query and a key, compared at a time in re-ranking


SIZES = SearchSizes()


def common_part(vectors: Floats) -> Floats:
    """`(D,)` what is best taken from all: their mean, where that is larger than what they vary by, else 0.

    It is rounded to float16, so that from a float16 key it is taken without rounding.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # centroids in a file may be any numbers
        mean, spread = vectors.mean(0, np.float64), vectors.var(0, np.float64)
        return np.where((mean**2 > spread) & (abs(mean) < 65504), mean, 0).astype(np.float16).astype(np.float32)


def are_long(queries: Floats, distances: Floats) -> NDArray[np.bool_]:
    """`(P,)` which queries are too long for float32 beside the distances `(P, k)` found in it."""
    furthest = np.where(np.isfinite(distances), distances, 0).max(1)
    return np.square(queries).sum(1) > _LONG * furthest


def search_lists(
    queries: Floats,
    probed: Ints | None,
    entries: Ints,
    read: ReadList,
    k: int,
    sizes: SearchSizes = SIZES,
    *,
    centre: Floats | float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Neighbors:
    """The nearest entries of the lists that each query probes; of equally near ones, those with the smallest ids.

    Args:
        queries: `(P, D)`, at most `MOST_QUERIES`.
        probed: `(P, nprobe)` numbers of lists, nearest first; None: all lists.
        entries: `(nlist,)` number of entries in each list.
        read: Gives a list; called by several threads.
        k: Neighbours wanted.
        sizes: `candidates` and `picked` are used.
        centre: `(D,)` taken from queries and keys.
        dtype: float64, or float32 for what is short enough.
    """
    found = _Nearest(queries, k, sizes.picked, centre, dtype)
    if probed is None:
        all_rows = np.arange(len(queries))
        phases = [((number, all_rows) for number in range(len(entries)))]
    else:
        probed_entries = entries[probed]
        first = probed_entries.cumsum(1) - probed_entries < _FIRST * k
        phases = [_visits(probed, first), _visits(probed, ~first)]
    for phase in phases:
        for visits in _in_groups(phase, entries, _FIRST * k * len(queries), sizes.candidates):
            found.add(visits, read)
    distances, ids = unpack(found.sorted())
    if dtype == torch.float32 and len(rows := np.flatnonzero(are_long(queries - centre, distances))):
        there = None if probed is None else probed[rows]
        again = search_lists(queries[rows], there, entries, read, k, sizes, centre=centre, dtype=torch.float64)
        distances[rows], ids[rows] = again
    return distances, ids


def fits(queries: int, entries: int) -> bool:
    """Whether `search_lists` can number so many queries and entries."""
    return queries <= MOST_QUERIES and entries <= LARGEST_NUMBER


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool of `threads` threads, each computing its products alone: sharing out small ones costs more than it saves.

    A thread's number of threads is torch's default for threads that start later, so it is put back once all of these
    have started.
    """
    started = threading.Barrier(threads + 1)

    def compute_alone() -> None:
        torch.get_num_threads()  # a thread's first question would undo what was set before it
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


def _visits(probed: Ints, chosen: NDArray[np.bool_]) -> Iterator[Visit]:
    """Each list in the chosen (query, rank) pairs, with the queries that probe it."""
    rows, ranks = np.nonzero(chosen)
    lists = probed[rows, ranks]
    order = np.argsort(lists, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(lists[order])) + 1):
        if len(part):
            yield int(lists[part[0]]), rows[part]


def _in_groups(visits: Iterable[Visit], entries: Ints, room: int, most: int) -> Iterator[list[Visit]]:
    """The visits to lists that are not empty, in runs of at most `room` comparisons, doubled from run to run to `most`.

    So the bound is drawn tighter early, before many candidates pass a loose one.
    """
    group: list[Visit] = []
    candidates = 0
    for number, rows in visits:
        if not entries[number]:
            continue
        candidates += int(entries[number]) * len(rows)
        if candidates > min(room, most) and group:
            yield group
            group, candidates = [], int(entries[number]) * len(rows)
            room *= 2
        group.append((number, rows))
    if group:
        yield group


class _Nearest:
    """The k nearest entries that each query has met so far."""

    def __init__(self, queries: Floats, k: int, picked: int, centre: Floats | float, dtype: torch.dtype) -> None:
        self._centre = torch.as_tensor(centre, dtype=dtype)
        self._queries = torch.from_numpy(queries).to(dtype) - self._centre
        self._norms = self._queries.square().sum(1)
        self._bound = np.full(len(queries), np.inf, np.float32)
        self._best = np.full((len(queries), k), MISSING)  # (P, k) packed; the last is the furthest
        self._parts = [slice(start, start + picked) for start in range(0, len(queries), picked)]
        self._pool = _pool(torch.get_num_threads())
        self._buffers = threading.local()

    def add(self, visits: list[Visit], read: ReadList) -> None:
        """Keep the nearest of those so far and of the lists visited."""
        found = list(self._pool.map(lambda visit: self._compare(*read(visit[0]), visit[1]), visits))
        rows = np.concatenate([part for part, _ in found])
        packed = np.concatenate([part for _, part in found])
        packed = packed[np.argsort(rows, kind="stable")]  # a radix sort, as they have 16 bits
        counts = np.bincount(rows, minlength=len(self._best))
        ends = counts.cumsum()
        k = self._best.shape[1]

        def pick(here: slice) -> None:
            width = int(counts[here].max())
            merged = np.full((len(counts[here]), k + width), MISSING)
            merged[:, :k] = self._best[here]
            first = ends[here.start] - counts[here.start]
            merged[:, k:][np.arange(width) < counts[here, None]] = packed[first : ends[here][-1]]
            merged.partition(k - 1, axis=1)
            self._best[here] = merged[:, :k]

        list(self._pool.map(pick, self._parts))
        self._bound = distances_in(self._best[:, -1])

    def sorted(self) -> Ints:
        """`(P, k)` packed, ascending."""
        list(self._pool.map(lambda here: self._best[here].sort(1), self._parts))
        return self._best

    def _compare(self, keys: NDArray[np.float16], ids: Ints, rows: Ints) -> tuple[NDArray[np.uint16], Ints]:
        """Entries of a list within the bounds of the queries `rows`: the query's number; distance and id packed."""
        chosen = torch.from_numpy(rows)
        table = self._buffer("table", *keys.shape).copy_(torch.from_numpy(keys))
        if self._centre.any():
            table -= self._centre
        asked = self._buffer("asked", len(rows), keys.shape[1])
        torch.index_select(self._queries, 0, chosen, out=asked)  # in half the time of indexing
        squares = torch.linalg.vector_norm(table, dim=1).square_()  # in half the time of squares and their sum
        product = self._buffer("product", len(rows), len(keys))
        torch.addmm(squares, asked, table.T, alpha=-2, out=product)
        distances = product.add_(self._norms[chosen, None]).float().numpy()
        near = np.flatnonzero(distances <= self._bound[rows, None])
        which, columns = np.divmod(near, len(keys))
        return rows[which].astype(np.uint16), pack(distances.reshape(-1)[near], ids[columns])

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that this thread keeps: taken anew each time, it would leave holes between the entries kept."""
        size = math.prod(shape)
        held = getattr(self._buffers, name, None)
        if held is None or len(held) < size:
            held = torch.empty(size, dtype=self._queries.dtype)
            setattr(self._buffers, name, held)
        return held[:size].view(shape)
