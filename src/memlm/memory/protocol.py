"""What every memory is: a voter that stands beside a frozen base."""

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from memlm.config import MAX_COUNT, StageConfig
from memlm.corpus.blocks import IGNORE, MAX_VOCABULARY
from memlm.errors import ConfigError, ModelError
from memlm.files import check_no_links
from memlm.memory.confidence import GATE_FILE, ConfidenceHead
from memlm.memory.loss import Beside, DistillationLoss, distillation_loss
from memlm.memory.reading import GivenActivations, WindowedReader
from memlm.memory.voter import HeadVoter, Voter, VoterCache

SETTINGS_FILE = "memory.json"


class MemorySettings(StageConfig):
    """What a memory folder says beside its weights (`memory.json`)."""

    kind: str
    """Which class reads the folder."""
    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY)
    """Token ids it votes on are below it."""
    context_length: int | None = Field(default=None, ge=2, le=MAX_COUNT)
    """Tokens it saw at a time in training; None: no limit."""
    memory_temperature: float = Field(default=1.0, gt=0, le=1e9)
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


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """Raise unless all weights are finite.

    Args:
        name: What an error calls the model.

    Raises:
        ModelError: Some are NaN or infinite; the first tensor is named.
    """
    held = {key: p for key, p in model.named_parameters() if not p.is_meta and p.is_floating_point()}
    if bad := [key for key, p in held.items() if not _is_finite(p)]:
        count = sum(int((~held[key].isfinite()).sum()) for key in bad)
        total = sum(p.numel() for p in held.values())
        raise ModelError(f"{name} has {count:,} of {total:,} weights that are not finite, the first in {bad[0]}")


def _is_finite(weights: Tensor) -> bool:
    try:
        # a sum is finite where all are, but for an overflow, which is looked at closely
        return bool(weights.sum().isfinite()) or bool(weights.isfinite().all())
    except NotImplementedError:  # quantised: whole numbers, and scales that were found from weights when it was loaded
        return True


