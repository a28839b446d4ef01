"""The train stage for a memory that reads its base: where activations come from, going on, what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_model
from interruption import interrupted_after
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from memlm.corpus.build import build_corpus
from memlm.corpus.config import CorpusConfig
from memlm.datastore.build import build_datastore
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.store import Datastore
from memlm.errors import ArtifactError, ConfigError, MemlmError, TokenizerMismatchError
from memlm.manifest import Manifest, read_manifest
from memlm.memory.loading import load_memory
from memlm.memory.mlp import MLPMemory
from memlm.mix.base import BaseVoter
from memlm.models.loading import load_causal_lm
from memlm.models.taps import TapReader
from memlm.scores.mixtures import best_mix_weight
from memlm.scores.score import score
from memlm.train.config import TrainConfig
from memlm.train.data import TrainingData, WithActivations
from memlm.train.run import train_memory

pytestmark = pytest.mark.slow

QUICK = {"kind": "mlp", "layers": 2, "dtype": "float32", "max_steps": 6, "batch_size": 4, "learning_rate": 5e-3}
STILL = {**QUICK, "max_steps": 1, "learning_rate": 1e-12}
"""At this learning rate no float32 weight moves visibly, so the saved memory is its start."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def learnt(
    targets_folder: Path, datastore_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A memory trained long enough to learn something, from stored activations."""
    out = tmp_path_factory.mktemp("learnt") / "memory"
    config = TrainConfig(kind="mlp", layers=2, epochs=3, batch_size=4, learning_rate=5e-3, dtype="float32")
    train_memory(targets_folder, base=model_folder, activations=datastore_folder, out=out, config=config)
    return out


# --- where activations come from --------------------------------------------------------------------------------------


def test_rows_get_the_activations_of_the_places_that_predict(
    targets_folder: Path, datastore_folder: Path, model_folder: str
) -> None:
    data, store = TrainingData(targets_folder, with_targets=True), Datastore(datastore_folder)
    assert store.keys is not None
    rows = WithActivations(data.train, store.keys)
    assert len(rows) == len(data.train)
    reader = TapReader(load_causal_lm(model_folder), store.manifest.facts["tap"])
    for number in (0, 3, len(rows) - 1):
        row = rows[number]
        read = reader.read(torch.from_numpy(row["input_ids"].astype(np.int64))[None])[0].numpy()
        before = np.flatnonzero(row["labels"] != -100) - 1
        assert len(row["target_counts"]) == len(before)
        np.testing.assert_allclose(row["activations"], read[before], rtol=2**-10, atol=1e-5)  # kept in float16


@pytest.mark.slow
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_stored_and_live_activations_give_the_same_training(
    corpus_folder: Path,
    targets_folder: Path,
    datastore_folder: Path,
    model_folder: str,
    tmp_path: Path,
    kl_weight: float,
) -> None:
    """Stored ones are rounded to float16, 2**-11 of a value, which moves a loss of some 6 nats by less than 0.01.

    Those of other places would move it by far more, as the last run shows.
    """
    data = targets_folder if kl_weight else corpus_folder
    config = TrainConfig(**QUICK, kl_weight=kl_weight, trainer={"logging_steps": 1})

    def trained(name: str, activations: Path | None) -> list[float]:
        facts = train_memory(data, base=model_folder, activations=activations, out=tmp_path / name, config=config).facts
        assert [entry["step"] for entry in facts["training"]] == [1, 2, 3, 4, 5, 6]
        return [entry["loss"] for entry in facts["training"]]

    stored, live = trained("stored", datastore_folder), trained("live", None)
    np.testing.assert_allclose(stored, live, atol=0.01)
    with pytest.MonkeyPatch.context() as patch:
        original = WithActivations.__getitem__

        def others(self: WithActivations, index: int) -> dict[str, Any]:
            row = original(self, index)
            return row | {"activations": row["activations"][::-1]}

        patch.setattr(WithActivations, "__getitem__", others)
        wrong = trained("wrong", datastore_folder)
    assert np.abs(np.subtract(wrong, live)).max() > 0.1


def test_the_base_is_not_trained(targets_folder: Path, model_folder: str, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in Path(model_folder).iterdir()}
    train_memory(targets_folder, base=model_folder, out=tmp_path / "m", config=TrainConfig(**QUICK))
    assert {path: path.read_bytes() for path in Path(model_folder).iterdir()} == before
    assert not any(name.startswith(("base", "model.layers")) for name in weights(tmp_path / "m"))


# --- it learns --------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(learnt: Path) -> None:
    facts = read_manifest(learnt, "memory").facts
    assert facts["training"][-1]["loss"] < 0.7 * facts["training"][0]["loss"]


def test_the_figures_of_the_best_checkpoint_hold_for_the_saved_memory(
    learnt: Path, targets_folder: Path, model_folder: str
) -> None:
    """In training the held-out activations were rounded to float16; here they are live."""
    best = read_manifest(learnt, "memory").facts["validation"]["best"]
    data = TrainingData(targets_folder, with_targets=True)
    memory, base = load_memory(learnt), load_causal_lm(model_folder)
    voter = BaseVoter(base, data.vocab_size)
    found = score({"base": voter, "memory": memory}, data.validation, base=voter)
    theirs, ours = found["base"].label, found["memory"].label
    weight, perplexity = best_mix_weight(theirs, ours)
    assert float(np.exp(-ours.astype(np.float64).mean())) == pytest.approx(best["memory_perplexity"], rel=2e-3)
    assert perplexity == pytest.approx(best["mixture_perplexity"], rel=2e-3)
    assert weight == pytest.approx(best["mix_weight"], abs=0.011)


def test_settings_and_card_say_which_base_it_serves(learnt: Path, model_folder: str, datastore_folder: Path) -> None:
    manifest = read_manifest(learnt, "memory")
    settings = json.loads((learnt / "memory.json").read_text())
    assert settings["kind"] == "mlp"
    assert settings["tap"] == "model.layers.1.mlp"
    assert (settings["input_width"], settings["base_blocks"], settings["layers"]) == (32, 2, 2)
    assert settings["mix_weight"] == manifest.facts["validation"]["best"]["mix_weight"]
    assert (settings["vocab_size"], settings["context_length"]) == (320, 32)
    card = (learnt / "README.md").read_text(encoding="utf-8")
    assert f"It reads `model.layers.1.mlp` of {model_folder} and serves this base alone." in card
    assert "- mlp-memory" in card
    assert "| start | fresh, head of the base where the widths are equal |" in card
    assert manifest.sources["activations"] == str(datastore_folder)
    assert manifest.inputs["activations"] == read_manifest(datastore_folder).hash


def test_nothing_of_the_work_is_left_in_the_folder(learnt: Path) -> None:
    names = set(read_manifest(learnt).payload)
    assert {"model.safetensors", "memory.json", "README.md", "tokenizer.json"} <= names
    assert not [name for name in names if "checkpoint" in name or "activations" in name]


# --- going on ---------------------------------------------------------------------------------------------------------


def test_training_goes_on_from_an_mlp_memory(
    learnt: Path, targets_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    still = {name: value for name, value in STILL.items() if name != "layers"}
    train_memory(targets_folder, init=str(learnt), base=model_folder, out=tmp_path / "m", config=TrainConfig(**still))
    before, after = weights(learnt), weights(tmp_path / "m")
    assert before.keys() == after.keys()
    for name, expected in before.items():
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-9)
    ours, theirs = load_memory(tmp_path / "m"), load_memory(learnt)
    assert isinstance(ours, MLPMemory)
    assert isinstance(theirs, MLPMemory)
    assert (ours.settings.style, ours.tap) == (theirs.settings.style, theirs.tap)
    assert f"| start | {learnt} |" in (tmp_path / "m" / "README.md").read_text(encoding="utf-8")


RESUMED = TrainConfig(**{**QUICK, "max_steps": 20}, trainer={"eval_steps": 7, "save_steps": 7})


@pytest.fixture(scope="module")
def uninterrupted(targets_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("uninterrupted") / "m"
    return train_memory(targets_folder, base=model_folder, out=out, config=RESUMED)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 16], ids=["before any checkpoint", "after the second"])
def test_an_interrupted_run_continued_gives_the_same_bytes(
    targets_folder: Path, model_folder: str, uninterrupted: Manifest, tmp_path: Path, step: int
) -> None:
    with interrupted_after(step):
        train_memory(targets_folder, base=model_folder, out=tmp_path / "m", config=RESUMED)
    assert (tmp_path / "m" / "checkpoints" / "checkpoint-14").exists() == (step > 14)
    resumed = train_memory(targets_folder, base=model_folder, out=tmp_path / "m", config=RESUMED)
    assert resumed.payload == uninterrupted.payload
    assert resumed.hash == uninterrupted.hash


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_base(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As the base, with other weights."""
    return save_model(tmp_path_factory.mktemp("other") / "model", tokenizer, padding=8, seed=6)


