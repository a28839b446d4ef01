"""The fused sparse loss against a dense one in float64."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_lm import dense_distillation_loss, dense_mixture_loss, dense_targets
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memlm.memory import loss
from memlm.memory.loss import Beside, DistillationLoss, _tile, distillation_loss
from memlm.models.heads import Head


@dataclass(frozen=True)
class Case:
    hidden: Tensor  # (P, D)
    weight: Tensor  # (V + padding, D)
    bias: Tensor | None
    labels: Tensor  # (P,)
    counts: Tensor  # (P,)
    ids: Tensor  # (S,)
    probs: Tensor  # (S,)
    vocab_size: int
    kl_weight: float
    scale: float = 1.0
    softcap: float | None = None
    tile: Any = None

    def fused(self, kl_weight: float | None = None, beside: Beside | None = None) -> DistillationLoss:
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=self.bias is not None)
        linear._parameters["weight"] = self.weight
        linear._parameters["bias"] = self.bias
        return distillation_loss(
            self.hidden,
            self.labels,
            Head(linear, self.scale, self.softcap),
            kl_weight=self.kl_weight if kl_weight is None else kl_weight,
            vocab_size=self.vocab_size,
            target_counts=self.counts,
            target_ids=self.ids,
            target_probs=self.probs,
            beside=beside,
            tile=self.tile,
        )

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        return dense_distillation_loss(
            self.hidden,
            self.weight,
            self.bias,
            self.labels,
            dense_targets(self.counts, self.ids, self.probs, self.vocab_size),
            kl_weight=self.kl_weight,
            vocab_size=self.vocab_size,
            scale=self.scale,
            softcap=self.softcap,
        )

    @property
    def log_probs(self) -> Tensor:
        """The memory's, dense and in float64."""
        logits = self.scale * (self.hidden.double() @ self.weight.double().T + (0 if self.bias is None else self.bias))
        logits = logits[:, : self.vocab_size]
        return (logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)).log_softmax(1)

    def beside(self, share: float, seed: int = 0) -> tuple[Tensor, Beside]:
        """A base's log-probs, dense, and what the loss is told of it."""
        rng = torch.Generator().manual_seed(seed)
        base = (3 * torch.randn(len(self.hidden), self.vocab_size, generator=rng)).log_softmax(1)
        rows = torch.arange(len(base)).repeat_interleave(self.counts)
        confidence = (2 * torch.randn(len(base), generator=rng)).requires_grad_()
        of_labels = base.gather(1, self.labels[:, None])[:, 0]
        return base, Beside(of_labels, base[rows, self.ids.long()], confidence, share)

    def parameters(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        for tensor in self.parameters():
            tensor.grad = None
        loss.backward()
        return [tensor.grad.clone() for tensor in self.parameters() if tensor.grad is not None]


def make_case(
    *,
    positions: int = 5,
    width: int = 4,
    vocab_size: int = 7,
    padding: int = 2,
    support: int = 3,
    bias: bool = True,
    kl_weight: float = 0.5,
    scale: float = 1.0,
    softcap: float | None = None,
    tile: tuple[int, ...] | None = None,
    half: bool = False,
    seed: int = 0,
) -> Case:
    rng = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, min(support, vocab_size) + 1, (positions,), generator=rng)
    ids = [torch.randperm(vocab_size, generator=rng)[:count] for count in counts.tolist()]
    probs = [torch.rand(count, generator=rng) + 0.01 for count in counts.tolist()]
    flat = torch.cat([p / p.sum() for p in probs]) if probs else torch.empty(0)
    return Case(
        hidden=(1.5 * torch.randn(positions, width, generator=rng)).requires_grad_(),
        weight=torch.randn(vocab_size + padding, width, generator=rng).requires_grad_(),
        bias=torch.randn(vocab_size + padding, generator=rng).requires_grad_() if bias else None,
        labels=torch.randint(0, vocab_size, (positions,), generator=rng),
        counts=counts,
        ids=(torch.cat(ids) if ids else torch.empty(0, dtype=torch.long)).int(),
        probs=flat.half() if half else flat,
        vocab_size=vocab_size,
        kl_weight=kl_weight,
        scale=scale,
        softcap=softcap,
        tile=tile,
    )


