"""What a mixture does where a part of it, or transformers, can do less than usual: the same tokens, or a refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model, token_ids
from memories import LONG_TEXT, decoder_memory
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    OpenAIGPTConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from memlm import MixedLM
from memlm.errors import ConfigError
from memlm.memory.decoder import MemoryDecoder
from memlm.models.abilities import CACHE

VOCAB = 64


def openai_gpt() -> PreTrainedModel:
    return model_of(OpenAIGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4))


def rwkv() -> PreTrainedModel:
    return model_of(RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32))


def recurrent_gemma() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 4}
    return model_of(RecurrentGemmaConfig(vocab_size=VOCAB, lru_width=32, attention_window_size=64, **sizes))


def model_of(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def mixture(base: PreTrainedModel, weight: float = 0.4) -> MixedLM:
    return MixedLM(base, decoder_memory(VOCAB, seed=3), weight)


@torch.no_grad()
def greedily(model: Any, tokens: Tensor, count: int) -> Tensor:
    """By hand: all text is read anew for every token."""
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens


# --- bases that keep no cache, or a state that cannot be rolled back --------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* keeps no past in a cache")
@pytest.mark.parametrize("base", [openai_gpt, rwkv, lambda: family_model("mamba")], ids=["gpt1", "rwkv", "mamba"])
def test_a_base_without_a_cache_forgets_nothing(base: Callable[[], PreTrainedModel]) -> None:
    model, prompt = mixture(base()), token_ids(1, 6, vocab_size=VOCAB)
    found = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, greedily(model, prompt, 6))
    if model.base.config.model_type == "mamba" and CACHE == "cache":  # it keeps one since transformers 5.24
        return
    assert model(prompt, use_cache=True).past_key_values is None
    with pytest.raises(ConfigError, match="keeps no past in a cache of transformers"):
        model.new_cache(1)


def test_that_all_text_is_read_anew_is_said() -> None:
    with pytest.warns(UserWarning, match="OpenAIGPTLMHeadModel keeps no past in a cache; all text is read anew"):
        mixture(openai_gpt()).generate(token_ids(1, 6), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("base", [rwkv, recurrent_gemma])
def test_drafts_are_refused_where_the_base_refuses_them(base: Callable[[], PreTrainedModel]) -> None:
    model, prompt = base(), token_ids(1, 6)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": family_model("llama", VOCAB)}):
        for refused in (model, mixture(model)):
            with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
                refused.generate(prompt, max_new_tokens=3, do_sample=False, **options)


def test_a_stateful_base_with_a_cache_gives_the_same_tokens_as_without() -> None:
    model, prompt = mixture(recurrent_gemma()), token_ids(1, 6)
    found = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, greedily(model, prompt, 6))


# --- what a mixture refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: m.generate_batch([x[0].tolist()]), NotImplementedError, r"paged caches .*call generate"),
        (
            lambda m, x: m.generate(x, max_new_tokens=2, cache_implementation="paged"),
            NotImplementedError,
            "paged caches",
        ),
        (
            lambda m, x: m.generate(x, max_new_tokens=2, do_sample=False, assistant_early_exit=1),
            NotImplementedError,
            "leaving its layers early",
        ),
        (lambda m, x: m.load_adapter("someone/adapter"), NotImplementedError, r"mixture\.base\.load_adapter"),
        (lambda m, x: m.add_adapter(None), NotImplementedError, r"mixture\.base\.load_adapter"),
        (lambda m, x: m(inputs_embeds=torch.zeros(1, 3, 32)), ConfigError, "input_ids are missing"),
        (
            lambda m, x: m.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2),
            ValueError,
            "You passed `inputs_embeds`",
        ),
        (lambda m, x: m(x, attention_mask=torch.ones(1, 1, 6, 6)), ConfigError, "attention_mask has 4 axes"),
    ],
    ids=["batch", "paged", "early exit", "load_adapter", "add_adapter", "embeds", "generate embeds", "4-d mask"],
)
def test_what_it_cannot_do_is_refused_and_leaves_it_whole(
    call: Callable[[MixedLM, Tensor], Any], error: type[Exception], message: str
) -> None:
    model, prompt = mixture(family_model("llama")), token_ids(1, 6)
    with torch.no_grad():
        expected = model(prompt).logits
    with pytest.raises(error, match=message):
        call(model, prompt)
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, expected)


def test_a_misspelt_keyword_is_named_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="mix_weights is no setting here; did you mean mix_weight"):
        MixedLM.from_pretrained("nowhere", memory="nothing", mix_weights=0.3)


# --- further inputs of the base ---------------------------------------------------------------------------------------


def test_what_the_bases_forward_takes_generate_takes_too() -> None:
    base, prompt = family_model("gpt2"), token_ids(2, 6)
    types = torch.ones_like(prompt)
    alone = base.generate(prompt, token_type_ids=types, max_new_tokens=5, do_sample=False)
    assert not torch.equal(alone, base.generate(prompt, max_new_tokens=5, do_sample=False))
    assert torch.equal(
        mixture(base, 0.0).generate(prompt, token_type_ids=types, max_new_tokens=5, do_sample=False), alone
    )


def test_the_mask_reaches_a_base_that_peft_wraps() -> None:
    from peft import LoraConfig, get_peft_model

    base, prompt = family_model("llama"), token_ids(1, 6)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        wrapped = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    model = mixture(wrapped)  # type: ignore[arg-type]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    with torch.no_grad():
        alone, beside = model(prompt).logits[:, -1], model(padded, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-4)


# --- memories that keep a state, and what a memory reads --------------------------------------------------------------


@pytest.mark.parametrize("memory", [lambda: family_model("mamba", seed=3), recurrent_gemma], ids=["mamba", "griffin"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_memory_with_a_state_forgets_nothing(memory: Callable[[], PreTrainedModel], beams: int) -> None:
    model, prompt = MixedLM(family_model("llama"), MemoryDecoder(memory()), 0.6), token_ids(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    found = model.generate(prompt, **options)
    assert torch.equal(found, model.generate(prompt, use_cache=False, **options))
    if beams == 1:
        assert torch.equal(found, greedily(model, prompt, 5))


@pytest.mark.filterwarnings(LONG_TEXT)
def test_a_memory_reads_no_more_of_a_prompt_than_the_base() -> None:
    """Its window of 16 moves 12 times in a prompt of 120, of which the last place alone is asked for."""
    memory = decoder_memory(VOCAB, window=16, seed=3)
    model, read = MixedLM(family_model("llama"), memory, 0.4), []
    memory.decoder.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    model.generate(token_ids(1, 120), max_new_tokens=1, do_sample=False)
    assert 0 < sum(read) <= 1.1 * 120


@pytest.mark.filterwarnings(LONG_TEXT)
def test_a_ragged_batch_reads_no_more_of_its_prompts_than_the_base() -> None:
    """Windows of 16 move at other places in each of 8 rows, padded to 120."""
    memory = decoder_memory(VOCAB, window=16, seed=3)
    model, read = MixedLM(family_model("llama"), memory, 0.4), []
    memory.decoder.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    mask = torch.ones(8, 120, dtype=torch.long)
    for row in range(8):
        mask[row, : 9 * row] = 0
    model.generate(token_ids(8, 120), attention_mask=mask, max_new_tokens=1, do_sample=False)
    assert 0 < sum(read) <= 1.1 * 8 * 120


@pytest.mark.filterwarnings(LONG_TEXT)
@pytest.mark.parametrize("rows", [1, 8])
def test_a_long_text_past_the_window_reads_each_token_about_twice(rows: int) -> None:
    """64 new tokens, in which a window of 16 moves 8 times and half of it is read again."""
    memory = decoder_memory(VOCAB, window=16, seed=3)
    model, read = MixedLM(family_model("llama", positions=256), memory, 0.4), []
    model.generation_config.eos_token_id = None
    memory.decoder.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    mask = torch.ones(rows, 24, dtype=torch.long)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    model.generate(token_ids(rows, 24), attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert 0 < sum(read) <= 2.1 * rows * (24 + 64)


# --- packed rows, padded vocabularies, weights on disk ----------------------------------------------------------------


def test_positions_that_part_documents_in_a_row_are_refused_and_others_are_not() -> None:
    model, tokens = mixture(family_model("llama")), token_ids(1, 8)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with torch.no_grad():
        for mask in (None, torch.ones_like(tokens)):
            with pytest.raises(ConfigError, match=r"^position_ids start anew within a row.*a row of its own$"):
                model(tokens, attention_mask=mask, position_ids=packed)
        expected = model(tokens).logits
        torch.testing.assert_close(model(tokens, position_ids=torch.arange(8)[None]).logits, expected)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
        for before in (0, 1, 5):  # what libraries write where padding stands
            model(tokens, attention_mask=mask, position_ids=torch.tensor([[before, before, 0, 1, 2, 3, 4, 5]]))


@pytest.mark.parametrize("new", [1, 3])
def test_positions_that_start_anew_behind_a_cache_are_refused_and_others_are_not(new: int) -> None:
    model, tokens = mixture(family_model("llama")), token_ids(2, 5 + new)
    padded = torch.ones_like(tokens)
    padded[0, :2] = 0
    with torch.no_grad():
        for mask in (None, padded):
            places = torch.arange(5 + new).expand(2, -1) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
            for own, refused in ((places[:, 5:], False), (torch.arange(new).expand(2, -1), True)):
                given = {"past_key_values": model.new_cache(2), "use_cache": True}
                seen = None if mask is None else mask[:, :5]
                model(tokens[:, :5], attention_mask=seen, position_ids=places[:, :5], **given)
                if refused:
                    with pytest.raises(ConfigError, match="position_ids start anew"):
                        model(tokens[:, 5:], attention_mask=mask, position_ids=own, **given)
                else:
                    found = model(tokens[:, 5:], attention_mask=mask, position_ids=own, **given).logits
                    whole = model(tokens, attention_mask=mask, position_ids=places).logits
                    torch.testing.assert_close(found, whole[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sample", [False, True])
def test_a_base_with_padded_rows_takes_its_own_draft_model(sample: bool) -> None:
    """Both have 64 rows, the memory's tokenizer 50 ids; the draft model likes padding best."""
    base, drafter, prompt = family_model("llama"), family_model("llama", seed=0), token_ids(1, 6, vocab_size=50)
    drafter.lm_head.weight.data[50:] *= 5
    before = drafter.config.vocab_size
    model = MixedLM(base, decoder_memory(50, seed=3), 0.4)
    for helper in (base, drafter):
        torch.manual_seed(0)
        found = model.generate(prompt, max_new_tokens=8, do_sample=sample, assistant_model=helper)
        assert found.shape[1] == prompt.shape[1] + 8
        assert int(found.max()) < 50
        if not sample:
            assert torch.equal(found, greedily(model, prompt, 8))
    assert drafter.config.vocab_size == before
    assert drafter(prompt).logits.shape[-1] == 64


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_memory_beside_an_offloaded_base_is_where_the_base_computes(where: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    prompt = token_ids(1, 6)
    with torch.no_grad():
        expected = mixture(family_model("llama"))(prompt).logits
    tokens = mixture(family_model("llama")).generate(prompt, max_new_tokens=5, do_sample=False)
    base = family_model("llama")
    base = cpu_offload(base, "cpu") if where == "cpu" else disk_offload(base, str(tmp_path), "cpu")
    assert base.device.type == "meta"
    memory = decoder_memory(VOCAB, seed=3)
    memory.save_pretrained(tmp_path / "memory")
    for source in (memory, tmp_path / "memory"):
        model = MixedLM.from_pretrained(base, memory=source, mix_weight=0.4)
        assert {p.device.type for p in model.memories.parameters()} == {"cpu"}
        assert model.device.type == "cpu"
        with torch.no_grad():
            torch.testing.assert_close(model(prompt).logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), tokens)
