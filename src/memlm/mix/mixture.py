"""The mixture itself, in log space."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memlm.mix.weights import Weight
from memlm.targets.votes import SparseProbs


def mix_log_probs(
    base: Float[Tensor, "... V"], memories: Sequence[Float[Tensor, "... V"] | SparseProbs], weights: Sequence[Weight]
) -> Float[Tensor, "... V"]:
    """`log((1 - sum(w)) * p_base + sum(w_m * p_m))` from log-probs.

    A component of weight 0 is left out, so weights 0 and 1 give the other component exactly. A sparse component is
    added where it has probability; no dense row of it exists.

    Args:
        base: Normalised log-probs of the base.
        memories: Normalised log-probs of each memory, or its sparse probabilities at the same places in reading order.
        weights: One per memory, a number or a tensor that broadcasts against `base` without its last axis; the base
            gets the rest.

    Source: Memory Decoder, eq. 7 (arXiv:2508.09874); MLP Memory, eq. 7 (arXiv:2508.01832).
    """
    rest = 1.0 - sum(weights)
    rest = rest.clamp(min=0) if isinstance(rest, Tensor) else max(0.0, rest)
    parts = [(base, rest), *zip(memories, weights, strict=True)]
    mixed = None
    for part, weight in parts:
        if isinstance(part, SparseProbs) or (not isinstance(weight, Tensor) and weight == 0):
            continue
        weighted = part + _log(weight) if isinstance(weight, Tensor) or weight < 1 else part
        mixed = weighted if mixed is None else torch.logaddexp(mixed, weighted)
    if mixed is None:
        mixed = torch.full_like(base, -math.inf)
    sparse = [(part, weight) for part, weight in parts if isinstance(part, SparseProbs)]
    if sparse:  # added in place, but not to what was given
        given = any(mixed is part for part, _ in parts)
        mixed = mixed.clone(memory_format=torch.contiguous_format) if given else mixed.contiguous()
    for part, weight in sparse:
        if isinstance(weight, Tensor) or weight > 0:
            _add_sparse(mixed, part, weight)
    return mixed


def _log(weight: Weight) -> float | Tensor:
    return weight.log()[..., None] if isinstance(weight, Tensor) else math.log(weight)


def _add_sparse(mixed: Tensor, part: SparseProbs, weight: Weight) -> None:
    """Add `weight * part` to the probabilities whose logarithms `mixed` holds, in place."""
    owner = torch.arange(len(part.counts), device=mixed.device).repeat_interleave(part.counts)
    added = part.probs.log()
    if isinstance(weight, Tensor):
        added = added + weight.expand(mixed.shape[:-1]).reshape(-1).log()[owner]
    else:
        added = added + math.log(weight)
    at = owner * mixed.shape[-1] + part.ids.long()
    flat = mixed.view(-1)
    flat[at] = torch.logaddexp(flat[at], added)
