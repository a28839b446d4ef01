"""Settings of fitting a confidence head; light, for the command line reads them."""

from typing import Literal

from pydantic import Field

from memlm.config import MAX_BATCH_TOKENS, MAX_COUNT, MAX_SEED, StageConfig


class FitGateConfig(StageConfig):
    """How a memory's confidence head is fitted."""

    general_tokens: int = Field(default=20_000, ge=1, le=MAX_COUNT)
    """Tokens of general text that are read at most."""
    max_tokens: int = Field(default=50_000, ge=1, le=MAX_COUNT)
    """Held-out tokens of the domain that are read at most: whole documents."""
    document_separator: str | None = None
    """What separates documents in a file of general text, such as '\\n\\n'; default: a file is one document."""
    encoding: str = "utf-8"
    """Of files of general text."""
    text_column: str = "text"
    """Name of the field with the text, where general text is JSON Lines, Parquet or a dataset."""
    dtype: str = "auto"
    """Precision of base and memory: float32, bfloat16, float16, or auto (bfloat16 where computed natively)."""
    batch_tokens: int = Field(default=4096, ge=1, le=MAX_BATCH_TOKENS)
    """Tokens in one forward pass, padding included."""
    shared_documents: Literal["refuse", "keep"] = "refuse"
    """Held-out documents that the memory was trained on, where it was made from another corpus: an error, or kept; a
    head that is fitted on them trusts the memory too much."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Deals documents to the two halves that judge each other."""
