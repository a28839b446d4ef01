"""The datastore stage: a teacher reads the training split and leaves keys, values and an index."""

import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from memlm.artifacts import Manifest, Stage, load_array, open_stage, read_manifest
from memlm.corpus.blocks import Corpus, Split, length_batches
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import INDEX_FILE, INDEXES, Index, Keys, tune_nprobe
from memlm.errors import ArtifactError, ModelError
from memlm.models.loading import (
    default_device,
    load_causal_lm,
    model_identity,
    parse_dtype,
)
from memlm.models.taps import TapReader, resolve_tap
from memlm.progress import progress_bar

_CORPUS_PAYLOAD = "corpus"


def build_datastore(
    corpus: str | Path, *, teacher: str, out: str | Path, config: DatastoreConfig | None = None
) -> Manifest:
    """Run `teacher` over the training split of `corpus` and write keys, values and index to `out`.

    The folder holds a copy of the corpus's token files, so it can be used, moved and shared alone.

    Args:
        corpus: Folder of the corpus stage.
        teacher: Path, hub id or packaged name of any causal LM with the corpus's tokenizer.
        out: Folder to write; resumed where an earlier run stopped.
        config: Default settings if None.

    Raises:
        TokenizerMismatchError: The teacher has another tokenizer than the corpus.
        ModelError: The teacher cannot be loaded, or its tap is not found.
    """
    config = config or DatastoreConfig()
    parse_dtype(config.dtype)
    source = Corpus(corpus)
    source.check_read_by(teacher)
    with open_stage(
        out,
        "datastore",
        config=config.model_dump(),
        inputs={"corpus": source.manifest.hash, "teacher": model_identity(teacher)},
        tokenizer=source.manifest.tokenizer,
        sources={**source.manifest.sources, "corpus": str(corpus), "teacher": teacher},
    ) as stage:
        if stage.finished:
            return read_manifest(out, "datastore")
        if not stage.has(f"{_CORPUS_PAYLOAD}/manifest.json"):
            stage.remove(_CORPUS_PAYLOAD)
            shutil.copytree(source.folder, stage.path / ".corpus", dirs_exist_ok=True)
            (stage.path / ".corpus").rename(stage.path / _CORPUS_PAYLOAD)
        split = source.split("train")
        tap = _save_keys(stage, split, teacher, config)
        stage.save_array("values.npy", split.labels())
        keys = open_keys(stage.path)
        facts = {
            "entries": split.n_positions,
            "key_width": keys.shape[1],
            "tap": tap,
            "distance": "squared L2",
            "key_dtype": "float16",
            **_save_index(stage, keys, config),
        }
        return stage.finish(facts, intermediate=("tap.txt", *(() if config.keep_keys else ("keys",))))


def _save_keys(stage: Stage, split: Split, teacher: str, config: DatastoreConfig) -> str:
    """Write `keys/NNNNN.npy`, one per run of blocks, and return the tap."""
    shards = shard_blocks(split, config.shard_positions)
    missing = [i for i in range(len(shards)) if not stage.has(f"keys/{i:05d}.npy")]
    if not missing and stage.has("tap.txt"):
        return (stage.path / "tap.txt").read_text().strip()
    model, tap = load_teacher(teacher, config)
    stage.save_text("tap.txt", tap + "\n")
    total = split.n_positions
    done = total - sum(
        int(split.position_starts[b1] - split.position_starts[b0]) for b0, b1 in (shards[i] for i in missing)
    )
    with progress_bar(total, "teacher pass", initial=done) as bar, TapReader(model, tap) as reader:
        for i in missing:
            keys = read_keys(reader, split, *shards[i], batch_tokens=config.batch_tokens)
            stage.save_array(f"keys/{i:05d}.npy", keys)
            bar.update(len(keys))
    return tap


def load_teacher(teacher: str, config: DatastoreConfig) -> tuple[PreTrainedModel, str]:
    """The teacher on the default device, and the tap in force."""
    device = default_device()
    model = load_causal_lm(teacher, dtype=parse_dtype(config.dtype, device)).to(device)  # type: ignore[arg-type]
    return model, resolve_tap(model, config.tap)


