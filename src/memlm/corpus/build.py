"""The corpus stage: documents to a folder of token splits."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from memlm.config import nearest, settings_from
from memlm.corpus.blocks import SPLITS
from memlm.corpus.config import CorpusConfig
from memlm.corpus.near_duplicates import OverlapFinder
from memlm.corpus.readers import Document, find_sources, read_documents, source_digest
from memlm.errors import ConfigError, InputError
from memlm.manifest import Manifest
from memlm.models.loading import resolve
from memlm.models.tokenizers import fingerprint, load_tokenizer, vocabulary_size
from memlm.progress import progress_bar
from memlm.stage import Plan, Stage, StageSpec, run_stage


def build_corpus(
    documents: list[str], *, tokenizer: str, out: str | Path, config: CorpusConfig | None = None, **settings: Any
) -> Manifest:
    """Tokenise documents and write `out` with a train, validation and test split.

    A document goes to a split by the hash of its text, so adding documents moves none. Exact repetitions of a document
    are kept once.

    Args:
        documents: Files, folders, dataset folders or dataset names (`name[:config[:split]]`).
        tokenizer: Path, hub id or packaged name of a tokenizer or model.
        out: Folder to write; a finished one with the same content is left alone.
        config: Default settings if None; or give them as keywords.

    Raises:
        InputError: Nothing usable is in the documents, or they cannot be read.
        ConfigError: The tokenizer lacks a token that the settings name.
    """
    config = settings_from(CorpusConfig, config, settings)
    return run_stage(out, *plan_corpus(documents, tokenizer=tokenizer, config=config))


def plan_corpus(
    documents: list[str], *, tokenizer: str, config: CorpusConfig | None = None, shard_characters: int = 4 << 20
) -> Plan:
    """What `build_corpus` with these arguments is to make, and the work; raises what it raises before any work.

    `shard_characters` are tokenised at a time, and done once if the stage is interrupted.
    """
    config = config or CorpusConfig()
    files = find_sources(documents)
    loaded = load_tokenizer(resolve(tokenizer))
    around = [special_id(loaded, getattr(config, role), role) for role in ("start_token", "end_token")]
    spec = StageSpec(
        "corpus",
        config=config.model_dump(),
        inputs={"documents": source_digest(files)},
        tokenizer=fingerprint(loaded),
        sources={"documents": "; ".join(documents), "tokenizer": tokenizer},
        intermediate=("raw",),
    )

    def work(stage: Stage) -> dict[str, Any]:
        shards = _shards(read_documents(files, config), shard_characters)
        _tokenize(stage, shards, loaded, around, config.seed)
        facts = _compile(stage, config)
        loaded.save_pretrained(stage.path / "tokenizer")
        return {**facts, "vocab_size": vocabulary_size(loaded)}

    return Plan(spec, work)


def special_id(tokenizer: PreTrainedTokenizerBase, setting: str, role: str) -> int | None:
    """The id that a `start_token` or `end_token` setting stands for; None for none.

    Args:
        setting: `auto`, `none`, `bos`, `eos`, or a token's text.
        role: `start_token` or `end_token`.

    Raises:
        ConfigError: The tokenizer has no such token.
    """
    if setting == "none":
        return None
    special: dict[str, Any] = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    if setting == "auto":
        if role == "end_token":
            return special["eos"]
        return special["bos"] if tokenizer("a")["input_ids"][:1] == [special["bos"]] else None
    if setting in special:
        if special[setting] is None:
            raise ConfigError(f"{role} = {setting!r}: the tokenizer has no {setting} token; use none or a token's text")
        return special[setting]
    vocabulary = tokenizer.get_vocab()
    if setting not in vocabulary:
        raise ConfigError(
            f"{role} = {setting!r} is no token of the tokenizer{nearest(setting, tokenizer.all_special_tokens)}"
        )
    return vocabulary[setting]


def _tokenize(
    stage: Stage,
    shards: Iterator[list[Document]],
    tokenizer: PreTrainedTokenizerBase,
    around: list[int | None],
    seed: int,
) -> None:
    """Write `raw/NNNNN.*`: tokens, lengths, hashes and names of some documents each; `around` are first and last id."""
    start, end = ([] if token is None else [token] for token in around)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with progress_bar(0, "tokenising") as bar:
        for number, shard in enumerate(shards):
            if stage.has(f"raw/{number:05d}.names.txt"):  # written last
                bar.update(len(np.load(stage.path / f"raw/{number:05d}.tokens.npy", mmap_mode="r")))
                continue
            encoded = tokenizer([d.text for d in shard], add_special_tokens=False, verbose=False)["input_ids"]
            rows = [np.array([*start, *ids, *end] if ids else [], np.int32) for ids in encoded]
            stage.save_array(f"raw/{number:05d}.tokens.npy", np.concatenate(rows))
            stage.save_array(f"raw/{number:05d}.lengths.npy", np.array([len(row) for row in rows], np.int64))
            hashes = np.array([document_hash(d.text, seed) for d in shard])
            stage.save_array(f"raw/{number:05d}.hashes.npy", hashes)
            stage.save_text(f"raw/{number:05d}.names.txt", "".join(" ".join(d.name.split()) + "\n" for d in shard))
            bar.update(sum(map(len, rows)))


def _shards(documents: Iterator[Document], characters: int) -> Iterator[list[Document]]:
    shard: list[Document] = []
    size = 0
    for document in documents:
        shard.append(document)
        size += len(document.text)
        if size >= characters:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def document_hash(text: str, seed: int) -> np.uint64:
    """64 bits that decide a document's split and its place in a limited split."""
    raw = hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(16, "little")
    ).digest()
    return np.uint64(int.from_bytes(raw, "little"))


