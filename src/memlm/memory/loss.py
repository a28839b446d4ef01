"""The distillation loss: one cross-entropy against a sparse soft label, with the head's product inside.

`kl_weight * KL(q || p) + (1 - kl_weight) * CE(y)` equals `logsumexp(logits) - sum_s weight_s * logits[s]` less
`kl_weight * H(q)`, where the weights are `kl_weight * q + (1 - kl_weight) * onehot(y)`. So neither dense targets nor
dense logits of all positions ever exist: logits live for one chunk of positions, and their gradient, softmax minus the
sparse label, is turned into gradients of hidden states and head at once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlm.models.heads import Head

CHUNK_POSITIONS = 1024


@dataclass(frozen=True)
class DistillationLoss:
    """Sums over positions, in nats; divide by the number of positions for a mean."""

    loss: Float[Tensor, ""]
    """`kl_weight * kl + (1 - kl_weight) * cross_entropy`; carries the gradient."""
    kl: Float[Tensor, ""]
    """KL from the targets to the memory; 0 where there are no targets."""
    cross_entropy: Float[Tensor, ""]
    """Of the labels."""


def distillation_loss(
    hidden: Float[Tensor, "P D"],
    labels: Int[Tensor, "P"],
    head: Head,
    *,
    kl_weight: float,
    vocab_size: int,
    target_counts: Int[Tensor, "P"] | None = None,
    target_ids: Int[Tensor, "S"] | None = None,
    target_probs: Float[Tensor, "S"] | None = None,
    chunk: int = CHUNK_POSITIONS,
) -> DistillationLoss:
    """KL to sparse targets plus cross-entropy of the labels, summed over positions.

    Args:
        hidden: What the head reads. Under autocast the head's products run in autocast's dtype, the rest in float32.
        labels: Ids in `[0, vocab_size)`.
        kl_weight: Weight of the KL in [0, 1]; β in Memory Decoder, α in MLP Memory. At 0 targets are not needed.
        vocab_size: Rows of the head beyond it are padding and take no part.
        target_counts: Support of each position's target, at least 1.
        target_ids: Tokens of all targets, one position after another.
        target_probs: Their probabilities; renormalised here, for float16 storage rounds them.
        chunk: Positions whose logits exist at a time.

    Raises:
        ValueError: kl_weight is above 0 and there are no targets.

    Source: Memory Decoder, eq. 6 (arXiv:2508.09874); the fused form is design note 0004.
    """
    positions = torch.arange(len(labels), device=labels.device)
    if kl_weight > 0:
        if target_counts is None or target_ids is None or target_probs is None:
            raise ValueError(f"kl_weight = {kl_weight} needs targets")
        owner = positions.repeat_interleave(target_counts)
        q = target_probs.float()
        q = q / torch.zeros(len(labels), device=q.device).index_add_(0, owner, q)[owner]
        negative_entropy = torch.xlogy(q, q).sum()
    else:
        owner, target_ids, q = positions[:0], labels[:0], hidden.new_zeros(0, dtype=torch.float32)
        negative_entropy = q.sum()
    soft, cross_entropy, target_score = _SparseCrossEntropy.apply(
        hidden,
        head.weight,
        head.bias,
        labels,
        owner,
        target_ids,
        q,
        kl_weight,
        vocab_size,
        head.scale,
        head.softcap,
        chunk,
    )
    kl = negative_entropy + target_score if kl_weight > 0 else target_score
    return DistillationLoss(
        loss=soft + kl_weight * negative_entropy, kl=kl.detach(), cross_entropy=cross_entropy.detach()
    )


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _SparseCrossEntropy(torch.autograd.Function):
    """Sum of `logsumexp - sum_s weight_s * logit_s`; gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (P, D)
        weight: Tensor,  # (V', D), V' >= vocab_size
        bias: Tensor | None,  # (V',)
        labels: Tensor,  # (P,)
        owner: Tensor,  # (S,) ascending positions
        target_ids: Tensor,  # (S,)
        q: Tensor,  # (S,) sums to 1 per position
        kl_weight: float,
        vocab_size: int,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _product_dtype(hidden)
        table = weight[:vocab_size].to(dtype)  # (V, D)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias and bias is not None else None
        soft, label_score, target_score = (torch.zeros((), device=hidden.device) for _ in range(3))
        edges = torch.searchsorted(owner, torch.arange(0, len(labels) + chunk, chunk, device=owner.device)).tolist()

        with torch.autocast(hidden.device.type, enabled=False):
            for number, start in enumerate(range(0, len(labels), chunk)):
                rows = hidden[start : start + chunk].to(dtype)  # (C, D)
                logits = (rows @ table.T).float()  # (C, V)
                if bias is not None:
                    logits += bias[:vocab_size]
                if scale != 1.0:
                    logits *= scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                places = torch.arange(len(rows), device=rows.device) * vocab_size
                label_at = places + labels[start : start + chunk]
                span = slice(edges[number], edges[number + 1])
                target_at = places[owner[span] - start] + target_ids[span].long()
                flat = logits.view(-1)
                at_labels, at_targets = flat[label_at].sum(), (q[span] * flat[target_at]).sum()
                wanted = want_hidden or want_weight or want_bias
                slope = 1 - (logits / softcap) ** 2 if softcap is not None and wanted else None
                peak = logits.amax(1, keepdim=True)
                total = logits.sub_(peak).exp_().sum(1, keepdim=True)  # in place: `logits` now holds exponentials
                normaliser = (total.log() + peak).sum()
                to_labels = normaliser - at_labels
                to_targets = normaliser - at_targets if kl_weight > 0 else 0.0
                soft += kl_weight * to_targets + (1 - kl_weight) * to_labels
                label_score += to_labels
                target_score += to_targets
                if not wanted:
                    continue
                grad = logits.div_(total)  # (C, V) softmax
                grad_flat = grad.view(-1)
                grad_flat.index_add_(0, label_at, torch.full_like(label_at, kl_weight - 1, dtype=grad.dtype))
                if kl_weight > 0:
                    grad_flat.index_add_(0, target_at, -kl_weight * q[span])
                if slope is not None:
                    grad *= slope
                if scale != 1.0:
                    grad *= scale
                if grad_bias is not None:
                    grad_bias[:vocab_size] += grad.sum(0)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + chunk] = (grad @ table).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight[:vocab_size] += grad.T @ rows
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(label_score, target_score)
        return soft, label_score, target_score

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g.mul_(outputs[0]) for g in ctx.gradients]
        ctx.gradients = None
        return (*gradients, *[None] * 9)
