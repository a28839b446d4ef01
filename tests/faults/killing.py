"""Stages and commands run in processes of their own, to be killed or hindered at a chosen moment.

The processes are forked from a server that has imported everything, so a run takes as long as its stage and no more.
"""

import gc
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_corpus, save_model, sentences
from tiny_tokenizers import sentencepiece_like
from tqdm import tqdm

from memlm.cli import main
from memlm.corpus.build import plan_corpus
from memlm.corpus.config import CorpusConfig
from memlm.datastore.build import build_datastore
from memlm.datastore.config import DatastoreConfig
from memlm.errors import MemlmError
from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.files import file_digest, is_half_written
from memlm.manifest import read_manifest
from memlm.memory.adapt import adapt_memory
from memlm.stage import Stage, StageSpec, run_stage
from memlm.targets.authors import plan_written
from memlm.targets.build import build_targets
from memlm.targets.config import TargetsConfig, WriteConfig
from memlm.train.config import TrainConfig
from memlm.train.run import train_memory

_MOVES = {"os.rename": 1, "os.mkdir": 0, "os.remove": None, "os.rmdir": None}
"""Audit events that change a folder, and which of their arguments is a name that comes into being."""


@dataclass(frozen=True)
class Ingredients:
    """What the stages read."""

    documents: str
    model: str
    dropout_model: str
    other_model: str
    corpus: Path
    small_datastore: Path
    datastore: Path
    targets: Path
    memory: Path


def prepare(request: pytest.FixtureRequest, folder: Path) -> Ingredients:
    """What the fixtures of all tests hold, and in `folder` what is needed beside."""
    at = request.getfixturevalue
    tokenizer = at("tokenizer")
    save_model(folder / "dropout", tokenizer, seed=2, attention_dropout=0.2)  # so that random states count
    other = sentencepiece_like(sentences(100, seed=3))
    save_model(folder / "other", other, seed=5)
    half = "\n\n".join(Path(at("documents")).read_text(encoding="utf-8").split("\n\n")[:40])
    (folder / "half.txt").write_text(half, encoding="utf-8")
    make_corpus(str(folder / "half.txt"), at("model_folder"), folder / "small")
    build_datastore(
        folder / "small", teacher=at("model_folder"), out=folder / "small-datastore", config=_index("ivf-flat")
    )
    return Ingredients(
        documents=at("documents"),
        model=at("model_folder"),
        dropout_model=str(folder / "dropout"),
        other_model=str(folder / "other"),
        corpus=at("corpus_folder"),
        small_datastore=folder / "small-datastore",
        datastore=at("datastore_folder"),
        targets=at("targets_folder"),
        memory=at("memory_folder"),
    )


def _index(index: Any, **settings: Any) -> DatastoreConfig:
    """Several shards, and an index that is trained and saved."""
    small = {"shard_positions": 500, "nlist": 8, "recall_k": 16, "recall_sample": 32}
    return DatastoreConfig(dtype="float32", index=index, **small, **settings)


def _folder(at: Ingredients, out: Path) -> None:
    def work(stage: Stage) -> dict[str, Any]:
        for number in range(3):
            for name in (f"keys/{number}.npy", f"scratch/{number}.npy"):
                if not stage.has(name):
                    stage.save_array(name, np.full(1000, number))
        stage.save_text("note.txt", "made again")
        return {}

    run_stage(out, StageSpec("datastore", {}, {}, None, intermediate=("scratch",)), work)


def _corpus(at: Ingredients, out: Path) -> None:
    config = CorpusConfig(document_separator="\n\n", block_size=32, near_duplicate_ngram=8)
    run_stage(out, *plan_corpus([at.documents], tokenizer=at.model, config=config, shard_characters=2000))


def _train(data: Path, out: Path, *, base: str, init: str | None, activations: Path | None = None, **more: Any) -> None:
    """Checkpoints after steps 4, 8, 12 and 15, logs after 5, 10 and 15: across an epoch and to the middle of one."""
    settings = {"max_steps": 15, "batch_size": 24, "dtype": "float32", "learning_rate": 5e-3, **more}
    config = TrainConfig(**settings, trainer={"eval_steps": 4, "save_steps": 4, "logging_steps": 5})
    train_memory(data, init=init, base=base, activations=activations, out=out, config=config)


