"""The gate: weights per token, against a slow twin, through caches, and their bound."""

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from families import family_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import Make, decoder_memory
from reference_lm import next_token_probs
from torch import Tensor

from memlm.errors import ConfigError
from memlm.memory.confidence import ConfidenceHead
from memlm.mix.gate import Gate, together
from memlm.mix.gate_config import GateConfig
from memlm.mix.mixed_lm import MixedLM
from memlm.mix.posterior import Explanations, FixedShare

VOCAB = 40
# float32, summed in another order, through a recursion over a dozen tokens of sharply different models
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
some_tokens = partial(token_ids, vocab_size=VOCAB)


def head(seed: int = 0, width: int = 16) -> ConfidenceHead:
    numbers = torch.randn(width + 5, generator=torch.Generator().manual_seed(seed)).tolist()
    return ConfidenceHead(
        memory="m", tokenizer=None, state=numbers[:width], features=numbers[width:], bias=0.2, base="b"
    )


def mixture(gate: str = "posterior", *, memories: int = 1, known: bool = True, **config: Any) -> MixedLM:
    parts = {}
    for number in range(memories):
        part = decoder_memory(VOCAB, mix_weight=0.3 + 0.1 * number if known else None, seed=7 + number)
        part.confidence_head = head(number, part.decoder.config.hidden_size)
        parts[f"m{number}"] = part
    model = MixedLM(family_model("llama", VOCAB), parts, gate=GateConfig(gate=gate, **config))  # type: ignore[arg-type]
    model.generation_config.eos_token_id = None
    return model


def own_weight(model: MixedLM, name: str, text: list[int]) -> float:
    """A memory's own weight after `text`, from whole distributions."""
    memory = model.named_memories()[name]
    if not model.gate.gate or model.gate.gate == "posterior":
        return model.mix_weights[name]
    base, votes = (next_token_probs(model.base, {name: memory}, {name: w}, text, VOCAB) for w in (0.0, 1.0))
    found = memory.confidence_head
    assert found is not None
    state = memory.step(torch.tensor([text]))[0, -1].double()
    seen = [-(p * p.log()).sum() for p in (base, votes)] + [p.max().log() for p in (base, votes)]
    logit = (state * torch.tensor(found.state)).sum() + found.bias
    logit += sum(w * x for w, x in zip(found.features, [*seen, float(base.argmax() == votes.argmax())], strict=True))
    return float(torch.sigmoid(logit))


@torch.no_grad()
def slow_weights(model: MixedLM, text: list[int], began: int = 0, silent: Collection[int] = ()) -> dict[str, float]:
    """The weights after `text` whose tokens count from `began` on, but for the places in `silent`: Bayes' rule and
    fixed share, in probabilities."""
    config, names = model.gate, list(model.memories)
    own = config.gate != "posterior" or len(model.mix_weights) == len(names)
    if config.gate == "confidence":
        odds = {name: (w := own_weight(model, name, text)) / (1 - w) for name in names}
        return {name: value / (1 + sum(odds.values())) for name, value in odds.items()}
    kinds: list[tuple[str, str]] = [("base", "")]
    kinds += [("alone", name) for name in names]
    kinds += [("own", name) for name in names] if own else []
    of_alone = (0.05 if config.gate == "both" else 0.5) if own else 1.0
    share = {"base": 1 - config.prior, "alone": of_alone * config.prior, "own": (1 - of_alone) * config.prior}
    prior = [share[kind] / (len(names) if name else 1) for kind, name in kinds]
    now = prior
    for at in (place for place in range(began + 1, len(text)) if place not in silent):
        said = []
        for kind, name in kinds:
            weight = 0.0 if kind == "base" else 1.0 if kind == "alone" else own_weight(model, name, text[:at])
            memories: Mapping[str, Any] = {name: model.named_memories()[name]} if name else {}
            probs = next_token_probs(model.base, memories, {name: weight} if name else {}, text[:at], VOCAB)
            said.append(float(probs[text[at]]))
        joint = [p * s for p, s in zip(now, said, strict=True)]
        now = [(1 - config.switch) * j / sum(joint) + config.switch * p for j, p in zip(joint, prior, strict=True)]
    weights = dict.fromkeys(names, 0.0)
    for probability, (kind, name) in zip(now, kinds, strict=True):
        if name:
            weights[name] += probability * (1.0 if kind == "alone" else own_weight(model, name, text))
    return weights


CASES: list[dict[str, Any]] = [
    {},
    {"known": False, "switch": 0.0},
    {"memories": 2, "prior": 0.8, "switch": 0.2},
    {"gate": "both"},
    {"gate": "both", "memories": 2},
    {"gate": "confidence"},
    {"gate": "confidence", "memories": 2},
]


