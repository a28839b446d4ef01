"""What every memory is: a model that stands beside a frozen base and votes on the next token."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.config import StageConfig
from memlm.corpus.blocks import IGNORE, MAX_VOCABULARY
from memlm.memory.loss import DistillationLoss
from memlm.targets.votes import SparseProbs

SETTINGS_FILE = "memory.json"


class MemorySettings(StageConfig):
    """What a memory folder says beside its weights (`memory.json`)."""

    kind: str
    """Which class reads the folder."""
    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY)
    """Token ids it votes on are below it."""
    context_length: int | None = Field(default=None, ge=2)
    """Tokens it saw at a time in training; None: no limit."""
    memory_temperature: float = Field(default=1.0, gt=0)
    """Divides the memory's logits before mixing."""
    mix_weight: float | None = Field(default=None, ge=0, le=1)
    """Weight that was best on the validation split with the base it was validated with."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer whose ids it votes on."""
    validated_with: str | None = None
    """The base that mix_weight was chosen with."""
    tap: str | None = None
    """Base module whose input it reads; None: it reads tokens only."""


def predicting_places(labels: Int[Tensor, "B T"]) -> Int[Tensor, "P"]:
    """Flat numbers of the places whose next token is predicted, that is, no -100, in reading order."""
    return nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero()[:, 0]


class MemoryCache(ABC):
    """What a memory keeps of the tokens it has read; follows the cache of the base through generation."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""

    @abstractmethod
    def select(self, rows: Int[Tensor, "B2"]) -> None:
        """Keep these rows of the batch, in this order; a row may come several times."""

    @abstractmethod
    def repeat(self, times: int) -> None:
        """Repeat every row of the batch `times` times, copies side by side."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens."""


class NoCache(MemoryCache):
    """The cache of a memory that looks at nothing but the base's hidden state."""

    def crop(self, tokens: int) -> None:
        pass

    def select(self, rows: Int[Tensor, "B2"]) -> None:
        pass

    def repeat(self, times: int) -> None:
        pass

    def reset(self) -> None:
        pass


Votes = Tensor | SparseProbs
"""Log-probs `(B, T, V)` in float32, or sparse distributions of B * T positions in reading order."""


class Memory(nn.Module, ABC):
    """A model that stands beside a frozen base and votes on the next token.

    `step` reads tokens (or the base's activations) and extends the cache; `votes` runs the head where asked.
    """

    kind: ClassVar[str]
    settings_class: ClassVar[type[MemorySettings]] = MemorySettings
    reads_base: ClassVar[bool] = False
    """Whether every such memory has a tap."""
    can_draft: ClassVar[bool] = False
    """Whether it can propose tokens without the base."""

    def __init__(self, settings: MemorySettings) -> None:
        super().__init__()
        self.settings = settings

    @property
    def vocab_size(self) -> int:
        return self.settings.vocab_size

    @property
    def tap(self) -> str | None:
        """Base module whose input it reads; None: tokens only."""
        return self.settings.tap

    @property
    def device(self) -> torch.device:
        """Where its weights are; the CPU for a memory without weights."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def check_base(self, base: PreTrainedModel) -> None:
        """Nothing, where the memory can stand beside `base`.

        Raises:
            ModelError: It reads activations that `base` does not have.
        """

    def set_window(self, tokens: int) -> None:
        """Let the memory look back so many tokens; memories without a window ignore it.

        Raises:
            ConfigError: It cannot look back that far.
        """

    @property
    def context_length(self) -> int | None:
        return self.settings.context_length

    @abstractmethod
    def new_cache(self, batch_size: int) -> MemoryCache:
        """An empty cache for a batch."""

    @abstractmethod
    def step(
        self,
        tokens: Int[Tensor, "B T"],
        activations: Float[Tensor, "B T D"] | None = None,
        attention_mask: Bool[Tensor, "B T"] | None = None,
        cache: MemoryCache | None = None,
    ) -> Any:
        """Read tokens and return a state that `votes` understands, one place per token.

        Args:
            tokens: The new tokens only.
            activations: The base's activations at `tap`; None where `tap` is None.
            attention_mask: False where a new token is padding; None: none is.
            cache: Extended by `tokens`; None: they are all there is.
        """

    @abstractmethod
    def votes(self, state: Any, keep: slice | Tensor) -> Votes:
        """The next token's distribution after the places in `keep`, the memory's temperature applied.

        A parametric memory gives normalised log-probs in float32, a retriever sparse probabilities.
        """

    @abstractmethod
    def label_log_probs(self, state: Any, labels: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Label log-prob, entropy and top-1 probability at every place whose label is not -100, in reading order.

        Args:
            labels: The token that follows each place, or -100; no shift is applied.

        Returns:
            `label` and `entropy` (nats), `top1`; each `(P,)` float32 on the CPU. Logits exist for a chunk at a time.
        """

    # --- training; a memory that is not trained leaves these ------------------------------------------------------

    @classmethod
    def check_start(cls, config: Any, *, init: str | None, goes_on: bool, block_size: int) -> None:
        """Raise unless a memory can start like this; looks at configs only, before any weights are loaded.

        Args:
            config: What is asked for, in the settings that `KINDS` lists for the kind.
            init: Start model, or memory to go on with.
            goes_on: Whether `init` is a memory of this kind.
            block_size: Tokens it will see at a time in training.

        Raises:
            ConfigError: A setting is missing, or does not fit init.
        """

    @classmethod
    def start(
        cls, config: Any, settings: MemorySettings, *, init: str | None, base: PreTrainedModel, seed: int
    ) -> Self:
        """An untrained memory in float32.

        Args:
            config: What is asked for; `check_start` found it good.
            settings: What every kind records.
            init: Start model.
            base: The loaded base.
            seed: Of random weights.
        """
        raise NotImplementedError

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        kl_weight: float,
        activations: Float[Tensor, "P D"] | None = None,
        target_counts: Int[Tensor, "P"] | None = None,
        target_ids: Int[Tensor, "S"] | None = None,
        target_probs: Float[Tensor, "S"] | None = None,
        places: Int[Tensor, "P"] | None = None,
    ) -> DistillationLoss:
        """The distillation loss of a batch, summed over its positions.

        Args:
            input_ids: Padded on the right with anything.
            labels: `input_ids` where a token is predicted, -100 elsewhere; shifted here, as transformers does.
            kl_weight: In [0, 1].
            activations: The base's at `tap`, of the places that predict, in reading order; None where `tap` is None.
            target_counts, target_ids, target_probs: Targets of the predicted tokens in reading order.
            places: What `predicting_places` finds in the labels; where it is given, no accelerator is waited for.
        """
        raise NotImplementedError

    # --- saving -----------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def load(cls, source: str, settings: Any, *, base: str | None = None, **kwargs: Any) -> Self:
        """The memory at a path or hub id, in evaluation mode.

        Args:
            source: Folder or hub id.
            settings: Of `settings_class`; None for a folder of transformers.
            base: Name of the base that it will stand beside, where that is known.
            kwargs: As `load_memory` takes them.
        """

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Write weights as safetensors, and their config; nothing where there are none."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the memory to `folder`: weights, config and `memory.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        (folder / SETTINGS_FILE).write_text(self.settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
