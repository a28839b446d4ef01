"""Ten thousand damaged and forged folders, an eighth of them in the usual run: each is read, or refused in one line,
within bounds of memory and time."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from memlm.corpus.blocks import Corpus
from memlm.datastore.build import build_datastore
from memlm.datastore.config import DatastoreConfig
from memlm.manifest import read_manifest
from memlm.memory.mlp import FFNStyle, MLPMemory, MLPSettings
from memlm.scores.table import score_corpus
from memlm.stage import Stage, StageSpec, run_stage
from memlm.targets.build import build_targets
from memlm.targets.config import TargetsConfig

CASES = {
    "manifest": 2400,
    "manifest text": 800,
    "place": 400,
    "array": 1400,
    "arrow": 1600,
    "rows": 400,
    "index": 1400,
    "settings": 400,
    "weights": 400,
    "model config": 100,
    "tokenizer": 100,
    "damage": 600,
    "inner manifest": 200,
}
"""Kind of case to how many; seeds count from 0."""


@pytest.fixture(scope="module")
def root(corpus_folder: Path, memory_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder of every stage."""
    root = tmp_path_factory.mktemp("fuzz")
    whole = root / "whole"
    shutil.copytree(corpus_folder, whole / "corpus")
    shutil.copytree(memory_folder, whole / "decoder")
    stores = {"exact": {}, "flat": {"index": "ivf-flat"}, "codes": {"keep_keys": False, "code_bytes": 8}}
    for kind, settings in stores.items():  # few shards, so that a case is quick
        config = DatastoreConfig.parse({"dtype": "float32", "nlist": 6, "shard_positions": 2000, **settings})
        build_datastore(corpus_folder, teacher=model_folder, out=whole / kind, config=config)
    build_targets(whole / "exact", out=whole / "targets", config=TargetsConfig(k=8, target_temperature=4.0))
    shutil.copytree(corpus_folder, root / "reference")
    shutil.copytree(model_folder, root / "model")
    corpus = Corpus(root / "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLM_HOME", f"{root}/home")
        score_corpus(corpus, str(root / "model"), {}, dtype="float32")
    of_test = next(f for f in (root / "home" / "scores").iterdir() if read_manifest(f).config["split"] == "test")
    shutil.move(of_test, whole / "scores")
    write_mlp(whole / "mlp", corpus.vocab_size)
    return root


def write_mlp(out: Path, vocab_size: int) -> None:
    torch.manual_seed(0)
    settings = MLPSettings(
        kind="mlp",
        vocab_size=vocab_size,
        tap="model.layers.1.mlp",
        input_width=32,
        base_blocks=2,
        layers=2,
        width=16,
        ffn_width=24,
        style=FFNStyle(gated=True, bias=True, norm="rms", norm_eps=1e-5, activation="silu"),
    )

    def work(stage: Stage) -> dict[str, int]:
        MLPMemory(settings).save_pretrained(stage.path)
        return {"parameters": 1, "steps": 1}

    run_stage(out, StageSpec("memory", {}, {}, None), work)


@pytest.mark.slow
@pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.table)])
def test_no_folder_breaks_a_reader(root: Path, python: str, share: int) -> None:
    cases = {kind: count // share for kind, count in CASES.items()}
    assert sum(cases.values()) >= 10_000 // share
    script = Path(__file__).with_name("fuzzing.py")
    found = subprocess.run(
        [python, str(script), str(root)],
        input=json.dumps(cases),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    report = json.loads(found.stdout.splitlines()[-1])
    failures = [failure for kind in report.values() for failure in kind["failures"]]
    assert not failures, f"{len(failures)} cases failed:\n" + "\n".join(failures[:20])
    for kind, count in cases.items():
        outcomes = report[kind]["outcomes"]
        assert sum(outcomes.values()) == count, kind
        assert sum(outcomes.values()) - outcomes.get("read", 0) > count // 10, f"{kind}: hardly any change was found"
