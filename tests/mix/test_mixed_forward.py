"""MixedLM's forward: what its logits are, with and without its cache."""

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CACHED, family_model, token_ids
from memories import LONG_TEXT, decoder_memory
from reference_lm import mixed_probs, next_token_probs
from torch import Tensor, nn
from transformers import DynamicCache, Trainer, TrainingArguments

from memlm.errors import ConfigError
from memlm.memory.decoder import MemoryDecoder
from memlm.mix.cache import MixedCache
from memlm.mix.mixed_lm import MixedLM

VOCAB = 40
# float32 logits of tiny models, added up in another order: errors below 1e-5, ten times that allowed
CLOSE = {"rtol": 0, "atol": 1e-4}


def tiny_memory(
    *, padding: int = 5, seed: int = 7, window: int | None = None, weight: float | None = None
) -> MemoryDecoder:
    return decoder_memory(VOCAB + padding, window=window, temperature=1.25, mix_weight=weight, seed=seed)


def mixed(mix_weight: float = 0.4, *, family: str = "llama", window: int | None = None) -> MixedLM:
    return MixedLM(family_model(family, VOCAB), tiny_memory(window=window), mix_weight)


some_tokens = partial(token_ids, vocab_size=VOCAB)
pytestmark = pytest.mark.filterwarnings(LONG_TEXT)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("window", [None, 6])
def test_softmax_of_the_logits_is_the_mixture(weight: float, window: int | None) -> None:
    model = mixed(weight, window=window)
    tokens = some_tokens(1, 11)
    with torch.no_grad():
        found = model(tokens).logits[0].double().softmax(-1)
    for length in range(1, 12):
        expected = next_token_probs(
            model.base, model.named_memories(), model.mix_weights, tokens[0, :length].tolist(), VOCAB
        )
        torch.testing.assert_close(found[length - 1], expected, rtol=1e-3, atol=1e-6)


def test_logits_keep_the_normaliser_of_the_base() -> None:
    model = mixed(0.3)
    tokens = some_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits.logsumexp(-1), model.base(tokens).logits.logsumexp(-1), **CLOSE)


def test_weight_zero_gives_the_logits_of_the_base_exactly() -> None:
    model = mixed(0.0)
    tokens = some_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model.base(tokens).logits)


def test_weight_one_gives_the_memory() -> None:
    model = mixed(1.0)
    tokens = some_tokens(2, 9)
    memory = model.named_memories()["memory"]
    with torch.no_grad():
        votes = memory.votes(memory.step(tokens), slice(None))
        torch.testing.assert_close(model(tokens).logits.log_softmax(-1), votes, **CLOSE)


def test_output_rows_beyond_the_shared_vocabulary_take_no_part() -> None:
    base = family_model("llama", VOCAB + 8)
    memory = tiny_memory(padding=3)
    for model in (base, memory.decoder):
        with torch.no_grad():
            model.get_output_embeddings().weight[VOCAB:] = 50 * model.get_output_embeddings().weight[3]
    model = MixedLM(base, memory, 0.5, vocab_size=VOCAB)
    tokens = some_tokens(1, 7)
    with torch.no_grad():
        found = model(tokens).logits
        ours = base(tokens).logits[..., :VOCAB].softmax(-1)
        theirs = (memory.decoder(tokens).logits[..., :VOCAB] / 1.25).softmax(-1)
    assert found.shape[-1] == model.config.vocab_size == VOCAB
    torch.testing.assert_close(found.double().softmax(-1), mixed_probs(ours, [theirs], [0.5]), rtol=1e-3, atol=1e-6)


def test_the_smallest_vocabulary_is_shared_where_none_is_named() -> None:
    assert MixedLM(family_model("llama", VOCAB + 8), tiny_memory(padding=3), 0.5).vocab_size == VOCAB + 3
    assert MixedLM(family_model("llama", VOCAB), tiny_memory(padding=3), 0.5).vocab_size == VOCAB


