"""Tiny random models of every family that the tests name."""

import inspect

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 64
WIDTH = 32
ALTERNATING = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "bloom": (BloomConfig, {}),  # alibi: no position ids at all
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 3.0}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 6}),
    "gpt2": (GPT2Config, {"max_position_embeddings": 24}),  # learned positions, and few of them
    "gpt_neox": (GPTNeoXConfig, {}),
    "llama": (LlamaConfig, {}),
    "mamba": (MambaConfig, {"state_size": 4}),
    "mistral": (MistralConfig, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "opt": (OPTConfig, {}),  # learned positions that the model counts from the attention mask
    "phi": (PhiConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
}
"""Family to its class, and what it has of its own."""

CACHED = ["llama", "gpt2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("gemma3", "bloom", "opt"))]
"""Families that place tokens and attend differently: what a cache must do right."""

TAPS = {
    "gpt2": "transformer.h.2.mlp",
    "llama": "model.layers.2.mlp",
    "mistral": "model.layers.2.mlp",
    "qwen2": "model.layers.2.mlp",
    "qwen3": "model.layers.2.mlp",
    "gemma2": "model.layers.2.mlp",
    "gemma3": "model.layers.2.mlp",
    "gpt_neox": "gpt_neox.layers.2.mlp",
    "phi": "model.layers.2.mlp",
    "opt": "model.decoder.layers.2.fc1",
    "bloom": "transformer.h.2.mlp",
    "mixtral": "model.layers.2.mlp",
}
"""Family to the module whose input is the last of three blocks' MLP input, read off transformers' code by a person."""


def family_config(
    family: str,
    vocab_size: int = VOCABULARY,
    *,
    layers: int = 3,
    width: int = WIDTH,
    positions: int = 128,
    tied: bool | None = False,
    deviation: float = 0.4,
    **changes: object,
) -> PreTrainedConfig:
    """A config of that family.

    Args:
        family: One of `FAMILIES`.
        vocab_size: Tokens.
        layers: Blocks.
        width: Of the hidden states; the FFN is twice as wide.
        positions: Longest text, for a family that has no number of its own above.
        tied: Whether the head is the embeddings; None: as the family has it. A tied random model mostly repeats its
            last token, whatever the cache does.
        deviation: Standard deviation of the weights.
        changes: Settings by the names that the family gives them.
    """
    kind, own = FAMILIES[family]
    sizes = {
        "vocab_size": vocab_size,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "intermediate_size": 2 * width,
        "ffn_dim": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": positions,
        "initializer_range": deviation,
        "init_std": deviation,
        "layer_types": [ALTERNATING[i % 2] for i in range(layers)] if family == "gemma3" else None,
        "tie_word_embeddings": tied,
    }
    names = {name: kind.attribute_map.get(name, name) for name in {**sizes, **own}}
    known = inspect.signature(kind.__init__).parameters
    settings = {names[n]: x for n, x in {**sizes, **own}.items() if names[n] in known and x is not None}
    return kind(**{**settings, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes})


def family_model(family: str, vocab_size: int = VOCABULARY, *, seed: int = 0, **sizes: object) -> PreTrainedModel:
    """A random model of `family_config` in float32, in evaluation mode; generation never stops by itself."""
    torch.random.default_generator.manual_seed(seed)  # the CPU's alone; all would keep a note for devices to come
    config = family_config(family, vocab_size, **sizes)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def token_ids(rows: int = 2, length: int = 9, *, vocab_size: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    """Random ids `(rows, length)`, none of them special."""
    return torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