cases = st.builds(
    make_case,
    positions=st.integers(0, 9),
    width=st.integers(1, 6),
    vocab_size=st.integers(1, 12),
    padding=st.integers(0, 3),
    support=st.integers(1, 12),
    bias=st.booleans(),
    kl_weight=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    tile=st.none() | st.tuples(st.integers(1, 10), st.integers(1, 13)),
    half=st.booleans(),
    seed=st.integers(0, 2**16),
)
# sums of at most a few dozen float32 terms of size up to about 50: some 1e-6 relative, an order of magnitude to spare
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@settings(deadline=None, max_examples=150)
@given(cases)
def test_value_and_gradients_equal_the_dense_loss_in_float64(case: Case) -> None:
    fused, (loss, kl, cross_entropy) = case.fused(), case.dense()
    assert fused.loss.dtype == torch.float32
    torch.testing.assert_close(fused.loss.double(), loss, **CLOSE)
    torch.testing.assert_close(fused.cross_entropy.double(), cross_entropy, **CLOSE)
    if case.kl_weight > 0:
        torch.testing.assert_close(fused.kl.double(), kl, **CLOSE)
    found, expected = case.gradients(3 * fused.loss), case.gradients(3 * loss)
    assert len(found) == len(expected) == len(case.parameters())
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=150)
@given(cases, st.sampled_from([0.0, 0.3, 1.0]))
def test_through_the_mixture_value_and_gradients_equal_the_dense_loss_in_float64(case: Case, share: float) -> None:
    base, beside = case.beside(share)
    fused = case.fused(beside=beside)
    dense = dense_mixture_loss(
        case.log_probs,
        base,
        beside.confidence,
        case.labels,
        dense_targets(case.counts, case.ids, case.probs, case.vocab_size),
        kl_weight=case.kl_weight,
        share=share,
    )
    torch.testing.assert_close(fused.loss.double(), dense, **CLOSE)
    parts = [*case.parameters(), beside.confidence]
    found, expected = torch.autograd.grad(3 * fused.loss, parts), torch.autograd.grad(3 * dense, parts)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_through_the_mixture_what_the_base_knows_pulls_less() -> None:
    case = make_case(positions=2, bias=False, kl_weight=0.0)
    same = replace(
        case, labels=case.labels[:1].repeat(2), hidden=case.hidden.detach()[:1].repeat(2, 1).requires_grad_()
    )
    beside = Beside(torch.tensor([0.99, 0.001]).log(), None, torch.zeros(2), share=1.0)
    (gradient,) = torch.autograd.grad(same.fused(beside=beside).loss, [same.hidden])
    (alone,) = torch.autograd.grad(same.fused().loss, [same.hidden])
    p = same.log_probs[0, same.labels[0]].exp().item()
    for row, of_base in enumerate([0.99, 0.001]):
        torch.testing.assert_close(gradient[row], alone[row] * p / (p + of_base), rtol=1e-4, atol=1e-6)
    mixture = -torch.tensor([(p + 0.99) / 2, (p + 0.001) / 2]).log().sum()
    torch.testing.assert_close(same.fused(beside=beside).mixture, mixture, rtol=1e-4, atol=1e-5)


def test_with_no_share_of_the_mixture_it_is_the_loss_of_the_memory_alone() -> None:
    case = make_case(positions=9, softcap=5.0)
    _, beside = case.beside(0.0)
    torch.testing.assert_close(case.fused(beside=beside).loss, case.fused().loss)
    found, expected = case.gradients(case.fused(beside=beside).loss), case.gradients(case.fused().loss)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_soft_targets_through_the_mixture_need_the_base_there() -> None:
    case = make_case(kl_weight=0.5)
    _, beside = case.beside(1.0)
    with pytest.raises(ValueError, match="needs the base's log-probs of the targets' tokens"):
        case.fused(beside=replace(beside, of_targets=None))


@settings(deadline=None, max_examples=40)
@given(cases)
def test_loss_is_the_weighted_sum_of_its_components(case: Case) -> None:
    fused = case.fused()
    expected = case.kl_weight * fused.kl + (1 - case.kl_weight) * fused.cross_entropy
    torch.testing.assert_close(fused.loss.detach(), expected, **CLOSE)
    assert not fused.kl.requires_grad
    assert not fused.cross_entropy.requires_grad


@pytest.mark.parametrize("tile", [(1, 1), (3, 7), (8, 3), (7, 6), (9, 8), (1000, 1000)])
def test_tiles_of_any_size_give_the_same(tile: tuple[int, int]) -> None:
    whole = make_case(positions=8, bias=True, softcap=5.0)
    cut = replace(whole, tile=tile)
    torch.testing.assert_close(cut.fused().loss, whole.fused().loss, rtol=1e-6, atol=1e-6)
    for mine, reference in zip(cut.gradients(cut.fused().loss), whole.gradients(whole.fused().loss), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [(8, 5, 3), (8, 5, 1), (4, 7, 2), (4, 20, 3), (8, 20, 8), (3, 4, 2)])
