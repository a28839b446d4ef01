"""Settings of the targets stage."""

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_serializer

from memlm.config import MAX_SEED, StageConfig
from memlm.errors import ConfigError
from memlm.files import lasting_name

_LOWEST_TEMPERATURE = 1e-9
NEIGHBOURS = ("k", "target_temperature", "exclude_document")
"""Settings that are for neighbours alone."""
IMPORTED = {"released": True}
"""Settings of targets that were imported, whose making is not known."""


class NeighborConfig(StageConfig):
    """How neighbours vote."""

    k: int = Field(default=1024, ge=1, le=1 << 20)
    """Neighbours per position, self-matches already removed."""
    target_temperature: float = Field(default=16.0, gt=0, le=1e12)
    """Divides squared L2 distances before the softmax; higher is flatter. τ in the papers."""

    @field_validator("target_temperature")
    @classmethod
    def _divides_in_float32(cls, value: float | None) -> float | None:
        if value is not None and value < _LOWEST_TEMPERATURE:
            raise ValueError(
                f"must be at least {_LOWEST_TEMPERATURE:g}; so low a one leaves the nearest neighbour alone"
            )
        return value


class RetrievalConfig(NeighborConfig):
    """How a live retrieval memory searches its datastore."""

    nprobe: int | None = Field(default=None, ge=1, le=1 << 24)
    """Inverted lists searched; default what the datastore was tuned to."""
    teacher: str | None = None
    """Where the datastore's teacher is by now, if it was moved; a live retrieval runs it beside another base."""

    @field_validator("teacher")
    @classmethod
    def _lasts(cls, value: str | None) -> str | None:
        return None if value is None else lasting_name(value)

    @property
    def found(self) -> dict[str, Any]:
        """What decides which votes are found."""
        return self.model_dump(exclude={"teacher"})


class _FoldsConfig(StageConfig):
    """What is asked of a teacher, or of several for a fold each."""

    folds: int = Field(default=0, ge=0, le=99)

    def with_folds(self, count: int) -> Self:
        """The settings in force where so many teachers of folds are given.

        Raises:
            ConfigError: `folds` says otherwise.
        """
        if self.folds not in (0, count):
            raise ConfigError(f"folds = {self.folds}: give as many teachers of folds, there are {count}")
        return self.model_copy(update={"folds": count})


class TargetsConfig(_FoldsConfig, NeighborConfig):
    """How neighbours become soft targets."""

    target_temperature: float | None = Field(default=None, gt=0, le=1e12)  # type: ignore[assignment]
    """Divides squared L2 distances before the softmax; higher is flatter. τ in the papers. Default: chosen so that
    neighbours and teacher together best foresee held-out text."""
    exclude_document: bool = False
    """Leave out neighbours from the position's own document too, not only the position itself."""
    target_mass: float = Field(default=0.999, gt=0, le=1)
    """The smallest set of tokens holding this much probability is kept and renormalised; 1 keeps all."""
    teacher_share: float | Literal["auto"] = 0.0
    """Share of the teacher's own distribution in the targets, in [0, 1]; the neighbours have the rest. auto: what best
    foresees held-out text."""
    max_support: int = Field(default=256, ge=1, le=1 << 20)
    """Tokens of a target at most, where the teacher has a share: its distribution is on all of them."""
    folds: int = Field(default=0, ge=0, le=99)
    """How many teachers speak in the datastore's teacher's place, each of the documents that it has not read: its
    share is then what is foreseen, not what is known by heart. 0: that teacher speaks itself."""
    judged_positions: int = Field(default=4096, ge=1, le=1 << 24)
    """Held-out positions that a choice rests on."""
    dtype: str = "auto"
    """Precision in which teachers read a corpus: float32, bfloat16, float16, or auto (bfloat16 where computed
    natively); over a datastore they compute as its teacher did."""

    @field_validator("teacher_share")
    @classmethod
    def _is_a_share(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 <= value <= 1:  # also where it is NaN
            raise ValueError("must be in [0, 1], or auto")
        return value

    @property
    def chooses(self) -> bool:
        """Whether anything is left to be chosen from the data."""
        return self.target_temperature is None or self.teacher_share == "auto"

    def of_words(self) -> dict[str, Any]:
        """The settings of targets that have no neighbours, those that decide nothing left out."""
        kept = {"teacher_share", "target_mass", "max_support", "folds"}
        values = {name: value for name, value in self.model_dump().items() if name in kept}
        return values | {"judged_positions": self.judged_positions, "dtype": self.dtype}

    @model_serializer(mode="wrap")
    def _said(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """The settings without those that decide nothing, so that older folders are still recognised."""
        values = handler(self)
        del values["dtype"]  # of a datastore, which has its own
        if self.teacher_share == 0:
            del values["teacher_share"], values["max_support"]
        if not self.chooses:
            del values["judged_positions"]
        if not self.folds:
            del values["folds"]
        return values


class WriteConfig(_FoldsConfig):
    """How teachers write."""

    times: int = Field(default=2, ge=1, le=10_000)
    """Documents that are written for each training document; of a longer one for each `document_tokens` of it."""
    prompt_tokens: int = Field(default=16, ge=1, le=1 << 20)
    """Tokens that are given of a document, or of such a part, at most; how many is drawn, from a quarter of it up."""
    document_tokens: int | None = Field(default=None, ge=2, le=1 << 20)
    """Tokens of a written document at most, those given included; default the block size of the corpus."""
    folds: int = Field(default=0, ge=0, le=99)
    """How many teachers write, each what goes on from documents that it has not read. 0: one, from all."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Divides the scores; lower is surer."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Drawn from the smallest set of tokens that holds so much probability."""
    batch_size: int = Field(default=64, ge=1, le=1 << 16)
    """Documents that are written side by side."""
    dtype: str = "auto"
    """Precision of the teachers: float32, bfloat16, float16, or auto (bfloat16 where computed natively)."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Draws what is given of each document, and every token."""
