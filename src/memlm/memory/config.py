"""Kinds of memory, what each starts from, and how one changes its tokenizer; light, for the command line reads it.

A setting of a kind is an option of `memlm train` and a key of a recipe's `train` section, beside those of training.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, field_validator, model_validator

from memlm.config import MAX_SEED, StageConfig, nearest
from memlm.errors import ConfigError

UNNAMED = "memory"
"""What a memory without a name is called."""
MAX_LAYERS = 10_000
MAX_WIDTH = 1 << 20
"""Of any part of a memory, so that no size overflows."""
_T = TypeVar("_T")


def named(given: _T | Mapping[str, _T]) -> dict[str, _T]:
    """Memories by name, or what each has, also of a single one that has no name."""
    return dict(given) if isinstance(given, Mapping) else {UNNAMED: given}


class StartConfig(StageConfig):
    """What a memory is before its training; a kind with settings of its own has a subclass."""

    kind: str
    """Kind of memory."""

    def given(self) -> dict[str, Any]:
        """What is not as it is by default, beside the kind."""
        return self.model_dump(exclude_defaults=True, exclude={"kind"})


class DecoderStart(StartConfig):
    """A small causal LM; serves all bases of its tokenizer."""

    kind: Literal["decoder"] = "decoder"
    layers: int | list[int] | None = None
    """Blocks of the start model to keep, how many (half from the front, half from the back) or which; default all."""
    fresh: bool = False
    """Start from random weights with the start model's config instead of its weights."""
    lora_rank: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Train low-rank adapters of this rank beside all linear layers of the blocks (LoRA, by peft), scaled by 2, and
    merge them in at the end; default all weights are trained."""

    @field_validator("layers")
    @classmethod
    def _are_few(cls, value: int | list[int] | None) -> int | list[int] | None:
        layers = value if isinstance(value, list) else [] if value is None else [value]
        if len(layers) > MAX_LAYERS or not all(0 <= layer <= MAX_LAYERS for layer in layers):
            raise ValueError(f"numbers must be in [0, {MAX_LAYERS}]")
        return value


class MLPStart(StartConfig):
    """Reads one base's hidden state; no attention, no cache."""

    kind: Literal["mlp"] = "mlp"
    layers: int | None = Field(default=None, ge=1, le=MAX_LAYERS)
    """Number of blocks; default 8."""
    tap: str | None = None
    """Where the base is read: a module path, or a share of the depth in (0, 1]; default 1.0, the input of the last
    block's MLP."""
    like: Literal["small", "medium", "large"] | None = None
    """Layers and widths of a GPT-2 memory of the paper: 18 of 768, 36 of 1024 or 54 of 1280."""
    width: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Width of the blocks; where it is not the base's, a projection comes first; default the base's."""
    ffn_width: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Inner width of a block's FFN; default the base's own, or four times the width."""
    head: Literal["base", "random"] | None = None
    """Start of the output layer: the base's, with its final norm, or random as in the paper; default the base's where
    the widths are equal."""

    @model_validator(mode="after")
    def _check_sizes(self) -> "MLPStart":
        for name in ("layers", "width", "ffn_width"):
            if self.like is not None and (value := getattr(self, name)) is not None:
                raise ValueError(f"like = {self.like!r} and {name} = {value}: give one of them")
        return self


class Kind(NamedTuple):
    """What memlm knows of a kind of memory before it is used."""

    memory: str
    """Module and class of the memory, imported when it is needed."""
    start: type[StartConfig] | None = None
    """What it starts from; None: it is not trained."""


KINDS = {
    "decoder": Kind("memlm.memory.decoder:MemoryDecoder", DecoderStart),
    "mlp": Kind("memlm.memory.mlp:MLPMemory", MLPStart),
    "retrieval": Kind("memlm.memory.retrieval:RetrievalMemory"),
}
"""Every kind of memory by name: the line that a new one adds."""


def start_settings(kind: str) -> type[StartConfig]:
    """The settings that a kind starts from.

    Raises:
        ConfigError: The kind is unknown (the nearest is named), or is not trained.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind = {kind!r}{nearest(kind, KINDS)}")
    start = KINDS[kind].start
    if start is None:
        raise ConfigError(f"kind = {kind!r}: such a memory is not trained")
    return start


def settings_of_kinds() -> dict[str, dict[str, Any]]:
    """Setting to the kinds that have it, each with its field."""
    found: dict[str, dict[str, Any]] = {}
    for kind, (_, start) in KINDS.items():
        for name, field in start.model_fields.items() if start is not None else ():
            found.setdefault(name, {})[kind] = field
    return found


class AdaptConfig(StageConfig):
    """How a memory gets the vocabulary of another tokenizer."""

    rows: Literal["pieces", "random"] = "pieces"
    """New rows of embeddings and head: pieces (shared tokens keep theirs, others get the mean of their pieces under the
    old tokenizer), or random, as in the paper."""
    budget: float = Field(default=0.1, gt=0, le=1000)
    """Share of the epochs it was trained for that training should go on for; no more than a note of how to go on."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Draws random rows."""
