"""Tiny random models of every architecture of transformers that has a causal LM."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Their `model_type`s."""
VOCABULARY = 64
DEVIATION = 0.2
"""Standard deviation of the weights, so large that what comes before a token decides what comes next."""

_SIZES = {
    4: """
        num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks num_experts
        n_routed_experts num_local_experts moe_num_experts num_attention_heads n_head n_heads num_heads
        decoder_attention_heads num_decoder_attention_heads swa_num_attention_heads attention_heads
        encoder_layers num_encoder_layers linear_num_key_heads linear_num_value_heads linear_num_heads
        index_n_heads zero_expert_num n_mamba_heads
    """,
    2: """
        n_group num_expert_group num_key_value_heads swa_num_key_value_heads num_experts_per_tok
        num_experts_per_token moe_k moe_topk topk_group num_query_groups encoder_attention_heads hc_mult
        hc_count num_encoder_attention_heads num_kv_heads laurel_rank n_groups mamba_n_groups o_groups
        mamba_ngroups
    """,
    8: """
        head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim index_head_dim attention_head_dim
        attention_head_size d_head dim_head kv_channels hidden_size_per_layer_input d_rel rotary_dim
        adapter_rank linear_key_head_dim linear_value_head_dim linear_head_dim lora_rank mamba_d_state
        state_size ssm_state_size mamba_dt_rank time_step_rank index_topk router_hidden_size
    """,
    16: """
        kv_lora_rank q_lora_rank qk_head_dim moe_intermediate_size expert_ffn_hidden_size o_lora_rank
        hc_lowrank shared_expert_intermediate_size moe_shared_expert_intermediate_size mamba_d_head
        mamba_head_dim mamba_chunk_size chunk_size shared_intermediate_size mamba_headdim
    """,
    32: """
        hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size input_embedding_size lru_width
        output_embedding_size word_embed_proj_dim attention_hidden_size encoder_hidden_size
    """,
    64: """
        vocab_size decoder_vocab_size vocab_size_per_layer_input intermediate_size decoder_ffn_dim
        encoder_ffn_dim ffn_dim ffn_hidden_size d_inner dff dim_ff n_inner intermediate_size_mlp
        dense_intermediate_size feed_forward_size shared_experts_intermediate_size mamba_d_ssm
    """,
    128: """
        max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length rel_extent
        max_target_positions
    """,
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}

_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "beam": {"num_experts_per_tok": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_assistant": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attn_layer_period": 2, "attn_layer_offset": 1},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "zamba2": {"attention_hidden_size": 64, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beside; of one with several parts, its language model."""


def tiny_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    """The family's default config with its sizes made tiny, its patterns kept.

    Args:
        architecture: One of `ARCHITECTURES`.
        changes: Settings of the language model.
    """
    return _shrunk(CONFIG_MAPPING[architecture], _OWN.get(architecture, {}) | changes)


def _shrunk(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    whole = kind()
    parts = {name: part for name, part in vars(whole).items() if isinstance(part, PreTrainedConfig)}
    text = next((name for name in parts if name in ("text_config", "decoder")), None)
    if text is not None:
        changes = _OWN.get(parts[text].model_type, {}) | changes
    small_parts = {name: _shrunk(type(part), changes if name == text else {}) for name, part in parts.items()}
    small = {name: size for name, size in _SMALL.items() if name in vars(whole) and name not in kind.attribute_map}
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    small |= {
        name: DEVIATION for name in ("initializer_range", "init_std", "initializer_factor") if name in vars(whole)
    }
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    return kind(**{**small, **special, **small_parts, **({} if text is not None else changes)})


def tiny_model(architecture: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of `tiny_config` in float32, in evaluation mode; generation never stops by itself."""
    config = tiny_config(architecture, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model
