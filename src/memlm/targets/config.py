"""Settings of the targets stage."""

from typing import Any

from pydantic import Field, field_validator

from memlm.config import StageConfig
from memlm.files import lasting_name

_LOWEST_TEMPERATURE = 1e-9
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
    def _divides_in_float32(cls, value: float) -> float:
        if value < _LOWEST_TEMPERATURE:
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


class TargetsConfig(NeighborConfig):
    """How neighbours become soft targets."""

    exclude_document: bool = False
    """Leave out neighbours from the position's own document too, not only the position itself."""
    target_mass: float = Field(default=0.999, gt=0, le=1)
    """The smallest set of tokens holding this much probability is kept and renormalised; 1 keeps all."""
