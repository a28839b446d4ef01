"""Low-rank adapters in training, and which checkpoint is kept."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model
from interruption import interrupted_after
from safetensors.torch import load_file

from memlm.errors import ConfigError
from memlm.manifest import read_manifest
from memlm.models.adapters import beside_all_linear
from memlm.models.loading import load_causal_lm
from memlm.train.config import TrainConfig
from memlm.train.run import train_memory

pytestmark = pytest.mark.slow

LORA = {"dtype": "float32", "max_steps": 6, "batch_size": 4, "kl_weight": 0.0, "lora_rank": 2, "learning_rate": 1e-2}


def test_adapters_change_linear_layers_of_the_blocks_by_their_rank_alone(
    corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    manifest = train_memory(corpus_folder, init=model_folder, out=tmp_path / "m", **LORA)
    before = load_causal_lm(model_folder, dtype=torch.float32).state_dict()
    after = load_causal_lm(str(tmp_path / "m"), dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {n for n, w in before.items() if w.ndim == 2 and ".layers." in n}
    assert changed == linear
    for name in changed:
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[2] < 1e-5 * values[0]
    facts = manifest.facts
    assert facts["parameters"] == sum(p.numel() for p in load_causal_lm(model_folder).parameters())
    assert facts["trained_parameters"] == sum(2 * sum(before[name].shape) for name in linear)
    scores = facts["validation"]["history"]
    assert scores[-1]["memory_perplexity"] < facts["validation"]["base_perplexity"]


def test_an_interrupted_run_with_adapters_gives_the_bytes_of_one_in_a_go(
    corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    config: dict[str, Any] = {**LORA, "validations": 4}
    train_memory(corpus_folder, init=model_folder, out=tmp_path / "whole", **config)
    with interrupted_after(5):
        train_memory(corpus_folder, init=model_folder, out=tmp_path / "parts", **config)
    train_memory(corpus_folder, init=model_folder, out=tmp_path / "parts", **config)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert read_manifest(tmp_path / "whole").hash == read_manifest(tmp_path / "parts").hash


def test_the_checkpoint_that_is_kept_is_the_best_of_what_was_asked_for(
    corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    config = {"dtype": "float32", "epochs": 3, "batch_size": 8, "kl_weight": 0.0, "learning_rate": 3e-2}
    for keep in ("mixture", "memory"):
        facts = train_memory(corpus_folder, init=model_folder, out=tmp_path / keep, keep=keep, **config).facts
        history = facts["validation"]["history"]
        assert facts["validation"]["best"] == min(history, key=lambda entry: entry[f"{keep}_perplexity"])


def test_new_settings_that_are_as_they_always_were_do_not_change_what_a_folder_is() -> None:
    assert not {"lora_rank", "keep"} & TrainConfig().model_dump().keys()
    assert TrainConfig.parse({"lora_rank": 3, "keep": "memory"}).model_dump()["lora_rank"] == 3
    assert TrainConfig.parse(TrainConfig.parse({"lora_rank": 3}).model_dump()).start.lora_rank == 3  # type: ignore[attr-defined]


def test_bad_adapters_are_one_line(corpus_folder: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"lora_rank = 2: peft has no adapters for MambaForCausalLM \(.*Mamba"):
        beside_all_linear(family_model("mamba", 40), 2)
    with pytest.raises(ConfigError, match="lora_rank and fresh"):
        train_memory(corpus_folder, init=model_folder, out="nowhere", **LORA, fresh=True)
    with pytest.raises(ConfigError, match=r"lora_rank = 2: only a memory of kind decoder has it"):
        train_memory(corpus_folder, base=model_folder, out="nowhere", **LORA, kind="mlp")
    find = importlib.util.find_spec
    monkeypatch.setattr("memlm.models.adapters.find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(ConfigError, match=r"lora_rank needs peft: pip install 'memlm\[compare\]'"):
        train_memory(corpus_folder, init=model_folder, out="nowhere", **LORA)
