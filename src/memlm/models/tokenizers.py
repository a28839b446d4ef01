"""Text to token ids, and what makes two tokenizers the same: equal ids for equal text."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from memlm.errors import InputError, MemlmError, ModelError, TokenizerMismatchError, reason_of
from memlm.files import digest, near_here, read_json
from memlm.manifest import check_nothing_beside, check_payload, is_artifact, read_manifest
from memlm.models.fetching import PACKAGED
from memlm.models.loading import adapted_base, load_config, resolve
from memlm.text import in_runs

_PROBE = (
    "Hello, world!  Two  spaces\n\n\tand a tab. don't I'LL we've 1234567890 3.14 1,000 naïve Ünïcödé "
    "def f(x):\n    return x**2  # comment\nΑθήνα Москва 北京 東京 서울 القاهرة नमस्ते 🙂 http://a.b/c?d=e&f=%20"
)

PIECE = 1 << 18  # characters encoded at a time; a token takes a hundred bytes and more until its id is had

RENAMED = "\uffff"  # no character; what is put before special tokens that no text may spell

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
    loader: Any = AutoTokenizer
    if is_artifact(source):
        manifest = read_manifest(source)
        check_payload(source, manifest, "tokenizer")
        check_nothing_beside(source, manifest)
        if _is_plain(Path(source)):
            loader = PreTrainedTokenizerFast
    try:
        tokenizer = loader.from_pretrained(source, **{"trust_remote_code": False, **where})
    except Exception as error:  # tokenizers raises it bare
        if (base := adapted_base(source, **where)) is not None:
            return load_tokenizer(base, **where)
        hint = "" if Path(source).exists() else near_here(source, PACKAGED)
        raise ModelError(f"no tokenizer could be loaded from {source!r}{hint} ({reason_of(error)})") from None
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # made up from the model's config alone
        raise ModelError(f"no tokenizer could be loaded from {source!r} (no vocabulary is stored there)")
    return tokenizer


def _is_plain(folder: Path) -> bool:
    """Whether its tokenizer says that it is what its file holds, and no class of a family.

    For some types of models AutoTokenizer believes the type instead, and splits text as that family does.
    """
    path = folder / "tokenizer_config.json"
    told = read_json(path, limit=1 << 26) if path.is_file() else None
    return isinstance(told, dict) and told.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")


def find_tokenizer(model: str, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with a model (path, hub id or packaged name); None where it comes with none."""
    try:
        return load_tokenizer(resolve(model), **options)
    except ModelError:
        return None


def check_reads(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    there: Callable[[], Iterable[NDArray[np.int32]]],
    *,
    data: str,
    label: str,
) -> None:
    """Raise unless `model` can read token ids of `tokenizer`; reads configs only, no weights.

    Args:
        model: Path, hub id or packaged name. One without a tokenizer will do if its vocabulary is large enough.
        tokenizer: What made the token ids.
        vocab_size: The ids are below it.
        there: Gives the token ids themselves; asked where the model has fewer rows than the tokenizer has ids.
        data: What an error calls the folder of the token ids.
        label: What an error calls the model.

    Raises:
        TokenizerMismatchError: The model comes with another tokenizer.
        InputError: It has no row for a token that is there.
        ModelError: It cannot be reached.
    """
    size = load_config(model).get_text_config().vocab_size
    if (own := find_tokenizer(model)) is not None:
        check_same(tokenizer, own, data, label)
    if size < vocab_size:
        for ids in there():
            check_rows_for(ids, size, tokenizer, data=data, label=label)


def check_rows_for(
    ids: NDArray[np.int32], rows: int, tokenizer: PreTrainedTokenizerBase, *, data: str, label: str
) -> None:
    """Raise unless a model of so many rows has one for each of `ids`; the first token without is named.

    Raises:
        InputError: It has not.
    """
    if len(beyond := ids[ids >= rows]):
        token = tokenizer.convert_ids_to_tokens(int(beyond[0]))
        raise InputError(f"{data} has token {token!r} (id {beyond[0]}), outside the {rows} of {label}; leave it out")


@contextlib.contextmanager
def told(kind: type[MemlmError], problem: str, cure: str) -> Iterator[None]:
    """A line instead of what a tokenizer or its template raises in the block."""
    try:
        yield
    except BaseException as error:  # tokenizers' panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError | MemlmError):
            raise
        raise kind(f"{problem} ({type(error).__name__}: {reason_of(error)}); {cure}") from None


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash equal for tokenizers that give every text the same ids.

    It covers each (token, id) pair, added tokens included, and the ids of a probe text in several scripts, so two
    vocabularies with different merge rules differ too. Special-token roles (which id is EOS) are not part of it.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    with told(ModelError, f"tokenizer {tokenizer.name_or_path!r} fails on a plain text", "use another one"):
        probe = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return digest({"vocabulary": vocabulary, "probe": probe})


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the special tokens are spelled as, the longest first.

    One of a single character is left out: text that holds it could not be spelled otherwise.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = added | set(tokenizer.all_special_tokens)
    return sorted((text for text in found if len(text) > 1), key=lambda text: (-len(text), text))


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what `special_texts` gives."""
    return re.compile("|".join(map(re.escape, special_texts(tokenizer))) or r"(?!)")


def renamed_spelled(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what makes a text spell a special token as `without_special_tokens` renames it."""
    return re.compile(f"{RENAMED}(?={special_pattern(tokenizer).pattern})")


