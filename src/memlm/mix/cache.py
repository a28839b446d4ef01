"""One cache for a mixed model: the base's and every memory's, moved together."""

import weakref
from collections.abc import Mapping

import torch
from transformers import Cache

from memlm.errors import ConfigError
from memlm.memory.protocol import Memory, MemoryCache


class MixedCache(Cache):
    """The base's cache and the memories'. Crop, reorder, repeat and select act on all of them."""

    def __init__(self, base: Cache, memories: Mapping[str, Memory], batch_size: int) -> None:
        self.base = base
        self.memories = {name: memory.new_cache(batch_size) for name, memory in memories.items()}
        # weak, so that a deep copy of the cache copies no memory
        self._made_for = {name: weakref.ref(memory) for name, memory in memories.items()}

    def of(self, name: str, memory: Memory) -> MemoryCache:
        """The cache of one memory.

        Raises:
            ConfigError: The memory was added later, perhaps in place of another of that name.
        """
        if name not in self.memories or self._made_for[name]() is not memory:
            raise ConfigError(f"the cache is older than memory {name!r}; start a new one after adding a memory")
        return self.memories[name]

    @property
    def layers(self) -> list:  # type: ignore[override]
        """The base's, for callers that look at them."""
        return self.base.layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.base.get_seq_length(layer_idx)

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
        self.base.crop(tokens_to_remove)
        for cache in self.memories.values():
            cache.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.base.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.base.batch_repeat_interleave(repeats)
        for cache in self.memories.values():
            cache.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.base.batch_select_indices(indices)
        self._select(indices)

    def _select(self, rows: torch.Tensor) -> None:
        for cache in self.memories.values():
            cache.select(rows)

    def reset(self) -> None:
        self.base.reset()
        for cache in self.memories.values():
            cache.reset()