def weights_of(model: MixedLM, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        parts = model.components(tokens, **options)
    return torch.stack([torch.as_tensor(weight) for weight in parts.weights], -1)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_a_slow_twin(case: dict[str, Any]) -> None:
    model, tokens = mixture(**case), some_tokens(2, 9)
    found = weights_of(model, tokens)
    for row in range(2):
        for length in range(1, 10):
            slow = slow_weights(model, tokens[row, :length].tolist())
            torch.testing.assert_close(found[row, length - 1], torch.tensor(list(slow.values())), **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_mixture_with_those_weights(case: dict[str, Any]) -> None:
    model, tokens = mixture(**case), some_tokens(1, 8)
    with torch.no_grad():
        found = model(tokens).logits[0, -1].double().softmax(-1)
    text = tokens[0].tolist()
    expected = next_token_probs(model.base, model.named_memories(), slow_weights(model, text), text, VOCAB)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.grid(3)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [[1] * 10, [4, 1, 1, 4], [3, 7]])
def test_steps_with_a_cache_weigh_as_the_whole_text(case: dict[str, Any], steps: list[int]) -> None:
    model, tokens = mixture(**case), some_tokens(3, 10)
    whole, cache, at, found = weights_of(model, tokens), model.new_cache(3), 0, []
    for count in steps:
        found.append(weights_of(model, tokens[:, at : at + count], cache=cache, use_cache=True))
        at += count
    torch.testing.assert_close(torch.cat(found, 1), whole, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_padding_on_the_left_is_no_evidence(case: dict[str, Any]) -> None:
    model, tokens = mixture(**case), some_tokens(1, 8)
    padded = torch.nn.functional.pad(tokens, (3, 0), value=5)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (3, 0), value=0)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    found = weights_of(model, padded, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(found[:, 3:], weights_of(model, tokens), **CLOSE)
    cache, parts = model.new_cache(1), []
    for start, end in ((0, 6), (6, 7), (7, 11)):
        chunk = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
        parts.append(weights_of(model, padded[:, start:end], cache=cache, use_cache=True, **chunk))
    torch.testing.assert_close(torch.cat(parts, 1)[:, 3:], weights_of(model, tokens), **CLOSE)


def test_gradients_flow_after_a_call_in_inference_mode() -> None:
    model, tokens = mixture("both"), some_tokens(1, 6)
    with torch.inference_mode():
        before = model(tokens).logits
    model.base.requires_grad_(True)  # as an adapter in training would be
    model(tokens, labels=tokens).loss.backward()
    assert all(bool(part.grad.isfinite().all()) for part in model.base.parameters())
    torch.testing.assert_close(model(tokens).logits.detach(), before, **CLOSE)


@pytest.mark.parametrize("end", [2, 3, 4])
def test_what_is_said_after_padding_is_no_evidence_where_a_chunk_ends_with_it(end: int) -> None:
    """Beside Bloom, which says more of padding than that all tokens are alike."""
    model = MixedLM(family_model("bloom", VOCAB), decoder_memory(VOCAB, seed=7), 0.4, gate="posterior")
    tokens = some_tokens(1, 8)
    padded = torch.nn.functional.pad(tokens, (3, 0), value=5)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (3, 0), value=0)
    cache, parts = model.new_cache(1), []
    for start, stop in ((0, end), (end, 11)):
        chunk = {"attention_mask": mask[:, :stop]}
        parts.append(weights_of(model, padded[:, start:stop], cache=cache, use_cache=True, **chunk))
    torch.testing.assert_close(torch.cat(parts, 1)[:, 3:], weights_of(model, tokens), **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_a_cache_that_was_cropped_repeated_and_reordered_goes_on_as_if_it_never_had(case: dict[str, Any]) -> None:
    model, tokens = mixture(**case), some_tokens(2, 12)
    tokens[1, :5] = tokens[0, :5]
    whole = weights_of(model, tokens)
    cache = model.new_cache(1)
    weights_of(model, tokens[:1, :2], cache=cache, use_cache=True)
    draft = torch.cat([tokens[:1, 2:5], some_tokens(1, 4, seed=9)], 1)
    weights_of(model, draft, cache=cache, use_cache=True)
    cache.crop(-4)
    cache.batch_repeat_interleave(3)
    rows = torch.tensor([0, 1, 1])
    found = weights_of(model, tokens[rows, 5:7], cache=cache, use_cache=True)
    torch.testing.assert_close(found, whole[rows, 5:7], **CLOSE)
    cache.batch_select_indices(torch.tensor([2, 0]))
    found = weights_of(model, tokens[[1, 0], 7:], cache=cache, use_cache=True)
    torch.testing.assert_close(found, whole[[1, 0], 7:], **CLOSE)
    cache.reset()
    fresh = weights_of(model, tokens[:2, :3], cache=model.new_cache(2), use_cache=True)
    torch.testing.assert_close(fresh, whole[:, :3], **CLOSE)


def test_a_crop_beyond_the_last_step_hears_no_more_of_the_next_token() -> None:
    model, tokens = mixture(switch=0.0), some_tokens(1, 8)
    cache = model.new_cache(1)
    whole = weights_of(model, tokens[:, :6], cache=cache, use_cache=True)
    weights_of(model, tokens[:, 6:7], cache=cache, use_cache=True)
    cache.crop(-3)  # the votes after the fourth token are gone
    found = weights_of(model, tokens[:, 4:5], cache=cache, use_cache=True)
    torch.testing.assert_close(found, whole[:, 3:4], **CLOSE)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3]])
