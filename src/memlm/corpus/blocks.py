"""A finished corpus: its splits, their documents and blocks, and which position predicts which token."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator
from transformers import PreTrainedTokenizerBase

from memlm.corpus.config import SPLITS, CorpusConfig
from memlm.errors import ArtifactError, InputError
from memlm.files import load_array
from memlm.manifest import Facts, Manifest, check_payload, payload_file, read_manifest
from memlm.models.loading import check_reaches
from memlm.models.tokenizers import check_reads, load_tokenizer, vocabulary_size

_SOME = 1 << 24  # token ids looked at at a time
MAX_VOCABULARY = 1 << 24  # ten times what any tokenizer has; a manifest that says more is not believed
TOKENIZER = "tokenizer"
_TOKENIZER_FILES = (".json", ".jinja", ".txt", ".model")  # nothing that could be code or a pickle
IGNORE = -100  # transformers' mark for a token that is not predicted


@dataclass(frozen=True)
class Block:
    """A window of one split's tokens.

    A token is predicted in exactly one block, by the hidden state one place to its left.
    """

    input_ids: NDArray[np.int32]
    """`(T,)` tokens."""
    predicted: NDArray[np.bool_]
    """`(T,)` whether this block predicts the token at that place; never the first."""
    first_position: int
    """Position (entry id) of the first predicted token; the others follow it."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """`(T,)` the token where it is predicted here, `IGNORE` elsewhere."""
        return np.where(self.predicted, self.input_ids, IGNORE).astype(np.int64)

    @property
    def positions(self) -> slice:
        """Numbers of its positions."""
        return slice(self.first_position, self.first_position + int(self.predicted.sum()))

    @property
    def places(self) -> NDArray[np.int64]:
        """`(P,)` where hidden states predict: one place to the left of each predicted token."""
        return np.flatnonzero(self.predicted) - 1


class Blocks(Protocol):
    """Blocks of tokens with labels, such as a `Split`."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`(blocks,)` tokens in each block."""
        ...

    @property
    def position_starts(self) -> NDArray[np.int64]:
        """`(blocks + 1,)` the first position of each block, and the number of positions."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Block: ...


@dataclass(frozen=True, eq=False)
class Split:
    """The documents of one split as one memory-mapped run of tokens, cut into blocks.

    A document's first token is never predicted, for nothing stands before it; where documents start with BOS, that
    token is the BOS. Every other token is a position, numbered through the split.
    """

    tokens: NDArray[np.int32]
    """`(N,)` all documents, one after another."""
    offsets: NDArray[np.int64]
    """`(D + 1,)` where each document starts, and N."""
    block_size: int
    """Tokens per block at most."""
    step: int
    """Tokens newly predicted per further block of a long segment."""
    cross_documents: bool
    """Whether blocks are cut through document ends."""

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def n_positions(self) -> int:
        """Predicted tokens: all but the first of each document."""
        return self.n_tokens - self.n_documents

    def documents(self) -> Iterator[NDArray[np.int32]]:
        """The tokens of each document."""
        yield from (self._text(document) for document in range(self.n_documents))

    def folds(self, count: int) -> NDArray[np.int64]:
        """`(D,)` the fold that each document is in: `count` of about as many tokens, dealt by what documents say.

        Raises:
            InputError: There are fewer documents than folds.
        """
        if self.n_documents < count:
            raise InputError(f"{count} folds of {self.n_documents} training documents: each needs one at least")
        order = sorted(range(self.n_documents), key=lambda d: hashlib.sha256(self._text(d).tobytes()).digest())
        found, tokens = np.zeros(self.n_documents, np.int64), np.zeros(count, np.int64)
        for document in order:
            found[document] = fold = int(tokens.argmin())
            tokens[fold] += self.offsets[document + 1] - self.offsets[document]
        return found

    def only(self, wanted: NDArray[np.bool_]) -> "Split":
        """The documents that are wanted, `(D,)`, as a split of their own, in memory."""
        return self.cut_alike([self._text(int(document)) for document in np.flatnonzero(wanted)])

    def cut_alike(self, texts: Sequence[NDArray[np.int32]]) -> "Split":
        """Other documents as a split, in memory, that is cut into blocks as this one."""
        offsets = np.cumsum([0, *map(len, texts)])
        return Split(np.concatenate(texts), offsets, self.block_size, self.step, self.cross_documents)

    def _text(self, document: int) -> NDArray[np.int32]:
        return np.asarray(self.tokens[self.offsets[document] : self.offsets[document + 1]])

    @cached_property
    def _windows(self) -> NDArray[np.int64]:
        """`(blocks, 3)`: start, end, and first token that may be predicted."""
        edges = self.offsets[[0, -1]] if self.cross_documents else self.offsets
        starts, ends = edges[:-1], edges[1:]
        extra = np.maximum(0, ends - starts - self.block_size)
        counts = 1 + -(-extra // self.step)
        counts[ends - starts < 2] = 0
        segment = np.repeat(np.arange(len(starts)), counts)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        end = np.minimum(starts[segment] + self.block_size + number * self.step, ends[segment])
        start = np.where(number == 0, starts[segment], end - self.block_size)
        predict_from = np.where(number == 0, start + 1, starts[segment] + self.block_size + (number - 1) * self.step)
        return np.stack([start, end, predict_from], axis=1)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._windows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._windows[:, 1] - self._windows[:, 0]

    @property
    def position_starts(self) -> NDArray[np.int64]:
        return self._position_starts

    @cached_property
    def _position_starts(self) -> NDArray[np.int64]:
        predict_from = self._windows[:, 2]
        firsts = np.searchsorted(self.offsets[:-1], predict_from, side="left")  # document starts before that token
        return np.append(predict_from - firsts, self.n_positions)

    def __getitem__(self, index: int) -> Block:
        start, end, predict_from = self._windows[index]
        predicted = np.zeros(end - start, bool)
        predicted[predict_from - start :] = True
        if self.cross_documents:
            low, high = np.searchsorted(self.offsets, [start, end])
            predicted[self.offsets[low:high] - start] = False
        return Block(np.asarray(self.tokens[start:end]), predicted, int(self.position_starts[index]))

    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
        """Tokens that positions `start` to `stop` predict, in the order of positions."""
        return np.asarray(self.tokens[self.token_indices(start, stop)])

    def token_indices(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Where in `tokens` the labels of positions `start` to `stop` stand."""
        positions = np.arange(start, self.n_positions if stop is None else stop)
        return positions + self.documents_of(positions) + 1

    def documents_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The document that each position belongs to."""
        first_positions = self.offsets[:-1] - np.arange(self.n_documents)
        return np.searchsorted(first_positions, positions, side="right") - 1


class SplitFacts(Facts):
    """Size of one split."""

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    positions: int = Field(ge=0)


class WrittenFacts(Facts):
    """What teachers wrote of a corpus."""

    documents: int = Field(ge=0)


class CorpusFacts(Facts):
    """What readers of a corpus rely on."""

    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY)
    splits: dict[Literal["train", "validation", "test"], SplitFacts] = Field(min_length=len(SPLITS))
    written: WrittenFacts | None = None

    @field_validator("splits")
    @classmethod
    def _in_order(cls, splits: dict[str, SplitFacts]) -> dict[str, SplitFacts]:
        return {name: splits[name] for name in SPLITS}  # a manifest's keys are sorted

    @field_validator("written")
    @classmethod
    def _among_the_rest(cls, written: WrittenFacts | None, info: ValidationInfo) -> WrittenFacts | None:
        if written is not None and "splits" in info.data and written.documents > info.data["splits"]["train"].documents:
            raise ValueError("more documents than there are")
        return written


class Corpus:
    """A corpus folder, opened."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            ArtifactError: The folder is no complete corpus.
        """
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(folder, "corpus")
        self.facts = CorpusFacts.of(folder, self.manifest)
        self.config = CorpusConfig.parse(self.manifest.config, "corpus.")
        self._splits: dict[str, Split] = {}

    def __repr__(self) -> str:
        tokens = ", ".join(f"{split.tokens:,} {name}" for name, split in self.facts.splits.items())
        return f"Corpus({self.folder}: {tokens} tokens)"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return open_tokenizer(self.folder, self.manifest, self.vocab_size)

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer can give are below it."""
        return self.facts.vocab_size

    @property
    def n_written(self) -> int:
        """How many of the last training documents were written by teachers, as `memlm write` does."""
        return 0 if self.facts.written is None else self.facts.written.documents

    def check_read_by(self, model: str) -> None:
        """Raise, as `check_reads` does, unless `model` can read this corpus's token ids."""
        names = {"data": f"corpus {self.folder}", "label": f"model {model}"}
        check_reads(model, self.tokenizer, self.vocab_size, self.token_ids, **names)

    def token_ids(self) -> Iterator[NDArray[np.int32]]:
        """All its token ids, some at a time."""
        for tokens in (self.split(name).tokens for name in SPLITS):
            yield from (np.asarray(tokens[start : start + _SOME]) for start in range(0, len(tokens), _SOME))

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """`(vocab_size,)` how often each token is predicted in the training split."""
        return np.bincount(self.split("train").labels(), minlength=self.vocab_size)

    @property
    def longest_block(self) -> int:
        """Tokens of its longest block."""
        return max((int(self.split(name).lengths.max(initial=0)) for name in SPLITS), default=0)

    def check_fits(self, model: str) -> None:
        """Raise, as `check_reaches` does, unless `model` has positions for the longest block."""
        check_reaches(model, self.longest_block, data=f"corpus {self.folder}", label=f"model {model}")

    def split(self, name: str) -> Split:
        """One of `SPLITS`.

        Raises:
            ArtifactError: Its files do not fit together.
        """
        if name in self._splits:
            return self._splits[name]
        facts, config = self.facts.splits[name], self.config  # type: ignore[index]
        tokens = self._array(f"{name}.tokens.npy", np.int32, facts.tokens, mapped=True)
        offsets = self._array(f"{name}.offsets.npy", np.int64, facts.documents + 1)
        if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 1).any():
            raise ArtifactError(f"{self.folder}: {name}.offsets.npy does not fit {name}.tokens.npy; rebuild the corpus")
        if len(tokens) - facts.documents != facts.positions:
            raise ArtifactError(f"{self.folder}: {name} has {facts.positions} positions; rebuild the corpus")
        check_ids(tokens, self.vocab_size, self.folder / f"{name}.tokens.npy")
        split = Split(tokens, offsets, config.block_size, config.step, config.cross_documents)
        return self._splits.setdefault(name, split)

    def _array(self, name: str, dtype: type[np.generic], length: int, *, mapped: bool = False) -> NDArray:
        return load_array(payload_file(self.folder, self.manifest, name), dtype, (length,), mapped=mapped)

    def document_names(self, split: str) -> list[str]:
        """Where each document of a split came from.

        Raises:
            ArtifactError: There is not one name per document.
        """
        path = payload_file(self.folder, self.manifest, f"{split}.names.txt")
        names = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(names) != self.split(split).n_documents:
            raise ArtifactError(f"{path} has {len(names)} names, which is not one per document; rebuild the corpus")
        return names


