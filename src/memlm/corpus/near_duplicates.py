"""Which held-out documents nearly repeat other documents, by the long n-grams they share."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BASE = np.uint64(0xD6E8FEB86659FD93)


def ngram_hashes(tokens: NDArray[np.int32], n: int) -> NDArray[np.uint64]:
    """One 64-bit hash per run of `n` tokens, `(max(0, len - n + 1),)`."""
    count = len(tokens) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    hashes = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes = hashes * _BASE + mixed[offset : offset + count]
    return hashes


def overlaps(held_out: list[NDArray[np.int32]], others: Iterable[NDArray[np.int32]], n: int) -> NDArray[np.float64]:
    """Per held-out document, the share of its n-grams that occur in `others`; 0 for one shorter than n.

    Hashes of the held-out documents are kept only, so the other side can be any number of tokens long.
    """
    per_document = [ngram_hashes(tokens, n) for tokens in held_out]
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *per_document]))
    seen = np.zeros(len(known), bool)
    for tokens in others if len(known) else ():
        hashes = ngram_hashes(tokens, n)
        at = np.searchsorted(known, hashes).clip(max=len(known) - 1)
        seen[at[known[at] == hashes]] = True
    return np.array([seen[np.searchsorted(known, h)].mean() if len(h) else 0.0 for h in per_document], np.float64)
