import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import brute_neighbors

from memlm.datastore import lists as lists_module
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import (
    INDEX_FILE,
    INDEXES,
    ExactIndex,
    Index,
    IVFIndex,
    Keys,
    RecallSample,
    default_nlist,
    exact_distances,
    tune_nprobe,
)
from memlm.datastore.layout import IndexFacts
from memlm.datastore.lists import SIZES, SearchSizes
from memlm.datastore.ranking import nearest_first
from memlm.errors import ArtifactError, ConfigError

# float32 distances of vectors of length 3 from float16 keys: faiss adds up |q|² + |k|² - 2qk, each about 10
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def clustered(entries: int, width: int, clusters: int = 20, seed: int = 0) -> np.ndarray:
    """Float16 keys around some centres, as activations are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, width))
    return (centres[rng.integers(clusters, size=entries)] + 0.3 * rng.normal(size=(entries, width))).astype(np.float16)


def build(kind: str, keys: Keys, sizes: SearchSizes = SIZES, **config: object) -> Index:
    settings = DatastoreConfig.parse({"index": kind, **config})
    built = INDEXES[kind].build(keys, settings, sizes)  # type: ignore[index]
    tune_nprobe(built, keys, settings)
    return built


def shares(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(f) & set(e)) / len(e) for f, e in zip(found, expected, strict=True)]))


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_keys_in_shards_read_like_one_array(sizes: list[int], data: st.DataObject) -> None:
    whole = np.arange(sum(sizes) * 2, dtype=np.float16).reshape(-1, 2)
    shards, places = np.split(whole, np.cumsum(sizes)[:-1]), None
    if data.draw(st.booleans()):  # the key of an entry stands anywhere
        places = np.array(data.draw(st.permutations(range(len(whole)))))
        whole = whole[places]
    keys = Keys(shards, places)
    assert keys.shape == whole.shape
    ids = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=6)), np.int64)
    assert keys.gather(ids).tolist() == whole[ids].astype(np.float32).tolist()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole) + 3))
    assert keys.rows(start, stop).tolist() == whole[start:stop].tolist()
    assert keys.rows(start, stop).dtype == np.float32
    two_dimensional = np.zeros((2, 3), np.int64)
    assert keys.gather(two_dimensional).shape == (2, 3, 2)


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("way", ["CPU", "accelerator", "full accelerator"])
def test_the_exact_index_equals_brute_force_across_blocks(k: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, and as an accelerator does it, with keys that fit its memory or do not."""
    free = 1 << 30 if way == "accelerator" else 0
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (free, free))
    raw = clustered(60, 8)
    raw.flags.writeable = False  # as a memory-mapped shard is
    queries = np.random.default_rng(1).normal(size=(11, 8)).astype(np.float32)
    index = ExactIndex(Keys([raw[:25], raw[25:]]), SearchSizes(core_keys=13, device_keys=13, queries=4))
    index.by_lists = way == "CPU"
    distances, ids = index.search(queries, k)
    assert bool(index._held) == (way == "accelerator")
    expected, _ = brute_neighbors(raw, queries, k)
    np.testing.assert_allclose(distances, expected, **CLOSE)
    assert (np.diff(distances, axis=1) >= 0).all()
    own = ((raw[ids].astype(np.float64) - queries[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(distances, own, **CLOSE)  # each id has the distance that is told
    assert all(len(set(row)) == k for row in ids.tolist())


def test_a_search_leaves_torchs_threads_as_they_were() -> None:
    """Of the caller and of threads that start later, as a server's do."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ExactIndex(Keys([clustered(40, 8)])).search(np.zeros((2, 8), np.float32), 3)
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
        assert set(lists_module._pool(3).map(lambda _: torch.get_num_threads(), range(9))) == {1}
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_can_search() -> None:
    index, queries = ExactIndex(Keys([clustered(40, 8)])), np.zeros((2, 8), np.float32)
    index.search(queries, 3)
    worker = multiprocessing.get_context("fork").Process(target=index.search, args=(queries, 3), daemon=True)
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0


@pytest.mark.parametrize("queries", [1, 30])
def test_of_equally_near_keys_exact_search_finds_the_first(queries: int) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(-2, 3, (600, 3)).astype(np.float16)
    raw = raw[np.isin((raw**2).sum(1), [0, 1, 4, 9])]  # whole numbers and lengths, so that nothing is rounded
    asked = rng.integers(-2, 3, (queries, 3)).astype(np.float32)
    _, ids = ExactIndex(Keys([raw]), SearchSizes(core_keys=7)).search(asked, 9)
    expected = ((raw[None].astype(np.float32) - asked[:, None]) ** 2).sum(-1).argsort(1, kind="stable")[:, :9]
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", INDEXES)
def test_more_neighbours_than_there_are_come_as_missing(kind: str) -> None:
    raw = clustered(40, 8)
    distances, ids = build(kind, Keys([raw]), nlist=2, nprobe=2, recall_k=5).search(raw[:3].astype(np.float32), 50)
    assert distances.shape == ids.shape == (3, 50)
    assert (ids[:, 40:] == -1).all()
    assert np.isinf(distances[:, 40:]).all()
    assert all(sorted(row[:40]) == list(range(40)) for row in ids.tolist())


@pytest.mark.parametrize("kind", INDEXES)
def test_no_queries_give_no_neighbours(kind: str) -> None:
    raw = clustered(40, 8)
    distances, ids = build(kind, Keys([raw]), nlist=2, recall_k=5).search(np.empty((0, 8), np.float32), 3)
    assert distances.shape == ids.shape == (0, 3)


def test_searching_every_list_of_ivf_flat_is_exact() -> None:
    raw = clustered(600, 16)
    keys = Keys([raw[:250], raw[250:]])
    queries = raw[:50].astype(np.float32)
    distances, ids = build("ivf-flat", keys, nlist=12, nprobe=12).search(queries, 20)
    expected, expected_ids = ExactIndex(keys).search(queries, 20)
    np.testing.assert_allclose(distances, expected, **CLOSE)
    assert shares(ids, expected_ids) > 0.998  # neighbours at equal distance may change places at the end of a row
    assert distances[:, 0].max() < 1e-3  # the key itself, kept in float16 without loss


@pytest.mark.parametrize("k", [3, 70])
@pytest.mark.parametrize("nprobe", [1, 4, 12])
def test_lists_searched_for_many_queries_at_once_give_what_faiss_finds(k: int, nprobe: int) -> None:
    raw = clustered(600, 16)
    raw[590:] = 40  # a list of few, so that lists of one query hold fewer than k
    several_runs = SearchSizes(shared=1, candidates=1500, picked=10)
    index = build("ivf-flat", Keys([raw[:250], raw[250:]]), several_runs, nlist=12, nprobe=nprobe, recall_k=5)
    assert isinstance(index, IVFIndex)
    queries = raw[::7].astype(np.float32)
    distances, ids = index.search(queries, k)
    expected, expected_ids = index.index.search(queries, k)
    assert ((ids < 0) == (expected_ids < 0)).all()
    assert (np.isinf(distances) == (ids < 0)).all()
    there = ids >= 0
    # |q|² and |k|² of the keys at 40 are 25,600, of which float32 keeps steps of 2**-9
    np.testing.assert_allclose(distances[there], expected[there], rtol=1e-4, atol=1e-2)
    for row, its in zip(ids, expected_ids, strict=True):
        assert len(set(row) - set(its)) <= 1  # of equal ones another may be the last


def test_ivf_pq_is_re_ranked_to_exact_distances_and_a_high_recall() -> None:
    raw = clustered(800, 16)
    keys = Keys([raw])
    queries = raw[:60].astype(np.float32)
    index = build("ivf-pq", keys, nlist=8, nprobe=8, code_bytes=4)
    distances, ids = index.search(queries, 20)
    _, exact = ExactIndex(keys).search(queries, 20)
    assert shares(ids, exact) > 0.9
    own = ((raw[ids].astype(np.float64) - queries[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(distances, own, **CLOSE)
    assert (np.diff(distances, axis=1) >= 0).all()
    index.keys = None  # type: ignore[attr-defined]
    assert shares(index.search(queries, 20)[1], exact) < shares(ids, exact)  # what re-ranking is for


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 1e-40, 2.5, 3e38, np.inf]), min_size=4, max_size=4)),
    st.integers(1, 6),
)
def test_the_nearest_come_first_and_of_equal_ones_the_first_given(rows: list[list[float]], k: int) -> None:
    distances = np.array(rows, np.float32).reshape(-1, 4)
    ids = np.random.default_rng(0).integers(-1, 9, distances.shape)
    found, found_ids = nearest_first(distances, ids, k)
    order = np.argsort(np.maximum(distances, 0), axis=1, kind="stable")[:, :k]
    assert found.tolist() == np.maximum(np.take_along_axis(distances, order, 1), 0).tolist()
    assert found_ids.tolist() == np.take_along_axis(ids, order, 1).tolist()


def test_exact_distances_of_candidates_equal_brute_force() -> None:
    raw = clustered(40, 8)
    queries = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
    ids = np.random.default_rng(2).integers(-1, 40, (6, 9))
    ids[2] = -1
    found = exact_distances(Keys([raw[:7], raw[7:30], raw[30:]]), queries, ids, SearchSizes(pairs=5, ranked=4))
    expected = ((raw[ids].astype(np.float64) - queries[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(found, np.where(ids < 0, np.inf, expected), rtol=1e-6)  # sums of 8 float32 squares


@pytest.mark.parametrize(("bytes_allowed", "kept"), [(64, 12), (5, 4), (1, 1)])
def test_code_bytes_are_lowered_to_a_divisor_of_the_width(bytes_allowed: int, kept: int) -> None:
    index = build("ivf-pq", Keys([clustered(300, 12)]), nlist=2, code_bytes=bytes_allowed, recall_k=5)
    assert index.describe()["code_bytes"] == kept


@pytest.mark.parametrize("kind", INDEXES)
def test_a_saved_index_answers_as_before(kind: str, tmp_path: Path) -> None:
    raw = clustered(300, 8)
    keys = Keys([raw])
    index = build(kind, keys, nlist=4, rerank_factor=3, recall_k=5)
    index.save(tmp_path / INDEX_FILE)
    facts = IndexFacts.model_validate(index.describe())
    loaded = INDEXES[kind].load(tmp_path / INDEX_FILE, keys, facts, keys.shape)  # type: ignore[index]
    assert loaded.describe() == index.describe()
    for found, expected in zip(loaded.search(raw[:9], 6), index.search(raw[:9], 6), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    keys = Keys([clustered(300, 8)])
    for name in ("a", "b"):
        build("ivf-pq", keys, nlist=4, recall_k=5).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-pq"])
def test_lists_are_filled_as_faiss_fills_them(kind: str) -> None:
    raw = clustered(300, 8)
    index = build(kind, Keys([raw[:70], raw[70:]]), SearchSizes(filled=130), nlist=6, recall_k=5)
    assert isinstance(index, IVFIndex)
    filled = faiss.serialize_index(index.index)
    index.index.reset()
    index.index.add(raw.astype(np.float32))  # type: ignore[call-arg]
    np.testing.assert_array_equal(filled, faiss.serialize_index(index.index))


def test_the_default_nprobe_is_the_smallest_that_reaches_the_target_within_an_eighth() -> None:
    keys = Keys([clustered(1500, 8, clusters=300)])
    settings = DatastoreConfig(index="ivf-flat", nlist=40, recall_target=0.97, recall_k=20, recall_sample=100)
    index = INDEXES["ivf-flat"].build(keys, settings)
    recall = tune_nprobe(index, keys, settings)
    chosen = index.describe()["nprobe"]
    assert recall == RecallSample(keys, settings).recall(index) >= 0.97
    reaches = []
    for nprobe in range(1, 41):
        index.set_nprobe(nprobe)
        reaches.append(RecallSample(keys, settings).recall(index) >= 0.97)
    smallest = 1 + reaches.index(True)
    assert smallest <= chosen <= smallest + max(1, smallest // 8)


def test_nprobe_goes_on_where_a_single_list_finds_next_to_nothing() -> None:
    keys = Keys([clustered(1500, 8, clusters=300)])
    settings = DatastoreConfig(index="ivf-flat", nlist=1200, recall_target=0.95, recall_k=20, recall_sample=100)
    index = INDEXES["ivf-flat"].build(keys, settings)
    assert tune_nprobe(index, keys, settings) >= 0.95


def test_recall_leaves_the_entry_itself_out() -> None:
    class OnlyItself(ExactIndex):
        def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            distances, ids = super()._search(queries, k)
            ids[:, 1:] = -1
            return distances, ids

    keys = Keys([clustered(50, 8)])
    settings = DatastoreConfig(recall_k=5)
    assert RecallSample(keys, settings).recall(ExactIndex(keys)) == 1.0
    assert RecallSample(keys, settings).recall(OnlyItself(keys)) == 0.0


def test_recall_of_a_single_entry_is_one() -> None:
    keys = Keys([clustered(1, 8)])
    assert RecallSample(keys, DatastoreConfig()).recall(ExactIndex(keys)) == 1.0


def test_the_index_is_chosen_by_size_unless_it_is_named() -> None:
    assert [DatastoreConfig().index_kind(n) for n in (1000, 10**6, 10**8)] == ["exact", "ivf-flat", "ivf-pq"]
    assert DatastoreConfig(index="ivf-pq").index_kind(1000) == "ivf-pq"
    assert DatastoreConfig(keep_keys=False).index_kind(1000) == "ivf-pq"
    assert default_nlist(10) == 1
    assert default_nlist(10**6) == 4000


def test_more_lists_than_entries_are_refused() -> None:
    with pytest.raises(ConfigError, match="nlist = 60 is more than the datastore's 50 entries"):
        build("ivf-flat", Keys([clustered(50, 8)]), nlist=60)


def test_there_are_no_more_lists_than_keys_that_they_are_trained_on() -> None:
    keys = Keys([clustered(2000, 8)])
    assert build("ivf-flat", keys).describe()["nlist"] == 51
    assert build("ivf-flat", keys, train_vectors=20).describe()["nlist"] == 20
    assert build("ivf-pq", keys, train_vectors=20, code_bytes=2).describe()["nlist"] == 20


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("added", [0, 150])
def test_an_extended_index_is_what_its_training_gives_for_the_new_keys(kind: str, added: int) -> None:
    rng = np.random.default_rng(3)
    before = clustered(300, 8)
    stays = rng.random(300) < 0.7
    after = np.concatenate([before[stays], clustered(added, 8, seed=1)])
    order = rng.permutation(len(after))  # where each of them stands from now on
    keys = Keys([np.empty_like(after)])
    keys._shards[0][order] = after
    new_ids = np.full(300, -1)
    new_ids[stays] = order[: stays.sum()]
    settings = DatastoreConfig(nlist=6, code_bytes=4, nprobe=6)
    index = INDEXES[kind].build(Keys([before]), settings, SearchSizes(filled=64))  # type: ignore[index]
    queries = clustered(20, 8, seed=2).astype(np.float32)
    index.search(queries, 5)  # what it may keep of the old keys
    index.extend(keys, new_ids, settings)
    expected = INDEXES[kind].build(Keys([before]), settings)  # type: ignore[index]
    for each in (index, expected):
        if isinstance(each, IVFIndex):
            each.keys = None  # distances of the codes
    if isinstance(expected, IVFIndex):
        expected.index.reset()  # the training stays
        expected.index.add(keys.rows(0, len(keys)))
    else:
        expected = ExactIndex(keys)
    found, wanted = (each.search(queries, len(keys) + 2) for each in (index, expected))
    for (distances, ids), (there, its_ids) in zip(zip(*found, strict=True), zip(*wanted, strict=True), strict=True):
        by_id, by_its_id = np.argsort(ids, kind="stable"), np.argsort(its_ids, kind="stable")
        assert ids[by_id].tolist() == [-1, -1, *range(len(keys))]
        # equal codes have equal distances wherever they stand in their list, but for the last bits of vector code
        np.testing.assert_allclose(distances[by_id], there[by_its_id], rtol=1e-5, atol=1e-5)


def test_a_damaged_index_file_is_refused(tmp_path: Path) -> None:
    index = build("ivf-flat", Keys([clustered(100, 8)]), nlist=2, recall_k=5)
    index.save(tmp_path / INDEX_FILE)
    (tmp_path / INDEX_FILE).write_bytes((tmp_path / INDEX_FILE).read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"index\.faiss cannot be read"):
        INDEXES["ivf-flat"].load(tmp_path / INDEX_FILE, None, IndexFacts.model_validate(index.describe()), (100, 8))
