import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import shared_ngrams

from memlm.corpus.near_duplicates import ngram_hashes, overlaps

DOCUMENTS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=4)


@settings(deadline=None, max_examples=200)
@given(held_out=DOCUMENTS, others=DOCUMENTS, n=st.integers(1, 5))
def test_overlaps_equal_counting_every_ngram(held_out: list[list[int]], others: list[list[int]], n: int) -> None:
    found = overlaps([np.array(d, np.int32) for d in held_out], [np.array(d, np.int32) for d in others], n)
    expected = [shared_ngrams(d, others, n) for d in held_out]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)  # both are ratios of small integers


def test_hashes_tell_order_and_token_zero_apart() -> None:
    runs = [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0], [2, 1, 0], [0, 1, 2]]
    assert len({int(ngram_hashes(np.array(run, np.int32), 3)[0]) for run in runs}) == len(runs)
    assert len(ngram_hashes(np.array([1, 2], np.int32), 3)) == 0