@pytest.mark.parametrize("family", CACHED)
@pytest.mark.parametrize("window", [None, 6])
def test_forward_with_a_cache_equals_forward_without(family: str, window: int | None) -> None:
    model = mixed(family=family, window=window)
    tokens = some_tokens(2, 15)
    with torch.no_grad():
        expected = model(tokens)
        assert expected.past_key_values is None
        cache, pieces = None, []
        for piece in tokens.split([7, 1, 1, 4, 2], 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    assert isinstance(cache, MixedCache)
    assert cache.get_seq_length() == 15
    torch.testing.assert_close(torch.cat(pieces, 1), expected.logits, **CLOSE)


@pytest.mark.parametrize("family", CACHED)
def test_left_padding_changes_no_logits(family: str) -> None:
    model = mixed(family=family, window=6)
    tokens = some_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(tokens, attention_mask=mask, position_ids=positions).logits
        alone = model(tokens[1:, 5:]).logits
    torch.testing.assert_close(together[1:, 5:], alone, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("cropped", [1, 4])
def test_a_cropped_cache_goes_on_as_a_fresh_one(family: str, cropped: int) -> None:
    model = mixed(family=family, window=6)
    tokens, others = some_tokens(2, 13), some_tokens(2, 5, seed=1)
    with torch.no_grad():
        cache = model.new_cache(2)
        model(tokens[:, :4], past_key_values=cache)
        cache.activate_past_recording()
        model(tokens[:, 4:], past_key_values=cache)
        cache.crop(-cropped)
        went_on = model(others, past_key_values=cache).logits
        fresh = model(torch.cat([tokens[:, :-cropped], others], 1)).logits[:, -5:]
    assert cache.get_seq_length() == 13 - cropped + 5
    torch.testing.assert_close(went_on, fresh, **CLOSE)


@pytest.mark.parametrize("act", ["reorder", "select", "repeat", "reset"])
def test_the_cache_moves_base_and_memories_together(act: str) -> None:
    model = mixed(window=6)
    tokens = some_tokens(3, 8)
    rows = {"reorder": [2, 0, 0], "select": [1, 2], "repeat": [0, 0, 1, 1, 2, 2], "reset": [0, 1, 2]}[act]
    others = some_tokens(len(rows), 3, seed=1)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        match act:
            case "reorder":
                cache.reorder_cache(torch.tensor(rows))
            case "select":
                cache.batch_select_indices(torch.tensor(rows))
            case "repeat":
                cache.batch_repeat_interleave(2)
            case "reset":
                cache.reset()
        # a reset DynamicCache keeps its zeroed keys, as transformers' own does, so only the memories' part is compared
        went_on = model.named_memories()["memory"].step(others, cache=cache.memories["memory"])
        before = tokens[rows] if act != "reset" else tokens[rows][:, :0]
        fresh = model.named_memories()["memory"].step(torch.cat([before, others], 1))[:, -3:]
        torch.testing.assert_close(went_on, fresh, **CLOSE)
        if act != "reset":
            found = model.base(others, past_key_values=cache.base).logits
            torch.testing.assert_close(found, model.base(torch.cat([before, others], 1)).logits[:, -3:], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 6])], ids=["one", "three", "places"])
def test_logits_are_kept_only_where_asked(family: str, keep: int | Tensor) -> None:
    model = mixed(family=family)
    tokens = some_tokens(2, 8)
    with torch.no_grad():
        everywhere = model(tokens).logits
        found = model(tokens, logits_to_keep=keep).logits
    torch.testing.assert_close(found, everywhere[:, -keep:] if isinstance(keep, int) else everywhere[:, keep], **CLOSE)


