"""The config of a mixture as transformers saves it."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

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


class _MixedLM:
    """Stands for `MixedLM` in transformers' table of models until that is imported, which takes its time."""

    config_class = MixedLMConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        from memlm.mix.mixed_lm import MixedLM

        return MixedLM.from_pretrained(*args, **kwargs)


def register() -> None:
    """Make transformers know the config of a mixture, and what loads it."""
    AutoConfig.register(MixedLMConfig.model_type, MixedLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(MixedLMConfig, _MixedLM, exist_ok=True)  # type: ignore[arg-type]
