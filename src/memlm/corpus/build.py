"""The corpus stage: documents to a folder of token splits."""

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from memlm.config import nearest, settings_from
from memlm.corpus.blocks import CorpusFacts
from memlm.corpus.config import SPLITS, CorpusConfig
from memlm.corpus.near_duplicates import overlaps
from memlm.corpus.readers import Document, Met, find_sources, listed, read_documents, source_digest
from memlm.errors import ConfigError, InputError
from memlm.files import read_json
from memlm.manifest import Facts, Manifest
from memlm.models.loading import resolve
from memlm.models.tokenizers import (
    TextEncoder,
    fingerprint,
    load_tokenizer,
    special_pattern,
    spelled_note,
    vocabulary_size,
)
from memlm.progress import progress_bar
from memlm.stage import Plan, Stage, StageSpec, run_stage
from memlm.text import in_runs

_NAMED = 10  # skipped files that a manifest names
_BACKSLASHED = r"\\\1"
_INPUTS = {"train": "documents", "validation": "validation_documents", "test": "test_documents"}


def build_corpus(
    documents: str | Path | Iterable[str | Path],
    *,
    tokenizer: str,
    out: str | Path,
    validation_documents: str | Path | Iterable[str | Path] | None = None,
    test_documents: str | Path | Iterable[str | Path] | None = None,
    config: CorpusConfig | None = None,
    **settings: Any,
) -> Manifest:
    """Tokenise documents and write `out` with a train, validation and test split.

    A document goes to a split by the hash of its text, so adding documents moves none. Exact repetitions of a document
    are kept once.

    Args:
        documents: A file, folder, dataset folder or dataset name (`name[:config[:split]]`), or several.
        tokenizer: Path, hub id or packaged name of a tokenizer or model.
        out: Folder to write; a finished one with the same content is left alone.
        validation_documents, test_documents: Where that split is given; none of `documents` goes to it then.
        config: Default settings if None; or give them as keywords.

    Raises:
        InputError: Nothing usable is in the documents, they cannot be read, or a given split shares some with another.
        ConfigError: The tokenizer lacks a token that the settings name.
    """
    config = settings_from(CorpusConfig, config, settings)
    given = {"validation": listed(validation_documents), "test": listed(test_documents)}
    return run_stage(out, *plan_corpus(listed(documents), tokenizer=tokenizer, given=given, config=config))


def plan_corpus(
    documents: list[str],
    *,
    tokenizer: str,
    given: Mapping[str, list[str]] | None = None,
    config: CorpusConfig | None = None,
    shard_characters: int = 4 << 20,
) -> Plan:
    """What `build_corpus` with these arguments is to make, and the work; raises what it raises before any work.

    `given` are the documents of held-out splits, where they are not taken from the others; `shard_characters` are
    tokenised at a time, and done once if the stage is interrupted.
    """
    config = config or CorpusConfig()
    places = {"train": documents, **{split: found for split, found in (given or {}).items() if found}}
    searched = Met()
    files = {split: find_sources(found, searched) for split, found in places.items()}
    loaded = load_tokenizer(resolve(tokenizer))
    tokenizer_id = fingerprint(loaded)
    around = [special_id(loaded, getattr(config, role), role) for role in ("start_token", "end_token")]
    spec = StageSpec(
        "corpus",
        config=config.deciding,
        inputs={_INPUTS[split]: source_digest(found) for split, found in files.items()},
        tokenizer=tokenizer_id,
        sources={**{_INPUTS[split]: "; ".join(found) for split, found in places.items()}, "tokenizer": tokenizer},
        intermediate=("raw",),
    )

    def work(stage: Stage) -> dict[str, Any]:
        met = Met(searched.found, [*searched.skipped])  # a copy: a plan may be worked out again
        shards = (
            (split, shard)
            for split, found in files.items()
            for shard in in_runs(read_documents(found, config, met), lambda document: document.text, shard_characters)
        )
        try:
            _tokenize(stage, shards, loaded, around, config)
            facts = _compile(stage, config, met, [*files][1:])
        except InputError:  # other settings or documents are needed, which what is there would be in the way of
            stage.remove("raw")
            raise
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
    shards: Iterator[tuple[str, list[Document]]],
    tokenizer: PreTrainedTokenizerBase,
    around: list[int | None],
    config: CorpusConfig,
) -> None:
    """Write `raw/NNNNN.*`: tokens, lengths, hashes and names of some documents each, and the number of the split that
    they are given for, if it is a held-out one; `around` are first and last id."""
    start, end = around
    special = special_pattern(tokenizer)
    encode = TextEncoder(tokenizer, special_tokens=config.special_tokens)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with progress_bar(0, "tokenising") as bar:
        for number, (split, shard) in enumerate(shards):
            if stage.has(f"raw/{number:05d}.names.txt"):  # written last
                bar.update(len(np.load(stage.path / f"raw/{number:05d}.tokens.npy", mmap_mode="r")))
                continue
            rows = [_enclosed(ids, start, end, config) for ids in encode([(d.name, d.text) for d in shard])]
            stage.save_array(f"raw/{number:05d}.tokens.npy", np.concatenate(rows))
            stage.save_array(f"raw/{number:05d}.lengths.npy", np.array([len(row) for row in rows], np.int64))
            hashes = np.array([document_hash(d.text, config.seed) for d in shard])
            stage.save_array(f"raw/{number:05d}.hashes.npy", hashes)
            stage.save_array(f"raw/{number:05d}.given.npy", np.full(len(shard), SPLITS.index(split), np.int8))
            met = Counter(match.group() for d in shard for match in special.finditer(d.text))
            stage.save_text(f"raw/{number:05d}.special.json", json.dumps(met))
            stage.save_text(f"raw/{number:05d}.names.txt", "".join(" ".join(d.name.split()) + "\n" for d in shard))
            bar.update(sum(map(len, rows)))


