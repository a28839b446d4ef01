"""Tiny random models of families that place tokens and attend differently.

Heads are not tied to embeddings: a tied random model mostly repeats its last token, whatever the cache does.
"""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}


def _llama(vocab_size: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
        **COMMON,
    )


def _gpt2(vocab_size: int) -> PreTrainedConfig:
    """Learned absolute positions, and few of them."""
    return GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=24, initializer_range=0.4, **COMMON
    )


def _gemma3(vocab_size: int) -> PreTrainedConfig:
    """Layers that attend to six tokens beside layers that attend to all."""
    return Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=128,
        initializer_range=0.4,
        **COMMON,
    )


def _bloom(vocab_size: int) -> PreTrainedConfig:
    """Alibi: no position ids at all."""
    return BloomConfig(vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4, **COMMON)


def _opt(vocab_size: int) -> PreTrainedConfig:
    """Learned positions that the model counts from the attention mask."""
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.4,
        **COMMON,
    )


FAMILIES: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "gemma3": _gemma3,
    "bloom": _bloom,
    "opt": _opt,
}


def family_model(family: str, vocab_size: int, *, seed: int = 0) -> PreTrainedModel:
    """A random model of that family in float32, in evaluation mode; generation stops by itself never."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](vocab_size), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model
