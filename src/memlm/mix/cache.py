"""One cache for a mixture: the base's, every memory's and the weight rule's, moved together."""

import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import Cache

from memlm.errors import ConfigError
from memlm.memory.protocol import Memory
from memlm.memory.voter import VoterCache
from memlm.mix.base import BaseCache
from memlm.mix.sleep import Unread
from memlm.models.compiling import Room


class _MadeFor:
    """The memory that a cache was made for, weakly, so that a copy copies none; from a file: the first that asks."""

    def __init__(self, memory: Memory | None = None) -> None:
        self._memory = None if memory is None else weakref.ref(memory)

    def is_it(self, memory: Memory) -> bool:
        self._memory = self._memory or weakref.ref(memory)
        return self._memory() is memory

    def __deepcopy__(self, memo: dict) -> "_MadeFor":
        return self

    def __reduce__(self) -> tuple:
        return _MadeFor, ()


class MixedCache(Cache):
    """What a mixture keeps of the text so far. Crop, reorder, repeat and select act on all parts."""

    def __init__(self, base: Cache, memories: Mapping[str, Memory], rule: VoterCache, batch_size: int) -> None:
        self.of_base = BaseCache(base)
        self.memories = {name: memory.new_cache(batch_size) for name, memory in memories.items()}
        self.rule = rule
        self.unread = Unread()
        """What the base alone has read since the memories fell asleep."""
        self._made_for = {name: _MadeFor(memory) for name, memory in memories.items()}

    @property
    def base(self) -> Cache:
        """transformers' cache of the base."""
        return self.of_base.inner

    def of(self, name: str, memory: Memory) -> VoterCache:
        """The cache of one memory.

        Raises:
            ConfigError: The memory was added later, perhaps in place of another of that name.
        """
        if name not in self.memories or not self._made_for[name].is_it(memory):
            raise ConfigError(f"the cache is older than memory {name!r}; start a new one after adding a memory")
        return self.memories[name]

    def hold(self, room: Room) -> None:
        """Before any token: keys and values of all parts that can stand still, and their steps are compiled."""
        for part in self._parts():
            part.hold(room)

    def _parts(self) -> Iterator[VoterCache]:
        yield self.of_base
        yield from self.memories.values()
        yield self.rule
        yield self.unread

    # --- what transformers asks for -------------------------------------------------------------------------------

    @property
    def layers(self) -> list:  # type: ignore[override]
        """The base's, for callers that look at them."""
        return self.base.layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.base.get_seq_length(layer_idx) if layer_idx else self.of_base.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.base.get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.base.get_mask_sizes(query_length, layer_idx)

    @property
    def is_compileable(self) -> bool:
        return False

    def activate_past_recording(self) -> None:
        self.base.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (a negative number, as everywhere in transformers 5)."""
        tokens = -tokens_to_remove
        self.of_base.crop(tokens)
        tokens -= self.unread.crop(tokens)
        for part in (*self.memories.values(), self.rule):
            part.crop(tokens)

    @property
    def takes_back_rows(self) -> bool:
        """Whether all parts can take back from each row another number of tokens."""
        return all(type(part).take_back is not VoterCache.take_back for part in self._parts())

    def take_back(self, surplus: Sequence[int], columns: int) -> None:
        """Forget the last tokens of each row, and move rows so that all end together; see `VoterCache.take_back`."""
        if all(count == columns for count in surplus):
            return self.crop(-columns) if columns else None
        for part in self._parts():
            part.take_back(surplus, columns)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.base.reorder_cache(beam_idx)  # static caches know this one alone
        for part in (*self.memories.values(), self.rule, self.unread):
            part.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for part in self._parts():
            part.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for part in self._parts():
            part.select(indices)

    def reset(self) -> None:
        for part in self._parts():
            part.reset()

    def empty(self) -> None:
        """Forget all tokens, whatever an interrupted step has left of them."""
        self.of_base.empty()
        for part in (*self.memories.values(), self.rule, self.unread):
            part.reset()
