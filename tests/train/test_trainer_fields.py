"""Which of transformers' TrainingArguments a training takes, and that those it takes do what they say."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from memlm.errors import ConfigError
from memlm.manifest import Manifest
from memlm.train.config import TrainConfig
from memlm.train.fields import ALLOWED, REFUSED
from memlm.train.run import train_memory
from memlm.train.trainer import check_trainer_fields, training_arguments

pytestmark = pytest.mark.slow

QUICK: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "dtype": "float32", "kl_weight": 0}


def test_every_field_of_the_installed_version_is_taken_or_refused_with_a_reason() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert not ALLOWED & REFUSED.keys()
    assert fields == ALLOWED | REFUSED.keys()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_field_says_why_whatever_its_value(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^trainer\.{name}: .*") as caught:
        check_trainer_fields(TrainConfig(trainer={name: None}))
    assert REFUSED[name] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_field_that_is_taken_passes(name: str) -> None:
    check_trainer_fields(TrainConfig(trainer={name: None}))


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ({"dataloader_persistent_workers": True}, "persistent_workers option needs num_workers > 0"),
        ({"dataloader_multiprocessing_context": "spawn"}, "multi-process loading"),
        ({"dataloader_num_workers": -1}, "num_workers"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"optim": "no_such_optimizer"}, "no_such_optimizer"),
        ({"adam_beta1": 2.0}, "Invalid beta"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": {"no_such": 1}}, "no_such"),
        ({"report_to": "wandb"}, "requires wandb to be installed"),
        ({"report_to": "tensorboard"}, "set TENSORBOARD_LOGGING_DIR"),
        ({"report_to": "nope"}, "nope is not supported"),
        ({"fsdp": "full_shard"}, "fsdp splits a memory over several processes"),
        ({"log_level": "loud"}, "loud"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_the_trainer_would_stumble_over_are_refused_in_a_line(
    tmp_path: Path, trainer: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        training_arguments(
            TrainConfig(trainer=trainer), tmp_path, steps_per_epoch=5, bf16=False, use_cpu=True, validate=True
        )
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def plain(corpus_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("plain") / "m"
    return _trained(corpus_folder, model_folder, out)[1]


def _trained(data: Path, model: str, out: Path, **trainer: Any) -> tuple[Manifest, dict[str, torch.Tensor]]:
    manifest = train_memory(data, init=model, out=out, config=TrainConfig(**QUICK, trainer=trainer))
    return manifest, load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    "trainer",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"logging_strategy": "no"},
        {"include_num_input_tokens_seen": "all"},
        {"torch_empty_cache_steps": 1},
        {"skip_memory_metrics": False},
        {"save_total_limit": 1},
        {"eval_delay": 2},
        {"log_level": "error"},
    ],
    ids=lambda trainer: " ".join(trainer),
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_fields_that_change_no_arithmetic_leave_the_same_weights(
    corpus_folder: Path, model_folder: str, tmp_path: Path, plain: dict[str, torch.Tensor], trainer: dict[str, Any]
) -> None:
    _, found = _trained(corpus_folder, model_folder, tmp_path / "m", **trainer)
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_noise_on_embeddings_is_trained_with_and_gone_afterwards(
    corpus_folder: Path, model_folder: str, tmp_path: Path, plain: dict[str, torch.Tensor]
) -> None:
    _, found = _trained(corpus_folder, model_folder, tmp_path / "m", neftune_noise_alpha=5.0)
    assert found.keys() == plain.keys()
    assert any(not torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("field", ["activation_checkpointing", "neftune_noise_alpha"])
def test_what_an_mlp_memory_cannot_do_is_refused_by_its_name(
    corpus_folder: Path, model_folder: str, tmp_path: Path, field: str
) -> None:
    config = TrainConfig(**QUICK, kind="mlp", layers=1, trainer={field: 1})
    with pytest.raises(ConfigError, match=rf"^trainer\.{field}: a memory of kind mlp has no"):
        train_memory(corpus_folder, base=model_folder, out=tmp_path / "m", config=config)
