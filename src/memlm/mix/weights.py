"""How much each memory counts: a rule that gives weights once all have voted."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlm.errors import ConfigError
from memlm.memory.voter import NoCache, VoterCache, Votes

Weight = float | Tensor
"""One weight, or a tensor that broadcasts against `(B, T)`."""
MixWeight = float | Sequence[float] | Tensor
"""One weight, or one per row of a batch."""


@dataclass(frozen=True)
class Step:
    """What a rule hears of new tokens: them, and what base and memories think comes next."""

    tokens: Int[Tensor, "B T"]
    """The new ones."""
    past: int
    """How many came before."""
    keep: slice | Tensor
    """Places of the new tokens at which all have voted."""
    base: Float[Tensor, "B T2 V"]
    """The base's logits there."""
    normaliser: Float[Tensor, "B T2 1"]
    """Their logsumexp."""
    memories: Mapping[str, Votes]
    """The memories' votes there, in their order."""
    real: Bool[Tensor, "B T"] | None = None
    """False where a new token is padding; None: none is."""
    real_before: Bool[Tensor, "B"] | None = None
    """False where the token before the new ones is padding; None: none is."""
    evidence: Bool[Tensor, "B T"] | None = None
    """False where a new token says nothing of who explains the text; None: all say something."""
    confidence: Callable[[str], Float[Tensor, "B T2"]] = lambda name: torch.zeros(())
    """What a memory's own state says there, see `ConfidenceHead.of_state`."""
    unread: int = 0
    """How many of the new tokens the base has read before, while the memories slept; they come first."""
    columns: Callable[[int, int], list[dict[str, Tensor]]] = lambda began, end: []
    """What base and memories thought of the tokens after the places from one to another, whose votes are not kept: the
    columns of scores, each `(B, end - began)`. Runs their heads."""


class WeightRule(ABC):
    """Gives the memories' weights, causally: from the text so far and what all think comes next."""

    def new_state(self, batch_size: int) -> VoterCache:
        """What the rule keeps of the text so far, for a batch; part of the mixture's cache."""
        return NoCache()

    def places(self, keep: slice | Tensor, tokens: int) -> slice | Tensor:
        """The places of `tokens` new ones that it may ask about where votes at `keep` are wanted; those and others."""
        return keep

    def asleep(self, state: VoterCache | None, past: int, unread: int, tokens: int) -> bool:
        """Whether all memories weigh 0 at the next places whatever they vote, so that they need not be read.

        Args:
            state: From `new_state`.
            past: Tokens so far.
            unread: How many of the last ones the memories have not read.
            tokens: How many places are next.
        """
        return False

    @abstractmethod
    def weights(self, step: Step, state: VoterCache | None) -> list[Weight]:
        """One weight per memory, in their order; the base gets the rest.

        Args:
            step: What is new.
            state: From `new_state`, extended here; None: the new tokens are all there is.
        """


@dataclass(frozen=True)
class FixedWeights(WeightRule):
    """The same weight at every place."""

    by_name: Mapping[str, Any]
    """Memory to its weight: a number, or a tensor with one per row."""

    def weights(self, step: Step, state: VoterCache | None) -> list[Weight]:
        return [
            _for_rows(weight, len(step.tokens)).to(step.base.device) if isinstance(weight, Tensor) else weight
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
    present: Mapping[str, Any],
    mix_weight: MixWeight | Mapping[str, MixWeight] | None,
    *,
    per_row: bool = False,
    together: bool = True,
) -> dict[str, Any]:
    """Name to weight, in the order of the memories: a number, or a tensor `(rows,)`.

    Args:
        present: Per memory the weight in force where none is given, or None.
        mix_weight: One weight for a single memory, or some by name.
        per_row: Whether a weight may be one per row of a batch.
        together: Whether all are in force together, so that none may be missing and they sum to 1 at most. Else each is
            what its memory would have alone, None where that is not known.

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
        if weight is None and not together:
            weights[name] = None
            continue
        if weight is None:
            raise ConfigError(
                f"mix_weight of {name!r} is missing: the memory records none from validation data; give one"
            )
        try:
            shape = tuple(torch.as_tensor(weight).shape)
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"mix_weight of {name!r} is {weight!r}: give a number") from None
        if len(shape) > int(per_row):
            allowed = "a number, or one per row" if per_row else "a number; one per row is for a single call"
            raise ConfigError(f"mix_weight of {name!r} has shape {shape}: give {allowed}")
        weights[name] = torch.as_tensor(weight).float() if shape else float(weight)  # type: ignore[arg-type]
    rows = {len(weight) for weight in weights.values() if isinstance(weight, Tensor)}
    if len(rows) > 1:
        raise ConfigError(f"mix_weight: the memories have weights for {' and '.join(map(str, sorted(rows)))} rows")
    for part in [list(weights.values())] if together else [[w] for w in weights.values() if w is not None]:
        check_weights(part)
    return weights


def _for_rows(weight: Tensor, rows: int) -> Tensor:
    """`(rows, 1)` from weights of as many rows, or of those that were each repeated, as beams are."""
    if not len(weight) or rows % len(weight):
        raise ConfigError(f"mix_weight: {len(weight)} weights for a batch of {rows} rows")
    return weight.repeat_interleave(rows // len(weight))[:, None]
