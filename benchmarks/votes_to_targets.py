"""Neighbours become sparse targets faster than by numpy's unique, torch's sort or dense rows, none of them made."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import SMOLLM2_VOCABULARY
from benchmarks.report import bar_line, prove
from benchmarks.timing import interleave
from memlm.targets.votes import SparseProbs, neighbor_votes

VOCABULARIES = (SMOLLM2_VOCABULARY, 151_936)  # the larger is Qwen2.5's
K = 1024
BAR = 1.1
_TEMPERATURE = 16.0
_CANDIDATES = 300  # tokens that a position's neighbours choose among; about 250 of them are chosen
_TOLERANCE = 1e-6  # float32 sums of at most 1,024 terms that add up to 1, in another order


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A line for each size of vocabulary: k = 1,024, some 250 distinct tokens a position; the fastest rival counts."""
    for vocab_size in (500,) if quick else VOCABULARIES:
        found = measure(vocab_size, positions=64, k=32, rounds=1) if quick else measure(vocab_size)
        name = f"votes_to_targets/{vocab_size}"
        yield bar_line(name, found.pop("ratio"), at_least=BAR, judged=not quick, **found)


def measure(vocab_size: int, *, positions: int = 4096, k: int = K, rounds: int = 5) -> dict[str, Any]:
    """Positions/s of all ways.

    Args:
        vocab_size: Tokens.
        positions: Positions per round; the dense way takes 1,024 at a time.
        k: Neighbours.
        rounds: How often each side is timed.

    Raises:
        WrongAnswerError: A rival's votes differ from ours, or some tensor of ours holds more than 64 bits a neighbour.
    """
    distances, values = neighbors(positions, k, vocab_size)
    with _Largest() as largest:
        votes = neighbor_votes(distances, values, target_temperature=_TEMPERATURE)
    prove(largest.elements, positions * k, "numbers in the largest tensor on the sparse way")
    ways = {
        "numpy": lambda: through_unique(distances, values),
        "torch": lambda: through_sort(distances, values),
        "dense": lambda: through_dense_rows(distances, values, vocab_size),
    }
    for name, way in ways.items():
        prove_votes(votes, way(), vocab_size, name)
    sides = {"sparse": lambda: neighbor_votes(distances, values, target_temperature=_TEMPERATURE), **ways}
    timing = interleave(sides, device=distances.device, rounds=rounds, warmup=1)
    rival = min(ways, key=timing.median)
    return {
        "ratio": timing.ratio(rival, "sparse"),
        "ratio_spread": timing.spread(rival, "sparse"),
        "rival": rival,
        "ratios": {name: round(timing.ratio(name, "sparse"), 4) for name in ways},
        "positions_per_second": {name: round(positions / timing.median(name), 1) for name in sides},
        "largest_tensor": {"numbers": largest.elements, "of_dense_rows": positions * vocab_size},
        "k": k,
        "distinct_tokens": round(float(votes.counts.double().mean()), 1),
        "rounds": rounds,
    }


def neighbors(positions: int, k: int, vocab_size: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distances and values `(P, K)`: each position's neighbours vote for a few tokens often and for many once."""
    generator = torch.Generator().manual_seed(seed)
    distances = 100 * torch.rand(positions, k, generator=generator).sort(1).values
    candidates = torch.randint(vocab_size, (positions, min(_CANDIDATES, vocab_size)), generator=generator)
    choice = candidates.shape[1] * torch.rand(positions, k, generator=generator) ** 3
    return distances, candidates.gather(1, choice.long()).int()


def through_dense_rows(
    distances: Tensor, values: Tensor, vocab_size: int, *, batch: int = 1024
) -> list[tuple[Tensor, Tensor]]:
    """Ids and float16 probabilities of each position, likeliest first: rows over the vocabulary, then a loop over them.

    Source: the way of `knn_utils/saveKNNMulti.py` of the released Memory Decoder code.
    """
    found = []
    for part, tokens in zip(distances.split(batch), values.split(batch), strict=True):
        rows = torch.zeros(len(part), vocab_size)
        rows.scatter_add_(1, tokens.long(), torch.softmax(-part / _TEMPERATURE, 1))
        rows /= rows.sum(1, keepdim=True)
        for row in rows:
            ids = row.nonzero().squeeze(1)
            probs, order = row[ids].sort(descending=True)
            found.append((ids[order].int(), probs.half()))
    return found


def through_unique(distances: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The same row by row with numpy: `unique`, `bincount`, `argsort`."""
    weights = torch.softmax(-distances / _TEMPERATURE, 1).numpy()
    found = []
    for row, tokens in zip(weights, values.numpy(), strict=True):
        ids, which = np.unique(tokens, return_inverse=True)
        probs = np.bincount(which, row).astype(np.float32)
        order = np.argsort(-probs)
        found.append((torch.from_numpy(ids[order]), torch.from_numpy(probs[order])))
    return found


def through_sort(distances: Tensor, values: Tensor, *, batch: int = 512) -> list[tuple[Tensor, Tensor]]:
    """The same by torch's `sort`, for many rows at once: by token, summed, and by probability."""
    found = []
    for part, its in zip(distances.split(batch), values.split(batch), strict=True):
        tokens, order = its.sort(1)
        weights = torch.softmax(-part / _TEMPERATURE, 1).gather(1, order)
        group = torch.zeros_like(order)
        group[:, 1:] = (tokens[:, 1:] != tokens[:, :-1]).cumsum(1)
        counts = (group[:, -1] + 1).tolist()
        probs, order = torch.zeros(len(part), max(counts)).scatter_add_(1, group, weights).sort(1, descending=True)
        ids = torch.zeros_like(order, dtype=torch.int32).scatter_(1, group, tokens).gather(1, order)
        found += [(ids[row, :count], probs[row, :count]) for row, count in enumerate(counts)]
    return found


def prove_votes(
    votes: SparseProbs, rival: list[tuple[Tensor, Tensor]], vocab_size: int, name: str, *, sample: int = 256
) -> None:
    """Raise unless the last positions' votes are the rival's, but for what float16 cannot hold.

    Raises:
        WrongAnswerError: They are not.
    """
    parts = zip(votes.ids.split(votes.counts.tolist()), votes.probs.split(votes.counts.tolist()), strict=True)
    for (ids, probs), (its_ids, its_probs) in zip(list(parts)[::-1][:sample], rival[::-1][:sample], strict=True):
        ours, theirs = torch.zeros(vocab_size), torch.zeros(vocab_size)
        ours[ids.long()], theirs[its_ids.long()] = probs, its_probs.float()
        difference = (ours - theirs).abs() - 2**-11 * theirs  # half a step of float16, in which dense ones are
        prove(float(difference.max()), _TOLERANCE, f"our votes against those of {name}")


class _Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that is made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made
