"""The train stage as a whole: what it learns, keeps, refuses, and how an interrupted run goes on."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_corpus, save_model, save_stranger, sentences, tiny_config, tiny_model
from interruption import Interrupted, interrupted_after
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from memlm.errors import (
    ArtifactError,
    ConfigError,
    InputError,
    MemlmError,
    ModelError,
    OutputExistsError,
    TokenizerMismatchError,
    TrainingError,
)
from memlm.manifest import Manifest, read_manifest
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.loading import load_memory
from memlm.memory.voter import Voter
from memlm.mix.base import BaseVoter
from memlm.models import loading as loading_module
from memlm.models.loading import load_causal_lm
from memlm.progress import told_to
from memlm.scores.mixtures import best_mix_weight
from memlm.scores.score import Scores, score
from memlm.stage import run_stage
from memlm.train import run as run_module
from memlm.train import trainer as trainer_module
from memlm.train.config import TrainConfig
from memlm.train.data import TrainingData
from memlm.train.run import plan_memory, train_memory

QUICK = {"dtype": "float32", "max_steps": 4, "batch_size": 4}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- the loss and its accumulation --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_accumulated_steps_equal_whole_ones(
    targets_folder: Path, model_folder: str, tmp_path: Path, kl_weight: float
) -> None:
    """Rows are 3 to 32 tokens long, so a mean of means of passes would be another gradient altogether.

    SGD shows gradients as they are (Adam divides by their size, so rounding of tiny ones would look large). Eight
    steps of float32 sums in another order may differ by some 1e-6; a mean of means differs by over 1e-4 (checked
    below, by leaving out the count of the whole step).
    """
    lengths = TrainingData(targets_folder, with_targets=True).train.lengths
    assert lengths.min() < lengths.max() / 3

    def trained(name: str, batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
        config = TrainConfig(
            kl_weight=kl_weight,
            max_steps=8,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=0.5,
            schedule="constant",
            warmup=0,
            dtype="float32",
            seed=3,
            trainer={"optim": "sgd", "save_steps": 8, "eval_steps": 8},
        )
        train_memory(targets_folder, init=model_folder, out=tmp_path / name, config=config)
        return weights(tmp_path / name)

    whole, single, pairs = trained("whole", 4, 1), trained("single", 1, 4), trained("pairs", 2, 2)
    start = load_file(Path(model_folder) / "model.safetensors")
    for name, expected in whole.items():
        moved = float((expected - start[name]).abs().max())
        assert moved > 1e-3, f"{name} did not move, so nothing is shown"
        for other in (single, pairs):
            torch.testing.assert_close(other[name], expected, atol=5e-6, rtol=1e-5)

    with pytest.MonkeyPatch.context() as patch:
        original = trainer_module.MemoryTrainer.compute_loss

        def mean_of_means(self: Any, model: Any, inputs: Any, return_outputs: Any = False, **kwargs: Any) -> Any:
            return original(self, model, inputs, return_outputs) / 4

        patch.setattr(trainer_module.MemoryTrainer, "compute_loss", mean_of_means)
        wrong = trained("wrong", 1, 4)
    assert max(float((wrong[name] - whole[name]).abs().max()) for name in whole) > 1e-4


def test_plain_fine_tuning_is_the_same_from_a_corpus_and_from_its_targets(
    corpus_folder: Path, targets_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    config = TrainConfig(kl_weight=0, **QUICK)
    ours = train_memory(corpus_folder, init=model_folder, out=tmp_path / "a", config=config)
    theirs = train_memory(targets_folder, init=model_folder, out=tmp_path / "b", config=config)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ours.facts["training"] == theirs.facts["training"]
    assert ours.facts["validation"] == theirs.facts["validation"]
    unsaid = train_memory(corpus_folder, init=model_folder, out=tmp_path / "a", config=TrainConfig(**QUICK))
    assert (unsaid.hash, unsaid.config["kl_weight"]) == (ours.hash, 0)  # found again: a corpus has no targets


def test_the_logged_loss_is_the_weighted_sum_of_its_parts(
    targets_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    """Loss is averaged over steps and its parts over positions, so one step a log makes them comparable."""
    config = TrainConfig(kl_weight=0.3, trainer={"logging_steps": 1}, **QUICK)
    facts = train_memory(targets_folder, init=model_folder, out=tmp_path / "m", config=config).facts
    assert [entry["step"] for entry in facts["training"]] == [1, 2, 3, 4]
    for entry in facts["training"]:
        assert entry["loss"] == pytest.approx(0.3 * entry["kl_nats"] + 0.7 * entry["cross_entropy_nats"], rel=1e-5)


# --- it learns ----------------------------------------------------------------------------------------------------


def labels_of(voter: Voter, data: TrainingData) -> np.ndarray:
    return score({"it": voter}, data.validation)["it"].label


def scores(label: np.ndarray) -> Scores:
    return Scores(label, label, label, np.zeros(len(label), np.int32), 0 * label)


@pytest.fixture(scope="module")
def learnt(targets_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory trained long enough to learn something, validated twice an epoch."""
    out = tmp_path_factory.mktemp("learnt") / "memory"
    config = TrainConfig(epochs=3, batch_size=4, learning_rate=5e-3, dtype="float32", validations=2)
    train_memory(targets_folder, init=model_folder, out=out, config=config)
    return out


