"""Memories that sleep: where they count for little they are not read at all, and look up now and then."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlm.memory.voter import VoterCache


@dataclass(frozen=True)
class Sleep:
    """When the memories of a mixture sleep: together, for `tokens` places from one at which they weigh less than
    `below`; their weight is 0 there, and at the next place they look up.

    What they would have weighed, and what the gate makes of the text, is the same whether they sleep or not.
    """

    tokens: int
    """0: they never sleep."""
    below: float

    def along(
        self,
        left: Int[Tensor, "R"],
        total: Float[Tensor, "R T"],
        known: Bool[Tensor, "R T"],
    ) -> tuple[Bool[Tensor, "R T"], Int[Tensor, "R T"]]:
        """Whether they sleep at each place, and how many places are left to sleep after it.

        Args:
            left: Places left to sleep before the first.
            total: What the memories weigh at each place together, awake.
            known: False where a place is padding or that is not known: it changes nothing.
        """
        asleep, after = torch.zeros_like(known), torch.empty_like(total, dtype=torch.long)
        low = total < self.below
        for at in range(total.shape[1]):
            sleeps = ((left > 0) | low[:, at]) & known[:, at]
            rest = torch.where(left > 0, left - 1, self.tokens - 1)
            left = torch.where(sleeps, rest, left)
            asleep[:, at], after[:, at] = sleeps, left
        return asleep, after


@dataclass
class Unread(VoterCache):
    """Tokens that the base has read and sleeping memories have not, and what the base made of them."""

    tokens: list[Int[Tensor, "B T"]] = field(default_factory=list)
    hidden: list[Float[Tensor, "B T D"]] = field(default_factory=list)
    """What its head reads there."""
    activations: dict[str, list[Float[Tensor, "B T D"]]] = field(default_factory=dict)
    """Tap to what went into that module."""

    def __len__(self) -> int:
        return sum(part.shape[1] for part in self.tokens)

    def add(self, tokens: Tensor, hidden: Tensor, activations: dict[str, Tensor]) -> None:
        """Put tokens at the end."""
        self.tokens.append(tokens)
        self.hidden.append(hidden.clone())  # where no head splits off these are logits, which callers write to
        for tap, found in activations.items():
            self.activations.setdefault(tap, []).append(found)

    def before(self, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B O+T"]:
        """These tokens, with those unread before them."""
        return torch.cat([*(part.to(tokens.device) for part in self.tokens), tokens], 1)

    def before_hidden(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B O+T D"]:
        """What the base's head reads, with that of the tokens unread before."""
        return torch.cat([*self.hidden, hidden], 1)

    def before_activations(self, tap: str, found: Float[Tensor, "B T D"]) -> Float[Tensor, "B O+T D"]:
        """These activations, with those of the tokens unread before them."""
        return torch.cat([*self.activations.get(tap, []), found], 1)

    def crop(self, tokens: int) -> int:
        """Forget the last `tokens` tokens, as many as there are at most; returns how many those were."""
        count = len(self)
        kept = max(0, count - tokens)
        if kept == count:
            return 0
        for parts in self._parts():
            whole = torch.cat(parts, 1)[:, :kept] if parts else None
            parts[:] = [] if whole is None or not kept else [whole]
        return count - kept

    def take_back(self, surplus: Sequence[int], columns: int) -> None:
        if len(self) and any(count != columns for count in surplus):
            raise NotImplementedError("rows with unread tokens end together")
        self.crop(columns)

    def select(self, rows: Int[Tensor, "B2"]) -> None:
        for parts in self._parts():
            parts[:] = [part[rows.to(part.device)] for part in parts]

    def repeat(self, times: int) -> None:
        for parts in self._parts():
            parts[:] = [part.repeat_interleave(times, 0) for part in parts]

    def reset(self) -> None:
        self.crop(len(self))

    def _parts(self) -> Iterator[list[Tensor]]:
        yield self.tokens
        yield self.hidden
        yield from self.activations.values()
