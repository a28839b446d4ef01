"""Neighbours of all positions are found no slower than the teacher reads them, or than faiss finds as many."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.knn_decoding import compared
from benchmarks.report import bar_line, prove
from benchmarks.stage_memory import write_documents, write_teacher
from benchmarks.timing import interleave
from memlm import build_corpus
from memlm.corpus.blocks import Corpus, Split
from memlm.corpus.config import CorpusConfig
from memlm.datastore.build import load_teacher, read_keys
from memlm.datastore.config import DatastoreConfig, IndexKind
from memlm.datastore.index import INDEXES, ExactIndex, Index, Keys, default_nlist, tune_nprobe
from memlm.models.taps import TapReader
from memlm.runs.recipe import data_path

ENTRIES = (200_000, 1_000_000)
PROJECTED = (100_000_000, 5_000_000_000)
K = 1024
BAR = 1.0
_KINDS: tuple[IndexKind, ...] = ("ivf-flat", "ivf-pq")
_DOCUMENTS = "medquad/medquad.txt"
_BATCH = 4096  # queries at a time, as the targets stage has them
_NOISE = 0.1  # of the copies' spread around the keys that were read, in spreads of all keys
_SHARD = 65_536
_RECALL_SLACK = 0.05  # between two samples, and neighbours that are equally near
_TOLERANCE = 1e-5  # of |x|²: distances are products of float32


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Four lines: search over teacher pass at 0.2M entries, over faiss's, growth to 1M, projection to 100M and 5B.

    SmolLM2 reads MedQuAD below `$MEMLM_DATA`, 0.2M tokens; the 1M entries are those and copies of them with noise, as
    two cores read 1M tokens in half an hour. Where the text is missing, and in a quick run, a random teacher reads
    random words. `$TMPDIR` needs 2.5 kB an entry.
    """
    documents, separator = Path(data_path(_DOCUMENTS)), "\n\n"
    entries, k, sizes = ((400, 900), 8, {"batch": 64, "rounds": 1}) if quick else (ENTRIES, K, {})
    with tempfile.TemporaryDirectory(prefix="memlm-search-") as scratch:
        work, teacher = Path(scratch), "smollm2"
        if quick or not documents.exists():
            documents, teacher, separator = work / "documents.txt", str(work / "teacher"), "\n"
            write_documents(documents, 2 * entries[0])
            write_teacher(work / "teacher")
        corpus = CorpusConfig(
            document_separator=separator,
            block_size=512,
            max_tokens=entries[0],
            max_validation_tokens=2,
            max_test_tokens=2,
        )
        build_corpus([str(documents)], tokenizer=teacher, out=work / "corpus", config=corpus)
        split = Corpus(work / "corpus").split("train")
        model, tap = load_teacher(teacher, DatastoreConfig())
        reader = TapReader(model, tap)
        shards, seconds = read_all(reader, split, work)
        rows = []
        for size in entries:
            keys = Keys([*shards, *copies(Keys(shards), size - split.n_positions, work)])
            for kind in ("ivf-flat", "ivf-pq"):
                config = index_config(kind, quick=quick, k=k)
                rows.append(measure(reader, split, keys, config, k=k, **sizes))
    told = {"text": documents.name, "teacher": Path(teacher).name, "whole_teacher_pass_seconds": round(seconds, 1)}
    yield speed(rows, judged=not quick, **told)
    yield against_faiss(rows, judged=not quick)
    yield growth(rows)
    yield projection(rows)


def index_config(kind: IndexKind, *, quick: bool, k: int) -> DatastoreConfig:
    """The library's settings, tuned to recall 0.95 at the k of targets, but for fewer keys in training."""
    return DatastoreConfig(index=kind, recall_k=k, recall_sample=16 if quick else 128, train_vectors=65_536)


def read_all(reader: TapReader, split: Split, work: Path) -> tuple[list[NDArray[np.float16]], float]:
    """The keys of a split, on disk, and the seconds that the teacher took."""
    start = time.perf_counter()
    keys = read_keys(reader, split, range(len(split)), batch_tokens=DatastoreConfig().batch_tokens)
    seconds = time.perf_counter() - start
    np.save(work / "read.npy", keys)
    return [np.load(work / "read.npy", mmap_mode="r")], seconds


