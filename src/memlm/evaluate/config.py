"""Settings of the evaluate stage."""

from pydantic import Field, field_validator

from memlm.config import MAX_BATCH_TOKENS, MAX_SEED, StageConfig


class EvaluateConfig(StageConfig):
    """How perplexity is measured."""

    mix_weight: float | dict[str, float] | None = None
    """Weight of the memory in the mixture, by name where there are several; default the best on validation. α in Memory
    Decoder, λ in kNN-LM."""
    dtype: str = "auto"
    """Precision of base and memory: float32, bfloat16, float16, or auto (bfloat16 where computed natively)."""
    batch_tokens: int = Field(default=4096, ge=1, le=MAX_BATCH_TOKENS)
    """Tokens in one forward pass, padding included."""
    bootstrap: int = Field(default=1000, ge=0, le=1_000_000)
    """Resamplings of documents behind the 95% intervals; 0 leaves them out."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Draws the resamplings."""

    @field_validator("mix_weight")
    @classmethod
    def _in_range(cls, value: float | dict[str, float] | None) -> float | dict[str, float] | None:
        weights = value.values() if isinstance(value, dict) else [] if value is None else [value]
        if not all(0 <= weight <= 1 for weight in weights):  # also false for NaN
            raise ValueError("must be in [0, 1]")
        return value
