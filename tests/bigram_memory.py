"""A kind of memory as one would add it: it sees the last token only. tests/memory/test_own_kind.py lists it."""

from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.memory.config import StartConfig
from memlm.memory.protocol import MemorySettings, ParametricMemory
from memlm.memory.voter import NoCache
from memlm.models.heads import Head
from memlm.models.loading import WEIGHTS_FILE


class BigramStart(StartConfig):
    """Sees the last token only."""

    kind: Literal["bigram"] = "bigram"
    embedding: int = Field(default=16, ge=1)
    """Numbers that a token is kept in."""


class BigramSettings(MemorySettings):
    """What its folder says."""

    embedding: int


class BigramMemory(ParametricMemory):
    """The next token's distribution by the last token, factorised."""

    kind = "bigram"
    settings_class = BigramSettings

    def __init__(self, settings: BigramSettings) -> None:
        super().__init__(settings)
        self.embed = nn.Embedding(settings.vocab_size, settings.embedding)
        self.head = Head(nn.Linear(settings.embedding, settings.vocab_size, bias=False))
        self.output = self.head.linear

    @classmethod
    def start(
        cls, config: BigramStart, settings: MemorySettings, *, init: str | None, base: PreTrainedModel, seed: int
    ) -> Self:
        torch.manual_seed(seed)
        return cls(BigramSettings(**settings.model_dump(), embedding=config.embedding))

    @classmethod
    def load(cls, source: str, settings: BigramSettings, *, base: str | None = None, **kwargs: Any) -> Self:
        memory = cls(settings)
        memory.load_state_dict(safetensors.torch.load_file(Path(source) / WEIGHTS_FILE))
        dtype = kwargs.get("dtype")
        return memory.to(dtype if isinstance(dtype, torch.dtype) else None).eval()

    def save_weights(self, folder: Path) -> None:
        safetensors.torch.save_file(self.state_dict(), folder / WEIGHTS_FILE)

    def training_hidden(self, input_ids: Tensor, activations: Tensor | None, places: Tensor) -> Tensor:
        return self.embed(input_ids.flatten()[places])

    def new_cache(self, batch_size: int) -> NoCache:
        return NoCache()

    def step(self, tokens: Tensor, activations: Any = None, attention_mask: Any = None, cache: Any = None) -> Tensor:
        return self.embed(tokens)

    def hidden(self, state: Tensor, places: Any) -> Tensor:
        return state[places]
