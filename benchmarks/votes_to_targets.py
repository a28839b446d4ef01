"""Neighbours become sparse targets five times as fast as through dense rows, and no tensor has a vocabulary's width."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import SMOLLM2_VOCABULARY
from benchmarks.report import bar_line, prove
from benchmarks.timing import interleave
from memlm.targets.votes import SparseProbs, neighbor_votes

VOCABULARIES = (SMOLLM2_VOCABULARY, 151_936)  # the larger is Qwen2.5's
K = 1024
BAR = 5.0
_TEMPERATURE = 16.0
_CANDIDATES = 300  # tokens that a position's neighbours choose among; about 250 of them are chosen
_TOLERANCE = 1e-6  # float32 sums of at most 1,024 terms that add up to 1, in another order


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A line for each size of vocabulary: k = 1,024, some 250 distinct tokens a position."""
    for vocab_size in (500,) if quick else VOCABULARIES:
        found = measure(vocab_size, positions=64, k=32, rounds=1) if quick else measure(vocab_size)
        name = f"votes_to_targets/{vocab_size}"
        yield bar_line(name, found.pop("ratio"), at_least=BAR, judged=not quick, **found)


def measure(vocab_size: int, *, positions: int = 4096, k: int = K, rounds: int = 5) -> dict[str, Any]:
    """Positions/s of both ways.

    Args:
        vocab_size: Tokens.
        positions: Positions per round; the dense way takes 1,024 at a time.
        k: Neighbours.
        rounds: How often each side is timed.

    Raises:
        WrongAnswerError: The two differ, or some tensor on the sparse way holds more than 64 bits per neighbour.
    """
    distances, values = neighbors(positions, k, vocab_size)
    with _Largest() as largest:
        votes = neighbor_votes(distances, values, target_temperature=_TEMPERATURE)
    prove(largest.elements, positions * k, "numbers in the largest tensor on the sparse way")
    prove_votes(votes, distances, values, vocab_size)
    sides = {
        "sparse": lambda: neighbor_votes(distances, values, target_temperature=_TEMPERATURE),
        "dense": lambda: through_dense_rows(distances, values, vocab_size),
    }
    timing = interleave(sides, device=distances.device, rounds=rounds, warmup=1)
    return {
        "ratio": timing.ratio("dense", "sparse"),
        "ratio_spread": timing.spread("dense", "sparse"),
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


def prove_votes(votes: SparseProbs, distances: Tensor, values: Tensor, vocab_size: int, *, sample: int = 256) -> None:
    """Raise unless the first positions' votes are those of dense rows, but for what float16 cannot hold.

    Raises:
        WrongAnswerError: They are not.
    """
    dense = through_dense_rows(distances[:sample], values[:sample], vocab_size)
    parts = zip(votes.ids.split(votes.counts.tolist()), votes.probs.split(votes.counts.tolist()), strict=True)
    for (ids, probs), (its_ids, its_probs) in zip(list(parts)[:sample], dense, strict=True):
        ours, theirs = torch.zeros(vocab_size), torch.zeros(vocab_size)
        ours[ids.long()], theirs[its_ids.long()] = probs, its_probs.float()
        difference = (ours - theirs).abs() - 2**-11 * theirs  # half a step of float16, in which theirs are
        prove(float(difference.max()), _TOLERANCE, "sparse votes against dense rows")


class _Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that is made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made
