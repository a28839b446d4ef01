"""Which tokens of one vocabulary stand for a token of another: the same one, its role, or the pieces it falls into."""

import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from memlm.models.tokenizers import vocabulary_size

_ROLES = ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id")  # where one token has several, the first
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # as GPT-2's vocabulary writes them


@dataclass(frozen=True)
class Alignment:
    """Each token of a new vocabulary as tokens of an old one."""

    pieces: list[list[int]]
    """Old ids by new id: one for the same token, several for a token that falls apart, none if nothing is known."""
    counts: dict[str, int]
    """New tokens by how they were found: `shared`, `role`, `pieces`, `bytes`, `unknown`. Their sum is all."""


def align_vocabularies(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, *, old_rows: int) -> Alignment:
    """Every token of `new` as tokens of `old`.

    Tokens are compared by the bytes they stand for, so byte-level and sentencepiece vocabularies meet. A special token
    is matched by its role (EOS, BOS, padding, unknown), else by its text. Any other token that `old` lacks is split by
    `old`; where it is no whole UTF-8 text, into its bytes.

    Args:
        old_rows: Ids of `old` from here on have no row, and are taken as unknown.
    """
    ours, theirs = _Vocabulary(old, old_rows), _Vocabulary(new, vocabulary_size(new))
    pieces: list[list[int]] = [[] for _ in range(vocabulary_size(new))]
    how = ["unknown"] * len(pieces)
    for id_, text in theirs.special.items():
        role = _same_role(id_, old, new)
        found = role if role is not None else ours.ids.get(text)
        if found is not None and found in ours.special:
            pieces[id_], how[id_] = [found], "shared" if role is None else "role"
    missing: list[int] = []
    for id_, content in theirs.content.items():
        found = ours.find(theirs.texts[id_], content)
        if found is None:
            missing.append(id_)
        else:
            pieces[id_], how[id_] = [found], "shared"
    readable = {id_: text for id_ in missing if (text := _as_text(theirs.content[id_])) is not None}
    for id_, split in zip(readable, _split(old, list(readable.values())), strict=True):
        pieces[id_] = [piece for piece in split if piece in ours.content]
        how[id_] = "pieces"
    for id_ in missing:
        if not pieces[id_]:
            single = (ours.by_content.get(bytes([byte])) for byte in theirs.content[id_])
            pieces[id_] = [piece for piece in single if piece is not None]
            how[id_] = "bytes" if pieces[id_] else "unknown"
    names = ("shared", "role", "pieces", "bytes", "unknown")
    return Alignment(pieces, {name: how.count(name) for name in names})


class _Vocabulary:
    """A tokenizer's tokens below `rows`: special ones by text, the others by the bytes they stand for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        added = tokenizer.added_tokens_decoder
        special = {id_ for id_, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        byte_level = tokenizer.convert_tokens_to_string(["a", "Ġ"]) == "a "
        self.texts = {id_: text for text, id_ in tokenizer.get_vocab().items() if id_ < rows}
        self.special = {id_: text for id_, text in self.texts.items() if id_ in special}
        self.content = {
            id_: _content(text, byte_level=byte_level, added=id_ in added)
            for id_, text in sorted(self.texts.items())
            if id_ not in special
        }
        self.ids = {text: id_ for id_, text in self.texts.items()}
        # 'A' may be there as <0x41> too; the token that texts are really split into wins, then the lowest id
        ranked = sorted(self.content, key=lambda id_: (bool(_BYTE_TOKEN.fullmatch(self.texts[id_])), id_), reverse=True)
        self.by_content = {self.content[id_]: id_ for id_ in ranked}

    def find(self, text: str, content: bytes) -> int | None:
        """The ordinary token that stands for `content`; the one spelt `text` where several do."""
        id_ = self.ids.get(text)
        return id_ if id_ is not None and self.content.get(id_) == content else self.by_content.get(content)


def _content(text: str, *, byte_level: bool, added: bool) -> bytes:
    """The bytes that a token stands for.

    Args:
        text: The token as its vocabulary spells it.
        byte_level: Whether the vocabulary writes a character for each byte (GPT-2); else ▁ is a space and `<0x0A>` a
            byte (sentencepiece).
        added: Whether it was added to the vocabulary, and so is spelt as it stands in texts.
    """
    if not byte_level:
        byte = _BYTE_TOKEN.fullmatch(text)
        return bytes.fromhex(byte[1]) if byte else text.replace("▁", " ").encode()
    if added or not all(character in _BYTES for character in text):
        return text.encode()
    return bytes(_BYTES[character] for character in text)


def _same_role(id_: int, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> int | None:
    return next(
        (found for role in _ROLES if getattr(new, role) == id_ and (found := getattr(old, role)) is not None), None
    )


def _as_text(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _split(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text as it stands within a longer one: no special tokens, no space put in front."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(core, Tokenizer):
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    settings = json.loads(core.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        [settings[part]] = _without_prefix([settings[part]]) or [None]
    bare = Tokenizer.from_str(json.dumps(settings))
    bare.no_truncation()
    bare.no_padding()
    return [encoding.ids for encoding in bare.encode_batch(texts, add_special_tokens=False)]


def _without_prefix(part: Any) -> Any:
    """Settings of a normalizer or pre-tokenizer, less what puts a space in front of a text."""
    if isinstance(part, list):
        return [_without_prefix(p) for p in part if not (isinstance(p, dict) and p.get("type") == "Prepend")]
    if isinstance(part, dict):
        off = {"add_prefix_space": False, "prepend_scheme": "never"}
        return {key: off.get(key, _without_prefix(value)) for key, value in part.items()}
    return part