@pytest.mark.parametrize("window", [0, 1, 4, 100])
def test_of_a_prompt_the_latest_tokens_count(case: dict[str, Any], window: int) -> None:
    model, tokens = mixture(**case, prompt_window=window), some_tokens(2, 10)
    cache = model.new_cache(2)
    found = weights_of(model, tokens[:, :9], cache=cache, use_cache=True, logits_to_keep=1)
    found = torch.cat([found, weights_of(model, tokens[:, 9:], cache=cache, use_cache=True)], 1)
    began = max(0, 8 - window)
    for row in range(2):
        for length in (9, 10):
            slow = slow_weights(model, tokens[row, :length].tolist(), began)
            torch.testing.assert_close(found[row, length - 9], torch.tensor(list(slow.values())), **CLOSE)


@pytest.mark.grid(3)
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [[10], [7, 1, 2], [1] * 10])
def test_tokens_outside_the_evidence_mask_say_nothing(case: dict[str, Any], steps: list[int]) -> None:
    model, tokens, silent = mixture(**case), some_tokens(2, 10), (1, 2, 5)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[:, list(silent)] = 0
    cache, at, found = model.new_cache(2), 0, []
    for count in steps:
        new = tokens[:, at : at + count]
        found.append(weights_of(model, new, cache=cache, use_cache=True, evidence_mask=mask))
        at += count
    for row in range(2):
        for length in range(1, 11):
            slow = slow_weights(model, tokens[row, :length].tolist(), silent=silent)
            torch.testing.assert_close(torch.cat(found, 1)[row, length - 1], torch.tensor(list(slow.values())), **CLOSE)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}]
)
def test_generate_passes_the_evidence_mask_on(options: dict[str, Any]) -> None:
    model, tokens = mixture(switch=0.0), some_tokens(1, 8)
    asked: list[Tensor] = []
    components = model.components

    def noted(*args: Any, **given: Any) -> Any:
        asked.append(given["evidence_mask"])
        return components(*args, **given)

    model.components = noted  # type: ignore[method-assign]
    mask = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 1]])
    model.generate(tokens, max_new_tokens=3, pad_token_id=0, evidence_mask=mask, **options)
    assert asked
    assert all(bool((found == mask).all()) for found in asked)


@pytest.mark.parametrize("gate", ["posterior", "both"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}])
def test_every_way_of_generating_gives_what_whole_passes_give(gate: str, options: dict[str, Any]) -> None:
    model, tokens = mixture(gate), some_tokens(1, 6)
    found = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    if "num_beams" in options:
        expected = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False, **options)
    else:
        expected = tokens
        for _ in range(8):
            with torch.no_grad():
                expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert found.tolist() == expected.tolist()


