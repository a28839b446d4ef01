"""Models that benchmarks measure: random weights of a real shape, for a step costs the same whatever they are."""

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from memlm.memory.config import MLPStart
from memlm.memory.mlp import MLPMemory
from memlm.memory.protocol import MemorySettings
from memlm.models.layers import keep_layers
from memlm.models.loading import default_device, default_dtype, load_causal_lm

SMOLLM2_VOCABULARY = 49_152


def llama_config(
    width: int,
    layers: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    ffn_width: int | None = None,
    vocab_size: int = SMOLLM2_VOCABULARY,
) -> LlamaConfig:
    """A Llama with tied embeddings; its FFN is 8/3 of its width, which costs what an ungated one of 4 widths does."""
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        intermediate_size=ffn_width or 8 * width // 3,
        vocab_size=vocab_size,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def qwen_config() -> Qwen2Config:
    """The shape of Qwen2.5-1.5B."""
    return Qwen2Config(
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151_936,
        tie_word_embeddings=True,
    )


def tiny_config() -> LlamaConfig:
    """For runs whose timings are not judged."""
    return llama_config(32, 2, 4, kv_heads=2, vocab_size=96)


def random_model(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights, made in its precision and place."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def untrained_mlp(base: PreTrainedModel, layers: int, *, seed: int = 0) -> MLPMemory:
    """An MLP Memory for `base` as training starts it, but for FFNs that add something, so that an answer shows them."""
    settings = MemorySettings(kind=MLPMemory.kind, vocab_size=base.config.get_text_config().vocab_size)
    memory = MLPMemory.start(MLPStart(layers=layers), settings, init=None, base=base, seed=seed)
    memory.to(device=base.device, dtype=base.dtype)
    torch.manual_seed(seed)
    for block in memory.blocks:
        nn.init.normal_(block.down.weight, std=0.02)  # type: ignore[union-attr]
    return memory.requires_grad_(False).eval()


def random_tokens(rows: int, length: int, vocab_size: int, device: torch.device, *, seed: int = 0) -> Tensor:
    """`(rows, length)` token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (rows, length), generator=generator).to(device)


def parameter_count(model: nn.Module, *, embeddings: bool = True) -> int:
    """Parameters, tied ones once; without `embeddings`, those of no embedding and no output layer."""
    left_out = set() if embeddings else {id(weight) for weight in _tables(model)}
    return sum(p.numel() for p in model.parameters() if id(p) not in left_out)


def bytes_per_step(model: nn.Module) -> int:
    """Bytes of the weights that a decoding step reads, whatever the batch.

    All of them, but for embeddings, of which a step reads a row per text; an embedding that is the head too is read.
    """
    rows_only = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        rows_only -= {id(head.weight)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in rows_only)


def _tables(model: nn.Module) -> list[Tensor]:
    """Embeddings and output layer."""
    if isinstance(model, MLPMemory):
        return [model.output.weight]
    assert isinstance(model, PreTrainedModel)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [layer.weight for layer in layers if layer is not None]  # type: ignore[misc]


def base_and_half(*, quick: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    """SmolLM2, and half of its blocks for a memory; tiny random models in a quick run."""
    device = default_device()
    dtype = default_dtype(device)
    if quick:
        base, part = (random_model(tiny_config(), dtype=dtype, device=device) for _ in range(2))
        return base, part
    base, part = (load_causal_lm("smollm2", dtype=dtype) for _ in range(2))
    part = keep_layers(part, base.config.num_hidden_layers // 2)
    return base.to(device), part.to(device)  # type: ignore[arg-type]
