"""Which checkpoint a run goes on from: one that is, to the last bit, what was written, and holds all it takes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from interruption import interrupted_after

from memlm.files import file_digest
from memlm.manifest import Manifest
from memlm.train import trainer
from memlm.train.config import TrainConfig
from memlm.train.run import train_memory
from memlm.train.trainer import last_whole_checkpoint

pytestmark = pytest.mark.slow

CONFIG = TrainConfig(
    max_steps=8, batch_size=2, dtype="float32", kl_weight=0, trainer={"eval_steps": 2, "save_steps": 2}
)


def flip(path: Path) -> None:
    """One bit in the middle of a file, whose size stays."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def uninterrupted(corpus_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return train_memory(corpus_folder, init=model_folder, out=tmp_path_factory.mktemp("whole") / "m", config=CONFIG)


@pytest.fixture
def interrupted(corpus_folder: Path, model_folder: str, tmp_path: Path) -> Path:
    with interrupted_after(7):
        train_memory(corpus_folder, init=model_folder, out=tmp_path / "m", config=CONFIG)
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("file", "harm", "fault"),
    [
        ("model.safetensors", flip, "the checksum of its model.safetensors is not what was written"),
        ("optimizer.pt", cut, "the checksum of its optimizer.pt"),
        ("scheduler.pt", cut, "the checksum of its scheduler.pt"),
        ("rng_state.pth", flip, "the checksum of its rng_state.pth"),
        ("trainer_state.json", cut, "the checksum of its trainer_state.json"),
        ("optimizer.pt", Path.unlink, "lacks files"),
        ("whole", cut, "its mark is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[-12:] else "",
)
def test_a_rotten_checkpoint_is_passed_over_for_the_one_before_it(
    corpus_folder: Path,
    model_folder: str,
    uninterrupted: Manifest,
    interrupted: Path,
    file: str,
    harm: Callable[[Path], None],
    fault: str,
) -> None:
    harm(interrupted / "checkpoints" / "checkpoint-6" / file)
    with pytest.warns(UserWarning, match=f"checkpoint-6 .*{fault}.*goes on from the one before it"):
        found = last_whole_checkpoint(interrupted / "checkpoints")
    assert found == str(interrupted / "checkpoints" / "checkpoint-4")
    resumed = train_memory(corpus_folder, init=model_folder, out=interrupted, config=CONFIG)
    assert resumed.hash == uninterrupted.hash


def test_a_checkpoint_whose_best_one_is_rotten_is_not_gone_on_from(interrupted: Path) -> None:
    newest, older = (interrupted / "checkpoints" / f"checkpoint-{step}" for step in (6, 4))
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps(state | {"best_global_step": 4}))
    mark_anew(newest)
    assert last_whole_checkpoint(interrupted / "checkpoints") == str(newest)
    flip(older / "model.safetensors")
    with (
        pytest.warns(UserWarning, match="checkpoint-6 refers to the best one, .*checkpoint-4, which is damaged"),
        pytest.warns(UserWarning, match="checkpoint-4 is damaged"),
    ):
        assert last_whole_checkpoint(interrupted / "checkpoints") is None


def test_a_checkpoint_without_an_optimizer_is_not_gone_on_from(interrupted: Path) -> None:
    """What `save_only_model` writes: weights alone."""
    for checkpoint in (interrupted / "checkpoints").iterdir():
        (checkpoint / "optimizer.pt").unlink()
        mark_anew(checkpoint)
    with pytest.warns(UserWarning, match=r"has no optimizer\*"):  # of both
        assert last_whole_checkpoint(interrupted / "checkpoints") is None


def mark_anew(checkpoint: Path) -> None:
    (checkpoint / "whole").unlink()
    trainer._mark_whole(checkpoint)


@pytest.mark.parametrize("best", ["4", "../outside", 4.5, True, -1, [4], {"a": 1}])
def test_a_checkpoint_that_calls_no_step_the_best_is_not_gone_on_from(interrupted: Path, best: object) -> None:
    newest = interrupted / "checkpoints" / "checkpoint-6"
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps(state | {"best_global_step": best}))
    mark_anew(newest)
    with pytest.warns(UserWarning, match="checkpoint-6 does not say which one is the best"):
        assert last_whole_checkpoint(interrupted / "checkpoints") == str(newest.with_name("checkpoint-4"))


@pytest.mark.parametrize("best", [None, 0])
def test_a_best_checkpoint_elsewhere_is_not_believed(
    interrupted: Path, corpus_folder: Path, model_folder: str, uninterrupted: Manifest, tmp_path: Path, best: int | None
) -> None:
    """Weights of a stranger's choice would become the memory."""
    outside = Path(shutil.copytree(interrupted / "checkpoints" / "checkpoint-4", tmp_path / "outside"))
    for checkpoint in (interrupted / "checkpoints").iterdir():
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        planted = {"best_model_checkpoint": str(outside), "best_global_step": best, "best_metric": 1e-9}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state | planted))
        mark_anew(checkpoint)
    opened = []
    load = safetensors.torch.load_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            safetensors.torch, "load_file", lambda path, *a, **k: opened.append(Path(path)) or load(path, *a, **k)
        )
        made = train_memory(corpus_folder, init=model_folder, out=interrupted, config=CONFIG)
    assert opened
    assert not [path for path in opened if path.is_relative_to(outside)]
    assert made.facts["steps"] == uninterrupted.facts["steps"]


def test_a_mark_that_names_files_elsewhere_is_no_mark(interrupted: Path) -> None:
    mark = interrupted / "checkpoints" / "checkpoint-6" / "whole"
    outside = mark.parents[2] / "outside.txt"
    outside.write_text("secret")
    held = json.loads(mark.read_text())
    for name in (str(outside), "../../outside.txt"):
        mark.write_text(json.dumps(held | {name: file_digest(outside)}))
        assert trainer._fault(mark.parent) == "names files outside of it"
