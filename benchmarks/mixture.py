"""Base and memories are mixed in no more time than by log-softmax and logaddexp, at the same error."""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import SMOLLM2_VOCABULARY
from benchmarks.report import bar_line, prove
from benchmarks.timing import interleave
from memlm.mix.mixture import mix_log_probs
from memlm.models.loading import default_device
from memlm.targets.votes import SparseProbs

BAR = 1.05
KINDS = ("one dense", "four dense", "sparse")
VOCABULARIES = (SMOLLM2_VOCABULARY, 151_936)
BATCHES = (1, 8)
_WEIGHT = 0.3  # of all memories together
_SUPPORT = 189  # tokens of a sparse vote, as MedQuAD has at k 1,024


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A line for each kind of memories, batch and vocabulary: a decoding step's mixture, from logits to logits."""
    for kind, batch, vocab_size in product(KINDS, BATCHES, (300,) if quick else VOCABULARIES):
        found = measure(kind, batch, vocab_size, rounds=1 if quick else 60)
        name = f"mixture/{kind}/{batch}x{vocab_size}"
        yield bar_line(name, found.pop("ratio"), at_most=BAR, judged=not quick, **found)


def measure(kind: str, batch: int, vocab_size: int, *, rounds: int) -> dict[str, Any]:
    """Seconds of both ways, and their largest errors against float64, at the size that is timed.

    Raises:
        WrongAnswerError: The library's error is above the other's by more than a step of float32.
    """
    device = default_device()
    draw = torch.Generator().manual_seed(0)
    base = (4 * torch.randn(batch, 1, vocab_size, generator=draw)).to(device)
    if kind == "sparse":
        ids = torch.stack([torch.randperm(vocab_size, generator=draw)[:_SUPPORT] for _ in range(batch)])
        probs = (2 * torch.randn(batch, ids.shape[1], generator=draw)).softmax(1)
        counts = torch.full((batch,), ids.shape[1])
        votes = SparseProbs(counts, ids.int().flatten(), probs.flatten(), torch.zeros(batch)).to(device)
        sides = {"folded": lambda: folded_sparse(base, votes), "plain": lambda: plain_sparse(base, votes)}
        exact = plain_sparse(base.double(), votes)
    else:
        count = 1 if kind == "one dense" else 4
        memories = [(4 * torch.randn(batch, 1, vocab_size, generator=draw)).to(device) for _ in range(count)]
        sides = {"folded": lambda: folded(base, memories), "plain": lambda: plain(base, memories)}
        exact = plain(base.double(), [memory.double() for memory in memories])
    errors = {name: error(side, exact) for name, side in sides.items()}
    prove(errors["folded"], errors["plain"] + 2**-20, f"logits of the mixture ({kind})")
    timing = interleave(sides, device=device, rounds=rounds, warmup=3)
    return {
        "ratio": timing.ratio("folded", "plain"),
        "ratio_spread": timing.spread("folded", "plain"),
        "milliseconds": {name: round(1000 * timing.median(name), 3) for name in sides},
        "error": {name: float(f"{found:.2e}") for name, found in errors.items()},
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }


def error(side: Callable[[], Tensor], exact: Tensor) -> float:
    """The largest of its logits."""
    return float((side().double() - exact).abs().max())


def folded(base: Tensor, memories: list[Tensor]) -> Tensor:
    """The library's way: the memories' log-probs, and mixed logits as large as the base's."""
    votes = [memory.log_softmax(-1) for memory in memories]
    weights = [_WEIGHT / len(memories)] * len(memories)
    return mix_log_probs(base, votes, weights, torch.logsumexp(base, -1, keepdim=True))


def plain(base: Tensor, memories: list[Tensor]) -> Tensor:
    """By `log_softmax` of each and `logaddexp`, then raised to where the base's logits are."""
    mixed = base.log_softmax(-1) + math.log(1 - _WEIGHT)
    for memory in memories:
        mixed = torch.logaddexp(mixed, memory.log_softmax(-1) + math.log(_WEIGHT / len(memories)))
    return mixed + base.logsumexp(-1, keepdim=True)


def folded_sparse(base: Tensor, votes: SparseProbs) -> Tensor:
    """The library's way."""
    return mix_log_probs(base, [votes], [_WEIGHT], torch.logsumexp(base, -1, keepdim=True))


def plain_sparse(base: Tensor, votes: SparseProbs) -> Tensor:
    """Through a dense row per place."""
    probs = (1 - _WEIGHT) * base.softmax(-1)
    rows = votes.ids.view(len(base), 1, -1).long()
    probs.scatter_add_(-1, rows, _WEIGHT * votes.probs.view(rows.shape).to(probs.dtype))
    return probs.log() + base.logsumexp(-1, keepdim=True)