def _enclosed(ids: NDArray[np.int32], start: int | None, end: int | None, config: CorpusConfig) -> NDArray[np.int32]:
    """A document's ids between the tokens asked for; one that its text spells already is not put there twice."""
    if not len(ids):
        return ids
    first = [] if start is None or (config.special_tokens and ids[0] == start) else [start]
    last = [] if end is None or (config.special_tokens and ids[-1] == end) else [end]
    return np.concatenate([first, ids, last]).astype(np.int32)


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

        def joined(kind: str, dtype: type[np.generic]) -> NDArray[Any]:
            return np.concatenate([np.empty(0, dtype), *(np.load(folder / f"{n}.{kind}.npy") for n in numbers)])

        self.lengths, self.hashes = joined("lengths", np.int64), joined("hashes", np.uint64)
        self.given = joined("given", np.int8)
        """The number of the held-out split that each was given for; 0: none."""
        self.names = list(
            itertools.chain.from_iterable((folder / f"{n}.names.txt").read_text("utf-8").splitlines() for n in numbers)
        )
        special = sum((Counter(read_json(folder / f"{n}.special.json")) for n in numbers), Counter())
        self.special = dict(sorted(special.items()))
        self._ends = self.lengths.cumsum()
        self._starts = np.cumsum([0, *map(len, self._tokens)])

    def tokens(self, part: "_Part") -> NDArray[np.int32]:
        first = self._ends[part.document] - self.lengths[part.document]
        shard = np.searchsorted(self._starts, first, side="right") - 1
        first += part.start - self._starts[shard]
        return np.asarray(self._tokens[shard][first : first + part.stop - part.start])


class _Part(NamedTuple):
    """A run of one document's tokens: the whole, where nothing is cut from it."""

    document: int
    start: int
    stop: int


class ReadingFacts(Facts):
    """What a corpus's manifest says of the documents; a folder of an earlier version says less."""

    documents_read: int = 0
    documents_empty: int = 0
    documents_too_short: int = 0
    documents_repeated: int = 0
    documents_near_duplicate: int = 0
    documents_shared: int = 0
    files_skipped: int = 0
    files_skipped_first: list[str] = Field(default_factory=list)
    text_files: int | None = None
    separators_found: int | None = None
    special_tokens_spelled: dict[str, int] = Field(default_factory=dict)
    held_out_inside_documents: list[Literal["train", "validation", "test"]] = Field(default_factory=list)


