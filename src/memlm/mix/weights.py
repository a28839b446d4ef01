"""How much each memory counts: a rule that gives weights once all have voted."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlm.errors import ConfigError
from memlm.memory.voter import NoCache, VoterCache, Votes

Weight = float | Tensor
"""One weight, or a tensor that broadcasts against `(B, T)`."""
MixWeight = float | Sequence[float] | Tensor
"""One weight, or one per row of a batch."""


class WeightRule(ABC):
    """Gives the memories' weights, causally: from the text so far and what all think comes next."""

    def new_state(self, batch_size: int) -> VoterCache:
        """What the rule keeps of the text so far, for a batch; part of the mixture's cache."""
        return NoCache()

    @abstractmethod
    def weights(
        self,
        tokens: Int[Tensor, "B T"],
        base: Float[Tensor, "B T2 V"],
        memories: Mapping[str, Votes],
        state: VoterCache | None,
    ) -> list[Weight]:
        """One weight per memory, in their order; the base gets the rest.

        Args:
            tokens: The new tokens.
            base: The base's logits, at the places that are kept.
            memories: Votes at the same places.
            state: From `new_state`, extended here; None: the new tokens are all there is.
        """


@dataclass(frozen=True)
class FixedWeights(WeightRule):
    """The same weight at every place."""

    by_name: Mapping[str, Any]
    """Memory to its weight: a number, or a tensor with one per row."""

    def changed(self, mix_weight: MixWeight | Mapping[str, MixWeight] | None) -> "FixedWeights":
        """The rule for one call with weights of its own; errors as in `settle_weights`."""
        if mix_weight is None:
            return self
        return FixedWeights(settle_weights(self.by_name, mix_weight, per_row=True))

    def weights(
        self,
        tokens: Int[Tensor, "B T"],
        base: Float[Tensor, "B T2 V"],
        memories: Mapping[str, Votes],
        state: VoterCache | None,
    ) -> list[Weight]:
        return [
            _for_rows(weight, len(tokens)).to(base.device) if isinstance(weight, Tensor) else weight
            for weight in self.by_name.values()
        ]


def check_weights(weights: Sequence[Weight]) -> None:
    """Refuse weights outside [0, 1], or whose sum in some row is above 1.

    Raises:
        ConfigError: They are.
    """
    numbers = [weight.tolist() if isinstance(weight, Tensor) else weight for weight in weights]
    rows = max((len(weight) for weight in numbers if isinstance(weight, list)), default=1)
    for row in range(rows):
        here = [weight[row] if isinstance(weight, list) else weight for weight in numbers]
        place = f" in row {row}" if rows > 1 else ""
        for weight in here:
            if not 0 <= weight <= 1:  # also false for NaN
                raise ConfigError(f"mix_weight = {weight:g}{place}: must be in [0, 1]")
        if sum(here) > 1 + 1e-6:
            listed = ", ".join(f"{weight:g}" for weight in here)
            raise ConfigError(f"mix_weight: the weights {listed}{place} sum to {sum(here):g}, above 1")


def settle_weights(
    present: Mapping[str, Any], mix_weight: MixWeight | Mapping[str, MixWeight] | None, *, per_row: bool = False
) -> dict[str, Any]:
    """Name to weight, in the order of the memories: a number, or a tensor `(rows,)`.

    Args:
        present: Per memory the weight in force where none is given, or None.
        mix_weight: One weight for a single memory, or some by name.
        per_row: Whether a weight may be one per row of a batch.

    Raises:
        ConfigError: A weight is missing, of an unknown memory, outside [0, 1], or they sum to more than 1.
    """
    names = ", ".join(present)
    if mix_weight is None:
        mix_weight = {}
    elif not isinstance(mix_weight, Mapping):
        if len(present) != 1:
            raise ConfigError(f"mix_weight: give one weight per memory ({names or 'there is none'}), by name")
        mix_weight = dict.fromkeys(present, mix_weight)
    if unknown := [name for name in mix_weight if name not in present]:
        raise ConfigError(f"mix_weight names {', '.join(unknown)}; the memories are {names or 'none'}")
    weights: dict[str, Any] = {}
    for name, there in present.items():
        weight = mix_weight.get(name, there)
        if weight is None:
            raise ConfigError(
                f"mix_weight of {name!r} is missing: the memory records none from validation data; give one"
            )
        shape = tuple(torch.as_tensor(weight).shape)
        if len(shape) > int(per_row):
            allowed = "a number, or one per row" if per_row else "a number; one per row is for a single call"
            raise ConfigError(f"mix_weight of {name!r} has shape {shape}: give {allowed}")
        weights[name] = torch.as_tensor(weight).float() if shape else float(weight)  # type: ignore[arg-type]
    rows = {len(weight) for weight in weights.values() if isinstance(weight, Tensor)}
    if len(rows) > 1:
        raise ConfigError(f"mix_weight: the memories have weights for {' and '.join(map(str, sorted(rows)))} rows")
    check_weights(list(weights.values()))
    return weights


def _for_rows(weight: Tensor, rows: int) -> Tensor:
    """`(rows, 1)` from weights of as many rows, or of those that were each repeated, as beams are."""
    if not len(weight) or rows % len(weight):
        raise ConfigError(f"mix_weight: {len(weight)} weights for a batch of {rows} rows")
    return weight.repeat_interleave(rows // len(weight))[:, None]
