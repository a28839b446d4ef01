"""The loss by kernels against its own walk without them, and against float64.

They run where there is an accelerator and Triton, and on a CPU that has Triton under TRITON_INTERPRET=1.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memlm.memory import loss
from memlm.memory.loss import Beside, DistillationLoss, distillation_loss
from memlm.models.heads import Head
from memlm.models.loading import default_device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = default_device()
POSITIONS, WIDTH, VOCABULARY, PADDING = 13, 16, 300, 4

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or not (INTERPRETED or DEVICE.type in loss.KERNEL_DEVICES),
    reason="needs Triton, and an accelerator or its interpreter",
)


def use(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have them used, or not."""
    loss.has_kernels.cache_clear()
    monkeypatch.setattr(loss, "KERNEL_DEVICES", (DEVICE.type,) if kernels else ())
    assert loss.has_kernels(DEVICE.type) == kernels


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    yield
    loss.has_kernels.cache_clear()


def given(*, support: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs on the device; some tokens stand twice in a target, some are the label."""
    rng = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, support + 1, (POSITIONS,), generator=rng)
    few = max(4, support // 2)  # tokens to draw from, so that some come twice
    ids = torch.randint(few, (int(counts.sum()),), generator=rng)
    labels = torch.where(
        torch.rand(POSITIONS, generator=rng) < 0.5,
        torch.randint(few, (POSITIONS,), generator=rng),
        torch.randint(VOCABULARY, (POSITIONS,), generator=rng),
    )
    inputs = {
        "hidden": torch.randn(POSITIONS, WIDTH, generator=rng),
        "weight": torch.randn(VOCABULARY + PADDING, WIDTH, generator=rng),
        "bias": torch.randn(VOCABULARY + PADDING, generator=rng),
        "labels": labels,
        "counts": counts,
        "ids": ids,
        "probs": torch.rand(len(ids), generator=rng) + 0.01,
        "confidence": torch.randn(POSITIONS, generator=rng),
        "of_labels": -5 * torch.rand(POSITIONS, generator=rng),
        "of_targets": -5 * torch.rand(len(ids), generator=rng),
    }
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def found(
    inputs: dict[str, Tensor], *, bias: bool, scale: float, softcap: float | None, share: float | None, **options: Any
) -> tuple[DistillationLoss, list[Tensor]]:
    """The loss and its gradients."""
    learned = ["hidden", "weight", *(["bias"] if bias else []), *(["confidence"] if share is not None else [])]
    given = inputs | {name: inputs[name].clone().requires_grad_() for name in learned}
    linear = nn.Linear(WIDTH, VOCABULARY + PADDING, bias=bias, device="meta")
    linear._parameters["weight"] = given["weight"]  # type: ignore[assignment]
    linear._parameters["bias"] = given["bias"] if bias else None  # type: ignore[assignment]
    beside = None
    if share is not None:
        beside = Beside(given["of_labels"], given["of_targets"], given["confidence"], share)
    result = distillation_loss(
        given["hidden"],
        given["labels"],
        Head(linear, scale, softcap),
        vocab_size=VOCABULARY,
        target_counts=given["counts"],
        target_ids=given["ids"],
        target_probs=given["probs"],
        beside=beside,
        **options,
    )
    return result, list(torch.autograd.grad(result.loss, [given[name] for name in learned]))


@pytest.mark.parametrize("share", [None, 0.4])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.5, None), (True, 3.0, 5.0)])
@pytest.mark.parametrize("tile", [(POSITIONS, 128), (4, VOCABULARY), (5, 64), None])
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_kernels_give_what_tiles_give_without_them(
    kl_weight: float,
    tile: tuple[int, int] | None,
    bias: bool,
    scale: float,
    softcap: float | None,
    share: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = given(support=40)
    options: dict[str, Any] = {"bias": bias, "scale": scale, "softcap": softcap, "share": share}
    options |= {"kl_weight": kl_weight, "tile": tile}
    use(False, monkeypatch)
    plain, expected = found(inputs, **options)
    use(True, monkeypatch)
    ours, mine = found(inputs, **options)
    for name in ("loss", "kl", "cross_entropy", "mixture"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=2e-5, atol=2e-5)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds bfloat16 otherwise")
@pytest.mark.parametrize("support", [40, 400])
def test_in_bfloat16_kernels_are_as_near_to_float64(support: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = given(support=min(support, VOCABULARY))
    options: dict[str, Any] = {"bias": True, "scale": 1.0, "softcap": None, "share": None, "kl_weight": 0.5}
    use(False, monkeypatch)
    exact = found({k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}, **options)[1]
    errors = {}
    for name in ("torch", "kernels"):
        use(name == "kernels", monkeypatch)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            _, gradients = found(inputs, **options, tile=(POSITIONS, 128))
        errors[name] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(gradients, exact, strict=True)]
    assert all(a < 1.2 * b + 5e-4 for a, b in zip(errors["kernels"], errors["torch"], strict=True)), errors