def datastore(corpus: Path, teacher: str, out: Path, **config: Any) -> Path:
    build_datastore(corpus, teacher=teacher, out=out, config=DatastoreConfig(dtype="float32", recall_k=2, **config))
    return out


def refused(error: type[MemlmError], match: str, data: Path, out: Path, **arguments: Any) -> None:
    """Flags and manifests are enough to see that it cannot work, and nothing is written."""
    names = ("init", "base", "activations")
    where = {name: arguments.pop(name) for name in names if name in arguments}
    with pytest.raises(error, match=match):
        train_memory(data, out=out, config=TrainConfig.parse({"kind": "mlp", **arguments}), **where)
    assert not out.exists()


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kind": "mpl"}, "kind = 'mpl'; did you mean 'mlp'"),
        ({"kind": "retrieval"}, "kind = 'retrieval': such a memory is not trained"),
        ({"fresh": True}, "fresh = True: only a memory of kind decoder has it"),
        ({"layers": [0, 1]}, r"layers = \[0, 1\]: input should be a valid integer"),
        ({"layers": -1}, "layers = -1: input should be greater than or equal to 1"),
        ({"like": "small", "layers": 2}, "like = 'small' and layers = 2: give one of them"),
        *(
            ({"kind": "decoder", name: value}, f"{name} = .*only a memory of kind mlp has it; add --kind mlp")
            for name, value in (("tap", "0.5"), ("like", "small"), ("width", 8), ("ffn_width", 8), ("head", "random"))
        ),
    ],
    ids=str,
)
def test_settings_of_another_kind_are_refused(
    targets_folder: Path, model_folder: str, tmp_path: Path, arguments: dict[str, Any], match: str
) -> None:
    refused(ConfigError, match, targets_folder, tmp_path / "m", base=model_folder, **arguments)


