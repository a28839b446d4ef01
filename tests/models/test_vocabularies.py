"""Tokens of one vocabulary in another: the same, by role, in pieces, in bytes."""

import copy

import pytest
from conftest import sentences
from tiny_tokenizers import permuted, sentencepiece_like
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from memlm.models.vocabularies import align_vocabularies


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Trained on other sentences than the byte-level tokenizer, so both have tokens that the other lacks."""
    return sentencepiece_like([*sentences(100, seed=3), "naïve café"])


def spelt(tokenizer: PreTrainedTokenizerFast, id_: int) -> bytes:
    """The bytes of an ordinary token."""
    token = tokenizer.convert_ids_to_tokens(id_)
    if "▁" in tokenizer.get_vocab():
        return bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
    byte = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(byte[character] for character in token)


@pytest.mark.parametrize("order", ["to sentencepiece", "to byte level"])
def test_shared_tokens_and_pieces_spell_the_same_bytes(
    order: str, tokenizer: PreTrainedTokenizerFast, sentencepiece: PreTrainedTokenizerFast
) -> None:
    old, new = (tokenizer, sentencepiece) if order == "to sentencepiece" else (sentencepiece, tokenizer)
    found = align_vocabularies(old, new, old_rows=len(old))
    spellings = {spelt(old, id_) for id_ in range(len(old)) if id_ not in old.all_special_ids}
    seen = {"one": 0, "several": 0}
    for id_, pieces in enumerate(found.pieces):
        if id_ in new.all_special_ids:
            continue
        whole = spelt(new, id_)
        assert b"".join(spelt(old, piece) for piece in pieces) == whole
        assert (len(pieces) == 1) == (whole in spellings)
        seen["one" if len(pieces) == 1 else "several"] += 1
    assert min(seen.values()) > 20
    assert sum(found.counts.values()) == len(new)
    assert found.counts["shared"] + found.counts["role"] == sum(len(pieces) == 1 for pieces in found.pieces)


def test_a_token_is_split_as_it_stands_within_a_word(
    tokenizer: PreTrainedTokenizerFast, sentencepiece: PreTrainedTokenizerFast
) -> None:
    """sentencepiece puts a space before a text; the pieces of a token must not begin with it."""
    new = copy.deepcopy(tokenizer)
    new.add_tokens(["asthmapatients", " asthmapatients"])
    found = align_vocabularies(sentencepiece, new, old_rows=len(sentencepiece))
    inside, after_space = (sentencepiece.convert_ids_to_tokens(found.pieces[-n]) for n in (2, 1))
    assert "".join(inside) == "asthmapatients"
    assert "".join(after_space) == "▁asthmapatients"


def test_the_same_tokens_in_another_order_are_each_found(sentencepiece: PreTrainedTokenizerFast) -> None:
    """Also where two tokens stand for the same byte, as 'a' and <0x61> do."""
    new, ids = permuted(sentencepiece, seed=0)
    found = align_vocabularies(sentencepiece, new, old_rows=len(sentencepiece))
    assert all(found.pieces[ids[id_]] == [id_] for id_ in range(len(sentencepiece)))


def test_special_tokens_are_found_by_role_then_by_text(tokenizer: PreTrainedTokenizerFast) -> None:
    old, new = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    for one in (old, new):
        one.add_tokens([AddedToken("<tool>", special=True)])
    new.add_tokens([AddedToken("<end of turn>", special=True), AddedToken("<image>", special=True)])
    new.eos_token = "<end of turn>"
    found = align_vocabularies(old, new, old_rows=len(old))
    id_of = new.convert_tokens_to_ids
    assert found.pieces[id_of("<end of turn>")] == [old.eos_token_id]
    assert found.pieces[id_of("<s>")] == [old.bos_token_id]
    assert found.pieces[id_of("<tool>")] == [old.convert_tokens_to_ids("<tool>")]
    assert found.pieces[id_of("<image>")] == [], "nothing is known of it; its text says nothing"
    assert found.pieces[id_of("</s>")] == [old.eos_token_id], "no longer EOS there, but the same text"
    assert found.counts["unknown"] == 1


def test_a_token_that_is_no_whole_character_becomes_its_bytes(
    tokenizer: PreTrainedTokenizerFast, sentencepiece: PreTrainedTokenizerFast
) -> None:
    core = copy.deepcopy(tokenizer)
    core.add_tokens(["北"])
    found = align_vocabularies(core, sentencepiece, old_rows=len(tokenizer))  # the added token has no row
    half = sentencepiece.convert_tokens_to_ids("<0xE5>")
    assert found.pieces[half] == [tokenizer.convert_tokens_to_ids("å")]  # how byte-level vocabularies spell byte E5


def test_ids_without_a_row_are_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    new, ids = permuted(tokenizer, seed=1)
    rows = len(tokenizer) - 10
    found = align_vocabularies(tokenizer, new, old_rows=rows)
    assert all(piece < rows for pieces in found.pieces for piece in pieces)
    assert all(len(found.pieces[ids[id_]]) > 1 for id_ in range(rows, len(tokenizer))), "they fall into their letters"