def _write(at: Ingredients, out: Path) -> None:
    config = WriteConfig(times=2, document_tokens=24, batch_size=16, dtype="float32")
    run_stage(out, *plan_written(at.corpus, teacher=at.model, config=config, keep_seconds=0))


def _evaluate(at: Ingredients, out: Path) -> None:
    config = EvaluateConfig(dtype="float32", bootstrap=20)
    evaluate_perplexity(at.corpus, base=at.model, memory=str(at.memory), out=out, config=config)


STAGES: dict[str, Callable[[Ingredients, Path], object]] = {
    "folder": _folder,
    "corpus": _corpus,
    "datastore": lambda at, out: build_datastore(at.corpus, teacher=at.model, out=out, config=_index("ivf-flat")),
    "datastore-of-codes": lambda at, out: build_datastore(
        at.corpus, teacher=at.model, out=out, config=_index("ivf-pq", keep_keys=False, code_bytes=4)
    ),
    "datastore-extend": lambda at, out: build_datastore(at.corpus, extend=at.small_datastore, out=out),
    "targets": lambda at, out: build_targets(at.datastore, out=out, config=TargetsConfig(k=16, target_temperature=4.0)),
    "words": lambda at, out: build_targets(at.corpus, teacher=at.model, out=out, config=TargetsConfig(dtype="float32")),
    "write": _write,
    "train-decoder": lambda at, out: _train(at.targets, out, init=at.dropout_model, base=at.model),
    "train-mlp": lambda at, out: _train(
        at.targets, out, init=None, base=at.model, activations=at.datastore, kind="mlp", layers=2
    ),
    "train-mlp-online": lambda at, out: _train(at.targets, out, init=None, base=at.model, kind="mlp", layers=2),
    "fine-tune": lambda at, out: _train(at.corpus, out, init=at.dropout_model, base=at.model, kl_weight=0.0),
    "adapt": lambda at, out: adapt_memory(at.memory, tokenizer=at.other_model, out=out),
    "evaluate": _evaluate,
}
"""Name to what it reads and writes. Each is long enough, in files, to be stopped in its middle."""


@dataclass(frozen=True)
class Fault:
    """What befalls a run; nothing, unless told otherwise."""

    after: float | None = None
    """Seconds until it gets `signal`."""
    before: int | None = None
    """Number of the change (see `Ran`), from 1, before which it gets `signal`, or loses what it reads."""
    signal: int = signal.SIGKILL
    lose: Path | None = None
    """A folder that is moved away `before` a change, instead of a signal."""
    file_limit: int | None = None
    """Bytes that fit into a file, as if the disk were full then."""


@dataclass(frozen=True)
class Ran:
    """How a run ended, and what it did. Where a signal ended it, only `status` and `seconds` are known."""

    status: int
    """Exit status; minus the number of the signal that ended it."""
    seconds: float
    changes: int = 0
    """Files opened for writing, and files and folders made, renamed or removed."""
    made: frozenset[str] = frozenset()
    """Names of files and folders that came into being, below the folder of the run."""
    said: str = ""
    """Of a command what it wrote to stderr, of a stage the error it ended with."""


class Runs:
    """Runs stages and commands, each in a fresh process. Use `forking`."""

    def __init__(self, connection: Connection, ingredients: Ingredients, folder: Path) -> None:
        self._connection = connection
        self.ingredients = ingredients
        self.folder = folder
        self._expected: dict[str, tuple[Ran, dict[str, str]]] = {}

    def expected(self, name: str) -> tuple[Ran, dict[str, str]]:
        """A run of one of `STAGES` that nothing befalls, and the `content` that it leaves."""
        if name not in self._expected:
            ran = self.stage(name, self.folder / name)
            assert (ran.status, ran.said) == (0, "")
            self._expected[name] = ran, content(self.folder / name)
        return self._expected[name]

    def stage(self, name: str, folder: Path, fault: Fault = Fault(), *, ingredients: Ingredients | None = None) -> Ran:
        """Run one of `STAGES`, which writes below `folder` only: its output to `out`, its cache to `home`."""
        return self._run((name, ingredients or self.ingredients), folder, fault)[0]

    def command(self, arguments: list[Any], folder: Path, fault: Fault = Fault()) -> Ran:
        """Run `memlm ARGUMENTS`, with its cache in `home` below `folder`."""
        return self._run([str(argument) for argument in arguments], folder, fault)[0]

    def race(self, name: str, folder: Path, count: int) -> list[Ran]:
        """Run a stage so many times at once, into the same folder."""
        return self._run((name, self.ingredients), folder, Fault(), count)

    def _run(self, work: "_Work", folder: Path, fault: Fault, count: int = 1) -> list[Ran]:
        self._connection.send((work, folder, fault, count))
        answer = self._connection.recv()
        assert isinstance(answer, list), answer
        return answer


