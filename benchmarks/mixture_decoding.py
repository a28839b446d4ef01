"""A base and a Memory Decoder cost together what each costs by itself: decoding, scoring, reading a prompt."""

import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.decoding import decoder, prove_mixture
from benchmarks.models import (
    base_and_half,
    llama_config,
    parameter_count,
    random_model,
    random_tokens,
    tiny_config,
)
from benchmarks.report import bar_line, prove
from benchmarks.timing import Timing, interleave
from memlm.corpus.blocks import IGNORE
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import MemorySettings
from memlm.mix.base import BaseVoter
from memlm.mix.mixed_lm import MixedLM
from memlm.mix.pace import Pace
from memlm.models.loading import dtype_name

BATCHES = (1, 8)
BAR = 1.03
PREFILL_BAR = 1.0
LOOP_BAR = 1.0
_TOLERANCE = 1e-4
"""Nats, of sums of some 1e5 terms in float32."""
_LABEL_TOLERANCE = 0.05
"""Nats; the head is multiplied at other places together, which in bfloat16 rounds otherwise."""


class _Never(Pace):
    """Plain steps only."""

    def next(self) -> int:
        return 0


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """SmolLM2 and a memory of half its blocks, over the sum of both models' own times in the same round.

    Lines for a decoding step, for all logits of a text and for those of its labels alone, at batches of 1 and 8; one
    for a prompt of 2,048 tokens of which the memory's window of 512 sees a part; and four for the loop that drafts,
    told to draft nothing, over transformers' own loop around the same mixture: of SmolLM2, and of two models of a block
    each with the same vocabulary, in which what a loop costs by itself is a large part and not lost in noise.
    """
    base, part = base_and_half(quick=quick)
    sizes: dict[str, Any] = {"context": 8, "steps": 2, "text": 12, "rounds": 1} if quick else {}
    prompt, window = (24, 8) if quick else (2048, 512)
    block = tiny_config() if quick else llama_config(64, 1, 2)
    one, other = (random_model(block, dtype=base.dtype, device=base.device, seed=seed) for seed in range(2))
    small = MixedLM(one, MemoryDecoder(other), 0.4)
    for batch in BATCHES:
        for name, (bar, found) in measure(base, part, batch=batch, **sizes).items():
            line = f"mixture_decoding/{name}/batch-{batch}"
            yield bar_line(line, found.pop("ratio"), at_most=bar, judged=not quick, **found)
        before = random_tokens(batch, 8, small.vocab_size, base.device)
        found = loops(small, before, 4 if quick else 32, 1 if quick else 25)
        line = f"mixture_decoding/loop_of_small_models/batch-{batch}"
        yield bar_line(line, found.pop("ratio"), at_most=LOOP_BAR, judged=not quick, **found)
    found = prefill(base, part, prompt=prompt, window=window, rounds=1 if quick else 5)
    yield bar_line("mixture_decoding/prefill", found.pop("ratio"), at_most=PREFILL_BAR, judged=not quick, **found)


