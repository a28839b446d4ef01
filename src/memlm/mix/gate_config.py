"""Settings of the gate; light, for the command line reads them."""

from typing import Literal

from pydantic import Field

from memlm.config import MAX_COUNT, StageConfig

GateName = Literal["posterior", "confidence", "both", "none"]
"""What weighs the memories: see `GateConfig.gate`."""
LONGEST_DRAFT = 32
"""Tokens that may be drafted at a time; all may be refused, and a gate keeps its votes at the latest 64 places."""


class GateConfig(StageConfig):
    """How much each memory counts at each token."""

    gate: GateName | None = None
    """Weights per token: posterior (who explained the text so far), confidence (a memory's own head, fitted by memlm
    gate), both, or none (one weight, chosen on validation); default both where the memory has a head, else posterior;
    none where a weight is given."""
    prior: float = Field(default=0.5, ge=0, le=1)
    """Probability, before a text begins, that memories explain it; no text costs more than -log(1 - prior) nats over
    the base where switch is 0."""
    switch: float = Field(default=0.01, ge=0, le=1)
    """Probability per token that another explanation begins (fixed share)."""
    prompt_window: int = Field(default=128, ge=0, le=MAX_COUNT)
    """Latest tokens of a prompt that count as evidence; 0: none."""
    sleep: int = Field(default=0, ge=0, le=512)
    """Tokens that memories sleep once they weigh less than sleep_below: they are not read, and the base alone speaks;
    then they read what they missed at once and are weighed again; 0: they never sleep."""
    sleep_below: float = Field(default=0.02, ge=0, le=1)
    """Weight of the memories together below which they sleep."""
