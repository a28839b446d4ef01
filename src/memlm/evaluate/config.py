"""Settings of evaluations."""

from typing import Any, Literal

from pydantic import Field, field_validator

from memlm.config import MAX_BATCH_TOKENS, MAX_COUNT, MAX_SEED, StageConfig


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
    shared_documents: Literal["refuse", "keep"] = "refuse"
    """Held-out documents that a memory was trained on, where it was made from another corpus: an error, or kept."""

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide what comes out."""
        return self.model_dump(exclude={"shared_documents"} if self.shared_documents == "refuse" else None)

    @field_validator("mix_weight")
    @classmethod
    def _in_range(cls, value: float | dict[str, float] | None) -> float | dict[str, float] | None:
        weights = value.values() if isinstance(value, dict) else [] if value is None else [value]
        if not all(0 <= weight <= 1 for weight in weights):  # also false for NaN
            raise ValueError("must be in [0, 1]")
        return value


class PassageConfig(StageConfig):
    """How a passage is found, by BM25, and read."""

    query_tokens: int = Field(default=32, ge=1, le=MAX_COUNT)
    """Latest tokens that are searched for."""
    stride: int = Field(default=4, ge=1, le=MAX_COUNT)
    """Tokens predicted per search."""
    passage_tokens: int = Field(default=256, ge=1, le=MAX_COUNT)
    """Length of a passage at most; passages do not overlap."""
    context: int | None = Field(default=None, ge=2, le=MAX_COUNT)
    """Tokens read at a time at most, the passage included; what is furthest back is left out; default what the base
    reads without a passage, and the passage."""


class InContextConfig(PassageConfig):
    """How passages are found and read, and where."""

    positions: int = Field(default=1000, ge=1, le=MAX_COUNT)
    """Test tokens that are predicted so, evenly spread over the split; each few cost a pass over a whole context."""
    encoder: str | None = None
    """Model of transformers whose last hidden states, averaged, find the passage; default BM25, and the base where a
    comparison asks for in-context-dense."""


class BenchConfig(StageConfig):
    """What is timed."""

    new_tokens: int = Field(default=32, ge=2, le=MAX_COUNT)
    """Tokens decoded after each prompt, greedily; no text ends earlier."""
    prompt_tokens: int = Field(default=128, ge=1, le=MAX_COUNT)
    """Latest tokens of each prompt that are read."""
    batch_size: int = Field(default=1, ge=1, le=1 << 16)
    """Prompts decoded together."""
    score_tokens: int = Field(default=512, ge=0, le=MAX_COUNT)
    """Tokens of a text, the prompts joined, that base and memories score at once; 0: none."""
    rounds: int = Field(default=3, ge=1, le=1_000_000)
    """How often each way is timed, in turns; the medians count."""
    dtype: str = "auto"
    """Precision: float32, bfloat16, float16, or auto."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Of sampling, where a way samples."""


class GenerationConfig(StageConfig):
    """How passages are gone on with."""

    passages: int = Field(default=100, ge=1, le=MAX_COUNT)
    """Passages of the training text, and as many held-out ones, at most."""
    prompt_tokens: int = Field(default=32, ge=1, le=MAX_COUNT)
    """Tokens at the beginning of a document that are given."""
    new_tokens: int = Field(default=32, ge=1, le=MAX_COUNT)
    """Tokens that are to follow."""
    batch_size: int = Field(default=8, ge=1, le=1 << 16)
    """Passages gone on with together."""
    judge: str | None = None
    """Another model of the tokenizer, whose perplexity of what was said is told: one that knows neither base nor
    memory."""
    dtype: str = "auto"
    """Precision: float32, bfloat16, float16, or auto."""


IN_CONTEXT = ("in-context", "in-context-dense")
"""Rows that are judged on a part of the text."""
ROWS = (
    *(*IN_CONTEXT, "knn", "dapt", "dapt+knn", "lora", "twin", "memory", "mlp"),
    *("memory+mlp", "dapt+memory", "lora+memory"),
)
"""What a comparison can have beside the base alone."""


class CompareConfig(StageConfig):
    """What is compared, and what is searched."""

    rows: list[str] | None = None
    """Of in-context, in-context-dense, knn, dapt, dapt+knn, lora, twin, memory, mlp, memory+mlp, dapt+memory and
    lora+memory; default all that the recipe can, in-context-dense where in_context.encoder is given."""
    search: dict[str, list[Any]] = Field(default_factory=dict)
    """SECTION.KEY of train, twin, mlp, dapt or lora to values; every combination within a section is trained, and the
    best on validation text counts. DAPT and LoRA are tried at two learning rates each unless theirs is given."""
    general_tokens: int = Field(default=10_000, ge=1, le=MAX_COUNT)
    """Tokens of general text that are judged."""
    general_separator: str | None = None
    """Text that separates documents of general text; default one document per file."""
    in_context: InContextConfig = InContextConfig()
    """How in-context retrieval is done, on a part of the test text."""
    tasks: list[str] = Field(default_factory=list)
    """Tasks that each row is put to as well, gated where there is a memory, as `memlm evaluate tasks` names them."""
    task_limit: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Items of each task at most; default all."""
    timed_tokens: int = Field(default=32, ge=0, le=MAX_COUNT)
    """Tokens that each way decodes to be timed; 0: none is timed."""

    @field_validator("rows")
    @classmethod
    def _are_known(cls, value: list[str] | None) -> list[str] | None:
        if unknown := [name for name in value or [] if name not in ROWS]:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(ROWS)}")
        return value

    @field_validator("search")
    @classmethod
    def _is_of_training(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name, values in value.items():
            if name.partition(".")[0] not in ("train", "twin", "mlp", "dapt", "lora") or "." not in name:
                raise ValueError(f"{name!r} is no SECTION.KEY of train, twin, mlp, dapt or lora")
            if not values:
                raise ValueError(f"{name!r} has no values")
        return value
