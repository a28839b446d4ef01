"""A decoding step with an MLP Memory costs what base and memory cost by themselves."""

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.decoding import decoder, prove_mixture
from benchmarks.models import (
    bytes_per_step,
    parameter_count,
    qwen_config,
    random_model,
    random_tokens,
    tiny_config,
    untrained_mlp,
)
from benchmarks.report import bar_line
from benchmarks.timing import interleave
from memlm.memory.mlp import MLPMemory
from memlm.mix.mixed_lm import MixedLM
from memlm.models.loading import default_device, default_dtype, dtype_name, load_causal_lm
from memlm.models.taps import TapReader

BATCHES = (1, 8)
BAR = 1.05
_PAPER = 1.2  # MLP Memory (arXiv:2508.01832), for 1.5B parameters beside 7.1B, which by bytes is 1.22
_LAYERS = 8


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A line per base and batch.

    SmolLM2 with an MLP Memory of 8 blocks is held to the bar: a step of the mixture, over the sum of the base's own and
    the memory's own, timed in turns. The shape of Qwen2.5-1.5B, with blocks that hold a third of its parameters outside
    embeddings, is reported beside the paper's.
    """
    device = default_device()
    dtype = default_dtype(device)
    sizes = {"context": 8, "steps": 2, "rounds": 1} if quick else {}
    if quick:
        base = random_model(tiny_config(), dtype=dtype, device=device)
    else:
        base = load_causal_lm("smollm2", dtype=dtype).to(device)  # type: ignore[arg-type]
    memory = untrained_mlp(base, _LAYERS)
    for batch in BATCHES:
        found = measure(base, memory, batch=batch, **sizes)
        name = f"mlp_decoding/smollm2/batch-{batch}"
        yield bar_line(name, found["over_sum_of_steps"], at_most=BAR, judged=not quick, **found)
    del base, memory

    config = tiny_config() if quick else qwen_config()
    base = random_model(config, dtype=torch.bfloat16, device=device)
    memory = untrained_mlp(base, third_of(base))
    for batch in BATCHES:
        found = measure(base, memory, batch=batch, **sizes)
        name = f"mlp_decoding/qwen2.5-1.5b-shape/batch-{batch}"
        yield bar_line(name, found["slowdown"], judged=False, reference=_PAPER, **found)


def third_of(base: PreTrainedModel) -> int:
    """MLP blocks that hold about a third of the base's parameters outside embeddings."""
    config = base.config.get_text_config()
    return max(
        1, round(parameter_count(base, embeddings=False) / 3 / (3 * config.hidden_size * config.intermediate_size))
    )


def measure(
    base: PreTrainedModel, memory: MLPMemory, *, batch: int, context: int = 128, steps: int = 8, rounds: int = 15
) -> dict[str, Any]:
    """A step with `memory` over the sum of both models' own steps, and over the base's; and what its bytes would give.

    Args:
        batch: Texts decoded together.
        context: Tokens in the cache.
        steps: Tokens decoded per round.
        rounds: How often each side is timed.

    Raises:
        WrongAnswerError: The mixture is not the sum of its parts.
    """
    mixed = MixedLM(base, memory, 0.5)
    tokens = random_tokens(batch, context + steps, mixed.vocab_size, base.device)
    before, after = tokens[:, :context], tokens[:, context:]
    prove_mixture(mixed, before, after)
    assert memory.tap is not None
    read = TapReader(base, memory.tap).read(tokens)[:, context:].split(1, 1)
    pairs = list(zip(after.split(1, 1), read, strict=True))

    def alone() -> list[Any]:
        return [memory.votes(memory.step(token, activations), slice(-1, None)) for token, activations in pairs]

    sides = {"base": decoder(base, before, after), "mixed": decoder(mixed, before, after), "memory": alone}
    timing = interleave(sides, device=base.device, rounds=rounds)
    rounds_of = zip(*(timing.seconds[side] for side in ("mixed", "base", "memory")), strict=True)
    over_sum = sorted(both / (of_base + of_memory) for both, of_base, of_memory in rounds_of)
    bytes_base, bytes_memory = bytes_per_step(base), bytes_per_step(memory)
    return {
        "over_sum_of_steps": round(statistics.median(over_sum), 4),
        "over_sum_of_steps_spread": [round(over_sum[0], 4), round(over_sum[-1], 4)],
        "slowdown": round(timing.ratio("mixed", "base"), 4),
        "slowdown_spread": timing.spread("mixed", "base"),
        "expected_slowdown": round(1 + bytes_memory / bytes_base, 4),
        "memory_step_ms": round(1e3 * timing.median("memory") / steps, 3),
        "base_step_ms": round(1e3 * timing.median("base") / steps, 3),
        "mixed_step_ms": round(1e3 * timing.median("mixed") / steps, 3),
        "base_bytes": bytes_base,
        "memory_bytes": bytes_memory,
        "base_parameters": parameter_count(base),
        "memory_parameters": parameter_count(memory),
        "memory_blocks": len(memory.blocks),
        "dtype": dtype_name(base.dtype),
        "batch": batch,
        "context": context,
        "steps": steps,
        "rounds": rounds,
    }
