"""The released MLP Memory modules told again, slow and obvious: a dictionary of tensors and what it computes.

Names, shapes and order of operations are those of `models/mlpGPT2.py`, `models/mlpLlama.py` and `models/mlpMistral.py`
of the released code. Arithmetic is in float64.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedConfig

Tensors = dict[str, Tensor]


def random_tensors(config: PreTrainedConfig, *, seed: int = 0, input_width: int | None = None) -> Tensors:
    """What the released module of this config saves, every number random, norms too."""
    d, vocab_size, blocks = config.hidden_size, config.vocab_size, range(config.num_hidden_layers)
    shapes: dict[str, tuple[int, ...]] = {}
    if input_width is not None:
        shapes["embedding_transform.weight"] = (d, input_width)
        shapes["embedding_transform.bias"] = (d,)
    for i in blocks:
        if config.model_type == "gpt2":
            shapes[f"h.{i}.ln_1.weight"] = shapes[f"h.{i}.ln_1.bias"] = (d,)
            shapes[f"h.{i}.mlp.c_fc.weight"] = (d, 4 * d)
            shapes[f"h.{i}.mlp.c_fc.bias"] = (4 * d,)
            shapes[f"h.{i}.mlp.c_proj.weight"] = (4 * d, d)
            shapes[f"h.{i}.mlp.c_proj.bias"] = (d,)
        else:
            inner = config.intermediate_size
            shapes[f"layers.{i}.input_layernorm.weight"] = (d,)
            for name, rows, columns in (("gate", inner, d), ("up", inner, d), ("down", d, inner)):
                shapes[f"layers.{i}.mlp.{name}_proj.weight"] = (rows, columns)
                if config.model_type == "llama" and config.mlp_bias:
                    shapes[f"layers.{i}.mlp.{name}_proj.bias"] = (rows,)
    if config.model_type == "gpt2":
        shapes["ln_f.weight"] = shapes["ln_f.bias"] = (d,)
    else:
        shapes["norm.weight"] = (d,)
    shapes["lm_head.weight"] = (vocab_size, d)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def released_logits(tensors: Tensors, config: PreTrainedConfig, x: Tensor) -> Tensor:
    """Logits `(N, V)` in float64 of activations `(N, D)`, one row at a time."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    row = _gpt2_row if config.model_type == "gpt2" else _gated_row
    return torch.stack([row(weights, config, vector.double()) for vector in x])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
}


def _entry(w: Tensors, x: Tensor) -> Tensor:
    if "embedding_transform.weight" not in w:
        return x
    return w["embedding_transform.weight"] @ x + w["embedding_transform.bias"]


def _gpt2_row(w: Tensors, config: PreTrainedConfig, x: Tensor) -> Tensor:
    def normed(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean()
        spread = torch.sqrt((centred**2).mean() + config.layer_norm_epsilon)
        return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    act = ACTIVATIONS[config.activation_function]
    x = _entry(w, x)
    for i in range(config.n_layer):
        inner = act(normed(x, f"h.{i}.ln_1") @ w[f"h.{i}.mlp.c_fc.weight"] + w[f"h.{i}.mlp.c_fc.bias"])
        x = x + inner @ w[f"h.{i}.mlp.c_proj.weight"] + w[f"h.{i}.mlp.c_proj.bias"]
    return w["lm_head.weight"] @ normed(x, "ln_f")


def _gated_row(w: Tensors, config: PreTrainedConfig, x: Tensor) -> Tensor:
    def normed(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x**2).mean() + config.rms_norm_eps) * w[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    act = ACTIVATIONS[config.hidden_act]
    x = _entry(w, x)
    for i in range(config.num_hidden_layers):
        mlp, h = f"layers.{i}.mlp", normed(x, f"layers.{i}.input_layernorm")
        inner = act(linear(h, f"{mlp}.gate_proj")) * linear(h, f"{mlp}.up_proj")
        x = x + linear(inner, f"{mlp}.down_proj")
    return w["lm_head.weight"] @ normed(x, "norm")


# --- saving -------------------------------------------------------------------------------------------------------

CLASSES = {"gpt2": "GPT2MLPModel", "llama": "LlamaMLPModel", "mistral": "MistralMLPModel"}
FORMATS = ("pickle", "old pickle", "sharded pickle", "safetensors", "sharded safetensors")


def save_released(folder: Path, tensors: Tensors, config: PreTrainedConfig, how: str = "pickle") -> str:
    """A checkpoint folder as `save_pretrained` of the released module leaves it; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [CLASSES[config.model_type]]
    config.save_pretrained(folder)
    safe = how.endswith("safetensors")
    stem, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")

    def save(part: Tensors, name: str) -> None:
        if safe:
            safetensors.torch.save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name, _use_new_zipfile_serialization=how != "old pickle")

    if not how.startswith("sharded"):
        save(tensors, f"{stem}.{ending}")
        return str(folder)
    names = list(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    shards = [f"{stem}-{i + 1:05d}-of-00002.{ending}" for i in range(2)]
    for half, shard in zip(halves, shards, strict=True):
        save({name: tensors[name] for name in half}, shard)
    weight_map = {name: shard for half, shard in zip(halves, shards, strict=True) for name in half}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return str(folder)
