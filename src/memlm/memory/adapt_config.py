"""Settings of the adapt stage."""

from typing import Literal

from pydantic import Field

from memlm.config import StageConfig


class AdaptConfig(StageConfig):
    """How a memory gets the vocabulary of another tokenizer."""

    rows: Literal["pieces", "random"] = "pieces"
    """New rows of embeddings and head: pieces (shared tokens keep theirs, others get the mean of their pieces under the
    old tokenizer), or random, as in the paper."""
    budget: float = Field(default=0.1, gt=0)
    """Share of the epochs it was trained for that training should go on for; no more than a note of how to go on."""
    seed: int = Field(default=0, ge=0)
    """Draws random rows."""