def _compile(stage: Stage, config: CorpusConfig, met: Met, given: list[str]) -> dict:
    """Choose each split's documents and write them; `given` are the splits that have documents of their own.

    Returns:
        What the manifest is to say of the reading and of the splits.
    """
    raw = _Raw(stage.path / "raw")
    usable = raw.lengths >= 2
    config = config.model_copy(update={f"{split}_fraction": 0.0 for split in given})
    share = raw.hashes / 2.0**64
    bounds = (config.validation_fraction, config.validation_fraction + config.test_fraction)
    split_of = np.where(share < bounds[0], 1, np.where(share < bounds[1], 2, 0))
    split_of = np.where(raw.given > 0, raw.given, split_of)
    wanted = usable & ~_shared(raw, usable, split_of, config)
    parts = {}
    for number, split in enumerate(SPLITS):
        here = np.flatnonzero(wanted & (split_of == number))
        _, first = np.unique(raw.hashes[here], return_index=True)  # the first of each text, in the order of hashes
        parts[split] = [_Part(int(d), 0, int(raw.lengths[d])) for d in here[first]]
    facts: dict = {
        "files_skipped": len(met.skipped),
        "files_skipped_first": met.skipped[:_NAMED],
        "documents_empty": met.empty,
        "text_files": met.text_files,
        "separators_found": met.separators if met.text_files and config.document_separator else None,
        "documents_read": len(raw.lengths),
        "documents_too_short": int((~usable).sum()),
        "documents_repeated": int(wanted.sum()) - sum(map(len, parts.values())),
        "documents_near_duplicate": 0,
        **({"documents_shared": int(usable.sum() - wanted.sum())} if given else {}),
        "special_tokens_spelled": raw.special,
        "held_out_inside_documents": _hold_out_inside(parts, config, given),
        "splits": {},
    }
    chosen: dict[str, list[_Part]] = {}
    for split in SPLITS:
        candidates = parts[split]
        if config.near_duplicate_ngram and split != "train":
            candidates, dropped = _drop_near_duplicates(raw, candidates, chosen, config)
            facts["documents_near_duplicate"] += dropped
        chosen[split] = _within_budget(candidates, config.budget(split))
        if split == "train" and not chosen[split]:
            read = f"{len(raw.lengths):,} documents were read"
            skipped = _skipped_line(len(met.skipped), met.skipped[:_NAMED], "; ")
            raise InputError(f"the corpus is empty: {read}, none of two tokens is left for training{skipped}")
        tokens, documents = _write_split(stage, raw, split, chosen[split])
        facts["splits"][split] = {"documents": documents, "tokens": tokens, "positions": tokens - documents}
    return facts


def _shared(
    raw: _Raw, usable: NDArray[np.bool_], split_of: NDArray[np.int_], config: CorpusConfig
) -> NDArray[np.bool_]:
    """Which documents are left out because they stand in a split before theirs too, one of the two being given.

    Raises:
        InputError: There are some, and the settings do not say what to do with them.
    """
    left_out, seen = np.zeros(len(usable), bool), np.empty(0, np.uint64)
    for number, split in enumerate(SPLITS):
        here = usable & (split_of == number)
        again = here & np.isin(raw.hashes, seen)  # equal texts are dealt to one split, so one of them was given
        if again.any() and config.shared_documents == "refuse":
            first = ", ".join(raw.names[document] for document in np.flatnonzero(again)[:3])
            raise InputError(
                f"{int(again.sum()):,} of {int(here.sum()):,} documents of the {split} split stand in another split too"
                f" ({first}{', …' if again.sum() > 3 else ''}): what a model has read says little about it; leave them"
                " out with shared_documents drop, or keep them with keep"
            )
        left_out |= again & (config.shared_documents == "drop")
        seen = np.union1d(seen, raw.hashes[here])
    return left_out


def _hold_out_inside(parts: dict[str, list[_Part]], config: CorpusConfig, given: list[str]) -> list[str]:
    """Fill splits that got no document, though asked for, from the ends of the training documents.

    Where no document is left for training, all of them are, and every split that is asked for is cut from them; but
    those of the splits that are `given` stay there.

    Returns:
        The splits so filled.
    """
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}  # the test split comes last
    if not parts["train"]:
        dealt = [split for split in SPLITS if split not in given]
        parts.update({"train": [part for split in dealt for part in parts[split]]} | {s: [] for s in dealt[1:]})
    empty = [split for split, fraction in fractions.items() if fraction and not parts[split]]
    whole = {part.document: part.stop for part in parts["train"]}
    for split in empty:
        left = []
        for document, start, stop in parts["train"]:
            held = max(2, round(whole[document] * fractions[split]))
            if stop - held < 2 * len(empty):
                held = 0  # too short to give any
            else:
                parts[split].append(_Part(document, stop - held, stop))
            left.append(_Part(document, start, stop - held))
        parts["train"] = left
    return [split for split in SPLITS if split in empty and parts[split]]


def _skipped_line(count: int, first: list[str], before: str = "") -> str:
    """Which files of folders were not read; nothing where all were."""
    more = ", …" if count > len(first) else ""
    return f"{before}files that memlm does not read: {count:,} ({', '.join(first)}{more})" if count else ""


