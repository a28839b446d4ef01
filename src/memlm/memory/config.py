"""Settings of what a memory starts as, and of how it changes its tokenizer; light, for the command line reads them."""

from typing import Literal

from pydantic import Field

from memlm.config import StageConfig


class StartConfig(StageConfig):
    """What a memory is before its training."""

    kind: str = "decoder"
    """Kind of memory: decoder (a small causal LM; serves all bases of its tokenizer) or mlp (reads one base's hidden
    state; no attention, no cache)."""
    layers: int | list[int] | None = None
    """decoder: blocks of the start model to keep, how many (half from the front, half from the back) or which; default
    all. mlp: number of blocks; default 8."""
    fresh: bool = False
    """decoder: start from random weights with the start model's config instead of its weights."""
    tap: str | None = None
    """mlp: where the base is read: a module path, or a share of the depth in (0, 1]; default 1.0, the input of the
    last block's MLP."""
    like: Literal["small", "medium", "large"] | None = None
    """mlp: layers and widths of a GPT-2 memory of the paper: 18 of 768, 36 of 1024 or 54 of 1280."""
    width: int | None = Field(default=None, ge=1)
    """mlp: width of the blocks; where it is not the base's, a projection comes first; default the base's."""
    ffn_width: int | None = Field(default=None, ge=1)
    """mlp: inner width of a block's FFN; default the base's own, or four times the width."""
    head: Literal["base", "random"] | None = None
    """mlp: start of the output layer: the base's, with its final norm, or random as in the paper; default the base's
    where the widths are equal."""


class AdaptConfig(StageConfig):
    """How a memory gets the vocabulary of another tokenizer."""

    rows: Literal["pieces", "random"] = "pieces"
    """New rows of embeddings and head: pieces (shared tokens keep theirs, others get the mean of their pieces under the
    old tokenizer), or random, as in the paper."""
    budget: float = Field(default=0.1, gt=0)
    """Share of the epochs it was trained for that training should go on for; no more than a note of how to go on."""
    seed: int = Field(default=0, ge=0)
    """Draws random rows."""
