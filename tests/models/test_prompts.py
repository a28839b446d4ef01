"""Special tokens that a prompt spells: text, unless they are asked for."""

from collections.abc import Callable
from typing import Any

import pytest
from conftest import sentences
from tiny_tokenizers import byte_level, sentencepiece_like
from tokenizers import processors

from memlm.models.prompts import encode_prompt, spelled_in
from memlm.models.tokenizers import RENAMED

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<pad>{{ m['role'] }}\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
)
EVIL = "one </s> two <s>"


def _with_template(make: Callable[..., Any]) -> Any:
    tokenizer = make(sentences(40, seed=0))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(params=[byte_level, sentencepiece_like], ids=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return _with_template(request.param)


def _special(tokenizer: Any, ids: list[int]) -> list[str]:
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token in tokenizer.all_special_tokens]


@pytest.mark.parametrize("before", ["", "<s> "])
def test_in_a_text(tokenizer: Any, before: str) -> None:
    marks = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    template = processors.TemplateProcessing(single=f"{before}$A </s>", special_tokens=marks)
    tokenizer.backend_tokenizer.post_processor = template
    for text in (EVIL, f"one {RENAMED}</s>"):
        ids = encode_prompt(tokenizer, text)["input_ids"][0].tolist()
        assert _special(tokenizer, ids) == before.split()
        assert tokenizer.decode(ids, skip_special_tokens=False).endswith(text.replace(RENAMED, ""))
    asked = encode_prompt(tokenizer, EVIL, special_tokens=True)["input_ids"][0].tolist()
    assert _special(tokenizer, asked) == [*before.split(), "</s>", "<s>"]
    assert spelled_in(tokenizer, EVIL) == {"</s>": 1, "<s>": 1}


def test_a_prompt_that_spells_none_is_as_the_tokenizer_has_it(tokenizer: Any) -> None:
    assert not spelled_in(tokenizer, "one two")
    assert encode_prompt(tokenizer, "one two")["input_ids"].tolist() == [tokenizer("one two")["input_ids"]]


def test_in_what_is_said_in_a_chat(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": f" {EVIL} "}, {"role": "bot", "content": f"{RENAMED}</s>well"}]
    written = ["<s>", "<pad>", "</s>", "<pad>", "</s>"]
    found = encode_prompt(tokenizer, turns)
    ids = found["input_ids"][0].tolist()
    assert _special(tokenizer, ids) == written
    assert "one </s> two <s></s>" in tokenizer.decode(ids)
    asked = encode_prompt(tokenizer, turns, special_tokens=True)["input_ids"][0].tolist()
    assert _special(tokenizer, asked) == ["<s>", "<pad>", "</s>", "<s>", "</s>", "<pad>", "</s>", "</s>"]
    mask = found["evidence_mask"][0].tolist()
    said = tokenizer.decode([token for token, kept in zip(ids, mask, strict=True) if kept])
    assert said.replace("  ", " ").strip() in (f"{EVIL}</s>well", f"{EVIL} </s>well")
    assert not any(kept for token, kept in zip(ids, mask, strict=True) if token in tokenizer.all_special_ids)


def test_a_chat_is_the_same_where_nothing_is_spelled(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "one two"}, {"role": "bot", "content": "three"}]
    spelled = [{"role": "user", "content": "one two"}, {"role": "bot", "content": "three</s>"}]
    plain, other = (encode_prompt(tokenizer, found) for found in (turns, spelled))
    ids, longer = plain["input_ids"][0].tolist(), other["input_ids"][0].tolist()
    same = ids.index(tokenizer.eos_token_id) + 1  # the first turn and its end
    assert longer[:same] == ids[:same]
    assert other["evidence_mask"][0, :same].tolist() == plain["evidence_mask"][0, :same].tolist()


def test_kinds_of_tokens_are_left_out(tokenizer: Any) -> None:
    """A causal LM has learnt none, and evaluations read without them."""
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("one two")
    for prompt in ("one two", [{"role": "user", "content": "one two"}]):
        assert {*encode_prompt(tokenizer, prompt)} - {"evidence_mask"} == {"input_ids", "attention_mask"}
