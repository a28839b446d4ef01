"""Who drafts: a memory that reads tokens runs ahead of the base; else the text so far is looked up, or a datastore."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlm.errors import ModelError
from memlm.memory.protocol import Memory
from memlm.memory.voter import Votes
from memlm.mix.cache import MixedCache
from memlm.mix.decoding import Processed
from memlm.mix.members import Mixture
from memlm.models.heads import likeliest

_LONGEST_MATCH = 4
_SHORTEST_MATCH = 2
"""Latest tokens of a text that are looked for in what came before them."""


@dataclass(frozen=True)
class Drafts:
    """Drafted tokens, one row per text."""

    tokens: Int[Tensor, "B K"]
    lengths: list[int]
    """How many of a row's are drafted; the others only fill it up."""
    probs: Float[Tensor, "B K V"] | None = None
    """What they were drawn from; None where each was the only choice."""
    read: dict[str, tuple[Any, Votes]] = field(default_factory=dict)
    """Memories that have read the token before the drafts and all drafts: their states there and votes."""


class Drafter(ABC):
    """Proposes how texts go on."""

    share: float = 0.0
    """What drafting one token costs, of a plain step, about."""

    @abstractmethod
    def draft(
        self, texts: Sequence[Int[Tensor, "1 N"]], fresh: Int[Tensor, "B 1"], cache: MixedCache, count: int
    ) -> Drafts | None:
        """At most `count` tokens for each text; None where there is nothing to propose.

        Args:
            texts: All tokens so far.
            fresh: Their last ones, which no model has read.
            cache: Of the mixture.
            count: At least 1.
        """

    def agreement(
        self, texts: Sequence[Int[Tensor, "1 N"]], votes: Mapping[str, Votes], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B"] | None:
        """The chance that a token drafted for a plain step would have been accepted; None where that is not known.

        Args:
            texts: Before the token.
            votes: By memory, at the last place.
            scores: The mixture's there, after the processors.
        """
        return None

    def saw(self, states: Mapping[str, Any], places: Sequence[int], count: int) -> None:  # noqa: B027
        """Hear what the memories made of a round.

        Args:
            states: By memory, `(B, T, ...)`, of the tokens that were read.
            places: Per text the place of the token after which its last one came, of the latest `count`.
        """


def drafter_of(mixed: Mixture, processed: Processed, *, sampled: bool) -> Drafter:
    """The best there is for a mixture: the memory of the largest weight of those that can run ahead, or a lookup."""
    memories = mixed.named_memories()
    able = [name for name, memory in memories.items() if memory.can_draft]
    if able:
        name = max(able, key=lambda name: mixed.mix_weights.get(name, 0.0))
        sizes = {part: sum(p.numel() for p in memory.parameters()) for part, memory in memories.items()}
        whole = sum(p.numel() for p in mixed.base.parameters()) + sum(sizes.values())
        return MemoryDrafter(name, memories[name], processed, sampled, sizes[name] / max(1, whole))
    return Lookup({name: memory for name, memory in memories.items() if memory.can_quote}, mixed.vocab_size)


@dataclass
class MemoryDrafter(Drafter):
    """A memory goes on by itself; it reads the last of its tokens too."""

    name: str
    memory: Memory
    processed: Processed
    sampled: bool
    share: float

    def agreement(
        self, texts: Sequence[Int[Tensor, "1 N"]], votes: Mapping[str, Votes], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B"] | None:
        if self.name not in votes:
            return None
        own = self.processed(texts, torch.empty(len(texts), 0, dtype=torch.long), cast(Tensor, votes[self.name]))[:, -1]
        if self.sampled:
            return torch.minimum(own.softmax(-1), scores.softmax(-1)).sum(-1)
        return (likeliest(own) == likeliest(scores)).float()

    def draft(
        self, texts: Sequence[Int[Tensor, "1 N"]], fresh: Int[Tensor, "B 1"], cache: MixedCache, count: int
    ) -> Drafts:
        own: Any = cache.of(self.name, self.memory)
        token, tokens = fresh, fresh[:, :0]
        states: list[Tensor] = []
        votes: list[Tensor] = []
        probs: list[Tensor] = []
        try:
            for place in range(count + 1):
                states.append(self.memory.step(token, None, cache=own))
                votes.append(cast(Tensor, self.memory.votes(states[-1], slice(None))))
                if bool(votes[-1][:, 0, 0].isnan().any()):
                    raise ModelError(f"memory {self.name!r} gives no finite scores")
                if place == count:
                    break
                so_far = [torch.cat([ids, new[None].to(ids.device)], 1) for ids, new in zip(texts, tokens, strict=True)]
                scores = self.processed(so_far, tokens[:, :0], votes[-1])[:, 0]
                if self.sampled:
                    probs.append(scores.softmax(-1))
                    token = torch.multinomial(probs[-1], 1)
                else:
                    token = likeliest(scores)[:, None]
                tokens = torch.cat([tokens, token.to(tokens.device)], 1)
        except BaseException:
            if states:
                own.crop(len(states))
            raise
        read = {self.name: (torch.cat(states, 1), cast(Votes, torch.cat(votes, 1)))}
        return Drafts(tokens, [count] * len(texts), torch.stack(probs, 1) if probs else None, read)


@dataclass
class Lookup(Drafter):
    """What came after the same tokens earlier in the text; else what comes in a datastore after the entry that said the
    last token and is nearest."""

    quoting: Mapping[str, Memory]
    """Memories that can tell how such a text goes on."""
    vocab_size: int
    states: dict[str, Any] = field(default_factory=dict)
    """By memory, those after which the last token of each text came."""

    def draft(
        self, texts: Sequence[Int[Tensor, "1 N"]], fresh: Int[Tensor, "B 1"], cache: MixedCache, count: int
    ) -> Drafts | None:
        found = [earlier(ids[0].tolist(), count) for ids in texts]
        for name, memory in self.quoting.items():
            missing = [row for row, tokens in enumerate(found) if not tokens]
            if missing and name in self.states:
                quoted = memory.quote(self.states[name][missing], fresh[missing, 0], count)
                for row, tokens in zip(missing, quoted, strict=True):
                    found[row] = tokens
        found = [list(takewhile(lambda token: token < self.vocab_size, tokens)) for tokens in found]
        lengths = [len(tokens) for tokens in found]
        if not any(lengths):
            return None
        longest = max(lengths)
        rows = [tokens + [0] * (longest - len(tokens)) for tokens in found]
        return Drafts(torch.tensor(rows, device=fresh.device), lengths)

    def saw(self, states: Mapping[str, Any], places: Sequence[int], count: int) -> None:
        self.states = {
            name: torch.stack([row[place - count] for row, place in zip(states[name], places, strict=True)])
            for name in self.quoting
            if name in states
        }


def earlier(text: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that followed when the last few tokens of a text stood in it before, the latest time."""
    for length in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
        last = text[-length:]
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == last:
                return list(text[start + length : start + length + count])
    return []
