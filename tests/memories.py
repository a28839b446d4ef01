"""Memory Decoders around tiny random models."""

from families import family_model

from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import MemorySettings

LONG_TEXT = "ignore:the text is longer than the memory's window"
"""Filter for tests of texts that overrun a window; that they warn is shown in tests/memory/test_decoder.py."""


def decoder_memory(
    vocab_size: int,
    *,
    family: str = "llama",
    padding: int = 0,
    window: int | None = None,
    temperature: float = 1.0,
    mix_weight: float | None = None,
    seed: int = 0,
) -> MemoryDecoder:
    """A decoder that votes on `vocab_size` tokens, its output layer padded by some rows."""
    settings = MemorySettings(
        kind="decoder",
        vocab_size=vocab_size,
        context_length=window,
        memory_temperature=temperature,
        mix_weight=mix_weight,
    )
    return MemoryDecoder(family_model(family, vocab_size + padding, seed=seed), settings)
