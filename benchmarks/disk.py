"""Without keys an index and its values take at most 100 bytes a token on disk; with keys, each is there once."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import bar_line, prove
from benchmarks.stage_memory import write_documents, write_teacher
from memlm import build_corpus, build_datastore, build_targets
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig, IndexKind
from memlm.datastore.store import Datastore
from memlm.runs.recipe import data_path
from memlm.targets.config import TargetsConfig

ENTRIES = 200_000
WIDTH = 576
TARGET_TOKENS = 50_000
MASSES = (0.9, 0.99, 0.999)
BAR = 100.0
_DOCUMENTS = "medquad/medquad.txt"


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Lines for datastores without keys and with, like beside like, and one for targets at 90, 99 and 99.9% mass."""
    with tempfile.TemporaryDirectory(prefix="memlm-disk-") as scratch:
        yield from datastore_lines(Path(scratch), 2000 if quick else ENTRIES, 32 if quick else WIDTH, quick=quick)
    with tempfile.TemporaryDirectory(prefix="memlm-disk-") as scratch:
        yield targets_line(Path(scratch), quick=quick)


def datastore_lines(work: Path, tokens: int, width: int, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Bytes a token on disk, without keys and with them, each over what the released code takes for the same.

    A random teacher will do, for codes are as long whatever they stand for.
    """
    write_documents(work / "documents.txt", tokens)
    write_teacher(work / "teacher", width=width)
    corpus = CorpusConfig(document_separator="\n", validation_fraction=0, test_fraction=0)
    build_corpus([str(work / "documents.txt")], tokenizer=str(work / "teacher"), out=work / "corpus", config=corpus)
    kinds_kept: tuple[tuple[IndexKind, bool], ...] = (("ivf-pq", False), ("ivf-pq", True), ("ivf-flat", True))
    for kind, kept in kinds_kept:
        out = work / f"{kind}-{kept}"
        config = DatastoreConfig(index=kind, keep_keys=kept, train_vectors=65_536, nprobe=8)
        manifest = build_datastore(work / "corpus", teacher=str(work / "teacher"), out=out, config=config)
        files = {name: file.bytes for name, file in manifest.payload.items() if not name.startswith("corpus/")}
        kinds = {name.partition("/")[0] for name in files}
        prove(len(kinds ^ {"index.faiss", "values.npy", *(["keys"] if kept and kind == "ivf-pq" else [])}), 0, "files")
        store = Datastore(out)
        ours = sum(files.values()) / store.n_entries
        if kept:
            prove(-ours, -2.0 * width, "keys that are nowhere")
            prove(ours, 3.9 * width, "keys that are there twice")
        released = released_bytes(store.n_entries, width, 16 if quick else 4096, keys=kept)
        more: dict[str, Any] = {"ratio_to_released": round(ours * store.n_entries / sum(released.values()), 4)}
        for part, sizes in (("bytes_per_token", files), ("released_bytes_per_token", released)):
            more[part] = _per_token(sizes, store.n_entries)
        index = manifest.facts["index"]
        more["of_centroids"] = round(4 * width * index["nlist"] / store.n_entries, 2)  # falls as the root of entries
        yield bar_line(
            f"disk/{kind} {'with' if kept else 'without'} keys",
            ours,
            **({} if kept else {"at_most": BAR}),
            judged=not quick,
            **more,
            entries=store.n_entries,
            width=width,
            index=index,
            recall=manifest.facts["recall"],
        )
        shutil.rmtree(out)


def _per_token(sizes: dict[str, int], entries: int) -> dict[str, float]:
    """By folder or file."""
    found: dict[str, float] = {}
    for name, size in sizes.items():
        part = name.partition("/")[0]
        found[part] = found.get(part, 0) + size / entries
    return {name: round(size, 2) for name, size in found.items()}


def released_bytes(entries: int, width: int, nlist: int, *, keys: bool) -> dict[str, int]:
    """Bytes of what the released code of Memory Decoder keeps for so many entries; headers are left out.

    Source: `save_pipeline.sh` (4,096 lists, codes of 64 bytes, ids of eight); keys float16 and values int32 in Arrow.
    """
    code = max(m for m in range(1, min(64, width) + 1) if width % m == 0)
    index = 4 * width * (nlist + 256) + 8 * nlist + (code + 8) * entries  # centroids, codebook, list sizes, lists
    return {"index.faiss": index, "values": 4 * entries, **({"keys": 2 * width * entries} if keys else {})}


def targets_line(work: Path, *, quick: bool) -> dict[str, Any]:
    """Bytes a token of targets, k = 1,024, by the mass they hold.

    SmolLM2 reads MedQuAD below `$MEMLM_DATA`; where that is missing, and in a quick run, a random teacher reads random
    words, which says nothing about language.
    """
    documents, teacher, separator = Path(data_path(_DOCUMENTS)), "smollm2", "\n\n"
    if quick or not documents.exists():
        documents, teacher, separator = work / "documents.txt", str(work / "teacher"), "\n"
        write_documents(documents, 4000 if quick else 2 * TARGET_TOKENS)
        write_teacher(work / "teacher")
    corpus = CorpusConfig(
        document_separator=separator, block_size=512, max_tokens=2000 if quick else TARGET_TOKENS, max_test_tokens=1000
    )
    build_corpus([str(documents)], tokenizer=teacher, out=work / "corpus", config=corpus)
    build_datastore(work / "corpus", teacher=teacher, out=work / "datastore")
    found = {}
    for mass in MASSES:
        config = TargetsConfig(k=16 if quick else 1024, target_mass=mass)
        manifest = build_targets(work / "datastore", out=work / f"targets-{mass}", config=config)
        size = sum(file.bytes for name, file in manifest.payload.items() if name.startswith("train-"))
        found[str(mass)] = {
            "bytes_per_token": round(size / manifest.facts["positions"], 1),
            "mean_support": manifest.facts["mean_support"],
        }
    largest = found[str(MASSES[-1])]["bytes_per_token"]
    return bar_line("disk/targets", largest, by_mass=found, text=documents.name, teacher=Path(teacher).name)
