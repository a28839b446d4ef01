"""The config of a mixture as transformers saves it."""

from transformers import PreTrainedConfig

SIZES = ("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""What tools, such as lm-eval, look for in a config: the base's."""


class MixedLMConfig(PreTrainedConfig):
    """References to a base and its memories, and their weights; no weights of its own."""

    model_type = "memlm-mixed"

    base: str = ""
    base_where: dict | None = None
    """Which of the base's files are meant: `revision`, `subfolder`, `gguf_file`."""
    memories: dict | None = None
    """Name to folder (relative to this config's) or hub id."""
    mix_weights: dict | None = None
    gate: dict | None = None
    """What weighs the memories, as `GateConfig` has it; None: the weights above."""
    memory_window: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
