"""A base with an MLP Memory scores long text no slower than one decoder of as many parameters, deeper or wider."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from benchmarks.models import (
    SMOLLM2_VOCABULARY,
    llama_config,
    parameter_count,
    random_model,
    random_tokens,
    tiny_config,
    untrained_mlp,
)
from benchmarks.report import bar_line, prove
from benchmarks.timing import interleave
from memlm.memory.mlp import MLPMemory
from memlm.mix.mixed_lm import MixedLM
from memlm.models.heads import Head, find_head
from memlm.models.loading import default_device, default_dtype, dtype_name
from memlm.models.taps import capture

BAR = 1.0
_WEIGHT = 0.5  # of each part
_CHUNK = 1024  # positions whose logits exist at a time, as in the library


@dataclass(frozen=True)
class Shape:
    """A base of the curve."""

    width: int
    layers: int
    heads: int
    kv_heads: int | None = None
    ffn_width: int | None = None
    vocab_size: int = SMOLLM2_VOCABULARY

    def config(self, layers: int | None = None) -> LlamaConfig:
        """With as many layers as told, its own if None."""
        return llama_config(
            self.width,
            layers or self.layers,
            self.heads,
            kv_heads=self.kv_heads,
            ffn_width=self.ffn_width,
            vocab_size=self.vocab_size,
        )


SHAPES = {"smollm2": Shape(576, 30, 9, kv_heads=3, ffn_width=1536), "gpt2-medium": Shape(1024, 24, 16)}
"""SmolLM2's own; GPT-2 medium's width and depth, which the paper measures, as a Llama."""
LENGTHS = (1024, 4096)


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A line for each shape and length, both fixed beforehand: the speed-up over the faster of two decoders.

    As in the paper, the memory's blocks hold as many parameters as the base has outside embeddings. Both decoders have
    as many parameters as base and memory, the memory's own head included: one has the base's width and more layers, as
    the paper's; the other about the base's depth and more width, as models of that size are usually made.
    """
    device = default_device()
    tiny = tiny_config()
    shapes = {"tiny": Shape(tiny.hidden_size, tiny.num_hidden_layers, 4, vocab_size=96)} if quick else SHAPES
    for name, shape in shapes.items():
        for length in (16,) if quick else LENGTHS:
            found = measure(
                shape,
                length=length,
                batch=1 if device.type == "cpu" else 8,
                device=device,
                dtype=default_dtype(device),
                rounds=1 if quick else 3,
            )
            speedups = {twin: found[twin]["speedup"] for twin in ("deep", "wide")}
            fastest = min(speedups, key=lambda twin: speedups[twin])
            yield bar_line(
                f"mlp_scoring/{name}/{length}",
                speedups[fastest],
                at_least=BAR,
                judged=not quick,
                fastest_decoder=fastest,
                **found,
            )


