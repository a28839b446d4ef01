"""A datastore of any size without a corpus: keys scattered around a base's own activations."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks.models import random_tokens
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import INDEX_FILE, INDEXES, tune_nprobe
from memlm.datastore.store import CORPUS_PAYLOAD, open_keys
from memlm.models.taps import TapReader, find_tap
from memlm.progress import progress_bar
from memlm.stage import Stage, StageSpec, run_stage

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
    at, asked = folder.with_name(folder.name + "-corpus"), {"documents": f"{entries} random tokens"}
    spec = StageSpec("corpus", CorpusConfig().model_dump(), asked, None)
    corpus = run_stage(at, spec, lambda stage: _write_corpus(stage, entries, vocab_size, config.seed))
    inputs, sources = {"corpus": corpus.hash, "teacher": "random keys"}, {"teacher": "random keys"}

    def work(stage: Stage) -> dict[str, Any]:
        for name in (*corpus.payload, "manifest.json"):
            with stage.writing(f"{CORPUS_PAYLOAD}/{name}") as temporary:
                temporary.write_bytes((at / name).read_bytes())
        stage.save_array("values.npy", np.load(at / "train.tokens.npy")[1:])
        _write_keys(stage, _activations(base, tap, centres), entries, config.seed)
        keys = open_keys(stage.path)
        kind = config.index_kind(entries)
        index = INDEXES[kind].build(keys, config)
        recall = tune_nprobe(index, keys, config)
        if kind != "exact":
            with stage.writing(INDEX_FILE) as temporary:
                index.save(temporary)
        if index.holds_keys:
            stage.remove("keys")
        return {
            "entries": entries,
            "key_width": keys.shape[1],
            "tap": tap,
            "distance": "squared L2",
            "key_dtype": "float16",
            "index": index.describe(),
            "recall": {"k": min(config.recall_k, entries - 1), "value": round(recall, 4)},
        }

    run_stage(folder, StageSpec("datastore", config.model_dump(), inputs, None, sources), work)
    return folder


def _write_corpus(stage: Stage, entries: int, vocab_size: int, seed: int) -> dict[str, Any]:
    """One document whose predicted tokens are the entries."""
    splits = {}
    for split, length in (("train", entries + 1), ("validation", 0), ("test", 0)):
        tokens = np.random.default_rng(seed).integers(vocab_size, size=length, dtype=np.int32)
        stage.save_array(f"{split}.tokens.npy", tokens)
        stage.save_array(f"{split}.offsets.npy", np.unique([0, length]).astype(np.int64))
        stage.save_text(f"{split}.names.txt", "random\n" if length else "")
        documents = min(length, 1)
        splits[split] = {"documents": documents, "tokens": length, "positions": length - documents}
    return {"vocab_size": vocab_size, "splits": splits}


def _activations(base: PreTrainedModel, tap: str, count: int, length: int = 64) -> NDArray[np.float32]:
    """`(count, D)` what the base has at the tap on random tokens, the first of each text left out."""
    vocab_size = base.config.get_text_config().vocab_size
    rows = -(-count // (length - 1))
    tokens = random_tokens(rows, length, vocab_size, torch.device("cpu"), seed=1)
    reader = TapReader(base, tap)
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
