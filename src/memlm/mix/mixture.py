"""The mixture itself, in log space."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memlm.errors import ConfigError


def check_weights(weights: Sequence[float]) -> None:
    """Nothing, where each weight is in [0, 1] and their sum is at most 1.

    Raises:
        ConfigError: Otherwise.
    """
    for weight in weights:
        if not 0 <= weight <= 1:  # also false for NaN
            raise ConfigError(f"mix_weight = {weight}: must be in [0, 1]")
    if sum(weights) > 1 + 1e-6:
        raise ConfigError(f"mix_weight: the weights {', '.join(map(str, weights))} sum to {sum(weights):g}, above 1")


def mix_log_probs(
    base: Float[Tensor, "... V"], memories: Sequence[Float[Tensor, "... V"]], weights: Sequence[float]
) -> Float[Tensor, "... V"]:
    """`log((1 - sum(w)) * p_base + sum(w_m * p_m))` from log-probs.

    A component of weight 0 is left out, so weights 0 and 1 give the other component exactly.

    Args:
        base: Normalised log-probs of the base.
        memories: Normalised log-probs of each memory.
        weights: One per memory; the base gets the rest.

    Source: Memory Decoder, eq. 7 (arXiv:2508.09874); MLP Memory, eq. 7 (arXiv:2508.01832).
    """
    rest = max(0.0, 1.0 - sum(weights))
    parts = [(base, rest), *zip(memories, weights, strict=True)]
    weighted = [part + math.log(weight) if weight < 1 else part for part, weight in parts if weight > 0]
    mixed = weighted[0]
    for part in weighted[1:]:
        mixed = torch.logaddexp(mixed, part)
    return mixed
