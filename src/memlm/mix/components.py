"""What base and memories say of the next token at the same places, and whether all of it is finite."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memlm.errors import ModelError
from memlm.memory.voter import Votes
from memlm.mix.base import BaseState
from memlm.mix.mixture import mix_log_probs
from memlm.mix.weights import Weight


@dataclass(frozen=True)
class Components:
    """What base and memories say of the next token at the same places."""

    base: BaseState
    """What the base made of the tokens."""
    logits: Float[Tensor, "B T V"]
    """The base's in float32, over the shared vocabulary."""
    normaliser: Float[Tensor, "B T 1"]
    """Their logsumexp."""
    votes: dict[str, Votes]
    """Per memory; none where all sleep."""
    weights: list[Weight]
    """Per memory, as the rule weighs them here."""
    states: dict[str, Any]
    """Per memory, what it made of the tokens, and of those before that it had not read; none where all sleep."""

    def mixed(self) -> Float[Tensor, "B T V"]:
        """The mixture's logits: its log-probs, moved by the base's normaliser; the base's own at weight 0."""
        if not any(isinstance(weight, Tensor) or weight for weight in self.weights):
            return self.logits
        mixed = mix_log_probs(self.logits, list(self.votes.values()), self.weights, self.normaliser)
        total = sum(self.weights)
        if not isinstance(total, Tensor) or (total.device.type == "cpu" and bool(total.all())):
            return mixed
        return torch.where(total[..., None] == 0, self.logits, mixed)

    def check_finite(self) -> None:
        """Raise unless base and memories gave finite scores, as far as their first tells.

        Raises:
            ModelError: One did not; it is named.
        """
        if not bool(self.normaliser.isfinite().all()):
            raise not_finite()
        for name, votes in self.votes.items():
            if isinstance(votes, Tensor) and bool(votes[..., 0].isnan().any()):
                raise not_finite(name)


class Watch:
    """Whether base and memories give finite scores in all steps of a call of `generate`.

    On a CPU the step raises. An accelerator is not waited for: sums are kept there, which are not finite where one of
    their parts was not, and read once at the end.
    """

    def __init__(self, deferred: bool) -> None:
        """
        Args:
            deferred: Whether to raise at the end only.
        """
        self._deferred = deferred
        self._base: Tensor | None = None
        self._memories: dict[str, Tensor] = {}

    def saw(self, parts: Components, logits: Tensor) -> Tensor:
        """The mixture's logits of a step, without NaN, which an accelerator that samples would die of.

        Raises:
            ModelError: As `Components.check_finite`, where that is not deferred.
        """
        if not self._deferred:
            parts.check_finite()
            return logits
        said = parts.normaliser.sum()
        self._base = said if self._base is None else self._base + said
        for name, votes in parts.votes.items():
            if isinstance(votes, Tensor):
                said = votes[..., 0].sum()  # minus infinity is a log-prob
                self._memories[name] = self._memories[name] + said if name in self._memories else said
        return torch.nan_to_num(logits, nan=0.0, posinf=0.0, neginf=-torch.inf)

    def end(self) -> None:
        """Raise unless all that was seen is finite.

        Raises:
            ModelError: It is not; who gave it is named.
        """
        if self._base is not None and not bool(self._base.isfinite()):
            raise not_finite()
        for name, said in self._memories.items():
            if bool(said.isnan()):
                raise not_finite(name)


def not_finite(memory: str | None = None) -> ModelError:
    """What to raise where a memory, or else the base, gives NaN."""
    return ModelError(f"{'the base' if memory is None else f'memory {memory!r}'} gives no finite scores")