def copies(keys: Keys, count: int, work: Path) -> list[NDArray[np.float16]]:
    """So many further keys on disk: those of `keys`, in turn, with noise."""
    shards = []
    spread = _NOISE * keys.rows(0, _SHARD).std(0)
    for start in range(0, max(count, 0), _SHARD):
        rng = np.random.default_rng([0, start])
        origin = np.sort(rng.integers(len(keys), size=min(_SHARD, count - start)))
        noisy = keys.gather(origin) + spread * rng.standard_normal((len(origin), keys.shape[1]), np.float32)
        np.save(work / f"copies-{start}.npy", noisy.astype(np.float16))
        shards.append(np.load(work / f"copies-{start}.npy", mmap_mode="r"))
    return shards


def measure(
    reader: TapReader,
    split: Split,
    keys: Keys,
    config: DatastoreConfig,
    *,
    k: int,
    batch: int = _BATCH,
    rounds: int = 5,
) -> dict[str, Any]:
    """Seconds a position of search and of the teacher pass over the same positions, and what building the index took.

    Args:
        reader: The teacher.
        split: What it read; its positions are the first of `keys`.
        keys: All entries.
        config: Settings of the index.
        k: Neighbours of a target.
        batch: Positions a round, about.
        rounds: How often each side is timed.

    Raises:
        WrongAnswerError: As `prove_search`, and where faiss finds something else.
    """
    start = time.perf_counter()
    index = INDEXES[config.index_kind(len(keys))].build(keys, config)
    built = time.perf_counter()
    recall = tune_nprobe(index, keys, config)
    tuned = time.perf_counter()
    first = len(split) // 2
    end = int(np.searchsorted(split.position_starts, split.position_starts[first] + batch))
    positions = np.arange(split.position_starts[first], split.position_starts[min(end, len(split))])
    queries = keys.gather(positions)
    recall_as_timed = prove_search(index, keys, queries, positions, k, at_least=recall - _RECALL_SLACK)
    sides: dict[str, Any] = {
        "search": lambda: index.search(queries, k + 1),
        "teacher": lambda: read_keys(
            reader, split, range(first, min(end, len(split))), batch_tokens=DatastoreConfig().batch_tokens
        ),
    }
    if config.index == "ivf-flat":  # the same lists, so the same neighbours
        prove_same(index, queries, k)
        sides["faiss"] = lambda: through_faiss(index, queries, k)
    timing = interleave(sides, device=torch.device("cpu"), rounds=rounds, warmup=1)
    settings = index.describe()
    return {
        "entries": len(keys),
        "width": keys.shape[1],
        "index": settings,
        "k": k,
        "recall": round(recall, 4),
        "recall_as_timed": round(recall_as_timed, 4),
        "seconds_per_position": {name: timing.median(name) / len(positions) for name in sides},
        "search_over_teacher": round(timing.ratio("search", "teacher"), 4),
        "search_over_teacher_spread": timing.spread("search", "teacher"),
        **({"search_over_faiss": round(timing.ratio("search", "faiss"), 4)} if "faiss" in sides else {}),
        **({"search_over_faiss_spread": timing.spread("search", "faiss")} if "faiss" in sides else {}),
        "build_seconds": round(built - start, 1),
        "tuning_seconds": round(tuned - built, 1),
        "compared": compared(len(keys), settings),
        "rounds": rounds,
    }


def prove_search(
    index: Index,
    keys: Keys,
    queries: NDArray[np.float32],
    own: NDArray[np.int64],
    k: int,
    *,
    at_least: float,
    sample: int = 64,
) -> float:
    """Recall of all k neighbours, against float64, by the search that is timed: of all queries at once.

    Raises:
        WrongAnswerError: A position does not find itself; a distance is not that of its entry, does not ascend or comes
            twice; or recall is below `at_least`.
    """
    distances, ids = index.search(queries, k + 1)
    prove(float((ids != own[:, None]).all(1).mean()), 0.0, "positions that do not find themselves")
    rows = np.linspace(0, len(queries) - 1, min(sample, len(queries))).astype(int)
    scale = float((queries**2).sum(1).max())
    _, nearest = ExactIndex(keys, dtype=torch.float64).search(queries[rows], k + 1)
    found = 0
    for row, expected in zip(rows, nearest, strict=True):
        there = ids[row] >= 0
        exact = ((keys.gather(ids[row][there]).astype(np.float64) - queries[row]) ** 2).sum(-1)
        prove(float(np.abs(distances[row][there] - exact).max()), _TOLERANCE * scale, "distances of all neighbours")
        prove(float(-np.diff(distances[row][there]).min(initial=0)), 0.0, "neighbours that are not in order")
        prove(there.sum() - len(set(ids[row][there].tolist())), 0.0, "neighbours that come twice")
        found += len(set(ids[row].tolist()) & set(expected.tolist()))
    recall = found / nearest.size
    prove(at_least - recall, 0.0, "recall of the search that is timed, below that of the tuning")
    return recall


