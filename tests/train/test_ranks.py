"""Two processes that train one memory together, as a launcher would start them."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memlm.manifest import Manifest, read_manifest
from memlm.ranks import Ranks
from memlm.stage import locked
from memlm.train.data import TrainingData
from memlm.train.run import plan_memory, train_memory

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"dtype": "float32", "max_steps": 4, "seed": 3, "warmup": 0, "learning_rate": 0.01}
QUICK = [f"--{name.replace('_', '-')}={value}" for name, value in {**SETTINGS, "batch_size": 2}.items()]


@contextlib.contextmanager
def two_ranks(*line: object, second: tuple[object, ...] = ()) -> Iterator[list[subprocess.Popen[str]]]:
    """A command on two ranks, each the first of its own machine; both are ended after the block.

    Args:
        line: The command.
        second: The line of the second rank, where it is another.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [*map(str, words)],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, words in enumerate([line, second or line])
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def ended(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank."""
    return [(rank.returncode, *output) for rank in ranks for output in [rank.communicate(timeout=100)]]


def trained(program: Path, out: Path, *command: object) -> Manifest:
    """What two ranks made, of which the first alone told."""
    with two_ranks(program, "train", *command, "--out", out) as ranks:
        first, second = ended(ranks)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert first[1].startswith(str(out))
    assert first[2] == second[1] == second[2] == ""
    return read_manifest(out, "memory")


def refused(program: Path, *command: object, second: tuple[object, ...] = ()) -> str:
    """The one line of a command that fails, told by the first rank."""
    with two_ranks(program, "train", *command, second=(program, "train", *second) if second else ()) as ranks:
        first, other = ended(ranks)
    assert first[0] == other[0] == 2, first[2] + other[2]
    assert first[1] == other[1] == other[2] == ""
    assert first[2].startswith("memlm: error: ")
    assert first[2].count("\n") == 1
    return first[2]


def assert_same(two: Path, one: Path, start: Path | None = None) -> None:
    """The weights of two memories are the same but for rounding; those of `start` are others."""
    ours, expected = (load_file(folder / "model.safetensors") for folder in (two, one))
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-4, rtol=1e-3)
    if start is not None:
        before = load_file(start / "model.safetensors")
        assert all(float((expected[name] - before[name]).abs().max()) > 0.01 for name in expected)


def test_two_ranks_train_what_one_trains_with_batches_twice_as_large(
    targets_folder: Path, model_folder: str, program: Path, tmp_path: Path
) -> None:
    two = trained(program, tmp_path / "two", targets_folder, "--init", model_folder, *QUICK)
    one = train_memory(targets_folder, init=model_folder, out=tmp_path / "one", **SETTINGS, batch_size=4)
    assert_same(tmp_path / "two", tmp_path / "one", Path(model_folder))
    assert two.facts.keys() == one.facts.keys()
    assert two.facts["steps"] == one.facts["steps"]
    for ours, expected in zip(two.facts["training"], one.facts["training"], strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
    assert two.facts["validation"]["best"] == pytest.approx(one.facts["validation"]["best"], rel=1e-4)


_SWEEP = """
import sys, json
from memlm.train.run import plan_memory, train_memory
for settings in json.loads(sys.argv[1]):
    made = train_memory(**settings)
    again = train_memory(**settings)
    print(made.hash, again.hash)
"""


@pytest.mark.slow
def test_every_kind_of_training_on_two_ranks_is_that_on_one(
    corpus_folder: Path,
    targets_folder: Path,
    datastore_folder: Path,
    model_folder: str,
    python: str,
    tmp_path: Path,
) -> None:
    """All in one go, as a script does that calls the library; each a second time, when it is finished."""
    rows = len(TrainingData(targets_folder, with_targets=True).train)
    size = next(size for size in range(3, rows) if rows % (2 * size) == 1)  # the second rank has none in the last step
    mlp = {"kind": "mlp", "base": model_folder}
    kinds: dict[str, dict[str, Any]] = {
        "epoch": {"init": model_folder, "max_steps": None, "epochs": 1, "batch_size": size},
        "accumulated": {"init": model_folder, "accumulation": 2, "validations": 2},
        "mlp-stored": {**mlp, "activations": str(datastore_folder)},
        "mlp-online": mlp,
        "fine-tuned": {"init": model_folder, "data": str(corpus_folder), "kl_weight": 0},
    }
    kinds = {
        name: {"data": str(targets_folder), **SETTINGS, "batch_size": 2, **kind, "out": str(tmp_path / "two" / name)}
        for name, kind in kinds.items()
    }
    with two_ranks(python, "-c", _SWEEP, json.dumps(list(kinds.values()))) as ranks:
        (code, hashes, problems), other = ended(ranks)
    assert code == other[0] == 0, problems + other[2]
    assert hashes == other[1]
    for name, line in zip(kinds, hashes.splitlines(), strict=True):
        two = read_manifest(tmp_path / "two" / name)
        assert line.split() == [two.hash, two.hash]
        settings = kinds[name] | {"batch_size": 2 * kinds[name]["batch_size"], "out": tmp_path / "one" / name}
        one = train_memory(**settings)
        assert_same(tmp_path / "two" / name, tmp_path / "one" / name)
        assert (two.facts["steps"], two.facts["epochs"]) == (one.facts["steps"], one.facts["epochs"])
        assert two.facts["validation"]["best"] == pytest.approx(one.facts["validation"]["best"], rel=1e-3)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other_and_both_go_on_to_the_same_bytes(
    targets_folder: Path, model_folder: str, program: Path, tmp_path: Path
) -> None:
    command = [targets_folder, "--init", model_folder, *QUICK, "--max-steps", 60, "--validations", 6]
    whole = trained(program, tmp_path / "whole", *command)
    out = tmp_path / "killed"
    with two_ranks(program, "train", *command, "--out", out) as ranks:
        until = time.monotonic() + 60
        while not list(out.glob("checkpoints/*/whole")):
            assert time.monotonic() < until
            time.sleep(0.01)
        ranks[1].kill()
        told, line = ranks[0].communicate(timeout=30)
    assert (ranks[0].returncode, told) == (2, "")
    assert line == "memlm: error: another rank is gone; the same command goes on where this one was\n"
    assert (out / "plan.json").is_file()
    assert trained(program, out, *command).hash == whole.hash


@pytest.mark.slow
def test_what_one_rank_finds_wrong_ends_both_with_one_line(
    targets_folder: Path, model_folder: str, program: Path, tmp_path: Path
) -> None:
    settings = ["--init", model_folder, *QUICK, "--out", tmp_path / "memory"]
    targets = shutil.copytree(targets_folder, tmp_path / "targets")
    shard = targets / "train-00000.arrow"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    shard.write_bytes(damaged)
    assert f"{shard} is damaged" in refused(program, targets, *settings)
    assert not (tmp_path / "memory").exists()
    assert f"{shard} is damaged" in refused(program, targets_folder, *settings, second=(targets, *settings))
    (tmp_path / "memory").mkdir(exist_ok=True)
    with locked(tmp_path / "memory"):
        assert "another process is writing" in refused(program, targets_folder, *settings)


def test_a_memory_of_one_process_is_not_one_of_two(targets_folder: Path, model_folder: str) -> None:
    one, two = (plan_memory(targets_folder, init=model_folder, ranks=Ranks(0, count)).spec for count in (1, 2))
    assert two.config == one.config | {"processes": 2}