@pytest.mark.slow
def test_training_lowers_loss_and_validation_perplexity(learnt: Path, targets_folder: Path, model_folder: str) -> None:
    facts = read_manifest(learnt, "memory").facts
    assert facts["training"][-1]["loss"] < 0.7 * facts["training"][0]["loss"]
    data = TrainingData(targets_folder, with_targets=True)
    start = labels_of(BaseVoter(load_causal_lm(model_folder), data.vocab_size), data)
    before = float(np.exp(-start.astype(np.float64).mean()))
    # 320 tokens, of which some sixty make up the texts: a model that learnt nothing stays near or above 320
    assert facts["validation"]["best"]["memory_perplexity"] < before / 4


@pytest.mark.slow
def test_the_figures_of_the_best_checkpoint_hold_for_the_saved_memory(
    learnt: Path, targets_folder: Path, model_folder: str
) -> None:
    validation = read_manifest(learnt, "memory").facts["validation"]
    best = validation["best"]
    data = TrainingData(targets_folder, with_targets=True)
    memory = load_memory(learnt, dtype=torch.float32)
    base = labels_of(BaseVoter(load_causal_lm(model_folder), data.vocab_size), data)
    ours = labels_of(memory, data)
    weight, perplexity = best_mix_weight(base, ours)
    # the same float32 computation, rounded to four digits in the manifest
    assert float(np.exp(-ours.astype(np.float64).mean())) == pytest.approx(best["memory_perplexity"], rel=1e-5)
    assert float(np.exp(-base.astype(np.float64).mean())) == pytest.approx(validation["base_perplexity"], rel=1e-5)
    assert perplexity == pytest.approx(best["mixture_perplexity"], rel=1e-5)
    assert weight == best["mix_weight"]


@pytest.mark.slow
def test_mix_weight_and_its_base_are_recorded_in_the_memory(learnt: Path, model_folder: str) -> None:
    best = read_manifest(learnt, "memory").facts["validation"]["best"]
    settings = json.loads((learnt / "memory.json").read_text())
    assert settings["mix_weight"] == best["mix_weight"]
    assert settings["validated_with"] == model_folder
    assert settings["context_length"] == 32
    assert settings["vocab_size"] == 320
    assert f"mix_weight={best['mix_weight']}" in (learnt / "README.md").read_text()


@pytest.mark.slow
def test_the_history_has_the_wanted_number_of_validations(learnt: Path) -> None:
    facts = read_manifest(learnt, "memory").facts
    steps = [entry["step"] for entry in facts["validation"]["history"]]
    assert len(steps) in (6, 7)  # twice an epoch, and the last step where that is not one of them
    assert steps == sorted(set(steps))
    assert steps[-1] == facts["steps"]


@pytest.mark.slow
def test_no_checkpoints_are_left_in_a_finished_memory(learnt: Path) -> None:
    assert not (learnt / "checkpoints").exists()
    assert not any("checkpoint" in name for name in read_manifest(learnt).payload)