@pytest.mark.usefixtures("no_models")
class TestRefusedBeforeAnyModelIsLoaded:
    def test_a_missing_base(self, targets_folder: Path, learnt: Path, tmp_path: Path) -> None:
        for init in (None, str(learnt)):
            refused(ConfigError, r"base is missing: .* \(--base\)", targets_folder, tmp_path / "m", init=init)

    def test_a_start_that_is_no_memory_of_this_kind(
        self, targets_folder: Path, learnt: Path, memory_folder: Path, model_folder: str, tmp_path: Path
    ) -> None:
        wrong = {"data": targets_folder, "out": tmp_path / "m", "base": model_folder}
        refused(ConfigError, "an mlp memory starts fresh, or from another", init=model_folder, **wrong)
        refused(ConfigError, "is a memory of kind decoder; add --kind decoder", init=str(memory_folder), **wrong)
        refused(ConfigError, "is a memory of kind mlp; add --kind mlp", init=str(learnt), kind="decoder", **wrong)
        refused(ConfigError, "layers = 3: --init .* decides it", init=str(learnt), layers=3, **wrong)

    def test_a_memory_of_another_tokenizer(
        self, targets_folder: Path, learnt: Path, model_folder: str, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(learnt, tmp_path / "init"))
        (folder / "manifest.json").unlink()
        settings = json.loads((folder / "memory.json").read_text())
        (folder / "memory.json").write_text(json.dumps({**settings, "tokenizer": "another"}))
        refused(
            TokenizerMismatchError,
            f"{targets_folder} and init {folder} have different tokenizers; .*memlm adapt",
            targets_folder,
            tmp_path / "m",
            init=str(folder),
            base=model_folder,
        )

    def test_activations_for_a_memory_that_reads_tokens(
        self, targets_folder: Path, datastore_folder: Path, model_folder: str, tmp_path: Path
    ) -> None:
        refused(
            ConfigError,
            "activations: a memory of kind decoder reads no base; leave --activations out",
            targets_folder,
            tmp_path / "m",
            kind="decoder",
            init=model_folder,
            activations=datastore_folder,
        )

    def test_activations_of_another_base(
        self, targets_folder: Path, datastore_folder: Path, model_folder: str, other_base: str, tmp_path: Path
    ) -> None:
        match = f"activations {datastore_folder} are of {model_folder}, not of base {other_base}"
        refused(ArtifactError, match, targets_folder, tmp_path / "m", base=other_base, activations=datastore_folder)

    def test_what_is_no_datastore(self, targets_folder: Path, model_folder: str, tmp_path: Path) -> None:
        match = "is a targets folder, expected datastore"
        refused(ArtifactError, match, targets_folder, tmp_path / "m", base=model_folder, activations=targets_folder)


def test_activations_of_another_corpus_are_refused(
    targets_folder: Path, model_folder: str, documents: str, tmp_path: Path
) -> None:
    config = CorpusConfig(document_separator="\n\n", block_size=32, max_tokens=300)
    build_corpus([documents], tokenizer=model_folder, out=tmp_path / "c", config=config)
    other = datastore(tmp_path / "c", model_folder, tmp_path / "d")
    match = f"activations {other} are of another corpus than {targets_folder}"
    refused(ArtifactError, match, targets_folder, tmp_path / "m", base=model_folder, activations=other)


def test_a_datastore_that_kept_no_keys_is_refused(
    targets_folder: Path, corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    bare = datastore(corpus_folder, model_folder, tmp_path / "d", keep_keys=False, code_bytes=4)
    match = f"activations {bare}: the datastore kept no keys; train online, without them"
    refused(ArtifactError, match, targets_folder, tmp_path / "m", base=model_folder, activations=bare)


def test_activations_of_another_tap_are_refused_and_leave_the_output_free(
    targets_folder: Path, corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    """Only the loaded base tells which module a share of the depth is."""
    inner = datastore(corpus_folder, model_folder, tmp_path / "d", tap="0.5")
    where = {"base": model_folder, "activations": inner, "out": tmp_path / "m"}
    match = rf"activations {inner} were read at model\.layers\.0\.mlp, the memory reads model\.layers\.1\.mlp"
    with pytest.raises(ArtifactError, match=match):
        train_memory(targets_folder, config=TrainConfig(**STILL), **where)
    train_memory(targets_folder, config=TrainConfig(**STILL, tap="0.5"), **where)
    assert load_memory(tmp_path / "m").tap == "model.layers.0.mlp"
