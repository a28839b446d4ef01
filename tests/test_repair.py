"""Every stage makes the damaged files of its finished folder again, and nothing else that was dear."""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from interruption import files_written
from tiny_tokenizers import permuted
from transformers import PreTrainedTokenizerFast

from memlm.corpus.blocks import Corpus
from memlm.corpus.build import build_corpus
from memlm.corpus.config import CorpusConfig
from memlm.datastore import build as datastore_module
from memlm.datastore.build import build_datastore
from memlm.datastore.config import DatastoreConfig
from memlm.errors import ArtifactError, OutputExistsError
from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.manifest import Manifest, read_manifest
from memlm.memory.adapt import adapt_memory
from memlm.repair import repair_folder
from memlm.stage import Stage, StageSpec, run_stage
from memlm.targets.build import build_targets
from memlm.targets.config import TargetsConfig
from memlm.train import run as train_module
from memlm.train.config import TrainConfig
from memlm.train.run import train_memory

pytestmark = pytest.mark.slow

Run = Callable[..., Manifest]


@dataclasses.dataclass
class World:
    """A finished folder of each stage, and the command that made it."""

    tmp: Path
    made: dict[str, tuple[Path, Run]]

    def copy(self, stage: str) -> tuple[Path, Run]:
        folder, run = self.made[stage]
        return Path(shutil.copytree(folder, self.tmp / stage)), run


@pytest.fixture
def world(
    corpus_folder: Path,
    datastore_folder: Path,
    targets_folder: Path,
    memory_folder: Path,
    model_folder: str,
    documents: str,
    tmp_path: Path,
) -> World:
    split = CorpusConfig(document_separator="\n\n", block_size=32, validation_fraction=0.15, test_fraction=0.15)
    store = DatastoreConfig(dtype="float32", shard_positions=300)
    training = TrainConfig(epochs=1, batch_size=4, dtype="float32")

    def corpus(out: Path) -> Manifest:
        return build_corpus([documents], tokenizer=model_folder, out=out, config=split)

    def datastore(out: Path) -> Manifest:
        return build_datastore(corpus_folder, teacher=model_folder, out=out, config=store)

    def targets(out: Path) -> Manifest:
        settings = TargetsConfig(k=16, target_temperature=4.0)
        return build_targets(datastore_folder, out=out, config=settings)

    def memory(out: Path) -> Manifest:
        return train_memory(targets_folder, init=model_folder, out=out, config=training)

    made = {
        "corpus": (corpus_folder, corpus),
        "datastore": (datastore_folder, datastore),
        "targets": (targets_folder, targets),
        "memory": (memory_folder, memory),
    }
    return World(tmp_path, made)  # type: ignore[arg-type]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Name to inode and time of change."""
    files = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in files.items()}


DAMAGES = {
    "corpus tokens": ("corpus", flip, ("train.tokens.npy",)),
    "corpus tokenizer and names": ("corpus", Path.unlink, ("tokenizer/tokenizer.json", "test.names.txt")),
    "datastore keys": ("datastore", flip, ("keys/00001.npy",)),
    "datastore keys that are gone": ("datastore", Path.unlink, ("keys/00000.npy", "keys/00002.npy")),
    "datastore values": ("datastore", cut, ("values.npy",)),
    "datastore corpus": ("datastore", cut, ("corpus/train.tokens.npy",)),
    "datastore corpus's manifest": ("datastore", Path.unlink, ("corpus/manifest.json",)),
    "targets shard": ("targets", flip, ("train-00001.arrow",)),
    "targets validation": ("targets", cut, ("validation.arrow", "train-00000.arrow")),
    "memory card and settings": ("memory", flip, ("README.md", "memory.json", "config.json")),
    "memory tokenizer": ("memory", Path.unlink, ("tokenizer.json",)),
    "memory weights": ("memory", flip, ("model.safetensors",)),
}
DEAR = ("keys/", "train-", "model.safetensors", "train.tokens.npy", "train.offsets.npy")


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_damaged_is_named_and_made_again(world: World, case: str) -> None:
    stage, damage, names = DAMAGES[case]
    folder, run = world.copy(stage)
    before, whole = read_manifest(folder), states(folder)
    for name in names:
        damage(folder / name)
    said = repair_folder(folder)
    assert sorted(said[:-1]) == sorted(
        f"{folder / name} is damaged or missing; it is made again by the command below" for name in names
    )
    assert re.fullmatch(rf"now run the command that made {folder} again: {stage} of .*", said[-1])
    with pytest.raises(ArtifactError, match="is not finished: run the command that makes it again"):
        read_manifest(folder)
    assert run(folder) == before == read_manifest(folder)
    assert repair_folder(folder) == [f"{folder} is whole: its {len(before.payload)} files are what its manifest says"]
    after = states(folder)
    assert after.keys() == whole.keys()
    kept = [name for name in whole if name.startswith(DEAR) and name not in names]
    assert {name: after[name] for name in kept} == {name: whole[name] for name in kept}