@pytest.mark.slow
def test_a_finished_memory_is_a_model_of_transformers(learnt: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(learnt)
    assert model.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(learnt).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("save_steps", [2, 6])
def test_the_checkpoint_with_the_best_mixture_is_kept_not_the_best_memory(
    targets_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    """Scores are scripted: the second of three memories complements the base, the third is best alone."""
    half = np.ones(50, np.float32)
    base = np.concatenate([-1 * half, -6 * half])
    scripted = [
        np.concatenate([-4 * half, -4 * half]),
        np.concatenate([-8 * half, -half]),
        np.concatenate([-3 * half] * 2),
    ]
    seen: list[dict[str, torch.Tensor]] = []

    def scripted_score(voters: Any, blocks: Any, *, stored: Any, batch_tokens: int) -> dict[str, Scores]:
        assert stored is None, "a decoder reads tokens only"
        state = voters["memory"].decoder.state_dict()
        seen.append({name: tensor.clone() for name, tensor in state.items()})
        return {"memory": scores(scripted[len(seen) - 1])}

    monkeypatch.setattr(trainer_module, "score", scripted_score)
    monkeypatch.setattr(run_module.Scorers, "score", lambda *args, **kwargs: {"base": scores(base)})
    steps = {"eval_steps": 2, "save_steps": save_steps}
    config = TrainConfig(max_steps=6, batch_size=4, dtype="float32", trainer=steps)
    manifest = train_memory(targets_folder, init=model_folder, out=tmp_path / "m", config=config)
    best = manifest.facts["validation"]["best"]
    assert best["step"] == 4
    assert best["memory_perplexity"] > manifest.facts["validation"]["history"][2]["memory_perplexity"]
    saved = weights(tmp_path / "m")
    assert len(seen) == 3
    assert all(torch.equal(saved[name], seen[1][name]) for name in saved)
    assert any(not torch.equal(saved[name], seen[2][name]) for name in saved)
    assert json.loads((tmp_path / "m" / "memory.json").read_text())["mix_weight"] == best["mix_weight"]


def test_checkpoints_equal_to_four_digits_do_not_mix_up_weights_and_figures(
    targets_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second memory is better by a hair and wants another mix_weight; both must come from the same checkpoint."""
    base = np.array([-1.0, -2.0], np.float32)
    scripted = [np.array([-1.0, -2.0], np.float32), np.array([-0.999999, -2.0], np.float32)]
    count = iter(scripted)
    monkeypatch.setattr(trainer_module, "score", lambda *args, **kwargs: {"memory": scores(next(count))})
    monkeypatch.setattr(run_module.Scorers, "score", lambda *args, **kwargs: {"base": scores(base)})
    config = TrainConfig(max_steps=4, batch_size=4, dtype="float32", trainer={"eval_steps": 2, "save_steps": 2})
    best = train_memory(targets_folder, init=model_folder, out=tmp_path / "m", config=config).facts["validation"][
        "best"
    ]
    assert (best["step"], best["mix_weight"]) == (4, 1.0)


@pytest.fixture(scope="module")
def unvalidated_corpus(model_folder: str, documents: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unvalidated") / "c"
    return make_corpus(documents, model_folder, out, validation_fraction=0, max_tokens=600)


def test_without_validation_documents_the_last_step_is_kept(
    model_folder: str, unvalidated_corpus: Path, tmp_path: Path
) -> None:
    config = TrainConfig(kl_weight=0, **QUICK)
    manifest = train_memory(unvalidated_corpus, init=model_folder, out=tmp_path / "m", config=config)
    assert "validation" not in manifest.facts
    assert manifest.facts["steps"] == 4
    settings_there = json.loads((tmp_path / "m" / "memory.json").read_text())
    assert settings_there["mix_weight"] is None
    assert settings_there["validated_with"] is None
    assert "No validation split" in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"max_steps": 3}, {"epochs": 0.05}, {"epochs": 0.3, "validations": 2}])
def test_runs_that_end_within_an_epoch_are_validated_at_their_end(
    targets_folder: Path, model_folder: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = TrainConfig(batch_size=4, dtype="float32", **settings)
    facts = train_memory(targets_folder, init=model_folder, out=tmp_path / "m", config=config).facts
    assert facts["validation"]["history"][-1]["step"] == facts["steps"] > 0


def test_a_memory_that_goes_on_with_longer_blocks_looks_back_as_far(
    memory_folder: Path, documents: str, model_folder: str, tmp_path: Path
) -> None:
    corpus, config = make_corpus(documents, model_folder, tmp_path / "c", block_size=128), TrainConfig(**QUICK)
    made = train_memory(corpus, init=str(memory_folder), base=model_folder, out=tmp_path / "m", config=config)
    ours = labels_of(load_memory(tmp_path / "m"), TrainingData(corpus, with_targets=False))
    found = float(np.exp(-ours.astype(np.float64).mean()))
    assert made.facts["validation"]["best"]["memory_perplexity"] == pytest.approx(found, rel=1e-5)


# --- start models -------------------------------------------------------------------------------------------------


def four_layers(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    save_model(folder, tokenizer, seed=5, layers=4)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "kept"), [(2, [0, 3]), (3, [0, 1, 3]), ([1, 2], [1, 2]), (None, [0, 1, 2, 3])], ids=str
)
def test_chosen_layers_of_the_start_are_kept(
    targets_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    model_folder: str,
    tmp_path: Path,
    layers: int | list[int] | None,
    kept: list[int],
) -> None:
    """At a learning rate of 1e-12 no float32 weight moves visibly, so the saved memory is its start."""
    init = four_layers(tokenizer, tmp_path / "init")
    config = TrainConfig(layers=layers, max_steps=1, batch_size=2, learning_rate=1e-12, dtype="float32")
    train_memory(targets_folder, init=init, base=model_folder, out=tmp_path / "m", config=config)
    start, ours = weights(tmp_path / "init"), weights(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"] == len(kept)
    for new, old in enumerate(kept):
        name = "model.layers.{}.mlp.up_proj.weight"
        torch.testing.assert_close(ours[name.format(new)], start[name.format(old)], atol=1e-9, rtol=0)
    torch.testing.assert_close(ours["model.embed_tokens.weight"], start["model.embed_tokens.weight"], atol=1e-9, rtol=0)


@pytest.mark.slow
def test_a_fresh_start_has_the_configured_shape_and_other_weights(
    targets_folder: Path, tokenizer: PreTrainedTokenizerFast, model_folder: str, tmp_path: Path
) -> None:
    init = four_layers(tokenizer, tmp_path / "init")
    still = {"max_steps": 1, "batch_size": 2, "learning_rate": 1e-12, "dtype": "float32", "fresh": True}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = TrainConfig(layers=3, seed=seed, **still)
        train_memory(targets_folder, init=init, base=model_folder, out=tmp_path / name, config=config)
    first, second, third = (weights(tmp_path / name)["model.embed_tokens.weight"] for name in "abc")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["num_hidden_layers"] == 3
    assert not torch.allclose(first, weights(tmp_path / "init")["model.embed_tokens.weight"], atol=1e-3)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_further_training_arguments_reach_the_trainer(
    targets_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    original = trainer_module.MemoryTrainer.train

    def train(self: Any, **kwargs: Any) -> Any:
        seen.update(
            adam_beta2=self.args.adam_beta2, batch=self.args.per_device_train_batch_size, logs=self.args.logging_steps
        )
        return original(self, **kwargs)

    monkeypatch.setattr(trainer_module.MemoryTrainer, "train", train)
    config = TrainConfig(trainer={"adam_beta2": 0.95, "logging_steps": 2}, **QUICK)
    facts = train_memory(targets_folder, init=model_folder, out=tmp_path / "m", config=config).facts
    assert seen == {"adam_beta2": 0.95, "batch": 4, "logs": 2}
    assert [entry["step"] for entry in facts["training"]] == [2, 4]


# --- interrupted and resumed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropout_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A start with dropout, so that a resumed run must restore random states too."""
    return save_model(tmp_path_factory.mktemp("dropout") / "model", tokenizer, seed=2, attention_dropout=0.2)


RESUMED = TrainConfig(max_steps=26, batch_size=4, dtype="float32", trainer={"eval_steps": 7, "save_steps": 7})


@pytest.fixture(scope="module")
def uninterrupted(targets_folder: Path, dropout_model: str, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("uninterrupted") / "m"
    return train_memory(targets_folder, init=dropout_model, out=out, config=RESUMED)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9, 23], ids=["before any checkpoint", "after the first", "after the third"])
def test_an_interrupted_run_continued_gives_the_same_bytes(
    targets_folder: Path, dropout_model: str, uninterrupted: Manifest, tmp_path: Path, step: int
) -> None:
    """Checkpoints lie between logs (steps 7, 14, 21 and 10, 20), so logged means must survive as well."""
    with interrupted_after(step):
        train_memory(targets_folder, init=dropout_model, out=tmp_path / "m", config=RESUMED)
    with pytest.raises(ArtifactError, match="is not finished"):
        load_memory(tmp_path / "m")
    there = sorted(p.name for p in (tmp_path / "m" / "checkpoints").glob("*"))
    assert ("checkpoint-7" in there or "checkpoint-14" in there) == (step > 7)
    resumed = train_memory(targets_folder, init=dropout_model, out=tmp_path / "m", config=RESUMED)
    assert resumed.payload == uninterrupted.payload
    assert resumed.facts == uninterrupted.facts
    assert resumed.hash == uninterrupted.hash
    assert not (tmp_path / "m" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 9, 13])
def test_a_run_stopped_between_validations_goes_on_at_the_checkpoint_that_time_asked_for(
    targets_folder: Path, dropout_model: str, uninterrupted: Manifest, tmp_path: Path, step: int
) -> None:
    """Such a checkpoint lies between two logs, whose means hold the steps on both sides of it."""
    plan = plan_memory(targets_folder, init=dropout_model, config=RESUMED, keep_seconds=0)
    with interrupted_after(step, KeyboardInterrupt) as stop:
        run_stage(tmp_path / "m", *plan)
    assert stop.value.__notes__ == [f"{tmp_path}/m keeps training up to step {step - 1} of 26"]
    assert (tmp_path / "m" / "checkpoints" / f"checkpoint-{step - 1}" / "whole").is_file()
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module._TokenBar, "on_step_end", lambda self, args, state, *_, **__: steps.append(state))
        resumed = train_memory(targets_folder, init=dropout_model, out=tmp_path / "m", config=RESUMED)
    assert len(steps) == 26 - (step - 1)
    assert resumed.payload == uninterrupted.payload
    assert resumed.facts == uninterrupted.facts
    assert resumed.hash == uninterrupted.hash


