"""Weighing a memory anew at every token costs next to nothing beside a fixed weight, one that sleeps beside none."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.decoding import decoder
from benchmarks.models import base_and_half, random_tokens
from benchmarks.report import bar_line, prove
from benchmarks.timing import interleave
from memlm.memory.confidence import FEATURES, ConfidenceHead
from memlm.memory.decoder import MemoryDecoder
from memlm.mix.gate_config import GateConfig, GateName
from memlm.mix.mixed_lm import MixedLM
from memlm.models.loading import dtype_name

BATCHES = (1, 8)
BAR = 1.02
ASLEEP_BAR = 1.05
SLEEP = 32
GATES: tuple[GateName, ...] = ("posterior", "both")
_TOLERANCE = 2e-3
"""Of a weight: bfloat16 logits of a chunk and of single steps differ in their last bit."""


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A line per gate and batch, SmolLM2 with a memory of half its blocks; one of a memory that sleeps, and of one that
    looks up after 32 tokens and reads them at once, over the base alone; and one of what a prompt costs.

    That is the time to the first token where 128 of 512 tokens are heard, over a prompt of which none are.
    """
    base, part = base_and_half(quick=quick)
    sizes: dict[str, Any] = {"context": 8, "steps": 2, "rounds": 1, "prompt": 12} if quick else {}
    for batch in BATCHES:
        for name, found in measure(base, part, batch=batch, **sizes).items():
            bar = {"first_token": None, "looking_up": None, "asleep": ASLEEP_BAR}.get(name, BAR)
            line = f"gate_decoding/{name}/batch-{batch}"
            yield bar_line(line, found.pop("ratio"), at_most=bar, judged=bar is not None and not quick, **found)


def measure(
    base: PreTrainedModel,
    part: PreTrainedModel,
    *,
    batch: int,
    context: int = 128,
    steps: int = 8,
    rounds: int = 15,
    prompt: int = 512,
) -> dict[str, dict[str, Any]]:
    """A decoding step under each gate over one with a fixed weight, and a prompt heard over one that is not.

    Args:
        part: What the memory is.
        batch: Texts decoded together.
        context: Tokens in the cache.
        steps: Tokens decoded per round.
        rounds: How often each side is timed.
        prompt: Tokens before the first.

    Raises:
        WrongAnswerError: Weights of single steps are not those of a pass over all text.
    """
    mixtures = {"fixed": mixture(base, part, "none")} | {gate: mixture(base, part, gate) for gate in GATES}
    tokens = random_tokens(batch, context + steps, mixtures["fixed"].vocab_size, base.device)
    exact = copy.deepcopy(base).float(), copy.deepcopy(part).float()  # a weight adds up what half precision rounds
    for gate in GATES:
        prove_weights(mixture(exact[0], exact[1], gate), tokens[:, :12])
    del exact
    sides = {name: decoder(model, tokens[:, :context], tokens[:, context:]) for name, model in mixtures.items()}
    timing = interleave(sides, device=base.device, rounds=rounds)
    shared = {
        "fixed_step_ms": round(1e3 * timing.median("fixed") / steps, 3),
        "dtype": dtype_name(base.dtype),
        "batch": batch,
        "rounds": rounds,
    }
    found: dict[str, dict[str, Any]] = {
        gate: {"ratio": timing.ratio(gate, "fixed"), "ratio_spread": timing.spread(gate, "fixed"), **shared}
        for gate in GATES
    }
    for name, slept in (("asleep", SLEEP - 1), ("looking_up", SLEEP)):
        found[name] = shared | _asleep(base, part, batch, context, slept, max(1, rounds // 3))
    text = random_tokens(batch, prompt, mixtures["fixed"].vocab_size, base.device)
    windows = {name: mixture(base, part, "posterior", window) for name, window in (("heard", 128), ("not heard", 0))}

    def first(model: MixedLM) -> Any:
        return lambda: model(text, use_cache=True, logits_to_keep=1)

    before = interleave({n: first(m) for n, m in windows.items()}, device=base.device, rounds=max(1, rounds // 3))
    found["first_token"] = {
        "ratio": before.ratio("heard", "not heard"),
        "ratio_spread": before.spread("heard", "not heard"),
        "prompt": prompt,
        "heard_ms": round(1e3 * before.median("heard"), 1),
        **shared,
    }
    return found


def _asleep(
    base: PreTrainedModel, part: PreTrainedModel, batch: int, context: int, steps: int, rounds: int
) -> dict[str, Any]:
    """A step whose memory sleeps, over one of the base; at the step number `SLEEP` it reads what it missed."""
    model = mixture(base, part, "both", sleep=SLEEP, sleep_below=1.0)
    context += 1 - context % SLEEP + SLEEP  # a place at which it has looked up
    tokens = random_tokens(batch, context + steps, model.vocab_size, base.device)
    sides = {
        name: decoder(side, tokens[:, :context], tokens[:, context:])
        for name, side in (("asleep", model), ("base", base))
    }
    gap = max(
        float((ours - base_alone[:, : model.vocab_size].float()).abs().max())
        for ours, base_alone in zip(sides["asleep"](), sides["base"](), strict=True)
    )
    prove(gap, 0.0, "a mixture whose memory sleeps against the base")
    timing = interleave(sides, device=base.device, rounds=rounds)
    return {
        "ratio": timing.ratio("asleep", "base"),
        "ratio_spread": timing.spread("asleep", "base"),
        "sleep": SLEEP,
        "base_step_ms": round(1e3 * timing.median("base") / steps, 3),
    }


def mixture(
    base: PreTrainedModel, part: PreTrainedModel, gate: GateName, window: int = 128, **settings: Any
) -> MixedLM:
    """Base and memory under a gate, its head of random numbers."""
    memory = MemoryDecoder(part)
    width = part.config.get_text_config().hidden_size
    numbers = (torch.randn(width + len(FEATURES), generator=torch.Generator().manual_seed(0)) / width).tolist()
    memory.confidence_head = ConfidenceHead(
        memory="", tokenizer=None, state=numbers[:width], features=numbers[width:], bias=0.0, base=""
    )
    return MixedLM(base, memory, 0.3, gate=GateConfig(gate=gate, prompt_window=window, **settings))


@torch.inference_mode()
def prove_weights(model: MixedLM, tokens: torch.Tensor) -> None:
    """Prove that weights of single steps are those of a pass over all text.

    Raises:
        WrongAnswerError: They are not.
    """
    whole = torch.as_tensor(model.components(tokens).weights[0])
    cache = model.new_cache(len(tokens))
    steps = [
        torch.as_tensor(model.components(column, cache=cache, use_cache=True).weights[0])
        for column in tokens.split(1, 1)
    ]
    prove(float((torch.cat(steps, 1) - whole).abs().max()), _TOLERANCE, f"weights under gate {model.gate.gate}")