@pytest.mark.parametrize("share", [None, 0.6])
def test_in_half_precision_logits_may_be_widened_a_few_positions_at_a_time(
    tile: tuple[int, int, int], share: float | None
) -> None:
    whole = make_case(positions=8, vocab_size=20, support=6, bias=True, softcap=5.0)
    beside = None if share is None else whole.beside(share)[1]

    def found(tile: Any) -> list[Tensor]:
        case = replace(whole, tile=tile)
        if beside is not None:
            beside.confidence.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = case.fused(beside=beside).loss
        gradients = case.gradients(loss)
        return [loss.detach(), *gradients, *([] if beside is None else [beside.confidence.grad])]

    for mine, reference in zip(found(tile), found(tile[:2]), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)


def test_padded_rows_of_the_head_get_no_gradient_and_no_probability() -> None:
    case = make_case(padding=3)
    _, weight, bias = case.gradients(case.fused().loss)
    assert not weight[case.vocab_size :].any()
    assert not bias[case.vocab_size :].any()
    assert weight[: case.vocab_size].any(1).all()
    loud = replace(case, bias=torch.cat([case.bias[: case.vocab_size].detach(), torch.full((3,), 100.0)]))
    torch.testing.assert_close(loud.fused().loss, case.fused().loss, rtol=0, atol=0)


