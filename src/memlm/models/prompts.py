"""Prompts to token ids: a text to go on from, or the turns of a chat."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from memlm.errors import InputError
from memlm.files import utf8
from memlm.models.tokenizers import (
    RENAMED,
    TextEncoder,
    check_rows_for,
    renamed_spelled,
    special_pattern,
    told,
    without_special_tokens,
)

Turns = list[dict[str, str]]

_BREAK = "\ufffe"  # no character; what a turn says is no special token while a template is filled


def check_prompt(prompt: str | Turns) -> None:
    """Raise unless a text, or the turns of a chat, are UTF-8, which what a terminal gives need not be.

    Raises:
        InputError: It is not.
    """
    if any(utf8(text) != text for text in _texts(prompt)):
        raise InputError("the prompt is not UTF-8; see to the encoding of the terminal or file that it comes from")


def spelled_in(tokenizer: PreTrainedTokenizerBase, prompt: str | Turns) -> Counter[str]:
    """How often a text, or what is said in a chat, spells each special token."""
    special = special_pattern(tokenizer)
    return Counter(match.group() for text in _texts(prompt) for match in special.finditer(text))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Turns,
    *,
    rows: int | None = None,
    special_tokens: bool = False,
) -> BatchEncoding:
    """A text, or the turns of a chat in the tokenizer's template, as a batch of one that an answer can follow.

    A template writes special tokens itself, so none are added to it. What a tokenizer puts behind a text, as an end
    token, is left out. Of a chat, `evidence_mask` is False at tokens that the template writes, where those can be told.

    Args:
        rows: Of the embeddings of the model that is to read it; None: enough.
        special_tokens: Whether a special token that is spelled in the text, or in what is said, is that token; else it
            is text like any (but in a chat for a tokenizer written in Python).

    Raises:
        InputError: There are no tokens, or turns and no template, or a token that the model has no row for; the
            prompt is not UTF-8; tokenizer or template fail.
    """
    check_prompt(prompt)
    as_text = not special_tokens and bool(spelled_in(tokenizer, prompt))
    if isinstance(prompt, str):
        with told(InputError, "the tokenizer fails on the prompt", "give another one"):
            inputs = _text(tokenizer, prompt, as_text=as_text)
    elif tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template; give plain text")
    else:
        with told(InputError, "the tokenizer's chat template fails on these turns", "give plain text"):
            inputs = _chat(tokenizer, prompt, as_text=as_text)
    if not inputs["input_ids"].shape[1]:  # type: ignore[union-attr]
        raise InputError(f"prompt {prompt!r} has no tokens; give some text to go on from")
    if rows is not None:
        ids = inputs["input_ids"][0].numpy()  # type: ignore[union-attr]
        check_rows_for(ids, rows, tokenizer, data="the prompt", label="the base")
    return inputs


def _texts(prompt: str | Turns) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]


def _text(tokenizer: PreTrainedTokenizerBase, prompt: str, *, as_text: bool) -> BatchEncoding:
    before, behind = _around(tokenizer)
    if as_text:
        return _batch([*before, *TextEncoder(tokenizer)([("the prompt", prompt)])[0].tolist()])
    ids: list[int] = tokenizer(prompt)["input_ids"]  # type: ignore[assignment]
    return _batch(ids[: len(ids) - behind])


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The ids that the tokenizer puts before every text, and how many it puts behind."""
    whole: list[int] = tokenizer("a")["input_ids"]  # type: ignore[assignment]
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    extra = len(whole) - len(text)
    starts = (start for start in range(extra + 1) if text and whole[start : start + len(text)] == text)
    start = next(starts, extra)
    return whole[:start], extra - start


def _batch(ids: list[int]) -> BatchEncoding:
    """Without the kinds of tokens that some tokenizers tell (`token_type_ids`): a causal LM has learnt none."""
    found = torch.tensor([ids], dtype=torch.long)
    return BatchEncoding({"input_ids": found, "attention_mask": torch.ones_like(found)})


def _chat(tokenizer: PreTrainedTokenizerBase, turns: Turns, *, as_text: bool) -> BatchEncoding:
    core = without_special_tokens(tokenizer) if as_text else None
    if core is None:
        filled: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
        inputs = _batch(filled["input_ids"])

        def tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
            found: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return found["input_ids"], found["offset_mapping"]

        said = _said(lambda turns: _filled(tokenizer, turns), turns, tokens, filled["input_ids"])
    else:
        special, renamed = special_pattern(tokenizer), renamed_spelled(tokenizer)
        spoken = [turn | {"content": renamed.sub("", turn["content"])} for turn in turns]

        def fill(turns: Turns) -> str:
            """The template's own special tokens by the names that the core has for them."""
            apart = [
                turn | {"content": special.sub(lambda met: met[0][0] + _BREAK + met[0][1:], turn["content"])}
                for turn in turns
            ]
            return special.sub(lambda met: RENAMED + met[0], _filled(tokenizer, apart)).replace(_BREAK, "")

        whole = core.encode(fill(spoken), add_special_tokens=False)
        inputs = _batch(whole.ids)
        said = _said(fill, spoken, lambda _: (whole.ids, whole.offsets), whole.ids)
    if said is not None:
        inputs["evidence_mask"] = torch.tensor([said])
    return inputs


def _filled(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> str:
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _said(
    fill: Callable[[Turns], str],
    turns: Turns,
    tokens: Callable[[str], tuple[list[int], list[tuple[int, int]]]],
    ids: list[int],
) -> list[bool] | None:
    """Per token whether it is part of what was said in a turn; None where that cannot be told.

    Args:
        fill: The template, filled with turns.
        tokens: Ids and places of a filled one's tokens.
        ids: Those that are asked about.
    """
    marks = [f"<<turn {number}>>" for number in range(len(turns))]
    marked = [turn | {"content": mark} for turn, mark in zip(turns, marks, strict=True)]
    try:
        frame, text = fill(marked), fill(turns)
        there, offsets = tokens(text)
    except Exception:  # a stranger's template, or a tokenizer that knows no offsets
        return None
    spans, at = [], 0
    for turn, mark in zip(turns, marks, strict=True):
        written, found, frame = frame.partition(mark)
        content = turn["content"]
        if not found or not text.startswith(written, at):
            return None
        at += len(written)
        content = content if text.startswith(content, at) else content.strip()
        if not text.startswith(content, at):
            return None
        spans.append((at, at := at + len(content)))
    if text[at:] != frame or there != ids:
        return None
    return [any(began < stop and end > start for start, stop in spans) for began, end in offsets]