def spelled_note(where: str, spelled: Mapping[str, int], *, special_tokens: bool) -> str | None:
    """What is to be said of special tokens that a text spells, which are counted; None for none."""
    if not spelled:
        return None
    met = ", ".join(f"{text} {count:,} times" for text, count in list(spelled.items())[:5])
    kept = "are those tokens" if special_tokens else "are text like any; --special-tokens makes them tokens"
    return f"special tokens spelled in the {where} ({met}) {kept}"


class TextEncoder:
    """Texts to token ids, nothing put around them; memory does not grow with the length of a text beyond its ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool = False) -> None:
        """
        Args:
            tokenizer: Any.
            special_tokens: Whether a special token spelled in a text is that token; else it is text like any.
        """
        plain = None if special_tokens else without_special_tokens(tokenizer)
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        if not special_tokens and plain is None:
            options["split_special_tokens"] = True

        spelled = renamed_spelled(tokenizer)

        def encode(texts: list[str]) -> list[list[int]]:
            if plain is None:
                return tokenizer(texts, **options)["input_ids"]  # type: ignore[return-value]
            texts = [spelled.sub("", text) for text in texts]
            return [encoded.ids for encoded in plain.encode_batch_fast(texts, add_special_tokens=False)]

        self._encode = encode
        self._before: list[int] | None = None

    def __call__(self, texts: list[tuple[str, str]]) -> list[NDArray[np.int32]]:
        """The ids of each text.

        Args:
            texts: Each behind the name that an error gives it. One longer than `PIECE` characters is encoded in
                pieces, cut where a line or word ends.

        Raises:
            InputError: The tokenizer fails on one.
        """
        rows: list[list[NDArray[np.int32]]] = []
        pieces = ((name, text[a:b], a) for name, text in texts for a, b in itertools.pairwise(_cuts(text)))
        for batch in in_runs(pieces, lambda piece: piece[1], 4 * PIECE):
            for (_, piece, start), ids in zip(batch, self._ids(batch), strict=True):
                rows += [] if start else [[]]
                rows[-1].append(np.array(self._without_line_end(piece, ids) if start else ids, np.int32))
        return [np.concatenate(parts) for parts in rows]

    def _ids(self, batch: list[tuple[str, str, int]]) -> list[list[int]]:
        try:
            with told(InputError, f"{batch[0][0]}: the tokenizer fails on this text", "leave it out"):
                return self._encode([f"\n{piece}" if start else piece for _, piece, start in batch])
        except InputError:
            if len(batch) == 1:
                raise
        return [self._ids([piece])[0] for piece in batch]

    def _without_line_end(self, piece: str, ids: list[int]) -> list[int]:
        """The ids of a piece from within a text, which a line end stood before: else some tokenizers add a space."""
        if self._before is None:
            self._before = self._encode(["\n"])[0]
        length = len(self._before)
        return ids[length:] if ids[:length] == self._before else self._encode([piece])[0]


def _cuts(text: str) -> list[int]:
    """Where the pieces of a text begin and end: within a line or word only where one is longer than a piece."""
    cuts = [0]
    while len(text) - cuts[-1] > PIECE:
        start, end = cuts[-1], cuts[-1] + PIECE
        ends = re.compile(r"\n(?=\S)").finditer(text, start + 1, end)
        cut = max((match.end() for match in ends), default=text.rfind(" ", start + 1, end))
        cuts.append(cut if cut > start else end)
    return [*cuts, len(text)]


def without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The core of `tokenizer`, its special tokens renamed so that no text spells them; None where it has no core.

    `split_special_tokens` does not do where they stand in the vocabulary of the model too, as in Unigram and WordLevel.
    """
    if not isinstance(core := getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        return None
    try:
        settings = json.loads(core.to_str())
    except Exception:  # a part of it is written in Python
        return None
    names = {text: RENAMED + text for text in special_texts(tokenizer)}
    model = settings["model"]
    settings |= {"truncation": None, "padding": None, "post_processor": None}
    for token in settings["added_tokens"]:  # not left out, for ids are counted
        token["content"] = names.get(token["content"], token["content"])
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): id_ for text, id_ in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return Tokenizer.from_str(json.dumps(settings))


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
