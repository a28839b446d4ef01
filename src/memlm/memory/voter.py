"""What votes on the next token: a base, or any memory beside it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlm.corpus.blocks import IGNORE
from memlm.models.compiling import Room
from memlm.models.heads import Head, label_log_probs
from memlm.targets.votes import SparseProbs

Votes = Tensor | SparseProbs
"""Log-probs `(B, T, V)` in float32, or sparse distributions of B * T positions in reading order."""


class VoterCache(ABC):
    """What is kept of the tokens read so far; all parts of a mixture move together through generation."""

    def hold(self, room: Room) -> None:  # noqa: B027
        """Before any token: let what is kept stand still, and steps be compiled. A cache that cannot leaves this as it
        is."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""

    def take_back(self, surplus: Sequence[int], columns: int) -> None:
        """Forget the last tokens of each row, and move rows so that all end together. A cache that cannot leaves this
        as it is, and batches are then not drafted.

        Args:
            surplus: Per row, how many; a negative number moves a row to the left, and padding stands behind it.
            columns: By how many columns the whole gets shorter. A row moves `surplus - columns` to the right; what
                comes in on its left is padding.
        """
        raise NotImplementedError

    @abstractmethod
    def select(self, rows: Int[Tensor, "B2"]) -> None:
        """Keep these rows of the batch, in this order; a row may come several times."""

    @abstractmethod
    def repeat(self, times: int) -> None:
        """Repeat every row of the batch `times` times, copies side by side."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens."""


def moved(part: Tensor, by: Sequence[int], dim: int, width: int | None = None) -> Tensor:
    """Rows of a batch moved along an axis; where nothing comes in stands what was nearest.

    Args:
        part: `(B, ...)`.
        by: Per row, places to the right.
        dim: The axis, after the first.
        width: Places of it that are kept, from the left; None: all.
    """
    length, inner = part.shape[dim], part.shape[1:dim].numel()
    places = torch.arange(length if width is None else width, device=part.device)
    places = (places - torch.tensor(by, device=part.device)[:, None]).clamp(0, length - 1)
    starts = torch.arange(len(part) * inner, device=part.device)[:, None] * length
    flat = part.flatten(0, dim).index_select(0, (starts + places.repeat_interleave(inner, 0)).flatten())
    return flat.view(*part.shape[:dim], places.shape[1], *part.shape[dim + 1 :])


class NoCache(VoterCache):
    """The cache of a part whose state depends on no earlier token."""

    def crop(self, tokens: int) -> None:
        pass

    def take_back(self, surplus: Sequence[int], columns: int) -> None:
        pass

    def select(self, rows: Int[Tensor, "B2"]) -> None:
        pass

    def repeat(self, times: int) -> None:
        pass

    def reset(self) -> None:
        pass


class Voter(ABC):
    """A model that votes on the next token.

    `step` reads tokens (or the base's activations) and extends the cache; `votes` runs the head where asked.
    """

    vocab_size: int
    """Token ids it votes on are below it."""
    tap: str | None
    """Base module whose input it reads; None: tokens only."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it computes."""

    @abstractmethod
    def new_cache(self, batch_size: int) -> VoterCache:
        """An empty cache for a batch."""

    @abstractmethod
    def step(
        self,
        tokens: Int[Tensor, "B T"],
        activations: Float[Tensor, "B T D"] | None = None,
        attention_mask: Bool[Tensor, "B L"] | None = None,
        cache: Any = None,
    ) -> Any:
        """Read tokens and return a state that `votes` understands, one place per token.

        Args:
            tokens: The new tokens only.
            activations: The base's activations at `tap`; None where `tap` is None.
            attention_mask: False where a token is padding, the new ones last; None: none is.
            cache: Extended by `tokens`; None: they are all there is.
        """

    @abstractmethod
    def votes(self, state: Any, keep: slice | Tensor) -> Votes:
        """The next token's distribution after the places in `keep`, the voter's temperature applied.

        A model gives normalised log-probs in float32, a retriever sparse probabilities.
        """

    @abstractmethod
    def label_log_probs(self, state: Any, labels: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """What it thinks at every place whose label is not -100, in reading order.

        Args:
            labels: The token that follows each place, or -100; no shift is applied.

        Returns:
            `label` (log-prob of the label) and `entropy` in nats, `top1` (probability of the likeliest token), float32;
            `top1_id` (that token), int32; each `(P,)` on the CPU. Logits exist for a chunk at a time.
        """

    def columns(self, state: Any, labels: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """What `label_log_probs` gives, and `confidence`: what its own state says of how sure it is, 0 where nothing
        is known of that (see `ConfidenceHead.of_state`)."""
        found = self.label_log_probs(state, labels)
        return found | {"confidence": torch.zeros_like(found["label"])}


class HeadVoter(Voter):
    """A voter whose last step is an output layer over hidden states; subclasses say which hidden states."""

    head: Head
    """The output layer."""

    @property
    def temperature(self) -> float:
        """Divides the logits."""
        return 1.0

    @abstractmethod
    def hidden(self, state: Any, places: Any) -> Float[Tensor, "... D"]:
        """What the head reads at these places.

        Args:
            state: From `step`.
            places: An index of `(B, T)`: a mask of that shape, or a slice of rows and one of columns.
        """

    @final
    def logits(self, state: Any, keep: slice | Tensor) -> Float[Tensor, "B T2 V"]:
        """The head's logits in float32 after the places in `keep`, before the temperature."""
        return self.head(self.hidden(state, (slice(None), keep)))[..., : self.vocab_size].float()

    @final
    def votes(self, state: Any, keep: slice | Tensor) -> Float[Tensor, "B T2 V"]:
        logits = self.logits(state, keep)
        return (logits if self.temperature == 1 else logits / self.temperature).log_softmax(-1)

    @final
    def label_log_probs(self, state: Any, labels: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        there = labels != IGNORE
        hidden = self.hidden(state, there)
        return label_log_probs(
            hidden, labels[there], self.head, vocab_size=self.vocab_size, temperature=self.temperature
        )
