"""Scores of every label, and the weight chosen from them."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from families import family_model
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.corpus.blocks import Split
from memlm.errors import ModelError
from memlm.memory.mlp import FFNStyle, MLPMemory, MLPSettings
from memlm.memory.voter import Voter
from memlm.mix.base import BaseVoter
from memlm.models.taps import capture
from memlm.scores.mixtures import (
    GRID,
    best_mix_weight,
    best_mix_weights,
    mixture_label_log_probs,
    perplexity_curve,
)
from memlm.scores.score import COLUMNS, score, stored_activations

VOCAB = 40
LENGTHS = [17, 2, 40, 9, 1, 23, 8]


@pytest.fixture
def voter() -> BaseVoter:
    return BaseVoter(family_model("llama", VOCAB + 8), VOCAB)


def scores_of(voter: Voter, split: Split, **options: Any) -> dict[str, np.ndarray]:
    """Column to values."""
    return dataclasses.asdict(score({"it": voter}, split, **options)["it"])


@pytest.fixture(params=[False, True], ids=["documents", "crossing"])
def split(request: pytest.FixtureRequest) -> Split:
    tokens = np.random.default_rng(0).integers(3, VOCAB, sum(LENGTHS)).astype(np.int32)
    offsets = np.cumsum([0, *LENGTHS])
    return Split(tokens, offsets, block_size=12, step=5, cross_documents=request.param)


def test_scores_equal_a_plain_forward_of_each_block(voter: BaseVoter, split: Split) -> None:
    found = scores_of(voter, split)
    place = 0
    for block in (split[i] for i in range(len(split))):
        with torch.no_grad():
            logits = voter.model(input_ids=torch.from_numpy(block.input_ids).long()[None]).logits[0, :, :VOCAB]
        log_probs = logits.double().log_softmax(-1)
        for target in np.flatnonzero(block.predicted):
            row = log_probs[target - 1]
            assert found["label"][place] == pytest.approx(row[block.input_ids[target]].item(), rel=1e-4, abs=1e-5)
            assert found["entropy"][place] == pytest.approx(-(row.exp() * row).sum().item(), rel=1e-4)
            assert found["top1"][place] == pytest.approx(row.max().exp().item(), rel=1e-4)
            assert found["top1_id"][place] == row.argmax()
            place += 1
    assert place == split.n_positions
    assert {c: (found[c].shape, found[c].dtype) for c in COLUMNS} == {
        c: ((place,), dtype) for c, dtype in COLUMNS.items()
    }


@pytest.mark.parametrize("batch_tokens", [1, 24, 100, 100_000])
def test_scores_do_not_depend_on_the_batch(voter: BaseVoter, split: Split, batch_tokens: int) -> None:
    alone, together = scores_of(voter, split, batch_tokens=12), scores_of(voter, split, batch_tokens=batch_tokens)
    for column in COLUMNS:
        np.testing.assert_allclose(together[column], alone[column], rtol=1e-4, atol=1e-6)
    mean = alone["label"].mean(dtype=np.float64)
    assert together["label"].mean(dtype=np.float64) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bloom", "opt"])
def test_padding_does_not_reach_the_scores_of_any_family(family: str) -> None:
    voter = BaseVoter(family_model(family, VOCAB), VOCAB)
    tokens = np.random.default_rng(0).integers(3, VOCAB, sum(LENGTHS)).astype(np.int32)
    split = Split(tokens, np.cumsum([0, *LENGTHS]), block_size=12, step=11, cross_documents=False)
    alone, together = scores_of(voter, split, batch_tokens=1), scores_of(voter, split, batch_tokens=1000)
    np.testing.assert_allclose(together["label"], alone["label"], rtol=1e-4, atol=1e-5)


def test_progress_is_told_of_every_label(voter: BaseVoter, split: Split) -> None:
    told: list[int] = []
    scores_of(voter, split, batch_tokens=24, progress=told.append)
    assert len(told) > 1
    assert sum(told) == split.n_positions


def reader_of_the_base() -> MLPMemory:
    """An MLP memory of random weights for the tiny Llama."""
    style = FFNStyle(gated=True, bias=False, norm="rms", norm_eps=1e-5, activation="silu")
    widths = {"input_width": 32, "width": 32, "ffn_width": 40}
    tap = {"tap": "model.layers.1.mlp", "base_blocks": 2, "layers": 2}
    memory = MLPMemory(MLPSettings(kind="mlp", vocab_size=VOCAB, style=style, **widths, **tap))
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return memory.eval()


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_live_and_stored_activations_give_the_scores_of_a_plain_forward(split: Split, batch_tokens: int) -> None:
    base, memory = family_model("llama", VOCAB), reader_of_the_base()
    assert memory.tap is not None
    expected, keys = [], []
    for block in (split[i] for i in range(len(split))):
        tokens = torch.from_numpy(block.input_ids).long()[None]
        with torch.no_grad(), capture(base, [memory.tap]) as captured:
            base(tokens)
            before = np.flatnonzero(block.predicted) - 1
            votes = memory.votes(captured[memory.tap], slice(None))[0, before].double()
        expected.append(votes.gather(1, tokens[0, before + 1][:, None])[:, 0].numpy())
        keys.append(captured[memory.tap][0, before].half().numpy())
    voter = BaseVoter(base, VOCAB)
    live = scores_of(memory, split, base=voter, batch_tokens=batch_tokens)
    stored = scores_of(memory, split, stored=stored_activations(np.concatenate(keys)), batch_tokens=batch_tokens)
    together = score({"memory": memory, "base": voter}, split, base=voter, batch_tokens=batch_tokens)
    np.testing.assert_allclose(together["memory"].label, live["label"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(together["base"].label, scores_of(voter, split)["label"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(live["label"], np.concatenate(expected), rtol=0, atol=1e-4)
    # float16 keeps 11 bits of an activation, so logits of order 10 move by some 0.005
    np.testing.assert_allclose(stored["label"], np.concatenate(expected), rtol=0, atol=0.03)
    assert not base.get_submodule(memory.tap)._forward_pre_hooks, "the hook is gone"


def test_nothing_to_score_gives_empty_columns(voter: BaseVoter) -> None:
    nothing = Split(np.array([5], np.int32), np.array([0, 1]), block_size=12, step=12, cross_documents=False)
    assert {c: len(values) for c, values in scores_of(voter, nothing).items()} == dict.fromkeys(COLUMNS, 0)


def test_the_base_runs_once_for_all_voters_and_only_to_the_tap_where_it_does_not_vote(split: Split) -> None:
    base, memories = family_model("llama", VOCAB), {"a": reader_of_the_base(), "b": reader_of_the_base()}
    voter, calls = BaseVoter(base, VOCAB), {"first": 0, "last": 0}
    base.model.embed_tokens.register_forward_hook(lambda *_: calls.update(first=calls["first"] + 1))
    base.model.norm.register_forward_hook(lambda *_: calls.update(last=calls["last"] + 1))
    score({"base": voter, **memories}, split, base=voter, batch_tokens=10**6)
    assert calls == {"first": 1, "last": 1}
    score(memories, split, base=voter, batch_tokens=10**6)
    assert calls == {"first": 2, "last": 1}


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 4), st.integers(5, 40), st.integers(0, 10**6))
def test_weights_of_several_memories_are_the_best_of_a_fine_search(count: int, positions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = np.log(rng.dirichlet(np.full(6, 0.4), (count + 1, positions))[..., 0] + 1e-9).astype(np.float32)

    def nats(weights: list[float]) -> float:
        return -float(mixture_label_log_probs(parts[0], list(parts[1:]), weights).mean())

    found = best_mix_weights(parts[0], list(parts[1:]))
    assert min(found) >= 0
    assert sum(found) <= 1
    for _ in range(200):  # no neighbour and no far point is better by more than rounding to four digits can explain
        other = rng.dirichlet(np.ones(count + 1))[1:]
        mixed = [0.99 * w + 0.01 * o for w, o in zip(found, other, strict=True)]
        assert nats(found) <= min(nats(list(other)), nats(mixed)) + 2e-3


def test_a_single_memory_has_the_best_weight_of_the_grid() -> None:
    rng = np.random.default_rng(0)
    base, memory = -rng.exponential(2, (2, 50)).astype(np.float32)
    assert best_mix_weights(base, [memory]) == [best_mix_weight(base, memory)[0]]


def test_labels_that_a_retriever_finds_impossible_leave_weights_finite() -> None:
    base, live = np.full(4, -3, np.float32), np.array([-np.inf, -0.1, -np.inf, -0.1], np.float32)
    weights = best_mix_weights(base, [live, np.full(4, -9, np.float32)])
    assert weights[0] == pytest.approx(0.49, abs=0.03)
    assert weights[1] == pytest.approx(0, abs=1e-3)


log_probs = st.lists(st.tuples(st.floats(-30, -1e-3), st.floats(-30, -1e-3)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(log_probs)
def test_curve_and_best_weight_equal_brute_force(pairs: list[tuple[float, float]]) -> None:
    base, memory = np.array(pairs, np.float32).T
    curve = perplexity_curve(base, memory)
    assert len(curve) == len(GRID) == 101
    expected = [
        math.exp(
            -sum(
                math.log((1 - i / 100) * math.exp(b) + i / 100 * math.exp(m)) for b, m in zip(base, memory, strict=True)
            )
            / len(base)
        )
        for i in range(101)
    ]
    np.testing.assert_allclose(curve, expected, rtol=1e-9)
    weight, perplexity = best_mix_weight(base, memory)
    assert perplexity == pytest.approx(min(expected), rel=1e-9)
    assert expected[round(100 * weight)] == pytest.approx(min(expected), rel=1e-9)
    assert weight == round(weight, 2)


def test_the_curve_takes_any_grid() -> None:
    base, memory = np.array([-1.0, -3.0], np.float32), np.array([-2.0, -0.5], np.float32)
    np.testing.assert_allclose(perplexity_curve(base, memory, np.array([0.25])), perplexity_curve(base, memory)[25:26])


def test_weights_zero_and_one_are_exact_even_for_the_impossible() -> None:
    base, memory = np.array([-1.0, -np.inf], np.float32), np.array([-np.inf, -2.0], np.float32)
    for weight, expected in itertools.product((0.0, 1.0), (base, memory)):
        same = (expected is memory) == bool(weight)
        assert np.array_equal(mixture_label_log_probs(base, [memory], [weight]), expected.astype(np.float64)) == same
    np.testing.assert_allclose(mixture_label_log_probs(base, [memory], [0.5]), [-1 + np.log(0.5), -2 + np.log(0.5)])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bad", [0, 1])
def test_no_weight_is_chosen_from_nan(count: int, bad: int) -> None:
    parts = np.full((count + 1, 5), -2, np.float32)
    parts[bad, 3] = np.nan
    with pytest.raises(ModelError, match=f"label log-probs of {'memory 1' if bad else 'base'} hold NaN"):
        best_mix_weights(parts[0], list(parts[1:]))
    with pytest.raises(ModelError, match="hold NaN"):
        best_mix_weight(parts[0], parts[1])


@pytest.mark.parametrize("wrong", ["label", "entropy", "top1"])
def test_a_voter_that_gives_nan_is_named_at_its_first_batch(
    voter: BaseVoter, split: Split, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(state: Any, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = right(state, labels)
        found[wrong][-1] = torch.nan
        return found

    right, told = voter.label_log_probs, []
    monkeypatch.setattr(voter, "label_log_probs", spoilt)
    with pytest.raises(ModelError, match="it gives NaN"):
        scores_of(voter, split, batch_tokens=12, progress=told.append)
    assert not told
