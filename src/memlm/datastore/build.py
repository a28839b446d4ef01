"""The datastore stage: a teacher reads the training split and leaves keys, values and an index."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from memlm.config import settings_from
from memlm.corpus.blocks import Blocks, Corpus, Split, length_batches
from memlm.corpus.build import save_tokens
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.extend import Extension
from memlm.datastore.index import INDEX_FILE, INDEXES, Keys, nlist_in_force, tune_nprobe
from memlm.datastore.store import CORPUS_PAYLOAD, VALUES_FILE, open_keys
from memlm.errors import ConfigError, ModelError
from memlm.files import lasting_name, write_json
from memlm.manifest import MANIFEST, RUN, Manifest, copy_payload
from memlm.models.abilities import check_causal
from memlm.models.identity import model_identity
from memlm.models.loading import default_device, dtype_name, load_on_default_device, parse_dtype
from memlm.models.taps import TapReader, resolve_tap
from memlm.parts import KEEP_SECONDS, Due, Part
from memlm.progress import progress_bar
from memlm.stage import Plan, Stage, StageSpec, run_stage, writing_behind

_TAP_FILE = "tap.txt"

_VALUES_AT_ONCE = 65536
_LENGTHS = 32  # a batch's length is a multiple of it, and its rows fill whole quarters of `batch_tokens`:
_QUARTERS = 4  # few shapes, for oneDNN keeps what it made for each shape that it met

_Batch = tuple[NDArray[np.int64], Callable[[], NDArray[np.float16]]]
"""Places in a list of blocks that were read together, and a function that gives their keys, one after another."""


def build_datastore(
    corpus: str | Path,
    *,
    teacher: str | None = None,
    out: str | Path,
    config: DatastoreConfig | None = None,
    extend: str | Path | None = None,
    **settings: Any,
) -> Manifest:
    """Run `teacher` over the training split of `corpus` and write keys, values and index to `out`.

    The folder holds a copy of the corpus's token files, so it can be used, moved and shared alone.

    With `extend` only the documents that this datastore does not know are read. What comes out is the datastore that
    the whole corpus would give; an approximate index keeps its training, and its recall is measured again.

    Args:
        corpus: Folder of the corpus stage; with `extend`, of old and new documents together.
        teacher: Path, hub id or packaged name of any causal LM with the corpus's tokenizer. None: the one that made
            `extend`.
        out: Folder to write; resumed where an earlier run stopped.
        config: Default settings if None; or give them as keywords. With `extend`, settings that were not given are
            those of that datastore.
        extend: Folder of the datastore of a smaller corpus.

    Raises:
        TokenizerMismatchError: The teacher has another tokenizer than the corpus.
        ModelError: The teacher cannot be loaded, or its tap is not found.
        ConfigError: Neither `teacher` nor `extend` is given, or a setting contradicts the extended datastore.
        ArtifactError: The corpus or the teacher does not fit the extended datastore.
        InputError: The corpus shares no training document with the extended datastore.
    """
    config = settings_from(DatastoreConfig, config, settings)
    return run_stage(out, *plan_datastore(corpus, teacher=teacher, config=config, extend=extend))


def plan_datastore(
    corpus: str | Path,
    *,
    teacher: str | None = None,
    config: DatastoreConfig | None = None,
    extend: str | Path | None = None,
    keep_seconds: float = KEEP_SECONDS,
) -> Plan:
    """What `build_datastore` with these arguments is to make, and the work; raises what it raises before any work.

    What the teacher has read of a shard is kept every `keep_seconds`.
    """
    source = Corpus(corpus)
    extension = None if extend is None else Extension(extend, source)
    config = config or DatastoreConfig()
    if extension is not None:
        config = extension.settings(config)
        if teacher is None:
            extension.store.check_teacher()
            teacher = extension.store.teacher
    if teacher is None:
        raise ConfigError("teacher is missing: give --teacher, the model whose activations become keys, or --extend")
    parse_dtype(config.dtype)
    entries = source.facts.splits["train"].positions
    if extension is None and config.index_kind(entries) != "exact":
        nlist_in_force(entries, config)
    source.check_read_by(teacher)
    source.check_fits(teacher)
    identity = model_identity(teacher)
    inputs = {"corpus": source.manifest.hash, "teacher": identity}
    sources = {"corpus": str(corpus), "teacher": lasting_name(teacher)}
    if extension is not None:
        extension.check_teacher(teacher, identity)
        inputs["extended"], sources["extended"] = extension.store.manifest.hash, str(extend)
    spec = StageSpec(
        "datastore",
        config=config.model_dump(),
        inputs=inputs,
        tokenizer=source.manifest.tokenizer,
        sources={**source.manifest.sources, **sources},
        intermediate=(_TAP_FILE, *(() if _keeps_shards(config, source.split("train").n_positions) else ("keys",))),
    )
    return Plan(spec, lambda stage: _build(stage, source, teacher, config, extension, Due(keep_seconds)))


def _build(
    stage: Stage, source: Corpus, teacher: str, config: DatastoreConfig, extension: Extension | None, due: Due
) -> dict[str, Any]:
    """Write the datastore, and return its facts."""
    split = source.split("train")
    before, index_is_whole = stage.previous, False
    dtype = stage.settled("dtype", dtype_name(parse_dtype(config.dtype, default_device())))
    config = config.model_copy(update={"dtype": dtype if before is None else before.facts.get("teacher_dtype", dtype)})
    if before is not None:
        stage.save_text(_TAP_FILE, before.facts["tap"] + "\n")
        index_is_whole = stage.has(INDEX_FILE) or INDEX_FILE not in before.payload
    needs_keys = _keeps_shards(config, split.n_positions) or not index_is_whole
    tap = _save_keys(stage, split, teacher, config, extension, due) if needs_keys else None
    if any(not stage.has(f"{CORPUS_PAYLOAD}/{name}") for name in (MANIFEST, *source.manifest.payload)):
        stage.remove(CORPUS_PAYLOAD)
        copy_payload(source.folder, source.manifest, stage.path / ".corpus")
        write_json(stage.path / ".corpus" / MANIFEST, source.manifest.model_dump(mode="json"))
        if (run := source.folder / RUN).is_file() and not run.is_symlink():
            shutil.copyfile(run, stage.path / ".corpus" / RUN)
        (stage.path / ".corpus").rename(stage.path / CORPUS_PAYLOAD)
    total = split.n_positions
    starts = range(0, total, _VALUES_AT_ONCE)
    values = (split.labels(start, min(start + _VALUES_AT_ONCE, total)) for start in starts)
    save_tokens(stage, VALUES_FILE, total, values)
    if before is not None and index_is_whole:
        return before.facts
    keys = open_keys(stage.path)
    facts = {
        "entries": total,
        "key_width": keys.shape[1],
        "tap": tap,
        "distance": "squared L2",
        "key_dtype": "float16",
        "teacher_dtype": config.dtype,
        **_save_index(stage, keys, config, extension),
    }
    return facts if extension is None else {**facts, "extended": extension.facts}


def _keeps_shards(config: DatastoreConfig, entries: int) -> bool:
    """Whether the finished folder has `keys/`: where keys are kept, and not in the index."""
    return config.keep_keys and not INDEXES[config.index_kind(entries)].holds_keys


def _save_keys(
    stage: Stage, split: Split, teacher: str, config: DatastoreConfig, extension: Extension | None, due: Due
) -> str:
    """Write `keys/NNNNN.npy`, one per run of blocks, and return the tap."""
    shards = shard_blocks(split.position_starts, config.shard_positions)
    missing = [i for i in range(len(shards)) if not stage.has(f"keys/{i:05d}.npy")]
    if not missing and stage.has(_TAP_FILE):
        return (stage.path / _TAP_FILE).read_text().strip()
    if extension is not None:
        config = config.model_copy(update={"tap": extension.store.facts.tap})
    reader = cache(lambda: TapReader(*load_teacher(teacher, config)))  # loaded where there is something to read
    tap = reader().tap if extension is None else extension.store.facts.tap
    stage.save_text(_TAP_FILE, tap + "\n")
    bounds = {i: split.position_starts[list(shards[i])].tolist() for i in missing}
    total, done = split.n_positions, split.n_positions - sum(stop - start for start, stop in bounds.values())

    def keep(done: int) -> None:
        stage.kept = f"the keys of {done:,} of {total:,} positions"

    keep(done)
    with progress_bar(total, "teacher pass", initial=done) as bar, writing_behind() as write:
        for i in missing:
            blocks = np.arange(*shards[i])
            if extension is not None:
                blocks = blocks[extension.is_new(blocks)]
            keys, part = None, Part(stage.path, f"keys-{i:05d}", due)
            if len(blocks):
                keys = read_keys(
                    reader(),
                    split,
                    blocks,
                    batch_tokens=config.batch_tokens,
                    progress=bar.update,
                    part=part,
                    on_kept=lambda read, done=done: keep(done + read),
                )
            if extension is not None:
                read = 0 if keys is None else len(keys)
                keys = extension.complete(keys, *bounds[i])
                bar.update(len(keys) - read)
            assert keys is not None  # without an extension every block is read
            write(stage.save_array, f"keys/{i:05d}.npy", keys)
            write(part.remove)
            done += len(keys)
            keep(done)
    return tap


def load_teacher(teacher: str, config: DatastoreConfig) -> tuple[PreTrainedModel, str]:
    """The teacher on the default device, and the tap in force."""
    model = load_on_default_device(teacher, config.dtype)
    check_causal(model)
    return model, resolve_tap(model, config.tap)


def shard_blocks(position_starts: NDArray[np.int64], shard_positions: int) -> list[tuple[int, int]]:
    """(first block, end block) of each shard: whole blocks, at least `shard_positions` positions but for the last."""
    shards, first, blocks = [], 0, len(position_starts) - 1
    while first < blocks:
        end = min(int(np.searchsorted(position_starts, position_starts[first] + shard_positions)), blocks)
        shards.append((first, max(end, first + 1)))
        first = shards[-1][1]
    return shards


def read_keys(
    reader: TapReader,
    split: Blocks,
    blocks: Sequence[int] | NDArray[np.int64],
    *,
    batch_tokens: int,
    progress: Callable[[int], object] = lambda keys: None,
    part: Part | None = None,
    on_kept: Callable[[int], object] = lambda keys: None,
) -> NDArray[np.float16]:
    """Keys of all positions that these blocks predict, block after block.

    Args:
        blocks: Which blocks, at least one.
        batch_tokens: Tokens in one forward pass, padding included.
        progress: Told how many keys were read, batch by batch.
        part: Where an earlier pass over the same blocks may have left some, and this one keeps what it has.
        on_kept: Told how many keys are kept there.

    Raises:
        ModelError: An activation does not fit float16.
    """
    numbers = np.asarray(blocks)
    starts = np.append(0, np.cumsum(np.diff(split.position_starts)[numbers]))
    lengths = split.lengths[numbers]
    padded = np.minimum(-(-lengths // _LENGTHS) * _LENGTHS, lengths.max())
    batches = list(length_batches(padded, batch_tokens))
    positions = [int((starts[batch + 1] - starts[batch]).sum()) for batch in batches]
    done, out = (0, None) if part is None else _kept_keys(part, len(batches), int(starts[-1]))
    if done:
        progress(sum(positions[:done]))
        on_kept(sum(positions[:done]))
    left = _read_batches(reader, split, numbers, padded, batches[done:], batch_tokens)
    for number, (batch, keys) in enumerate(_one_ahead(left), done + 1):
        found = keys()
        if not np.isfinite(found).all():
            raise ModelError("an activation at the tap overflows float16 (or is NaN); choose another --tap")
        if out is None:
            out = np.empty((int(starts[-1]), found.shape[1]), np.float16)
        ends = np.cumsum(starts[batch + 1] - starts[batch])
        for start, rows in zip(starts[batch], np.split(found, ends[:-1]), strict=True):
            out[start : start + len(rows)] = rows
        progress(len(found))
        if part is not None and number < len(batches) and part.offer(number, partial(dict, keys=out)):
            on_kept(sum(positions[:number]))
    assert out is not None  # there is at least one block, and blocks have at least one position
    return out


def _kept_keys(part: Part, batches: int, positions: int) -> tuple[int, NDArray[np.float16] | None]:
    """How many batches an earlier pass has read, and its keys; none where what it left does not fit."""
    done, arrays = part.load()
    keys = arrays.get("keys")
    fits = keys is not None and keys.dtype == np.float16 and keys.ndim == 2 and len(keys) == positions
    return (done, keys) if fits and 0 < done < batches else (0, None)


def _read_batches(
    reader: TapReader,
    split: Blocks,
    numbers: NDArray[np.int64],
    padded: NDArray[np.int64],
    batches: list[NDArray[np.int64]],
    batch_tokens: int,
) -> Iterator[_Batch]:
    device = reader.model.device
    for batch in batches:
        read = [split[int(numbers[i])] for i in batch]
        longest = int(padded[batch].max())
        full = max(1, batch_tokens // longest)
        quarter = -(-full // _QUARTERS)
        rows = min(-(-len(read) // quarter) * quarter, full)
        tokens = np.zeros((rows, longest), np.int64)
        predicted = np.zeros((rows, longest + 1), bool)
        for row, block in enumerate(read):
            tokens[row, : len(block.input_ids)] = block.input_ids
            predicted[row, : len(block.input_ids)] = block.predicted
        places = torch.from_numpy(np.flatnonzero(predicted[:, 1:])).to(device)
        activations = reader.read(torch.from_numpy(tokens).to(device))
        yield np.asarray(batch), _to_host(activations.flatten(0, 1)[places].half())


def _to_host(values: Tensor) -> Callable[[], NDArray[Any]]:
    """A function that waits for `values` and gives them; an accelerator copies them while it computes what follows."""
    if values.device.type == "cpu":
        return values.numpy
    copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copied.copy_(values, non_blocking=True)
    done = torch.Event(values.device)
    done.record()

    def wait() -> NDArray[Any]:
        done.synchronize()
        return copied.numpy()

    return wait


def _one_ahead(items: Iterable[_Batch]) -> Iterator[_Batch]:
    """The same items, each given once the next was made."""
    before: list[_Batch] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def _save_index(stage: Stage, keys: Keys, config: DatastoreConfig, extension: Extension | None) -> dict:
    kind = config.index_kind(len(keys))
    if stage.has(INDEX_FILE):
        stage.remove(INDEX_FILE)  # training restarts whole
    if extension is not None and extension.fits_index(kind, config):
        index = extension.index(keys, config)
    else:
        index = INDEXES[kind].build(keys, config)
    if not config.keep_keys:
        index.keys = None
    recall = tune_nprobe(index, keys, config)
    if kind != "exact":
        with stage.writing(INDEX_FILE) as temporary:
            index.save(temporary)
    return {"index": index.describe(), "recall": {"k": min(config.recall_k, len(keys) - 1), "value": round(recall, 4)}}
