"""The config of a mixture as transformers saves it."""

from transformers import PreTrainedConfig


class MixedLMConfig(PreTrainedConfig):
    """References to a base and its memories, and their weights; no weights of its own."""

    model_type = "memlm-mixed"

    base: str = ""
    base_revision: str | None = None
    memories: dict | None = None
    """Name to folder (relative to this config's) or hub id."""
    mix_weights: dict | None = None
    memory_window: int | None = None
    vocab_size: int | None = None