@contextlib.contextmanager
def stopped_after_training() -> Iterator[None]:
    """The run in the `with` block ends after its last checkpoint, before it writes the memory."""

    def stop(*args: Any) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryDecoder, "save_pretrained", stop)
        with pytest.raises(Interrupted):
            yield


@pytest.mark.slow
def test_a_run_interrupted_after_its_last_step_takes_none_more(
    targets_folder: Path, dropout_model: str, uninterrupted: Manifest, tmp_path: Path
) -> None:
    """Step 26 lies in the middle of an epoch, which the Trainer would go on with."""
    with stopped_after_training():
        train_memory(targets_folder, init=dropout_model, out=tmp_path / "m", config=RESUMED)
    assert (tmp_path / "m" / "checkpoints" / "checkpoint-26" / "whole").is_file()
    resumed = train_memory(targets_folder, init=dropout_model, out=tmp_path / "m", config=RESUMED)
    assert resumed.facts["steps"] == 26
    assert resumed.hash == uninterrupted.hash


@pytest.mark.slow
def test_a_run_that_was_moved_finds_its_best_checkpoint(
    targets_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexities are scripted to rise, so the first checkpoint stays the best."""

    def train(name: str, perplexities: list[float]) -> Manifest:
        monkeypatch.setattr(trainer_module, "best_mix_weight", lambda *args: (0.5, perplexities.pop(0)))
        return train_memory(targets_folder, init=model_folder, out=tmp_path / name, config=RESUMED)

    expected = train("other", [1.0, 2.0, 3.0, 4.0])
    with stopped_after_training():
        train("m", [1.0, 2.0, 3.0, 4.0])
    (tmp_path / "m").rename(tmp_path / "moved")
    moved = train("moved", [])
    assert moved.facts["validation"]["best"]["step"] == 7
    assert moved.hash == expected.hash


@pytest.mark.slow
def test_a_resumed_run_does_only_the_missing_steps(
    targets_folder: Path, dropout_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_after(16):
        train_memory(targets_folder, init=dropout_model, out=tmp_path / "m", config=RESUMED)
    steps = []
    original = trainer_module.MemoryTrainer.compute_loss

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.MemoryTrainer, "compute_loss", counted)
    train_memory(targets_folder, init=dropout_model, out=tmp_path / "m", config=RESUMED)
    assert steps == list(range(14, 26))


@pytest.mark.slow
def test_half_written_checkpoints_are_passed_over(
    targets_folder: Path, dropout_model: str, uninterrupted: Manifest, tmp_path: Path
) -> None:
    """A checkpoint that is not marked as whole is not used, whichever step it is of and however often it happens."""
    for _ in range(2):
        with interrupted_after(16):
            train_memory(targets_folder, init=dropout_model, out=tmp_path / "m", config=RESUMED)
        half = tmp_path / "m" / "checkpoints" / "checkpoint-14"
        (half / "whole").unlink()
        (half / "model.safetensors").write_bytes(b"half")
    assert (
        train_memory(targets_folder, init=dropout_model, out=tmp_path / "m", config=RESUMED).hash == uninterrupted.hash
    )


def test_a_finished_run_is_left_alone_and_loads_no_model(
    memory_folder: Path, targets_folder: Path, model_folder: str, no_models: None
) -> None:
    before = {p: p.stat().st_mtime_ns for p in memory_folder.rglob("*")}
    config = TrainConfig(epochs=1, batch_size=4, dtype="float32")
    manifest = train_memory(targets_folder, init=model_folder, out=memory_folder, config=config)
    assert manifest.hash == read_manifest(memory_folder).hash
    assert {p: p.stat().st_mtime_ns for p in memory_folder.rglob("*")} == before


def test_another_run_into_the_same_folder_is_refused(
    memory_folder: Path, targets_folder: Path, model_folder: str, no_models: None
) -> None:
    config = TrainConfig(epochs=2, batch_size=4, dtype="float32")
    with pytest.raises(OutputExistsError, match=r"config\.epochs: 1\.0 there, 2\.0 here"):
        train_memory(targets_folder, init=model_folder, out=memory_folder, config=config)


# --- what stops it ------------------------------------------------------------------------------------------------


def test_a_loss_that_overflows_stops_the_run_and_names_the_step(
    targets_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    original = trainer_module.MemoryTrainer.compute_loss

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(trainer_module.MemoryTrainer, "compute_loss", recorded)
    config = TrainConfig(schedule="constant", warmup=0, max_steps=40, batch_size=2, dtype="float32")
    config = config.model_copy(update={"learning_rate": 1e30})  # which no user may give, so that few steps are enough
    with pytest.raises(TrainingError, match="the loss is not finite in step ") as caught:
        train_memory(targets_folder, init=model_folder, out=tmp_path / "m", config=config)
    first = int((~np.isfinite(losses)).argmax()) + 1
    assert 1 < first < 10
    assert f"in step {first}; lower --learning-rate" in str(caught.value)
    assert len(losses) == 10  # stopped at the next log
    assert not list((tmp_path / "m" / "checkpoints").glob("checkpoint-*"))  # nothing poisoned to resume from


@pytest.mark.parametrize("validated", [True, False])
def test_poisoned_weights_stop_the_run_before_its_first_checkpoint(
    corpus_folder: Path,
    unvalidated_corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    model_folder: str,
    tmp_path: Path,
    validated: bool,
) -> None:
    model = tiny_model(len(tokenizer))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    config = TrainConfig(kl_weight=0, batch_size=2, dtype="float32", max_steps=5)
    data = corpus_folder if validated else unvalidated_corpus
    with pytest.raises(TrainingError, match="not finite in step 1;"):
        train_memory(data, init=str(tmp_path / "poisoned"), base=model_folder, out=tmp_path / "m", config=config)
    assert not list((tmp_path / "m" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_ruins_the_weights_in_the_last_step_is_not_saved(
    corpus_folder: Path,
    unvalidated_corpus: Path,
    model_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    validated: bool,
    value: float,
) -> None:
    """Losses and gradients are finite to the end; only the weights that the last update leaves are not."""
    original = trainer_module._TokenBar.on_step_end

    def ruined(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            kwargs["model"].decoder.model.embed_tokens.weight.data[5] = value
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer_module._TokenBar, "on_step_end", ruined)
    config = TrainConfig(kl_weight=0, batch_size=2, dtype="float32", max_steps=3, trainer={"logging_strategy": "no"})
    data = corpus_folder if validated else unvalidated_corpus
    with pytest.raises(TrainingError, match=r"the memory after step 3 (has|gives no) .*; lower --learning-rate"):
        train_memory(data, init=model_folder, out=tmp_path / "m", config=config)
    assert not (tmp_path / "m" / "manifest.json").exists()
    assert not list((tmp_path / "m" / "checkpoints").glob("checkpoint-3"))


def test_a_base_without_finite_scores_is_named_before_training(
    corpus_folder: Path, tokenizer: PreTrainedTokenizerFast, model_folder: str, tmp_path: Path
) -> None:
    model = tiny_model(len(tokenizer))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    config = TrainConfig(kl_weight=0, batch_size=2, dtype="float32", max_steps=5)
    with pytest.raises(ModelError, match=r"base .*poisoned .*(gives NaN|finite)"):
        train_memory(
            corpus_folder, init=model_folder, base=str(tmp_path / "poisoned"), out=tmp_path / "m", config=config
        )


def test_a_gradient_that_overflows_stops_the_run(
    targets_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer_module.MemoryTrainer.compute_loss

    def finite_loss_infinite_gradient(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step == 3:
            model.decoder.lm_head.weight.register_hook(lambda grad: grad * torch.inf)
        return loss

    monkeypatch.setattr(trainer_module.MemoryTrainer, "compute_loss", finite_loss_infinite_gradient)
    config = TrainConfig(max_steps=5, batch_size=2, dtype="float32", trainer={"logging_steps": 1})
    with pytest.raises(TrainingError, match=r"gradient overflowed by step 4; lower --learning-rate"):
        train_memory(targets_folder, init=model_folder, out=tmp_path / "m", config=config)


@pytest.mark.usefixtures("no_models")
class TestRefusedBeforeAnyModelIsLoaded:
    """Flags and manifests are enough to see that these cannot work; nothing is written either."""

    @staticmethod
    def refused(error: type[MemlmError], match: str, data: Path, init: str, out: Path, **settings: Any) -> None:
        base = settings.pop("base", None)
        with pytest.raises(error, match=match):
            train_memory(data, init=init, base=base, out=out, config=TrainConfig(**settings))
        assert not out.exists()

    def test_a_corpus_without_targets_at_kl_weight_above_zero(
        self, corpus_folder: Path, model_folder: str, tmp_path: Path
    ) -> None:
        self.refused(
            ConfigError, "is a corpus without targets", corpus_folder, model_folder, tmp_path / "m", kl_weight=0.5
        )

    @pytest.mark.parametrize("role", ["init", "base"])
    def test_another_tokenizer(
        self, targets_folder: Path, model_folder: str, other_model: str, tmp_path: Path, role: str
    ) -> None:
        init, base = (other_model, model_folder) if role == "init" else (model_folder, other_model)
        match = f"{role} .*different tokenizers"
        self.refused(TokenizerMismatchError, match, targets_folder, init, tmp_path / "m", base=base)

    @pytest.mark.parametrize("layers", [3, 0, [0, 2], [1, 0], []], ids=str)
    def test_layers_that_the_start_does_not_have(
        self, targets_folder: Path, model_folder: str, tmp_path: Path, layers: int | list[int]
    ) -> None:
        self.refused(ConfigError, "layers = ", targets_folder, model_folder, tmp_path / "m", layers=layers)

    @pytest.mark.parametrize("dtype", ["float16", "float17"])
    def test_a_dtype_that_cannot_be_trained_in(
        self, targets_folder: Path, model_folder: str, tmp_path: Path, dtype: str
    ) -> None:
        self.refused(ConfigError, f"dtype = '{dtype}'", targets_folder, model_folder, tmp_path / "m", dtype=dtype)

    def test_a_further_training_argument_that_does_not_exist(
        self, targets_folder: Path, model_folder: str, tmp_path: Path
    ) -> None:
        self.refused(
            ConfigError,
            r"trainer\.adam_beta3.*did you mean 'adam_beta",
            targets_folder,
            model_folder,
            tmp_path / "m",
            trainer={"adam_beta3": 0.9},
        )

    def test_a_vocabulary_that_is_too_small(self, targets_folder: Path, model_folder: str, tmp_path: Path) -> None:
        tiny_config(300).save_pretrained(tmp_path / "small")  # no tokenizer, so only the size can betray it
        self.refused(InputError, "outside the 300 of", targets_folder, str(tmp_path / "small"), tmp_path / "m")

    def test_blocks_longer_than_the_start_can_read(
        self, targets_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        tiny_config(len(tokenizer), positions=16).save_pretrained(tmp_path / "short")
        self.refused(
            ConfigError, "block_size = 32 .* above the 16", targets_folder, str(tmp_path / "short"), tmp_path / "m"
        )

    def test_a_model_that_is_not_there(self, targets_folder: Path, model_folder: str, tmp_path: Path) -> None:
        for init, base in (("no/such", None), (model_folder, "no/such")):
            self.refused(
                MemlmError, "'no/such' cannot be loaded; tried", targets_folder, init, tmp_path / "m", base=base
            )

    def test_a_truncated_shard(self, targets_folder: Path, model_folder: str, tmp_path: Path) -> None:
        folder = shutil.copytree(targets_folder, tmp_path / "t")
        shard = folder / "train-00000.arrow"
        shard.write_bytes(shard.read_bytes()[:-10])
        self.refused(MemlmError, r"train-00000\.arrow has \d+ bytes", folder, model_folder, tmp_path / "m")


@pytest.fixture(scope="session")
def other_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of a model whose tokenizer has one token more; there are no weights to load."""
    return save_stranger(tmp_path_factory.mktemp("other") / "model", tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("length", [{"epochs": 1.5}, {"max_steps": 5}])
def test_the_bar_counts_predicted_tokens_and_ends_where_it_said(
    corpus_folder: Path, model_folder: str, tmp_path: Path, length: dict[str, Any]
) -> None:
    heard = []
    with told_to(lambda *what: heard.append(what)):
        manifest = train_memory(
            corpus_folder, init=model_folder, out=tmp_path / "m", kl_weight=0, batch_size=2, accumulation=2, **length
        )
    rows = TrainingData(corpus_folder, with_targets=False).train
    positions = int(rows.position_starts[-1])
    steps = manifest.facts["steps"]
    expected = 1.5 * positions if "epochs" in length else steps * 4 * positions / len(rows)
    training = [(done, total) for part, done, total in heard if part == "training"]
    assert {total for _, total in training} == {round(expected)}
    assert training[-1][0] == round(expected)
    assert len({done for done, _ in training}) > steps, "it moves with every batch"


def test_a_connection_that_broke_because_a_worker_died_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal of the death may come a moment after the connection to the worker broke."""
    from memlm.train import run as run_module

    def told(seconds: float) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore")

    assert (
        run_module._dead_worker(RuntimeError("DataLoader worker (pid 3) exited")) == "DataLoader worker (pid 3) exited"
    )
    assert run_module._dead_worker(RuntimeError("out of cheese")) is None
    with monkeypatch.context() as patch:
        patch.setattr(run_module.time, "sleep", told)
        assert run_module._dead_worker(ConnectionResetError(104, "reset")) == (
            "DataLoader worker (pid 7) is killed by signal: Killed. "
        )
        patch.setattr(run_module.time, "sleep", lambda seconds: None)
        assert run_module._dead_worker(ConnectionResetError(104, "reset")) is None


def test_a_launchers_environment_decides_no_precision_and_no_replicas(
    corpus_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", name)
        found.append(train_memory(corpus_folder, init=model_folder, out=tmp_path / name, max_steps=2, dtype="float32"))
    assert found[0].payload["model.safetensors"] == found[1].payload["model.safetensors"]
    assert found[0].facts["computed_in"] == "float32"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = trainer_module.training_arguments(
        TrainConfig(), tmp_path, steps_per_epoch=1, bf16=False, use_cpu=False, validate=False
    )
    assert arguments.n_gpu <= 1, "DataParallel would cut rows where no row ends"


def test_training_goes_on_in_the_precision_that_it_began_in(
    corpus_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though `auto` is another one on the machine that goes on."""
    how: dict[str, Any] = {"init": model_folder, "max_steps": 3, "batch_size": 2}
    whole = train_memory(corpus_folder, out=tmp_path / "whole", dtype="float32", **how)
    monkeypatch.setattr(loading_module, "default_dtype", lambda device="cpu": torch.float32)
    config = TrainConfig(max_steps=3, batch_size=2)
    with interrupted_after(2):
        run_stage(tmp_path / "cut", *plan_memory(corpus_folder, init=model_folder, config=config, keep_seconds=0.0))
    monkeypatch.setattr(loading_module, "default_dtype", lambda device="cpu": torch.bfloat16)
    resumed = train_memory(corpus_folder, out=tmp_path / "cut", **how)
    assert resumed.facts["computed_in"] == "float32"
    assert resumed.payload["model.safetensors"] == whole.payload["model.safetensors"]


def test_rows_that_predict_nothing_are_no_trouble(model_folder: str, tmp_path: Path) -> None:
    (tmp_path / "documents.txt").write_text("\n\n".join(sentences(6, seed=4)), encoding="utf-8")
    crossed = {"cross_documents": True, "block_size": 3, "validation_fraction": 0.0, "test_fraction": 0.0}
    corpus = make_corpus(str(tmp_path / "documents.txt"), model_folder, tmp_path / "c", **crossed)
    made = train_memory(corpus, init=model_folder, out=tmp_path / "m", epochs=1, batch_size=1, dtype="float32")
    assert np.isfinite([entry["loss"] for entry in made.facts["training"]]).all()
