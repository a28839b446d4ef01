"""Slow, obviously right twins of what memlm computes fast; tests compare the two."""

import math

import numpy as np


def dense_votes(
    distances: np.ndarray, values: np.ndarray, *, vocab_size: int, target_temperature: float, target_mass: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours' votes as dense float64 rows `(P, V)` cut to the smallest support, and the mass lost `(P,)`."""
    rows = np.zeros((len(distances), vocab_size))
    lost = np.zeros(len(distances))
    for p in range(len(distances)):
        nearest = min(float(d) for d in distances[p])
        for distance, value in zip(distances[p], values[p], strict=True):
            if math.isfinite(distance):
                rows[p, value] += math.exp((nearest - float(distance)) / target_temperature)
        rows[p] /= rows[p].sum()
        held = 0.0
        for token in sorted(range(vocab_size), key=lambda t: -rows[p, t]):
            if held >= target_mass:
                lost[p] += rows[p, token]
                rows[p, token] = 0.0
            held += rows[p, token]
        rows[p] /= rows[p].sum()
    return rows, lost


def brute_neighbors(
    keys: np.ndarray, queries: np.ndarray, k: int, excluded: list[set[int]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and ids of the k nearest keys of each query in float64; `inf` and -1 where there are fewer."""
    distances, ids = np.full((len(queries), k), np.inf), np.full((len(queries), k), -1)
    for q, query in enumerate(queries.astype(np.float64)):
        all_distances = [float(((key - query) ** 2).sum()) for key in keys.astype(np.float64)]
        allowed = [i for i in range(len(keys)) if excluded is None or i not in excluded[q]]
        for rank, i in enumerate(sorted(allowed, key=lambda i: (all_distances[i], i))[:k]):
            distances[q, rank], ids[q, rank] = all_distances[i], i
    return distances, ids


def predicted_tokens(lengths: list[int]) -> list[tuple[int, int]]:
    """(document, place in it) of every token that must be predicted, in order: all but each document's first."""
    return [(d, i) for d, length in enumerate(lengths) for i in range(1, length)]


def shared_ngrams(document: list[int], others: list[list[int]], n: int) -> float:
    """Share of a document's n-grams that occur in one of the others; 0 for one shorter than n."""
    runs = [tuple(document[i : i + n]) for i in range(len(document) - n + 1)]
    known = {tuple(other[i : i + n]) for other in others for i in range(len(other) - n + 1)}
    return sum(run in known for run in runs) / len(runs) if runs else 0.0
