"""Search structures over keys. To add one, write a subclass and name it in `INDEXES`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.datastore.config import DatastoreConfig, IndexKind
from memlm.datastore.layout import IndexFacts, IndexLayout
from memlm.datastore.lists import SIZES, SearchSizes, are_long, common_part, fits, search_lists
from memlm.datastore.ranking import Floats, Ints, Neighbors, nearest_first
from memlm.errors import ArtifactError, ConfigError
from memlm.models.loading import default_device

INDEX_FILE = "index.faiss"

_CENTRED = 4096  # keys whose common part is taken for that of all


class Keys:
    """The `(N, D)` float16 keys of a datastore, in shards."""

    def __init__(
        self, shards: Sequence[NDArray[np.float16]], places: NDArray[np.signedinteger[Any]] | None = None
    ) -> None:
        """
        Args:
            shards: One after another, memory-mapped or in memory.
            places: `(N,)` where in them the key of each entry stands; None: in order.
        """
        self._shards, self._places = shards, places
        self._starts = np.cumsum([0, *[len(s) for s in shards]])
        self.shape = (int(self._starts[-1]), int(shards[0].shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def centre(self) -> Floats:
        """`(D,)` about what all keys have in common, which a search takes from them."""
        return common_part(self.gather(np.linspace(0, len(self) - 1, min(len(self), _CENTRED)).astype(np.int64)))

    def rows(self, start: int, stop: int) -> Floats:
        """Keys `start` to `stop`, widened to float32."""
        return widen(self.slice(start, min(stop, len(self))))

    def slice(self, start: int, stop: int) -> NDArray[np.float16]:
        """Keys `start` to `stop`; a view where they are in one shard."""
        if self._places is not None:
            return self.gather(np.arange(start, min(stop, len(self))), np.float16)
        touched = range(np.searchsorted(self._starts, start, side="right") - 1, np.searchsorted(self._starts, stop))
        parts = [self._shards[i][max(0, start - self._starts[i]) : stop - self._starts[i]] for i in touched]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, self.shape[1]), np.float16), *parts])

    def gather(self, ids: Ints, dtype: type[np.float16 | np.float32] = np.float32) -> NDArray[Any]:
        """The keys with these ids, `(*ids.shape, D)`."""
        places = ids.reshape(-1) if self._places is None else self._places[ids.reshape(-1)]
        order = None if (places[1:] >= places[:-1]).all() else np.argsort(places, kind="stable")
        ascending = places if order is None else places[order]
        ends = np.searchsorted(ascending, self._starts)
        touched = np.flatnonzero(np.diff(ends)).tolist()
        if order is None and len(touched) == 1:  # as neighbouring ids have: one copy is enough
            out = self._shards[touched[0]][places - self._starts[touched[0]]]
        else:
            out = np.empty((len(places), self.shape[1]), np.float16)
            for shard in touched:
                here = slice(ends[shard], ends[shard + 1])
                found = self._shards[shard][ascending[here] - self._starts[shard]]
                out[here if order is None else order[here]] = found
        return (widen(out) if dtype == np.float32 else out).reshape(*ids.shape, self.shape[1])


def keys_in_lists(path: Path, facts: IndexFacts, shape: tuple[int, int]) -> Keys:
    """The keys that the file of an ivf-flat index holds, memory-mapped; arguments and errors as in `Index.load`."""
    codes, ids = zip(*IndexLayout(path).check(facts, shape), strict=True)
    places, first = np.empty(shape[0], np.int32 if shape[0] < 2**31 else np.int64), 0
    for part in ids:  # list by list: all ids at once would take three times the room of the places
        places[part] = np.arange(first, first + len(part), dtype=places.dtype)
        first += len(part)
    return Keys([part.view(np.float16).reshape(-1, shape[1]) for part in codes], places)


def widen(keys: NDArray[np.float16]) -> Floats:
    """The keys in float32; numpy takes ten times as long."""
    return faiss.ScalarQuantizer(keys.shape[1], faiss.ScalarQuantizer.QT_fp16).decode(keys.view(np.uint8))


class Index(ABC):
    """Finds the entries nearest to a query, by squared L2 distance."""

    kind: IndexKind
    holds_keys: bool = False
    """Whether its file holds the keys, so that a finished datastore keeps them nowhere else."""
    keys: Keys | None
    sizes: SearchSizes = SIZES

    @classmethod
    @abstractmethod
    def build(cls, keys: Keys, config: DatastoreConfig, sizes: SearchSizes = SIZES) -> Self:
        """An index over `keys`."""

    @abstractmethod
    def extend(self, keys: Keys, new_ids: Ints, config: DatastoreConfig) -> None:
        """Index `keys` from now on; an approximate index keeps its training.

        Args:
            keys: Of the entries that stay, and of new ones.
            new_ids: `(entries so far,)` the id in `keys` of each old entry, -1 if it goes. Other ids are new entries.
            config: Settings of the search, as for `build`; those of the training have no effect.
        """

    def save(self, path: Path) -> None:
        """Write what `load` needs beyond the keys; no file if it needs no more."""
        return

    @classmethod
    @abstractmethod
    def load(cls, path: Path | None, keys: Keys | None, facts: IndexFacts, shape: tuple[int, int]) -> Self:
        """The index of a datastore.

        Args:
            path: What `save` wrote; None if it wrote nothing.
            keys: The datastore's; None if none were kept, or the index holds them.
            facts: What `describe` gave.
            shape: Entries and their width.

        Raises:
            ArtifactError: The file does not fit the datastore.
        """

    def set_nprobe(self, nprobe: int) -> None:
        """Search so many inverted lists.

        Raises:
            ConfigError: The index has none.
        """
        raise ConfigError(f"nprobe = {nprobe}: an index of kind {self.kind} has no lists to choose from")

    def describe(self) -> dict[str, Any]:
        """Settings in force, for the manifest."""
        return {"kind": self.kind}

    @abstractmethod
    def _search(self, queries: Floats, k: int) -> Neighbors:
        """As `search`, for a bounded number of queries."""

    def search(self, queries: Floats, k: int, *, thorough: bool = False) -> Neighbors:
        """The nearest entries of each query.

        Args:
            queries: `(P, D)`.
            k: Neighbours wanted.
            thorough: Leave no entry out to save time.
        """
        queries = np.ascontiguousarray(queries, np.float32)  # as C++ code reads them
        step = self.sizes.queries
        parts = [self._search(queries[i : i + step], k) for i in range(0, len(queries), step)]
        if not parts:
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        distances, ids = (np.concatenate(part) for part in zip(*parts, strict=True))
        distances[ids < 0] = np.inf
        return np.maximum(distances, 0), ids


class ExactIndex(Index):
    """Compares every query with every key, by blocks; on an accelerator if there is one.

    The CPU reads keys from disk each time. An accelerator holds them, in float16, if they take at most half of its free
    memory.
    """

    kind = "exact"
    keys: Keys

    def __init__(self, keys: Keys, sizes: SearchSizes = SIZES, dtype: torch.dtype = torch.float32) -> None:
        """
        Args:
            dtype: float64, or float32 for queries that are short enough for it.
        """
        self.keys, self.sizes, self.dtype = keys, sizes, dtype
        self._device = default_device()
        self.by_lists = self._device.type in ("cpu", "mps") and fits(sizes.queries, len(keys))
        """Whether the CPU's cores compare runs of keys; else torch compares blocks on a device that has float64."""
        self._held: list[tuple[int, Tensor]] = []

    @classmethod
    def build(cls, keys: Keys, config: DatastoreConfig, sizes: SearchSizes = SIZES) -> Self:
        return cls(keys, sizes)

    def extend(self, keys: Keys, new_ids: Ints, config: DatastoreConfig) -> None:
        self.keys, self._held = keys, []

    @classmethod
    def load(cls, path: Path | None, keys: Keys | None, facts: IndexFacts, shape: tuple[int, int]) -> Self:
        if keys is None:
            raise ArtifactError("a datastore with an exact index has no keys (keep_keys false); rebuild it")
        return cls(keys)

    def _search(self, queries: Floats, k: int) -> Neighbors:
        if not self.by_lists:
            best, ids = self._by_blocks(queries, k, self.dtype)
            if self.dtype == torch.float32 and len(rows := np.flatnonzero(are_long(queries - self.keys.centre, best))):
                best[rows], ids[rows] = self._by_blocks(queries[rows], k, torch.float64)
            return best, ids
        starts = np.arange(0, len(self.keys), self.sizes.core_keys)

        def read(number: int) -> tuple[NDArray[np.float16], Ints]:
            ids = np.arange(starts[number], min(starts[number] + self.sizes.core_keys, len(self.keys)))
            return np.array(self.keys.slice(ids[0], ids[-1] + 1)), ids

        entries, centre = np.diff(starts, append=len(self.keys)), self.keys.centre
        return search_lists(queries, None, entries, read, k, self.sizes, centre=centre, dtype=self.dtype)

    def _by_blocks(self, queries: Floats, k: int, dtype: torch.dtype) -> Neighbors:
        """As `_search`, in this precision, by matrix products on the device."""
        centre = torch.from_numpy(self.keys.centre).to(self._device)
        asked = torch.from_numpy(queries).to(self._device).to(dtype) - centre
        norms = asked.square().sum(1, keepdim=True)
        best = asked.new_full((len(asked), k), torch.inf)  # (P, k)
        ids = torch.full_like(best, -1, dtype=torch.long)
        for start, block in self._blocks():
            keys = block.to(dtype).sub_(centre)
            distances = torch.addmm(keys.square().sum(1), asked, keys.T, alpha=-2).add_(norms).clamp_(min=0)
            found, columns = distances.topk(min(k, len(keys)), largest=False, sorted=False)
            best, order = torch.cat([best, found], 1).topk(k, largest=False)
            ids = torch.cat([ids, columns + start], 1).gather(1, order)
        return best.float().cpu().numpy(), ids.cpu().numpy()

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first id, keys) on the device, kept there where they fit."""
        if self._held:
            yield from self._held
            return
        entries, width = self.keys.shape
        keep = 2 * entries * width <= torch.accelerator.get_memory_info(self._device)[0] // 2
        found = []
        for start in range(0, entries, self.sizes.device_keys):
            keys = np.array(self.keys.slice(start, min(start + self.sizes.device_keys, entries)))
            found.append((start, torch.from_numpy(keys).to(self._device)))
            yield found[-1]
            found = found if keep else []
        self._held = found


class IVFIndex(Index):
    """Searches only the lists whose centroids are nearest; a subclass says how a key is kept in its list."""

    def __init__(
        self, index: faiss.IndexIVF, keys: Keys | None, rerank_factor: int, sizes: SearchSizes = SIZES
    ) -> None:
        self.index, self.keys, self.rerank_factor, self.sizes = index, keys, rerank_factor, sizes
        self._centroids: Floats = self.index.quantizer.reconstruct_n(0, self.index.nlist)  # type: ignore[call-arg]
        self.centre = common_part(self._centroids)
        """Taken from centroids and queries: the file holds centroids as the keys are, a search those without it."""
        self._place(self._centroids - self.centre)

    def _place(self, centroids: Floats) -> None:
        """Put the centroids here."""
        quantizer: Any = self.index.quantizer
        quantizer.reset()
        quantizer.add(centroids)

    @classmethod
    @abstractmethod
    def _empty(cls, quantizer: faiss.Index, nlist: int, sample: int, config: DatastoreConfig) -> faiss.IndexIVF:
        """An untrained index."""

    @classmethod
    def build(cls, keys: Keys, config: DatastoreConfig, sizes: SearchSizes = SIZES) -> Self:
        entries, width = keys.shape
        nlist = nlist_in_force(entries, config)
        rng = np.random.default_rng(config.seed)
        sample = np.sort(rng.choice(entries, min(entries, config.train_vectors), replace=False))
        quantizer = faiss.IndexFlatL2(width)
        index = cls._empty(quantizer, nlist, len(sample), config)
        index.cp.seed = config.seed + 1
        index.cp.min_points_per_centroid = 1  # silences faiss; recall is measured afterwards
        vectors = keys.gather(sample)
        centre = common_part(vectors)
        vectors -= centre
        index.train(vectors)
        centroids = quantizer.reconstruct_n(0, nlist)
        quantizer.reset()
        quantizer.add(centroids + centre)
        index.nprobe = min(config.nprobe or 8, nlist)
        built = cls(index, keys, config.rerank_factor, sizes)
        built._fill(keys)
        return built

    def _coded(self, keys: Floats) -> Floats:
        """What the index makes codes of for these keys: themselves, unless a kind needs them otherwise."""
        return keys

    def _assign(self, keys: Floats) -> Ints:
        """`(P,)` the list of each key."""
        return self.index.quantizer.assign(keys - self.centre, 1)[:, 0]  # type: ignore[call-arg]

    def _add(self, keys: Floats, assigned: Ints, ids: Ints) -> None:
        """Append keys to their lists."""
        arrays = (np.ascontiguousarray(self._coded(keys), np.float32), ids, assigned)
        self.index.add_core(len(keys), *(faiss.swig_ptr(array) for array in arrays))  # type: ignore[attr-defined]

    def _fill(self, keys: Keys) -> None:
        """Add all keys. Lists get their final room at once, for a list that grows leaves as much unused behind."""
        at_once, lists, invlists = self.sizes.filled, np.empty(len(keys), np.int32), self.index.invlists
        starts = range(0, len(keys), at_once)
        for start in starts:
            lists[start : start + at_once] = self._assign(keys.rows(start, start + at_once))
        for number, size in enumerate(np.bincount(lists, minlength=self.index.nlist).tolist()):
            invlists.resize(number, size)  # type: ignore[union-attr]
            invlists.resize(number, 0)  # type: ignore[union-attr]
        for start in starts:
            assigned = lists[start : start + at_once].astype(np.int64)
            self._add(keys.rows(start, start + at_once), assigned, np.arange(start, start + len(assigned)))

    def extend(self, keys: Keys, new_ids: Ints, config: DatastoreConfig) -> None:
        index: Any = self.index  # its stubs do not know what the Python wrappers add
        index.remove_ids(faiss.IDSelectorBitmap(np.packbits(new_ids < 0, bitorder="little")))  # type: ignore[call-arg]
        for number in range(index.nlist):
            if size := index.invlists.list_size(number):
                ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)  # the list's own memory
                ids[:] = new_ids[ids]
        is_new = np.ones(len(keys), bool)
        is_new[new_ids[new_ids >= 0]] = False
        added = np.flatnonzero(is_new)
        for start in range(0, len(added), self.sizes.filled):
            ids = added[start : start + self.sizes.filled]
            block = keys.gather(ids)
            self._add(block, self._assign(block), ids)
        index.nprobe = min(config.nprobe or 8, index.nlist)
        self.keys, self.rerank_factor = keys, config.rerank_factor

    def save(self, path: Path) -> None:
        self._place(self._centroids)
        try:
            faiss.write_index(self.index, str(path))
        finally:
            self._place(self._centroids - self.centre)

    @classmethod
    def load(cls, path: Path | None, keys: Keys | None, facts: IndexFacts, shape: tuple[int, int]) -> Self:
        assert path is not None
        if cls.holds_keys:
            keys = keys_in_lists(path, facts, shape)
        else:
            IndexLayout(path).check(facts, shape)
        try:
            index: Any = faiss.read_index(str(path))
        except RuntimeError as error:
            raise ArtifactError(f"{path} cannot be read: {str(error).splitlines()[0][:120]}") from None
        index.nprobe = min(facts.nprobe, facts.nlist)
        return cls(index, keys, facts.rerank_factor)

    def set_nprobe(self, nprobe: int) -> None:
        self.index.nprobe = min(nprobe, self.index.nlist)

    def describe(self) -> dict[str, Any]:
        settings = {"nlist": self.index.nlist, "nprobe": self.index.nprobe, "rerank_factor": self.rerank_factor}
        return {**super().describe(), **settings}

    def search(self, queries: Floats, k: int, *, thorough: bool = False) -> Neighbors:
        nprobe = self.index.nprobe
        self.index.nprobe = self.index.nlist if thorough else nprobe
        try:
            return super().search(queries, k)
        finally:
            self.index.nprobe = nprobe


class IVFFlatIndex(IVFIndex):
    """Lists of whole float16 keys: exact distances, approximate choice."""

    kind = "ivf-flat"
    holds_keys = True

    def _list(self, number: int) -> tuple[NDArray[np.float16], Ints]:
        """Keys and ids of a list, in the index's own memory."""
        index: Any = self.index
        if not (size := index.invlists.list_size(number)):
            return np.empty((0, index.d), np.float16), np.empty(0, np.int64)
        codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size)
        ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
        return codes.view(np.float16).reshape(size, -1), ids

    @classmethod
    def _empty(cls, quantizer: faiss.Index, nlist: int, sample: int, config: DatastoreConfig) -> faiss.IndexIVF:
        float16, by_residual = faiss.ScalarQuantizer.QT_fp16, False  # keys themselves: lossless
        return faiss.IndexIVFScalarQuantizer(quantizer, quantizer.d, nlist, float16, faiss.METRIC_L2, by_residual)

    def _search(self, queries: Floats, k: int) -> Neighbors:
        """As `search`; where lists are probed by many queries each, list by list."""
        index: Any = self.index
        coarse, probed = index.quantizer.search(queries - self.centre, index.nprobe)
        if len(queries) * index.nprobe < self.sizes.shared * index.nlist or not fits(len(queries), index.ntotal):
            return index.search_preassigned(queries, k, probed, coarse)  # in differences
        entries = np.array([index.invlists.list_size(number) for number in range(index.nlist)])
        return search_lists(queries, probed, entries, self._list, k, self.sizes, centre=self.centre)


