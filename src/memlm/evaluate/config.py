"""Settings of the evaluate stage."""

from typing import Annotated

from pydantic import Field

from memlm.config import StageConfig

Weight = Annotated[float, Field(ge=0, le=1)]


class EvaluateConfig(StageConfig):
    """How perplexity is measured."""

    mix_weight: Weight | dict[str, Weight] | None = None
    """Weight of the memory in the mixture, by name where there are several; default the best on validation. α in Memory
    Decoder, λ in kNN-LM."""
    dtype: str = "auto"
    """Precision of base and memory: float32, bfloat16, float16, or auto (bfloat16 where computed natively)."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens in one forward pass, padding included."""
    bootstrap: int = Field(default=1000, ge=0)
    """Resamplings of documents behind the 95% intervals; 0 leaves them out."""
    seed: int = Field(default=0, ge=0)
    """Draws the resamplings."""
