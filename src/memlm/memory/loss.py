"""The distillation loss: one cross-entropy against a sparse soft label, with the head's product inside.

`kl_weight * KL(q || p) + (1 - kl_weight) * CE(y)` equals `logsumexp(logits) - sum_s weight_s * logits[s]` less
`kl_weight * H(q)`, where the weights are `kl_weight * q + (1 - kl_weight) * onehot(y)`. So neither dense targets nor
dense logits ever exist: logits live for one tile of positions and tokens. Their gradient, softmax minus the sparse
label, is turned into gradients of hidden states and head at once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlm.models.heads import Head

_CPU_LOGITS = 2**20  # 4 MiB in float32: what is done to them after the product stays in the cache
_DEVICE_LOGITS = 2**26
_FEWEST_POSITIONS = 128  # with fewer, adding up gradients of the head takes as long as the products
_FEWEST_TOKENS = 384  # with fewer, adding up gradients of hidden states does
_FEW_TILES = 8  # up to which every tile looks at the whole label instead of its part of it


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
    tile: tuple[int, int] | None = None,
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
        tile: Positions and tokens whose logits exist at a time; None: by precision and device.

    Raises:
        ValueError: kl_weight is above 0 and there are no targets.

    Source: Memory Decoder, eq. 6 (arXiv:2508.09874); the fused form is design note 0004.
    """
    owner, ids = torch.arange(len(labels), dtype=torch.int32, device=labels.device), labels.int()
    q = torch.empty(0, device=labels.device)
    if kl_weight > 0:
        if target_counts is None or target_ids is None or target_probs is None:
            raise ValueError(f"kl_weight = {kl_weight} needs targets")
        owner = torch.cat([owner, owner.repeat_interleave(target_counts, output_size=len(target_ids))])
        ids = torch.cat([ids, target_ids.int()])
        q, of_targets = target_probs.float(), owner[len(labels) :]
        q = q / torch.zeros(len(labels), device=q.device).index_add_(0, of_targets, q)[of_targets]
    device = hidden.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    tile = tile or _tile(len(labels), vocab_size, dtype, device)
    soft, cross_entropy, target_score = _SparseCrossEntropy.apply(
        hidden, head.weight, head.bias, owner, ids, q, kl_weight, vocab_size, head.scale, head.softcap, dtype, tile
    )
    negative_entropy = torch.xlogy(q, q).sum()
    return DistillationLoss(
        loss=soft + kl_weight * negative_entropy,
        kl=(negative_entropy + target_score).detach(),
        cross_entropy=cross_entropy.detach(),
    )