class IVFPQIndex(IVFIndex):
    """Lists of product-quantised keys, re-ranked with exact distances while the keys are there."""

    kind = "ivf-pq"

    @classmethod
    def _empty(cls, quantizer: faiss.Index, nlist: int, sample: int, config: DatastoreConfig) -> faiss.IndexIVF:
        width = quantizer.d
        pieces = max(m for m in range(1, min(config.code_bytes, width) + 1) if width % m == 0)
        bits = int(min(8, max(1, np.log2(max(2, sample)))))
        index = faiss.IndexIVFPQ(quantizer, width, nlist, pieces, bits)
        index.pq.cp.min_points_per_centroid = 1
        return index

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "code_bytes": int(self.index.code_size)}

    def _place(self, centroids: Floats) -> None:
        super()._place(centroids)
        self.index.precompute_table()  # type: ignore[attr-defined]

    def _coded(self, keys: Floats) -> Floats:
        return keys - self.centre

    def _search(self, queries: Floats, k: int) -> Neighbors:
        index: Any = self.index
        asked = queries - self.centre
        if self.keys is None:
            return index.search(asked, k)
        _, candidates = index.search(asked, min(k * self.rerank_factor, len(self.keys)))
        distances, ids = nearest_first(exact_distances(self.keys, queries, candidates, self.sizes), candidates, k)
        missing = ((0, 0), (0, k - ids.shape[1]))
        return np.pad(distances, missing, constant_values=np.inf), np.pad(ids, missing, constant_values=-1)


