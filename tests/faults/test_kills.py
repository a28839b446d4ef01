"""kill -9 at any moment of any stage, then the same command: the same bytes, and nothing whole is made twice."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import pytest
from killing import STAGES, Fault, Runs, content, forking

pytestmark = pytest.mark.slow

SEEDS = range(int(os.environ.get("MEMLM_KILL_SEEDS", "3")))
"""Each is one case of every stage; a longer hunt sets the number."""

WHOLE = (
    "out/raw/*.names.txt",  # the last file of each shard
    "out/keys/*.npy",
    "out/train-*.arrow",
    "out/checkpoints/*/whole",
    "home/scores/*/manifest.json",
)
"""What stands for work that is not to be done again, once it has its name."""


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with forking(request, tmp_path_factory.mktemp("runs")) as running:
        yield running


def kills_survived(runs: Runs, stage: str, folder: Path, kills: list[Fault]) -> int:
    """How often a stage was killed that gave in the end what it always gives, and did nothing twice."""
    killed = sum(runs.stage(stage, folder, kill).status == -SIGKILL for kill in kills)
    whole = {path.relative_to(folder).as_posix() for pattern in WHOLE for path in folder.glob(pattern)}
    resumed = runs.stage(stage, folder)
    assert (resumed.status, resumed.said) == (0, "")
    assert content(folder) == runs.expected(stage)[1]
    assert not whole & resumed.made
    return killed


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_goes_on_and_gives_the_same_bytes(runs: Runs, stage: str, seed: int, tmp_path: Path) -> None:
    """Kills come by the clock or just before a change of the folder, two of them in every third case."""
    rng = random.Random(f"{stage} {seed}")
    whole_run, _ = runs.expected(stage)
    kills = [
        Fault(before=rng.randint(1, whole_run.changes))
        if (seed + number) % 2
        else Fault(after=rng.uniform(0.02, 0.95) * whole_run.seconds)
        for number in range(2 if seed % 3 == 2 else 1)
    ]
    print(f"{stage}, seed {seed}: {kills}")
    for attempt in range(5):
        if kills_survived(runs, stage, tmp_path / str(attempt), kills):
            return
        kills = [Fault(after=kill.after / 2) for kill in kills if kill.after is not None]  # it was faster this time
    pytest.fail("it was never killed")


def test_a_folder_goes_on_from_before_each_of_its_changes(runs: Runs, tmp_path: Path) -> None:
    """Every moment that a folder can tell from another, with the smallest of stages."""
    for number in range(1, runs.expected("folder")[0].changes + 1):
        assert kills_survived(runs, "folder", tmp_path / str(number), [Fault(before=number)]) == 1