def check_ids(ids: NDArray[np.int32], vocab_size: int, path: Path) -> None:
    """Raise unless all token ids are in `[0, vocab_size)`.

    Raises:
        ArtifactError: One is not; the message names `path` as its file.
    """
    for found in (int(ids.min()), int(ids.max())) if len(ids) else ():
        if not 0 <= found < vocab_size:
            raise ArtifactError(f"{path} has token id {found}, outside the vocabulary of {vocab_size}; rebuild it")


def open_tokenizer(folder: Path, manifest: Manifest, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer in the `tokenizer/` of a corpus or targets folder.

    Raises:
        ArtifactError: A file is damaged or no text, or the tokenizer gives other ids than the folder says.
    """
    names = {name for name in manifest.payload if name.startswith(f"{TOKENIZER}/")}
    paths = (path for path in (folder / TOKENIZER).rglob("[!.]*") if path.is_symlink() or not path.is_dir())
    there = {path.relative_to(folder).as_posix() for path in paths}
    if foreign := sorted(there - names) or [name for name in names if not name.endswith(_TOKENIZER_FILES)]:
        raise ArtifactError(f"{folder / foreign[0]} is not of a tokenizer's folder; delete it or get the folder anew")
    check_payload(folder, manifest, f"{TOKENIZER}/")
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    if (size := vocabulary_size(tokenizer)) != vocab_size:
        raise ArtifactError(f"{folder / TOKENIZER} has {size} token ids, its folder says {vocab_size}; rebuild it")
    return tokenizer


def length_batches(lengths: Sequence[int] | NDArray[np.int64], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Indices in batches of similar length, each at most `batch_tokens` after padding (or a single long one)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size
