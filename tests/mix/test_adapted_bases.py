"""Bases with adapters, merged, or edited in memory: what is saved and what comes back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from memories import decoder_memory
from peft import LoraConfig, PrefixTuningConfig, VeraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from memlm import MixedLM, train_memory
from memlm.errors import ConfigError, ModelError
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.retrieval import RetrievalMemory
from memlm.models import loading
from memlm.models.identity import model_identity
from memlm.models.loading import load_causal_lm, load_config
from memlm.models.tokenizers import fingerprint, load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
]  # PEFT calls it, pytest.mark.slow]
try:
    check_peft_version(min_version=MIN_PEFT_VERSION)
except ValueError as mismatch:  # transformers 5.24 asks for one that is not out yet
    pytestmark.append(pytest.mark.skip(reason=str(mismatch)))

LORA = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")


def logits(model: Any) -> Tensor:
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


def lora(model_folder: str) -> Any:
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), LORA).eval()


@pytest.fixture
def adapter_folder(model_folder: str, tmp_path: Path) -> str:
    """An adapter as PEFT saves it."""
    lora(model_folder).save_pretrained(tmp_path / "lora")
    return str(tmp_path / "lora")


def mixture(base: PreTrainedModel) -> MixedLM:
    return MixedLM(base, decoder_memory(320, seed=3), 0.4)


def comes_back(model: MixedLM, folder: Path, **options: Any) -> MixedLM:
    expected = logits(model)
    model.save_pretrained(folder, **options)
    loaded = MixedLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    return loaded


def by_peft(folder: str, adapter: str) -> PreTrainedModel:
    return lora(folder)


def by_peft_under_another_name(folder: str, adapter: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(model, LORA, adapter_name="law").eval()  # type: ignore[return-value]


def by_transformers(folder: str, adapter: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_adapter(adapter)
    return model.eval()


def by_memlm(folder: str, adapter: str) -> PreTrainedModel:
    return load_causal_lm(adapter)


WAYS = [by_peft, by_peft_under_another_name, by_transformers, by_memlm]


@pytest.mark.slow
@pytest.mark.parametrize("include_base", [False, True])
@pytest.mark.parametrize("adapted", WAYS)
def test_an_adapter_is_saved_and_found_again(
    model_folder: str,
    adapter_folder: str,
    tmp_path: Path,
    adapted: Callable[[str, str], PreTrainedModel],
    include_base: bool,
) -> None:
    base = adapted(model_folder, adapter_folder)
    plain = logits(AutoModelForCausalLM.from_pretrained(model_folder))
    assert (logits(base) - plain).abs().max() > 0.1
    loaded = comes_back(mixture(base), tmp_path / "mixed", include_base=include_base)
    assert loaded.base.active_adapters() == ["default"]
    comes_back(loaded, tmp_path / "again", include_base=include_base)
    weights = sum(path.stat().st_size for path in (tmp_path / "mixed").rglob("model*.safetensors"))
    whole = sum(path.stat().st_size for path in Path(model_folder).glob("model*.safetensors"))
    memory = sum(path.stat().st_size for path in (tmp_path / "mixed" / "memories").rglob("model*.safetensors"))
    assert (weights - memory > 0.9 * whole) is include_base


@pytest.mark.parametrize("in_place", [False, True])
def test_a_merged_adapter_is_not_lost(model_folder: str, tmp_path: Path, in_place: bool) -> None:
    base = lora(model_folder)
    if in_place:
        base.merge_adapter()
    model = mixture(base if in_place else base.merge_and_unload())
    with pytest.raises(ConfigError, match=r"the base is not what .* holds .* include_base=True"):
        model.save_pretrained(tmp_path / "reference")
    assert not (tmp_path / "reference").exists()
    comes_back(model, tmp_path / "whole", include_base=True)


def test_a_base_that_was_edited_in_memory_is_refused_or_saved(model_folder: str, tmp_path: Path) -> None:
    model = mixture(AutoModelForCausalLM.from_pretrained(model_folder))
    comes_back(model, tmp_path / "before")
    model.base.get_input_embeddings().weight.data[5] += 1
    with pytest.raises(ConfigError, match="include_base=True"):
        model.save_pretrained(tmp_path / "after")
    comes_back(model, tmp_path / "whole", include_base=True)


def test_a_disabled_adapter_is_not_saved(model_folder: str, adapter_folder: str, tmp_path: Path) -> None:
    base = by_transformers(model_folder, adapter_folder)
    base.disable_adapters()
    loaded = comes_back(mixture(base), tmp_path / "mixed")
    assert not getattr(loaded.base, "_hf_peft_config_loaded", False)


def test_an_adapter_folder_is_a_model(
    model_folder: str, adapter_folder: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert load_config(adapter_folder).hidden_size == load_config(model_folder).hidden_size
    assert fingerprint(load_tokenizer(adapter_folder)) == fingerprint(tokenizer)
    torch.testing.assert_close(logits(load_causal_lm(adapter_folder)), logits(lora(model_folder)), rtol=0, atol=1e-6)
    assert model_identity(adapter_folder).endswith(f"+{model_identity(model_folder)}")


def test_an_adapter_of_itself_is_refused_in_one_line(adapter_folder: str) -> None:
    config = Path(adapter_folder) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": adapter_folder}))
    with pytest.raises(ModelError, match="cannot be loaded; tried: folder"):
        load_config(adapter_folder)


def test_what_an_adapter_needs_is_said(adapter_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    monkeypatch.setattr("transformers.models.auto.auto_factory.is_peft_available", lambda: False)
    with pytest.raises(ModelError, match="is an adapter; to load it: pip install peft"):
        load_causal_lm(adapter_folder)


def test_a_mixture_leaves_what_trains_as_it_is(model_folder: str) -> None:
    base = lora(model_folder)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    assert any(before.values())
    mixture(base)
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before


def without_a_block(base: Any) -> None:
    del base.model.layers[1]
    base.config.num_hidden_layers = 1


def with_a_block_twice(base: Any) -> None:
    base.model.layers[1] = base.model.layers[0]


def with_another_epsilon(base: Any) -> None:
    base.model.norm.variance_epsilon = 0.5


def with_another_config(base: Any) -> None:
    base.config.rms_norm_eps = 0.5


def with_other_positions(base: Any) -> None:
    base.model.rotary_emb.inv_freq.mul_(0.5)


@pytest.mark.parametrize(
    "edit",
    [without_a_block, with_a_block_twice, with_another_epsilon, with_another_config, with_other_positions],
    ids=lambda edit: edit.__name__,
)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_base_whose_parts_were_edited_is_not_saved_by_name(
    model_folder: str, adapter_folder: str, tmp_path: Path, edit: Callable[[Any], None], adapted: bool
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    if adapted:
        base.load_adapter(adapter_folder)
    edit(base)
    with pytest.raises(ConfigError, match="it was merged, trained or edited"):
        mixture(base.eval()).save_pretrained(tmp_path / "mixed")


def test_an_adapter_that_was_scaled_anew_is_not_saved(model_folder: str, adapter_folder: str, tmp_path: Path) -> None:
    base = by_transformers(model_folder, adapter_folder)
    for module in base.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2.0
    for options in ({}, {"include_base": True}):
        with pytest.raises(ConfigError, match="scales what it adds otherwise than its config says"):
            mixture(base).save_pretrained(tmp_path / "mixed", **options)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, use_dora=True, target_modules="all-linear", init_lora_weights=False),
        VeraConfig(r=2, target_modules=["q_proj"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]),
    ],
    ids=["dora", "vera", "tokens"],
)
def test_an_adapter_that_transformers_does_not_find_again_is_refused(
    model_folder: str, tmp_path: Path, config: Any
) -> None:
    base = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).eval()
    with pytest.raises(ConfigError, match="cannot be saved beside it; merge"):
        mixture(base).save_pretrained(tmp_path / "mixed", include_base=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"layers": 1}, {"lora_rank": 2}], ids=["whole", "layers", "lora"])
def test_training_goes_out_from_an_adapter_folder(
    corpus_folder: Path, adapter_folder: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    quick: dict[str, Any] = {"kl_weight": 0, "dtype": "float32", "batch_size": 4, "learning_rate": 1e-9}
    train_memory(corpus_folder, init=adapter_folder, out=tmp_path / "m", max_steps=1, **quick, **settings)
    found = load_causal_lm(str(tmp_path / "m"))
    assert not hasattr(found, "peft_config")
    if not settings.get("layers"):
        torch.testing.assert_close(logits(found), logits(load_causal_lm(adapter_folder)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("adapted", [by_peft, by_transformers, by_memlm], ids=lambda adapted: adapted.__name__)
def test_a_model_with_an_adapter_is_a_memory_whose_folder_stands_alone(
    model_folder: str, adapter_folder: str, tmp_path: Path, adapted: Callable[[str, str], PreTrainedModel]
) -> None:
    decoder = adapted(model_folder, adapter_folder)
    with torch.no_grad():
        next(iter(decoder.parameters())).add_(0.01)  # what no name stands for
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = MixedLM(base, MemoryDecoder(decoder), 0.7, vocab_size=len(load_tokenizer(model_folder)))
    expected = logits(model)
    model.save_pretrained(tmp_path / "mixed")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)  # what was saved stays as it was
    found = MixedLM.from_pretrained(tmp_path / "mixed")
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-4)


def test_a_prompt_is_no_memory(model_folder: str) -> None:
    prompted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    )
    with pytest.raises(ConfigError, match=r"a decoder whose adapter is a prompt \(PREFIX_TUNING\) cannot be mixed"):
        MemoryDecoder(prompted)
    with pytest.raises(ConfigError, match=r"a base whose adapter is a prompt \(PREFIX_TUNING\) cannot be mixed"):
        mixture(prompted)


def test_a_loaded_causal_lm_is_a_memory(model_folder: str, tmp_path: Path) -> None:
    """As one at a path is."""
    base, decoder = (AutoModelForCausalLM.from_pretrained(model_folder) for _ in range(2))
    expected = logits(MixedLM(base, MemoryDecoder(decoder), 0.3))
    torch.testing.assert_close(logits(MixedLM(base, decoder, 0.3)), expected, rtol=0, atol=0)
    mixed = MixedLM.from_pretrained(base, memory={"law": decoder}, mix_weight=0.3)
    torch.testing.assert_close(logits(mixed), expected, rtol=0, atol=0)
    mixed.save_pretrained(tmp_path / "mixed", include_base=True)
    found = logits(MixedLM.from_pretrained(tmp_path / "mixed"))  # of the tokenizer's ids, without padding
    rows = found.shape[-1]
    torch.testing.assert_close(found.softmax(-1), expected[..., :rows].softmax(-1), rtol=0, atol=1e-5)
    mixed.remove_memory("law")
    mixed.add_memory("health", decoder, 0.3)
    torch.testing.assert_close(logits(mixed), expected, rtol=0, atol=0)
    for make in (
        lambda wrong: MixedLM(base, wrong, 0.3),
        lambda wrong: MixedLM.from_pretrained(model_folder, memory=wrong, mix_weight=0.3),
        lambda wrong: mixed.add_memory("other", wrong, 0.1),
    ):
        with pytest.raises(ConfigError, match="a loaded memory or a causal LM, not a Linear"):
            make(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("change", ["edited", "adapted"])
def test_a_base_that_was_changed_is_not_taken_for_the_teacher_of_a_datastore(
    model_folder: str, adapter_folder: str, datastore_folder: Path, change: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    true = MixedLM(base, datastore_folder, 0.999999)
    assert cast(RetrievalMemory, true.named_memories()["memory"]).teacher is None  # the base is the teacher
    expected = logits(true)
    other = AutoModelForCausalLM.from_pretrained(model_folder)
    if change == "edited":
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight.mul_(-1)
    else:
        other.load_adapter(adapter_folder)
    mixed = MixedLM(other.eval(), datastore_folder, 0.999999)
    memory = cast(RetrievalMemory, mixed.named_memories()["memory"])
    assert memory.teacher is not None
    torch.testing.assert_close(logits(mixed).softmax(-1), expected.softmax(-1), rtol=0, atol=1e-3)