def through_faiss(index: Any, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """faiss's own search of the same lists."""
    coarse, probed = index.index.quantizer.search(queries - index.centre, index.index.nprobe)
    return index.index.search_preassigned(queries, k + 1, probed, coarse)


def prove_same(index: Index, queries: NDArray[np.float32], k: int) -> None:
    """Raise unless faiss finds the same neighbours, but for some that are equally near.

    Raises:
        WrongAnswerError: It does not.
    """
    ours, theirs = index.search(queries, k + 1)[1], through_faiss(index, queries, k)[1]
    same = [len(set(a) & set(b)) / len(b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    prove(1 - float(np.mean(same)), 0.002, "neighbours that faiss finds otherwise")


# --- what the rows say ------------------------------------------------------------------------------------------------


def speed(rows: Sequence[Mapping[str, Any]], *, judged: bool, **more: Any) -> dict[str, Any]:
    """Search over teacher pass in the smaller datastore, by the index that the library chooses."""
    row = rows[0]
    return bar_line(
        "target_search/0.2M",
        row["search_over_teacher"],
        at_most=BAR,
        judged=judged,
        rows=[dict(r) for r in rows],
        **more,
    )


def against_faiss(rows: Sequence[Mapping[str, Any]], *, judged: bool) -> dict[str, Any]:
    """Search of IVF-flat over faiss's of the same lists, in the larger datastore."""
    flat = [row for row in rows if "search_over_faiss" in row]
    ratios = {row["entries"]: row["search_over_faiss"] for row in flat}
    return bar_line("target_search/faiss", flat[-1]["search_over_faiss"], at_most=BAR, judged=judged, by_entries=ratios)


def growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Search in the larger over the smaller datastore."""
    seconds = {
        kind: [row["seconds_per_position"]["search"] for row in rows if row["index"]["kind"] == kind]
        for kind in ("ivf-flat", "ivf-pq")
    }
    ratios = {kind: round(found[-1] / found[0], 4) for kind, found in seconds.items()}
    return bar_line("target_search/growth", ratios["ivf-flat"], by_kind=ratios, seconds_per_position=seconds)


def projection(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Search over teacher pass with 100M entries, all of them searched, and memory, disk and time there and at 5B.

    The index is the library's choice at such sizes, codes re-ranked by the keys on disk. Seconds a position are those
    of the largest datastore measured, times the vectors that a query is compared with over those there.
    """
    row = [row for row in rows if row["index"]["kind"] == "ivf-pq"][-1]
    seconds, code = row["seconds_per_position"], row["index"]["code_bytes"]
    found = []
    for entries in PROJECTED:
        nlist = default_nlist(entries)
        index = {"kind": "ivf-pq", "nlist": nlist, "nprobe": row["index"]["nprobe"]}
        search = seconds["search"] * max(1.0, compared(entries, index) / row["compared"])
        found.append(
            {
                "entries": entries,
                "nlist": nlist,
                "memory_bytes": entries * (code + 8) + 4 * row["width"] * nlist,
                "disk_bytes": entries * (code + 8 + 4) + 4 * row["width"] * nlist,
                "disk_bytes_of_keys": entries * 2 * row["width"],
                "search_days": round(entries * search / 86_400, 1),
                "teacher_days": round(entries * seconds["teacher"] / 86_400, 1),
                "search_over_teacher": round(search / seconds["teacher"], 2),
            }
        )
    return bar_line(
        "target_search/projected",
        found[0]["search_over_teacher"],
        projections=found,
        assumption="this machine; as many lists searched as tuned at the largest size; codes and ids in memory; keys on"
        " disk read at the speed of memory",
    )
