"""Training through the mixture: what the base says of the training text, and what comes of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruption import files_written, interrupted_after
from safetensors.torch import load_file

from memlm.errors import ConfigError, ModelError
from memlm.files import cache_dir
from memlm.memory.loading import load_memory
from memlm.models.loading import load_causal_lm
from memlm.repair import repair_folder
from memlm.train import beside as beside_module
from memlm.train.beside import WithBase, base_on_rows
from memlm.train.config import TrainConfig
from memlm.train.data import TrainingData
from memlm.train.run import train_memory

pytestmark = pytest.mark.slow

QUICK = {"dtype": "float32", "max_steps": 4, "batch_size": 4, "objective": "mixture"}


@pytest.mark.parametrize("with_targets", [True, False])
@pytest.mark.parametrize("shard_positions", [1, 200, 65_536])
def test_rows_carry_what_the_base_says_of_labels_and_targets(
    targets_folder: Path, model_folder: str, with_targets: bool, shard_positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside_module, "_SHARD_POSITIONS", shard_positions)
    monkeypatch.setattr(beside_module, "_LOGITS", 3000)
    data = TrainingData(targets_folder, with_targets=with_targets)
    model = load_causal_lm(model_folder, dtype=torch.float32)
    batch_tokens = 90 + shard_positions % 9  # another folder of the cache for each
    folder = base_on_rows(data, model_folder, dtype=torch.float32, batch_tokens=batch_tokens, load_base=lambda: model)
    rows = WithBase(data.train, folder)
    assert len(rows) == len(data.train) > 3
    for number in range(len(rows)):
        row = rows[number]
        tokens, labels = row["input_ids"], row["labels"]
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, :, : data.vocab_size]
        log_probs = logits.log_softmax(-1).numpy()
        places = np.flatnonzero(labels[1:] >= 0)
        np.testing.assert_allclose(row["base_labels"], log_probs[places, labels[places + 1]], rtol=1e-4, atol=1e-5)
        assert ("base_targets" in row) == with_targets
        if with_targets:
            owner = places.repeat(row["target_counts"])
            expected = log_probs[owner, row["target_ids"]]
            np.testing.assert_allclose(row["base_targets"], expected, rtol=2e-3, atol=1e-3)  # float16


def test_what_the_base_says_is_computed_once(
    targets_folder: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TrainingData(targets_folder, with_targets=True)
    model = load_causal_lm(model_folder, dtype=torch.float32)

    def find(load: Any) -> Path:
        return base_on_rows(data, model_folder, dtype=torch.float32, batch_tokens=64, load_base=load)

    first = find(lambda: model)
    assert first.is_relative_to(cache_dir())
    assert find(lambda: pytest.fail("it is there")) == first


def test_a_stopped_pass_goes_on_after_its_last_shard(
    targets_folder: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside_module, "_SHARD_POSITIONS", 100)
    data = TrainingData(targets_folder, with_targets=True)
    model = load_causal_lm(model_folder, dtype=torch.float32)

    def find() -> Path:
        return base_on_rows(data, model_folder, dtype=torch.float32, batch_tokens=96, load_base=lambda: model)

    read: list[range] = []
    original = beside_module._read_shard

    def watched(rows: Any, voter: Any, numbers: range, *args: Any) -> Any:
        read.append(numbers)
        return original(rows, voter, numbers, *args)

    monkeypatch.setattr(beside_module, "_read_shard", watched)
    with files_written("targets-*", most=2):
        find()
    stopped = list(read)
    find()
    assert len(stopped) == 3
    assert set(read[3:]).isdisjoint(stopped[:2]), "what was finished is not read again"


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_it_trains_and_leaves_its_confidence_behind(
    targets_folder: Path, model_folder: str, tmp_path: Path, kl_weight: float
) -> None:
    config = TrainConfig(kl_weight=kl_weight, mixture_share=0.7, **QUICK)
    facts = train_memory(targets_folder, init=model_folder, out=tmp_path / "m", config=config).facts
    alone = TrainConfig(kl_weight=kl_weight, **{**QUICK, "objective": "imitation"})
    other = train_memory(targets_folder, init=model_folder, out=tmp_path / "alone", config=alone).facts
    logged = facts["training"][-1]
    assert 0 < logged["mixture_nats"] < logged["cross_entropy_nats"] + 0.7, "one half of it is the memory"
    assert "mixture_nats" not in other["training"][-1]
    assert facts["parameters"] == other["parameters"]
    state, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "alone"))
    assert state.keys() == plain.keys()
    assert any(not torch.equal(state[name], plain[name]) for name in state)
    assert load_memory(tmp_path / "m").training_confidence is None


def test_an_mlp_memory_is_trained_so_too(targets_folder: Path, model_folder: str, tmp_path: Path) -> None:
    config = TrainConfig(kind="mlp", layers=1, **QUICK)
    facts = train_memory(targets_folder, base=model_folder, out=tmp_path / "m", config=config).facts
    assert facts["training"][-1]["mixture_nats"] > 0
    assert not [name for name in load_file(tmp_path / "m" / "model.safetensors") if "confidence" in name]


def test_a_stopped_run_goes_on_to_the_same_bytes(targets_folder: Path, model_folder: str, tmp_path: Path) -> None:
    config = TrainConfig(**{**QUICK, "max_steps": None}, epochs=2, validations=2)
    train_memory(targets_folder, init=model_folder, out=tmp_path / "whole", config=config)
    with interrupted_after(4):
        train_memory(targets_folder, init=model_folder, out=tmp_path / "stopped", config=config)
    train_memory(targets_folder, init=model_folder, out=tmp_path / "stopped", config=config)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_base_that_gives_no_finite_score_is_named(targets_folder: Path, model_folder: str) -> None:
    model = load_causal_lm(model_folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    data = TrainingData(targets_folder, with_targets=True)
    with pytest.raises(ModelError, match=r"no finite score at [0-9,]+ of [0-9,]+ training positions"):
        base_on_rows(data, model_folder, dtype=torch.float32, batch_tokens=77, load_base=lambda: model)


def test_another_objective_is_another_run() -> None:
    assert "objective" not in TrainConfig().model_dump(), "folders of earlier versions are still recognised"
    assert TrainConfig(objective="mixture").model_dump()["mixture_share"] == 0.5
    with pytest.raises(ConfigError, match="objective"):
        TrainConfig.parse({"objective": "mixtures"})


@pytest.mark.parametrize("kind", ["labels", "targets"])
def test_what_the_base_says_can_be_repaired(
    kind: str, corpus_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLM_HOME", str(tmp_path / "home"))
    how: dict[str, Any] = {"init": model_folder, "objective": "mixture", "max_steps": 1, "dtype": "float32"}
    train_memory(corpus_folder, out=tmp_path / "a", **how)
    [folder] = (cache_dir() / "base-rows").iterdir()
    damaged = folder / f"{kind}-00000.npy"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 255]) if content else b"")
    repair_folder(folder)
    train_memory(corpus_folder, out=tmp_path / "b", **how)
    assert damaged.read_bytes() == content
