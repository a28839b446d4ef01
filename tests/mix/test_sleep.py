"""Sleeping memories: the rule against a slow twin, what is read and what is not, and caches in between."""

from typing import Any

import numpy as np
import pytest
import torch
from families import token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from memories import Make
from test_gate import CASES, CLOSE, mixture, some_tokens, weights_of
from torch import Tensor

from memlm.mix.gate import Gate
from memlm.mix.gate_config import GateConfig
from memlm.mix.mixed_lm import MixedLM
from memlm.mix.sleep import Sleep, Unread
from memlm.scores.gated import gated_label_log_probs
from memlm.scores.score import Scores
from memlm.scores.table import ScoreTable

SLEEPY: list[dict[str, Any]] = [case | {"sleep": 3} for case in CASES] + [{"gate": "both", "sleep": 1}]
STEPS = [[1] * 14, [3, 5, 6], [2, 1, 1, 1, 1, 1, 1, 6]]


def slow_sleep(total: list[float], tokens: int, below: float) -> list[bool]:
    """Whether the memories sleep at each place, which weigh `total` there when they are awake."""
    asleep, at = [False] * len(total), 0
    while at < len(total):
        if total[at] < below:
            asleep[at : at + tokens] = [True] * len(asleep[at : at + tokens])
            at += tokens
        else:
            at += 1
    return asleep


def sleepy(case: dict[str, Any], tokens: Tensor) -> MixedLM:
    """A mixture whose memories would sleep at some of the places of `tokens`, and wake at others."""
    awake = weights_of(mixture(**case | {"sleep": 0}), tokens).sum(-1)
    return mixture(**case, sleep_below=float(awake.flatten().median()) + 1e-3)


def logits_of(model: MixedLM, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


@pytest.mark.parametrize("case", SLEEPY)
def test_weights_are_those_of_a_slow_twin(case: dict[str, Any]) -> None:
    tokens = some_tokens(3, 14)
    model = sleepy(case, tokens)
    awake, found = weights_of(mixture(**case | {"sleep": 0}), tokens), weights_of(model, tokens)
    some, others = 0, 0
    for row in range(3):
        asleep = torch.tensor(slow_sleep(awake[row].sum(-1).tolist(), case["sleep"], model.gate.sleep_below))
        torch.testing.assert_close(found[row], awake[row].masked_fill(asleep[:, None], 0.0), **CLOSE)
        some, others = some + int(asleep.sum()), others + int((~asleep).sum())
    assert some
    assert others


@pytest.mark.grid(3)
@pytest.mark.slow
@pytest.mark.parametrize("case", SLEEPY)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("rows", [1, 3])
def test_steps_with_a_cache_give_what_the_whole_text_gives(case: dict[str, Any], steps: list[int], rows: int) -> None:
    tokens = some_tokens(rows, 14)
    model = sleepy(case, tokens)
    cache, at, found = model.new_cache(rows), 0, []
    for count in steps:
        found.append(logits_of(model, tokens[:, at : at + count], past_key_values=cache))
        at += count
    torch.testing.assert_close(torch.cat(found, 1), logits_of(model, tokens), **CLOSE)


@pytest.mark.parametrize("case", [SLEEPY[0], SLEEPY[4], SLEEPY[5]])
def test_memories_read_only_where_they_wake_and_then_what_they_missed(case: dict[str, Any]) -> None:
    tokens = some_tokens(1, 30)
    model = mixture(**case | {"sleep": 7}, sleep_below=1.0)
    read: list[int] = []
    for memory in model.named_memories().values():
        step = memory.step

        def counted(new: Tensor, *args: Any, _step: Any = step, **options: Any) -> Any:
            read.append(new.shape[1])
            return _step(new, *args, **options)

        memory.step = counted  # type: ignore[method-assign]
    cache = model.new_cache(1)
    for at in range(30):
        logits_of(model, tokens[:, at : at + 1], past_key_values=cache)
    assert read[:: len(model.memories)] == [1, 7, 7, 7, 7]


@pytest.mark.grid(3)
@pytest.mark.slow
@pytest.mark.parametrize("case", SLEEPY)
@pytest.mark.parametrize("cropped", [1, 2, 5])
def test_a_cache_that_is_cropped_repeated_and_reordered_goes_on_as_if_it_never_had(
    case: dict[str, Any], cropped: int
) -> None:
    tokens = some_tokens(2, 16)
    tokens[1, :9] = tokens[0, :9]
    model = sleepy(case, tokens)
    whole, cache = logits_of(model, tokens), model.new_cache(1)
    for at in range(8):
        logits_of(model, tokens[:1, at : at + 1], past_key_values=cache)
    draft = torch.cat([tokens[:1, 8:9], some_tokens(1, cropped, seed=9)], 1)
    logits_of(model, draft, past_key_values=cache)
    cache.crop(-cropped)
    cache.batch_repeat_interleave(3)
    rows = torch.tensor([0, 1, 1])
    for at in range(9, 12):
        found = logits_of(model, tokens[rows, at : at + 1], past_key_values=cache)
        torch.testing.assert_close(found, whole[rows, at : at + 1], **CLOSE)
    cache.batch_select_indices(torch.tensor([2, 0]))
    found = [logits_of(model, tokens[[1, 0], at : at + 1], past_key_values=cache) for at in range(12, 16)]
    torch.testing.assert_close(torch.cat(found, 1), whole[[1, 0], 12:], **CLOSE)
    cache.reset()
    assert not len(cache.unread)


def test_a_crop_within_what_is_unread_goes_on_exactly() -> None:
    tokens = some_tokens(1, 14)
    model = mixture("both", sleep=9, sleep_below=1.0)
    cache = model.new_cache(1)
    for at in range(6):
        logits_of(model, tokens[:, at : at + 1], past_key_values=cache)
    assert len(cache.unread) == 5
    cache.crop(-3)
    assert len(cache.unread) == 2
    found = [logits_of(model, tokens[:, at : at + 1], past_key_values=cache) for at in range(3, 14)]
    torch.testing.assert_close(torch.cat(found, 1), logits_of(model, tokens)[:, 3:], **CLOSE)


@pytest.mark.parametrize("case", SLEEPY)
def test_padding_on_the_left_is_no_time(case: dict[str, Any]) -> None:
    tokens = some_tokens(1, 10)
    model = sleepy(case, tokens)
    padded = torch.nn.functional.pad(tokens, (3, 0), value=5)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (3, 0), value=0)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, parts = model.new_cache(1), []
    for start, end in [(0, 5), *((at, at + 1) for at in range(5, 13))]:
        chunk = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
        parts.append(logits_of(model, padded[:, start:end], past_key_values=cache, **chunk))
    torch.testing.assert_close(torch.cat(parts, 1)[:, 3:], logits_of(model, tokens), **CLOSE)


