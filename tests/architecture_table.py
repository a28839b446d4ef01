"""What memlm does with each architecture; `python tests/architecture_table.py` prints docs/architectures.md."""

import itertools
import math
import random
import re
import string
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from architectures import ARCHITECTURES, VOCABULARY, tiny_config, tiny_model
from families import family_model, token_ids
from memories import decoder_memory
from tiny_tokenizers import letters
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import memlm
from memlm import MixedLM
from memlm.errors import MemlmError, reason_of
from memlm.memory.decoder import MemoryDecoder
from memlm.models.layers import keep_layers
from memlm.models.loading import load_causal_lm
from memlm.models.taps import find_tap

STEPS = 3
_NEAR = {"rtol": 1e-2, "atol": 0}  # where two experts or keys come near each other, rounding may choose the other
CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # float32 sums in another order, logits of order 1


@torch.no_grad()
def by_hand(model: Any, tokens: Tensor) -> Tensor:
    """Greedily, all text read anew for every token."""
    for _ in range(STEPS):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens


def generate(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(tokens, max_new_tokens=STEPS, do_sample=False, **options)


@cache
def memory() -> MemoryDecoder:
    return decoder_memory(VOCABULARY, seed=3)


@cache
def other(seed: int) -> PreTrainedModel:
    return family_model("llama", VOCABULARY, seed=seed)


@lru_cache(1)
def mixture(base: PreTrainedModel) -> MixedLM:
    return MixedLM(base, memory(), 0.4)


def prompt(rows: int = 1, length: int = 7) -> Tensor:
    return token_ids(rows, length, vocab_size=VOCABULARY, seed=1)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **(CLOSE if found.is_floating_point() else {}))


def as_base(model: PreTrainedModel) -> str:
    mixed, tokens = mixture(model), prompt()
    with torch.no_grad():
        alone = model(input_ids=tokens).logits
        same(mixed(tokens, mix_weight=0.0).logits, alone.float())
        changed = torch.cat([(tokens[:, :1] + 5) % VOCABULARY, tokens[:, 1:]], 1)
        assert (model(input_ids=changed).logits[:, -1] - alone[:, -1]).abs().max() > 1e-3  # a past to be forgotten
    same(generate(mixed, tokens), by_hand(mixed, tokens))
    return "works" if mixed._voter.keeps_cache else "works, reads all text anew"


def with_padding(model: PreTrainedModel) -> str:
    _padded(mixture(model))
    return "works"


def _padded(mixed: MixedLM) -> None:
    tokens = prompt(2)
    short = tokens[1:, :-2]
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    rows = torch.cat([tokens[:1], torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1)])
    found = generate(mixed, rows, attention_mask=mask)
    same(found[:1], by_hand(mixed, tokens[:1]))
    same(found[1:, 2:], by_hand(mixed, short))


def with_beams(model: PreTrainedModel) -> str:
    mixed = mixture(model)
    options = {"num_beams": 3, "num_return_sequences": 3}
    same(generate(mixed, prompt(2), **options), generate(mixed, prompt(2), use_cache=False, **options))
    return "works"


def with_drafts(model: PreTrainedModel) -> str:
    mixed, tokens = mixture(model), prompt(1, 4).repeat(1, 2)
    expected = by_hand(mixed, tokens)
    same(generate(mixed, tokens, prompt_lookup_num_tokens=3), expected)
    same(generate(mixed, tokens, assistant_model=other(9)), expected)
    return "works"


@torch.no_grad()
def in_chunks(model: PreTrainedModel) -> str:
    mixed, tokens = mixture(model), prompt(2, 8)
    past, found = mixed.new_cache(2), []
    for start, end in ((0, 3), (3, 4), (4, 7), (7, 8)):
        found.append(mixed(tokens[:, start:end], past_key_values=past).logits)
    same(torch.cat(found, 1), mixed(tokens).logits)
    return "works"


def as_memory(model: PreTrainedModel) -> str:
    mixed, tokens = MixedLM(other(5), MemoryDecoder(model), 0.6), prompt()
    same(generate(mixed, tokens), by_hand(mixed, tokens))
    _padded(mixed)
    same(generate(mixed, prompt(2), num_beams=3), generate(mixed, prompt(2), num_beams=3, use_cache=False))
    return "works" if mixed.named_memories()["memory"].reader.keeps_keys else "works, reads its window anew"


