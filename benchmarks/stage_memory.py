"""A stage needs at most 16 bytes more for each token of a larger corpus, beside the index that it holds."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.models import llama_config, random_model
from benchmarks.report import bar_line
from memlm import build_corpus, build_datastore, build_targets, train_memory
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import INDEX_FILE
from memlm.errors import MemlmError
from memlm.targets.config import TargetsConfig
from memlm.train.config import TrainConfig

STAGES = ("corpus", "datastore", "targets", "train")
TOKENS = (1_000_000, 4_000_000)
BAR = 16.0  # bytes a token
_VOCABULARY = 2000
_DOCUMENT = (200, 1800)  # words
_INTERVAL = 0.002


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A line for each stage: bytes by which its peak of anonymous memory grows with each token, from 1M to 4M.

    What the process held before the stage is taken off on both sides; `net_growth` is the larger over the smaller.

    The teacher is a random Llama of 2 layers and width 32. Every stage runs in a process of its own, on the CPU, with
    its default settings but for as many lists of the index and as many steps of training at both sizes. The index in
    memory is taken to be as large as its file. Folders are written below `$TMPDIR`, and deleted. Linux only.
    """
    if not Path("/proc/self/status").is_file():
        yield bar_line("stage_memory", None, at_most=BAR, note="skipped: /proc/self/status is read, which Linux has")
        return
    rows: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    for tokens in (2000, 4000) if quick else TOKENS:
        with tempfile.TemporaryDirectory(prefix="memlm-memory-") as scratch:
            work = Path(scratch)
            write_documents(work / "documents.txt", tokens)
            write_teacher(work / "teacher")
            for stage in STAGES:
                found = measure(stage, work, quick=True) if quick else in_own_process(stage, work)
                rows[stage].append({"tokens": tokens, **found})
    for stage, found in rows.items():
        small, large = (row["peak_bytes"] - row["start_bytes"] - row["index_bytes"] for row in found)
        more = found[1]["tokens"] - found[0]["tokens"]
        yield bar_line(
            f"stage_memory/{stage}",
            (large - small) / more,
            at_most=BAR,
            judged=not quick,
            net_bytes=[small, large],
            net_growth=round(large / small, 4) if small > 0 else None,
            rows=found,
        )


def write_documents(path: Path, tokens: int, *, seed: int = 0) -> None:
    """A text file of random words, a document a line, of `tokens` words in all or a few more."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        while tokens > 0:
            words = (_VOCABULARY * rng.random(rng.integers(*_DOCUMENT)) ** 2).astype(int)  # some often, some seldom
            file.write(" ".join(f"w{word}" for word in words) + "\n")
            tokens -= len(words)


def write_teacher(folder: Path, *, width: int = 32) -> None:
    """A random Llama of 2 layers with a tokenizer for those words."""
    config = llama_config(width, 2, 4, kv_heads=2, vocab_size=_VOCABULARY + 2)
    random_model(config, dtype=torch.float32, device=torch.device("cpu")).save_pretrained(folder)
    words = {word: id_ for id_, word in enumerate(["<unk>", "<eos>", *(f"w{i}" for i in range(_VOCABULARY))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)


def in_own_process(stage: str, work: Path) -> dict[str, Any]:
    """What `measure` finds in a fresh process.

    Raises:
        MemlmError: The stage failed.
    """
    command = [sys.executable, "-m", "benchmarks.stage_memory", stage, str(work)]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise MemlmError(f"stage_memory: stage {stage} ended with {found.returncode}")
    return json.loads(found.stdout.splitlines()[-1])


def measure(stage: str, work: Path, *, quick: bool = False) -> dict[str, Any]:
    """Anonymous memory of this process before a stage and at its peak, in bytes, and its index's size.

    Args:
        stage: One of `STAGES`; those before it have run in `work`.
        work: Folder with `documents.txt` and `teacher`.
        quick: Tiny sizes.
    """
    before = anonymous_bytes()
    with _Peak() as peak:
        _stage(stage, work, quick)()
    index = work / "datastore" / INDEX_FILE
    holds_index = stage in ("datastore", "targets") and index.is_file()
    return {
        "peak_bytes": peak.bytes,
        "start_bytes": before,
        "index_bytes": index.stat().st_size if holds_index else 0,
    }


def _stage(stage: str, work: Path, quick: bool) -> Callable[[], object]:
    teacher = str(work / "teacher")
    if stage == "corpus":
        held_out = {"max_validation_tokens": 20_000, "max_test_tokens": 20_000, "validation_fraction": 0.02}
        config = CorpusConfig.parse({"document_separator": "\n", "block_size": 512, "test_fraction": 0.02, **held_out})
        return lambda: build_corpus([str(work / "documents.txt")], tokenizer=teacher, out=work / stage, config=config)
    if stage == "datastore":
        lists = {"nlist": 8, "nprobe": 2} if quick else {"nlist": 8192, "nprobe": 8}
        config = DatastoreConfig.parse({"index": "ivf-flat", "train_vectors": 65_536, **lists})
        return lambda: build_datastore(work / "corpus", teacher=teacher, out=work / stage, config=config)
    if stage == "targets":
        config = TargetsConfig(k=8 if quick else 64)
        return lambda: build_targets(work / "datastore", out=work / stage, config=config)
    config = TrainConfig(max_steps=2 if quick else 100)
    return lambda: train_memory(work / "targets", init=teacher, out=work / stage, config=config)


def anonymous_bytes() -> int:
    """What this process holds in memory that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


class _Peak:
    """Watches this process's anonymous memory from a thread; `bytes` is the most there was."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous_bytes())
            if self._ended.wait(_INTERVAL):
                return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("work", type=Path)
    settings = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print(json.dumps(measure(settings.stage, settings.work)))