INDEXES: dict[IndexKind, type[Index]] = {index.kind: index for index in (ExactIndex, IVFFlatIndex, IVFPQIndex)}


def exact_distances(keys: Keys, queries: Floats, ids: Ints, sizes: SearchSizes = SIZES) -> Floats:
    """Squared distance of each query to the entries of its row, `(P, C)`; `inf` where an id is -1.

    A few queries at a time, which stay in the cache; each key that they need is read once, in the order of ids.
    """
    distances = np.full(ids.shape, np.inf, np.float32)
    for start in range(0, len(ids), sizes.ranked):
        here = slice(start, start + sizes.ranked)
        asked, wanted, found = queries[here], ids[here].reshape(-1), distances[here].reshape(-1)
        order = np.argsort(wanted, kind="stable")
        order = order[np.searchsorted(wanted, 0, sorter=order) :]
        for first in range(0, len(order), sizes.pairs):
            pairs = order[first : first + sizes.pairs]
            compared, which = np.unique(wanted[pairs], return_inverse=True)
            part = np.empty(len(pairs), np.float32)
            arrays = (keys.gather(compared), which, asked, pairs // ids.shape[1], part)
            pointers = (faiss.swig_ptr(array) for array in arrays)  # type: ignore[attr-defined]
            faiss.pairwise_indexed_L2sqr(keys.shape[1], len(pairs), *pointers)  # type: ignore[attr-defined]
            found[pairs] = part
    return distances


def default_nlist(entries: int) -> int:
    """About four times the root of `entries`, with some forty entries per list at least."""
    return max(1, min(int(4 * entries**0.5), entries // 39))


def nlist_in_force(entries: int, config: DatastoreConfig) -> int:
    """Inverted lists of an ivf index over so many entries; each has a key that it is trained on.

    Raises:
        ConfigError: More lists are asked for than there are entries.
    """
    if config.nlist is None:
        return min(default_nlist(entries), config.train_vectors)
    if config.nlist > entries:
        raise ConfigError(f"nlist = {config.nlist} is more than the datastore's {entries} entries; lower --nlist")
    return config.nlist


class RecallSample:
    """Some entries and their k nearest by search in float64, the entry itself left out; all keys are read once."""

    def __init__(self, keys: Keys, config: DatastoreConfig) -> None:
        entries = len(keys)
        self.k = min(config.recall_k, entries - 1)
        rng = np.random.default_rng(config.seed + 1)
        self.own = np.sort(rng.choice(entries, min(config.recall_sample, entries), replace=False))
        self.queries = keys.gather(self.own)
        self.expected = self._others(ExactIndex(keys, dtype=torch.float64))

    def recall(self, index: Index) -> float:
        """Recall@k of `index`: the share of the k nearest that it finds; 1 for a single entry."""
        if self.k < 1:
            return 1.0
        pairs = zip(self._others(index), self.expected, strict=True)
        return float(np.mean([len(found & expected) / self.k for found, expected in pairs]))

    def _others(self, index: Index) -> list[set[int]]:
        _, found = index.search(self.queries, self.k + 1)
        return [set(row[row != own][: self.k].tolist()) for row, own in zip(found, self.own, strict=True)]


def tune_nprobe(index: Index, keys: Keys, config: DatastoreConfig) -> float:
    """Set about the smallest nprobe that reaches `recall_target`, where it is not configured; returns recall@k.

    It stops earlier where more lists no longer help, as with codes that are not re-ranked.
    """
    sample = RecallSample(keys, config)
    if not isinstance(index, IVFIndex) or config.nprobe is not None:
        return sample.recall(index)

    def recall_at(nprobe: int) -> float:
        index.index.nprobe = nprobe
        return sample.recall(index)

    nprobe, nlist, before = 1, index.index.nlist, 0.0
    while (recall := recall_at(nprobe)) < config.recall_target:
        if nprobe >= nlist or 0 < recall < 1.01 * before:
            return recall
        nprobe, before = min(2 * nprobe, nlist), recall
    too_few = nprobe // 2
    while nprobe - too_few > max(1, nprobe // 8):
        middle = (too_few + nprobe) // 2
        if (found := recall_at(middle)) >= config.recall_target:
            nprobe, recall = middle, found
        else:
            too_few = middle
    index.index.nprobe = nprobe
    return recall