class _Raw:
    """The tokenised documents of `raw/`, readable in any order."""

    def __init__(self, folder: Path) -> None:
        numbers = sorted(path.name.split(".")[0] for path in folder.glob("*.names.txt"))
        self._tokens = [np.load(folder / f"{n}.tokens.npy", mmap_mode="r") for n in numbers]
        lengths = [np.load(folder / f"{n}.lengths.npy") for n in numbers]
        self.lengths = np.concatenate([np.empty(0, np.int64), *lengths])
        self.hashes = np.concatenate([np.empty(0, np.uint64), *[np.load(folder / f"{n}.hashes.npy") for n in numbers]])
        self.names = list(
            itertools.chain.from_iterable((folder / f"{n}.names.txt").read_text("utf-8").splitlines() for n in numbers)
        )
        self._shard = np.repeat(np.arange(len(numbers)), [len(x) for x in lengths])
        self._offset = np.concatenate([np.empty(0, np.int64), *[np.cumsum(x) - x for x in lengths]])

    def tokens(self, document: int) -> NDArray[np.int32]:
        offset = self._offset[document]
        return np.asarray(self._tokens[self._shard[document]][offset : offset + self.lengths[document]])


def _compile(stage: Stage, config: CorpusConfig) -> dict:
    """Choose each split's documents and write them."""
    raw = _Raw(stage.path / "raw")
    usable = raw.lengths >= 2
    _, distinct = np.unique(raw.hashes, return_index=True)  # the first of each text, in the order of hashes
    share = raw.hashes / 2.0**64
    bounds = (config.validation_fraction, config.validation_fraction + config.test_fraction)
    split_of = np.where(share < bounds[0], 1, np.where(share < bounds[1], 2, 0))
    facts: dict = {
        "documents_read": len(raw.lengths),
        "documents_too_short": int((~usable).sum()),
        "documents_repeated": int(usable.sum() - usable[distinct].sum()),
        "documents_near_duplicate": 0,
        "splits": {},
    }
    chosen: dict[str, list[tuple[int, int]]] = {}
    for number, split in enumerate(SPLITS):
        candidates = [d for d in distinct if split_of[d] == number and usable[d]]
        if config.near_duplicate_ngram and split != "train":
            candidates, dropped = _drop_near_duplicates(raw, candidates, chosen, config)
            facts["documents_near_duplicate"] += dropped
        chosen[split] = _within_budget(raw, candidates, config.budget(split))
        if split == "train" and not chosen[split]:
            read = f"{len(raw.lengths):,} documents were read"
            raise InputError(f"the corpus is empty: {read}, none of two tokens is left for training")
        tokens, documents = _write_split(stage, raw, split, chosen[split])
        facts["splits"][split] = {"documents": documents, "tokens": tokens, "positions": tokens - documents}
    return facts


def _drop_near_duplicates(
    raw: _Raw, candidates: list[int], chosen: dict[str, list[tuple[int, int]]], config: CorpusConfig
) -> tuple[list[int], int]:
    finder = OverlapFinder([raw.tokens(d) for d in candidates], config.near_duplicate_ngram)
    for document, length in itertools.chain.from_iterable(chosen.values()):
        finder.scan(raw.tokens(document)[:length])
    keep = finder.overlaps() <= config.near_duplicate_overlap
    return [d for d, kept in zip(candidates, keep, strict=True) if kept], int((~keep).sum())


def _within_budget(raw: _Raw, candidates: list[int], budget: int | None) -> list[tuple[int, int]]:
    """(document, tokens kept) in the order of reading; the last by hash is cut to fit."""
    kept = []
    left = budget if budget is not None else int(raw.lengths.sum())
    for document in candidates:
        length = min(int(raw.lengths[document]), left)
        if length < 2:
            break
        kept.append((int(document), length))
        left -= length
    return sorted(kept)


def _write_split(stage: Stage, raw: _Raw, split: str, documents: list[tuple[int, int]]) -> tuple[int, int]:
    offsets = np.cumsum([0, *[length for _, length in documents]]).astype(np.int64)
    if not stage.has(f"{split}.tokens.npy"):
        kept = (raw.tokens(document)[:length] for document, length in documents)
        save_tokens(stage, f"{split}.tokens.npy", int(offsets[-1]), kept)
    if not stage.has(f"{split}.offsets.npy"):
        stage.save_array(f"{split}.offsets.npy", offsets)
    if not stage.has(f"{split}.names.txt"):
        stage.save_text(f"{split}.names.txt", "".join(raw.names[document] + "\n" for document, _ in documents))
    return int(offsets[-1]), len(documents)


def save_tokens(stage: Stage, name: str, count: int, parts: Iterable[NDArray[np.int32]]) -> None:
    """Write `count` token ids as one `.npy` file, part by part, so that memory does not grow with their number."""
    with stage.writing(name) as temporary, temporary.open("wb") as file:
        header = {"descr": "<i4", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.astype("<i4").tobytes())
