"""Mixtures computed from scores, and the weights that are best for them."""

from collections.abc import Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from memlm.errors import ModelError

LabelLogProbs = NDArray[np.float32] | NDArray[np.float64]
GRID = np.linspace(0.0, 1.0, 101)
_DIGITS = 4
_ROUNDS, _SETTLED = 2000, 1e-7


def mixture_label_log_probs(
    base: LabelLogProbs, memories: Sequence[LabelLogProbs], weights: Sequence[float]
) -> NDArray[np.float64]:
    """Label log-probs of the mixture, `(P,)` in float64; a part of weight 0 is left out, so 0 and 1 are exact."""
    total = min(1.0, sum(weights))
    parts = [(base, np.log1p(-total))] if total < 1 else []
    parts += [(part, np.log(weight)) for part, weight in zip(memories, weights, strict=True) if weight > 0]
    return reduce(np.logaddexp, (part.astype(np.float64) + log_weight for part, log_weight in parts))


def perplexity(log_probs: LabelLogProbs) -> float:
    """Of label log-probs in nats."""
    return float(np.exp(-log_probs.astype(np.float64).mean()))


def finite(perplexity: float) -> float | None:
    """Rounded for a report; None for infinity, which JSON has not."""
    return round(float(perplexity), 4) if np.isfinite(perplexity) else None


def perplexity_curve(base: LabelLogProbs, memory: LabelLogProbs, grid: NDArray[np.float64] = GRID) -> NDArray:
    """Perplexity of the mixture of two at each weight of `grid`."""
    return np.array([perplexity(mixture_label_log_probs(base, [memory], [float(weight)])) for weight in grid])


def best_mix_weight(base: LabelLogProbs, memory: LabelLogProbs) -> tuple[float, float]:
    """The weight of `GRID` with the lowest perplexity, and that perplexity. Call it on validation scores only.

    Raises:
        ModelError: There is NaN among them.
    """
    _check_numbers([base, memory])
    curve = perplexity_curve(base, memory)
    best = int(curve.argmin())
    return float(round(GRID[best], _DIGITS)), float(curve[best])


def best_mix_weights(base: LabelLogProbs, memories: Sequence[LabelLogProbs]) -> list[float]:
    """The weights with the lowest perplexity, one per memory. Call it on validation scores only.

    A single memory's is the best of `GRID`. Several memories' come from expectation maximisation, whose every round
    lowers the perplexity, which has one minimum.

    Raises:
        ModelError: There is NaN among them.
    """
    if len(memories) == 1:
        return [best_mix_weight(base, memories[0])[0]]
    _check_numbers([base, *memories])
    parts = np.stack([base, *memories]).astype(np.float64)  # (M + 1, P)
    there = np.isfinite(parts).any(0)  # a label that all find impossible prefers no weights
    probs = np.exp(parts[:, there] - parts[:, there].max(0))
    weights = np.full(len(probs), 1 / len(probs))
    for _ in range(_ROUNDS if there.any() else 0):
        shares = weights[:, None] * probs
        new = (shares / shares.sum(0)).mean(1)
        moved, weights = float(np.abs(new - weights).max()), new
        if moved < _SETTLED:
            break
    return [float(np.floor(weight * 10**_DIGITS) / 10**_DIGITS) for weight in weights[1:]]


def _check_numbers(parts: Sequence[LabelLogProbs]) -> None:
    for number, part in enumerate(parts):
        if np.isnan(part).any():
            who = f"memory {number}" if number else "base"
            raise ModelError(f"label log-probs of {who} hold NaN, so no weight is best; score it again in float32")
