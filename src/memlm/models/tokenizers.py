"""What makes two tokenizers the same: equal ids for equal text."""

from typing import Any

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from memlm.errors import InputError, ModelError, TokenizerMismatchError
from memlm.files import digest
from memlm.manifest import check_payload, is_artifact, read_manifest
from memlm.models.loading import adapted_base, load_config, reason_of, resolve

_PROBE = (
    "Hello, world!  Two  spaces\n\n\tand a tab. don't I'LL we've 1234567890 3.14 1,000 naïve Ünïcödé "
    "def f(x):\n    return x**2  # comment\nΑθήνα Москва 北京 東京 서울 القاهرة नमस्ते 🙂 http://a.b/c?d=e&f=%20"
)

ADVICE = (
    "a memory votes on token ids, so both must share them: train one with this base's tokenizer, or carry a Memory"
    " Decoder over with memlm adapt"
)


def load_tokenizer(source: str, **where: Any) -> PreTrainedTokenizerBase:
    """The tokenizer stored at a path or hub id.

    Args:
        where: As `where_from` gives it.

    Raises:
        ModelError: There is none, or it cannot be reached.
    """
    if is_artifact(source):
        check_payload(source, read_manifest(source), "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False, **where})
    except Exception as error:  # tokenizers raises it bare
        if (base := adapted_base(source, **where)) is not None:
            return load_tokenizer(base, **where)
        raise ModelError(f"no tokenizer could be loaded from {source!r} ({reason_of(error)})") from None
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # made up from the model's config alone
        raise ModelError(f"no tokenizer could be loaded from {source!r} (no vocabulary is stored there)")
    return tokenizer


def find_tokenizer(model: str, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with a model (path, hub id or packaged name); None where it comes with none."""
    try:
        return load_tokenizer(resolve(model), **options)
    except ModelError:
        return None


def check_reads(model: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, data: str, label: str) -> None:
    """Raise unless `model` can read token ids of `tokenizer`; reads configs only, no weights.

    Args:
        model: Path, hub id or packaged name. One without a tokenizer will do if its vocabulary is large enough.
        tokenizer: What made the token ids.
        vocab_size: The ids are below it.
        data: What an error calls the folder of the token ids.
        label: What an error calls the model.

    Raises:
        TokenizerMismatchError: The model comes with another tokenizer.
        InputError: Its vocabulary is too small.
        ModelError: It cannot be reached.
    """
    size = load_config(model).get_text_config().vocab_size
    own = find_tokenizer(model)
    if own is not None:
        check_same(tokenizer, own, data, label)
    if size < vocab_size:
        raise InputError(f"{data} has token ids up to {vocab_size - 1}, outside the {size} of {label}")


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash equal for tokenizers that give every text the same ids.

    It covers each (token, id) pair, added tokens included, and the ids of a probe text in several scripts, so two
    vocabularies with different merge rules differ too. Special-token roles (which id is EOS) are not part of it.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return digest({"vocabulary": vocabulary, "probe": tokenizer(_PROBE, add_special_tokens=False)["input_ids"]})


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> BatchEncoding:
    """A text, or the turns of a chat in the tokenizer's template, as a batch of one that an answer can follow.

    A template writes special tokens itself, so none are added to it.

    Raises:
        InputError: There are no tokens, or turns and no template.
    """
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    elif tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template; give plain text")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    assert isinstance(inputs, BatchEncoding)
    if not inputs["input_ids"].shape[1]:
        raise InputError(f"prompt {prompt!r} has no tokens; give some text to go on from")
    return inputs


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id the tokenizer can give; output layers may be padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same(
    first: PreTrainedTokenizerBase,
    second: PreTrainedTokenizerBase,
    first_name: str,
    second_name: str,
    *,
    advice: str = ADVICE,
) -> None:
    """Raise unless both tokenizers give the same ids.

    Raises:
        TokenizerMismatchError: They do not; the message says in what they differ, and ends with `advice`.
    """
    if fingerprint(first) != fingerprint(second):
        how = _difference(first, second)
        raise TokenizerMismatchError(f"{first_name} and {second_name} have different tokenizers ({how}); {advice}")


def _difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str:
    ours: dict[int, Any] = {id_: token for token, id_ in first.get_vocab().items()}
    theirs: dict[int, Any] = {id_: token for token, id_ in second.get_vocab().items()}
    if len(ours) != len(theirs):
        return f"{len(ours):,} and {len(theirs):,} tokens"
    if differing := [id_ for id_ in sorted(ours) if ours[id_] != theirs.get(id_)]:
        id_ = differing[0]
        return f"{len(differing):,} ids differ, the first is {id_}: {ours[id_]!r} and {theirs.get(id_)!r}"
    return "same tokens, but they split text differently"
