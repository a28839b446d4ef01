"""Tokens that are drafted or drawn have the mixture's own distribution, and greedy ones are its likeliest."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from benchmarks.models import llama_config, random_model, random_tokens
from benchmarks.report import bar_line
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import MemorySettings
from memlm.mix.gate_config import GateConfig
from memlm.mix.mixed_lm import MixedLM

BINS = 16
VOCABULARY = 40
_NEW = 16
_TIE = 1e-4
_MAKES = {
    "suppress_tokens": SuppressTokensLogitsProcessor,
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
}
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {"drafting": 4}),
    ("none", {"drafting": "auto", "temperature": 0.6}),
    ("none", {"drafting": 3, "top_k": 5}),
    ("none", {"drafting": 6, "top_p": 0.7}),
    ("none", {"drafting": 4, "repetition_penalty": 1.6}),
    ("posterior", {"drafting": 4}),
    ("posterior", {"drafting": 2, "temperature": 0.8, "top_p": 0.9}),
    ("none", {"drawing": True}),
    ("none", {"drafting": 4, "rows": 8}),
    ("posterior", {"drafting": 3, "temperature": 0.7, "rows": 8}),
    ("none", {"drafting": 4, "looked_up": True}),
)
"""Gate, and options of `generate`; `rows`: texts at a time; `looked_up`: no memory drafts, and only four tokens may
come, so that some of what is looked up is right."""

Scores = Callable[[Int[Tensor, "B T"]], Float[Tensor, "B T V"]]
"""What a mixture thinks after every place of some texts."""


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A line per sampled setting, the chance of as uneven a spread (bar 0.01 over their number); one for greedy
    texts, the share of tokens that are not the likeliest, ties within 1e-4 left out; and that in bfloat16, where tokens
    read together are rounded otherwise than tokens read one by one, beside what plain steps have of it.
    """
    texts = 4 if quick else 20_000 // _NEW
    for gate, options in SETTINGS:
        options, told = dict(options), {"gate": gate, **options}
        model = sharp_mixture(gate)
        if options.pop("looked_up", False):
            for memory in model.named_memories().values():
                memory.can_draft = False  # type: ignore[misc]
            options["suppress_tokens"] = list(range(4, VOCABULARY))
        torch.manual_seed(1)
        prompt = random_tokens(1, 7, VOCABULARY, torch.device("cpu"))
        found = places_among(model, direct(model, processors_of(options)), sampled(model, prompt, texts, **options), 7)
        name = "drafting_exactness/" + "-".join(f"{key}-{value}" for key, value in told.items()).removeprefix("gate-")
        told["tokens"] = len(found)
        yield bar_line(name, chance_of(found), at_least=0.01 / len(SETTINGS), judged=not quick, **told)
    texts = 4 if quick else 400
    yield bar_line("drafting_exactness/greedy", *_greedy(texts), at_most=0.0, judged=not quick)
    half = torch.bfloat16
    plain = _greedy(texts, dtype=half, drafted=False)[0]
    yield bar_line("drafting_exactness/greedy-bfloat16", *_greedy(texts, dtype=half), judged=False, undrafted=plain)


def sharp_mixture(gate: str, *, weight: float = 0.3, dtype: torch.dtype = torch.float32) -> MixedLM:
    """Tiny random models that think differently, and are sure of what they think."""
    parts = []
    for seed in (0, 7):
        config = llama_config(32, 2, 4, kv_heads=2, vocab_size=VOCABULARY)
        config.initializer_range = 0.4
        parts.append(random_model(config, dtype=dtype, device=torch.device("cpu"), seed=seed))
    memory = MemoryDecoder(parts[1], MemorySettings(kind="decoder", vocab_size=VOCABULARY, mix_weight=weight))
    model = MixedLM(parts[0], memory, gate=GateConfig(gate=gate))  # type: ignore[arg-type]
    model.generation_config.eos_token_id = None
    return model


def processors_of(options: dict[str, Any]) -> list[Any]:
    """What `generate` makes of these options, in its order."""
    return [make(options[name]) for name, make in _MAKES.items() if name in options]