class Memory(nn.Module, Voter):
    """A voter beside a frozen base, with settings and a folder of its own."""

    kind: ClassVar[str]
    settings_class: ClassVar[type[MemorySettings]] = MemorySettings
    reads_base: ClassVar[bool] = False
    """Whether every such memory has a tap."""
    can_draft: ClassVar[bool] = False
    """Whether it can propose tokens without the base."""
    can_quote: ClassVar[bool] = False
    """Whether it holds text that can be proposed, see `quote`."""
    reader: WindowedReader | GivenActivations
    """Gives the states, one vector per token; a memory that overrides `step` and `new_cache` has none."""

    confidence_head: ConfidenceHead | None
    """Says whether to believe it; None: none was fitted."""

    def __init__(self, settings: MemorySettings) -> None:
        super().__init__()
        self.settings = settings
        self.confidence_head = None

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.settings.vocab_size

    @property
    def tap(self) -> str | None:  # type: ignore[override]
        return self.settings.tap

    @property
    def device(self) -> torch.device:
        """Where its weights are; the CPU for a memory without weights."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def check_base(self, base: PreTrainedModel) -> None:
        """Refuse a base that the memory cannot stand beside.

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

    def new_cache(self, batch_size: int) -> VoterCache:
        return self.reader.new_cache(batch_size)

    def step(
        self,
        tokens: Int[Tensor, "B T"],
        activations: Any = None,
        attention_mask: Bool[Tensor, "B L"] | None = None,
        cache: Any = None,
        *,
        keep: slice | Tensor | None = None,
    ) -> Any:
        """As `Voter.step`.

        Args:
            tokens, activations, attention_mask, cache: As there.
            keep: Places whose votes will be asked for; None: all. A memory may leave the others out.

        Raises:
            ModelError: It has a tap and there are no activations, or of another width.
        """
        return self.reader.step(tokens, activations, attention_mask, cache, keep=keep)

    def evidence(self, state: Any, places: Any) -> Float[Tensor, "... W"] | None:
        """What a confidence head may look at of the memory's own state; None: nothing.

        Args:
            state: From `step`.
            places: An index of `(B, T)`: a mask of that shape, or a slice of rows and one of columns.
        """
        return None

    def confidence(self, state: Any, keep: slice | Tensor) -> Float[Tensor, "B T2"]:
        """What the head makes of the memory's own state at the places in `keep`; 0 where it has none to look at."""
        found = self._own_confidence(state, (slice(None), keep))
        return torch.zeros((), device=self.device) if found is None else found

    def _own_confidence(self, state: Any, places: Any) -> Tensor | None:
        """What the head makes of the memory's own state at some places; None where it looks at none."""
        seen = None if self.confidence_head is None else self.evidence(state, places)
        return None if self.confidence_head is None or seen is None else self.confidence_head.of_state(seen)

    def quote(self, states: Any, tokens: Int[Tensor, "R"], count: int) -> list[list[int]]:
        """Up to `count` tokens of held text for each of some states: where the nearest that said a token goes on.

        Args:
            states: From `step`, one place each.
            tokens: The token that came after each.
        """
        raise NotImplementedError

    def columns(self, state: Any, labels: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        found = super().columns(state, labels)
        own = self._own_confidence(state, labels != IGNORE)
        return found if own is None else found | {"confidence": own.cpu()}

    # --- what transformers' Trainer asks of a model ---------------------------------------------------------------

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Compute activations again in the backward pass instead of keeping them; arguments as transformers' models.

        Raises:
            ConfigError: The kind cannot.
        """
        raise ConfigError(f"trainer.activation_checkpointing: a memory of kind {self.kind} has none; leave it out")

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """The name that older versions of transformers give `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(**kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings.

        Raises:
            ConfigError: The kind has none.
        """
        raise ConfigError(f"trainer.neftune_noise_alpha: a memory of kind {self.kind} has no embeddings; leave it out")

    # --- training; a memory that is not trained leaves these ------------------------------------------------------

    @classmethod
    def check_start(cls, config: Any, *, init: str | None, goes_on: bool, block_size: int) -> None:
        """Refuse a start that cannot be; looks at configs only, before any weights are loaded.

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

    def train_beside_base(self, wanted: bool) -> None:
        """Be trained through the mixture with the base, or no longer.

        Raises:
            ConfigError: The kind cannot.
        """
        if wanted:
            raise ConfigError(f"objective = 'mixture': a memory of kind {self.kind} has imitation only")

    def merge_adapters(self) -> None:
        """Add what trained adapters learnt to the weights that they stand beside, and leave them behind."""

    def own_parameters(self) -> Iterable[nn.Parameter]:
        """Those that it keeps: all but adapters'."""
        return self.parameters()

    @classmethod
    def size(cls, config: Any, *, init: str | None, base: PreTrainedConfig) -> int:
        """About how many parameters `start` would give, by the configs of start model and base."""
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
        """Write the memory to `folder`: weights, config and `memory.json`.

        Raises:
            ModelError: Weights are NaN or infinite; nothing is written.
            OutputExistsError: The folder holds a link.
        """
        folder = Path(folder)
        check_no_links(folder)
        check_finite(self, f"the memory for {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        (folder / SETTINGS_FILE).write_text(self.settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if self.confidence_head is not None:
            self.confidence_head.save(folder)
        else:
            (folder / GATE_FILE).unlink(missing_ok=True)  # of a memory that was there before


class ParametricMemory(Memory, HeadVoter):
    """A memory with weights that are trained; kinds differ in the hidden states that its head reads."""

    training_confidence: nn.Linear | None
    """Weighs the memory in a mixture that it is trained through; None: it is trained alone."""

    def __init__(self, settings: MemorySettings) -> None:
        super().__init__(settings)
        self.training_confidence = None

    def train_beside_base(self, wanted: bool) -> None:
        """Weigh the memory by a confidence, one half everywhere at first, or leave it behind.

        What is learnt of confidence on the training text believes the memory too much: `memlm gate` fits it on
        held-out text.
        """
        if not wanted:
            self.training_confidence = None
            return
        linear = nn.Linear(self.head.weight.shape[1], 1)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.training_confidence = linear

    @property
    def temperature(self) -> float:
        return self.settings.memory_temperature

    def evidence(self, state: Any, places: Any) -> Float[Tensor, "... W"]:
        return self.hidden(state, places)

    @abstractmethod
    def training_hidden(
        self, input_ids: Int[Tensor, "B T"], activations: Float[Tensor, "P D"] | None, places: Int[Tensor, "P"]
    ) -> Float[Tensor, "P W"]:
        """What the head reads at `places`, with gradients.

        Args:
            input_ids: Padded on the right with anything.
            activations: The base's at `tap`, at these places; None where `tap` is None.
            places: From `predicting_places`.
        """

    @final
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
        base_labels: Float[Tensor, "P"] | None = None,
        base_targets: Float[Tensor, "S"] | None = None,
        mixture_share: float = 0.0,
    ) -> DistillationLoss:
        """The distillation loss of a batch, summed over its positions.

        Args:
            input_ids: Padded on the right with anything.
            labels: `input_ids` where a token is predicted, -100 elsewhere; shifted here, as transformers does.
            kl_weight: In [0, 1].
            activations: The base's at `tap`, of the places that predict, in reading order; None where `tap` is None.
            target_counts, target_ids, target_probs: Targets of the predicted tokens in reading order.
            places: What `predicting_places` finds in the labels; where it is given, no accelerator is waited for.
            base_labels, base_targets: The base's log-probs of labels and targets' tokens, where the memory is trained
                through the mixture with it; `training_confidence` weighs them.
            mixture_share: Share of the mixture in the loss.
        """
        places = predicting_places(labels) if places is None else places
        hidden, beside = self.training_hidden(input_ids, activations, places), None
        if base_labels is not None:
            assert self.training_confidence is not None
            confidence = self.training_confidence(hidden)[:, 0]
            beside = Beside(base_labels, base_targets, confidence, mixture_share)
        return distillation_loss(
            hidden,
            labels.flatten()[places + 1],
            self.head,
            kl_weight=kl_weight,
            vocab_size=self.vocab_size,
            target_counts=target_counts,
            target_ids=target_ids,
            target_probs=target_probs,
            beside=beside,
        )
