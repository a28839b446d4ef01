"""The distillation loss: one cross-entropy against a sparse soft label, with the head's product inside.

`kl_weight * KL(q || p) + (1 - kl_weight) * CE(y)` equals `logsumexp(logits) - sum_s weight_s * logits[s]` less
`kl_weight * H(q)`, where the weights are `kl_weight * q + (1 - kl_weight) * onehot(y)`. So neither dense targets nor
dense logits ever exist: logits live for one tile of positions and tokens. Their gradient, softmax minus the sparse
label, is turned into gradients of hidden states and head at once.

The mixture's likelihood has the same soft label, and for its gradient each weight is scaled by the memory's part of
the mixture at that token, `r_s = c p(s) / ((1 - c) p_base(s) + c p(s))`, known once the normaliser is.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlm.models.heads import Head

_CPU_LOGITS = 2**20  # 4 MiB in float32: what is done to them after the product stays in the cache
_DEVICE_LOGITS = 2**28  # every tile is some hundred launches
_KERNEL_LOGITS = 2**25  # or ten, where each is one kernel; 64 MiB in half precision
KERNEL_DEVICES: tuple[str, ...] = ("cuda",)
_FEWEST_POSITIONS = 128  # with fewer, adding up gradients of the head takes as long as the products
_FEWEST_TOKENS = 1024  # with fewer, adding up gradients of hidden states does
_CPU_WIDENED = 2**18  # of a tile in half precision, as many logits at a time are float32
_FEW_TILES = 8  # up to which every tile looks at the whole label instead of its part of it

_ADDS_WIDENED = hasattr(torch.ops.aten.addmm, "dtype_out")  # products of half precision, added up in float32


@dataclass(frozen=True)
class DistillationLoss:
    """Sums over positions, in nats; divide by the number of positions for a mean."""

    loss: Float[Tensor, ""]
    """`kl_weight * kl + (1 - kl_weight) * cross_entropy`, or of the mixture; carries the gradient."""
    kl: Float[Tensor, ""]
    """KL from the targets to the memory; 0 where there are no targets."""
    cross_entropy: Float[Tensor, ""]
    """Of the labels."""
    mixture: Float[Tensor, ""]
    """Cross-entropy of the labels under the mixture with the base; 0 where there is none."""


@dataclass(frozen=True)
class Beside:
    """The base that a memory stands beside, where it is trained through the mixture `(1 - c) p_base + c p`."""

    of_labels: Float[Tensor, "P"]
    """The base's log-probs of the labels."""
    of_targets: Float[Tensor, "S"] | None
    """Its log-probs of the targets' tokens; None where there are none."""
    confidence: Float[Tensor, "P"]
    """Logits of c; carry a gradient."""
    share: float
    """Share of the mixture in the loss, in [0, 1]; the memory alone has the rest."""


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
    beside: Beside | None = None,
    tile: tuple[int, int] | tuple[int, int, int] | None = None,
) -> DistillationLoss:
    """KL to sparse targets plus cross-entropy of the labels, summed over positions.

    With `beside` the loss is `-sum_s w_s ((1 - share) log p(s) + share log((1 - c) p_base(s) + c p(s)))` less
    `kl_weight * H(q)`, with the same weights `w = kl_weight * q + (1 - kl_weight) * onehot(y)`.

    Args:
        hidden: What the head reads. Under autocast the head's products run in autocast's dtype, the rest in float32.
        labels: Ids in `[0, vocab_size)`.
        kl_weight: Weight of the KL in [0, 1]; β in Memory Decoder, α in MLP Memory. At 0 targets are not needed.
        vocab_size: Rows of the head beyond it are padding and take no part.
        target_counts: Support of each position's target, at least 1.
        target_ids: Tokens of all targets, one position after another.
        target_probs: Their probabilities; renormalised here, for float16 storage rounds them.
        beside: The base in the mixture that is trained; None: the memory alone is.
        tile: Positions and tokens whose logits exist at a time, and in half precision, of how many of these positions
            they are float32 at a time; None: by precision and device.

    Raises:
        ValueError: kl_weight is above 0 and there are no targets, or the base's log-probs of them are missing.

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
    confidence, of_base, share = None, None, 0.0
    if beside is not None:
        told = [beside.of_labels.float()]
        if len(q):
            if beside.of_targets is None:
                raise ValueError(f"kl_weight = {kl_weight} needs the base's log-probs of the targets' tokens")
            told.append(beside.of_targets.float())
        confidence, of_base, share = beside.confidence.float(), torch.cat(told), beside.share
    device = hidden.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    label = torch.cat([torch.full((len(labels),), 1 - kl_weight, device=q.device), kl_weight * q])
    loss, log_probs, mixed = _SparseCrossEntropy.apply(
        hidden,
        head.weight,
        head.bias,
        confidence,
        _SparseLabel(owner, ids, label, target_counts if kl_weight > 0 else None, of_base, share),
        _Output(vocab_size, head.scale, head.softcap, dtype, *_cut(tile, len(labels), vocab_size, dtype, device)),
    )
    negative_entropy = torch.xlogy(q, q).sum()
    return DistillationLoss(
        loss=loss + kl_weight * negative_entropy,
        kl=negative_entropy - (q * log_probs[len(labels) :]).sum(),
        cross_entropy=-log_probs[: len(labels)].sum(),
        mixture=-mixed[: len(labels)].sum(),
    )


def _cut(
    tile: tuple[int, ...] | None, positions: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, int], int]:
    """Positions and tokens of a tile, and of how many of these positions logits are float32 at a time."""
    at_once, tokens, *run = tile or _tile(positions, vocab_size, dtype, device)
    if not run:
        half_on_cpu = dtype.itemsize <= 2 and device.type == "cpu"
        run = [max(1, _CPU_WIDENED // min(tokens, vocab_size)) if half_on_cpu else at_once]
    whole = at_once >= positions or at_once % run[0] == 0  # runs are counted through all tiles
    return (at_once, tokens), min(run[0], at_once) if whole and dtype.itemsize <= 2 else at_once


def _tile(positions: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Positions and tokens of a tile.

    In half precision all positions and few tokens: logits are computed twice, but no gradient of the head is added up.
    In full precision, where products are slow, few positions and all tokens.
    """
    logits, step = _CPU_LOGITS if device.type == "cpu" else _DEVICE_LOGITS, 1
    if has_kernels(device.type):
        logits, step = _KERNEL_LOGITS * 2 // dtype.itemsize, 128  # rows that begin where loads are aligned
    if dtype.itemsize > 2:
        return max(logits // vocab_size, _FEWEST_POSITIONS), vocab_size
    return max(positions, 1), max(logits // max(positions, 1) // step * step, _FEWEST_TOKENS)


@cache
def has_kernels(device: str) -> bool:
    """Whether what is done to a tile on devices of this type can be kernels of Triton; one is tried."""
    if device not in KERNEL_DEVICES or find_spec("triton") is None:
        return False
    try:
        from memlm.memory.loss_kernels import TileKernels

        one = torch.ones(1, device=device)
        return TileKernels(one.int(), None, 1, 1.0, None).merged(one).item() == 1
    except Exception as error:  # Triton has many reasons, such as no C compiler
        reason = str(error).partition("\n")[0][:200]
        warnings.warn(f"Triton does not run here, so the loss takes longer: {reason}", stacklevel=2)
        return False


def _view(buffer: Tensor, size: Sequence[int]) -> Tensor:
    return buffer[: math.prod(size)].view(*size)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    if to.dtype == left.dtype:
        to.addmm_(left, right)
    elif to.is_cuda and left.dtype.itemsize == 2 and _ADDS_WIDENED:
        torch.addmm(to, left, right, out_dtype=to.dtype, out=to)
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
        self._owner, self._ids, self.label = owner, ids, label
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

    def entries(self, group: int, part: int, size: tuple[int, int]) -> tuple[Tensor | slice, Tensor, Tensor | None]:
        """What concerns the tile of range `group` of positions and range `part` of tokens, which holds `size` of them.

        Returns:
            Numbers of entries; where each stands in the flattened tile; and whether it is there at all, None where
            all are.
        """
        number = group * len(self.starts) + part
        if self._edges is not None:
            entries = self._order[self._edges[number] : self._edges[number + 1]]
            at = (self._owner[entries].long() - self.firsts[group]) * size[1] + (self._ids[entries] - self.starts[part])
            return entries, at, None
        at = (self._owner.long() - self.firsts[group]) * size[1] + (self._ids - self.starts[part])
        there = self._place == number
        at = torch.where(there, at, at.remainder(size[0] * size[1]))  # the others are spread, for each adds its 0
        return slice(None), at, there

    def weights(self, entries: Tensor | slice, there: Tensor | None) -> Tensor:
        """Of these entries; 0 for one that is not there."""
        return self.label[entries] if there is None else self.label * there

    def of_groups(self, first: int, end: int) -> Tensor | slice:
        """Numbers of the entries of some ranges of positions; of others too where they are not sorted."""
        if self._edges is None:
            return slice(None)
        return self._order[self._edges[first * len(self.starts)] : self._edges[end * len(self.starts)]]


@dataclass(frozen=True)
class _SparseLabel:
    """What the loss wants, entry by entry."""

    owner: Tensor
    """`(P + S,)` positions: each once, for its label, then those of the targets' tokens."""
    ids: Tensor
    """`(P + S,)` labels, then the targets' tokens; both int32, for they take what the label takes."""
    weights: Tensor
    """`(P + S,)`; they sum to 1 per position."""
    counts: Tensor | None
    """`(P,)` tokens of each target; None: there are none."""
    of_base: Tensor | None
    """`(P + S,)` the base's log-probs; None: there is no mixture."""
    share: float
    """Of the mixture in the loss."""


@dataclass(frozen=True)
class _Output:
    """How logits are made."""

    vocab_size: int
    scale: float
    softcap: float | None
    dtype: torch.dtype
    """Of products."""
    tile: tuple[int, int]
    run: int
    """Positions of a tile whose logits are float32 at a time."""


class _Given(NamedTuple):
    """What gradients are of."""

    hidden: Tensor
    """`(P, D)`."""
    weight: Tensor
    """`(V', D)`."""
    bias: Tensor | None
    """`(V',)`."""
    confidence: Tensor | None
    """`(P,)` logits."""


class _Gradients:
    """Those of hidden states, head and bias, added up tile by tile in float32; None where one is not wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]) -> None:
        self._like = (hidden, weight, bias)
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and want else None
            for tensor, want in zip(self._like, wanted, strict=True)
        )
        self.any = any(wanted)

    def add(self, here: slice, rows: slice, gradient: Tensor, states: Tensor, table: Tensor) -> None:
        """Those of a tile's products `states @ table.T`, (G, C), for positions `here` and `rows` of the head."""
        if self.hidden is not None:
            _add_product(self.hidden[here], gradient, table)
        if self.weight is not None:
            _add_product(self.weight[rows], gradient.T, states)

    def finished(self) -> tuple[Tensor | None, ...]:
        """In the precision of what they are of."""
        found = (self.hidden, self.weight, self.bias)
        return tuple(
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(found, self._like, strict=True)
        )


def _reweighed(
    sparse: _SparseLabel, confidence: Tensor, scores: Tensor, normaliser: Tensor, entries: Tensor | slice
) -> tuple[Tensor, Tensor]:
    """Weights of entries by their part of the mixture, and their sum at each position, `(P,)`."""
    part_of_mixture = _part_of_mixture(sparse, confidence, scores, normaliser, entries)
    weights = sparse.weights[entries] * (1 - sparse.share + sparse.share * part_of_mixture)
    return weights, torch.zeros_like(normaliser).index_add_(0, sparse.owner[entries], weights)


def _walk(given: _Given, sparse: _SparseLabel, output: _Output, gradients: _Gradients) -> tuple[Tensor, Tensor]:
    """The label's logits and every position's normaliser; gradients are added up on the way."""
    hidden, weight, bias, confidence = given
    positions, owner, dtype = len(hidden), sparse.owner, output.dtype
    (at_once, tokens), run, vocab_size, softcap = output.tile, output.run, output.vocab_size, output.softcap
    label = sparse.weights if confidence is None else sparse.weights.clone()
    label_tiles = _LabelTiles(owner, sparse.ids, label, (positions, vocab_size), (run, tokens))
    starts = label_tiles.starts

    # made once: memory that is freed and asked for again costs a page fault per 4 KiB
    products = hidden.new_empty(min(at_once, positions) * min(tokens, vocab_size), dtype=dtype)
    in_place = dtype == torch.float32
    floats = (
        products if in_place else hidden.new_empty(min(run, positions) * min(tokens, vocab_size), dtype=torch.float32)
    )

    def parts(states: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Number and rows of a range of tokens, these rows of the head, and their products (G, C)."""
        for part, start in enumerate(starts):
            rows = slice(start, min(start + tokens, vocab_size))
            table = weight[rows].to(dtype)  # (C, D)
            yield part, rows, table, torch.mm(states, table.T, out=_view(products, (len(states), len(table))))

    def runs(first: int, count: int) -> Iterator[tuple[int, slice, slice]]:
        """Number of a run of positions, and where they are, of all and of the group's `count` from `first` on."""
        for begin in range(0, count, run):
            end = min(begin + run, count)
            yield (first + begin) // run, slice(first + begin, first + end), slice(begin, end)

    def logits_of(product: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Logits (R, C) of a run, and the cap's slope."""
        logits = product if in_place else _view(floats, product.shape).copy_(product)
        if bias is not None:
            logits += bias[rows]
        if output.scale != 1.0:
            logits *= output.scale
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        return logits, 1 - (logits / softcap) ** 2 if softcap is not None else None

    scores = torch.zeros(len(owner), device=hidden.device)  # logits of the label's entries
    normaliser = torch.full((positions,), -torch.inf, device=hidden.device)
    for first in range(0, positions, at_once):
        here = slice(first, min(first + at_once, positions))
        states = hidden[here].to(dtype)  # (G, D)
        kept = (
            None  # of full precision, whose tiles have all tokens: the head, exponentials, their sum, the cap's slope
        )
        for part, rows, table, product in parts(states):
            for number, where, within in runs(first, len(states)):
                logits, slope = logits_of(product[within], rows)
                entries, at, there = label_tiles.entries(number, part, (len(logits), logits.shape[1]))
                found = logits.view(-1)[at]
                scores[entries] = found if there is None else torch.where(there, found, scores)
                peak = logits.amax(1)
                total = logits.sub_(peak[:, None]).exp_().sum(1)  # torch.logsumexp takes twice as long
                normaliser[where] = torch.logaddexp(normaliser[where], total.log() + peak)
                if in_place and len(starts) == 1:
                    kept = table, product, total[:, None], slope
        if not gradients.any:
            continue
        mass = None  # of a position's entries; 1 where no mixture weighs them anew
        if confidence is not None:
            entries = label_tiles.of_groups(first // run, -(-here.stop // run))
            weights, mass = _reweighed(sparse, confidence, scores, normaliser, entries)
            label_tiles.label[entries] = weights
            mass = mass[:, None]
        for part, rows, table, product in parts(states) if kept is None else [(0, slice(0, vocab_size), *kept[:2])]:
            for number, where, within in runs(first, len(states)):
                # in place: softmax times mass
                if kept is not None:
                    *_, total, slope = kept
                    grad = product.div_(total if mass is None else total / mass[where])
                else:
                    grad, slope = logits_of(product[within], rows)
                    below = normaliser[where, None]
                    grad.sub_(below if mass is None else below - mass[where].log()).exp_()
                entries, at, there = label_tiles.entries(number, part, (len(grad), grad.shape[1]))
                grad.view(-1).index_add_(0, at, label_tiles.weights(entries, there), alpha=-1)
                if slope is not None:
                    grad *= slope
                if output.scale != 1.0:
                    grad *= output.scale
                if gradients.bias is not None:
                    gradients.bias[rows] += grad.sum(0)
                if not in_place:
                    product[within] = grad
            gradients.add(here, rows, product, states, table)
    return scores, normaliser


def _walk_by_kernels(
    given: _Given, sparse: _SparseLabel, output: _Output, gradients: _Gradients
) -> tuple[Tensor, Tensor]:
    """The same where Triton runs: what is done to a tile between the products is one kernel, on the products."""
    from memlm.memory.loss_kernels import TileKernels

    hidden, weight, bias, confidence = given
    positions, (rows_at_once, tokens), dtype = len(hidden), output.tile, output.dtype
    kernels = TileKernels(sparse.ids, sparse.counts, positions, output.scale, output.softcap)
    starts = range(0, output.vocab_size, tokens)
    buffer = hidden.new_empty(min(rows_at_once, positions) * min(tokens, output.vocab_size), dtype=dtype)
    scores = torch.zeros(len(sparse.owner), device=hidden.device)
    normaliser = torch.full((positions,), -torch.inf, device=hidden.device)
    for first in range(0, positions, rows_at_once):
        here = slice(first, first + rows_at_once)
        states = hidden[here].to(dtype)

        def products(start: int, states: Tensor = states) -> tuple[slice, Tensor, Tensor]:
            rows = slice(start, min(start + tokens, output.vocab_size))
            table = weight[rows].to(dtype)
            return rows, table, torch.mm(states, table.T, out=_view(buffer, (len(states), len(table))))

        last = None
        for start in starts:
            rows, table, found = last = products(start)
            kernels.read(found, None if bias is None else bias[rows], scores, normaliser, first=first, start=start)
        if not gradients.any:
            continue
        weights, mass = sparse.weights, None
        if confidence is not None:  # those of positions that have not been read are not used
            weights, mass = _reweighed(sparse, confidence, scores, normaliser, slice(None))
        weights = kernels.merged(weights)
        for start in starts:
            rows, table, found = last if last is not None and len(starts) == 1 else products(start)
            kernels.differentiate_(
                found, None if bias is None else bias[rows], scores, normaliser, weights, mass, first=first, start=start
            )
            if gradients.bias is not None:
                gradients.bias[rows] += found.sum(0, dtype=torch.float32)
            gradients.add(here, rows, found, states, table)
    return scores, normaliser


class _SparseCrossEntropy(torch.autograd.Function):
    """Sum of `-weight_s * log p(s)`, or of the mixture; gradients are formed in the forward pass, tile by tile.

    Beside the sum it gives the memory's log-probs at all entries, and the mixture's, `(P + S,)`, or none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (P, D)
        weight: Tensor,  # (V', D), V' >= vocab_size
        bias: Tensor | None,  # (V',)
        confidence: Tensor | None,  # (P,) logits
        sparse: _SparseLabel,
        output: _Output,
    ) -> tuple[Tensor, Tensor, Tensor]:
        owner = sparse.owner
        *wanted, want_confidence = ctx.needs_input_grad[:4]
        gradients = _Gradients(hidden, weight, bias, wanted)
        walk = _walk_by_kernels if has_kernels(hidden.device.type) else _walk
        with torch.autocast(hidden.device.type, enabled=False):
            scores, normaliser = walk(_Given(hidden, weight, bias, confidence), sparse, output, gradients)
        log_probs, mixed = scores - normaliser[owner], scores.new_zeros(0)
        loss, grad_confidence = -(sparse.weights * log_probs).sum(), None
        if confidence is not None:
            assert sparse.of_base is not None
            log_c, log_rest = (torch.nn.functional.logsigmoid(sign * confidence)[owner] for sign in (1, -1))
            mixed = torch.logaddexp(log_rest + sparse.of_base, log_c + log_probs)
            loss = (1 - sparse.share) * loss - sparse.share * (sparse.weights * mixed).sum()
            if want_confidence:
                part_of_mixture = _part_of_mixture(sparse, confidence, scores, normaliser, slice(None))
                claimed = torch.zeros_like(confidence).index_add_(0, owner, sparse.weights * part_of_mixture)
                grad_confidence = sparse.share * (confidence.sigmoid() - claimed)
        ctx.gradients = (*gradients.finished(), grad_confidence)
        ctx.mark_non_differentiable(log_probs, mixed)
        return loss, log_probs, mixed

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g.mul_(outputs[0]) for g in ctx.gradients]
        ctx.gradients = None
        return (*gradients, None, None)


def _part_of_mixture(
    sparse: _SparseLabel, confidence: Tensor, scores: Tensor, normaliser: Tensor, entries: Tensor | slice
) -> Tensor:
    """Which part of the mixture's probability of each entry's token is the memory's."""
    assert sparse.of_base is not None
    owner = sparse.owner[entries]
    return torch.sigmoid(confidence[owner] + scores[entries] - normaliser[owner] - sparse.of_base[entries])
