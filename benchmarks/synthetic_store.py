"""A datastore of any size without a corpus: keys scattered around a base's own activations."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks.models import random_tokens
from memlm.artifacts import Stage, open_stage, read_manifest
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import INDEX_FILE, INDEXES, tune_nprobe
from memlm.datastore.store import CORPUS_PAYLOAD, open_keys
from memlm.models.taps import TapReader, find_tap
from memlm.progress import progress_bar

_NOISE = 0.5  # spread of keys around their centre, in spreads of the centres
_SHARD = 131_072


def write_store(
    folder: Path, base: PreTrainedModel, *, entries: int, config: DatastoreConfig, centres: int = 4096
) -> Path:
    """A datastore whose teacher is `base`, of random keys and values.

    Keys are drawn around centres, which are activations of the base on random tokens, so that an inverted-file index
    finds clusters, and finds those of a query.

    Args:
        folder: Written whole; an earlier one of the same settings is left alone.
        base: Whose activations the memory will read.
        entries: Keys.
        config: Settings of the index; its seed draws keys and values.
        centres: Clusters.

    Returns:
        The folder.
    """
    vocab_size, tap = base.config.get_text_config().vocab_size, find_tap(base)
    with open_stage(
        folder.with_name(folder.name + "-corpus"),
        "corpus",
        config=CorpusConfig().model_dump(),
        inputs={"documents": f"{entries} random tokens"},
        tokenizer=None,
    ) as stage:
        if not stage.finished:
            _write_corpus(stage, entries, vocab_size, config.seed)
    corpus = read_manifest(stage.out, "corpus")
    with open_stage(
        folder,
        "datastore",
        config=config.model_dump(),
        inputs={"corpus": corpus.hash, "teacher": "random keys"},
        tokenizer=None,
        sources={"teacher": "random keys"},
    ) as store:
        if store.finished:
            return folder
        for name in (*corpus.payload, "manifest.json"):
            with store.writing(f"{CORPUS_PAYLOAD}/{name}") as temporary:
                temporary.write_bytes((stage.out / name).read_bytes())
        store.save_array("values.npy", np.load(stage.out / "train.tokens.npy")[1:])
        _write_keys(store, _activations(base, tap, centres), entries, config.seed)
        keys = open_keys(store.path)
        kind = config.index_kind(entries)
        index = INDEXES[kind].build(keys, config)
        recall = tune_nprobe(index, keys, config)
        if kind != "exact":
            with store.writing(INDEX_FILE) as temporary:
                index.save(temporary)
        store.finish(
            {
                "entries": entries,
                "key_width": keys.shape[1],
                "tap": tap,
                "distance": "squared L2",
                "key_dtype": "float16",
                "index": index.describe(),
                "recall": {"k": min(config.recall_k, entries - 1), "value": round(recall, 4)},
            }
        )
    return folder


def _write_corpus(stage: Stage, entries: int, vocab_size: int, seed: int) -> None:
    """One document whose predicted tokens are the entries."""
    splits = {}
    for split, length in (("train", entries + 1), ("validation", 0), ("test", 0)):
        tokens = np.random.default_rng(seed).integers(vocab_size, size=length, dtype=np.int32)
        stage.save_array(f"{split}.tokens.npy", tokens)
        stage.save_array(f"{split}.offsets.npy", np.unique([0, length]).astype(np.int64))
        stage.save_text(f"{split}.names.txt", "random\n" if length else "")
        documents = min(length, 1)
        splits[split] = {"documents": documents, "tokens": length, "positions": length - documents}
    stage.finish({"vocab_size": vocab_size, "splits": splits})


def _activations(base: PreTrainedModel, tap: str, count: int, length: int = 64) -> NDArray[np.float32]:
    """`(count, D)` what the base has at the tap on random tokens, the first of each text left out."""
    vocab_size = base.config.get_text_config().vocab_size
    rows = -(-count // (length - 1))
    tokens = random_tokens(rows, length, vocab_size, torch.device("cpu"), seed=1)
    with TapReader(base, tap) as reader:
        read = torch.cat([reader.read(piece.to(base.device))[:, 1:].flatten(0, 1) for piece in tokens.split(8)])
    return read[:count].float().cpu().numpy()


def _write_keys(stage: Stage, centres: NDArray[np.float32], entries: int, seed: int) -> None:
    spread = _NOISE * centres.std(0)
    with progress_bar(entries, "random keys", unit="key") as bar:
        for number, start in enumerate(range(0, entries, _SHARD)):
            rng = np.random.default_rng([seed, number])
            count = min(_SHARD, entries - start)
            keys = rng.standard_normal((count, centres.shape[1]), np.float32)
            keys *= spread
            keys += centres[rng.integers(len(centres), size=count)]
            stage.save_array(f"keys/{number:05d}.npy", keys.astype(np.float16))
            bar.update(count)
