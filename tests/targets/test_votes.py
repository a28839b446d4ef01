from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import brute_neighbors, dense_votes

from memlm.corpus.blocks import Split
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import ExactIndex, Index, IVFFlatIndex, Keys
from memlm.datastore.store import Datastore
from memlm.errors import InputError
from memlm.targets.votes import SparseProbs, neighbor_votes, search_neighbors

VOCABULARY = 6
# float32 softmax, sums of eight weights at most: a few steps of 2**-23; what float16 cannot hold is below 2**-24 each
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


def dense(votes: SparseProbs, vocab_size: int = VOCABULARY) -> np.ndarray:
    """Rows `(P, V)`; also checks what every result must hold."""
    assert len(votes.ids) == len(votes.probs) == int(votes.counts.sum())
    rows = np.zeros((len(votes.counts), vocab_size))
    position = 0
    for p, count in enumerate(votes.counts.tolist()):
        ids, probs = votes.ids[position : position + count], votes.probs[position : position + count]
        assert count >= 1
        assert len(set(ids.tolist())) == count
        assert (probs[:-1] >= probs[1:]).all()
        assert (probs.half() > 0).all()
        rows[p, ids.numpy()] = probs.numpy()
        position += count
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-5)
    return rows


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    """Distances (some missing, some far away, some equal), values, and a temperature."""
    positions, k = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    distance = st.one_of(st.just(np.inf), st.sampled_from([0.0, 1.0, 2.5]), st.floats(0, 60, width=32))
    rows = draw(st.lists(st.lists(distance, min_size=k, max_size=k), min_size=positions, max_size=positions))
    distances = np.array(rows, np.float32)
    distances[:, draw(st.integers(0, k - 1))] = draw(st.sampled_from([0.0, 3.0]))  # at least one neighbour
    distances += np.float32(draw(st.sampled_from([0.0, 100.0])))
    values = draw(
        st.lists(
            st.lists(st.integers(0, VOCABULARY - 1), min_size=k, max_size=k), min_size=positions, max_size=positions
        )
    )
    return distances, np.array(values, np.int64), draw(st.sampled_from([0.5, 4.0, 16.0]))


def votes_of(
    distances: np.ndarray, values: np.ndarray, temperature: float, mass: float = 1.0, **at_once: int
) -> SparseProbs:
    votes = torch.from_numpy(distances), torch.from_numpy(values)
    return neighbor_votes(*votes, target_temperature=temperature, target_mass=mass, **at_once)


@settings(deadline=None, max_examples=200)
@given(cases())
def test_votes_equal_the_dense_twin(case: tuple[np.ndarray, np.ndarray, float]) -> None:
    distances, values, temperature = case
    votes = votes_of(distances, values, temperature)
    expected, _ = dense_votes(distances, values, vocab_size=VOCABULARY, target_temperature=temperature)
    np.testing.assert_allclose(dense(votes), expected, **CLOSE)
    np.testing.assert_allclose(votes.lost_mass, 0, atol=1e-6)


@settings(deadline=None, max_examples=200)
@given(cases(), st.sampled_from([0.999, 0.9, 0.5, 0.01]))
def test_the_smallest_support_that_holds_the_mass_is_kept(
    case: tuple[np.ndarray, np.ndarray, float], mass: float
) -> None:
    distances, values, temperature = case
    whole, _ = dense_votes(distances, values, vocab_size=VOCABULARY, target_temperature=temperature)
    expected, lost = dense_votes(
        distances, values, vocab_size=VOCABULARY, target_temperature=temperature, target_mass=mass
    )
    for row, cut in zip(whole, expected, strict=True):  # where float32 may decide otherwise there is nothing to compare
        assume((np.abs(np.sort(row)[::-1].cumsum() - mass) > 1e-5).all())
        assume(not (cut == 0).any() or row[cut > 0].min() - row[cut == 0].max() > 1e-5 or row[cut == 0].max() == 0)
    votes = votes_of(distances, values, temperature, mass)
    np.testing.assert_allclose(dense(votes), expected, **CLOSE)
    np.testing.assert_allclose(votes.lost_mass, lost, rtol=1e-4, atol=2e-6)


