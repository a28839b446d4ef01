import copy

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from memlm.errors import InputError, TokenizerMismatchError
from memlm.models.tokenizers import check_same, encode_prompt, fingerprint, load_tokenizer, vocabulary_size


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
