"""One base with a decoder, an MLP memory and live retrieval at once: the sum, generation, coming and going, weights."""

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_model, sentences, tiny_model
from families import family_model, token_ids
from memories import ALL, WEIGHTS, Make, decoder_memory
from reference_lm import mixed_probs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from memlm import MixedLM, load_memory
from memlm.errors import ArtifactError, ConfigError, ModelError, TokenizerMismatchError
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.mlp import MLPMemory
from memlm.memory.retrieval import RetrievalMemory

pytestmark = pytest.mark.slow

# float32 logits of tiny models, added up in another order: errors below 1e-5, ten times that allowed
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="session")
def wide_base(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base of the same tokenizer and another width."""
    return save_model(tmp_path_factory.mktemp("models") / "wide-base", tokenizer, seed=6, width=48)


some_tokens = partial(token_ids, vocab_size=300)


@torch.no_grad()
def logits(model: Any, tokens: Tensor | None = None, **options: Any) -> Tensor:
    return model(some_tokens(2, 9) if tokens is None else tokens, **options).logits


@torch.no_grad()
def activation(model: Any, tap: str, tokens: Tensor) -> Tensor:
    """What goes into the tap at the last token, `(D,)`."""
    seen: list[Tensor] = []
    handle = model.get_submodule(tap).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens, use_cache=False)
    handle.remove()
    return seen[0][0, -1]


@torch.no_grad()
def votes_by_hand(memory: Any, base: Any, tokens: Tensor, size: int) -> Tensor:
    """One memory's distribution after `tokens` `(1, T)`, by its definition, `(size,)` in float64."""
    if isinstance(memory, MemoryDecoder):
        return memory.decoder(tokens, use_cache=False).logits[0, -1, :size].double().softmax(-1)
    if isinstance(memory, MLPMemory):
        assert memory.tap is not None
        hidden = memory.body(activation(base, memory.tap, tokens)[None])
        return (hidden @ memory.output.weight.T)[0, :size].double().softmax(-1)
    tap = str(memory.store.manifest.facts["tap"])
    query = activation(memory.teacher if memory.teacher is not None else base, tap, tokens).half().double().numpy()
    keys = np.concatenate([np.load(p) for p in sorted((memory.store.folder / "keys").glob("*.npy"))]).astype(np.float64)
    distances = ((keys - query) ** 2).sum(1)
    weights = np.exp((distances.min() - distances) / memory.settings.retrieval.target_temperature)
    values = np.load(memory.store.folder / "values.npy")
    counted = np.bincount(values, weights=weights, minlength=size)[:size]
    return torch.from_numpy(counted / counted.sum())


@torch.no_grad()
def next_token_probs(model: MixedLM, tokens: Tensor, weights: dict[str, float]) -> Tensor:
    """What the mixture says of the token after `tokens` `(1, T)`, each part by hand."""
    size = model.vocab_size
    base = model.base(tokens, use_cache=False).logits[0, -1, :size].double().softmax(-1)
    votes = [votes_by_hand(memory, model.base, tokens, size) for memory in model.named_memories().values()]
    return mixed_probs(base, votes, [weights[name] for name in model.named_memories()])


def greedy(model: MixedLM, prompt: Tensor, new_tokens: int) -> list[int]:
    tokens = prompt[None]
    for _ in range(new_tokens):
        best = next_token_probs(model, tokens, model.mix_weights).argmax()
        tokens = torch.cat([tokens, best[None, None]], 1)
    return tokens[0, len(prompt) :].tolist()


def generate(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """New tokens only."""
    return model.generate(tokens, **{"do_sample": False, "max_new_tokens": 8, **options})[:, tokens.shape[1] :]


# --- the sum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [WEIGHTS, {"law": 0.0, "mlp": 0.6, "facts": 0.4}], ids=["all", "without base"])
def test_softmax_of_the_logits_is_the_sum_of_all_parts(trio: MixedLM, weights: dict[str, float]) -> None:
    trio.set_mix_weight(weights)
    tokens = some_tokens(1, 7)
    found = logits(trio, tokens)[0].double().softmax(-1)
    assert found.shape == (7, 320)
    for length in range(1, 8):
        # float32 logits on one side, float64 probabilities on the other, and queries rounded to float16 (see ALL)
        expected = next_token_probs(trio, tokens[:, :length], weights)
        torch.testing.assert_close(found[length - 1], expected, rtol=2e-3, atol=1e-6)


def test_every_memory_takes_part(make: Make) -> None:
    model = make()
    everything = logits(model)
    for name in WEIGHTS:
        assert (logits(model, mix_weight={name: 0.0}) - everything).abs().max() > 0.01


def test_at_weight_zero_of_all_memories_the_logits_are_the_base_s_own(trio: MixedLM) -> None:
    expected = trio.base(some_tokens(2, 9)).logits[..., :320]
    assert torch.equal(logits(trio, mix_weight=dict.fromkeys(WEIGHTS, 0.0)), expected)
    rows = logits(trio, mix_weight={"law": [0.0, 0.5], "mlp": 0.0, "facts": [0.0, 0.5]})
    assert torch.equal(rows[0], expected[0])
    assert not torch.equal(rows[1], expected[1])
    trio.set_mix_weight(dict.fromkeys(WEIGHTS, 0.0))
    assert torch.equal(logits(trio), expected)


def test_retrieval_alone_at_weight_one_finds_only_tokens_of_the_corpus(make: Make) -> None:
    model = make({"facts": 1.0})
    values = set(np.load(model.named_memories()["facts"].store.folder / "values.npy").tolist())  # type: ignore[union-attr]
    possible = logits(model, some_tokens(1, 5))[0].isfinite()
    assert {int(token) for token in possible.nonzero()[:, 1]} <= values
    assert 0 < int(possible.sum()) < possible.numel()


# --- generation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_the_plain_loop(trio: MixedLM, use_cache: bool) -> None:
    prompt = some_tokens(1, 5)
    found = generate(trio, prompt, use_cache=use_cache)[0].tolist()
    assert found == greedy(trio, prompt[0], 8)
    assert found != generate(trio.base, prompt)[0].tolist(), "the case must need the memories"


def test_forward_with_a_cache_equals_forward_without(trio: MixedLM) -> None:
    tokens = some_tokens(2, 12)
    cache, pieces = None, []
    for piece in tokens.split([5, 1, 4, 2], 1):
        with torch.no_grad():
            output = trio(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1).softmax(-1), logits(trio, tokens).softmax(-1), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_rows_equal_rows_alone(trio: MixedLM, attention: str) -> None:
    trio.base.set_attn_implementation(attention)
    lengths = [8, 3, 1]
    mask = torch.stack([(torch.arange(8) >= 8 - length).long() for length in lengths])
    tokens = some_tokens(3, 8) * mask
    together = generate(trio, tokens, attention_mask=mask)
    for row, length in enumerate(lengths):
        assert together[row].tolist() == generate(trio, tokens[row : row + 1, -length:])[0].tolist()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    everywhere = logits(trio, tokens, attention_mask=mask, position_ids=positions)
    alone = logits(trio, tokens[1:2, -3:])
    torch.testing.assert_close(everywhere[1:2, -3:].softmax(-1), alone.softmax(-1), rtol=2e-3, atol=1e-6)


def test_beams_are_the_same_with_and_without_cache(trio: MixedLM) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    prompt = some_tokens(2, 5)
    with_cache, without = (
        trio.generate(prompt, max_new_tokens=6, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert with_cache.sequences.shape == (4, 11)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores, rtol=1e-3, atol=1e-4)
    assert not torch.equal(with_cache.sequences[0], with_cache.sequences[1])


def test_several_sequences_are_sampled_per_row(trio: MixedLM) -> None:
    found = generate(trio, some_tokens(2, 5), do_sample=True, num_return_sequences=3)
    assert found.shape == (6, 8)
    assert len({tuple(row) for row in found.tolist()}) == 6


@pytest.mark.parametrize("mix_weight", [None, {"law": 0.1, "facts": 0.6}], ids=["own weights", "of the call"])
@pytest.mark.parametrize("drafts", ["assistant", "prompt lookup"])
def test_drafted_tokens_change_nothing(trio: MixedLM, drafts: str, mix_weight: dict[str, float] | None) -> None:
    prompt = some_tokens(1, 4).repeat(1, 2)
    weights = {} if mix_weight is None else {"mix_weight": mix_weight}
    # not the base itself: its output layer is padded, and transformers wants equal vocabularies
    options = {"assistant_model": tiny_model(320)} if drafts == "assistant" else {"prompt_lookup_num_tokens": 3}
    expected = generate(trio, prompt, **weights)
    assert torch.equal(generate(trio, prompt, **options, **weights), expected)


def test_a_cache_is_carried_from_turn_to_turn(trio: MixedLM) -> None:
    prompt, cache = some_tokens(1, 5), trio.new_cache(1)
    first = trio.generate(prompt, past_key_values=cache, max_new_tokens=4, do_sample=False)
    turn = torch.cat([first, some_tokens(1, 3, seed=1)], 1)
    assert torch.equal(generate(trio, turn, past_key_values=cache), generate(trio, turn))


# --- memories come and go -----------------------------------------------------------------------------------------


def same(model: MixedLM, other: MixedLM) -> None:
    assert model.mix_weights == other.mix_weights == model.config.mix_weights
    assert list(model.named_memories()) == list(other.named_memories())
    assert model.vocab_size == other.vocab_size
    assert torch.equal(logits(model), logits(other))
    assert torch.equal(generate(model, some_tokens(1, 5)), generate(other, some_tokens(1, 5)))


def test_memories_added_one_by_one_equal_a_model_constructed_so(
    make: Make, places: dict[str, Path], model_folder: str
) -> None:
    model = make({"law": 0.3})
    logits(model)
    model.add_memory("mlp", places["mlp"], 0.2)
    model.add_memory("facts", places["facts"], 0.25, retrieval=ALL)
    same(model, make())
    facts = model.named_memories()["facts"]
    assert isinstance(facts, RetrievalMemory)
    assert facts.teacher is None, "the base is known to be the datastore's teacher"


def test_a_loaded_memory_is_added_too_and_left_as_it_was(make: Make, places: dict[str, Path]) -> None:
    model, memory = make({"law": 0.3}), load_memory(places["mlp"])
    model.add_memory("mlp", memory, 0.2)
    same(model, make({"law": 0.3, "mlp": 0.2}))
    assert memory.settings == load_memory(places["mlp"]).settings


def test_an_added_memory_takes_the_weight_it_was_validated_with(make: Make, places: dict[str, Path]) -> None:
    recorded = load_memory(places["mlp"]).settings.mix_weight
    assert recorded is not None
    model = make({"law": 0.0})
    model.add_memory("mlp", places["mlp"])
    assert model.mix_weights == {"law": 0.0, "mlp": recorded}
    with pytest.raises(ConfigError, match=r"mix_weight of 'facts' is missing: the memory records none .* give one"):
        model.add_memory("facts", places["facts"])


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_removed_memory_leaves_a_model_constructed_without_it(make: Make, name: str) -> None:
    model = make()
    logits(model)
    model.remove_memory(name)
    same(model, make({other: weight for other, weight in WEIGHTS.items() if other != name}))


def test_without_any_memory_the_base_is_left(make: Make, places: dict[str, Path]) -> None:
    model = make()
    for name in WEIGHTS:
        model.remove_memory(name)
    assert model.mix_weights == {}
    assert torch.equal(logits(model), model.base(some_tokens(2, 9)).logits[..., :320])
    with pytest.raises(ConfigError, match=r"give one weight per memory \(there is none\)"):
        model.set_mix_weight(0.5)
    with pytest.raises(ConfigError, match="no memory is called 'law'; the memories are none"):
        model.remove_memory("law")
    model.add_memory("law", places["law"], 0.3)
    same(model, make({"law": 0.3}))


def test_a_removed_memory_gives_the_vocabulary_back() -> None:
    base, wide, narrow = family_model("llama", 44), decoder_memory(42, seed=1), decoder_memory(40, seed=2)
    model = MixedLM(base, {"wide": wide, "narrow": narrow}, {"wide": 0.3, "narrow": 0.2})
    assert logits(model, some_tokens(1, 5) % 40).shape[-1] == 40
    model.remove_memory("narrow")
    alone = MixedLM(base, {"wide": wide}, {"wide": 0.3})
    assert model.vocab_size == alone.vocab_size == 42
    assert torch.equal(logits(model, some_tokens(1, 5) % 40), logits(alone, some_tokens(1, 5) % 40))
    model.remove_memory("wide")
    assert model.vocab_size == 44


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("law", "memory name 'law' is taken; remove that memory first"),
        ("eu/law", "memory name 'eu/law': use letters, digits"),
        ("keys", "memory name 'keys' is what torch calls something of its own; take another"),
        ("training", "memory name 'training' is what torch calls"),
    ],
)
def test_a_name_that_cannot_be_is_refused(make: Make, places: dict[str, Path], name: str, message: str) -> None:
    model = make({"law": 0.3})
    with pytest.raises(ConfigError, match=message):
        model.add_memory(name, places["mlp"], 0.1)
    same(model, make({"law": 0.3}))


def test_unknown_names_are_refused(make: Make) -> None:
    model = make()
    with pytest.raises(ConfigError, match="no memory is called 'bio'; the memories are law, mlp, facts"):
        model.remove_memory("bio")
    for act in (model.set_mix_weight, lambda w: model(some_tokens(1, 3), mix_weight=w)):
        with pytest.raises(ConfigError, match="mix_weight names bio; the memories are law, mlp, facts"):
            act({"bio": 0.1, "law": 0.1})
    assert model.mix_weights == WEIGHTS


def test_weights_above_one_are_refused_before_the_memory_is_loaded(
    make: Make, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make({"law": 0.7})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded before the check")

    monkeypatch.setattr("memlm.mix.loading.load_memory", fail)
    with pytest.raises(ConfigError, match=r"the weights 0\.7, 0\.4 sum to 1\.1, above 1"):
        model.add_memory("mlp", places["mlp"], 0.4)
    assert model.mix_weights == {"law": 0.7}


# --- a cache older than a memory ----------------------------------------------------------------------------------


def test_a_cache_older_than_a_memory_is_refused_and_not_extended(make: Make, places: dict[str, Path]) -> None:
    model = make({"mlp": 0.2})
    cache = model.new_cache(1)
    logits(model, some_tokens(1, 5), past_key_values=cache)
    model.add_memory("law", places["law"], 0.3)
    with pytest.raises(ConfigError, match="the cache is older than memory 'law'; start a new one"):
        model(some_tokens(1, 2), past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_a_cache_of_another_memory_of_that_name_is_refused(make: Make, places: dict[str, Path]) -> None:
    model = make({"law": 0.3})
    cache = model.new_cache(1)
    logits(model, some_tokens(1, 5), past_key_values=cache)
    model.remove_memory("law")
    model.add_memory("law", places["law"], 0.3)
    with pytest.raises(ConfigError, match="the cache is older than memory 'law'"):
        model(some_tokens(1, 2), past_key_values=cache)


def test_a_cache_goes_on_after_a_memory_was_removed(make: Make) -> None:
    model = make()
    tokens = some_tokens(2, 9)
    cache = model.new_cache(2)
    logits(model, tokens[:, :5], past_key_values=cache)
    model.remove_memory("law")
    went_on = logits(model, tokens[:, 5:], past_key_values=cache)
    torch.testing.assert_close(went_on.softmax(-1), logits(model)[:, 5:].softmax(-1), rtol=2e-3, atol=1e-6)


def test_a_copied_cache_copies_no_memory_and_serves_the_same_model(make: Make) -> None:
    model, tokens = make(), some_tokens(1, 9)
    cache = model.new_cache(1)
    logits(model, tokens[:, :5], past_key_values=cache)
    twin = copy.deepcopy(cache)
    first, second = (logits(model, tokens[:, 5:], past_key_values=c) for c in (cache, twin))
    assert torch.equal(first, second)


# --- weights ------------------------------------------------------------------------------------------------------


def test_naming_some_memories_keeps_the_weights_of_the_others(make: Make) -> None:
    model = make()
    model.set_mix_weight({"facts": 0.1, "law": 0.0})
    assert model.mix_weights == model.config.mix_weights == {"law": 0.0, "mlp": 0.2, "facts": 0.1}
    same(model, make({"law": 0.0, "mlp": 0.2, "facts": 0.1}))
    with pytest.raises(ConfigError, match=r"the weights 0, 0\.95, 0\.1 sum to 1\.05"):
        model.set_mix_weight({"mlp": 0.95})
    assert model.mix_weights == {"law": 0.0, "mlp": 0.2, "facts": 0.1}


def test_naming_some_memories_takes_the_recorded_weights_of_the_others(
    model_folder: str, places: dict[str, Path]
) -> None:
    recorded = load_memory(places["mlp"]).settings.mix_weight
    memories = {"law": places["law"], "mlp": places["mlp"]}
    model = MixedLM.from_pretrained(model_folder, memory=memories, mix_weight={"law": 0.0})
    assert model.mix_weights == {"law": 0.0, "mlp": recorded}
    model.set_mix_weight({"mlp": 0.01})
    model.set_mix_weight({"law": 0.02})
    assert model.mix_weights == {"law": 0.02, "mlp": 0.01}


@pytest.mark.parametrize("given", [{"law": 0.5, "facts": 0.0}, {"law": 0.0, "mlp": 0.0, "facts": 1.0}], ids=str)
def test_a_weight_of_the_call_holds_for_that_call_only(make: Make, given: dict[str, float]) -> None:
    model, other = make(), make(WEIGHTS | given)
    before = logits(model)
    assert torch.equal(logits(model, mix_weight=given), logits(other))
    prompt = some_tokens(1, 5)
    assert torch.equal(generate(model, prompt, mix_weight=given), generate(other, prompt))
    assert torch.equal(logits(model), before)
    assert model.mix_weights == model.config.mix_weights == WEIGHTS


ROWS = {"law": [0.0, 0.7, 0.2], "facts": [0.8, 0.0, 0.3]}


def rows_alone(model: MixedLM, act: Callable[..., Tensor], tokens: Tensor) -> list[Tensor]:
    return [
        act(model, tokens[row : row + 1], mix_weight={name: weights[row] for name, weights in ROWS.items()})
        for row in range(3)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["list", "tensor", "array"])
def test_every_row_of_a_batch_has_its_own_weight(trio: MixedLM, kind: str) -> None:
    convert: dict[str, Callable[[list[float]], Any]] = {"list": list, "tensor": torch.tensor, "array": np.array}
    given = {name: convert[kind](weights) for name, weights in ROWS.items()}
    tokens = some_tokens(3, 6)
    found, alone = logits(trio, tokens, mix_weight=given), rows_alone(trio, logits, tokens)
    torch.testing.assert_close(found.softmax(-1), torch.cat(alone).softmax(-1), rtol=2e-3, atol=1e-6)
    assert torch.equal(generate(trio, tokens, mix_weight=given), torch.cat(rows_alone(trio, generate, tokens)))


@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_a_single_memory_takes_weights_per_row_without_its_name(make: Make, kind: str) -> None:
    model, tokens = make({"mlp": 0.5}), some_tokens(3, 6)
    weights: Any = [0.0, 1.0, 0.3] if kind == "list" else torch.tensor([0.0, 1.0, 0.3])
    alone = [generate(model, tokens[r : r + 1], mix_weight=float(w)) for r, w in enumerate(weights)]
    assert torch.equal(generate(model, tokens, mix_weight=weights), torch.cat(alone))
    beams = [generate(model, tokens[r : r + 1], mix_weight=float(w), num_beams=2) for r, w in enumerate(weights)]
    assert torch.equal(generate(model, tokens, mix_weight=weights, num_beams=2), torch.cat(beams))


def test_beams_of_a_row_share_its_weight(trio: MixedLM) -> None:
    tokens = some_tokens(3, 6)

    def beams(model: MixedLM, tokens: Tensor, **options: Any) -> Tensor:
        return generate(model, tokens, num_beams=3, num_return_sequences=2, max_new_tokens=5, **options)

    assert torch.equal(beams(trio, tokens, mix_weight=ROWS), torch.cat(rows_alone(trio, beams, tokens)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"law": [0.1, 0.9, 0.2]}, r"the weights 0\.9, 0\.2, 0\.25 in row 1 sum to 1\.35, above 1"),
        ({"law": [0.1, 0.1, -0.2]}, r"mix_weight = -0\.2 in row 2: must be in \[0, 1\]"),
        ({"law": [0.1, 0.2]}, "mix_weight: 2 weights for a batch of 3 rows"),
        ({"law": [0.1, 0.2, 0.1, 0.2]}, "mix_weight: 4 weights for a batch of 3 rows"),
        ({"law": []}, "mix_weight: 0 weights for a batch of 3 rows"),
        ({"law": [0.1] * 3, "mlp": [0.1] * 2}, "the memories have weights for 2 and 3 rows"),
        ({"law": [[0.1]] * 3}, r"mix_weight of 'law' has shape \(3, 1\): give a number, or one per row"),
        ([0.1, 0.2, 0.3], r"give one weight per memory \(law, mlp, facts\), by name"),
    ],
)
def test_weights_that_do_not_fit_the_batch_are_refused(make: Make, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()(some_tokens(3, 4), mix_weight=given)


def test_weights_per_row_belong_to_a_call(make: Make) -> None:
    model = make({"mlp": 0.5})
    with pytest.raises(ConfigError, match=r"mix_weight of 'mlp' has shape \(2,\): give a number; one per row is for"):
        model.set_mix_weight([0.1, 0.2])  # type: ignore[arg-type]
    assert model.mix_weights == model.config.mix_weights == {"mlp": 0.5}


# --- memories that do not fit the base ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "facts"])
def test_a_memory_made_for_another_width_is_refused_and_changes_nothing(
    make: Make, places: dict[str, Path], wide_base: str, name: str
) -> None:
    memory = RetrievalMemory(places["facts"], ALL) if name == "facts" else load_memory(places["mlp"])
    message = {"mlp": "with 2 blocks, 32 wide; .* has 2, 48 wide", "facts": "holds keys 32 wide, .* is 48 wide"}[name]
    model = make({"law": 0.3}, base=wide_base)
    with pytest.raises(ModelError, match=message):
        model.add_memory(name, memory, 0.1)
    same(model, make({"law": 0.3}, base=wide_base))
    with pytest.raises(ModelError, match=message):
        MixedLM(model.base, {name: memory}, {name: 0.1})


def test_a_window_that_an_added_memory_has_no_positions_for_changes_nothing() -> None:
    base, short = family_model("llama", 40), MemoryDecoder(family_model("gpt2", 40))
    model = MixedLM(base, {"law": decoder_memory(40, seed=1)}, {"law": 0.3}, memory_window=100)
    before = logits(model, some_tokens(1, 5) % 40)
    with pytest.raises(ConfigError, match="memory_window = 100: the memory has positions for 24 tokens"):
        model.add_memory("short", short, 0.1)
    assert model.mix_weights == {"law": 0.3}
    assert list(model.named_memories()) == ["law"]
    assert torch.equal(logits(model, some_tokens(1, 5) % 40), before)


@pytest.fixture(scope="session")
def strange_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base of another tokenizer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(sentences(20, seed=3), trainer)
    folder = tmp_path_factory.mktemp("models") / "strange-base"
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    tiny_model(290, seed=8).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_memory_of_another_tokenizer_is_refused_with_the_way_out(
    places: dict[str, Path], strange_base: str, name: str
) -> None:
    with pytest.raises(TokenizerMismatchError, match=r"different tokenizers.*memlm adapt"):
        MixedLM.from_pretrained(strange_base, memory={name: places[name]}, mix_weight={name: 0.3})
    model = MixedLM.from_pretrained(strange_base, memory=strange_base, mix_weight=0.5)
    before = logits(model, some_tokens(1, 5) % 290)
    for source in (places[name], load_memory(places[name])):
        with pytest.raises(TokenizerMismatchError, match=r"different tokenizers.*memlm adapt"):
            model.add_memory(name, source, 0.1)
    assert list(model.named_memories()) == ["memory"]
    assert torch.equal(logits(model, some_tokens(1, 5) % 290), before)


def test_a_retriever_votes_within_the_vocabulary_that_all_parts_share(make: Make) -> None:
    """Ids beyond it must not land in the row of the next token."""
    model = make()
    model.add_memory("narrow", decoder_memory(290, seed=1), 0.0)
    assert model.vocab_size == 290
    tokens = some_tokens(2, 6) % 290
    found = logits(model, tokens).double().softmax(-1)
    assert found.shape == (2, 6, 290)
    for row in range(2):
        for length in (1, 6):
            expected = next_token_probs(model, tokens[row : row + 1, :length], model.mix_weights)
            torch.testing.assert_close(found[row, length - 1], expected, rtol=2e-3, atol=1e-6)


# --- saving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_base", [False, True])
def test_a_mixture_of_all_kinds_comes_back(make: Make, tmp_path: Path, include_base: bool) -> None:
    model = make()
    model.save_pretrained(tmp_path / "mixed", include_base=include_base)
    saved = {str(p.relative_to(tmp_path / "mixed")) for p in tmp_path.rglob("*.safetensors")}
    weights = {"memories/law/model.safetensors", "memories/mlp/model.safetensors"}
    assert saved == weights | ({"base/model.safetensors"} if include_base else set())
    assert [p.name for p in (tmp_path / "mixed" / "memories" / "facts").iterdir()] == ["memory.json"]
    loaded = MixedLM.from_pretrained(tmp_path / "mixed")
    assert loaded.mix_weights == WEIGHTS
    kinds = {name: type(memory) for name, memory in loaded.named_memories().items()}
    assert kinds == {"law": MemoryDecoder, "mlp": MLPMemory, "facts": RetrievalMemory}
    facts = loaded.named_memories()["facts"]
    assert isinstance(facts, RetrievalMemory)
    assert facts.settings.retrieval == ALL
    torch.testing.assert_close(logits(loaded).softmax(-1), logits(model).softmax(-1), rtol=2e-3, atol=1e-6)
    assert MixedLM.from_pretrained(tmp_path / "mixed", mix_weight={"law": 0.1}).mix_weights == WEIGHTS | {"law": 0.1}


def test_a_narrowed_mixture_comes_back(make: Make, tmp_path: Path) -> None:
    model = make()
    model.add_memory("narrow", decoder_memory(290, seed=1), 0.1)
    model.save_pretrained(tmp_path)
    loaded = MixedLM.from_pretrained(tmp_path)
    assert loaded.vocab_size == 290
    tokens = some_tokens(2, 6) % 290
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), **CLOSE)


def test_a_mixture_without_memories_comes_back(make: Make, tmp_path: Path) -> None:
    model = make({"law": 0.3})
    model.remove_memory("law")
    model.save_pretrained(tmp_path)
    loaded = MixedLM.from_pretrained(tmp_path)
    assert loaded.mix_weights == {}
    assert torch.equal(logits(loaded), logits(model)[..., : loaded.vocab_size])


def test_a_datastore_that_is_gone_is_named(
    model_folder: str, datastore_folder: Path, places: dict[str, Path], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(datastore_folder, tmp_path / "store"))
    memories = {"mlp": places["mlp"], "facts": store}
    model = MixedLM.from_pretrained(model_folder, memory=memories, mix_weight={"mlp": 0.2, "facts": 0.3})
    model.save_pretrained(tmp_path / "mixed")
    shutil.rmtree(store)
    with pytest.raises(ArtifactError, match=str(store)):
        MixedLM.from_pretrained(tmp_path / "mixed")
    with pytest.raises(ArtifactError, match=f"datastore {store} was changed or deleted while in use; load it again"):
        model(some_tokens(1, 3))
