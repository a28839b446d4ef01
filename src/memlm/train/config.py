"""Settings of the train stage, and of fitting a confidence head; light, for the command line reads them."""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_serializer, model_validator
from pydantic.fields import FieldInfo

from memlm.config import MAX_BATCH_TOKENS, MAX_COUNT, MAX_SEED, StageConfig, leaves
from memlm.errors import ConfigError
from memlm.memory.config import DecoderStart, MLPStart, StartConfig, settings_of_kinds, start_settings


class TrainConfig(StageConfig):
    """What a memory starts as, and how it is trained.

    Settings of the start stand beside the others: `TrainConfig(kind="mlp", layers=8, epochs=2)`. Which there are, the
    kind says.
    """

    start: SerializeAsAny[StartConfig] = DecoderStart()
    """What the memory is before its training, by its kind."""
    kl_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the KL to the targets, β in the paper; the LM loss gets the rest. 0 is plain fine-tuning, and what
    is in force where a corpus is trained on, which has no targets."""
    objective: Literal["imitation", "mixture"] = "imitation"
    """imitation trains the memory's own voice, as in the papers; mixture what base and memory say together, so that the
    memory learns what this base does not know, weighed by a confidence that is trained along."""
    mixture_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the mixture in the loss of objective mixture; imitation has the rest, or a memory that starts far behind
    the base would hardly learn."""
    epochs: float = Field(default=2.0, gt=0, le=1_000_000)
    """Passes over the training blocks."""
    max_steps: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """Optimizer steps, instead of epochs."""
    learning_rate: float = Field(default=5e-4, gt=0, le=1000)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Shape of the learning rate after warm-up."""
    warmup: float = Field(default=0.03, ge=0, le=2**31 - 1)
    """Warm-up: share of all steps if below 1, else steps."""
    batch_size: int = Field(default=8, ge=1, le=1 << 20)
    """Blocks per device and forward pass."""
    accumulation: int = Field(default=1, ge=1, le=1 << 20)
    """Forward passes per optimizer step; the loss is averaged over all positions of the step, so this is exact."""
    weight_decay: float = Field(default=0.0, ge=0, le=1000)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)
    """Gradients are clipped to this norm."""
    dtype: str = "auto"
    """Autocast precision: float32, bfloat16, or auto (bfloat16 where computed natively). Weights stay in float32."""
    validations: int = Field(default=1, ge=1, le=1 << 20)
    """Validations, and checkpoints, per epoch; the best checkpoint is kept."""
    keep: Literal["mixture", "memory"] = "mixture"
    """Whose perplexity on validation text the checkpoint that is kept has lowest: that of the mixture with the base, or
    the memory's own, for a model that is to be used alone."""
    batch_tokens: int = Field(default=4096, ge=1, le=MAX_BATCH_TOKENS)
    """Tokens in one forward pass of validation."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Order of blocks, random start, dropout."""
    left_out: str | None = Field(default=None, pattern=r"^[1-9]\d?/[1-9]\d?$")
    """Part of a corpus's training documents that is not read, such as 1/2, the first of two folds: for a teacher that
    is to say something of documents which it does not know by heart."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further fields of transformers' TrainingArguments, such as activation_checkpointing, optim or report_to; one that
    would break what memlm promises is refused with the reason."""

    @field_validator("trainer")
    @classmethod
    def _numbers_are_in_range(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, part in value.items():
            if any(isinstance(n, int | float) and not abs(n) < 2**31 for n in leaves(part)):  # also where it is NaN
                raise ValueError(f"{name} must be a number below 2^31")
        return value

    @field_validator("left_out")
    @classmethod
    def _is_a_fold(cls, value: str | None) -> str | None:
        if value is not None and not 1 <= int(value.partition("/")[0]) <= int(value.partition("/")[2]) > 1:
            raise ValueError("must be one of two or more folds, such as 1/2")
        return value

    @property
    def fold(self) -> tuple[int, int] | None:
        """Number, from 0, of the fold that is left out, and how many there are; None: all documents are read."""
        if self.left_out is None:
            return None
        number, _, count = self.left_out.partition("/")
        return int(number) - 1, int(count)

    @classmethod
    def options(cls) -> dict[str, FieldInfo]:
        """Every setting beside the others; the start's say which kinds have them."""
        found = {}
        for name, fields in settings_of_kinds().items():
            told = (
                f"{kind}: {start_settings(kind).__doc__ if name == 'kind' else field.description}"
                for kind, field in fields.items()
            )
            found[name] = FieldInfo(
                annotation=reduce(or_, (field.annotation for field in fields.values())),  # type: ignore[arg-type]
                default=next(iter(fields.values())).default,
                description=" ".join(told),
            )
        return found | {name: field for name, field in cls.model_fields.items() if name != "start"}

    @model_validator(mode="before")
    @classmethod
    def _gather_start(cls, values: Any) -> Any:
        """The settings with those of the start taken together; another kind's are refused, where they say something."""
        if not isinstance(values, dict) or "start" in values:
            return values
        kind = values.get("kind", "decoder")
        own, start, rest = start_settings(str(kind)).model_fields, {"kind": kind}, {}
        kinds = settings_of_kinds()
        for name, value in values.items():
            if name in own:
                start[name] = value
            elif name not in kinds:
                rest[name] = value
            elif value not in (None, next(iter(kinds[name].values())).default):
                having = " or ".join(kinds[name])
                raise ConfigError(f"{name} = {value!r}: only a memory of kind {having} has it; add --kind {having}")
        return {**rest, "start": start}

    @field_validator("start", mode="before")
    @classmethod
    def _start_of_its_kind(cls, start: Any) -> Any:
        return start_settings(str(start.get("kind"))).model_validate(start) if isinstance(start, dict) else start

    @model_serializer(mode="wrap")
    def _flat(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """The settings as they are given, with both first kinds' always and without newer ones that are as they
        always were, so that older folders are still recognised."""
        values = handler(self)
        if self.objective == "imitation":  # which has no share
            del values["objective"], values["mixture_share"]
        if self.keep == "mixture":
            del values["keep"]
        if self.left_out is None:
            del values["left_out"]
        start = DecoderStart().model_dump() | MLPStart().model_dump() | values.pop("start")
        if start["lora_rank"] is None:
            del start["lora_rank"]
        return start | values


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