def test_labels_give_the_mean_cross_entropy_of_the_mixture() -> None:
    model = mixed(0.3)
    tokens = some_tokens(2, 8)
    labels = tokens.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        output = model(tokens, labels=labels)
    log_p = output.logits.double().log_softmax(-1)
    expected = [-log_p[row, t - 1, tokens[row, t]] for row in range(2) for t in range(1, 8) if labels[row, t] != -100]
    assert len(expected) == 10
    assert output.loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_outputs_as_a_tuple() -> None:
    model = mixed()
    with torch.no_grad():
        assert torch.equal(model(some_tokens(1, 4), return_dict=False)[0], model(some_tokens(1, 4)).logits)


@pytest.mark.parametrize("family", CACHED)
def test_hidden_states_and_attentions_of_the_base_are_given(family: str) -> None:
    model = mixed(family=family)
    model.base.set_attn_implementation("eager")  # others keep no attentions
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        found, expected = model(some_tokens(1, 5), **options), model.base(some_tokens(1, 5), **options)
    assert found.hidden_states
    assert found.attentions
    for mine, theirs in zip(
        found.hidden_states + found.attentions, expected.hidden_states + expected.attentions, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_another_cache_is_refused() -> None:
    model = mixed()
    with pytest.raises(TypeError, match="past_key_values is a DynamicCache; a mixed model needs its own MixedCache"):
        model(some_tokens(1, 4), past_key_values=DynamicCache())


def two_memories(weights: dict[str, float], **options: Any) -> MixedLM:
    memories = {"law": tiny_memory(seed=1, padding=0), "medicine": tiny_memory(seed=2, window=6)}
    return MixedLM(family_model("llama", VOCAB), memories, weights, **options)


def test_two_memories_have_a_weight_each() -> None:
    model = two_memories({"law": 0.2, "medicine": 0.5})
    tokens = some_tokens(1, 10)
    with torch.no_grad():
        found = model(tokens).logits[0, -1].double().softmax(-1)
    expected = next_token_probs(model.base, model.named_memories(), model.mix_weights, tokens[0].tolist(), VOCAB)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_weights_by_name_may_come_in_any_order() -> None:
    model, same = two_memories({"law": 0.2, "medicine": 0.5}), two_memories({"medicine": 0.5, "law": 0.2})
    with torch.no_grad():
        torch.testing.assert_close(model(some_tokens(1, 9)).logits, same(some_tokens(1, 9)).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"law": 0.7, "medicine": 0.5}, "sum to 1.2, above 1"),
        ({"law": 0.7}, "mix_weight of 'medicine' is missing: the memory records none from validation data; give one"),
        ({"law": 0.7, "medicin": 0.1}, "mix_weight names medicin; the memories are law, medicine"),
        (0.5, r"give one weight per memory \(law, medicine\), by name"),
        (None, "mix_weight of 'law' is missing: "),
    ],
)
def test_bad_weights_of_two_memories_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        two_memories(weights, gate="none")


@pytest.mark.parametrize("weight", [math.nan, -0.1, 1.1])
def test_a_weight_out_of_range_is_refused_and_changes_nothing(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\]"):
        mixed(weight)
    model = mixed(0.4)
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\]"):
        model.set_mix_weight(weight)
    assert model.mix_weights == model.config.mix_weights == {"memory": 0.4}


def test_a_missing_weight_is_the_recorded_one_or_an_error() -> None:
    base = family_model("llama", VOCAB)
    assert MixedLM(base, tiny_memory(weight=0.35)).mix_weights == {"memory": 0.35}
    with pytest.raises(ConfigError, match="mix_weight of 'memory' is missing: "):
        MixedLM(base, tiny_memory(), gate="none")


def test_a_new_weight_holds_from_the_next_pass_on() -> None:
    model = mixed(0.0)
    tokens = some_tokens(1, 6)
    with torch.no_grad():
        model(tokens)
        model.set_mix_weight(0.8)
        torch.testing.assert_close(model(tokens).logits, mixed(0.8)(tokens).logits, rtol=0, atol=0)
    assert model.config.mix_weights == {"memory": 0.8}


