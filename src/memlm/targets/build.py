"""The targets stage: a datastore to rows of blocks with a sparse distribution per position."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from memlm.artifacts import Manifest, Stage, file_digest, open_stage, read_manifest, writing_behind
from memlm.config import settings_from
from memlm.corpus.blocks import Block, Corpus, Split
from memlm.datastore.build import load_teacher, read_keys, shard_blocks
from memlm.datastore.store import Datastore
from memlm.errors import ConfigError, InputError
from memlm.models.taps import TapReader
from memlm.progress import progress_bar
from memlm.targets.config import IMPORTED, TargetsConfig
from memlm.targets.shards import (
    ROWS_AT_ONCE,
    TRAIN_SCHEMA,
    VALIDATION_FILE,
    VALIDATION_SCHEMA,
    read_statistics,
    write_rows,
)
from memlm.targets.votes import SparseProbs, retrieve

_POSITIONS_AT_ONCE = 4096
_IMPORT_SHARD_POSITIONS = 65536


def build_targets(
    datastore: str | Path,
    *,
    out: str | Path,
    config: TargetsConfig | None = None,
    repair: bool = False,
    **settings: Any,
) -> Manifest:
    """Search every training position's neighbours and write their votes to `out`.

    A row of `train-NNNNN.arrow` is one block: `input_ids`; `target_counts`, the support of each token's distribution
    (0 where the block does not predict the token); `target_ids` and `target_probs`, the distributions one after
    another. `validation.arrow` holds the validation blocks with `labels`. `datasets` loads both.

    Args:
        datastore: Folder of the datastore stage.
        out: Folder to write; resumed where an earlier run stopped.
        config: Default settings if None; or give them as keywords.
        repair: Make damaged or missing files of a finished folder again.

    Raises:
        ConfigError: k is larger than the datastore allows.
        ArtifactError: The datastore kept no keys and its teacher is no longer the one that made it.
    """
    config = settings_from(TargetsConfig, config, settings)
    store = Datastore(datastore)
    if config.k > store.n_entries - 1:
        raise ConfigError(
            f"k = {config.k} is larger than the {store.n_entries - 1} other entries of datastore {datastore}; lower --k"
        )
    if not store.config.keep_keys:
        store.check_teacher()
    with open_stage(
        out,
        "targets",
        config=config.model_dump(),
        inputs={"datastore": store.manifest.hash},
        tokenizer=store.manifest.tokenizer,
        sources={**store.manifest.sources, "datastore": str(datastore)},
        repair=repair,
    ) as stage:
        if stage.finished:
            return read_manifest(out, "targets")
        split = store.corpus.split("train")
        shards = shard_blocks(split, store.config.shard_positions)
        missing = [i for i in range(len(shards)) if not stage.has(_shard(i))]
        done = split.n_positions - sum(_positions(split, *shards[i]) for i in missing)
        bar = progress_bar(split.n_positions, "searching", initial=done)
        with bar, _queries(store, split) as queries, writing_behind() as write:
            for i in missing:
                first, end = shards[i]
                start = int(split.position_starts[first])
                votes = []
                for chunk in queries(first, end):
                    own = np.arange(start, start + len(chunk))
                    votes.append(retrieve(store, chunk, own, **config.model_dump()))
                    start += len(chunk)
                    bar.update(len(chunk))
                blocks = [split[b] for b in range(first, end)]
                write(_write_shard, stage, i, blocks, SparseProbs.concatenate(votes))
        return _finish(stage, store.corpus, len(shards), store.manifest.facts)


def import_released(corpus: str | Path, arrow: str | Path, *, out: str | Path, repair: bool = False) -> Manifest:
    """Targets from a file of the released Memory Decoder code, matched to `corpus` position by position.

    Args:
        corpus: Folder of the corpus stage, tokenised and cut as the file's text was.
        arrow: Arrow stream with a row per position: `id_cnt`, `token_id`, `prob`, `label`.
        out: Folder to write.
        repair: Make damaged or missing files of a finished folder again.

    Raises:
        InputError: The file has other columns, or its labels are not the corpus's training labels in order.

    Source: `knn_utils/saveKNNMulti.py` of the released code.
    """
    source = Corpus(corpus)
    split = source.split("train")
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(arrow))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{arrow} is no Arrow stream: {error}") from None
    wanted = {"id_cnt", "token_id", "prob", "label"}
    if not wanted <= set(table.column_names):
        raise InputError(f"{arrow} has columns {', '.join(table.column_names)}; expected {', '.join(sorted(wanted))}")
    labels = table["label"].to_numpy()
    expected = split.labels()
    if len(labels) != len(expected) or (labels != expected).any():
        at = "their number" if len(labels) != len(expected) else f"position {int((labels != expected).argmax())}"
        raise InputError(
            f"{arrow} has {len(labels):,} labels, corpus {corpus} {len(expected):,} positions; they differ in {at}"
        )
    with open_stage(
        out,
        "targets",
        config=IMPORTED,
        inputs={"corpus": source.manifest.hash, "arrow": file_digest(Path(arrow))},
        tokenizer=source.manifest.tokenizer,
        sources={**source.manifest.sources, "corpus": str(corpus), "arrow": str(arrow)},
        repair=repair,
    ) as stage:
        if stage.finished:
            return read_manifest(out, "targets")
        shards = shard_blocks(split, _IMPORT_SHARD_POSITIONS)
        for i, (first, end) in enumerate(shards):
            start, stop = int(split.position_starts[first]), int(split.position_starts[end])
            rows = table.slice(start, stop - start)
            votes = _released_votes(rows, source.vocab_size, arrow, start)
            _write_shard(stage, i, [split[b] for b in range(first, end)], votes)
        return _finish(stage, source, len(shards), {})


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


def _shard(number: int) -> str:
    return f"train-{number:05d}.arrow"


def _positions(split: Split, first: int, end: int) -> int:
    return int(split.position_starts[end] - split.position_starts[first])


@contextlib.contextmanager
def _queries(store: Datastore, split: Split) -> Iterator[Any]:
    """A function from a run of blocks to its queries, some thousand positions at a time."""
    if store.keys is not None:
        keys = store.keys

        def kept(first: int, end: int) -> Iterator[NDArray[np.float32]]:
            stop = int(split.position_starts[end])
            for start in range(int(split.position_starts[first]), stop, _POSITIONS_AT_ONCE):
                yield keys.rows(start, min(start + _POSITIONS_AT_ONCE, stop))

        yield kept
        return
    model, _ = load_teacher(store.teacher, store.config)
    with TapReader(model, store.manifest.facts["tap"]) as reader:

        def recomputed(first: int, end: int) -> Iterator[NDArray[np.float32]]:
            keys = read_keys(reader, split, range(first, end), batch_tokens=store.config.batch_tokens)
            for start in range(0, len(keys), _POSITIONS_AT_ONCE):
                yield keys[start : start + _POSITIONS_AT_ONCE].astype(np.float32)

        yield recomputed


def _write_shard(stage: Stage, number: int, blocks: list[Block], votes: SparseProbs) -> None:
    """Write the blocks of one shard, with what the facts will need of it."""
    counts = votes.counts.numpy()
    first_of = np.cumsum(counts) - counts
    statistics = {
        "positions": len(counts),
        "support": int(counts.sum()),
        "lost_mass": float(votes.lost_mass.double().sum()),
        "top1": float(votes.probs[torch.from_numpy(first_of)].double().sum()),
    }
    ids, probs = votes.ids.numpy().astype(np.int32), votes.probs.half().numpy()
    bounds = np.append(first_of, counts.sum())

    def batches() -> Iterator[dict[str, list[np.ndarray]]]:
        position = 0
        for start in range(0, len(blocks), ROWS_AT_ONCE):
            rows: dict[str, list[np.ndarray]] = {name: [] for name in TRAIN_SCHEMA.names}
            for block in blocks[start : start + ROWS_AT_ONCE]:
                end = position + int(block.predicted.sum())
                per_token = np.zeros(len(block.input_ids), np.int32)
                per_token[block.predicted] = counts[position:end]
                rows["input_ids"].append(block.input_ids)
                rows["target_counts"].append(per_token)
                rows["target_ids"].append(ids[bounds[position] : bounds[end]])
                rows["target_probs"].append(probs[bounds[position] : bounds[end]])
                position = end
            yield rows

    with stage.writing(_shard(number)) as temporary:
        write_rows(temporary, TRAIN_SCHEMA, batches(), statistics)


def _validation_rows(validation: Split) -> Iterator[dict[str, list[np.ndarray]]]:
    for start in range(0, len(validation), ROWS_AT_ONCE):
        blocks = [validation[i] for i in range(start, min(start + ROWS_AT_ONCE, len(validation)))]
        yield {"input_ids": [b.input_ids for b in blocks], "labels": [b.labels.astype(np.int32) for b in blocks]}


def _finish(stage: Stage, corpus: Corpus, n_shards: int, datastore_facts: dict[str, Any]) -> Manifest:
    with stage.writing(VALIDATION_FILE) as temporary:
        write_rows(temporary, VALIDATION_SCHEMA, _validation_rows(corpus.split("validation")))
    shutil.copytree(corpus.folder / "tokenizer", stage.path / "tokenizer", dirs_exist_ok=True)
    stats = [read_statistics(stage.path / _shard(i)) for i in range(n_shards)]
    positions = sum(s["positions"] for s in stats)
    facts = {
        "positions": positions,
        "mean_support": round(sum(s["support"] for s in stats) / positions, 3),
        "mean_lost_mass": round(sum(s["lost_mass"] for s in stats) / positions, 6),
        "mean_top1": round(sum(s["top1"] for s in stats) / positions, 4),
        "vocab_size": corpus.vocab_size,
        "corpus": {"hash": corpus.manifest.hash, **corpus.manifest.facts},
        "corpus_config": corpus.manifest.config,
        "datastore": datastore_facts,
    }
    return stage.finish(facts)
