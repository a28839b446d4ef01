"""What the loss does to a tile of logits, each as one Triton kernel: for accelerators that have Triton.

A program has one position of the tile. Logits stay in the precision of the product, and every one is read twice and
written once: first for the normaliser and the label's own logits, then to become its gradient in place.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_COLUMNS = 4096  # of a tile at a time
_ENTRIES = 128  # of the label at a time
_COMPARED = 64  # entries with as many others
_WARPS = 8


@triton.jit
def _logits(products, bias, scale, softcap, columns, there, has_bias: tl.constexpr, has_cap: tl.constexpr):
    """Logits in float32 of the head's products at some columns of a row."""
    found = tl.load(products + columns, mask=there, other=0.0).to(tl.float32)
    if has_bias:
        found += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)
    found *= scale
    if has_cap:
        found = softcap * (1 - 2 / (tl.exp(2 * found / softcap) + 1))  # tanh, which not every backend has
    return found


@triton.jit
def _read(
    products, bias, ids, label_ids, bounds, scores, label_scores, normaliser, first, start, size, scale, softcap,
    has_bias: tl.constexpr, has_cap: tl.constexpr, width: tl.constexpr, some: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    position = first + row
    products += row.to(tl.int64) * size
    peak, total = -float("inf"), 0.0
    for at in range(0, size, width):
        columns = at + tl.arange(0, width)
        there = columns < size
        logits = _logits(products, bias, scale, softcap, columns, there, has_bias, has_cap)
        logits = tl.where(there, logits, -float("inf"))
        above = tl.maximum(peak, tl.max(logits, 0))
        below = tl.where(above == -float("inf"), 0.0, above)
        total = total * tl.exp(peak - below) + tl.sum(tl.exp(logits - below), 0)
        peak = above
    before = tl.load(normaliser + position)
    above = tl.maximum(peak, before)
    below = tl.where(above == -float("inf"), 0.0, above)
    total = total * tl.exp(peak - below) + tl.exp(before - below)
    tl.store(normaliser + position, below + tl.log(total))

    label = tl.load(label_ids + position) - start
    inside = (label >= 0) & (label < size)
    own = _logits(products, bias, scale, softcap, label, inside, has_bias, has_cap)
    tl.store(label_scores + position, own, mask=inside)
    end = tl.load(bounds + position + 1)
    for at in range(tl.load(bounds + position), end, some):
        entries = at + tl.arange(0, some)
        tokens = tl.load(ids + entries, mask=entries < end, other=-1) - start
        held = (tokens >= 0) & (tokens < size) & (entries < end)
        found = _logits(products, bias, scale, softcap, tokens, held, has_bias, has_cap)
        tl.store(scores + entries, found, mask=held)


@triton.jit
def _merge(ids, label_ids, bounds, weights, label_weights, merged, label_merged, some: tl.constexpr):
    position = tl.program_id(0)
    label, own = tl.load(label_ids + position), tl.load(label_weights + position)
    begin, end = tl.load(bounds + position), tl.load(bounds + position + 1)
    of_label = own
    for at in range(begin, end, some):
        entries = at + tl.arange(0, some)
        tokens = tl.load(ids + entries, mask=entries < end, other=-1)
        weight = tl.load(weights + entries, mask=entries < end, other=0.0)
        of_label += tl.sum(tl.where(tokens == label, weight, 0.0), 0)
        total = tl.where(tokens == label, own, 0.0)
        for other in range(begin, end, some):
            others = other + tl.arange(0, some)
            those = tl.load(ids + others, mask=others < end, other=-2)
            theirs = tl.load(weights + others, mask=others < end, other=0.0)
            total += tl.sum(tl.where(tokens[:, None] == those[None, :], theirs[None, :], 0.0), 1)
        tl.store(merged + entries, total, mask=entries < end)
    tl.store(label_merged + position, of_label)


@triton.jit
def _gradient(logits, label, normaliser, mass, scale, softcap, has_cap: tl.constexpr):
    """Of products: `mass * softmax - label`, by the slope of what makes logits of them."""
    found = (mass * tl.exp(logits - normaliser) - label) * scale
    if has_cap:
        found *= 1 - (logits / softcap) * (logits / softcap)
    return found


@triton.jit
def _differentiate(
    products, bias, ids, label_ids, bounds, scores, label_scores, weights, label_weights, normaliser, masses,
    first, start, size, scale, softcap,
    has_bias: tl.constexpr, has_cap: tl.constexpr, has_mass: tl.constexpr,
    width: tl.constexpr, some: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    position = first + row
    products += row.to(tl.int64) * size
    below = tl.load(normaliser + position)
    mass = 1.0
    if has_mass:
        mass = tl.load(masses + position)
    for at in range(0, size, width):
        columns = at + tl.arange(0, width)
        there = columns < size
        logits = _logits(products, bias, scale, softcap, columns, there, has_bias, has_cap)
        found = _gradient(logits, 0.0, below, mass, scale, softcap, has_cap)
        tl.store(products + columns, found.to(products.dtype.element_ty), mask=there)
    tl.debug_barrier()  # what follows is written to the same places

    end = tl.load(bounds + position + 1)
    for at in range(tl.load(bounds + position), end, some):
        entries = at + tl.arange(0, some)
        tokens = tl.load(ids + entries, mask=entries < end, other=-1)
        weight = tl.load(weights + entries, mask=entries < end, other=0.0)
        scored = tl.load(scores + entries, mask=entries < end, other=0.0)
        wanted = _gradient(scored, weight, below, mass, scale, softcap, has_cap)
        held = (tokens >= start) & (tokens < start + size) & (entries < end)
        tl.store(products + (tokens - start), wanted.to(products.dtype.element_ty), mask=held)
    label, weight_of_label = tl.load(label_ids + position), tl.load(label_weights + position)
    last = _gradient(tl.load(label_scores + position), weight_of_label, below, mass, scale, softcap, has_cap)
    inside = (label >= start) & (label < start + size)
    tl.store(products + (label - start), last.to(products.dtype.element_ty), mask=inside)


def _run(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    kernel[(programs,)](*arguments, **settings)


class TileKernels:
    """Both walks over tiles, for one label of `P` positions whose other entries stand position by position."""

    def __init__(self, ids: Tensor, counts: Tensor | None, positions: int, scale: float, softcap: float | None) -> None:
        """
        Args:
            ids: `(P + S,)` labels, then the targets' tokens.
            counts: `(P,)` tokens of each target; None: there are none.
            scale: Logits are `softcap * tanh((products + bias) * scale / softcap)`, or without a cap the inner part.
        """
        self._positions = positions
        self._labels, self._ids = self._parts(ids)
        self._bounds = torch.zeros(positions + 1, dtype=torch.int64, device=ids.device)
        if counts is not None:
            torch.cumsum(counts, 0, out=self._bounds[1:])
        self._shared: dict[str, Any] = {
            "scale": scale,
            "softcap": softcap or 1.0,
            "has_cap": softcap is not None,
            "width": _COLUMNS,
            "some": _ENTRIES,
            "num_warps": _WARPS,
        }

    def _parts(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Those of labels, and those of targets."""
        return entries[: self._positions], entries[self._positions :]

    def read(
        self, products: Tensor, bias: Tensor | None, scores: Tensor, normaliser: Tensor, *, first: int, start: int
    ) -> None:
        """Take a tile into account: `scores` of entries that it holds, and `normaliser`, the log of the sum so far.

        Args:
            products: `(G, C)` of positions from `first` and tokens from `start` on.
            bias: `(C,)`.
            scores: `(P + S,)` float32.
            normaliser: `(P,)` float32.
        """
        own, others = self._parts(scores)
        _run(
            _read, len(products),
            products, bias, self._ids, self._labels, self._bounds, others, own, normaliser,
            first, start, products.shape[1], has_bias=bias is not None, **self._shared,
        )  # fmt: skip

    def merged(self, weights: Tensor) -> Tensor:
        """`(P + S,)` for each entry the weights of all entries of its position and token, for it is written once."""
        found = torch.empty_like(weights)
        (own, others), (own_merged, others_merged) = self._parts(weights), self._parts(found)
        if self._positions:
            _run(
                _merge, self._positions,
                self._ids, self._labels, self._bounds, others, own, others_merged, own_merged, some=_COMPARED,
            )  # fmt: skip
        return found

    def differentiate_(
        self,
        products: Tensor,
        bias: Tensor | None,
        scores: Tensor,
        normaliser: Tensor,
        weights: Tensor,
        mass: Tensor | None,
        *,
        first: int,
        start: int,
    ) -> None:
        """Turn the products of a tile into their gradient.

        Args:
            weights: `(P + S,)` as merged.
            mass: `(P,)` what they sum up to at a position; None: 1.
        """
        (own, others), (own_weights, others_weights) = self._parts(scores), self._parts(weights)
        _run(
            _differentiate, len(products),
            products, bias, self._ids, self._labels, self._bounds, others, own, others_weights, own_weights,
            normaliser, mass, first, start, products.shape[1],
            has_bias=bias is not None, has_mass=mass is not None, **self._shared,
        )  # fmt: skip