def corpus_notes(manifest: Manifest) -> list[str]:
    """What the user of a new corpus should know, a line each; of a manifest that `build_corpus` gave."""
    config, lines = CorpusConfig.parse(manifest.config, "corpus."), []
    sizes, facts = CorpusFacts.of("corpus", manifest).splits, ReadingFacts.of("corpus", manifest)
    if skipped := _skipped_line(facts.files_skipped, facts.files_skipped_first):
        lines.append(skipped)
    if separator := config.document_separator:
        if re.fullmatch("[nrt]+", separator):
            lines.append(
                f"documents were cut at the letters {separator!r}: a shell takes backslashes away that no quotes guard;"
                f" for line ends write --document-separator '{re.sub('(.)', _BACKSLASHED, separator)}'"
            )
        elif facts.separators_found == 0 and not facts.held_out_inside_documents:
            lines.append(
                f"the separator {separator!r} is in none of the text files, so that each is one document; give the one"
                " that stands between documents (--document-separator)"
            )
    if spelled := spelled_note("documents", facts.special_tokens_spelled, special_tokens=config.special_tokens):
        lines.append(spelled)
    if inside := facts.held_out_inside_documents:
        shares = ", ".join(f"{name} {getattr(config, f'{name}_fraction'):.0%}" for name in inside)
        lines.append(
            f"too few documents to hold any out whole: the last part of each training document is held out instead"
            f" ({shares}); {_more_documents(config, facts)}"
        )
    if facts.documents_shared:
        lines.append(
            f"left out of the held-out splits, for they stand in another: {facts.documents_shared:,} documents"
        )
    for name in ("validation", "test"):
        if getattr(config, f"{name}_fraction") and not sizes[name].positions:
            lines.append(
                f"the {name} split is empty: later stages need its tokens; {_more_documents(config, facts)},"
                f" or a larger --{name}-fraction"
            )
    return lines


def _more_documents(config: CorpusConfig, facts: ReadingFacts) -> str:
    if facts.text_files == 0:  # which a separator would cut
        return "give more documents"
    if config.document_separator is None:
        return "give more documents, or name what stands between them in a file: --document-separator '\\n\\n'"
    nowhere = ", which is in none of the text files" if facts.separators_found == 0 else ""
    return f"give more documents, or another --document-separator than {config.document_separator!r}{nowhere}"


def _drop_near_duplicates(
    raw: _Raw, candidates: list[_Part], chosen: dict[str, list[_Part]], config: CorpusConfig
) -> tuple[list[_Part], int]:
    others = map(raw.tokens, itertools.chain.from_iterable(chosen.values()))
    shares = overlaps([raw.tokens(part) for part in candidates], others, config.near_duplicate_ngram)
    keep = shares <= config.near_duplicate_overlap
    return [part for part, kept in zip(candidates, keep, strict=True) if kept], int((~keep).sum())


def _within_budget(candidates: list[_Part], budget: int | None) -> list[_Part]:
    """What is kept, in the order of reading; the last by hash is cut to fit."""
    kept = []
    left = budget if budget is not None else sum(part.stop - part.start for part in candidates)
    for part in candidates:
        length = min(part.stop - part.start, left)
        if length < 2:
            break
        kept.append(part._replace(stop=part.start + length))
        left -= length
    return sorted(kept)


def _write_split(stage: Stage, raw: _Raw, split: str, parts: list[_Part]) -> tuple[int, int]:
    offsets = np.cumsum([0, *[part.stop - part.start for part in parts]]).astype(np.int64)
    if not stage.has(f"{split}.tokens.npy"):
        save_tokens(stage, f"{split}.tokens.npy", int(offsets[-1]), map(raw.tokens, parts))
    if not stage.has(f"{split}.offsets.npy"):
        stage.save_array(f"{split}.offsets.npy", offsets)
    if not stage.has(f"{split}.names.txt"):
        stage.save_text(f"{split}.names.txt", "".join(raw.names[part.document] + "\n" for part in parts))
    return int(offsets[-1]), len(parts)


def save_tokens(stage: Stage, name: str, count: int, parts: Iterable[NDArray[np.int32]]) -> None:
    """Write `count` token ids as one `.npy` file, part by part, so that memory does not grow with their number."""
    with stage.writing(name) as temporary, temporary.open("wb") as file:
        header = {"descr": "<i4", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.astype("<i4").tobytes())