def fingerprint_of(model: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return state.hexdigest()


def test_mixing_changes_neither_weights_nor_config_of_the_base() -> None:
    base = family_model("llama", VOCAB)
    weights, config, generation = (
        fingerprint_of(base),
        base.config.to_json_string(False),
        base.generation_config.to_dict(),
    )
    model = MixedLM(base, tiny_memory(), 0.5)
    model.generation_config.max_new_tokens = 77
    model.generate(some_tokens(1, 5), max_new_tokens=3, num_beams=2)
    assert fingerprint_of(base) == weights
    assert base.config.to_json_string(False) == config
    assert base.generation_config.to_dict() == generation


def test_nothing_of_a_mixed_model_is_trained() -> None:
    model = mixed()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_several_bases_share_one_memory_and_keep_their_own_settings() -> None:
    memory = tiny_memory(padding=5, window=8)
    wide = MixedLM(family_model("llama", VOCAB + 5), memory, 0.5)
    narrow = MixedLM(family_model("llama", VOCAB, seed=3), memory, 0.2, memory_window=4)
    shared = {p.data_ptr() for p in memory.parameters()}
    for model in (wide, narrow):
        assert {p.data_ptr() for p in model.memories.parameters()} == shared
    with torch.no_grad():
        found_wide, found_narrow = wide(some_tokens(1, 12)).logits, narrow(some_tokens(1, 12)).logits
    fresh_wide = MixedLM(family_model("llama", VOCAB + 5), tiny_memory(padding=5, window=8), 0.5)
    fresh_narrow = MixedLM(family_model("llama", VOCAB, seed=3), tiny_memory(padding=5, window=8), 0.2, memory_window=4)
    with torch.no_grad():
        torch.testing.assert_close(found_wide, fresh_wide(some_tokens(1, 12)).logits, rtol=0, atol=0)
        torch.testing.assert_close(found_narrow, fresh_narrow(some_tokens(1, 12)).logits, rtol=0, atol=0)
    assert (memory.vocab_size, memory.window) == (VOCAB + 5, 8), "the memory itself is left as it was"


def test_the_window_can_be_set_for_a_mixture() -> None:
    model = MixedLM(family_model("llama", VOCAB), tiny_memory(window=20), 0.5, memory_window=4)
    tokens = some_tokens(1, 11)
    expected = next_token_probs(
        model.base, {"memory": tiny_memory_with(window=4)}, model.mix_weights, tokens[0].tolist(), VOCAB
    )
    with torch.no_grad():
        found = model(tokens).logits[0, -1].double().softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def tiny_memory_with(window: int) -> MemoryDecoder:
    memory = tiny_memory(window=20)
    memory.set_window(window)
    return memory


@pytest.mark.parametrize("window", [-3, 0, 1])
def test_a_window_that_holds_nothing_is_refused(window: int) -> None:
    with pytest.raises(ConfigError, match=f"memory_window = {window}: must be at least 2"):
        MixedLM(family_model("llama", VOCAB), tiny_memory(), 0.5, memory_window=window)


def test_a_trainer_gets_the_same_loss_however_it_accumulates(tmp_path: Path) -> None:
    """A mixture's loss is a mean, so that what the Trainer counts of a whole step is nothing to it."""
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 12, vocab_size=40)]
    losses = {}
    for accumulation in (1, 4):
        model = MixedLM(family_model("llama", 40), decoder_memory(40), mix_weight=0.3)
        model.base.requires_grad_(True)
        how: dict[str, Any] = {"per_device_train_batch_size": 8 // accumulation, "report_to": "none"}
        how |= {"gradient_accumulation_steps": accumulation, "dataloader_pin_memory": False, "save_strategy": "no"}
        arguments = TrainingArguments(str(tmp_path), max_steps=1, **how)
        losses[accumulation] = Trainer(model, arguments, train_dataset=rows).train().training_loss
    assert losses[4] == pytest.approx(losses[1], rel=1e-3)
