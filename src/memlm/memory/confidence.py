"""A memory's confidence: a head that says, from what the memory sees and how sure all are, whether to believe it."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from memlm.errors import ConfigError
from memlm.files import digest
from memlm.manifest import GATE_FILE, FoundLater
from memlm.targets.config import RetrievalConfig

FEATURES = ("entropy of the base", "entropy of the memory", "log top-1 of the base", "log top-1 of the memory", "agree")
"""What every confidence looks at beside the memory's own state: no part of it depends on which base stands there."""
_WIDEST = 1 << 20
_LARGEST = 1e9

Columns = Mapping[str, Tensor]
"""`entropy` (nats), `top1` (a probability) and `top1_id` of a voter at some places."""


class ConfidenceHead(FoundLater):
    """A logistic regression: `c = sigmoid(state . h + features . f + bias)` is the weight of the memory.

    It is fitted on the likelihood of the mixture, `-log((1 - c) p_base(y) + c p_memory(y))`, on held-out text.
    """

    file_name = GATE_FILE
    most_bytes = 1 << 26
    cure = "delete it, or fit it anew with memlm gate"

    memory: str
    """Identity of the memory that it was fitted for."""
    tokenizer: str | None
    """Fingerprint of its tokenizer."""
    state: list[float] = Field(max_length=_WIDEST)
    """One number per dimension of the memory's state; empty: the state is not looked at."""
    features: list[float] = Field(min_length=len(FEATURES), max_length=len(FEATURES))
    bias: float = Field(ge=-_LARGEST, le=_LARGEST)
    base: str
    """The base that stood beside the memory."""
    retrieval: RetrievalConfig | None = None
    """How a datastore was searched; None: as `RetrievalConfig` says by default."""
    facts: dict[str, int | float | None] = Field(default_factory=dict)
    """Tokens it was fitted on, and perplexities there; None is an infinite one."""

    def of_state(self, state: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
        """The part of the logit that the memory's own state gives, in float32.

        Raises:
            ConfigError: The state is of another width than the head was fitted on.
        """
        if not self.state:
            return state.new_zeros(state.shape[:-1], dtype=torch.float32)
        if state.shape[-1] != len(self.state):
            raise ConfigError(
                f"the gate was fitted for a memory {len(self.state)} wide, this one is {state.shape[-1]} wide;"
                " fit it anew with memlm gate"
            )
        return state.float() @ self._state.to(state.device)

    @property
    def search(self) -> dict[str, Any]:
        """What decides which votes of a datastore it was fitted on."""
        return (self.retrieval or RetrievalConfig()).found

    @property
    def digest(self) -> str:
        """Of all that weighs."""
        return digest(self.model_dump(mode="json", include={"memory", "state", "features", "bias"}))

    @cached_property
    def _state(self) -> Tensor:
        with torch.inference_mode(False):  # it outlives the call
            return torch.tensor(self.state, dtype=torch.float32)

    def weight(self, of_state: Float[Tensor, "..."], base: Columns, memory: Columns) -> Float[Tensor, "..."]:
        """The memory's weight."""
        found = features(base, memory)
        return torch.sigmoid(of_state + found @ found.new_tensor(self.features) + self.bias)


def features(base: Columns, memory: Columns) -> Float[Tensor, "... F"]:
    """What `FEATURES` names."""
    smallest = torch.finfo(torch.float32).tiny
    return torch.stack(
        [
            base["entropy"],
            memory["entropy"],
            base["top1"].clamp(min=smallest).log(),
            memory["top1"].clamp(min=smallest).log(),
            (base["top1_id"] == memory["top1_id"]).to(base["entropy"].dtype),
        ],
        -1,
    )
