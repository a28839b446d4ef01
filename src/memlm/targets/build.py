"""The targets stage: a datastore to rows of blocks with a sparse distribution per position."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from memlm.config import settings_from
from memlm.corpus.blocks import Corpus
from memlm.datastore.build import load_teacher, read_keys, shard_blocks
from memlm.datastore.index import widen
from memlm.datastore.store import Datastore
from memlm.errors import ConfigError, InputError
from memlm.files import file_digest, read_json, write_json
from memlm.manifest import Manifest, read_manifest
from memlm.models.taps import TapReader
from memlm.parts import KEEP_SECONDS, Due, Part
from memlm.progress import progress_bar
from memlm.stage import Plan, Stage, StageSpec, run_stage, writing_behind
from memlm.targets.config import IMPORTED, TargetsConfig
from memlm.targets.folder import shard_name, write_rest, write_shard
from memlm.targets.speakers import Speakers, check_folds, loaders
from memlm.targets.teacher import Judged, judge, mixed_targets
from memlm.targets.votes import SparseProbs, retrieve
from memlm.targets.words import plan_words

_CHOSEN = "chosen.json"


def build_targets(
    source: str | Path,
    *,
    out: str | Path,
    teacher: str | None = None,
    fold_teachers: Sequence[str | Path] = (),
    config: TargetsConfig | None = None,
    **settings: Any,
) -> Manifest:
    """Write a sparse distribution for every training position to `out`: neighbours' votes, a teacher's words, or both.

    A row of `train-NNNNN.arrow` is one block: `input_ids`; `target_counts`, the support of each token's distribution
    (0 where the block does not predict the token); `target_ids` and `target_probs`, the distributions one after
    another. `validation.arrow` holds the validation blocks with `labels`. `datasets` loads both.

    Args:
        source: Folder of the datastore stage, every position of which is searched; or of the corpus stage, which has
            no neighbours: the targets are then what `teacher` says, or `fold_teachers`.
        out: Folder to write; resumed where an earlier run stopped.
        teacher: Of a corpus, any causal LM with its tokenizer. Of a datastore, where its teacher is by now, which
            makes its queries where it kept no keys.
        fold_teachers: Folders of models that were trained with `left_out`, one for each fold: the teacher's share is
            theirs then, each speaking of the documents that it has not read. Where teachers wrote some of a corpus,
            those of the corpus before that, and `teacher` speaks of what was written.
        config: Default settings if None; or give them as keywords.

    Raises:
        ConfigError: k is larger than the datastore allows, teachers of folds do not fit together or have no share, or
            a corpus has no teacher, or settings of neighbours.
        ArtifactError: The datastore kept no keys, or the teacher is to judge or has a share, and it is no longer the
            one that made the datastore; or a teacher of a fold was trained on another corpus.
        InputError: Documents cross blocks, so that a teacher would have read some of what it is to speak of.
        ModelError: Its teacher is needed and cannot be reached, or gives scores that are no numbers.
        TokenizerMismatchError: The teacher of a corpus has another tokenizer.
    """
    config = settings_from(TargetsConfig, config, settings)
    return run_stage(out, *plan_targets(source, teacher=teacher, fold_teachers=fold_teachers, config=config))


def plan_targets(
    source: str | Path,
    *,
    teacher: str | None = None,
    fold_teachers: Sequence[str | Path] = (),
    config: TargetsConfig | None = None,
    positions_at_once: int = 4096,
    keep_seconds: float = KEEP_SECONDS,
) -> Plan:
    """What `build_targets` with these arguments is to make, and the work; raises what it raises before any work.

    `positions_at_once` decides speed and memory of the search, not what it finds. What was found for a shard is kept
    every `keep_seconds`.
    """
    config = config or TargetsConfig()
    if read_manifest(source, "datastore", "corpus").kind == "corpus":
        return plan_words(source, teacher=teacher, fold_teachers=fold_teachers, config=config)
    store = Datastore(source, teacher=teacher)
    folds = check_folds(store.corpus, store.manifest.inputs["corpus"], fold_teachers)
    config = config.with_folds(len(folds))
    if folds and config.teacher_share in (0, "auto"):
        raise ConfigError("teachers of folds speak with a share that is given: set teacher_share, such as 1")
    if "dtype" in config.model_fields_set:
        raise ConfigError("dtype is for the teachers of a corpus; those of a datastore compute as its keys were made")
    if config.k > store.n_entries - 1:
        raise ConfigError(
            f"k = {config.k} is larger than the {store.n_entries - 1} other entries of datastore {source}; lower --k"
        )
    if not store.config.keep_keys or config.chooses or config.teacher_share != 0:
        store.check_teacher()
    spec = StageSpec(
        "targets",
        config=config.model_dump(),
        inputs={"datastore": store.manifest.hash, **{name: read_manifest(f).hash for name, f in folds.items()}},
        tokenizer=store.manifest.tokenizer,
        sources={**store.manifest.sources, "datastore": str(source), **{n: str(f) for n, f in folds.items()}},
        intermediate=(_CHOSEN,),
    )
    of_folds = list(folds.values())
    return Plan(spec, lambda stage: _search(stage, store, of_folds, config, positions_at_once, Due(keep_seconds)))


def _search(
    stage: Stage, store: Datastore, folds: Sequence[Path], config: TargetsConfig, positions_at_once: int, due: Due
) -> dict[str, Any]:
    """Write the targets of all positions, and return the facts."""
    split = store.corpus.split("train")
    shards = shard_blocks(split.position_starts, store.config.shard_positions)
    bounds = {i: split.position_starts[list(s)].tolist() for i, s in enumerate(shards) if not stage.has(shard_name(i))}
    done = split.n_positions - sum(stop - start for start, stop in bounds.values())
    teacher = cache(lambda: load_teacher(store.teacher, store.read_as)[0])
    reader = cache(lambda: TapReader(teacher(), store.facts.tap))
    speakers = Speakers(store.corpus, loaders(folds, store.read_as.dtype) if folds else [teacher], len(folds))
    chosen = _chosen(stage, store, config, teacher)
    share = chosen["teacher_share"]
    votes_settings = {
        "k": config.k,
        "target_temperature": chosen["target_temperature"],
        "exclude_document": config.exclude_document,
        "target_mass": config.target_mass,
    }
    mixing = {"teacher_share": share, "max_support": config.max_support, "target_mass": config.target_mass}

    def keep(done: int) -> None:
        stage.kept = f"the targets of {done:,} of {split.n_positions:,} positions"

    keep(done)
    with progress_bar(split.n_positions, "searching", initial=done) as bar, writing_behind() as write:
        for i, (start, stop) in bounds.items():
            blocks, part = range(*shards[i]), Part(stage.path, f"targets-{i:05d}", due)
            begin, votes = _kept_votes(part, stop - start)
            if begin:
                bar.update(begin)
                keep(done + begin)
            if store.keys is not None:
                keys = store.keys.slice(start, stop)
            else:
                keys = read_keys(reader(), split, blocks, batch_tokens=store.config.batch_tokens)
            for at in range(begin, len(keys), positions_at_once):
                queries = widen(keys[at : at + positions_at_once])
                own = np.arange(start + at, start + at + len(queries))
                votes.append(retrieve(store, queries, own, **votes_settings))
                bar.update(len(own))
                if part.offer(at + len(own), lambda votes=votes: SparseProbs.concatenate(votes).arrays()):
                    keep(done + at + len(own))
            found, nats = SparseProbs.concatenate(votes), None
            if share:
                who = f"{len(folds)} teachers read" if folds else f"{store.teacher} reads"
                with progress_bar(stop - start, who) as read:
                    found, nats = mixed_targets(found, speakers.hear(np.asarray(blocks)), start, read.update, **mixing)
            write(write_shard, stage, i, [split[b] for b in blocks], found, nats)
            write(part.remove)
            done += stop - start
            keep(done)
    held_out = speakers.perplexity(config.judged_positions) if folds else None
    return write_rest(stage, store.corpus, len(shards), store.manifest.facts, held_out) | chosen


def _chosen(
    stage: Stage, store: Datastore, config: TargetsConfig, teacher: Callable[[], PreTrainedModel]
) -> dict[str, Any]:
    """Temperature and the teacher's share in force, and what they were chosen by; an earlier run's choice stands."""
    if not config.chooses:
        return {"target_temperature": config.target_temperature, "teacher_share": config.teacher_share}
    if stage.has(_CHOSEN):
        return read_json(stage.path / _CHOSEN)
    split = "validation" if store.corpus.split("validation").n_positions else "train"
    asked = {"k": config.k, "exclude_document": config.exclude_document, "positions": config.judged_positions}
    held_out = judge(store, teacher(), split, temperature=config.target_temperature, **asked)
    temperature, neighbours = held_out.best()
    found: dict[str, Any] = {
        "target_temperature": temperature,
        "teacher_share": round(1 - neighbours, 4) if config.teacher_share == "auto" else config.teacher_share,
        "judged": {split: _told(held_out, temperature, neighbours)},
    }
    found["judged"]["neighbours_share"] = neighbours
    found["judged"]["perplexities"] = {
        f"{t:g}": round(math.exp(held_out.nats(t, held_out.best_share(t))), 4) for t in held_out.neighbours
    }
    if split != "train":  # far lower there: the teacher has learnt the text by heart, and its targets leak labels
        learnt = judge(store, teacher(), "train", temperature=temperature, **asked)
        found["judged"]["train"] = _told(learnt, temperature, neighbours)
    write_json(stage.path / _CHOSEN, found)
    return found


def _told(judged: Judged, temperature: float, neighbours: float) -> dict[str, Any]:
    told = {"teacher": 0.0, "mixed": neighbours}
    perplexities = {name: round(math.exp(judged.nats(temperature, share)), 4) for name, share in told.items()}
    return {"positions": len(judged.teacher), **perplexities}


def import_released(
    corpus: str | Path, arrow: str | Path, *, out: str | Path, shard_positions: int = 65536
) -> Manifest:
    """Targets from a file of the released Memory Decoder code, matched to `corpus` position by position.

    Args:
        corpus: Folder of the corpus stage, tokenised and cut as the file's text was.
        arrow: Arrow stream with a row per position: `id_cnt`, `token_id`, `prob`, `label`.
        out: Folder to write.
        shard_positions: Positions per file, at least.

    Raises:
        InputError: The file has other columns, or its labels are not the corpus's training labels in order.

    Source: `knn_utils/saveKNNMulti.py` of the released code.
    """
    source = Corpus(corpus)
    split = source.split("train")
    wanted = ("id_cnt", "label", "prob", "token_id")
    try:
        names = pa.ipc.open_stream(pa.memory_map(str(arrow))).schema.names
        if not set(wanted) <= set(names):
            raise InputError(f"{arrow} has columns {', '.join(names)}; expected {', '.join(wanted)}")
        used = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in wanted])  # others may be huge
        table = pa.ipc.open_stream(pa.memory_map(str(arrow)), options=used).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{arrow} is no Arrow stream: {error}") from None
    labels = table["label"].to_numpy()
    expected = split.labels()
    if len(labels) != len(expected) or (labels != expected).any():
        at = "their number" if len(labels) != len(expected) else f"position {int((labels != expected).argmax())}"
        raise InputError(
            f"{arrow} has {len(labels):,} labels, corpus {corpus} {len(expected):,} positions; they differ in {at}"
        )
    spec = StageSpec(
        "targets",
        config=IMPORTED,
        inputs={"corpus": source.manifest.hash, "arrow": file_digest(Path(arrow))},
        tokenizer=source.manifest.tokenizer,
        sources={**source.manifest.sources, "corpus": str(corpus), "arrow": str(arrow)},
    )

    def work(stage: Stage) -> dict[str, Any]:
        shards = shard_blocks(split.position_starts, shard_positions)
        for i, (first, end) in enumerate(shards):
            start, stop = split.position_starts[[first, end]].tolist()
            rows = table.slice(start, stop - start)
            votes = _released_votes(rows, source.vocab_size, arrow, start)
            write_shard(stage, i, [split[b] for b in range(first, end)], votes)
        return write_rest(stage, source, len(shards), {})

    return run_stage(out, spec, work)


def _released_votes(rows: pa.Table, vocab_size: int, arrow: str | Path, start: int) -> SparseProbs:
    counts = rows["id_cnt"].to_numpy()
    token_ids, token_probs = rows["token_id"].combine_chunks(), rows["prob"].combine_chunks()
    ids = token_ids.flatten().to_numpy()
    probs = token_probs.flatten().to_numpy().astype(np.float32)
    lengths = [np.diff(lists.offsets.to_numpy()) for lists in (token_ids, token_probs)]
    if any((counts != length).any() for length in lengths) or (counts < 1).any():
        raise InputError(f"{arrow}: id_cnt does not fit the lengths of token_id and prob")
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise InputError(f"{arrow}: token id {wrong} is outside the vocabulary of {vocab_size}")
    owner = np.repeat(np.arange(len(counts)), counts)
    sums = np.bincount(owner, weights=probs, minlength=len(counts))
    bad = ~(np.isfinite(sums) & (sums > 0)) | (np.bincount(owner, weights=probs < 0, minlength=len(counts)) > 0)
    if bad.any():
        raise InputError(f"{arrow}: prob holds no distribution at position {start + int(bad.argmax())}")
    order = np.lexsort((-probs, owner))  # likeliest first
    normalised = (probs / sums[owner]).astype(np.float32)[order]
    return SparseProbs(
        torch.from_numpy(counts.copy()).long(),
        torch.from_numpy(ids[order]),
        torch.from_numpy(normalised),
        torch.zeros(len(counts)),
    )


def _kept_votes(part: Part, positions: int) -> tuple[int, list[SparseProbs]]:
    """Positions of a shard that an earlier run has searched for, and what it found; none where that does not fit."""
    done, arrays = part.load()
    votes = SparseProbs.from_arrays(arrays) if arrays else None
    return (done, [votes]) if votes is not None and 0 < done == len(votes.counts) <= positions else (0, [])
