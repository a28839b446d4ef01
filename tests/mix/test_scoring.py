"""Scores of every label, and the weight chosen from them."""

import itertools
import math

import numpy as np
import pytest
import torch
from families import family_model
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.corpus.blocks import Split
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.mlp import FFNStyle, MLPMemory, MLPSettings
from memlm.mix.scoring import (
    COLUMNS,
    GRID,
    as_voter,
    best_mix_weight,
    live_activations,
    mixture_label_log_probs,
    perplexity_curve,
    score,
    stored_activations,
)
from memlm.models.taps import capture

VOCAB = 40
LENGTHS = [17, 2, 40, 9, 1, 23, 8]


@pytest.fixture
def voter() -> MemoryDecoder:
    voter = as_voter(family_model("llama", VOCAB + 8), VOCAB)
    assert isinstance(voter, MemoryDecoder)
    return voter


@pytest.fixture(params=[False, True], ids=["documents", "crossing"])
def split(request: pytest.FixtureRequest) -> Split:
    tokens = np.random.default_rng(0).integers(3, VOCAB, sum(LENGTHS)).astype(np.int32)
    offsets = np.cumsum([0, *LENGTHS])
    return Split(tokens, offsets, block_size=12, step=5, cross_documents=request.param)


def test_scores_equal_a_plain_forward_of_each_block(voter: MemoryDecoder, split: Split) -> None:
    found = score(voter, split)
    place = 0
    for block in (split[i] for i in range(len(split))):
        with torch.no_grad():
            logits = voter.decoder(input_ids=torch.from_numpy(block.input_ids).long()[None]).logits[0, :, :VOCAB]
        log_probs = logits.double().log_softmax(-1)
        for target in np.flatnonzero(block.predicted):
            row = log_probs[target - 1]
            assert found["label"][place] == pytest.approx(row[block.input_ids[target]].item(), rel=1e-4, abs=1e-5)
            assert found["entropy"][place] == pytest.approx(-(row.exp() * row).sum().item(), rel=1e-4)
            assert found["top1"][place] == pytest.approx(row.max().exp().item(), rel=1e-4)
            place += 1
    assert place == split.n_positions
    assert {c: (found[c].shape, found[c].dtype) for c in COLUMNS} == dict.fromkeys(COLUMNS, ((place,), np.float32))


@pytest.mark.parametrize("batch_tokens", [1, 24, 100, 100_000])
def test_scores_do_not_depend_on_the_batch(voter: MemoryDecoder, split: Split, batch_tokens: int) -> None:
    alone, together = score(voter, split, batch_tokens=12), score(voter, split, batch_tokens=batch_tokens)
    for column in COLUMNS:
        np.testing.assert_allclose(together[column], alone[column], rtol=1e-4, atol=1e-6)
    mean = alone["label"].mean(dtype=np.float64)
    assert together["label"].mean(dtype=np.float64) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bloom", "opt"])
def test_padding_does_not_reach_the_scores_of_any_family(family: str) -> None:
    voter = as_voter(family_model(family, VOCAB), VOCAB)
    tokens = np.random.default_rng(0).integers(3, VOCAB, sum(LENGTHS)).astype(np.int32)
    split = Split(tokens, np.cumsum([0, *LENGTHS]), block_size=12, step=12, cross_documents=False)
    alone, together = score(voter, split, batch_tokens=1), score(voter, split, batch_tokens=1000)
    np.testing.assert_allclose(together["label"], alone["label"], rtol=1e-4, atol=1e-5)


def test_progress_is_told_of_every_label(voter: MemoryDecoder, split: Split) -> None:
    told: list[int] = []
    score(voter, split, batch_tokens=24, progress=told.append)
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
    with live_activations(base, memory.tap) as activations:
        live = score(memory, split, activations=activations, batch_tokens=batch_tokens)
    stored = score(memory, split, activations=stored_activations(np.concatenate(keys)), batch_tokens=batch_tokens)
    np.testing.assert_allclose(live["label"], np.concatenate(expected), rtol=0, atol=1e-4)
    # float16 keeps 11 bits of an activation, so logits of order 10 move by some 0.005
    np.testing.assert_allclose(stored["label"], np.concatenate(expected), rtol=0, atol=0.03)
    assert not base.get_submodule(memory.tap)._forward_pre_hooks, "the hook is gone"


def test_nothing_to_score_gives_empty_columns(voter: MemoryDecoder) -> None:
    nothing = Split(np.array([5], np.int32), np.array([0, 1]), block_size=12, step=12, cross_documents=False)
    assert {c: len(values) for c, values in score(voter, nothing).items()} == dict.fromkeys(COLUMNS, 0)


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
        assert np.array_equal(mixture_label_log_probs(base, memory, weight), expected.astype(np.float64)) == same
    np.testing.assert_allclose(mixture_label_log_probs(base, memory, 0.5), [-1 + np.log(0.5), -2 + np.log(0.5)])