@pytest.mark.parametrize("label", [2, 5], ids=["inside", "outside"])
def test_a_label_inside_or_outside_of_the_support_adds_to_it(label: int) -> None:
    case = replace(
        make_case(positions=1, bias=False, kl_weight=0.25),
        labels=torch.tensor([label]),
        counts=torch.tensor([2]),
        ids=torch.tensor([2, 3]),
        probs=torch.tensor([0.75, 0.25]),
    )
    log_p = (case.hidden.double() @ case.weight.double().T)[0, : case.vocab_size].log_softmax(0)
    q = torch.tensor([0.75, 0.25], dtype=torch.float64)
    kl = (q * (q.log() - log_p[[2, 3]])).sum()
    torch.testing.assert_close(case.fused().loss.double(), 0.25 * kl - 0.75 * log_p[label], **CLOSE)
    hidden_grad, _ = case.gradients(case.fused().loss)
    slope = log_p.exp() - torch.nn.functional.one_hot(torch.tensor(label), case.vocab_size) * 0.75
    slope[[2, 3]] -= 0.25 * q
    expected = slope @ case.weight.double()[: case.vocab_size]
    torch.testing.assert_close(hidden_grad[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_without_kl_no_targets_are_needed_and_it_is_cross_entropy() -> None:
    case = replace(make_case(kl_weight=0.0), counts=None, ids=None, probs=None)
    fused = case.fused()
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)[:, : case.vocab_size]
    expected = torch.nn.functional.cross_entropy(logits, case.labels, reduction="sum")
    torch.testing.assert_close(fused.loss, expected)
    torch.testing.assert_close(fused.cross_entropy, expected)
    assert fused.kl == 0


def test_kl_alone_pays_no_heed_to_the_labels() -> None:
    case = make_case(kl_weight=1.0)
    other = replace(case, labels=(case.labels + 1) % case.vocab_size)
    assert case.fused().loss == other.fused().loss
    assert case.fused().cross_entropy != other.fused().cross_entropy
    for mine, theirs in zip(case.gradients(case.fused().loss), other.gradients(other.fused().loss), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_kl_is_zero_where_the_memory_says_what_the_target_says() -> None:
    case = make_case(kl_weight=1.0, padding=0)
    probs = torch.nn.functional.linear(case.hidden, case.weight, case.bias).softmax(1).detach()
    exact = replace(
        case,
        counts=torch.full((len(probs),), case.vocab_size),
        ids=torch.arange(case.vocab_size).repeat(len(probs)),
        probs=probs.flatten(),
    )
    assert abs(exact.fused().kl.item()) < 1e-5
    for gradient in exact.gradients(exact.fused().loss):
        assert gradient.abs().max() < 1e-5


def test_targets_rounded_to_float16_are_normalised_again() -> None:
    case = make_case(positions=6, vocab_size=40, support=30, kl_weight=1.0, seed=3)
    shrunk = replace(case, probs=0.5 * case.probs)
    torch.testing.assert_close(shrunk.fused().loss, case.fused().loss, rtol=1e-6, atol=1e-6)
    rounded = replace(case, probs=case.probs.half())
    sums = torch.stack([piece.float().sum() for piece in rounded.probs.split(case.counts.tolist())])
    assert (sums != 1).any(), "the case must show the rounding"
    torch.testing.assert_close(rounded.fused().loss.double(), rounded.dense()[0], **CLOSE)


class LargestArray(TorchDispatchMode):
    """Numbers in the largest array that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("tile", [(200, 16), (10, 300)])
def test_no_array_is_as_large_as_positions_times_vocabulary(tile: tuple[int, int]) -> None:
    case = make_case(positions=200, width=3, vocab_size=300, padding=0, support=5, softcap=30.0, tile=tile)
    with LargestArray() as largest:
        case.fused().loss.backward()
    assert largest.numbers == tile[0] * tile[1]  # gradients and sparse labels are smaller
    with LargestArray() as largest:
        case.dense()
    assert largest.numbers >= 200 * 300, "it must see what is made"


def test_tiles_hold_all_positions_in_half_precision_and_all_tokens_in_full() -> None:
    cpu = torch.device("cpu")
    assert _tile(0, 50_000, torch.bfloat16, cpu) == (1, 2**20)
    assert _tile(1024, 50_000, torch.bfloat16, cpu) == (1024, 1024)
    assert _tile(65_536, 50_000, torch.bfloat16, cpu) == (65_536, 1024)
    assert _tile(65_536, 50_000, torch.float32, cpu) == (128, 50_000)
    assert _tile(65_536, 256, torch.float32, cpu) == (4096, 256)


@pytest.mark.parametrize("missing", ["counts", "ids", "probs"])
def test_kl_without_targets_is_an_error(missing: str) -> None:
    case = replace(make_case(kl_weight=0.5), **{missing: None})
    with pytest.raises(ValueError, match=r"kl_weight = 0\.5 needs targets"):
        case.fused()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "all"])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(frozen: str) -> None:
    case = make_case(bias=False)
    expected = dict(zip(["hidden", "weight"], case.gradients(case.fused().loss), strict=True))
    names = ["hidden", "weight"] if frozen == "all" else [frozen]
    part = replace(case, **{name: getattr(case, name).detach() for name in names})
    loss = part.fused().loss
    torch.testing.assert_close(loss, case.fused().loss, rtol=0, atol=0)
    if frozen == "all":
        assert not loss.requires_grad
        return
    (found,) = part.gradients(loss)
    torch.testing.assert_close(found, expected["weight" if frozen == "hidden" else "hidden"])


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize("tile", [(64, 16), (16, 200), (64, 16, 10), (32, 50, 8)])
def test_in_bfloat16_the_error_is_no_larger_than_the_naive_one(
    seed: int, softcap: float | None, autocast: bool, tile: tuple[int, ...]
) -> None:
    case = make_case(
        positions=64, width=64, vocab_size=200, support=8, padding=0, bias=False, softcap=softcap, tile=tile, seed=seed
    )
    dtype = torch.float32 if autocast else torch.bfloat16
    case = replace(
        case,
        hidden=case.hidden.detach().to(dtype).requires_grad_(),
        weight=(case.weight.detach() / 4).to(dtype).requires_grad_(),
    )
    targets = dense_targets(case.counts, case.ids, case.probs, case.vocab_size).float()
    expected, *_ = case.dense()
    expected_gradients = case.gradients(expected)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        fused = case.fused().loss
        logits = torch.nn.functional.linear(case.hidden, case.weight)
    assert logits.dtype == torch.bfloat16
    logits = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
    log_p = logits.log_softmax(1)
    kl = (torch.xlogy(targets, targets) - targets * log_p).sum()
    naive = case.kl_weight * kl - (1 - case.kl_weight) * log_p.gather(1, case.labels[:, None]).sum()

    # a tenth more than the naive error, and a quarter of bfloat16's step of 2**-8 where that error happens to vanish
    def allowed(error: float) -> float:
        return 1.1 * error + 1e-3

    assert relative_error(fused, expected) <= allowed(relative_error(naive, expected))
    for mine, theirs, reference in zip(case.gradients(fused), case.gradients(naive), expected_gradients, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, reference) <= allowed(relative_error(theirs, reference))


def test_where_triton_does_not_run_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(loss, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "memlm.memory.loss_kernels", None)
    loss.has_kernels.cache_clear()
    case = make_case()
    with pytest.warns(UserWarning, match="Triton does not run here, so the loss takes longer"):
        found = case.fused().loss
    loss.has_kernels.cache_clear()
    torch.testing.assert_close(found.double(), case.dense()[0], **CLOSE)


def test_a_token_named_twice_counts_twice() -> None:
    twice = replace(
        make_case(positions=1, kl_weight=0.5),
        counts=torch.tensor([3]),
        ids=torch.tensor([2, 3, 2]),
        probs=torch.tensor([0.25, 0.25, 0.5]),
    )
    once = replace(twice, counts=torch.tensor([2]), ids=torch.tensor([2, 3]), probs=torch.tensor([0.75, 0.25]))
    for mine, reference in zip(twice.gradients(twice.fused().loss), once.gradients(once.fused().loss), strict=True):
        torch.testing.assert_close(mine, reference)
