"""The mixture in log space against the mixture of probabilities."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_lm import mixed_probs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from memlm.errors import ConfigError
from memlm.memory.voter import VoterCache
from memlm.mix.cache import MixedCache
from memlm.mix.mixture import logsumexp, mix_log_probs
from memlm.mix.weights import FixedWeights, Step, Weight, check_weights
from memlm.targets.votes import SparseProbs

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


# --- dense and sparse components, weights per row -----------------------------------------------------------------

ROWS, TIMES = 3, 2


def sparse_distribution(vocab_size: int, seed: int) -> SparseProbs:
    """Random supports, one of them a single token; likeliest first, as a retriever gives them."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, vocab_size + 1, (ROWS * TIMES,), generator=generator)
    counts[0] = 1
    ids, probs = [], []
    for count in counts.tolist():
        ids.append(torch.randperm(vocab_size, generator=generator)[:count].int())
        raw = (4 * torch.randn(count, generator=generator)).softmax(0)
        probs.append(raw.sort(descending=True).values)
    return SparseProbs(counts, torch.cat(ids), torch.cat(probs), torch.zeros(ROWS * TIMES))


class Case(NamedTuple):
    base: Tensor
    memories: list[Tensor | SparseProbs]
    weights: list[Weight]

    @property
    def vocab_size(self) -> int:
        return self.base.shape[-1]

    def dense_memories(self) -> list[Tensor]:
        """Probabilities in float64."""
        return [
            part.dense(self.vocab_size).double().view(self.base.shape)
            if isinstance(part, SparseProbs)
            else part.double().exp()
            for part in self.memories
        ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocab_size, seed = draw(st.integers(2, 9)), draw(st.integers(0, 2**16))
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    per_row = [draw(st.booleans()) for _ in kinds]
    # a row of the table per row of the batch, one for all where the memory's weight is a number
    choices = st.sampled_from([0.0, 0.1, 0.5, 1.0])
    columns = [[draw(choices) for _ in range(ROWS)] if rows else [draw(choices)] * ROWS for rows in per_row]
    most = max(1.0, *(math.fsum(row) for row in zip(*columns, strict=True)))
    given: list[Weight] = [
        torch.tensor(column)[:, None] / most if rows else column[0] / most
        for column, rows in zip(columns, per_row, strict=True)
    ]
    logits = 8 * torch.randn(ROWS, TIMES, vocab_size, generator=torch.Generator().manual_seed(seed))
    # the layout in memory must not matter: a base often gives a slice or a transposed view
    base = logits.log_softmax(-1).transpose(0, 1).contiguous().transpose(0, 1) if seed % 2 else logits.log_softmax(-1)
    memories: list[Tensor | SparseProbs] = [
        sparse_distribution(vocab_size, seed + 1 + m)
        if sparse
        else (8 * torch.randn(base.shape, generator=torch.Generator().manual_seed(seed + 1 + m))).log_softmax(-1)
        for m, sparse in enumerate(kinds)
    ]
    return Case(base, memories, given)


def copies(parts: Sequence[Tensor | SparseProbs]) -> list[Tensor]:
    """Every tensor of the components, copied."""
    fields = ("counts", "ids", "probs", "lost_mass")
    return [
        tensor.clone()
        for part in parts
        for tensor in ([getattr(part, f) for f in fields] if isinstance(part, SparseProbs) else [part])
    ]


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_any_components_and_weights_equal_the_dense_mixture(case: Case) -> None:
    before = copies([case.base, *case.memories])
    mixed = mix_log_probs(case.base, case.memories, case.weights)
    rows = [
        [float(w[r, 0]) if isinstance(w, Tensor) else w for w in case.weights] for r in range(ROWS)
    ]  # float32 where they come per row
    dense = case.dense_memories()
    for row in range(ROWS):
        expected = mixed_probs(case.base[row].double().exp(), [d[row] for d in dense], rows[row])
        # relative as above; absolute, for weights in float32 may leave the base a share of 1e-7 that the sum has not
        torch.testing.assert_close(mixed[row].double().exp(), expected, rtol=2e-5, atol=3e-7)
    assert not mixed.isnan().any()
    for tensor, copied in zip(copies([case.base, *case.memories]), before, strict=True):
        assert torch.equal(tensor, copied), "an input was changed in place"


@pytest.mark.parametrize("per_row", [False, True])
def test_a_sparse_memory_at_weight_one_gives_its_probabilities_and_nothing_else(per_row: bool) -> None:
    base = distribution(7, 0).expand(ROWS, TIMES, 7).contiguous()
    sparse = sparse_distribution(7, 3)
    mixed = mix_log_probs(base, [sparse], [torch.ones(ROWS, 1) if per_row else 1.0])
    # log 0 is -inf, so this also says that there is nothing outside the support
    assert torch.equal(mixed.view(-1, 7), sparse.dense(7).log())
    assert torch.equal(mix_log_probs(base, [sparse], [torch.zeros(ROWS, 1) if per_row else 0.0]), base)


def test_rows_of_weight_zero_and_one_give_one_component_exactly() -> None:
    base, memory = (distribution(7, seed, impossible=2)[:, None] for seed in (0, 1))
    mixed = mix_log_probs(base, [memory], [torch.tensor([[0.0], [1.0]])])
    assert torch.equal(mixed, torch.stack([base[0], memory[1]]))


def test_a_trace_of_a_sparse_memory_beside_a_whole_dense_one_leaves_the_dense_one_alone() -> None:
    base, dense = (distribution(7, seed).expand(ROWS, TIMES, 7).contiguous() for seed in (0, 1))
    before = dense.clone()
    mixed = mix_log_probs(base, [dense, sparse_distribution(7, 3)], [1.0, 5e-7])  # within what check_weights forgives
    assert torch.equal(dense, before)
    assert not torch.equal(mixed, before)


@settings(deadline=None, max_examples=100)
@given(case=cases(), scale=st.sampled_from([1.0, 30.0]))
def test_logits_are_mixed_as_the_slow_way_through_log_probs_and_no_less_exactly(case: Case, scale: float) -> None:
    logits = scale * case.base + 5
    normaliser = torch.logsumexp(logits, -1, keepdim=True)
    mixed = mix_log_probs(logits, case.memories, case.weights, normaliser)
    through_log_probs = mix_log_probs(logits - normaliser, case.memories, case.weights) + normaliser
    exact = logits.double()
    exact_normaliser = exact.logsumexp(-1, keepdim=True)
    total = torch.zeros_like(exact)
    rest = torch.ones(ROWS, 1, 1, dtype=torch.float64)
    for part, weight in zip(case.dense_memories(), case.weights, strict=True):
        share = weight.double()[..., None] if isinstance(weight, Tensor) else torch.tensor(weight).double()
        total, rest = total + share * part, rest - share
    expected = (total + rest.clamp(min=0) * (exact - exact_normaliser).exp()).log() + exact_normaliser
    there = expected.exp() > 1e-6  # a rest of 1e-8, which float32 weights leave, is no error of the mixture
    ours, slow = ((found.double() - expected)[there].abs().max() for found in (mixed, through_log_probs))
    assert ours <= slow + 2**-19  # a step of float32 at 16, where logits may lie


def test_gradients_flow_to_logits_votes_and_weights_as_through_the_probabilities() -> None:
    logits = (4 * torch.randn(ROWS, TIMES, 7, generator=torch.Generator().manual_seed(0))).requires_grad_()
    raw = [
        (2 * torch.randn(ROWS, TIMES, 7, generator=torch.Generator().manual_seed(s))).requires_grad_() for s in (1, 2)
    ]
    share = torch.tensor([[0.2], [0.4], [0.1]], requires_grad=True)
    leaves = [logits, *raw, share]
    votes, given_weights, cotangent = [r.log_softmax(-1) for r in raw], [share, 0.25], torch.randn(ROWS, TIMES, 7)
    normaliser = torch.logsumexp(logits, -1, keepdim=True)
    found = torch.autograd.grad(mix_log_probs(logits, votes, given_weights, normaliser), leaves, cotangent)
    base, (first, second) = logits.softmax(-1), [r.softmax(-1) for r in raw]
    plain = (share[..., None] * first + 0.25 * second + (0.75 - share[..., None]) * base).log() + logits.logsumexp(
        -1, True
    )
    for ours, its in zip(found, torch.autograd.grad(plain, leaves, cotangent), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-5)


def test_the_normaliser_is_torchs_logsumexp_and_so_are_its_gradients() -> None:
    torch.manual_seed(0)
    rows = 10 * torch.randn(6, 3, 1000)
    rows[1, 0] = 5.0  # all alike
    rows[2, 0, 0] = torch.finfo(torch.float32).min  # as models rule tokens out
    rows[2, 1, :999] = -torch.inf
    rows.requires_grad_()
    ours, theirs = logsumexp(rows), torch.logsumexp(rows.double(), -1, keepdim=True)
    torch.testing.assert_close(ours.double(), theirs, atol=4e-6, rtol=1e-6)
    pull = torch.randn(6, 3, 1)
    (of_ours,), (of_theirs,) = (torch.autograd.grad((pull * said).sum(), rows) for said in (ours, theirs))
    torch.testing.assert_close(of_ours, of_theirs, atol=1e-5, rtol=1e-4)
    for wrong in (torch.nan, torch.inf):
        assert not logsumexp(torch.tensor([[1.0, wrong, 2.0]])).isfinite().any()
    assert not logsumexp(torch.full((1, 4), -torch.inf)).isfinite().any()


def test_a_mixture_of_many_memories_makes_two_tensors_of_the_bases_size() -> None:
    class Made(TorchDispatchMode):
        large: ClassVar[set[int]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.numel() == 3000:
                self.large.add(made.data_ptr())
                kept.append(made)
            return made

    kept: list[Tensor] = []
    base, memories = distribution(1500, 0), [distribution(1500, seed) for seed in range(1, 5)]
    with Made():
        mix_log_probs(base, memories, [0.1] * 4)
    assert len(Made.large) == 2


def test_no_dense_row_of_a_sparse_memory_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(*args: object) -> None:
        raise AssertionError("a sparse component was made dense")

    monkeypatch.setattr(SparseProbs, "dense", dense)
    base, sparse = distribution(2000, 0).expand(ROWS, TIMES, 2000).contiguous(), sparse_distribution(50, 3)
    mixed = mix_log_probs(base, [sparse], [0.25])
    touched = mixed != base + math.log(0.75)
    assert int(touched.sum()) == len(sparse.ids)


@pytest.mark.parametrize(
    ("given_weights", "message"),
    [
        ([torch.tensor([0.1, 1.5, 0.2])], r"mix_weight = 1\.5 in row 1: must be in"),
        ([torch.tensor([0.1, math.nan])], "mix_weight = nan in row 1"),
        ([torch.tensor([0.5, 0.25, 0.75]), 0.5], r"the weights 0\.75, 0\.5 in row 2 sum to 1\.25, above 1"),
        ([0.5, torch.tensor([0.75])], r"the weights 0\.5, 0\.75 sum to 1\.25"),
    ],
)
def test_bad_weights_of_a_row_are_refused_and_the_row_is_named(given_weights: list[Weight], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_weights(given_weights)


def test_good_weights_of_every_row_pass() -> None:
    check_weights([torch.tensor([0.0, 0.5, 0.9]), torch.tensor([1.0, 0.5, 0.1])])  # 0.9 and 0.1 are not exact


class Counted(VoterCache):
    """What a weight rule might keep: the tokens read, per row."""

    def __init__(self, rows: int) -> None:
        self.read = torch.zeros(rows, dtype=torch.long)

    def crop(self, tokens: int) -> None:
        self.read -= tokens

    def select(self, rows: Tensor) -> None:
        self.read = self.read[rows]

    def repeat(self, times: int) -> None:
        self.read = self.read.repeat_interleave(times)

    def reset(self) -> None:
        self.read.zero_()


def test_a_rules_state_moves_with_the_cache() -> None:
    state = Counted(2)
    cache = MixedCache(DynamicCache(), {}, state, 2)
    state.read += torch.tensor([5, 7])
    cache.crop(-2)
    assert state.read.tolist() == [3, 5]
    cache.batch_repeat_interleave(2)
    assert state.read.tolist() == [3, 3, 5, 5]
    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))  # type: ignore[arg-type]
    assert state.read.tolist() == [5, 3, 3, 5]
    cache.batch_select_indices(torch.tensor([0, 1]))
    assert state.read.tolist() == [5, 3]
    cache.reset()
    assert state.read.tolist() == [0, 0]


def test_fixed_weights_are_for_rows_or_for_all() -> None:
    votes = {"law": torch.zeros(4, 1, 3), "bio": torch.zeros(4, 1, 3)}
    step = Step(torch.zeros(4, 1, dtype=torch.long), 0, slice(None), torch.zeros(4, 1, 3), torch.zeros(4, 1, 1), votes)
    assert FixedWeights({"law": 0.2, "bio": 0.5}).weights(step, None) == [0.2, 0.5]
    law, bio = FixedWeights({"law": torch.tensor([0.1, 0.4]), "bio": 0.5}).weights(step, None)
    assert bio == 0.5
    assert isinstance(law, Tensor)
    assert law.shape == (4, 1)
    torch.testing.assert_close(law[:, 0], torch.tensor([0.1, 0.1, 0.4, 0.4]))