def measure(
    shape: Shape, *, length: int, batch: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Tokens a second of base and memory, and of decoders of as many parameters, all of random weights.

    Raises:
        WrongAnswerError: The log-probs that are timed are not those of the models.
    """
    base = random_model(shape.config(), dtype=dtype, device=device)
    memory = untrained_mlp(base, memory_blocks(base))
    twins = {
        name: random_model(config, dtype=dtype, device=device, seed=1)
        for name, config in twin_configs(shape, base, parameter_count(memory)).items()
    }
    tokens = random_tokens(batch, length, shape.vocab_size, device)
    prove_scores(base, memory, list(twins.values()), tokens[:, : min(length, 64)])
    sides = {"pair": lambda: score_pair(base, memory, tokens)}
    sides |= {name: lambda twin=twin: score(twin, tokens) for name, twin in twins.items()}
    timing = interleave(sides, device=device, rounds=rounds, warmup=1)
    flops = flops_per_token(base, length) + 2 * parameter_count(memory)
    found: dict[str, Any] = {
        "length": length,
        "batch": batch,
        "dtype": dtype_name(dtype),
        "width": shape.width,
        "base_layers": shape.layers,
        "memory_blocks": len(memory.blocks),
        "base_parameters": parameter_count(base),
        "memory_parameters": parameter_count(memory),
        "pair_tokens_per_second": round(tokens.numel() / timing.median("pair"), 1),
        "rounds": rounds,
    }
    for name, twin in twins.items():
        found[name] = {
            "speedup": round(timing.ratio(name, "pair"), 4),
            "speedup_spread": timing.spread(name, "pair"),
            "speedup_by_flops": round(flops_per_token(twin, length) / flops, 4),
            "twin_layers": twin.config.num_hidden_layers,
            "twin_width": twin.config.hidden_size,
            "twin_parameters": parameter_count(twin),
            "twin_tokens_per_second": round(tokens.numel() / timing.median(name), 1),
        }
    return found


def memory_blocks(base: PreTrainedModel) -> int:
    """MLP blocks that hold as many parameters as the base has outside embeddings."""
    config = base.config
    return max(1, round(parameter_count(base, embeddings=False) / (3 * config.hidden_size * config.intermediate_size)))


def twin_configs(shape: Shape, base: PreTrainedModel, of_memory: int) -> dict[str, LlamaConfig]:
    """Decoders with as many parameters as base and memory, which has so many, by more layers and by more width."""
    layers, width = shape.layers, shape.width
    wanted = parameter_count(base) + of_memory
    per_layer = (parameter_count(base, embeddings=False) - width) / layers  # without the last norm
    deep = shape.config(layers + round(of_memory / per_layer))

    def wider(head: int, depth: int) -> LlamaConfig:
        heads = shape.heads + head
        kv_heads = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= (shape.kv_heads or heads))
        return llama_config(width // shape.heads * heads, depth, heads, kv_heads=kv_heads, vocab_size=shape.vocab_size)

    def off(config: LlamaConfig) -> float:
        with torch.device("meta"):
            return abs(parameter_count(random_model(config, dtype=torch.float32, device=torch.device("meta"))) - wanted)

    wide = min((wider(more, layers) for more in range(1, shape.heads + 1)), key=off)
    heads = wide.num_attention_heads - shape.heads
    return {
        "deep": deep,
        "wide": min((wider(heads, layers + more) for more in range(-3, 4) if layers + more > 0), key=off),
    }


def flops_per_token(model: PreTrainedModel, length: int) -> float:
    """Multiplications and additions per token of `length`: two per weight, and causal attention over half of them.

    Source: after MLP Memory (arXiv:2508.01832), which leaves out the heads and counts attention in full.
    """
    attention = 4 * model.config.num_hidden_layers * model.config.hidden_size * length / 2
    return 2 * parameter_count(model) + attention  # embeddings are tied, so all weights are multiplied


# --- what is timed ----------------------------------------------------------------------------------------------------


def score(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """`(B * (T - 1),)` log-prob of every token but the first."""
    return _label_log_probs(model.base_model(input_ids=tokens, use_cache=False)[0], tokens, _head(model))


def score_pair(base: PreTrainedModel, memory: MLPMemory, tokens: Tensor) -> Tensor:
    """The same under the mixture; the base runs once."""
    assert memory.tap is not None
    with capture(base, (memory.tap,)) as captured:
        hidden = base.base_model(input_ids=tokens, use_cache=False)[0]
    base_log_probs = _label_log_probs(hidden, tokens, _head(base))
    memory_log_probs = _label_log_probs(memory.body(captured[memory.tap]), tokens, memory.head)
    return torch.logaddexp(base_log_probs, memory_log_probs) + math.log(_WEIGHT)


def _head(model: PreTrainedModel) -> Head:
    linear = model.get_output_embeddings()
    assert linear is not None
    return Head(linear)


def _label_log_probs(hidden: Tensor, tokens: Tensor, head: Head) -> Tensor:
    states, labels = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    pieces = zip(states.split(_CHUNK), labels.split(_CHUNK), strict=True)
    return -torch.cat([nn.functional.cross_entropy(head(s).float(), y, reduction="none") for s, y in pieces])


@torch.inference_mode()
def prove_scores(base: PreTrainedModel, memory: MLPMemory, twins: list[PreTrainedModel], tokens: Tensor) -> None:
    """Raise unless the timed functions give the label log-probs of the models' own forward passes.

    Raises:
        WrongAnswerError: They do not.
    """
    # bfloat16 logits are of order 1, so a step of rounding is 2 ** -8; float32 ones differ by the order of sums
    tolerance = 1e-4 if base.dtype == torch.float32 else 0.03
    mixed = MixedLM(base, memory, _WEIGHT)
    found = [("the pair", score_pair(base, memory, tokens), mixed)]
    found += [(f"the decoder of {twin.config.num_hidden_layers} layers", score(twin, tokens), twin) for twin in twins]
    for what, log_probs, model in found:
        whole = model(tokens).logits[:, :-1].float().log_softmax(-1)
        expected = whole.gather(-1, tokens[:, 1:, None]).flatten()
        prove(float((log_probs - expected).abs().max()), tolerance, f"label log-probs of {what}")
    for model in (base, *twins):
        find_head(model)  # the head is a plain matrix, as `_head` takes it to be
