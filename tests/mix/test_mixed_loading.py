"""MixedLM from folders, back to folders, and everything that is refused before weights are loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model, sentences, tiny_model
from families import family_model
from memories import decoder_memory
from tiny_tokenizers import byte_level
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from memlm import MixedLM, load_memory
from memlm.datastore.build import build_datastore
from memlm.errors import ArtifactError, ConfigError, ModelError, OutputExistsError, TokenizerMismatchError
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import MemorySettings
from memlm.mix import loading
from memlm.models.tokenizers import fingerprint


def logits(model: Any) -> Tensor:
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test whose error must come before any weights are loaded."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded before the check")

    monkeypatch.setattr(loading, "load_causal_lm", fail)
    monkeypatch.setattr(loading, "load_memory", fail)


@pytest.fixture(scope="session")
def second_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model of the same tokenizer, its output layer not padded."""
    return save_model(tmp_path_factory.mktemp("models") / "second", tokenizer, seed=5)


def other_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    texts = sentences(50, seed=seed) if seed else ["zig zag zog quux jumps over lazy dogs"] * 50
    return byte_level(texts, vocab_size=vocab_size)


def folder_with(tokenizer: PreTrainedTokenizerFast | None, folder: Path, vocab_size: int = 340) -> str:
    tiny_model(vocab_size, seed=9).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


# --- loading ------------------------------------------------------------------------------------------------------


def test_three_lines_load_and_generate(
    model_folder: str, memory_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.6)
    inputs = AutoTokenizer.from_pretrained(model_folder)("the memory reads", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    assert output.shape == (1, inputs["input_ids"].shape[1] + 5)
    assert model.mix_weights == {"memory": 0.6}
    assert model.vocab_size == len(tokenizer)
    by_hand = MixedLM(
        AutoModelForCausalLM.from_pretrained(model_folder), load_memory(memory_folder), 0.6, vocab_size=len(tokenizer)
    )
    torch.testing.assert_close(logits(model), logits(by_hand), rtol=0, atol=0)


def test_a_missing_weight_is_what_the_memory_was_validated_with(model_folder: str, memory_folder: Path) -> None:
    recorded = json.loads((memory_folder / "memory.json").read_text())["mix_weight"]
    assert MixedLM.from_pretrained(model_folder, memory=memory_folder).mix_weights == {"memory": recorded}


@pytest.mark.usefixtures("no_weights")
def test_a_missing_weight_that_nobody_recorded_is_an_error(model_folder: str, second_folder: str) -> None:
    with pytest.raises(ConfigError, match="mix_weight of 'memory' is missing: "):
        MixedLM.from_pretrained(model_folder, memory=second_folder, gate="none")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix_weight": float("nan")}, r"mix_weight = nan: must be in \[0, 1\]"),
        ({"mix_weight": -0.5}, r"mix_weight = -0\.5: must be in \[0, 1\]"),
        ({"mix_weight": {"memory": 1.5}}, r"mix_weight = 1\.5: must be in \[0, 1\]"),
        ({"mix_weight": {"memroy": 0.5}}, "mix_weight names memroy; the memories are memory"),
        ({"mix_weight": 0.5, "memory_window": 1}, "memory_window = 1: must be at least 2"),
    ],
)
def test_bad_settings_are_refused_before_work(
    model_folder: str, memory_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MixedLM.from_pretrained(model_folder, memory=memory_folder, **options)


def test_the_same_memory_stands_beside_several_bases(
    model_folder: str, second_folder: str, memory_folder: Path
) -> None:
    memory = load_memory(memory_folder)
    first = MixedLM.from_pretrained(model_folder, memory=memory, mix_weight=0.5)
    second = MixedLM.from_pretrained(second_folder, memory=memory, mix_weight=0.5)
    for model, folder in ((first, model_folder), (second, second_folder)):
        alone = MixedLM.from_pretrained(folder, memory=memory_folder, mix_weight=0.5)
        torch.testing.assert_close(logits(model), logits(alone), rtol=0, atol=0)
    assert {p.data_ptr() for p in first.memories.parameters()} == {p.data_ptr() for p in second.memories.parameters()}


def test_dtype_goes_to_the_base_and_memory_keywords_to_the_memory(model_folder: str, memory_folder: Path) -> None:
    both = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5, dtype=torch.bfloat16)
    assert {p.dtype for p in both.parameters()} == {torch.bfloat16}
    model = MixedLM.from_pretrained(
        model_folder,
        memory=memory_folder,
        mix_weight=0.5,
        dtype=torch.bfloat16,
        memory_kwargs={"dtype": torch.float32},
    )
    assert {p.dtype for p in model.base.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.memories.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.float32
    probs = logits(model).softmax(-1)
    exact = logits(MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5)).softmax(-1)
    assert (probs - exact).abs().max() < 0.05  # bfloat16 keeps 8 bits of logits that reach 8