def with_two_layers(model: PreTrainedModel) -> str:
    smaller, tokens = keep_layers(model, 2), prompt(2)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        smaller.save_pretrained(folder)
        same(load_causal_lm(folder)(tokens, use_cache=False).logits, smaller(tokens, use_cache=False).logits)
    return "works"


@lru_cache(1)
def imitated(model: PreTrainedModel) -> "tempfile.TemporaryDirectory[str]":
    """A folder: the model, a corpus of random letters, each text within a block, and targets of the model's keys."""
    work = tempfile.TemporaryDirectory()
    folder, draw = work.name, random.Random(0)
    model.save_pretrained(f"{folder}/model")
    letters(VOCABULARY).save_pretrained(f"{folder}/model")
    texts = ["".join(draw.choices(string.ascii_letters, k=draw.randint(5, 14))) for _ in range(40)]
    Path(folder, "documents.txt").write_text("\n\n".join(texts), encoding="utf-8")
    split = {"document_separator": "\n\n", "block_size": 16, "validation_fraction": 0.2, "test_fraction": 0.2}
    memlm.build_corpus([f"{folder}/documents.txt"], tokenizer=f"{folder}/model", out=f"{folder}/corpus", **split)
    memlm.build_datastore(f"{folder}/corpus", teacher=f"{folder}/model", out=f"{folder}/datastore", dtype="float32")
    memlm.build_targets(f"{folder}/datastore", out=f"{folder}/targets", k=8, target_temperature=4.0)
    return work


def as_pupil(model: PreTrainedModel) -> str:
    return through_the_stages(model, "decoder")


def beside_mlp(model: PreTrainedModel) -> str:
    return through_the_stages(model, "mlp")


def through_the_stages(model: PreTrainedModel, kind: str) -> str:
    """Keys, targets, training, evaluation; perplexities are those of each test document by hand."""
    folder = imitated(model).name
    base, trained = f"{folder}/model", f"{folder}/{kind}"
    quick: dict[str, Any] = {"dtype": "float32", "batch_size": 8, "learning_rate": 1e-3, "epochs": 1}
    init = base if kind == "decoder" else None
    memlm.train_memory(f"{folder}/targets", init=init, base=base, out=trained, kind=kind, **quick)
    report = memlm.evaluate_perplexity(f"{folder}/corpus", base=base, memory=trained, dtype="float32", bootstrap=10)
    tokens, ends = (torch.from_numpy(np.load(f"{folder}/corpus/test.{name}.npy")).long() for name in _SPLIT)
    documents = [tokens[start:end] for start, end in itertools.pairwise(ends)]
    memory, fixed = memlm.load_memory(trained), report["mixture"]["fixed"]
    for weight, said in (0.0, report["base"]), (1.0, report["memory"]), (fixed["mix_weight"], fixed):
        found = perplexity(MixedLM(model, memory, weight), documents)
        torch.testing.assert_close(said["perplexity"], found, **_NEAR)
    return "works"


@torch.no_grad()
def perplexity(model: MixedLM, documents: list[Tensor]) -> float:
    """Each read alone."""
    log_probs = [model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]) for ids in documents]
    return math.exp(-float(torch.cat(log_probs).mean()))


COLUMNS: dict[str, Callable[[PreTrainedModel], str]] = {
    "base": as_base,
    "padding": with_padding,
    "beams": with_beams,
    "drafts": with_drafts,
    "steps": in_chunks,
    "memory": as_memory,
    "tap": find_tap,
    "2 layers": with_two_layers,
}
STAGES: dict[str, Callable[[PreTrainedModel], str]] = {"decoder": as_pupil, "MLP": beside_mlp}
"""Checks that take seconds each, all stages of memlm."""


def outcome(check: Callable[[PreTrainedModel], str], model: PreTrainedModel) -> str:
    """`works`, or the line that a refusal gives, or WRONG and why."""
    try:
        return check(model)
    except MemlmError as error:
        return f"WRONG: {error}" if "\n" in f"{error}" else f"refused: {error}"
    except Exception as error:
        if "not supported with stateful models" in f"{error}":  # transformers' own refusal
            return "refused: assisted generation is not supported with stateful models"
        return f"WRONG: {type(error).__name__} {reason_of(error)}"