def sampled(
    model: MixedLM, prompt: Int[Tensor, "1 T"], count: int, *, rows: int = 1, **options: Any
) -> Int[Tensor, "B T2"]:
    """So many texts after a prompt, of one length, made `rows` at a time."""
    prompts = prompt.expand(rows, -1)
    asked: dict[str, Any] = {"top_k": 0, "attention_mask": torch.ones_like(prompts)} | options
    asked |= {"do_sample": True, "max_new_tokens": _NEW, "pad_token_id": 0}
    return torch.cat([model.generate(prompts, **asked) for _ in range(-(-count // rows))])


@torch.no_grad()
def places_among(
    model: MixedLM, scores_of: Scores, texts: Int[Tensor, "B T"], start: int, *, seed: int = 0
) -> np.ndarray:
    """Where each sampled token lies in the distribution that it should have, in [0, 1).

    Tokens are ordered by how much more the first memory thinks of them than the base, so that a distribution too near
    to either is seen. Places are spread evenly if the distribution is right, whatever the text before.

    Args:
        scores_of: The distribution, computed directly.
        texts: Prompts, and what was sampled from place `start` on.
    """
    rng, (memory, *_) = np.random.default_rng(seed), model.named_memories().values()
    found = []
    for part in texts.split(64):
        base = model.base(part).logits.float().log_softmax(-1)
        votes = memory.votes(memory.step(part), slice(None))
        assert isinstance(votes, Tensor)
        order = (votes - base)[:, start - 1 : -1].argsort(-1)
        probs = scores_of(part)[:, start - 1 : -1].double().softmax(-1).gather(-1, order)
        rank = (order == part[:, start:, None]).long().argmax(-1, keepdim=True)
        here = (probs.cumsum(-1) - probs * torch.from_numpy(rng.random((*rank.shape[:2], 1)))).gather(-1, rank)
        found.append(here.flatten().numpy())
    return np.concatenate(found)


def chance_of(places: np.ndarray) -> float:
    """Of bins as uneven as these, if places are spread evenly: chi-square."""
    counts = np.histogram(places.clip(0, 1 - 1e-12), bins=BINS, range=(0, 1))[0]
    expected = len(places) / BINS
    uneven = torch.tensor(((counts - expected) ** 2 / expected).sum())
    return float(torch.special.gammaincc(torch.tensor((BINS - 1) / 2).double(), uneven / 2))


def direct(model: MixedLM, processors: list[Any] | None = None) -> Scores:
    """The mixture's processed scores at all places of some texts, read at once and without a cache."""

    def scores_of(texts: Tensor) -> Tensor:
        scores = model(texts, use_cache=False).logits.float()
        for place in range(texts.shape[1]) if processors else ():
            for processor in processors or []:
                scores[:, place] = processor(texts[:, : place + 1], scores[:, place].clone())
        return scores

    return scores_of


@torch.no_grad()
def _greedy(texts: int, *, dtype: torch.dtype = torch.float32, drafted: bool = True) -> tuple[float]:
    """The share of greedy drafted tokens that are not the likeliest of the mixture computed directly; every third of
    the prompts is four of them, read together."""
    wrong, tokens = 0, 0
    for seed in range(texts):
        model = sharp_mixture(("none", "posterior")[seed % 2], dtype=dtype)
        prompt = random_tokens(1 if seed % 3 else 4, 7, VOCABULARY, torch.device("cpu"), seed=seed)
        asked: dict[str, Any] = {"attention_mask": torch.ones_like(prompt)}
        asked |= {"drafting": 1 + seed % 6} if drafted else {}
        made = model.generate(prompt, do_sample=False, max_new_tokens=_NEW, pad_token_id=0, **asked)
        logits = direct(model)(made)[:, 6:-1]
        off = logits.amax(-1) - logits.gather(-1, made[:, 7:, None])[..., 0]
        wrong, tokens = wrong + int((off > _TIE).sum()), tokens + off.numel()
    return (wrong / tokens,)