def test_further_keywords_go_to_the_base(
    model_folder: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    load = loading.load_causal_lm

    def spy(name: str, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return load(name, **kwargs)

    monkeypatch.setattr(loading, "load_causal_lm", spy)
    MixedLM.from_pretrained(
        model_folder, memory=memory_folder, mix_weight=0.5, device_map="cpu", attn_implementation="eager"
    )
    assert seen == {"device_map": "cpu", "attn_implementation": "eager"}


def test_the_revision_of_the_memory_is_the_one_that_is_checked(
    model_folder: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str | None] = []
    read = loading.read_settings

    def spy(source: Any, *, retrieval: None = None, revision: str | None = None) -> Any:
        checked.append(revision)
        return read(source)

    monkeypatch.setattr(loading, "read_settings", spy)
    options = {"dtype": torch.float32, "revision": "v2"}
    MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5, memory_kwargs=options)
    assert set(checked) == {"v2"}
    assert options == {"dtype": torch.float32, "revision": "v2"}, "the caller's dictionary is left alone"


def test_the_window_of_the_memory_can_be_named(model_folder: str, memory_folder: Path) -> None:
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=1.0, memory_window=4)
    with pytest.warns(UserWarning, match="longer than the memory's window of 4 tokens"):
        narrow = logits(model)
    wide = logits(MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=1.0))
    torch.testing.assert_close(narrow[:, :4].softmax(-1), wide[:, :4].softmax(-1))
    assert not torch.allclose(narrow[:, 4:].softmax(-1), wide[:, 4:].softmax(-1))


def test_two_memories_come_by_name(model_folder: str, memory_folder: Path, second_folder: str) -> None:
    memories = {"trained": memory_folder, "plain": load_memory(second_folder)}
    model = MixedLM.from_pretrained(model_folder, memory=memories, mix_weight={"plain": 0.2, "trained": 0.3})
    assert model.mix_weights == {"trained": 0.3, "plain": 0.2}
    parts = [
        MixedLM.from_pretrained(model_folder, memory=memory, mix_weight=1.0)
        for memory in (memory_folder, second_folder)
    ]
    base = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.0)
    expected = sum(
        weight * logits(part).double().softmax(-1) for weight, part in zip((0.5, 0.3, 0.2), (base, *parts), strict=True)
    )
    torch.testing.assert_close(logits(model).double().softmax(-1), expected, rtol=1e-4, atol=1e-7)


# --- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
def test_tokenizers_of_different_sizes_are_refused(model_folder: str, tmp_path: Path) -> None:
    other = folder_with(other_tokenizer(290, seed=1), tmp_path / "other")
    with pytest.raises(TokenizerMismatchError, match=r"have different tokenizers \(320 and 290 tokens\)"):
        MixedLM.from_pretrained(model_folder, memory=other, mix_weight=0.5)


