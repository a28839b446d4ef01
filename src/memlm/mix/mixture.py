"""The mixture itself, in log space."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memlm.mix.weights import Weight
from memlm.targets.votes import SparseProbs


def logsumexp(logits: Float[Tensor, "... V"]) -> Float[Tensor, "... 1"]:
    """torch's own in less than half its time on a CPU: what the largest logit loses when all are normalised."""
    return logits.amax(-1, keepdim=True) - logits.log_softmax(-1).amax(-1, keepdim=True)


def mix_log_probs(
    base: Float[Tensor, "... V"],
    memories: Sequence[Float[Tensor, "... V"] | SparseProbs],
    weights: Sequence[Weight],
    normaliser: Float[Tensor, "... 1"] | float = 0.0,
) -> Float[Tensor, "... V"]:
    """`log((1 - sum(w)) * p_base + sum(w_m * p_m))` from log-probs.

    A component of weight 0 is left out, so weights 0 and 1 give the other component exactly. A sparse component is
    added where it has probability; no dense row of it exists. However many there are, two tensors of the base's size
    are made (where gradients flow, each step keeps its own): one that is added up in, one for a scaled memory.

    Args:
        base: Normalised log-probs of the base, or its logits where `normaliser` is given.
        memories: Normalised log-probs of each memory, or its sparse probabilities at the same places in reading order.
        weights: One per memory, a number or a tensor that broadcasts against `base` without its last axis; the base
            gets the rest.
        normaliser: `logsumexp` of the base's logits. The result is larger by it, as they are; nothing else is computed
            for that, as it is part of what scales each memory.

    Source: Memory Decoder, eq. 7 (arXiv:2508.09874); MLP Memory, eq. 7 (arXiv:2508.01832).
    """
    rest = 1.0 - sum(weights)
    rest = rest.clamp(min=0) if isinstance(rest, Tensor) else max(0.0, rest)
    counted = [(p, w) for p, w in zip(memories, weights, strict=True) if isinstance(w, Tensor) or w > 0]
    dense = [(part, _log(weight) + normaliser) for part, weight in counted if isinstance(part, Tensor)]
    if isinstance(rest, Tensor) or rest > 0:
        dense.insert(0, (base, _log(rest)))
    tracked = torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for pair in dense for tensor in pair
    )
    mixed = scaled = None
    for part, shift in dense:
        if mixed is None:
            mixed = part + shift
        elif tracked:
            mixed = torch.logaddexp(mixed, part + shift)
        else:
            scaled = torch.add(part, shift, out=scaled)
            torch.logaddexp(mixed, scaled, out=mixed)
    if mixed is None:
        mixed = torch.full_like(base, -math.inf)
    for part, weight in counted:
        if isinstance(part, SparseProbs):
            mixed = mixed.contiguous()
            _add_sparse(mixed, part, _log(weight) + normaliser)
    return mixed


def _log(weight: Weight) -> float | Tensor:
    return weight.log()[..., None] if isinstance(weight, Tensor) else math.log(weight)


def _add_sparse(mixed: Tensor, part: SparseProbs, shift: float | Tensor) -> None:
    """Add `exp(shift) * part` to the probabilities whose logarithms `mixed` holds, in place."""
    owner = torch.arange(len(part.counts), device=mixed.device).repeat_interleave(
        part.counts, output_size=len(part.ids)
    )
    if isinstance(shift, Tensor):
        shift = shift.expand(*mixed.shape[:-1], 1).reshape(-1)[owner]
    at = owner * mixed.shape[-1] + part.ids.long()
    flat = mixed.view(-1)
    flat[at] = torch.logaddexp(flat[at], part.probs.log() + shift)
