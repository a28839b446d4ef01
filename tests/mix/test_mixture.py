"""The mixture in log space against the mixture of probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_lm import mixed_probs
from torch import Tensor

from memlm.errors import ConfigError
from memlm.mix.mixture import check_weights, mix_log_probs

weights = st.lists(st.floats(0, 1), min_size=1, max_size=3).map(
    lambda raw: [w / max(1.0, math.fsum(raw) * (1 + 1e-9)) for w in raw]
)


def distribution(vocab_size: int, seed: int, impossible: int = 0) -> Tensor:
    """Log-probs, some tokens very unlikely and the first `impossible` ones at minus infinity."""
    logits = 8 * torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits[:, :impossible] = -torch.inf
    return logits.log_softmax(-1)


@settings(deadline=None, max_examples=150)
@given(weights=weights, vocab_size=st.integers(2, 9), seed=st.integers(0, 2**16), impossible=st.integers(0, 1))
def test_it_equals_the_mixture_of_probabilities(
    weights: list[float], vocab_size: int, seed: int, impossible: int
) -> None:
    base = distribution(vocab_size, seed)
    memories = [distribution(vocab_size, seed + 1 + i, impossible) for i in range(len(weights))]
    mixed = mix_log_probs(base, memories, weights)
    expected = mixed_probs(base.exp(), [m.exp() for m in memories], weights)
    # log-probs down to -60 carry float32 errors of 4e-6, which exp turns into relative ones
    torch.testing.assert_close(mixed.double().exp(), expected, rtol=2e-5, atol=1e-12)
    torch.testing.assert_close(mixed.logsumexp(-1), torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weights_zero_and_one_give_one_component_exactly(weight: float) -> None:
    base, memory = distribution(7, 0, impossible=2), distribution(7, 1, impossible=3)
    mixed = mix_log_probs(base, [memory], [weight])
    assert torch.equal(mixed, memory if weight else base)


def test_a_token_impossible_to_both_stays_impossible_and_to_one_only_is_scaled() -> None:
    base, memory = distribution(5, 0, impossible=2), distribution(5, 1, impossible=1)
    mixed = mix_log_probs(base, [memory], [0.25])
    assert (mixed[:, 0] == -torch.inf).all()
    torch.testing.assert_close(mixed[:, 1], memory[:, 1] + math.log(0.25))
    assert not mixed.isnan().any()


def test_a_component_of_weight_zero_is_not_even_looked_at() -> None:
    base, nan = distribution(5, 0), torch.full((2, 5), torch.nan)
    assert torch.equal(mix_log_probs(base, [nan], [0.0]), base)
    assert torch.equal(mix_log_probs(nan, [base], [1.0]), base)
    assert torch.equal(mix_log_probs(nan, [nan, base], [0.0, 1.0]), base)


@pytest.mark.parametrize("given_weights", [[0.0], [1.0], [0.3], [0.5, 0.5], [0.0, 1.0], [0.1] * 10])
def test_good_weights_pass(given_weights: list[float]) -> None:
    check_weights(given_weights)


@pytest.mark.parametrize(
    ("given_weights", "message"),
    [
        ([math.nan], "mix_weight = nan: must be in"),
        ([-0.01], r"mix_weight = -0\.01: must be in \[0, 1\]"),
        ([1.01], r"mix_weight = 1\.01: must be in \[0, 1\]"),
        ([math.inf], "mix_weight = inf: must be in"),
        ([0.2, math.nan], "mix_weight = nan"),
        ([0.7, 0.4], r"the weights 0\.7, 0\.4 sum to 1\.1, above 1"),
    ],
)
def test_bad_weights_are_refused(given_weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_weights(given_weights)