@pytest.mark.usefixtures("no_weights")
def test_tokenizers_of_one_size_with_other_tokens_are_refused(model_folder: str, tmp_path: Path) -> None:
    core = json.loads((Path(model_folder) / "tokenizer.json").read_text())
    vocabulary = core["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)))
    other = folder_with(swapped, tmp_path / "other")
    with pytest.raises(TokenizerMismatchError, match=r"2 ids differ, the first is \d+: '[ab]' and '[ab]'"):
        MixedLM.from_pretrained(model_folder, memory=other, mix_weight=0.5)


@pytest.mark.usefixtures("no_weights")
def test_a_trained_memory_of_another_tokenizer_is_refused_and_both_are_named(
    memory_folder: Path, tmp_path: Path
) -> None:
    base = folder_with(other_tokenizer(290, seed=1), tmp_path / "base")
    with pytest.raises(TokenizerMismatchError) as error:
        MixedLM.from_pretrained(base, memory=memory_folder, mix_weight=0.5)
    for part in (base, str(memory_folder), "290 and 320 tokens", "train one with this base's tokenizer"):
        assert part in str(error.value)


@pytest.mark.usefixtures("no_weights")
def test_a_recorded_fingerprint_is_enough_to_refuse(memory_folder: Path, tmp_path: Path) -> None:
    base = folder_with(other_tokenizer(290, seed=1), tmp_path / "base")
    bare = tmp_path / "bare"
    load_memory(memory_folder).save_pretrained(bare)  # no tokenizer beside it
    with pytest.raises(TokenizerMismatchError, match="have different tokenizers"):
        MixedLM.from_pretrained(base, memory=bare, mix_weight=0.5)
    with pytest.raises(TokenizerMismatchError, match="have different tokenizers"):
        MixedLM.from_pretrained(base, memory=load_memory(bare), mix_weight=0.5)


def test_a_recorded_fingerprint_is_enough_to_accept(
    model_folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    settings = MemorySettings(kind="decoder", vocab_size=len(tokenizer), tokenizer=fingerprint(tokenizer))
    MemoryDecoder(tiny_model(len(tokenizer)), settings).save_pretrained(tmp_path)
    assert MixedLM.from_pretrained(model_folder, memory=tmp_path, mix_weight=0.5).vocab_size == len(tokenizer)


def test_a_base_without_tokenizer_is_aligned_by_its_output_layer(memory_folder: Path, tmp_path: Path) -> None:
    base = folder_with(None, tmp_path / "base", vocab_size=328)
    model = MixedLM.from_pretrained(base, memory=memory_folder, mix_weight=0.5)
    assert model.vocab_size == 320
    assert logits(model).shape[-1] == 320


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_plain_model_without_memory_is_refused(model_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"memory is missing: .* is a plain model"):
        MixedLM.from_pretrained(model_folder)


@pytest.mark.usefixtures("no_weights")
def test_a_base_or_memory_that_is_not_there_is_named(model_folder: str, memory_folder: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    with pytest.raises(ModelError, match="nothing"):
        MixedLM.from_pretrained(missing, memory=memory_folder, mix_weight=0.5)
    with pytest.raises(ModelError, match="nothing"):
        MixedLM.from_pretrained(model_folder, memory=missing, mix_weight=0.5)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["v1.0", "law/eu", "..", ""])
def test_a_name_that_is_no_folder_name_is_refused(model_folder: str, memory_folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"memory name .*: use letters"):
        MixedLM.from_pretrained(model_folder, memory={name: memory_folder}, mix_weight={name: 0.5})


@pytest.mark.usefixtures("no_weights")
def test_another_stage_as_memory_is_refused(model_folder: str, corpus_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="is a corpus folder, expected memory"):
        MixedLM.from_pretrained(model_folder, memory=corpus_folder, mix_weight=0.5)


def test_a_mixed_model_is_not_pushed(model_folder: str, memory_folder: Path) -> None:
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5)
    with pytest.raises(NotImplementedError, match=r"push the memory: memlm\.push_to_hub"):
        model.push_to_hub("me/mixed")


# --- saving -------------------------------------------------------------------------------------------------------


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}


def test_a_saved_mixture_refers_to_its_base(model_folder: str, memory_folder: Path, tmp_path: Path) -> None:
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5, memory_window=20)
    model.set_mix_weight(0.3)
    model.save_pretrained(tmp_path / "mixed")
    assert names(tmp_path / "mixed") == {"memories/memory/model.safetensors"}
    loaded = MixedLM.from_pretrained(tmp_path / "mixed")
    assert loaded.mix_weights == {"memory": 0.3}
    assert [memory.window for memory in loaded.named_memories().values()] == [20]
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_a_saved_mixture_can_hold_its_base(model_folder: str, memory_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(model_folder, tmp_path / "base"))
    model = MixedLM.from_pretrained(base, memory=memory_folder, mix_weight=0.5)
    model.save_pretrained(tmp_path / "mixed", include_base=True)
    shutil.rmtree(base)
    moved = Path(shutil.move(tmp_path / "mixed", tmp_path / "moved"))
    assert names(moved) == {"memories/memory/model.safetensors", "base/model.safetensors"}
    torch.testing.assert_close(logits(MixedLM.from_pretrained(moved)), logits(model), rtol=0, atol=0)
    again = MixedLM.from_pretrained(moved)
    again.save_pretrained(tmp_path / "again", include_base=True)
    shutil.rmtree(moved)
    torch.testing.assert_close(logits(MixedLM.from_pretrained(tmp_path / "again")), logits(model), rtol=0, atol=0)


