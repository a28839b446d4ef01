"""Two processes that train one memory together, as a launcher would start them."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from memlm.manifest import Manifest, read_manifest

QUICK = "--dtype float32 --max-steps 4 --batch-size 2 --seed 3".split()


@contextlib.contextmanager
def two_ranks(*command: object) -> Iterator[list[subprocess.Popen[str]]]:
    """`memlm COMMAND` on two ranks, each the first of its own machine; both are ended after the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    line = [sys.executable, "-m", "memlm", *map(str, command)]
    ranks = [
        subprocess.Popen(
            line,
            env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def ended(*command: object) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank of that command."""
    with two_ranks(*command) as ranks:
        return [(rank.returncode, *output) for rank in ranks for output in [rank.communicate(timeout=100)]]


def trained(*command: object) -> Manifest:
    """What two ranks made; the first alone told so."""
    first, second = ended("train", *command)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert first[1]
    assert first[2] == second[1] == second[2] == ""
    return read_manifest(command[command.index("--out") + 1], "memory")  # type: ignore[arg-type]


def test_two_ranks_train_what_one_trains_with_batches_twice_as_large(
    targets_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    command = [targets_folder, "--init", model_folder, *QUICK]
    manifest = trained(*command, "--out", tmp_path / "two")
    assert manifest.facts["steps"] == 4
