"""Perplexities with intervals from resampled documents."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memlm.evaluate.config import EvaluateConfig
from memlm.scores.mixtures import finite

_DRAWN_AT_ONCE = 1 << 21  # documents of all resamplings that exist at a time: 16 MiB


class Resampled:
    """Figures of several models over the same documents; all share the same draws, so ratios are paired."""

    def __init__(
        self,
        document: NDArray[np.int64],
        log_probs: Mapping[str, NDArray[np.float64]],
        config: EvaluateConfig,
        *,
        drawn_at_once: int = _DRAWN_AT_ONCE,
    ) -> None:
        """
        Args:
            document: `(P,)` the document of each position.
            log_probs: Name to label log-probs `(P,)`.
            config: How often documents are drawn, and the seed.
            drawn_at_once: Documents of all resamplings that exist at a time at most, but for a single one.
        """
        counts = np.bincount(document).astype(np.float64)
        sums = np.stack(
            [np.bincount(document, weights=-values) for values in log_probs.values()]
        )  # (models, documents)
        rng, n = np.random.default_rng(config.seed), len(counts)
        means = [np.empty((0, len(sums)))]
        times_drawn = config.bootstrap if (counts > 0).sum() > 1 else 0  # a single document says nothing of others
        with np.errstate(invalid="ignore"):  # an infinite sum that is not drawn
            for start in range(0, times_drawn, size := max(1, drawn_at_once // n)):
                times = min(size, times_drawn - start)
                draws = rng.multinomial(n, np.full(n, 1 / n), size=times).astype(np.float64)
                means.append(draws @ sums.T / np.maximum(draws @ counts, 1)[:, None])
        self._mean = dict(zip(log_probs, sums.sum(1) / counts.sum(), strict=True))
        self._drawn = dict(zip(log_probs, np.concatenate(means).T, strict=True))

    def perplexity(self, name: str) -> dict[str, Any]:
        """Perplexity and its 95% interval; an infinite one, as a retriever has alone, is None and has no
        interval, as a single document has none."""
        return _figure(self._mean[name], self._drawn[name])

    def ratio(self, above: str, below: str) -> dict[str, Any]:
        """Perplexity of `above` over that of `below`, and its 95% interval."""
        return _figure(self._mean[above] - self._mean[below], self._drawn[above] - self._drawn[below])


def _figure(mean: float, drawn: NDArray[np.float64]) -> dict[str, Any]:
    there = np.isfinite(mean) and len(drawn)
    interval = np.quantile(np.exp(drawn), [0.025, 0.975]).round(4).tolist() if there else None
    return {"perplexity": finite(np.exp(mean)), "interval": interval}
