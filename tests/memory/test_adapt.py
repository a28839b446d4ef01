"""A memory carried to another tokenizer: which rows it gets, that the body stays, and that training goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import save_model, sentences, tiny_config, tiny_model
from families import family_model
from tiny_tokenizers import permuted, sentencepiece_like
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PreTrainedModel, PreTrainedTokenizerFast

from memlm import MixedLM, adapt_memory, build_corpus, build_datastore, build_targets, load_memory, train_memory
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig
from memlm.errors import ConfigError, ModelError, OutputExistsError
from memlm.manifest import read_manifest
from memlm.memory.adapt import replace_vocabulary
from memlm.memory.config import AdaptConfig
from memlm.memory.mlp import FFNStyle, MLPSettings
from memlm.models.tokenizers import fingerprint, load_tokenizer
from memlm.models.vocabularies import align_vocabularies
from memlm.targets.config import TargetsConfig
from memlm.train.config import TrainConfig


@pytest.fixture(scope="module")
def other() -> PreTrainedTokenizerFast:
    """A sentencepiece-like tokenizer of other sentences."""
    return sentencepiece_like(sentences(100, seed=3))


@pytest.fixture(scope="module")
def other_folder(other: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base with that tokenizer."""
    return save_model(tmp_path_factory.mktemp("other") / "model", other, seed=5)