@pytest.mark.grid(2)
@pytest.mark.slow
@pytest.mark.parametrize("case", SLEEPY)
@pytest.mark.parametrize("window", [2, 100])
def test_after_a_prompt_the_memories_sleep_as_in_a_text_that_begins_with_its_window(
    case: dict[str, Any], window: int
) -> None:
    tokens = some_tokens(2, 14)
    model = sleepy(case | {"prompt_window": window}, tokens)
    awake = mixture(**case | {"prompt_window": window, "sleep": 0})
    began, weights = max(0, 7 - window), []
    for place in range(began, 7):  # each heard from the first of the window on
        until = mixture(**case | {"prompt_window": place - began, "sleep": 0})
        weights.append(weights_of(until, tokens[:, : place + 1], logits_to_keep=1))
    cache = awake.new_cache(2)
    weights.append(weights_of(awake, tokens[:, :8], cache=cache, use_cache=True, logits_to_keep=1))
    weights += [weights_of(awake, tokens[:, at : at + 1], cache=cache, use_cache=True) for at in range(8, 14)]
    total = torch.cat(weights, 1).sum(-1)
    cache = model.new_cache(2)
    found = [logits_of(model, tokens[:, :8], past_key_values=cache, logits_to_keep=1)]
    found += [logits_of(model, tokens[:, at : at + 1], past_key_values=cache) for at in range(8, 14)]
    base = logits_of(model, tokens, mix_weight=dict.fromkeys(model.memories, 0.0))
    for row in range(2):
        asleep = slow_sleep(total[row].tolist(), case["sleep"], model.gate.sleep_below)[-7:]
        as_base = [torch.allclose(part[row, -1], base[row, 7 + at], atol=1e-5) for at, part in enumerate(found)]
        assert as_base == asleep


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often tokens were left unread, read after all, and cropped while unread."""
    counts = {"left": 0, "read": 0, "cropped": 0}

    def counted(name: str, method: str) -> None:
        original = getattr(Unread, method)

        def call(self: Unread, *args: Any) -> Any:
            counts[name] += method != "crop" or len(self) > 0
            return original(self, *args)

        monkeypatch.setattr(Unread, method, call)

    for name, method in (("left", "add"), ("read", "before"), ("cropped", "crop")):
        counted(name, method)
    return counts


@pytest.mark.grid(3)
@pytest.mark.slow
@pytest.mark.parametrize("gate", ["posterior", "both", "confidence"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}, {"repetition_penalty": 1.2}],
)
def test_every_way_of_generating_gives_what_whole_passes_give(
    gate: str, options: dict[str, Any], met: dict[str, int]
) -> None:
    prompt = some_tokens(1, 6).repeat(1, 2)  # so that a look-up finds something
    awake, settings_ = mixture(gate), {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24}
    text = awake.generate(prompt, **settings_, **options)
    below = min(1.0, float(weights_of(awake, text)[:, 12:].sum(-1).quantile(0.7)) + 1e-4)
    model = mixture(gate, sleep=2, sleep_below=below)
    found = model.generate(prompt, **settings_, **options)
    expected = model.generate(prompt, **settings_, **{**options, "use_cache": False, "prompt_lookup_num_tokens": None})
    assert found.tolist() == expected.tolist()
    if options.get("use_cache", True):
        assert met["left"]
        assert met["read"]


def test_sampled_drafts_under_a_processor_leave_what_is_unread_alone(met: dict[str, int]) -> None:
    prompt = some_tokens(1, 6).repeat(1, 2)
    model = mixture("both", sleep=5, sleep_below=0.6)
    for seed in range(4):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"prompt_lookup_num_tokens": 2, "do_sample": True, "temperature": 0.7}
        out = model.generate(
            prompt, max_new_tokens=24, pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options
        )
        whole = logits_of(model, out.sequences)[0, 11:-1]
        found = torch.cat(out.logits)[: len(whole)]
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)
    assert met["left"]
    assert met["read"]


def test_logits_that_a_caller_writes_to_are_its_own() -> None:
    tokens = some_tokens(1, 12)
    model = mixture("both", sleep=4, sleep_below=1.0)
    cache = model.new_cache(1)
    for at in range(12):
        found = logits_of(model, tokens[:, at : at + 1], past_key_values=cache)
        torch.testing.assert_close(found, logits_of(model, tokens)[:, at : at + 1], **CLOSE)
        found.fill_(-3.0)


@pytest.mark.grid(3)
@pytest.mark.parametrize("case", SLEEPY)
@pytest.mark.parametrize("cropped", [1, 3, 4])
def test_a_crop_across_the_edge_of_what_is_unread_goes_on_exactly(case: dict[str, Any], cropped: int) -> None:
    """Two are unread; a third and more were read in one step, of which one is left."""
    tokens = some_tokens(1, 14)
    model = mixture(**case | {"sleep": 3}, sleep_below=1.0)
    cache = model.new_cache(1)
    logits_of(model, tokens[:, :4], past_key_values=cache)  # looked up at the first and the fourth
    for at in (4, 5):
        logits_of(model, tokens[:, at : at + 1], past_key_values=cache)
    assert len(cache.unread) == 2
    cache.crop(-cropped)
    found = [logits_of(model, tokens[:, at : at + 1], past_key_values=cache) for at in range(6 - cropped, 14)]
    torch.testing.assert_close(torch.cat(found, 1), logits_of(model, tokens)[:, 6 - cropped :], **CLOSE)


@pytest.mark.grid(3)
@pytest.mark.slow
@pytest.mark.parametrize("case", SLEEPY)
@pytest.mark.parametrize("keep", [[0, 6], [2, 9], [4, 5, 11], [3, 1]])
def test_at_places_with_gaps_between_the_weights_are_those_of_the_whole(case: dict[str, Any], keep: list[int]) -> None:
    tokens = some_tokens(2, 12)
    model = sleepy(case, tokens)
    found = logits_of(model, tokens, logits_to_keep=torch.tensor(keep))
    torch.testing.assert_close(found, logits_of(model, tokens)[:, keep], **CLOSE)


GATES = [
    GateConfig(gate="both"),
    GateConfig(gate="posterior"),
    GateConfig(gate="confidence", sleep=3, sleep_below=1.0),
    GateConfig(gate="both", sleep=3, sleep_below=1.0),
]


@pytest.mark.grid(3)
@pytest.mark.parametrize("before", GATES)
@pytest.mark.parametrize("after", GATES)
def test_another_gate_in_the_middle_of_a_text_weighs_from_there_on(
    before: GateConfig, after: GateConfig, met: dict[str, int]
) -> None:
    tokens, model = some_tokens(1, 16), mixture("both")
    model.set_gate(before)
    cache = model.new_cache(1)
    for at in range(6):
        logits_of(model, tokens[:, at : at + 1], past_key_values=cache)
    model.set_gate(after)
    met["left"] = 0
    for at in range(6, 16):
        found = logits_of(model, tokens[:, at : at + 1], past_key_values=cache)
        assert found.isfinite().all()
    assert met["left"] in ((6, 7) if after.sleep else (0,))  # of ten places every third is looked up


def test_memories_of_all_kinds_sleep_and_wake(make: Make) -> None:
    awake = make(gate="posterior")
    tokens = token_ids(2, 12, vocab_size=awake.vocab_size)
    below = float(weights_of(awake, tokens).sum(-1).median())
    model = make(gate=GateConfig(gate="posterior", sleep=3, sleep_below=below))
    whole, cache, found = logits_of(model, tokens), model.new_cache(2), []
    for start, end in ((0, 4), *((at, at + 1) for at in range(4, 12))):
        found.append(logits_of(model, tokens[:, start:end], past_key_values=cache))
    torch.testing.assert_close(torch.cat(found, 1), whole, **CLOSE)


def test_a_fixed_weight_for_one_call_wakes_them() -> None:
    tokens = some_tokens(1, 10)
    model = mixture(sleep=8, sleep_below=1.0)
    cache = model.new_cache(1)
    for at in range(5):
        logits_of(model, tokens[:, at : at + 1], past_key_values=cache)
    assert len(cache.unread) == 4
    found = logits_of(model, tokens[:, 5:6], past_key_values=cache, mix_weight=0.5)
    torch.testing.assert_close(found, logits_of(model, tokens[:, :6], mix_weight=0.5)[:, -1:], **CLOSE)
    assert not len(cache.unread)


@pytest.mark.parametrize("case", SLEEPY)
def test_scores_have_the_weights_of_a_text_read_token_by_token(case: dict[str, Any]) -> None:
    documents = [some_tokens(1, 12, seed=3), some_tokens(1, 7, seed=4)]
    model = sleepy(case, documents[0])
    voters: dict[str, list[dict[str, Tensor]]] = {"base": []} | {name: [] for name in model.memories}
    expected, weights = [], []
    for text in documents:
        labels = torch.nn.functional.pad(text[:, 1:], (0, 1), value=-100)
        with torch.no_grad():
            voters["base"].append(model._voter.columns(model._voter.step(text), labels))
            for name, memory in model.named_memories().items():
                voters[name].append(memory.columns(memory.step(text), labels))
        log_probs = logits_of(model, text).log_softmax(-1)[0, :-1]
        expected.append(log_probs.gather(-1, text[0, 1:, None])[:, 0])
        weights.append(weights_of(model, text)[0, :-1])
    columns = {
        name: Scores(**{column: np.concatenate([part[column].numpy() for part in parts]) for column in parts[0]})
        for name, parts in voters.items()
    }
    table = ScoreTable(columns, np.repeat([0, 1], [11, 6]), np.zeros(17, dtype=np.int64))
    assert isinstance(model._rule, Gate)
    found, weighed = gated_label_log_probs(table, model._rule)
    torch.testing.assert_close(torch.from_numpy(found).float(), torch.cat(expected), **CLOSE)
    torch.testing.assert_close(torch.from_numpy(weighed).float(), torch.cat(weights), **CLOSE)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 9), st.floats(0, 1), st.integers(0, 39))
def test_the_rule_can_be_stopped_anywhere_and_gone_on_with(
    total: list[float], tokens: int, below: float, stop: int
) -> None:
    rule, weights = Sleep(tokens, below), torch.tensor([total], dtype=torch.float64)
    known = torch.ones_like(weights, dtype=torch.bool)
    asleep, left = rule.along(torch.zeros(1, dtype=torch.long), weights, known)
    assert asleep[0].tolist() == slow_sleep(total, tokens, below)
    stop = min(stop, len(total) - 1)
    rest = rule.along(left[:, stop], weights[:, stop + 1 :], known[:, stop + 1 :])
    assert rest[0].tolist() == asleep[:, stop + 1 :].tolist()
    assert rest[1].tolist() == left[:, stop + 1 :].tolist()


def test_a_saved_mixture_keeps_its_sleep() -> None:
    model = mixture(sleep=5, sleep_below=0.1)
    assert model.config.gate is not None
    assert (model.config.gate["sleep"], model.config.gate["sleep_below"]) == (5, 0.1)
