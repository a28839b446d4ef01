"""Keys whose length is large beside their distances, as activations with massive components are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import brute_neighbors, dense_votes

from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import INDEX_FILE, INDEXES, ExactIndex, Index, IVFIndex, Keys, RecallSample, tune_nprobe
from memlm.datastore.layout import IndexFacts
from memlm.datastore.lists import SearchSizes, are_long, common_part
from memlm.targets.votes import neighbor_votes

WIDTH, N = 24, 500


def massive(shape: str) -> np.ndarray:
    """`(N, WIDTH)` float16 keys that lie close together and far from 0."""
    rng = np.random.default_rng(0)
    keys = rng.normal(scale=2, size=(N, WIDTH))
    if shape == "one common part":
        keys += 1000
    elif shape == "one massive coordinate":
        keys[:, 3] = -20_000
    elif shape == "two groups apart":  # whose mean is near neither
        keys += np.where(np.arange(N) % 2, 1500, -1500)[:, None]
    else:
        keys += rng.choice([0, 700, -3000], size=(5, WIDTH))[np.arange(N) % 5]
    return keys.astype(np.float16)


SHAPES = ["one common part", "one massive coordinate", "two groups apart", "five groups apart"]


def asked(raw: np.ndarray) -> np.ndarray:
    """Queries near some keys, as float16 holds them."""
    near = raw[::9].astype(np.float32) + np.random.default_rng(1).normal(size=(len(raw[::9]), WIDTH))
    return near.astype(np.float16).astype(np.float32)


def every_list(kind: str, raw: np.ndarray, sizes: SearchSizes) -> Index:
    settings = DatastoreConfig.parse({"index": kind, "nlist": 8, "nprobe": 8, "code_bytes": 12, "rerank_factor": 20})
    return INDEXES[kind].build(Keys([raw[:211], raw[211:]]), settings, sizes)  # type: ignore[index]


def check(index: Index, raw: np.ndarray, k: int = 20) -> None:
    """The neighbours are those of float64, and so are their distances and votes."""
    queries, values = asked(raw), np.random.default_rng(2).integers(0, 30, len(raw)).astype(np.int32)
    expected, expected_ids = brute_neighbors(raw, queries, k)
    distances, ids = index.search(queries, k)
    own = ((raw[ids].astype(np.float64) - queries[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(distances, own, rtol=2**-12, atol=2**-12)  # are_long leaves 14 bits of the furthest
    np.testing.assert_allclose(distances, expected, rtol=2**-12, atol=2**-12)
    overlap = [len(set(a) & set(b)) / k for a, b in zip(ids, expected_ids, strict=True)]
    assert np.mean(overlap) > 0.99  # float16 keys this large lie on a coarse grid: some are equally near
    votes = neighbor_votes(torch.from_numpy(distances), torch.from_numpy(values[ids]), target_temperature=8.0)
    twin, _ = dense_votes(own, values[ids], vocab_size=30, target_temperature=8.0)
    np.testing.assert_allclose(votes.dense(30).numpy(), twin, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["CPU", "accelerator"])
def test_exact_search_far_from_the_origin_is_that_of_float64(
    shape: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (1 << 30, 1 << 30))
    raw = massive(shape)
    index = ExactIndex(Keys([raw]), SearchSizes(core_keys=64, device_keys=64, queries=13))
    index.by_lists = way == "CPU"
    check(index, raw)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [1, 10**6])  # list by list, and as faiss searches
def test_lists_of_keys_far_from_the_origin_are_searched_as_in_float64(shape: str, shared: int) -> None:
    raw = massive(shape)
    check(every_list("ivf-flat", raw, SearchSizes(shared=shared, filled=100)), raw)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_codes_of_keys_with_a_common_part_are_as_good_as_without(shape: str) -> None:
    """What they have in common takes no share of the codes, and the candidates are ranked in differences."""
    raw = massive(shape)
    check(every_list("ivf-pq", raw, SearchSizes(filled=100)), raw)
    settings = DatastoreConfig(index="ivf-pq", nlist=8, nprobe=8, code_bytes=12)
    recalls = []
    for each in (raw, (raw.astype(np.float32) - common_part(raw.astype(np.float32))).astype(np.float16)):
        index = INDEXES["ivf-pq"].build(Keys([each]), settings)
        index.keys = None
        recalls.append(RecallSample(Keys([each]), settings).recall(index))
    assert recalls[0] > recalls[1] - 0.03  # k-means of other roundings


def apart(offsets: str, entries: int = N) -> np.ndarray:
    """`(entries, WIDTH)` keys in groups: each of them small beside how far the groups lie from another."""
    rng = np.random.default_rng(4)
    group = np.arange(entries) % 5
    if offsets == "of growing length":
        shift = np.array([0, 30, -300, 3000, -9000])[group, None] * np.ones(WIDTH)
    elif offsets == "in different coordinates":
        shift = np.zeros((entries, WIDTH))
        shift[np.arange(entries), 3 * group] = 8000
    else:
        shift = 2000 * rng.normal(size=(5, WIDTH))[group]
    return (shift + 8 * rng.normal(size=(entries, WIDTH))).astype(np.float16)


APART = ["of growing length", "in different coordinates", "anywhere"]


@pytest.mark.parametrize("offsets", APART)
@pytest.mark.parametrize("extended", [False, True])
def test_codes_of_groups_far_apart_are_ranked_as_in_float64(offsets: str, extended: bool, tmp_path: Path) -> None:
    """All lists are searched and all codes re-ranked where the group of a query has so many keys: rank is exact."""
    raw, k = apart(offsets), 20
    settings = DatastoreConfig(index="ivf-pq", nlist=10, nprobe=10, code_bytes=12, rerank_factor=10, train_vectors=N)
    index = INDEXES["ivf-pq"].build(Keys([raw[:300] if extended else raw]), settings, SearchSizes(filled=100))
    if extended:
        index.extend(Keys([raw]), np.arange(300), settings)
    index.save(tmp_path / INDEX_FILE)
    facts = IndexFacts.model_validate(index.describe())
    loaded = INDEXES["ivf-pq"].load(tmp_path / INDEX_FILE, Keys([raw]), facts, raw.shape)  # type: ignore[arg-type]
    queries = raw[::9].astype(np.float32)
    expected, _ = brute_neighbors(raw, queries, k)
    for each in (index, loaded):
        distances, ids = each.search(queries, k)
        own = ((raw[ids].astype(np.float64) - queries[:, None]) ** 2).sum(-1)
        np.testing.assert_allclose(distances, own, rtol=2**-20, atol=1e-3)  # differences, summed in float32
        assert (np.diff(own, axis=1) >= -1e-3 - 2**-20 * own[:, 1:]).all()
        np.testing.assert_allclose(own, expected, rtol=2**-20, atol=1e-3)


@pytest.mark.parametrize("offsets", APART)
def test_codes_alone_tell_groups_far_apart_and_find_nine_in_ten_within_them(offsets: str) -> None:
    raw = apart(offsets)
    settings = DatastoreConfig(index="ivf-pq", nlist=10, nprobe=10, code_bytes=12, train_vectors=N)
    index = INDEXES["ivf-pq"].build(Keys([raw]), settings)
    index.keys = None
    _, ids = index.search(raw[::9].astype(np.float32), 20)
    _, expected = brute_neighbors(raw, raw[::9].astype(np.float32), 20)
    assert (ids % 5 == (np.arange(N)[::9] % 5)[:, None]).all()  # none of another group
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(ids, expected, strict=True)]) > 0.9


@pytest.mark.parametrize("kind", INDEXES)
def test_such_an_index_is_saved_and_extended_as_others_are(kind: str, tmp_path: Path) -> None:
    raw, sizes = massive("one common part"), SearchSizes(shared=1, filled=100)
    index = every_list(kind, raw[:400], sizes)
    index.save(tmp_path / INDEX_FILE)
    facts = IndexFacts.model_validate(index.describe())
    keys = Keys([raw[:400]])
    loaded = INDEXES[kind].load(tmp_path / INDEX_FILE, keys, facts, keys.shape)  # type: ignore[index]
    for found, expected in zip(loaded.search(asked(raw), 9), index.search(asked(raw), 9), strict=True):
        np.testing.assert_array_equal(found, expected)
    loaded.extend(Keys([raw]), np.arange(400), DatastoreConfig(nprobe=8, rerank_factor=20))
    check(loaded, raw)


def test_files_hold_centroids_as_the_keys_are() -> None:
    """So what earlier versions wrote is read, and what is written now they can read."""
    index = every_list("ivf-flat", massive("one common part"), SearchSizes())
    assert isinstance(index, IVFIndex)
    assert index._centroids.min() > 900
    assert abs(index.index.quantizer.reconstruct_n(0, 8)).max() < 100  # type: ignore[call-arg]


@pytest.mark.parametrize("shape", SHAPES)
def test_recall_is_held_against_float64(shape: str) -> None:
    raw = massive(shape)
    settings = DatastoreConfig(recall_k=15, recall_sample=40)
    sample = RecallSample(Keys([raw]), settings)
    _, expected = brute_neighbors(raw, raw[sample.own].astype(np.float32), 15, [{own} for own in sample.own.tolist()])

    def distances(own: int, ids: list[int]) -> list[float]:
        return sorted(((raw[ids].astype(float) - raw[own]) ** 2).sum(1).tolist())

    for own, found, right in zip(sample.own.tolist(), sample.expected, expected.tolist(), strict=True):
        assert distances(own, list(found)) == distances(own, right)  # of equally near ones it may be another
    assert tune_nprobe(ExactIndex(Keys([raw])), Keys([raw]), settings) > 0.99


def test_ordinary_keys_are_left_where_they_are_and_compared_in_float32() -> None:
    raw = np.random.default_rng(0).normal(size=(N, WIDTH)).astype(np.float32)
    assert not common_part(raw).any()
    distances, _ = ExactIndex(Keys([raw.astype(np.float16)])).search(raw, 20)
    assert not are_long(raw, distances).any()
    assert are_long(raw + 1000, distances).all()
