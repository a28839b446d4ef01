"""Without keys an index and its values take at most 100 bytes a token on disk; what targets take is told."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import bar_line, prove
from benchmarks.stage_memory import write_documents, write_teacher
from memlm import build_corpus, build_datastore, build_targets
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import INDEX_FILE
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
    """A line for a datastore with `keep_keys` false, and one for targets at 90, 99 and 99.9% mass."""
    with tempfile.TemporaryDirectory(prefix="memlm-disk-") as scratch:
        yield datastore_line(Path(scratch), 2000 if quick else ENTRIES, 32 if quick else WIDTH, judged=not quick)
    with tempfile.TemporaryDirectory(prefix="memlm-disk-") as scratch:
        yield targets_line(Path(scratch), quick=quick)


def datastore_line(work: Path, tokens: int, width: int, *, judged: bool) -> dict[str, Any]:
    """Bytes a token of index and values; a random teacher will do, for codes are as long whatever they stand for."""
    write_documents(work / "documents.txt", tokens)
    write_teacher(work / "teacher", width=width)
    corpus = CorpusConfig(document_separator="\n", validation_fraction=0, test_fraction=0)
    build_corpus([str(work / "documents.txt")], tokenizer=str(work / "teacher"), out=work / "corpus", config=corpus)
    config = DatastoreConfig(keep_keys=False, train_vectors=65_536, nprobe=8)
    manifest = build_datastore(work / "corpus", teacher=str(work / "teacher"), out=work / "datastore", config=config)
    files = {name: file.bytes for name, file in manifest.payload.items() if not name.startswith("corpus/")}
    prove(len(set(files) ^ {INDEX_FILE, "values.npy"}), 0, "files beside index and values")
    store = Datastore(work / "datastore")
    prove(abs(store.n_entries - len(store.values)), 0, "values against entries")
    index = manifest.facts["index"]
    return bar_line(
        "disk/datastore",
        sum(files.values()) / store.n_entries,
        at_most=BAR,
        judged=judged,
        bytes_per_token={name: round(size / store.n_entries, 2) for name, size in files.items()},
        of_centroids=round(4 * width * index["nlist"] / store.n_entries, 2),  # falls with the root of the entries
        released_code=2 * width + 64,
        entries=store.n_entries,
        width=width,
        index=index,
    )


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