def row(architecture: str, *, stages: bool = True) -> dict[str, str]:
    """Column to outcome; only `base` where no tiny model can be made."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny_config(architecture)).parameters())
        if size > _LARGEST:
            raise ValueError(f"{size:,} parameters where all known sizes are small")
        model = tiny_model(architecture)
        model(input_ids=prompt())
    except Exception as error:
        return {"base": f"cannot be made tiny here: {reason_of(error)}"}
    columns = COLUMNS | STAGES if stages else COLUMNS
    return {name: outcome(check, model) for name, check in columns.items()}


def code(outcomes: dict[str, str]) -> str:
    """The outcomes in short: a letter for each column (works, anew, refused, else WRONG) and what the tap is called."""
    if len(outcomes) == 1:
        return "cannot be made"
    letters = {"works": "w", "works, reads all text anew": "a", "works, reads its window anew": "a"}
    said = [(name, what) for name, what in outcomes.items() if name != "tap"]
    short = [letters.get(what, "r" if what.startswith("refused") else f"({name} {what})") for name, what in said]
    tap = outcomes["tap"]
    return f"{''.join(short)} {'none' if tap.startswith('refused') else re.split(_NUMBER, tap, maxsplit=1)[-1]}"


def markdown(rows: dict[str, dict[str, str]]) -> str:
    """The page docs/architectures.md, from the `row` of each architecture."""
    lines: dict[str, int] = {}
    columns = ["architecture", *COLUMNS, *STAGES]
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    cannot = []
    short = {"works": "yes", "works, reads all text anew": "anew", "works, reads its window anew": "anew"}
    for architecture, outcomes in sorted(rows.items()):
        if len(outcomes) == 1:
            cannot.append(f"- `{architecture}`: {outcomes['base'].removeprefix('cannot be made tiny here: ')}")
            continue
        cells = []
        for name, said in outcomes.items():
            if said.startswith("refused: "):
                line = re.sub(_FOLDER, "FOLDER", re.sub(_CLASS, "BASE", said.removeprefix("refused: ")))
                cells.append(f"no [{lines.setdefault(line, len(lines) + 1)}]")
            else:
                cells.append(short.get(said, f"`{said}`" if name == "tap" else said))
        table.append(f"| {architecture} | {' | '.join(cells)} |")
    parts = {"table": table, "said": [f"{n}. {line}" for line, n in lines.items()], "cannot": cannot}
    return _PAGE.format(version=transformers.__version__, **{name: "\n".join(part) for name, part in parts.items()})


_SPLIT = "tokens", "offsets"
_LARGEST = 20_000_000
_NUMBER = r"\.\d+\."
_CLASS = r"\b[A-Za-z]\w+(ForCausalLM|LMHeadModel|ModelWithLMHead|GenerationDecoder|ForConditionalGeneration)\b"
_FOLDER = r"/[^\s']*/(model|decoder|mlp|targets|datastore|corpus)\b"
_PAGE = """# Architectures

What memlm does with each architecture for which transformers {version} has a causal language model, tried on a tiny
random model of each (four blocks, 64 tokens; CPU, float32). `PYTHONPATH=src:tests python
tests/architecture_table.py` writes this page, from the functions that `tests/models/test_architectures.py` holds
against a literal table. No model is known by its name: what it can do is found by trying, on a few tokens, when it
is first used.

- base: greedy generation beside a Memory Decoder gives what reading all text for every token gives. *anew*: the
  base keeps no cache that memlm can trust, so all text is read for every token, and a warning says so.
- padding: rows that are padded on the left give what each gives alone. beams: as without a cache. drafts: prompt
  lookup and an assistant give what greedy generation gives. steps: a text read in uneven parts behind a cache gives
  the logits of the whole.
- memory: it stands beside a base as a Memory Decoder, greedily, padded and with beams. *anew*: it reads its window
  for every token.
- tap: the module whose input is read with `--tap auto`. 2 layers: what `--layers 2` makes, saved and loaded.
- decoder, MLP: such a memory from the model alone, through all stages: keys of the model, targets, training (of a
  decoder, from the model itself), evaluation, whose perplexities are those that each document gives alone.
- no [n]: refused in one line, below.

{table}

## What is said where something is refused

`BASE` stands for the model's class, `FOLDER` for a folder.

{said}

## Not tried

{cannot}
"""


if __name__ == "__main__":
    print(markdown({architecture: row(architecture) for architecture in ARCHITECTURES}), end="")
