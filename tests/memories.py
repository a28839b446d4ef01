"""Memory Decoders around tiny random models; and what mixtures of all kinds are made with."""

from collections.abc import Callable

from families import family_model

from memlm import MixedLM
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import MemorySettings
from memlm.targets.config import RetrievalConfig

LONG_TEXT = "ignore:the text is longer than the memory's window"
"""Filter for tests of texts that overrun a window; that they warn is shown in tests/memory/test_decoder.py."""

WEIGHTS = {"law": 0.3, "mlp": 0.2, "facts": 0.25}
# all entries vote, so that equally near ones at the edge of k neighbours cannot make a difference, and nearly alike, so
# that a query rounded to another float16 (a distance changes by some 0.003) changes votes by 1e-4 of themselves
ALL = RetrievalConfig(k=100_000, target_temperature=32.0)

Make = Callable[..., MixedLM]
"""The `make` fixture: some of the memories by name in `weights`, `base`, and options of `MixedLM.from_pretrained`."""


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