def test_a_mixture_of_two_memories_comes_back(
    model_folder: str, memory_folder: Path, second_folder: str, tmp_path: Path
) -> None:
    memories = {"trained": memory_folder, "plain": second_folder}
    model = MixedLM.from_pretrained(model_folder, memory=memories, mix_weight={"trained": 0.3, "plain": 0.2})
    model.save_pretrained(tmp_path)
    loaded = MixedLM.from_pretrained(tmp_path)
    assert loaded.mix_weights == {"trained": 0.3, "plain": 0.2}
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)  # the sum may run in another order


@pytest.mark.parametrize("include_base", [False, True])
def test_auto_classes_load_what_was_saved(
    model_folder: str, memory_folder: Path, tmp_path: Path, include_base: bool
) -> None:
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5)
    model.save_pretrained(tmp_path, include_base=include_base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MixedLM)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    text = "the memory reads a corpus"
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == AutoTokenizer.from_pretrained(model_folder)(text)


def test_a_saved_mixture_takes_another_weight_or_memory(
    model_folder: str, memory_folder: Path, second_folder: str, tmp_path: Path
) -> None:
    MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5).save_pretrained(tmp_path)
    assert MixedLM.from_pretrained(tmp_path, mix_weight=0.1).mix_weights == {"memory": 0.1}
    other = MixedLM.from_pretrained(tmp_path, memory=second_folder, mix_weight=0.1)
    expected = MixedLM.from_pretrained(model_folder, memory=second_folder, mix_weight=0.1)
    torch.testing.assert_close(logits(other), logits(expected), rtol=0, atol=0)


def test_generation_settings_come_back(model_folder: str, memory_folder: Path, tmp_path: Path) -> None:
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5)
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    loaded = MixedLM.from_pretrained(tmp_path)
    assert loaded.generate(torch.tensor([[5, 6]])).shape == (1, 5)


def test_a_base_named_by_a_relative_path_is_found_from_elsewhere(
    model_folder: str, memory_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model_folder).parent)
    model = MixedLM.from_pretrained(Path(model_folder).name, memory=memory_folder, mix_weight=0.5)
    model.save_pretrained(tmp_path / "mixed")
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(logits(MixedLM.from_pretrained("mixed")), logits(model), rtol=0, atol=0)


def test_a_base_without_name_is_saved_with_its_weights_or_not_at_all(tmp_path: Path) -> None:
    memory = MemoryDecoder(family_model("llama", 320, seed=1))
    model = MixedLM(family_model("llama", 320), memory, 0.5)
    with pytest.raises(ConfigError, match="include_base=True"):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model.save_pretrained(tmp_path / "whole", include_base=True)
    torch.testing.assert_close(logits(MixedLM.from_pretrained(tmp_path / "whole")), logits(model), rtol=0, atol=0)


def test_saving_leaves_the_model_as_it_was(model_folder: str, memory_folder: Path, tmp_path: Path) -> None:
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.5)
    before = model.config.to_dict()
    model.save_pretrained(tmp_path, include_base=True)
    assert model.config.to_dict() == before


# --- what other tools ask of a mixture --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_config_tells_the_sizes_of_the_base(family: str) -> None:
    """As lm-eval looks for a context length: in these attributes, and else takes 2,048."""
    base = family_model(family)
    config = MixedLM(base, decoder_memory(64), 0.3).config
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    found = next(getattr(config, name) for name in names if hasattr(config, name))
    assert found == base.config.max_position_embeddings
    assert (config.hidden_size, config.num_hidden_layers) == (base.config.hidden_size, base.config.num_hidden_layers)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_base_attends_as_asked_for_through_auto_model(
    model_folder: str, memory_folder: Path, tmp_path: Path, attention: str
) -> None:
    MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.3).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.base.config._attn_implementation == attention


