import copy
from pathlib import Path
from typing import Any

import pytest
from conftest import sentences
from tiny_tokenizers import byte_level, sentencepiece_like
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from memlm.corpus.build import build_corpus
from memlm.errors import InputError, ModelError, TokenizerMismatchError
from memlm.models import tokenizers as module
from memlm.models.prompts import encode_prompt
from memlm.models.tokenizers import (
    TextEncoder,
    check_same,
    fingerprint,
    load_tokenizer,
    special_texts,
    vocabulary_size,
)


def character_tokenizer(vocabulary: list[str], merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges or [], unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")


def test_a_saved_tokenizer_has_the_fingerprint_of_the_original(
    tokenizer: PreTrainedTokenizerFast, model_folder: str
) -> None:
    loaded = load_tokenizer(model_folder)
    assert fingerprint(loaded) == fingerprint(tokenizer)
    check_same(loaded, tokenizer, "one", "two")


def test_roles_of_special_tokens_are_not_part_of_the_fingerprint(tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<pad>"
    assert fingerprint(other) == fingerprint(tokenizer)


def test_a_tokenizer_with_more_tokens_is_told_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["asthma-inhaler"])
    message = rf"base x and memory y have different tokenizers \({len(tokenizer)} and {len(tokenizer) + 1} tokens\)"
    with pytest.raises(TokenizerMismatchError, match=message):
        check_same(tokenizer, other, "base x", "memory y")
    assert vocabulary_size(other) == vocabulary_size(tokenizer) + 1


def test_tokenizers_with_other_ids_are_told_apart() -> None:
    first, second = character_tokenizer(["?", "a", "b", "c"]), character_tokenizer(["?", "a", "c", "b"])
    with pytest.raises(TokenizerMismatchError, match="2 ids differ, the first is 2: 'b' and 'c'"):
        check_same(first, second, "x", "y")


def test_tokenizers_with_the_same_tokens_and_other_merges_are_told_apart() -> None:
    vocabulary = ["?", *"Helo", "He", "el"]
    first = character_tokenizer(vocabulary, [("H", "e"), ("e", "l")])
    second = character_tokenizer(vocabulary, [("e", "l"), ("H", "e")])
    assert first.get_vocab() == second.get_vocab()
    with pytest.raises(TokenizerMismatchError, match="same tokens, but they split text differently"):
        check_same(first, second, "x", "y")


def test_a_chat_gets_the_special_tokens_of_its_template_once() -> None:
    tokenizer = character_tokenizer(["?", "a", "b", "c"])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}b {{ m['content'] }} {% endfor %}c"
    assert tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, "a")["input_ids"][0]) == ["<s>", "a"]
    chat = encode_prompt(tokenizer, [{"role": "user", "content": "a"}])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(chat[0]) == ["<s>", "b", "a", "c"]


def test_a_chat_without_a_template_and_an_empty_prompt_are_refused() -> None:
    tokenizer = character_tokenizer(["?", "hi"])
    with pytest.raises(InputError, match="no chat template; give plain text"):
        encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    with pytest.raises(InputError, match="prompt '' has no tokens"):
        encode_prompt(tokenizer, "")


PIECES = ["<unk>", "<s>", "</s>", *"<>/s▁abcdehlmnoprtuvy."]