def test_memories_of_all_kinds_are_weighed(make: Make) -> None:
    model = make(gate="posterior")
    assert model.gate.gate == "posterior"
    tokens = token_ids(2, 9, vocab_size=model.vocab_size)
    whole, cache, found = weights_of(model, tokens), model.new_cache(2), []
    assert whole.shape == (2, 9, 3)
    assert (whole >= 0).all()
    assert (whole.sum(-1) <= 1 + 1e-6).all()
    for start, end in ((0, 4), (4, 5), (5, 9)):
        found.append(weights_of(model, tokens[:, start:end], cache=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(found, 1), whole, **CLOSE)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.floats(-9, 0), min_size=3, max_size=3), min_size=1, max_size=25),
    st.floats(0, 0.99),
    st.floats(0, 0.5),
    st.sampled_from([0.05, 0.5]),
)
def test_no_text_costs_much_more_than_with_the_base(
    labels: list[list[float]], prior: float, own: float, alone_share: float
) -> None:
    """Without switching at most -log(1 - prior) nats; with it, -log(1 - switch * prior) more for every token."""
    said = torch.tensor(labels, dtype=torch.float64)[None]
    base, memories = said[..., 0], said[..., 1:]
    weights = torch.full_like(memories, own)
    found = Explanations(2, own=True, alone_share=alone_share)
    log_probs = found.log_probs(base, memories, weights)
    start = found.log_prior(prior, said)
    for switch in (0.0, 0.05):
        before = torch.cat([start[None, None], FixedShare(start, switch).along(start[None], log_probs)[:, :-1]], 1)
        shares = found.weights(before, weights)
        probs = (1 - shares.sum(-1)) * base.exp() + (shares * memories.exp()).sum(-1)
        cost = float((base - probs.log()).sum())
        assert cost <= -math.log(1 - prior) - len(labels) * math.log(1 - switch * prior) + 1e-9


def test_a_token_that_nothing_explains_says_nothing() -> None:
    prior = torch.tensor([0.5, 0.5]).log()
    along = FixedShare(prior, 0.0).along(prior[None], torch.full((1, 1, 2), -math.inf))
    torch.testing.assert_close(along[0, 0], prior)


def test_weights_of_several_from_their_own() -> None:
    torch.testing.assert_close(together(torch.tensor([[0.5, 0.5]])), torch.tensor([[1 / 3, 1 / 3]]))
    torch.testing.assert_close(together(torch.tensor([[0.7]])), torch.tensor([[0.7]]))
    assert together(torch.tensor([[1.0, 1.0]])).sum() <= 1


# --- which gate is in force ---------------------------------------------------------------------------------------


def memory(weight: float | None = 0.3, fitted: bool = False) -> Any:
    found = decoder_memory(VOCAB, mix_weight=weight)
    found.confidence_head = head(0, found.decoder.config.hidden_size) if fitted else None
    return found


@pytest.mark.parametrize(
    ("options", "fitted", "name"),
    [
        ({}, False, "posterior"),
        ({}, True, "both"),
        ({"mix_weight": 0.4}, True, "none"),
        ({"mix_weight": 0.4, "gate": "posterior"}, True, "posterior"),
        ({"gate": "none"}, True, "none"),
        ({"gate": "confidence"}, True, "confidence"),
        ({"gate": GateConfig(prior=0.1)}, False, "posterior"),
    ],
)
def test_the_gate_follows_from_what_is_given(options: dict[str, Any], fitted: bool, name: str) -> None:
    model = MixedLM(family_model("llama", VOCAB), memory(fitted=fitted), **options)
    assert model.gate.gate == name
    assert (name == "none") == (not isinstance(model._rule, Gate))
    assert model.mix_weights == {"memory": options.get("mix_weight", 0.3)}
    assert (name if name != "none" else f"{model.mix_weights['memory']:g}") in repr(model)


def test_confidence_without_a_head_is_refused_and_changes_nothing() -> None:
    with pytest.raises(ConfigError, match="memory 'memory' has no confidence head; fit one with memlm gate"):
        MixedLM(family_model("llama", VOCAB), memory(), gate="both")
    model = MixedLM(family_model("llama", VOCAB), memory())
    with pytest.raises(ConfigError, match="no confidence head"):
        model.set_gate("confidence")
    assert model.gate.gate == "posterior"
    with pytest.raises(ConfigError, match="gate = 'postrior'"):
        model.set_gate("postrior")  # type: ignore[arg-type]


def test_an_added_memory_that_the_gate_cannot_weigh_is_taken_away_again() -> None:
    model, tokens = MixedLM(family_model("llama", VOCAB), memory(fitted=True), gate="confidence"), some_tokens(1, 5)
    before = weights_of(model, tokens)
    for _ in range(2):
        with pytest.raises(ConfigError, match="memory 'other' has no confidence head"):
            model.add_memory("other", memory(), 0.1)
    torch.testing.assert_close(weights_of(model, tokens), before, rtol=0, atol=0)
    with torch.no_grad():
        model.remove_memory("memory")
        torch.testing.assert_close(model(tokens).logits, model.base(tokens).logits, rtol=0, atol=0)


