"""Full disks, lost inputs, signals, rivals: a clear line, an unharmed folder, and the same command goes on."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from killing import STAGES, Fault, Ran, Runs, content, forking
from torch.utils.data import get_worker_info

from memlm.errors import TrainingError
from memlm.manifest import read_manifest
from memlm.train import data as data_module
from memlm.train.config import TrainConfig
from memlm.train.run import train_memory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with forking(request, tmp_path_factory.mktemp("runs")) as running:
        yield running


def refused(ran: Ran, match: str) -> None:
    """The run ended with one line, on purpose."""
    assert ran.status == 2, ran.said
    assert len(ran.said.splitlines()) == 1, ran.said
    assert re.search(match, ran.said), ran.said


def goes_on(runs: Runs, stage: str, folder: Path) -> None:
    """The same command gives what it always gives."""
    ran = runs.stage(stage, folder)
    assert (ran.status, ran.said) == (0, "")
    assert content(folder) == runs.expected(stage)[1]


# --- the file system ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "share"), [*((stage, 0.4) for stage in STAGES), ("train-decoder", 1.2)])
def test_a_file_that_does_not_fit_is_named(runs: Runs, stage: str, share: float, tmp_path: Path) -> None:
    """A limit on file sizes fails a write in its middle, as a full disk does, whichever library writes.

    Nothing is larger than the largest file of a result but the optimizer's state, which torch writes.
    """
    runs.expected(stage)
    sizes = [path.stat().st_size for path in (runs.folder / stage / "out").rglob("*") if path.is_file()]
    ran = runs.stage(stage, tmp_path, Fault(file_limit=int(share * max(sizes))))
    refused(ran, rf"^{tmp_path}.*; .*, then the same command goes on where this one stopped$")
    goes_on(runs, stage, tmp_path)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Callable[[str], object]]:
    """A file system of its own on `folder`; yields what changes its options. Only root may mount one."""
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)

    try:
        mount(options)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", folder], check=True)


def datastore_command(runs: Runs, out: Path) -> list[Any]:
    shards = ("--shard-positions", 500, "--recall-k", 16, "--dtype", "float32")
    return ["datastore", runs.ingredients.corpus, "--teacher", runs.ingredients.model, *shards, "--out", out]


def test_a_full_disk(runs: Runs, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=300k") as remount:
        command = datastore_command(runs, tmp_path / "disk" / "d")
        refused(
            runs.command(command, tmp_path),
            rf"^memlm: error: {tmp_path}/disk/d.*(No space left|full).*, then the same command goes on",
        )
        shards = {p: p.stat().st_ino for p in (tmp_path / "disk" / "d" / "keys").iterdir()}
        assert shards
        remount("size=10m")
        assert runs.command(command, tmp_path).status == 0
        after = {p.name: p.stat().st_ino for p in (tmp_path / "disk" / "d" / "keys").iterdir()}
        assert all(after[path.name] == number for path, number in shards.items())


def test_a_folder_that_cannot_be_written(runs: Runs, tmp_path: Path) -> None:
    if os.geteuid():
        (tmp_path / "disk").mkdir(mode=0o555)
        refused(
            runs.command(datastore_command(runs, tmp_path / "disk" / "d"), tmp_path), "Permission denied; give perm"
        )
        return
    with mounted(tmp_path / "disk", "ro"):  # permissions do not bind root
        refused(
            runs.command(datastore_command(runs, tmp_path / "disk" / "d"), tmp_path),
            rf"^memlm: error: {tmp_path}/disk/d: Read-only file system; make it writable",
        )


@pytest.mark.parametrize(
    ("stage", "lost", "share"),
    [
        ("corpus", "documents", 0.1),
        ("datastore", "corpus", 0.2),
        ("datastore", "corpus", 0.8),
        ("datastore", "model", 0.6),
        ("datastore-extend", "small_datastore", 0.7),
        ("targets", "datastore", 0.3),
        ("train-decoder", "targets", 0.1),
        ("train-decoder", "model", 0.1),
        ("train-mlp", "datastore", 0.5),
        ("train-mlp-online", "model", 0.2),
        ("fine-tune", "corpus", 0.6),
        ("adapt", "memory", 0.1),
        ("evaluate", "corpus", 0.1),
        ("evaluate", "memory", 0.3),
    ],
)
def test_an_input_that_goes_away(runs: Runs, stage: str, lost: str, share: float, tmp_path: Path) -> None:
    """What was read or opened before does not matter; what is missed is named, and can be put back."""
    path = Path(getattr(runs.ingredients, lost))
    ran = runs.stage(stage, tmp_path, Fault(before=int(share * runs.expected(stage)[0].changes), lose=path))
    path.with_name("lost").rename(path)
    if ran.status:
        refused(ran, f"{path}")
    goes_on(runs, stage, tmp_path)


# --- others -------------------------------------------------------------------------------------------------------


def test_a_second_run_into_one_folder_is_refused_and_harms_nothing(runs: Runs, tmp_path: Path) -> None:
    command = datastore_command(runs, tmp_path / "out")
    half = runs.command(command, tmp_path, Fault(before=60))
    assert half.status == -signal.SIGKILL
    there = content(tmp_path / "out")
    with FileLock(tmp_path / "out" / "lock"):
        refused(
            runs.command(command, tmp_path),
            rf"^memlm: error: another process is writing {tmp_path}/out; wait for it or choose another output",
        )
        assert content(tmp_path / "out") == there
    assert runs.command(command, tmp_path).status == 0


def test_of_runs_that_start_at_once_one_wins(runs: Runs, tmp_path: Path) -> None:
    """The others are refused, or come late enough to find it done."""
    for number in range(20):
        ends = runs.race("folder", tmp_path / str(number), 4)
        for ran in ends:
            if ran.status:
                refused(ran, "^another process is writing ")
        assert any(ran.status == 0 for ran in ends)
        assert content(tmp_path / str(number)) == runs.expected("folder")[1]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # torch may be told of it while it opens files to count them
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_data_loader_worker_that_dies_is_told_and_training_goes_on(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = runs.ingredients
    trainer = {"dataloader_num_workers": 1, "save_steps": 3, "eval_steps": 3}
    config = TrainConfig(max_steps=8, batch_size=24, dtype="float32", trainer=trainer)

    def train(name: str) -> str:
        return train_memory(at.targets, init=at.dropout_model, base=at.model, out=tmp_path / name, config=config).hash

    def fetch(self: data_module.TargetRows, index: int) -> dict[str, Any]:
        fetched.append(index)
        if get_worker_info() is not None and len(fetched) > 150:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    fetched: list[int] = []
    original = data_module.TargetRows.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(data_module.TargetRows, "__getitem__", fetch)
        with pytest.raises(
            TrainingError, match=r"^DataLoader worker .* the same command goes on at the last checkpoint"
        ):
            train("m")
    assert (tmp_path / "m" / "checkpoints" / "checkpoint-3" / "whole").is_file()
    assert train("m") == train("other")
    assert read_manifest(tmp_path / "m").facts["steps"] == 8


# --- signals ------------------------------------------------------------------------------------------------------


def train_command(runs: Runs, folder: Path) -> list[Any]:
    at = runs.ingredients
    settings = ("--max-steps", 10, "--batch-size", 24, "--validations", 3, "--dtype", "float32")
    return ["train", at.targets, "--init", at.dropout_model, "--base", at.model, *settings, "--out", folder / "out"]


@pytest.fixture(scope="module")
def trained(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    """A training command that nothing befell, and where it worked."""
    folder = tmp_path_factory.mktemp("trained")
    ran = runs.command(train_command(runs, folder), folder)
    assert ran.status == 0, ran.said
    return ran, folder


@pytest.mark.parametrize("share", [0.1, 0.7])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_stopped_by_a_signal_says_how_to_go_on(
    runs: Runs, trained: tuple[Ran, Path], number: int, share: float, tmp_path: Path
) -> None:
    whole, expected = trained
    seconds = share * whole.seconds / 2
    for _ in range(5):
        stopped = runs.command(train_command(runs, tmp_path), tmp_path, Fault(after=seconds, signal=number))
        if stopped.status:
            break
        tmp_path, seconds = tmp_path / "again", seconds / 2  # it was faster this time
        tmp_path.mkdir()
    again = Fault(before=max(1, int(share * whole.changes / 2)), signal=number)  # the base's scores are there by now
    for ran in (stopped, runs.command(train_command(runs, tmp_path), tmp_path, again)):
        assert ran.status == 128 + number
        kept = r"(; .*/out keeps training up to step \d+ of 10)?"
        assert re.fullmatch(rf"memlm: stopped{kept}; the same command goes on where this one was", ran.said.strip())
    assert runs.command(train_command(runs, tmp_path), tmp_path).status == 0
    assert content(tmp_path) == content(expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_arrives_where_exceptions_are_dropped_stops_the_command(number: int) -> None:
    program = f"""
import os, signal, sys, time, typer
from memlm import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.01)

def command():
    Dropped()
    time.sleep(60)

cli.app = typer.Typer()
cli.app.command()(command)
sys.argv = ["memlm"]
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, timeout=50)
    assert ended.returncode == 128 + number
    assert ended.stderr.strip() == "memlm: stopped; the same command goes on where this one was"
