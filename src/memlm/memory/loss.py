"""The distillation loss: one cross-entropy against a sparse soft label, with the head's product inside.

`kl_weight * KL(q || p) + (1 - kl_weight) * CE(y)` equals `logsumexp(logits) - sum_s weight_s * logits[s]` less
`kl_weight * H(q)`, where the weights are `kl_weight * q + (1 - kl_weight) * onehot(y)`. So neither dense targets nor
dense logits ever exist: logits live for one chunk of the vocabulary. A first pass over the chunks finds the normaliser
of every position; a second computes the logits again and turns their gradient, softmax minus the sparse label, into
gradients of hidden states and head at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlm.models.heads import Head

_CPU_LOGITS = 2**20  # 4 MiB in float32: what is done to them after the product stays in the cache
_DEVICE_LOGITS = 2**26
_NARROWEST = 512  # narrower chunks spend their time on adding up gradients of hidden states


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
    chunk: int | None = None,
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
        chunk: Tokens of the vocabulary whose logits exist at a time; None: by the number of positions and the device.

    Raises:
        ValueError: kl_weight is above 0 and there are no targets.

    Source: Memory Decoder, eq. 6 (arXiv:2508.09874); the fused form is design note 0004.
    """
    positions = torch.arange(len(labels), device=labels.device)
    owner, ids, q = positions, labels, torch.empty(0, device=labels.device)
    if kl_weight > 0:
        if target_counts is None or target_ids is None or target_probs is None:
            raise ValueError(f"kl_weight = {kl_weight} needs targets")
        of_targets = positions.repeat_interleave(target_counts)
        q = target_probs.float()
        q = q / torch.zeros(len(labels), device=q.device).index_add_(0, of_targets, q)[of_targets]
        owner, ids = torch.cat([owner, of_targets]), torch.cat([ids, target_ids])
    soft, cross_entropy, target_score = _SparseCrossEntropy.apply(
        hidden,
        head.weight,
        head.bias,
        owner,
        ids,
        q,
        kl_weight,
        vocab_size,
        head.scale,
        head.softcap,
        chunk or _chunk_size(len(labels), hidden.device),
    )
    negative_entropy = torch.xlogy(q, q).sum()
    return DistillationLoss(
        loss=soft + kl_weight * negative_entropy,
        kl=(negative_entropy + target_score).detach(),
        cross_entropy=cross_entropy.detach(),
    )


def _chunk_size(positions: int, device: torch.device) -> int:
    logits = _CPU_LOGITS if device.type == "cpu" else _DEVICE_LOGITS
    return max(logits // max(positions, 1), _NARROWEST)


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
        owner: Tensor,  # (P + S,) positions: each once, for its label, then those of the targets' tokens
        ids: Tensor,  # (P + S,) labels, then the targets' tokens
        q: Tensor,  # (S,) sums to 1 per position
        kl_weight: float,
        vocab_size: int,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _product_dtype(hidden)
        states, positions = hidden.to(dtype), len(hidden)
        starts = range(0, vocab_size, chunk)
        order = ids.argsort()  # so that the entries of a chunk stand together
        edges = torch.searchsorted(ids[order], torch.tensor([*starts, vocab_size], device=ids.device)).tolist()

        def chunks() -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
            for number, start in enumerate(starts):
                rows = slice(start, min(start + chunk, vocab_size))
                table = weight[rows].to(dtype)  # (C, D)
                logits = (states @ table.T).float()  # (P, C)
                if bias is not None:
                    logits += bias[rows]
                if scale != 1.0:
                    logits *= scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                entries = order[edges[number] : edges[number + 1]]
                yield rows, table, logits, entries, owner[entries] * logits.shape[1] + (ids[entries] - start)

        with torch.autocast(hidden.device.type, enabled=False):
            normaliser = torch.full((positions,), -torch.inf, device=hidden.device)
            scores = torch.empty(len(ids), device=hidden.device)
            for _, _, logits, entries, at in chunks():
                normaliser = torch.logaddexp(normaliser, logits.logsumexp(1))
                scores[entries] = logits.view(-1)[at]
            surprise = normaliser[owner] - scores
            to_labels, to_targets = surprise[:positions].sum(), (q * surprise[positions:]).sum()
            soft = kl_weight * to_targets + (1 - kl_weight) * to_labels

            want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
            grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if want_hidden else None
            grad_weight = torch.zeros_like(weight) if want_weight else None
            grad_bias = torch.zeros_like(bias) if bias is not None and want_bias else None
            label = torch.cat([torch.full((positions,), 1 - kl_weight, device=q.device), kl_weight * q])
            for rows, table, logits, entries, at in chunks() if want_hidden or want_weight or want_bias else ():
                slope = 1 - (logits / softcap) ** 2 if softcap is not None else None
                grad = logits.sub_(normaliser[:, None]).exp_()  # in place: softmax
                grad.view(-1).index_add_(0, at, label[entries], alpha=-1)
                if slope is not None:
                    grad *= slope
                if scale != 1.0:
                    grad *= scale
                if grad_bias is not None:
                    grad_bias[rows] = grad.sum(0)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden += grad @ table
                if grad_weight is not None:
                    grad_weight[rows] = grad.T @ states
        ctx.gradients = (None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias)
        ctx.mark_non_differentiable(to_labels, to_targets)
        return soft, to_labels, to_targets

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g.mul_(outputs[0]) for g in ctx.gradients]
        ctx.gradients = None
        return (*gradients, *[None] * 8)