def test_a_revision_is_kept(
    model_folder: str, memory_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache after somebody pushed other weights: the mixture stays with the commit it was made with."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--someone--model"
    (place / "refs").mkdir(parents=True)
    for seed, commit in enumerate(("1" * 40, "2" * 40)):
        save_model(place / "snapshots" / commit, AutoTokenizer.from_pretrained(model_folder), padding=8, seed=seed)
    (place / "refs" / "main").write_text("1" * 40)
    for revision, name in ((None, "latest"), ("1" * 40, "named")):
        model = MixedLM.from_pretrained("someone/model", memory=memory_folder, mix_weight=0.3, revision=revision)
        assert model.config.base_where == {"revision": "1" * 40}
        model.save_pretrained(tmp_path / name)
        (place / "refs" / "main").write_text("2" * 40)
        for load in (MixedLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
            torch.testing.assert_close(logits(load(tmp_path / name)), logits(model), rtol=0, atol=0)


def test_where_a_model_is_holds_for_config_and_tokenizer_too(
    model_folder: str, memory_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A base in a subfolder, beside another model of another tokenizer; what is saved finds it again."""
    folder_with(other_tokenizer(340, seed=0), tmp_path / "models")
    save_model(tmp_path / "models" / "inner", tokenizer, padding=8)
    options = {"memory": memory_folder, "mix_weight": 0.3}
    model = MixedLM.from_pretrained(tmp_path / "models", subfolder="inner", **options)
    torch.testing.assert_close(logits(model), logits(MixedLM.from_pretrained(model_folder, **options)))
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(MixedLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_a_hub_model_is_looked_for_in_the_cache_that_is_named(
    model_folder: str, memory_folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "models--someone--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("1" * 40)
    shutil.copytree(model_folder, place / "snapshots" / ("1" * 40))
    options = {"memory": memory_folder, "mix_weight": 0.3}
    model = MixedLM.from_pretrained("someone/model", cache_dir=str(tmp_path), local_files_only=True, **options)
    torch.testing.assert_close(logits(model), logits(MixedLM.from_pretrained(model_folder, **options)))
    assert model.config.base_where == {"revision": "1" * 40}


def test_a_loaded_base_takes_a_memory_by_its_folder(model_folder: str, memory_folder: Path) -> None:
    expected = logits(MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.3))
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    for model in (
        MixedLM(base, str(memory_folder), 0.3),
        MixedLM(base, {"law": memory_folder}, 0.3),
        MixedLM.from_pretrained(base, memory=memory_folder, mix_weight=0.3),
    ):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
        assert model.base is base


def test_a_base_in_a_subfolder_is_not_taken_for_the_teacher_beside_it(
    tokenizer: PreTrainedTokenizerFast, corpus_folder: Path, tmp_path: Path
) -> None:
    """A datastore knows its teacher by the folder; another model may stand in it."""
    teacher = save_model(tmp_path / "m", tokenizer, padding=8)
    build_datastore(corpus_folder, teacher=teacher, out=tmp_path / "d", dtype="float32")
    other = save_model(tmp_path / "m" / "finetuned", tokenizer, padding=8, seed=5)
    named = MixedLM.from_pretrained(other, memory=tmp_path / "d", mix_weight=0.5)
    inside = MixedLM.from_pretrained(teacher, memory=tmp_path / "d", mix_weight=0.5, subfolder="finetuned")
    base = AutoModelForCausalLM.from_pretrained(teacher, subfolder="finetuned")
    for model in (inside, MixedLM.from_pretrained(base, memory=tmp_path / "d", mix_weight=0.5)):
        torch.testing.assert_close(logits(model), logits(named), rtol=0, atol=1e-5)


def test_a_loaded_base_and_a_memory_of_another_tokenizer_are_refused(memory_folder: Path, tmp_path: Path) -> None:
    folder = folder_with(other_tokenizer(340, seed=0), tmp_path / "other")
    with pytest.raises(TokenizerMismatchError, match="have different tokenizers"):
        MixedLM(AutoModelForCausalLM.from_pretrained(folder), memory_folder, 0.3)


def test_keywords_for_loading_a_base_that_is_loaded_are_refused(model_folder: str, memory_folder: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is for loading the base, and this base is loaded already"):
        MixedLM.from_pretrained(tiny_model(328), memory=memory_folder, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memories": {"memory": "/etc"}}, "place outside its folder: '/etc'"),
        ({"memories": {"memory": "memories/../../elsewhere"}}, "place outside its folder"),
        ({"memories": {"memory": 5}}, "must be names of folders or hub ids"),
        ({"memories": ["memories/memory"]}, "must be names of folders or hub ids"),
        ({"base": "../elsewhere"}, "place outside its folder"),
        ({"base": None}, "must be names of folders or hub ids"),
    ],
)
def test_a_strangers_mixture_names_nothing_outside_its_folder(
    model_folder: str, memory_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.3).save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ArtifactError, match=message):
        MixedLM.from_pretrained(tmp_path / "saved")


def test_a_base_with_code_of_its_own_is_loaded_where_that_is_trusted(
    model_folder: str, memory_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    (base / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-kind'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    values = json.loads((base / "config.json").read_text()) | {"model_type": "own-kind", "auto_map": code}
    (base / "config.json").write_text(json.dumps(values))
    options = {"memory": memory_folder, "mix_weight": 0.3}
    with pytest.raises(ModelError, match="custom code"):
        MixedLM.from_pretrained(base, **options)
    model = MixedLM.from_pretrained(base, trust_remote_code=True, **options)
    assert type(model.base).__name__ == "OwnModel"
    torch.testing.assert_close(logits(model), logits(MixedLM.from_pretrained(model_folder, **options)))
    model.save_pretrained(tmp_path / "saved")
    again = MixedLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    torch.testing.assert_close(logits(again), logits(model))


def test_keywords_that_are_nearly_ours_are_named_wherever_they_are_given(
    model_folder: str, memory_folder: Path, mlp_folder: Path, datastore_folder: Path, tmp_path: Path
) -> None:
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.3)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="mix_weights is no setting here; did you mean mix_weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", mix_weights=0.5)
    with pytest.raises(ConfigError, match="weight is no setting here; did you mean mix_weight"):
        MixedLM.from_pretrained(model_folder, memory=memory_folder, weight=0.5)
    with pytest.raises(ConfigError, match="mix_weigth is no setting here; did you mean mix_weight"):
        model(torch.tensor([[5, 6]]), mix_weigth=1.0)
    for folder in (memory_folder, mlp_folder, datastore_folder):
        with pytest.raises(ConfigError, match="dtyp is no setting for loading a memory; did you mean dtype"):
            load_memory(folder, dtyp="float32")
        with pytest.raises(ConfigError, match="dtyp is no setting for loading a memory"):
            model.add_memory("more", folder, 0.1, dtyp="float32")
    with pytest.raises(ConfigError, match="attn_implementation: a memory of kind mlp is not loaded with it"):
        MixedLM.from_pretrained(
            model_folder, memory=mlp_folder, mix_weight=0.1, memory_kwargs={"attn_implementation": "eager"}
        )


@pytest.mark.parametrize("planted", ["config.json", "memories/memory/memory.json", "tokenizer.json"])
def test_saving_follows_no_link(model_folder: str, memory_folder: Path, tmp_path: Path, planted: str) -> None:
    (tmp_path / "outside").write_text("mine")
    place = tmp_path / "mixed" / planted
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "outside")
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=0.3)
    with pytest.raises(OutputExistsError, match="is a link, which would be followed"):
        model.save_pretrained(tmp_path / "mixed")
    if planted.startswith("memories"):
        with pytest.raises(OutputExistsError, match="is a link, which would be followed"):
            model.named_memories()["memory"].save_pretrained(place.parent)
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_weight_that_is_no_number_is_named(model_folder: str, memory_folder: Path) -> None:
    weight: Any = "0.3"
    with pytest.raises(ConfigError, match=r"mix_weight of 'memory' is '0\.3': give a number"):
        MixedLM.from_pretrained(model_folder, memory=memory_folder, mix_weight=weight)
