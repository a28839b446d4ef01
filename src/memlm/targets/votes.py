"""Neighbours as votes: squared distances and next tokens to a sparse distribution."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from memlm.datastore.ranking import Neighbors, nearest_first
from memlm.datastore.store import Datastore
from memlm.errors import InputError


@dataclass(frozen=True)
class SparseProbs:
    """Distributions over the vocabulary, one per position, as flat lists.

    Position `p` owns the next `counts[p]` entries of `ids` and `probs`, likeliest first.
    """

    counts: Int[Tensor, "P"]
    ids: Int[Tensor, "S"]
    probs: Float[Tensor, "S"]
    lost_mass: Float[Tensor, "P"]
    """Probability of the tokens left out, before the rest was renormalised."""

    @property
    def owner(self) -> Int[Tensor, "S"]:
        """The position of each entry of `ids`."""
        return torch.arange(len(self.counts), device=self.ids.device).repeat_interleave(self.counts)

    @classmethod
    def concatenate(cls, parts: Sequence["SparseProbs"]) -> "SparseProbs":
        """The positions of all parts, one part after another."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The same as arrays by name."""
        return {field.name: getattr(self, field.name).numpy(force=True) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "SparseProbs | None":
        """What `arrays()` gave, read back; None where it is something else."""
        if arrays.keys() != {field.name for field in fields(cls)}:
            return None
        found = cls(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        fits = len(found.counts) == len(found.lost_mass) and int(found.counts.sum()) == len(found.ids)
        return found if fits and len(found.ids) == len(found.probs) else None

    def to(self, device: torch.device) -> "SparseProbs":
        """The same on another device."""
        return SparseProbs(*(part.to(device) for part in (self.counts, self.ids, self.probs, self.lost_mass)))

    def below(self, vocab_size: int) -> "SparseProbs":
        """The same without tokens from `vocab_size` on, renormalised; a position that has no others keeps nothing."""
        inside = self.ids < vocab_size
        if bool(inside.all()):
            return self
        kept = torch.zeros_like(self.lost_mass).index_add_(0, self.owner, self.probs * inside)
        return SparseProbs(
            counts=torch.zeros_like(self.counts).index_add_(0, self.owner, inside.to(self.counts.dtype)),
            ids=self.ids[inside],
            probs=(self.probs / kept[self.owner])[inside],
            lost_mass=1 - (1 - self.lost_mass) * kept,
        )

    def take(self, positions: Int[Tensor, "P2"]) -> "SparseProbs":
        """The same at these positions, in this order; one may come several times."""
        counts = self.counts[positions]
        first = (self.counts.cumsum(0) - self.counts)[positions]
        place = torch.arange(int(counts.sum()), device=counts.device)
        place = place - (counts.cumsum(0) - counts - first).repeat_interleave(counts)
        return SparseProbs(counts, self.ids[place], self.probs[place], self.lost_mass[positions])

    def of(self, tokens: Int[Tensor, "P"]) -> Float[Tensor, "P"]:
        """The probability of one token per position."""
        hits = self.probs * (self.ids == tokens.repeat_interleave(self.counts))
        return self._summed(hits)

    def summary(self) -> dict[str, Tensor]:
        """`entropy` (nats) and `top1` (a probability) in float32, `top1_id` in int32, of each position; 0 where a
        position keeps nothing."""
        first = (self.counts.cumsum(0) - self.counts).clamp(max=max(0, len(self.ids) - 1))
        there = self.counts > 0
        top1, top1_id = torch.zeros_like(self.lost_mass), torch.zeros_like(self.counts, dtype=torch.int32)
        top1[there], top1_id[there] = self.probs[first[there]], self.ids[first[there]].int()
        return {"entropy": -self._summed(torch.xlogy(self.probs, self.probs)), "top1": top1, "top1_id": top1_id}

    def _summed(self, values: Float[Tensor, "S"]) -> Float[Tensor, "P"]:
        return values.new_zeros(len(self.counts)).index_add_(0, self.owner, values)

    def dense(self, vocab_size: int) -> Float[Tensor, "P {vocab_size}"]:
        """As rows of probabilities."""
        out = torch.zeros(len(self.counts), vocab_size, dtype=self.probs.dtype, device=self.ids.device)
        out[self.owner, self.ids.long()] = self.probs
        return out


def neighbor_votes(
    distances: Float[Tensor, "P K"],
    values: Int[Tensor, "P K"],
    *,
    target_temperature: float,
    target_mass: float = 1.0,
    at_once: int = 512,
) -> SparseProbs:
    """Each position's neighbours as a sparse distribution over the vocabulary.

    A neighbour votes for its value with weight `softmax(-distance / target_temperature)`; votes for one token add up.
    The smallest set of tokens that holds `target_mass` is kept and renormalised. Nothing of size (P, V) exists.

    Args:
        distances: Squared L2, on the CPU, as an index gives them. `inf` marks a missing neighbour, which votes for
            nothing.
        values: Next-token ids, anything where the distance is `inf`.
        target_temperature: Above 0.
        target_mass: In (0, 1].
        at_once: Positions worked on at a time; with few, malloc uses the memory between the steps again.

    Raises:
        ValueError: A position has no neighbour at all.

    Source: Memory Decoder, eq. 2 (arXiv:2508.09874), after kNN-LM (arXiv:1911.00172).
    """
    parts = zip(distances.split(at_once), values.split(at_once), strict=True)
    return SparseProbs.concatenate([_block_votes(*part, target_temperature, target_mass) for part in parts])


def _block_votes(
    distances: Float[Tensor, "P K"], values: Int[Tensor, "P K"], target_temperature: float, target_mass: float
) -> SparseProbs:
    """As `neighbor_votes`, for a bounded number of positions."""
    nearest = distances.amin(1, keepdim=True)
    if not torch.isfinite(nearest).all():
        raise ValueError("a position has no neighbour at all")
    weights = torch.softmax((nearest - distances) / target_temperature, 1)  # no overflow, no all-zero row
    values = values.masked_fill(weights == 0, 0)
    tokens, bits = _sort_pairs(values, weights.view(torch.int32))
    group = torch.zeros_like(tokens, dtype=torch.long)
    torch.cumsum(tokens[:, 1:] != tokens[:, :-1], 1, out=group[:, 1:])
    shape = len(group), max(group[:, -1].tolist(), default=0) + 1
    probs = weights.new_zeros(shape).scatter_add_(1, group, bits.view(torch.float32))
    tokens = tokens.new_zeros(shape).scatter_(1, group, tokens)
    bits, tokens = _sort_pairs(~probs.view(torch.int32), tokens)  # likeliest first
    return likeliest((~bits).view(torch.float32), tokens, target_mass)


def likeliest(probs: Float[Tensor, "P K"], tokens: Int[Tensor, "P K"], target_mass: float) -> SparseProbs:
    """The smallest set of tokens that holds `target_mass`, renormalised; what float16 cannot hold is lost as well.

    Args:
        probs: In descending order, of a sum of at most 1.
        tokens: Ids, each once per position.
        target_mass: In (0, 1].
    """
    before = probs.cumsum(1) - probs
    keep = (before < target_mass) & (probs > 0)
    keep &= (probs / (probs * keep).sum(1, keepdim=True)).half() > 0
    kept = (probs * keep).sum(1)
    return SparseProbs(
        counts=keep.sum(1), ids=tokens[keep], probs=(probs / kept[:, None])[keep], lost_mass=(1 - kept).clamp(min=0)
    )


def _sort_pairs(high: Int[Tensor, "P K"], low: Int[Tensor, "P K"]) -> tuple[Int[Tensor, "P K"], Int[Tensor, "P K"]]:
    """Each row's pairs of 32-bit integers, ascending; `low` is at least 0, as are the bits of a probability.

    They are sorted as one 64-bit integer each, so that nothing is gathered, and by numpy, whose vector code takes a
    tenth of the time that torch's sort takes.
    """
    packed = high.long()
    packed <<= 32
    packed |= low
    packed.numpy().sort(axis=1)
    return (packed >> 32).int(), packed.int()


def search_neighbors(
    datastore: Datastore,
    queries: NDArray[np.float32],
    own: NDArray[np.int64] | None,
    *,
    k: int,
    exclude_document: bool = False,
) -> Neighbors:
    """The k nearest entries of each query, without the query's own entry.

    Args:
        queries: `(P, D)`.
        own: `(P,)` entry id of each query, left out by id wherever it ranks; None for text outside the datastore.
        k: Neighbours wanted.
        exclude_document: Leave out all entries of the query's document as well.

    Raises:
        InputError: Nothing is left for a query.
    """
    split = datastore.corpus.split("train")
    distances = np.full((len(queries), k), np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    rows, fetch, thorough = np.arange(len(queries)), k + (own is not None), False
    while len(rows):
        fetch = min(fetch, datastore.n_entries)
        found_distances, found = datastore.index.search(queries[rows], fetch, thorough=thorough)
        full = found[:, -1] >= 0
        if own is not None:
            excluded = found == own[rows, None]
            if exclude_document:
                excluded |= split.documents_of(found) == split.documents_of(own[rows])[:, None]
            found_distances = np.where(excluded, np.inf, found_distances)
            found = np.where(excluded, -1, found)
        best, best_ids = nearest_first(found_distances, found, k)
        distances[rows, : best.shape[1]], ids[rows, : best.shape[1]] = best, best_ids
        short = ~np.isfinite(distances[rows, -1]) & full & (fetch < datastore.n_entries)
        rows, fetch = rows[short], fetch * 2
        if not len(rows) and not thorough:  # the lists searched may hold excluded entries only
            rows, fetch, thorough = np.flatnonzero(~np.isfinite(distances[:, 0])), k + (own is not None), True
    if not np.isfinite(distances[:, 0]).all():
        raise InputError(f"{datastore.folder}: a position has no neighbour left once its own document is excluded")
    return distances, ids


def retrieve(
    datastore: Datastore,
    queries: NDArray[np.float32],
    own: NDArray[np.int64] | None,
    *,
    k: int,
    target_temperature: float,
    target_mass: float = 1.0,
    exclude_document: bool = False,
) -> SparseProbs:
    """The votes of each query's neighbours: what targets are made of, and what live retrieval says.

    Arguments and errors as in `search_neighbors` and `neighbor_votes`.
    """
    distances, ids = search_neighbors(datastore, queries, own, k=k, exclude_document=exclude_document)
    values = np.where(ids >= 0, datastore.values[np.maximum(ids, 0)], 0).astype(np.int32)
    return neighbor_votes(
        torch.from_numpy(distances),
        torch.from_numpy(values),
        target_temperature=target_temperature,
        target_mass=target_mass,
    )