def shard_blocks(split: Split, shard_positions: int) -> list[tuple[int, int]]:
    """(first block, end block) of each shard: whole blocks, at least `shard_positions` positions but for the last."""
    shards, first = [], 0
    starts = split.position_starts
    while first < len(split):
        end = min(int(np.searchsorted(starts, starts[first] + shard_positions)), len(split))
        shards.append((first, max(end, first + 1)))
        first = shards[-1][1]
    return shards


def read_keys(reader: TapReader, split: Split, first: int, end: int, *, batch_tokens: int) -> NDArray[np.float16]:
    """Keys of all positions that blocks `first` to `end` predict, in the order of positions.

    Raises:
        ModelError: An activation does not fit float16.
    """
    base = int(split.position_starts[first])
    out: NDArray[np.float16] | None = None
    device = reader.model.device
    for batch in length_batches(split.lengths[first:end], batch_tokens):
        blocks = [split[first + int(i)] for i in batch]
        longest = max(len(b.input_ids) for b in blocks)
        padded = np.stack([np.pad(b.input_ids, (0, longest - len(b.input_ids))) for b in blocks])
        activations = reader.read(torch.from_numpy(padded).long().to(device))
        for row, block in zip(activations, blocks, strict=True):
            before = torch.from_numpy(np.flatnonzero(block.predicted) - 1).to(device)
            keys = row[before].half().cpu().numpy()
            if not np.isfinite(keys).all():
                raise ModelError("an activation at the tap overflows float16 (or is NaN); choose another --tap")
            if out is None:
                out = np.empty((int(split.position_starts[end]) - base, keys.shape[1]), np.float16)
            out[block.first_position - base : block.first_position - base + len(keys)] = keys
    assert out is not None  # shards hold at least one block, blocks at least one position
    return out


def _save_index(stage: Stage, keys: Keys, config: DatastoreConfig) -> dict:
    kind = config.index_kind(len(keys))
    if stage.has(INDEX_FILE):
        stage.remove(INDEX_FILE)  # training restarts whole
    index = INDEXES[kind].build(keys, config)
    if not config.keep_keys and hasattr(index, "keys"):
        index.keys = None  # type: ignore[attr-defined]
    recall = tune_nprobe(index, keys, config)
    if kind != "exact":
        with stage.writing(INDEX_FILE) as temporary:
            index.save(temporary)
    return {"index": index.describe(), "recall": {"k": min(config.recall_k, len(keys) - 1), "value": round(recall, 4)}}


def open_keys(folder: Path) -> Keys:
    """The keys in a datastore folder."""
    shards = [load_array(p, mapped=True) for p in sorted((folder / "keys").glob("*.npy"))]
    if not shards or any(s.ndim != 2 or s.dtype != np.float16 or s.shape[1] != shards[0].shape[1] for s in shards):
        raise ArtifactError(f"{folder}/keys holds no float16 shards of one width; rebuild the datastore")
    return Keys(shards)


class Datastore:
    """A datastore folder, opened."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            ArtifactError: The folder is no complete datastore.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, "datastore")
        self.config = DatastoreConfig.parse(self.manifest.config, "datastore.")
        self.corpus = Corpus(self.folder / _CORPUS_PAYLOAD)
        if self.corpus.manifest.hash != self.manifest.inputs["corpus"]:
            raise ArtifactError(f"{folder} was made from another corpus than the one it holds; rebuild it")
        self.n_entries = int(self.manifest.facts["entries"])

    @property
    def teacher(self) -> str:
        """Where the teacher was found."""
        return self.manifest.sources["teacher"]

    @cached_property
    def keys(self) -> Keys | None:
        """The kept keys; None where only codes were kept."""
        return open_keys(self.folder) if self.config.keep_keys else None

    @cached_property
    def values(self) -> NDArray[np.int32]:
        """`(N,)` the token that came next, per entry."""
        return load_array(self.folder / "values.npy", mapped=True)

    @cached_property
    def index(self) -> Index:
        settings = self.manifest.facts["index"]
        return INDEXES[settings["kind"]].load(self.folder, self.keys, settings)