def test_a_whole_folder_is_left_alone_and_a_damaged_one_too_without_repair(world: World) -> None:
    folder, run = world.copy("targets")
    before = states(folder)
    repair_folder(folder)
    assert states(folder) == before
    flip(folder / "train-00000.arrow")
    before = states(folder)
    run(folder)
    assert states(folder) == before
    (folder / "train-00000.arrow").unlink()
    with pytest.raises(ArtifactError, match=r"train-00000\.arrow is missing; run `memlm repair .*`, then the command"):
        run(folder)


def test_what_is_no_finished_folder_is_not_repaired(world: World) -> None:
    folder, _ = world.copy("targets")
    (folder / "train-00000.arrow").unlink()
    repair_folder(folder)
    with pytest.raises(ArtifactError, match="is not finished: run the command that makes it again"):
        repair_folder(folder)
    with pytest.raises(ArtifactError, match="does not exist"):
        repair_folder(world.tmp / "nothing")


def test_a_folder_in_another_is_repaired_with_the_whole(world: World) -> None:
    folder, run = world.copy("datastore")
    before = read_manifest(folder)
    cut(folder / "corpus" / "train.tokens.npy")
    with pytest.raises(ArtifactError, match=r"run `memlm repair .*/corpus`") as found:
        Corpus(folder / "corpus")
    inner = str(found.value).split("`")[1].removeprefix("memlm repair ")
    assert str(folder / "corpus" / "train.tokens.npy") in repair_folder(inner)[0]
    assert run(folder) == before
    assert repair_folder(folder) == repair_folder(folder / "corpus")


def test_a_folder_that_another_process_works_on_is_not_repaired(world: World) -> None:
    folder, _ = world.copy("targets")
    flip(folder / "train-00000.arrow")
    with FileLock(folder / "lock"), pytest.raises(OutputExistsError, match="another process is writing"):
        repair_folder(folder)
    assert (folder / "train-00000.arrow").exists()


def test_weights_that_are_whole_are_not_trained_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run = world.copy("memory")
    (folder / "README.md").unlink()
    monkeypatch.setattr(train_module, "MemoryTrainer", None)
    repair_folder(folder)
    run(folder)
    assert (folder / "README.md").is_file()