def _tile(positions: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Positions and tokens of a tile.

    In half precision all positions and few tokens: logits are computed twice, but no gradient of the head is added up.
    In full precision, where products are slow, few positions and all tokens.
    """
    logits = _CPU_LOGITS if device.type == "cpu" else _DEVICE_LOGITS
    if dtype.itemsize > 2:
        return max(logits // vocab_size, _FEWEST_POSITIONS), vocab_size
    return max(positions, 1), max(logits // max(positions, 1), _FEWEST_TOKENS)


def _view(buffer: Tensor, size: Sequence[int]) -> Tensor:
    return buffer[: math.prod(size)].view(*size)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    if to.dtype == left.dtype:
        to.addmm_(left, right)
    else:
        to += left @ right


class _LabelTiles:
    """The entries of the sparse label, tile by tile.

    On the CPU they are sorted by tile. An accelerator has few tiles, and would have to be waited for to know where the
    entries of a tile end: there each tile looks at all of them.
    """

    def __init__(
        self, owner: Tensor, ids: Tensor, label: Tensor, shape: tuple[int, int], tile: tuple[int, int]
    ) -> None:
        """Position, token and weight of each entry, `(E,)`; positions and tokens of the whole, and of a tile."""
        self._owner, self._ids, self._label = owner, ids, label
        self.firsts, self.starts = range(0, shape[0], tile[0]), range(0, shape[1], tile[1])
        tiles = len(self.firsts) * len(self.starts)
        place = owner // tile[0] * len(self.starts) + ids // tile[1]
        self._edges: list[int] | None = None
        if owner.device.type == "cpu" and tiles > _FEW_TILES:
            self._order = place.argsort().int()
            bounds = torch.arange(tiles + 1, dtype=torch.int32)
            self._edges = torch.searchsorted(place[self._order], bounds).tolist()
        else:
            self._place = place

    def entries(
        self, group: int, part: int, size: tuple[int, int]
    ) -> tuple[Tensor | slice, Tensor, Tensor, Tensor | None]:
        """What concerns the tile of range `group` of positions and range `part` of tokens, which holds `size` of them.

        Returns:
            Numbers of entries; where each stands in the flattened tile; its weight; and whether it is there at all,
            None where all are. The weight of one that is not is 0.
        """
        number = group * len(self.starts) + part
        if self._edges is not None:
            entries = self._order[self._edges[number] : self._edges[number + 1]]
            at = (self._owner[entries].long() - self.firsts[group]) * size[1] + (self._ids[entries] - self.starts[part])
            return entries, at, self._label[entries], None
        at = (self._owner.long() - self.firsts[group]) * size[1] + (self._ids - self.starts[part])
        there = self._place == number
        at = torch.where(there, at, at.remainder(size[0] * size[1]))  # the others are spread, for each adds its 0
        return slice(None), at, self._label * there, there


class _SparseCrossEntropy(torch.autograd.Function):
    """Sum of `logsumexp - sum_s weight_s * logit_s`; gradients are formed in the forward pass, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (P, D)
        weight: Tensor,  # (V', D), V' >= vocab_size
        bias: Tensor | None,  # (V',)
        owner: Tensor,  # (P + S,) positions: each once, for its label, then those of the targets' tokens
        ids: Tensor,  # (P + S,) labels, then the targets' tokens; both int32, for they take what the label takes
        q: Tensor,  # (S,) sums to 1 per position
        kl_weight: float,
        vocab_size: int,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,  # of products
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        positions = len(hidden)
        label = torch.cat([torch.full((positions,), 1 - kl_weight, device=q.device), kl_weight * q])
        label_tiles = _LabelTiles(owner, ids, label, (positions, vocab_size), tile)
        starts = label_tiles.starts

        # made once: memory that is freed and asked for again costs a page fault per 4 KiB
        products = hidden.new_empty(min(tile[0], positions) * min(tile[1], vocab_size), dtype=dtype)
        floats = products if dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)

        def tiles(group: int, states: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Any, Tensor | None]]:
            """Rows of the head, themselves, their logits (G, C), the label's entries, the cap's slope."""
            for part, start in enumerate(starts):
                rows = slice(start, min(start + tile[1], vocab_size))
                table = weight[rows].to(dtype)  # (C, D)
                size = len(states), len(table)
                product = torch.mm(states, table.T, out=_view(products, size))  # (G, C)
                logits = product if floats is products else _view(floats, size).copy_(product)
                if bias is not None:
                    logits += bias[rows]
                if scale != 1.0:
                    logits *= scale
                if softcap is not None:
                    logits.div_(softcap).tanh_().mul_(softcap)
                slope = 1 - (logits / softcap) ** 2 if softcap is not None else None
                yield rows, table, logits, label_tiles.entries(group, part, size), slope

        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and want_bias else None
        scores = torch.zeros(len(ids), device=hidden.device)  # logits of the label's entries
        normaliser = torch.full((positions,), -torch.inf, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for group, first in enumerate(label_tiles.firsts):
                here = slice(first, first + tile[0])
                states = hidden[here].to(dtype)  # (G, D)
                kept = list(tiles(group, states)) if len(starts) == 1 else None
                for _, _, logits, (entries, at, _, there), _ in kept or tiles(group, states):
                    found = logits.view(-1)[at]
                    scores[entries] = found if there is None else torch.where(there, found, scores)
                    peak = logits.amax(1)
                    total = logits.sub_(peak[:, None]).exp_().sum(1)  # torch.logsumexp takes twice as long
                    normaliser[here] = torch.logaddexp(normaliser[here], total.log() + peak)
                if not (want_hidden or want_weight or want_bias):
                    continue
                for rows, table, logits, (_, at, weights, _), slope in kept or tiles(group, states):
                    # in place: softmax; what is kept are exponentials by now
                    grad = logits.div_(total[:, None]) if kept else logits.sub_(normaliser[here, None]).exp_()
                    grad.view(-1).index_add_(0, at, weights, alpha=-1)
                    if slope is not None:
                        grad *= slope
                    if scale != 1.0:
                        grad *= scale
                    if grad_bias is not None:
                        grad_bias[rows] += grad.sum(0)
                    grad = grad if floats is products else _view(products, grad.shape).copy_(grad)
                    if grad_hidden is not None:
                        _add_product(grad_hidden[here], grad, table)
                    if grad_weight is not None:
                        _add_product(grad_weight[rows], grad.T, states)
        surprise = normaliser[owner] - scores
        to_labels, to_targets = surprise[:positions].sum(), (q * surprise[positions:]).sum()
        ctx.gradients = (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(to_labels, to_targets)
        return kl_weight * to_targets + (1 - kl_weight) * to_labels, to_labels, to_targets

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g.mul_(outputs[0]) for g in ctx.gradients]
        ctx.gradients = None
        return (*gradients, *[None] * 9)
