"""What memlm does with each architecture; `python tests/architecture_table.py` prints docs/architectures.md."""

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from architectures import ARCHITECTURES, VOCABULARY, tiny_model
from families import family_model, token_ids
from memories import decoder_memory
from torch import Tensor
from transformers import PreTrainedModel

from memlm import MixedLM
from memlm.errors import MemlmError
from memlm.memory.decoder import MemoryDecoder
from memlm.models.layers import keep_layers
from memlm.models.loading import load_causal_lm
from memlm.models.taps import find_tap

STEPS = 4
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


def mixture(base: PreTrainedModel, weight: float = 0.4) -> MixedLM:
    return MixedLM(base, decoder_memory(VOCABULARY, seed=3), weight)


def prompt(rows: int = 1, length: int = 7) -> Tensor:
    return token_ids(rows, length, vocab_size=VOCABULARY, seed=1)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **(CLOSE if found.is_floating_point() else {}))


def as_base(model: PreTrainedModel) -> str:
    mixed, tokens = mixture(model), prompt()
    with torch.no_grad():
        alone = model(input_ids=tokens).logits
        same(mixture(model, 0.0)(tokens).logits, alone.float())
        other = torch.cat([(tokens[:, :1] + 5) % VOCABULARY, tokens[:, 1:]], 1)
        assert (model(input_ids=other).logits[:, -1] - alone[:, -1]).abs().max() > 1e-3  # a past to be forgotten
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
    same(generate(mixed, tokens, assistant_model=family_model("llama", VOCABULARY, seed=9)), expected)
    return "works"


@torch.no_grad()
def in_chunks(model: PreTrainedModel) -> str:
    mixed, tokens = mixture(model), prompt(2, 8)
    cache, found = mixed.new_cache(2), []
    for start, end in ((0, 3), (3, 4), (4, 7), (7, 8)):
        found.append(mixed(tokens[:, start:end], past_key_values=cache).logits)
    same(torch.cat(found, 1), mixed(tokens).logits)
    return "works"


def as_memory(model: PreTrainedModel) -> str:
    mixed, tokens = MixedLM(family_model("llama", VOCABULARY, seed=5), MemoryDecoder(model), 0.6), prompt()
    same(generate(mixed, tokens), by_hand(mixed, tokens))
    _padded(mixed)
    with_beams_of = {"num_beams": 3, "num_return_sequences": 3}
    same(generate(mixed, prompt(2), **with_beams_of), generate(mixed, prompt(2), use_cache=False, **with_beams_of))
    return "works" if mixed.named_memories()["memory"].reader.keeps_keys else "works, reads its window anew"


def with_two_layers(model: PreTrainedModel) -> str:
    smaller, tokens = keep_layers(model, 2), prompt(2)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        smaller.save_pretrained(folder)
        same(load_causal_lm(folder)(tokens, use_cache=False).logits, smaller(tokens, use_cache=False).logits)
    return "works"


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


def outcome(check: Callable[[PreTrainedModel], str], model: PreTrainedModel) -> str:
    """`works`, or the line that a refusal gives, or WRONG and why."""
    try:
        return check(model)
    except MemlmError as error:
        assert "\n" not in str(error)
        return f"refused: {error}"
    except ValueError as error:
        if "not supported with stateful models" in str(error):  # transformers' own refusal
            return f"refused: {error}"
        return f"WRONG: {type(error).__name__} {str(error).strip().splitlines()[0][:100]}"
    except Exception as error:
        return f"WRONG: {type(error).__name__} {(str(error).strip().splitlines() or [''])[0][:100]}"


def row(architecture: str) -> dict[str, str]:
    """Column to outcome; only `base` where no tiny model can be made."""
    try:
        model = tiny_model(architecture)
        model(input_ids=prompt())
    except Exception as error:
        return {"base": f"cannot be made tiny here: {(str(error).strip().splitlines() or [''])[0][:100]}"}
    return {name: outcome(check, model) for name, check in COLUMNS.items()}