@pytest.mark.slow
def test_codes_that_are_whole_are_not_made_again(
    corpus_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DatastoreConfig(dtype="float32", shard_positions=300, keep_keys=False, nlist=4, code_bytes=8)
    out = tmp_path / "codes"
    before = build_datastore(corpus_folder, teacher=model_folder, out=out, config=config)
    flip(out / "index.faiss")
    repair_folder(out)
    assert build_datastore(corpus_folder, teacher=model_folder, out=out, config=config) == before
    assert set(states(out)) == {*before.payload, "manifest.json", "run.json", "corpus/manifest.json", "corpus/run.json"}
    cut(out / "values.npy")
    repair_folder(out)
    monkeypatch.setattr(datastore_module, "load_teacher", None)
    assert build_datastore(corpus_folder, teacher=model_folder, out=out, config=config) == before


def test_a_repair_that_is_stopped_goes_on_with_the_same_command(world: World) -> None:
    folder, run = world.copy("targets")
    before, whole = read_manifest(folder), states(folder)
    for number in (0, 1):
        flip(folder / f"train-0000{number}.arrow")
    repair_folder(folder)
    with files_written("train-*", most=1):
        run(folder)
    made = states(folder)["train-00000.arrow"]
    assert run(folder) == before
    after = states(folder)
    assert after["train-00000.arrow"] == made
    assert after["train-00002.arrow"] == whole["train-00002.arrow"]


@pytest.mark.parametrize("moment", ["a file removed", "all but the manifest put aside"])
def test_a_repair_killed_in_its_middle_goes_on(world: World, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, run = world.copy("targets")
    before = read_manifest(folder)
    for number in (0, 1):
        flip(folder / f"train-0000{number}.arrow")

    remove, replace = Path.unlink, os.replace

    def killed(*at: Path | str) -> None:
        if moment == "a file removed" or Path(at[1]).name == "previous.json":
            raise KeyboardInterrupt
        replace(*at)

    with monkeypatch.context() as patch:
        if moment == "a file removed":
            patch.setattr(
                Path, "unlink", lambda path, **how: (remove(path, **how), path.suffix == ".arrow" and killed(path))
            )
        else:
            patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            repair_folder(folder)
    with pytest.raises(ArtifactError, match=r"train-0000.\.arrow is missing; run `memlm repair"):
        run(folder)
    repair_folder(folder)
    assert run(folder) == before
    assert len(repair_folder(folder)) == 1


def test_a_file_that_comes_out_otherwise_is_an_error(tmp_path: Path) -> None:
    def build(text: str) -> Manifest:
        def work(stage: Stage) -> dict:
            if not stage.has("a.txt"):
                stage.save_text("a.txt", text)
            return {}

        return run_stage(tmp_path / "out", StageSpec("corpus", {}, {}, None), work)

    build("one")
    (tmp_path / "out" / "a.txt").unlink()
    repair_folder(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"a\.txt came out otherwise than before its repair.*; delete .*out and"):
        build("two")
    (tmp_path / "out" / "a.txt").unlink()
    assert build("one").payload["a.txt"].bytes == 3


def test_a_link_is_replaced_and_what_it_leads_to_is_left(world: World) -> None:
    folder, run = world.copy("targets")
    shard = folder / "train-00001.arrow"
    outside = Path(shutil.move(shard, world.tmp / "outside.arrow"))
    content = outside.read_bytes()
    shard.symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"train-00001\.arrow is a link that leads out of its folder"):
        read_manifest(folder)
    repair_folder(folder)
    run(folder)
    assert not shard.is_symlink()
    assert shard.read_bytes() == outside.read_bytes() == content


def test_what_is_not_of_the_folder_stops_a_repair_that_would_lose_it(world: World) -> None:
    folder, _ = world.copy("targets")
    flip(folder / "train-00001.arrow")
    (folder / "notes.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"notes\.txt is not of this folder; move it elsewhere"):
        repair_folder(folder)
    assert (folder / "notes.txt").read_text() == "years of work"


def test_an_adapted_memory_is_repaired(memory_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    permuted(tokenizer, seed=1)[0].save_pretrained(tmp_path / "other")
    out = tmp_path / "adapted"
    before = adapt_memory(memory_folder, tokenizer=str(tmp_path / "other"), out=out)
    for name in ("model.safetensors", "README.md"):
        flip(out / name)
    repair_folder(out)
    assert adapt_memory(memory_folder, tokenizer=str(tmp_path / "other"), out=out) == before


def test_scores_and_evaluation_are_repaired(
    corpus_folder: Path, memory_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLM_HOME", str(tmp_path / "home"))

    def evaluate() -> dict:
        return evaluate_perplexity(
            corpus_folder,
            base=model_folder,
            memory=str(memory_folder),
            out=tmp_path / "e",
            config=EvaluateConfig(dtype="float32", bootstrap=20),
        )

    report = evaluate()
    before = read_manifest(tmp_path / "e")
    scores = next((tmp_path / "home" / "scores").glob("*/entropy.npy")).parent
    flip(tmp_path / "e" / "report.json")
    flip(scores / "entropy.npy")
    with pytest.raises(ArtifactError, match=rf"entropy\.npy is damaged: .* run `memlm repair {scores}`"):
        evaluate()
    for folder in (tmp_path / "e", scores):
        assert len(repair_folder(folder)) == 2
    assert evaluate() == report
    assert [len(repair_folder(folder)) for folder in (tmp_path / "e", scores)] == [1, 1]
    assert read_manifest(tmp_path / "e") == before


def test_files_that_are_elsewhere_too_keep_their_mode_and_bytes_there(world: World, tmp_path: Path) -> None:
    folder, run = world.copy("targets")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere, copy_function=os.link)
    damaged = folder / "validation.arrow"
    for path in elsewhere.rglob("*"):
        if path.is_file():
            path.chmod(0o600)
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)  # there too
    before = {path: (path.stat().st_mode, path.read_bytes()) for path in elsewhere.rglob("*") if path.is_file()}
    assert "is damaged" in repair_folder(folder)[0]
    run(folder)
    assert {path: (path.stat().st_mode, path.read_bytes()) for path in before} == before
    assert not [path for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink > 1]
