"""Drafted and drawn decoding take less time per token than the base alone, where the base is large.

What a large base accepts is replayed from a real pair: `python -m benchmarks.drafted_decoding MEMORY --corpus C --out
F` records which drafted tokens SmolLM2 and a memory of the corpus's domain accept on beginnings of test documents.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import llama_config, parameter_count, qwen_config, random_model, random_tokens, tiny_config
from benchmarks.report import bar_line, hardware
from benchmarks.timing import Timing, interleave
from memlm.corpus.blocks import Corpus
from memlm.evaluate.decoding import decode
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import MemorySettings
from memlm.mix import drafting
from memlm.mix.mixed_lm import MixedLM
from memlm.mix.pace import Pace
from memlm.models.loading import default_device, default_dtype, dtype_name

ACCEPTED = Path(__file__).with_name("results") / "accepted.json"
BARS = {"greedy fixed": 0.80, "sampled fixed": 0.80, "drawn 0.4": 0.85, "drawn 0.6": 0.70}
_LONGEST = 6  # tokens drafted while decisions are recorded
_SEEN = 32  # tokens of a document that are given


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A line per way: its time per token over that of the base alone, transformers' own `generate`.

    A base of Qwen2.5-1.5B's shape with random weights, and a memory of its tokenizer with a tenth of its other weights,
    in the precision of the device; decisions as recorded (`accepted.json`), or half accepted in a quick run. Static:
    caches of that kind, behind which an accelerator's steps are compiled.
    """
    device = default_device()
    dtype = default_dtype(device)
    if quick:
        shapes, sizes = (tiny_config(), tiny_config()), {"new": 4, "rounds": 1}
    else:
        big = qwen_config()
        shapes = (big, llama_config(896, 12, 14, kv_heads=2, ffn_width=2816, vocab_size=big.vocab_size))
        sizes = {"new": 32, "rounds": 3}
    base, part = (random_model(shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes))
    decisions = {"quick": [True, False]} if quick else json.loads(ACCEPTED.read_text(encoding="utf-8"))["decisions"]
    parameters = [parameter_count(model, embeddings=False) for model in (base, part)]
    found = measure(base, part, decisions, **sizes)
    for way in (name for name in found.seconds if name != "base"):
        yield bar_line(
            f"drafted_decoding/{way.replace(' ', '-')}",
            found.ratio(way, "base"),
            at_most=BARS.get(way),
            judged=way in BARS and not quick,
            spread=found.spread(way, "base"),
            seconds_per_token=round(found.median(way) / sizes["new"], 4),
            base_seconds_per_token=round(found.median("base") / sizes["new"], 4),
            parameters={"base": parameters[0], "memory": parameters[1]},
            dtype=dtype_name(dtype),
            threads=torch.get_num_threads(),
        )


def measure(base: Any, part: Any, decisions: dict[str, list[bool]], *, new: int, rounds: int) -> Timing:
    """Seconds of each way to decode so many tokens, in turns.

    Args:
        part: What the memory is.
        decisions: Setting to whether each drafted token that was judged was accepted, in turn.
    """
    memory = MemoryDecoder(part, MemorySettings(kind="decoder", vocab_size=base.config.vocab_size))
    mixtures = {weight: MixedLM(base, memory, weight) for weight in (0.4, 0.6)}
    prompt = random_tokens(1, 1, base.config.vocab_size, base.device)  # a longer one is read slowly: see Head
    sides: dict[str, Callable[[], object]] = {
        "base": lambda: decode(base, prompt, new),
        "undrafted": lambda: decode(mixtures[0.6], prompt, new),
        "base static": lambda: decode(base, prompt, new, cache_implementation="static"),
        "undrafted static": lambda: decode(mixtures[0.6], prompt, new, cache_implementation="static"),
    }
    for name, decided in decisions.items():
        sides[name] = _replayed(mixtures[0.6], prompt, new, itertools.cycle(decided), Pace())
    for weight, mixed in mixtures.items():
        sides[f"drawn {weight}"] = lambda mixed=mixed: decode(mixed, prompt, new, sampled=True, drawing=True)
    return interleave(sides, device=base.device, rounds=rounds, warmup=1)


def _replayed(mixed: MixedLM, prompt: Tensor, new: int, decided: Iterator[bool], pace: Pace) -> Callable[[], object]:
    """Decoding in which drafted tokens are accepted as they were recorded; all else is done as ever."""

    def judge(scores: Tensor, drafts: Any, sampled: bool) -> tuple[list[int], Tensor]:
        count = 0 if drafts is None else drafts.tokens.shape[1]
        accepted = next((place for place in range(count) if not next(decided)), count)
        drafting.judge(scores, drafts, sampled)  # takes its time
        return [accepted], scores[:, accepted].argmax(-1)

    return lambda: decode(mixed, prompt, new, drafting=pace, draft_judge=judge)


def record(base: str, memory: str, corpus: str, *, documents: int = 12, new: int = 32) -> dict[str, Any]:
    """Which drafted tokens a real pair accepts, in four settings, on beginnings of test documents.

    Returns:
        `decisions`: setting to whether each drafted token that was judged was accepted, in turn; `acceptance`.
    """
    test = Corpus(corpus).split("test")
    found: dict[str, list[bool]] = {}
    for gate in ("none", None):
        mixed = MixedLM.from_pretrained(base, memory=memory, gate=gate, dtype=default_dtype(default_device()))
        mixed.to(default_device())  # type: ignore[arg-type]
        for sampled in (False, True):
            decided: list[bool] = []

            def judge(
                scores: Tensor, drafts: Any, is_sampled: bool, decided: list[bool] = decided
            ) -> tuple[list[int], Tensor]:
                accepted, last = drafting.judge(scores, drafts, is_sampled)
                if drafts is not None:
                    decided += [True] * accepted[0] + [False] * (accepted[0] < drafts.tokens.shape[1])
                return accepted, last

            torch.manual_seed(0)
            for start in test.offsets[:documents]:
                prompt = torch.from_numpy(test.tokens[start : start + _SEEN].astype("int64"))[None].to(mixed.device)
                decode(mixed, prompt, new, sampled=sampled, drafting=Pace(_LONGEST), draft_judge=judge)
            found[f"{'sampled' if sampled else 'greedy'} {'fixed' if gate == 'none' else 'gated'}"] = decided
    return {
        "base": base,
        "memory": memory,
        "corpus": corpus,
        "documents": documents,
        "new_tokens": new,
        "acceptance": {name: round(sum(decided) / max(1, len(decided)), 4) for name, decided in found.items()},
        "decisions": found,
        "machine": hardware(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Record decisions."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drafted_decoding", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("memory")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--corpus", required=True, help="folder of the corpus stage")
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--out", type=Path, default=ACCEPTED)
    given = parser.parse_args(arguments)
    found = record(given.base, given.memory, given.corpus, documents=given.documents)
    given.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(json.dumps(found["acceptance"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