@settings(deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_neighbours_does_not_matter(case: tuple[np.ndarray, np.ndarray, float], rng) -> None:
    distances, values, temperature = case
    order = list(range(distances.shape[1]))
    rng.shuffle(order)
    first, second = (
        votes_of(distances, values, temperature),
        votes_of(distances[:, order], values[:, order], temperature),
    )
    np.testing.assert_allclose(dense(first), dense(second), **CLOSE)


@settings(deadline=None)
@given(cases(), st.integers(-5, VOCABULARY))
def test_a_missing_neighbour_votes_for_nothing_whatever_its_value(
    case: tuple[np.ndarray, np.ndarray, float], value: int
) -> None:
    distances, values, temperature = case
    with_missing = np.concatenate([np.full((len(distances), 2), np.inf, np.float32), distances], axis=1)
    padded = np.concatenate([np.full((len(values), 2), value), values], axis=1)
    np.testing.assert_allclose(
        dense(votes_of(with_missing, padded, temperature)), dense(votes_of(distances, values, temperature)), **CLOSE
    )


@pytest.mark.parametrize("positions", [0, 3, 7])
def test_blocks_of_positions_give_what_one_gives(positions: int) -> None:
    rng = np.random.default_rng(0)
    distances = rng.uniform(0, 20, (positions, 9)).astype(np.float32)
    values = rng.integers(VOCABULARY, size=(positions, 9))
    whole = votes_of(distances, values, 4.0, 0.9)
    parts = votes_of(distances, values, 4.0, 0.9, at_once=3)
    for name in ("counts", "ids", "probs", "lost_mass"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    assert len(whole.counts) == positions


def test_a_position_without_neighbours_is_an_error() -> None:
    distances = torch.tensor([[1.0, 2.0], [torch.inf, torch.inf]])
    with pytest.raises(ValueError, match="a position has no neighbour at all"):
        neighbor_votes(distances, torch.zeros(2, 2, dtype=torch.long), target_temperature=1.0)


def test_votes_for_one_token_add_up() -> None:
    votes = votes_of(np.zeros((1, 4), np.float32), np.array([[3, 1, 3, 3]]), 2.0)
    assert votes.ids.tolist() == [3, 1]
    assert votes.probs.tolist() == pytest.approx([0.75, 0.25])


def test_huge_distances_and_tiny_temperatures_do_not_overflow() -> None:
    distances = np.array([[1e30, 1e30, 3e38], [5e7, 5e7 + 4, 9e7], [3e38, 3e38, np.inf]], np.float32)
    votes = votes_of(distances, np.array([[0, 1, 2]] * 3), 1e-3)
    assert votes.counts.tolist() == [2, 1, 2]
    np.testing.assert_allclose(dense(votes)[:, :2], [[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]], rtol=1e-6)


def test_what_float16_cannot_hold_is_lost_and_counted() -> None:
    small, tiny = 1e-6, 1e-8  # above and below half of float16's smallest number, 2**-24
    distances = np.array([[0.0, -np.log(small), -np.log(tiny)]], np.float32)
    votes = votes_of(distances, np.array([[4, 5, 0]]), 1.0)
    assert votes.ids.tolist() == [4, 5]
    assert votes.probs.tolist() == pytest.approx([1 - small, small], rel=1e-4)
    assert float(votes.lost_mass) == pytest.approx(0, abs=2e-7)


def test_a_target_mass_of_one_keeps_every_token_that_float16_can_hold() -> None:
    rng = np.random.default_rng(0)
    k = 3000
    weights = np.concatenate([rng.uniform(0.5, 1.5, k // 2), rng.uniform(5e-4, 1e-3, k // 2)])
    distances = -np.log(weights / weights.sum()).astype(np.float32)[None]  # the lighter half: 2e-7 to 7e-7 each
    votes = votes_of(distances, np.arange(k)[None], 1.0)
    assert int(votes.counts) == k


def datastore(keys: np.ndarray, lengths: list[int], index: Index | None = None) -> Datastore:
    """What `search_neighbors` needs of a datastore whose documents predict as many tokens as `lengths` says."""
    offsets = np.cumsum([0, *[n + 1 for n in lengths]]).astype(np.int64)
    split = Split(np.zeros(offsets[-1], np.int32), offsets, block_size=8, step=4, cross_documents=False)
    assert split.n_positions == len(keys)
    store = object.__new__(Datastore)  # a real one is read from a folder
    store.__dict__.update(
        corpus=SimpleNamespace(split=lambda name: split),
        index=index or ExactIndex(Keys([keys])),
        n_entries=len(keys),
        folder="d",
    )
    return store


class Scripted(Index):
    """Returns one ranking, cut to the length asked for, whatever the query."""

    build = extend = save = load = describe = None  # type: ignore[assignment]

    def __init__(self, distances: list[float], ids: list[int]) -> None:
        self.ranking = np.array([distances], np.float32), np.array([ids], np.int64)

    def _search(self, queries: np.ndarray, k: int, *_: object) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.repeat(a[:, :k], len(queries), 0) for a in self.ranking)  # type: ignore[return-value]


Scripted.__abstractmethods__ = frozenset()


def test_the_own_entry_is_left_out_by_id_although_a_duplicate_ranks_first() -> None:
    keys = np.zeros((5, 2), np.float16)
    ranking = Scripted([0, 0, 0, 1, 4], [3, 0, 2, 1, 4])  # entries 3, 0 and 2 are identical
    store = datastore(keys, [2, 3], ranking)
    distances, ids = search_neighbors(store, np.zeros((3, 2), np.float32), np.array([0, 2, 3]), k=3)
    assert ids.tolist() == [[3, 2, 1], [3, 0, 1], [0, 2, 1]]
    assert distances.tolist() == [[0, 0, 1]] * 3


def test_the_own_entry_may_be_beyond_the_ones_that_were_fetched() -> None:
    store = datastore(np.zeros((5, 2), np.float16), [5], Scripted([0, 0, 0, 0, 0], [1, 2, 3, 4, 0]))
    _, ids = search_neighbors(store, np.zeros((1, 2), np.float32), np.array([0]), k=2)
    assert ids.tolist() == [[1, 2]]


def test_other_text_excludes_nothing() -> None:
    store = datastore(np.zeros((3, 2), np.float16), [3], Scripted([0, 1, 2], [1, 0, 2]))
    _, ids = search_neighbors(store, np.zeros((1, 2), np.float32), None, k=2)
    assert ids.tolist() == [[1, 0]]


@pytest.mark.parametrize("exclude_document", [False, True])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_neighbours_equal_brute_force_without_the_own_entry_or_document(k: int, exclude_document: bool) -> None:
    lengths = [9, 1, 12, 3]
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(4), lengths)
    keys = (3.0 * rng.normal(size=(4, 5))[document] + rng.normal(size=(25, 5))).astype(
        np.float16
    )  # own document is near
    own = np.arange(25)
    found, ids = search_neighbors(
        datastore(keys, lengths), keys.astype(np.float32), own, k=k, exclude_document=exclude_document
    )
    excluded = [set(np.flatnonzero(document == document[i]).tolist()) if exclude_document else {i} for i in range(25)]
    expected, expected_ids = brute_neighbors(keys, keys, k, excluded)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)  # float32 sums of squares of about 50


def test_a_query_whose_document_is_all_there_is_has_no_neighbour() -> None:
    keys = np.arange(8, dtype=np.float16).reshape(4, 2)
    with pytest.raises(InputError, match="has no neighbour left once its own document is excluded"):
        search_neighbors(datastore(keys, [4]), keys.astype(np.float32), np.arange(4), k=2, exclude_document=True)


def test_more_neighbours_than_there_are_come_as_missing() -> None:
    keys = np.arange(8, dtype=np.float16).reshape(4, 2)
    for own, there in ((None, 4), (np.array([0]), 3)):
        distances, ids = search_neighbors(datastore(keys, [4]), keys[:1].astype(np.float32), own, k=6)
        assert (ids >= 0).tolist() == np.isfinite(distances).tolist() == [[True] * there + [False] * (6 - there)]


def test_an_approximate_index_is_searched_whole_where_it_found_nothing() -> None:
    raw = np.array([[0, 0], [10, 0], [10, 1], [10, 2], [10, 3]], np.float16)  # the first key has a list for itself
    index = IVFFlatIndex.build(Keys([raw]), DatastoreConfig(index="ivf-flat", nlist=2, nprobe=1))
    assert index.search(raw[:1], 2)[1].tolist() == [[0, -1]]
    distances, ids = search_neighbors(datastore(raw, [5], index), raw.astype(np.float32), np.arange(5), k=2)
    assert ids[0].tolist() == [1, 2]
    assert distances[0].tolist() == [100, 101]
    assert index.describe()["nprobe"] == 1