def measure(
    base: PreTrainedModel,
    part: PreTrainedModel,
    *,
    batch: int,
    context: int = 128,
    steps: int = 8,
    text: int = 256,
    rounds: int = 9,
) -> dict[str, tuple[float, dict[str, Any]]]:
    """Decoding, scoring and the loop: each its bar and what was found.

    Args:
        part: What the memory is.
        batch: Texts at a time.
        context: Tokens in the cache.
        steps: Tokens decoded per round; by the loops four times as many.
        text: Tokens of a text that is scored.
        rounds: How often each side is timed.

    Raises:
        WrongAnswerError: The mixture is not the sum of its parts, or the loops give different tokens.
    """
    mixed = MixedLM(base, MemoryDecoder(part), 0.4)
    tokens = random_tokens(batch, context + steps, mixed.vocab_size, base.device)
    before, after = tokens[:, :context], tokens[:, context:]
    prove_mixture(mixed, before, after)
    models = {"mixed": mixed, "base": base, "memory": part}
    told = {
        "dtype": dtype_name(base.dtype),
        "base_parameters": parameter_count(base),
        "memory_parameters": parameter_count(part),
        "rounds": rounds,
    }
    timing = interleave(
        {name: decoder(model, before, after) for name, model in models.items()}, device=base.device, rounds=rounds
    )
    decoding = _over_sum(timing) | {f"{n}_step_ms": round(1e3 * timing.median(n) / steps, 3) for n in models} | told

    long = random_tokens(batch, text, mixed.vocab_size, base.device)
    prove_scores(mixed, base, part, long[:1, :16])
    prove_labels(mixed, long[:1, :16])
    timing = interleave(
        {name: _reads(model, long) for name, model in models.items()}, device=base.device, rounds=max(1, rounds // 2)
    )
    scoring = _over_sum(timing) | {"text": text, "mixed_ms": round(1e3 * timing.median("mixed"), 1)} | told
    timing = interleave(label_scorers(mixed, long), device=base.device, rounds=max(1, rounds // 2))
    labels = _over_sum(timing) | {"text": text, "mixed_ms": round(1e3 * timing.median("mixed"), 1)} | told
    both = {"scoring": (BAR, scoring), "labels": (BAR, labels)}
    return {"step": (BAR, decoding), **both, "loop": (LOOP_BAR, loops(mixed, before, 4 * steps, rounds))}


def _reads(model: Any, tokens: torch.Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: model(tokens, **{"use_cache": False, **options}).logits


def label_scorers(mixed: MixedLM, tokens: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Log-probs of a text's labels alone, as evaluations take them: by the mixture, the base and the memory."""
    (memory,), (weight,) = mixed.named_memories().values(), mixed.mix_weights.values()
    base = BaseVoter(mixed.base, mixed.vocab_size, exact=False)
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], 1)

    def by(voter: Any) -> torch.Tensor:
        return voter.label_log_probs(voter.step(tokens), labels)["label"]

    def mixture() -> torch.Tensor:
        return torch.logaddexp(by(base) + math.log1p(-weight), by(memory) + math.log(weight))

    return {"mixed": mixture, "base": lambda: by(base), "memory": lambda: by(memory)}


def _over_sum(timing: Timing) -> dict[str, Any]:
    """The mixture's time over the sum of the parts' in the same round: median, lowest and highest."""
    rounds = zip(*(timing.seconds[side] for side in ("mixed", "base", "memory")), strict=True)
    ratios = sorted(both / (of_base + of_memory) for both, of_base, of_memory in rounds)
    return {
        "ratio": round(statistics.median(ratios), 4),
        "ratio_spread": [round(ratios[0], 4), round(ratios[-1], 4)],
        "over_base": round(timing.ratio("mixed", "base"), 4),
    }


@torch.inference_mode()
def prove_scores(mixed: MixedLM, base: PreTrainedModel, part: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Prove that the mixture's logits at every place are what both models' own give in float64.

    Raises:
        WrongAnswerError: They are not.
    """
    (weight,) = mixed.mix_weights.values()
    said = [model(tokens, use_cache=False).logits[..., : mixed.vocab_size].double() for model in (base, part)]
    of_base, of_memory = (logits.softmax(-1) for logits in said)
    expected = ((1 - weight) * of_base + weight * of_memory).log()
    found = mixed(tokens, use_cache=False).logits.double().log_softmax(-1)
    prove(float((found - expected).abs().max()), _TOLERANCE, "scores of the mixture against its parts")


@torch.inference_mode()
def prove_labels(mixed: MixedLM, tokens: torch.Tensor) -> None:
    """Prove that the labels' log-probs are those among the mixture's logits.

    Raises:
        WrongAnswerError: They are not.
    """
    log_probs = mixed(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    expected = log_probs.gather(-1, tokens[:, 1:, None])[..., 0].flatten()
    found = label_scorers(mixed, tokens)["mixed"]().double()
    prove(float((found.cpu() - expected.cpu()).abs().max()), _LABEL_TOLERANCE, "log-probs of labels")


def loops(mixed: MixedLM, before: torch.Tensor, steps: int, rounds: int) -> dict[str, Any]:
    """The loop that drafts, told to draft nothing, over transformers' own, greedily around the same mixture."""
    asked = {"max_new_tokens": steps, "eos_token_id": None, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(before)

    def generates(**options: Any) -> Callable[[], Any]:
        return lambda: mixed.generate(before, attention_mask=mask, **asked, **options)

    sides = {"ours": generates(drafting=_Never()), "theirs": generates()}
    same = bool((sides["ours"]() == sides["theirs"]()).all())
    prove(0.0 if same else 1.0, 0.5, "tokens of both loops")
    timing = interleave(sides, device=before.device, rounds=rounds)
    return {
        "ratio": round(timing.ratio("ours", "theirs"), 4),
        "ratio_spread": timing.spread("ours", "theirs"),
        "token_ms": {side: round(1e3 * timing.median(side) / steps, 3) for side in sides},
        "rounds": rounds,
    }


def prefill(base: PreTrainedModel, part: PreTrainedModel, *, prompt: int, window: int, rounds: int) -> dict[str, Any]:
    """A prompt read by the mixture, whose memory sees its window, over both models' own reading of all of it."""
    settings = MemorySettings(kind="decoder", vocab_size=base.config.vocab_size, context_length=window)
    mixed = MixedLM(base, MemoryDecoder(part, settings), 0.4)
    tokens = random_tokens(1, prompt, mixed.vocab_size, base.device)
    models = {"mixed": mixed, "base": base, "memory": part}
    sides = {name: _reads(model, tokens, use_cache=True, logits_to_keep=1) for name, model in models.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the prompt is longer than the window, which is meant
        timing = interleave(sides, device=base.device, rounds=rounds, warmup=1)
    return _over_sum(timing) | {"prompt": prompt, "window": window, "rounds": rounds}