@pytest.fixture(scope="module")
def adapted_folder(memory_folder: Path, other_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapted") / "memory"
    adapt_memory(memory_folder, tokenizer=other_folder, out=out)
    return out


def untied_model(vocab_size: int) -> PreTrainedModel:
    """A model whose head has rows and a bias of its own."""
    config = PhiConfig(
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        vocab_size=vocab_size,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_shared_tokens_keep_their_rows_and_others_get_the_mean_of_their_pieces(
    tied: bool, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    padded = len(tokenizer) + 8
    model = (tiny_model(padded) if tied else untied_model(padded)).to(dtype)
    head = model.get_output_embeddings()
    old = {"in": model.get_input_embeddings().weight.clone(), "out": head.weight.clone()}
    if not tied:
        old["bias"] = head.bias.clone()
    pieces = align_vocabularies(tokenizer, other, old_rows=len(tokenizer)).pieces
    counts = replace_vocabulary(model, tokenizer, other, AdaptConfig())
    head = model.get_output_embeddings()
    new = {"in": model.get_input_embeddings().weight, "out": head.weight, "bias": getattr(head, "bias", None)}
    assert (new["in"] is new["out"]) == tied
    for name, before in old.items():
        after = new[name]
        assert after is not None
        assert after.shape == (len(other), *before.shape[1:])
        for id_, sources in enumerate(pieces):
            if len(sources) == 1:
                assert torch.equal(after[id_], before[sources[0]])
            else:
                mean = before[sources or range(len(tokenizer))].double().mean(0)  # of all where nothing is known
                torch.testing.assert_close(after[id_], mean.to(dtype))  # one rounding to `dtype`, of a float32 mean
    assert counts["total"] == len(other) == model.config.vocab_size
    assert counts["shared"] > 20
    assert counts["pieces"] > 20


def test_a_token_of_which_nothing_is_known_gets_the_mean_of_all_but_padding(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(len(other) + 8)
    rows = model.get_input_embeddings().weight.detach().clone()
    new = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    counts = replace_vocabulary(model, other, new, AdaptConfig())
    unknown = new.convert_tokens_to_ids("<pad>")
    assert counts["unknown"] == 1
    mean = rows[: len(other)].double().mean(0).float()
    torch.testing.assert_close(model.get_input_embeddings().weight[unknown], mean, rtol=1e-5, atol=1e-6)


def test_random_rows_have_the_models_spread_and_depend_on_the_seed_alone(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    def rows(seed: int) -> dict[str, torch.Tensor]:
        model = untied_model(len(tokenizer))
        counts = replace_vocabulary(model, tokenizer, other, AdaptConfig(rows="random", seed=seed))
        assert counts == {"total": len(other), "random": len(other)}
        head = model.get_output_embeddings()
        return {"in": model.get_input_embeddings().weight.detach(), "out": head.weight.detach()}

    first, again, third = rows(0), rows(0), rows(1)
    spread = PhiConfig().initializer_range
    for name in ("in", "out"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], third[name])
        assert float(first[name].std()) == pytest.approx(spread, rel=0.05)  # 6,400 draws: 0.9% is one standard error
    assert not torch.equal(first["in"], first["out"])


def test_ids_of_special_tokens_are_those_of_the_new_tokenizer(adapted_folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        said = json.loads((adapted_folder / name).read_text())
        assert (said["bos_token_id"], said["eos_token_id"], said.get("pad_token_id")) == (1, 2, None)


# --- there and back -----------------------------------------------------------------------------------------------


def test_a_shuffled_vocabulary_and_back_gives_the_original_memory(
    memory_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shuffled, ids = permuted(tokenizer, seed=0)
    shuffled.save_pretrained(tmp_path / "shuffled")
    adapt_memory(memory_folder, tokenizer=str(tmp_path / "shuffled"), out=tmp_path / "there")
    adapt_memory(tmp_path / "there", tokenizer=str(memory_folder), out=tmp_path / "back")
    tokens = torch.randint(len(tokenizer), (2, 20))
    order = torch.from_numpy(ids)
    with torch.no_grad():
        first, there, back = (load_memory(f) for f in (memory_folder, tmp_path / "there", tmp_path / "back"))
        expected = first.votes(first.step(tokens), slice(None))
        shuffled_votes = there.votes(there.step(order[tokens]), slice(None))[..., order]
        torch.testing.assert_close(shuffled_votes, expected, rtol=0, atol=1e-5)  # sums in another order
        assert torch.equal(back.votes(back.step(tokens), slice(None)), expected)


# --- the folder ---------------------------------------------------------------------------------------------------


def test_the_folder_says_what_it_is(
    adapted_folder: Path, memory_folder: Path, other_folder: str, other: PreTrainedTokenizerFast
) -> None:
    manifest = read_manifest(adapted_folder, "memory")
    assert manifest.tokenizer == fingerprint(other) == fingerprint(AutoTokenizer.from_pretrained(adapted_folder))
    assert manifest.inputs == {"memory": f"memlm:{read_manifest(memory_folder).hash}"}
    assert manifest.sources == {"memory": str(memory_folder), "tokenizer": other_folder}
    assert sum(n for name, n in manifest.facts["tokens"].items() if name != "total") == len(other)
    assert manifest.facts["original_epochs"] == read_manifest(memory_folder).facts["epochs"] == 1
    assert manifest.facts["epochs_ahead"] == 0.1
    settings = load_memory(adapted_folder).settings
    assert (settings.vocab_size, settings.tokenizer) == (len(other), manifest.tokenizer)
    assert (settings.mix_weight, settings.validated_with) == (None, None)
    assert settings.context_length == load_memory(memory_folder).settings.context_length
    head = (adapted_folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(head)["library_name"] == "memlm"


def test_two_runs_give_the_same_bytes_and_a_finished_one_is_left_alone(
    adapted_folder: Path, memory_folder: Path, other_folder: str, tmp_path: Path
) -> None:
    made = adapt_memory(memory_folder, tokenizer=other_folder, out=tmp_path / "again")
    assert made.hash == read_manifest(adapted_folder).hash
    written = (tmp_path / "again" / "model.safetensors").stat().st_mtime_ns
    assert adapt_memory(memory_folder, tokenizer=other_folder, out=tmp_path / "again") == made
    assert (tmp_path / "again" / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_plain_causal_lm_can_be_carried_over(
    family: str, tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, other_folder: str, tmp_path: Path
) -> None:
    """The tokenizer is read back as it is, also where transformers has a class of its own for the type of model."""
    family_model(family, len(tokenizer), positions=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = adapt_memory(tmp_path / "model", tokenizer=other_folder, out=tmp_path / "out")
    assert "original_epochs" not in made.facts
    assert load_memory(tmp_path / "out").settings.context_length == 256
    assert fingerprint(load_tokenizer(str(tmp_path / "out"))) == made.tokenizer == fingerprint(other)


def test_a_budget_scales_the_epochs_ahead(memory_folder: Path, other_folder: str, tmp_path: Path) -> None:
    config = AdaptConfig(budget=0.25)
    assert adapt_memory(memory_folder, tokenizer=other_folder, out=tmp_path / "out", config=config).facts[
        "epochs_ahead"
    ] == pytest.approx(0.25)


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_targets(documents: str, other_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of the same documents with the other tokenizer."""
    folder = tmp_path_factory.mktemp("other-stages")
    config = CorpusConfig(document_separator="\n\n", block_size=32, validation_fraction=0.15, test_fraction=0.15)
    build_corpus([documents], tokenizer=other_folder, out=folder / "corpus", config=config)
    build_datastore(
        folder / "corpus", teacher=other_folder, out=folder / "datastore", config=DatastoreConfig(dtype="float32")
    )
    build_targets(folder / "datastore", out=folder / "targets", config=TargetsConfig(k=16, target_temperature=4.0))
    return folder / "targets"


@pytest.mark.slow
def test_training_goes_on_and_starts_ahead_of_random_rows(
    adapted_folder: Path, memory_folder: Path, other_folder: str, other_targets: Path, tmp_path: Path
) -> None:
    config = AdaptConfig(rows="random")
    adapt_memory(memory_folder, tokenizer=other_folder, out=tmp_path / "random", config=config)
    first = {}
    for name, init in (("pieces", adapted_folder), ("random", tmp_path / "random")):
        made = train_memory(
            other_targets,
            init=str(init),
            base=other_folder,
            out=tmp_path / f"trained-{name}",
            config=TrainConfig(max_steps=10, batch_size=4, learning_rate=1e-4, dtype="float32"),
        )
        first[name] = made.facts["validation"]["best"]["memory_perplexity"]
    assert first["pieces"] < 0.8 * first["random"]
    model = MixedLM.from_pretrained(other_folder, memory=str(tmp_path / "trained-pieces"), dtype=torch.float32)
    assert model(torch.tensor([[1, 300, 301]])).logits.isfinite().all()


def test_a_base_of_the_new_tokenizer_takes_it_and_one_of_the_old_does_not(
    adapted_folder: Path, other_folder: str, model_folder: str
) -> None:
    model = MixedLM.from_pretrained(other_folder, memory=str(adapted_folder), mix_weight=0.5, dtype=torch.float32)
    assert model(torch.tensor([[1, 300, 301]])).logits.isfinite().all()
    with pytest.raises(ModelError, match="different tokenizers"):
        MixedLM.from_pretrained(model_folder, memory=str(adapted_folder), mix_weight=0.5)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_the_tokenizer_it_has_already_is_refused(memory_folder: Path, model_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has the tokenizer of .* already; use it as it is"):
        adapt_memory(memory_folder, tokenizer=model_folder, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_cannot_be_reached_is_named(memory_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer could be loaded from 'nobody/nothing'"):
        adapt_memory(memory_folder, tokenizer="nobody/nothing", out=tmp_path / "out")


def test_other_content_in_the_output_is_left_alone(memory_folder: Path, other_folder: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists and is no memlm folder"):
        adapt_memory(memory_folder, tokenizer=other_folder, out=tmp_path)
    with pytest.raises(OutputExistsError, match="made otherwise"):
        adapt_memory(memory_folder, tokenizer=other_folder, out=shutil.copytree(memory_folder, tmp_path / "copy"))


def test_other_kinds_of_memories_are_refused(datastore_folder: Path, other_folder: str, tmp_path: Path) -> None:
    (tmp_path / "mlp").mkdir()
    style = FFNStyle(gated=True, bias=False, norm="rms", norm_eps=1e-6, activation="silu")
    widths = {"input_width": 32, "width": 32, "ffn_width": 64}
    settings = MLPSettings(kind="mlp", vocab_size=320, base_blocks=2, layers=1, style=style, **widths)
    (tmp_path / "mlp" / "memory.json").write_text(settings.model_dump_json())
    for kind, folder in (("mlp", tmp_path / "mlp"), ("retrieval", datastore_folder)):
        with pytest.raises(ConfigError, match=rf"is of kind '{kind}': only a Memory Decoder can be carried"):
            adapt_memory(folder, tokenizer=other_folder, out=tmp_path / "out")


def test_a_model_with_fewer_rows_than_tokens_is_carried_over(
    tokenizer: PreTrainedTokenizerFast, other_folder: str, tmp_path: Path
) -> None:
    """Some checkpoints come with tokens that they have no row for."""
    model = AutoModelForCausalLM.from_config(tiny_config(len(tokenizer) - 10), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = adapt_memory(tmp_path / "model", tokenizer=other_folder, out=tmp_path / "out")
    assert made.facts["tokens"]["shared"] > 20