def test_settings_of_a_gate_outlast_a_fixed_weight() -> None:
    model = MixedLM(family_model("llama", VOCAB), memory(), gate=GateConfig(prior=0.1, sleep=4))
    model.set_mix_weight(0.3)
    assert (model.gate.gate, model.gate.prior, model.gate.sleep) == ("none", 0.1, 4)


def test_a_memory_without_a_weight_is_weighed_all_the_same() -> None:
    model, tokens = MixedLM(family_model("llama", VOCAB), memory(None)), some_tokens(1, 5)
    assert model.mix_weights == {}
    weights_of(model, tokens)
    with pytest.raises(ConfigError, match="mix_weight of 'memory' is missing"):
        model.set_gate("none")
    model.set_mix_weight(0.2)
    assert (model.gate.gate, model.mix_weights) == ("none", {"memory": 0.2})
    assert weights_of(model, tokens).tolist() == [pytest.approx(0.2)]


def test_a_weight_for_one_call_needs_no_gate() -> None:
    model, tokens = mixture(), some_tokens(1, 5)
    with torch.no_grad():
        found = model(tokens, mix_weight=0.0).logits
        torch.testing.assert_close(found, model.base(tokens).logits, rtol=0, atol=0)
        cache = model.new_cache(1)
        model(tokens, mix_weight=0.5, past_key_values=cache)
        after = weights_of(
            model, some_tokens(1, 2, seed=4), cache=cache, use_cache=True
        )  # the text so far was not heard
    assert after.isfinite().all()


def test_a_head_for_another_width_is_refused() -> None:
    part = memory()
    part.confidence_head = head(0, 3)
    model = MixedLM(family_model("llama", VOCAB), part)
    with pytest.raises(ConfigError, match="fitted for a memory 3 wide"):
        weights_of(model, some_tokens(1, 4))


def test_several_memories_may_sum_to_more_than_one_under_a_gate() -> None:
    model = MixedLM(family_model("llama", VOCAB), {"a": memory(0.7), "b": memory(0.6)})
    assert (weights_of(model, some_tokens(1, 6)).sum(-1) <= 1 + 1e-6).all()
    with pytest.raises(ConfigError, match="above 1"):
        model.set_gate("none")
    model.remove_memory("a")
    model.add_memory("c", memory(0.9))
    assert model.mix_weights == {"b": 0.6, "c": 0.9}


def test_a_saved_mixture_keeps_its_gate_and_heads(model_folder: str, places: dict[str, Any], tmp_path: Any) -> None:
    config = GateConfig(gate="posterior", prior=0.2, switch=0.05)
    model = MixedLM.from_pretrained(model_folder, memory=places["law"], gate=config)
    memory = model.named_memories()["memory"]
    fitted = head(1, 64).model_copy(update={"tokenizer": memory.settings.tokenizer})
    memory.confidence_head = fitted
    model.save_pretrained(tmp_path / "saved")
    again = MixedLM.from_pretrained(tmp_path / "saved")
    assert again.gate == config
    assert again.named_memories()["memory"].confidence_head == fitted
    fixed = MixedLM.from_pretrained(model_folder, memory=places["law"], mix_weight=0.3)
    fixed.save_pretrained(tmp_path / "fixed")
    assert MixedLM.from_pretrained(tmp_path / "fixed").gate.gate == "none"
    assert MixedLM.from_pretrained(tmp_path / "fixed", gate="posterior").gate.gate == "posterior"


@torch.no_grad()
def test_a_gate_takes_over_a_cache_that_was_begun_at_fixed_weights() -> None:
    """What was weighed otherwise counts for nothing, as where another gate weighed it."""
    text, later = some_tokens(2, 8), {}
    for before in ("none", "confidence"):
        model = mixture(before)
        cache = model(text[:, :5], use_cache=True).past_key_values
        model.set_gate("posterior")
        later[before] = [model(text[:, at : at + 1], past_key_values=cache).logits for at in (5, 6, 7)]
    for found, expected in zip(later["none"], later["confidence"], strict=True):
        torch.testing.assert_close(found, expected)


def test_settings_of_a_gate_beside_a_given_weight_are_not_dropped() -> None:
    memory = decoder_memory(VOCAB, mix_weight=0.3, seed=7)
    with pytest.raises(ConfigError, match="prior, sleep: of a gate, and the weight is given"):
        MixedLM(family_model("llama", VOCAB), memory, 0.3, gate=GateConfig(sleep=8, prior=0.2))
    assert MixedLM(family_model("llama", VOCAB), memory, 0.3, gate=GateConfig()).gate.gate == "none"
    assert MixedLM(family_model("llama", VOCAB), memory, 0.3, gate=GateConfig(gate="posterior", sleep=8)).gate.sleep
