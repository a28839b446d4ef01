"""Whom an evaluation lets speak: the base alone, its mixture at fixed weights, and its mixture under a gate."""

from transformers import PreTrainedModel

from memlm.mix.mixed_lm import MixedLM
from memlm.scores.table import BASE

FIXED = "fixed"


class Speakers:
    """The ways in which one mixture speaks, by name: `base`, `fixed` where its weights can be in force
    together, the gate's own."""

    def __init__(self, mixed: MixedLM) -> None:
        self._mixed, self._gate = mixed, mixed.gate
        gate, weights = mixed.gate.gate, mixed.mix_weights
        together = len(weights) == len(mixed.memories) and sum(weights.values()) <= 1 + 1e-6  # as where they are set
        self.names = [BASE]
        self.names += [FIXED] if gate == "none" or together else []
        self.names += [] if gate == "none" else [str(gate)]
        self.told = {"gate": gate, "mix_weight": weights}
        """What a report says of them."""

    def __getitem__(self, name: str) -> PreTrainedModel:
        if name == BASE:
            return self._mixed.base
        self._mixed.set_gate("none" if name == FIXED else self._gate)
        return self._mixed
