"""A stage's plan tells which folder it would make, without making it."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from memlm.corpus.build import plan_corpus
from memlm.corpus.config import CorpusConfig
from memlm.datastore.build import plan_datastore
from memlm.datastore.config import DatastoreConfig
from memlm.manifest import read_manifest
from memlm.runs import plan as plan_module
from memlm.runs.plan import make_step
from memlm.stage import Plan, Stage, StageSpec, run_stage
from memlm.targets.build import plan_targets
from memlm.targets.config import TargetsConfig
from memlm.train.config import TrainConfig
from memlm.train.run import plan_memory


def test_a_plan_has_the_identity_of_the_folder_that_it_would_make(
    corpus_folder: Path,
    datastore_folder: Path,
    targets_folder: Path,
    memory_folder: Path,
    model_folder: str,
    documents: str,
) -> None:
    split = CorpusConfig(document_separator="\n\n", block_size=32, validation_fraction=0.15, test_fraction=0.15)
    plans = {
        corpus_folder: plan_corpus([documents], tokenizer=model_folder, config=split),
        datastore_folder: plan_datastore(
            corpus_folder, teacher=model_folder, config=DatastoreConfig(dtype="float32", shard_positions=300)
        ),
        targets_folder: plan_targets(datastore_folder, config=TargetsConfig(k=16, target_temperature=4.0)),
        memory_folder: plan_memory(
            targets_folder, init=model_folder, config=TrainConfig(epochs=1, batch_size=4, dtype="float32")
        ),
    }
    for folder, plan in plans.items():
        assert plan.spec.identity == read_manifest(folder).identity
        assert plan.spec.sources == read_manifest(folder).sources


def test_a_step_that_another_process_makes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_LOOK_AGAIN", 0.01)
    spec, begun, said = StageSpec("corpus", config={}, inputs={}, tokenizer="t"), Event(), []

    def work(stage: Stage) -> dict[str, Any]:
        begun.set()
        while len(said) < 2:  # until the other has looked, and waits
            time.sleep(0.01)
        return {"made": "once"}

    with ThreadPoolExecutor(1) as other:
        first = other.submit(run_stage, tmp_path / "run" / "step", spec, work)
        assert begun.wait(10)
        found = make_step(tmp_path / "run" / "step", Plan(spec, lambda stage: pytest.fail("it is made")), said.append)
    assert first.result(10).facts == {"made": "once"}
    assert found == tmp_path / "run" / "step"
    assert [line.partition(" ")[0] for line in said[:2]] == ["step", "waiting:"]  # a third, unless it ends as we look
    assert "another process is writing" in said[1]


def test_a_step_whose_other_process_stops_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_LOOK_AGAIN", 0.01)
    spec, begun, said = StageSpec("corpus", config={}, inputs={}, tokenizer="t"), Event(), []

    def work(stage: Stage) -> dict[str, Any]:
        stage.save_text("half", "done")
        begun.set()
        while len(said) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    def rest(stage: Stage) -> dict[str, Any]:
        return {"half": stage.has("half")}

    with ThreadPoolExecutor(1) as other:
        first = other.submit(run_stage, tmp_path / "step", spec, work)
        assert begun.wait(10)
        make_step(tmp_path / "step", Plan(spec, rest), said.append)
    assert isinstance(first.exception(10), KeyboardInterrupt)
    assert read_manifest(tmp_path / "step").facts == {"half": True}
