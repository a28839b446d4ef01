"""Which held-out documents nearly repeat other documents, by the long n-grams they share."""

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


class OverlapFinder:
    """Counts, for a fixed set of held-out documents, how many of their n-grams occur elsewhere.

    It keeps the hashes of the held-out documents only, so the other side can be any number of tokens long.
    """

    def __init__(self, held_out: list[NDArray[np.int32]], n: int) -> None:
        self.n = n
        self._per_document = [ngram_hashes(tokens, n) for tokens in held_out]
        self._known = np.unique(np.concatenate([np.empty(0, np.uint64), *self._per_document]))
        self._seen = np.zeros(len(self._known), bool)

    def scan(self, tokens: NDArray[np.int32]) -> None:
        """Note which known n-grams occur in `tokens`."""
        if not len(self._known):
            return
        hashes = ngram_hashes(tokens, self.n)
        at = np.searchsorted(self._known, hashes).clip(max=len(self._known) - 1)
        self._seen[at[self._known[at] == hashes]] = True

    def overlaps(self) -> NDArray[np.float64]:
        """Per held-out document, the share of its n-grams seen; 0 for one shorter than n."""
        return np.array(
            [self._seen[np.searchsorted(self._known, h)].mean() if len(h) else 0.0 for h in self._per_document],
            np.float64,
        )
