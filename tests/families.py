"""One tiny random model of each family that the tests name."""

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
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 64
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "initializer_range": 0.3, **SPECIAL}
GATED = {**COMMON, "intermediate_size": 24, "max_position_embeddings": 64}
GROUPED = {**GATED, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_head": 2, "n_positions": 64, "initializer_range": 0.3, **SPECIAL}

TAPS = {
    "gpt2": "transformer.h.2.mlp",
    "llama": "model.layers.2.mlp",
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
"""Family to the module whose input is the last block's MLP input, read off transformers' code by a person."""


def family_config(family: str, layers: int = 3) -> PreTrainedConfig:
    depth = {"num_hidden_layers": layers}
    configs = {
        "gpt2": lambda: GPT2Config(**GPT2, n_layer=layers),
        "llama": lambda: LlamaConfig(**GATED, **depth, num_key_value_heads=1),
        "qwen2": lambda: Qwen2Config(**GATED, **depth, num_key_value_heads=1),
        "qwen3": lambda: Qwen3Config(**GROUPED, **depth),
        "gemma2": lambda: Gemma2Config(**GROUPED, **depth, final_logit_softcapping=3.0),
        "gemma3": lambda: Gemma3TextConfig(**GROUPED, **depth, sliding_window=4),
        "gpt_neox": lambda: GPTNeoXConfig(**GATED, **depth),
        "phi": lambda: PhiConfig(**GATED, **depth),
        "opt": lambda: OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            word_embed_proj_dim=16,
            num_attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=64,
            init_std=0.3,
            **depth,
            **SPECIAL,
        ),
        "bloom": lambda: BloomConfig(
            vocab_size=VOCABULARY, hidden_size=16, n_head=2, n_layer=layers, initializer_range=0.3, **SPECIAL
        ),
        "mixtral": lambda: MixtralConfig(**GROUPED, **depth, num_local_experts=4),
        "mamba": lambda: MambaConfig(
            vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=layers, **SPECIAL
        ),
    }
    return configs[family]()


def family_model(family: str, layers: int = 3) -> PreTrainedModel:
    """The family's model in float32, in evaluation mode, the same at every call."""
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(family_config(family, layers), dtype=torch.float32).eval()


def token_ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))