def unigram() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram([(piece, 0.0 if i < 3 else -3.0) for i, piece in enumerate(PIECES)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_level() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "the", "memory"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_piece() -> PreTrainedTokenizerFast:
    vocabulary = ["<unk>", "<s>", "</s>", *"<>/sabc", *[f"##{letter}" for letter in "<>/sabc"]]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


KINDS = {
    "byte-level": lambda: byte_level(sentences(50, seed=1)),
    "sentencepiece": lambda: sentencepiece_like(sentences(50, seed=1)),
    "unigram": unigram,
    "word-level": word_level,
    "word-piece": word_piece,
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_tokenizer_gives_special_tokens_for_text_and_all_else_is_as_before(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    tokenizer.add_tokens(["asthma-inhaler"])  # a word like any
    special = set(tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<turn>"]))
    spelled = ("spelled", "the </s> memory <s> <turn></s>")
    plain, parsed = TextEncoder(tokenizer), TextEncoder(tokenizer, special_tokens=True)
    assert not special & set(plain([spelled])[0].tolist())
    assert special <= set(parsed([spelled])[0].tolist())
    for text in (*sentences(10, seed=3), "the asthma-inhaler memory"):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert plain([("a", text)])[0].tolist() == parsed([("a", text)])[0].tolist() == expected
    assert special_texts(tokenizer)[0] == "<turn>"
    assert tokenizer(spelled[1], add_special_tokens=False)["input_ids"].count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_encoded_in_pieces_to_the_same_ids(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = KINDS[kind]()
    texts = {"lines": "\n".join(sentences(20, seed=5)), "none": ""}
    if kind != "sentencepiece":  # some of whose tokens here cross the ends of words
        texts["line"] = " ".join(sentences(20, seed=6))
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts.values()]
    assert [ids.tolist() for ids in TextEncoder(tokenizer)(list(texts.items()))] == expected
    monkeypatch.setattr(module, "PIECE", 400)
    assert [ids.tolist() for ids in TextEncoder(tokenizer)(list(texts.items()))] == expected


def test_a_text_that_the_tokenizer_fails_on_is_named() -> None:
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))  # and no such token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(InputError, match=r"b\.txt#0: the tokenizer fails on this text \(.*Missing.*\); leave it out"):
        TextEncoder(tokenizer)([("a.txt#0", "a"), ("b.txt#0", "b")])


def test_a_prompt_does_not_end_in_what_the_tokenizer_puts_behind_a_text() -> None:
    tokenizer = character_tokenizer(["?", "a", "b", "c"])
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    for template in ("<s> $A </s>", "$A </s> </s>", "$A"):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=marks
        )
        first = ["<s>"] if template.startswith("<s>") else []
        found = encode_prompt(tokenizer, "a b")
        assert tokenizer.convert_ids_to_tokens(found["input_ids"][0]) == [*first, "a", "b"]
        assert found["attention_mask"].shape == found["input_ids"].shape
        ended = encode_prompt(tokenizer, "a </s>", special_tokens=True)["input_ids"][0]  # as the user asked for
        assert tokenizer.convert_ids_to_tokens(ended) == [*first, "a", "</s>"]


def test_a_prompt_that_is_no_utf_8_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt in ("a \udcff", [{"role": "user", "content": "a \udcff"}]):
        with pytest.raises(InputError, match="the prompt is not UTF-8; see to the encoding"):
            encode_prompt(tokenizer, prompt)


def _with_begin() -> Any:
    tokenizer = character_tokenizer(["?", "a", "b", "c"])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


TURNS = [{"role": "user", "content": " a b "}, {"role": "bot", "content": "c"}, {"role": "user", "content": "b"}]
KEPT = "{{ bos_token }}b {% for m in messages %}b {{ m['content'] | trim }} c {% endfor %}a"


def test_what_a_chat_template_writes_is_no_evidence() -> None:
    tokenizer = _with_begin()
    tokenizer.chat_template = KEPT
    found = encode_prompt(tokenizer, TURNS)
    words = tokenizer.convert_ids_to_tokens(found["input_ids"][0])
    assert words == ["<s>", "b", "b", "a", "b", "c", "b", "c", "c", "b", "b", "c", "a"]
    said = [3, 4, 7, 10]
    assert found["evidence_mask"][0].nonzero()[:, 0].tolist() == said
    assert "evidence_mask" not in encode_prompt(tokenizer, "a b")


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m['content'] | upper }}{% endfor %}a", "a b"])
def test_a_template_that_changes_what_was_said_gives_no_mask(template: str) -> None:
    tokenizer = _with_begin()
    tokenizer.chat_template = template
    assert "evidence_mask" not in encode_prompt(tokenizer, TURNS)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate\nalways') }}", "{% for", "{{ messages[7].content }}", "{{ 1 / 0 }}"],
)
def test_a_chat_template_that_fails_is_one_line(template: str) -> None:
    tokenizer = byte_level(sentences(20, seed=0))
    tokenizer.chat_template = template
    with pytest.raises(
        InputError, match=r"the tokenizer's chat template fails on these turns .*; give plain"
    ) as caught:
        encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])
    assert len(str(caught.value).splitlines()) == 1


def words_only() -> PreTrainedTokenizerFast:
    """A tokenizer that fails on all words but one, for it has no token for others."""
    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def test_a_tokenizer_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the tokenizer fails on the prompt .*UNK.*; give another one"):
        encode_prompt(words_only(), "another word")
    with pytest.raises(ModelError, match=r"tokenizer .*fails on a plain text .*UNK.*; use another one"):
        fingerprint(words_only())
    words_only().save_pretrained(tmp_path / "words")
    (tmp_path / "a.txt").write_text("a a a")
    with pytest.raises(ModelError, match="words' fails on a plain text"):
        build_corpus([str(tmp_path / "a.txt")], tokenizer=str(tmp_path / "words"), out=tmp_path / "c")
