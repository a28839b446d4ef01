"""What every memory is: a model that stands beside a frozen base and votes on the next token."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from memlm.config import StageConfig

SETTINGS_FILE = "memory.json"


class MemorySettings(StageConfig):
    """What a memory folder says beside its weights (`memory.json`)."""

    kind: str
    """Which class reads the folder."""
    vocab_size: int = Field(ge=1)
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


class Memory(nn.Module, ABC):
    """A model that stands beside a frozen base and votes on the next token.

    `step` runs the body and extends the cache; `votes` runs the head where asked.
    """

    kind: ClassVar[str]
    tap: str | None = None
    """Base module whose input it reads; None: tokens only."""
    can_draft: bool = False
    """Whether it can propose tokens without the base."""

    def __init__(self, settings: MemorySettings) -> None:
        super().__init__()
        self.settings = settings

    @property
    def vocab_size(self) -> int:
        return self.settings.vocab_size

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
    def votes(self, state: Any, keep: slice | Tensor) -> Float[Tensor, "B T2 V"]:
        """Log-probs of the next token after the places in `keep`, in float32, the memory's temperature applied."""

    @abstractmethod
    def label_log_probs(self, state: Any, labels: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Label log-prob, entropy and top-1 probability at every place whose label is not -100, in reading order.

        Args:
            labels: The token that follows each place, or -100; no shift is applied.

        Returns:
            `label` and `entropy` (nats), `top1`; each `(P,)` float32 on the CPU. Logits exist for a chunk at a time.
        """

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Write weights as safetensors, and their config."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the memory to `folder`: weights, config and `memory.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        (folder / SETTINGS_FILE).write_text(self.settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