def content(folder: Path) -> dict[str, str]:
    """Every file below `folder` and its checksum; of a manifest its hash, and of times nothing.

    What a killed process leaves half-written in the cache is not gone on with, and not looked for.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith("home/") and is_half_written(path):
            continue
        if path.name == "manifest.json":
            found[name] = read_manifest(path.parent).hash
        elif not path.is_dir():
            found[name] = "" if path.name == "run.json" else file_digest(path)
    return found


@contextmanager
def forking(request: pytest.FixtureRequest, folder: Path) -> Iterator[Runs]:
    """A server of runs, ended with the `with` block; `folder` is for what it needs."""
    (folder / "ingredients").mkdir()
    (folder / "expected").mkdir()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    yield Runs(ours, prepare(request, folder / "ingredients"), folder / "expected")
    ours.send(None)
    server.join()


_Work = tuple[str, Ingredients] | list[str]


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is no garbage; no child looks at it, and so copies it
    tqdm.set_lock(threading.RLock())  # instead of semaphores, which a killed process leaves to be warned of
    while (request := connection.recv()) is not None:
        work, folder, fault, count = request
        try:
            children = [_fork(work, folder, fault) for _ in range(count)]
            if fault.after is not None:
                time.sleep(fault.after)
                os.kill(children[0].pid, fault.signal)
            connection.send([child.ended() for child in children])
        except Exception:
            connection.send(traceback.format_exc())


@dataclass
class _Child:
    pid: int
    answer: Connection
    started: float

    def ended(self) -> Ran:
        try:
            found = self.answer.recv()
        except EOFError:  # a signal ended it
            found = ()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.answer.close()
        return Ran(status, time.monotonic() - self.started, *found)


def _fork(work: _Work, folder: Path, fault: Fault) -> _Child:
    reader, writer = multiprocessing.Pipe(duplex=False)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os._exit(_work(work, folder, fault, writer))
    writer.close()
    return _Child(pid, reader, started)


def _work(work: _Work, folder: Path, fault: Fault, answer: Connection) -> int:
    """What a forked process does, and its exit status."""
    counted = _count_changes(folder, fault)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored
    os.environ["MEMLM_HOME"] = str(folder / "home")
    if fault.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_limit, fault.file_limit))
    status, said, stderr = 0, "", tempfile.TemporaryFile()  # noqa: SIM115
    os.dup2(stderr.fileno(), 2)
    try:
        if isinstance(work, list):
            sys.argv = ["memlm", *work]
            main()
        else:
            name, ingredients = work
            STAGES[name](ingredients, folder / "out")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except MemlmError as error:
        status, said = 2, str(error)
    except BaseException:
        status, said = 1, traceback.format_exc()
    if isinstance(work, list):
        sys.stderr.flush()
        stderr.seek(0)
        said += stderr.read().decode()
    answer.send((counted["changes"], frozenset(counted["made"]), said))
    return status


def _count_changes(folder: Path, fault: Fault) -> dict[str, Any]:
    """Fills `changes` and `made` as they happen, and brings about what is to happen before one of them."""
    counted: dict[str, Any] = {"changes": 0, "made": set()}
    root = os.fspath(folder) + os.sep

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            new = 0
        elif event in _MOVES:
            new = _MOVES[event]
        else:
            return
        if not os.fspath(arguments[0]).startswith(root):
            return
        counted["changes"] += 1
        if new is not None:
            counted["made"].add(os.fspath(arguments[new])[len(root) :])
        if counted["changes"] == fault.before:
            if fault.lose is not None:
                fault.lose.rename(fault.lose.with_name("lost"))
            else:
                os.kill(os.getpid(), fault.signal)

    sys.addaudithook(hook)
    return counted
