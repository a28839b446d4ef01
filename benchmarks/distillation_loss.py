"""The distillation loss is faster than one with dense targets and logits, in a tenth of the memory."""

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import bar_line, prove
from benchmarks.timing import Timing, interleave
from memlm.memory.loss import distillation_loss
from memlm.models.heads import Head
from memlm.models.loading import default_device

WIDTHS = (576, 896)
VOCABULARIES = (49_152, 151_936)
TIME_BARS = {torch.bfloat16: 0.8, torch.float32: 1.0}
MEMORY_BAR = 0.1
SIDES = ("fused", "dense")
_KL_WEIGHT = 0.5
_PROVEN = 64  # positions, for the reference in float64 is slow


@dataclass(frozen=True)
class Shape:
    """What a loss is computed of; `dtype` is that of autocast, float32 for none."""

    positions: int
    width: int
    vocab_size: int
    support: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Such as `bfloat16/576x49152`."""
        return f"{str(self.dtype).removeprefix('torch.')}/{self.width}x{self.vocab_size}"


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """Two lines per shape and precision: time of forward and backward pass, head included, and peak of extra memory.

    The dense side gets its targets ready, one soft label per position with the label already in it, and does one
    cross-entropy. Extra memory is what a pass adds to parameters, hidden states and targets; the gradients, which both
    sides leave behind, are counted. On the CPU that is anonymous memory of a process per side.
    """
    device = default_device()
    shapes = [
        Shape(4096, width, vocab_size, 64, dtype)
        for vocab_size, width, dtype in product(VOCABULARIES, WIDTHS, TIME_BARS)
    ]
    if quick:
        shapes = [Shape(64, 16, 3000, 8, dtype) for dtype in TIME_BARS]
    for shape in shapes:
        proven = prove_loss(shape, device)
        timing = measure(shape, device, rounds=1 if quick else 3)
        yield bar_line(
            f"distillation_loss/time/{shape.name}",
            timing.ratio("fused", "dense"),
            at_most=TIME_BARS[shape.dtype],
            judged=not quick,
            spread=timing.spread("fused", "dense"),
            **{f"{side}_seconds": round(timing.median(side), 4) for side in SIDES},
            **proven,
            positions=shape.positions,
            support=shape.support,
            threads=torch.get_num_threads(),
        )
        measure_peak = peak if quick else peak_in_new_process
        peaks = {side: measure_peak(side, shape, device) for side in SIDES}
        yield bar_line(
            f"distillation_loss/memory/{shape.name}",
            peaks["fused"] / peaks["dense"] if peaks["dense"] else None,  # tiny sizes fit in what is there already
            at_most=MEMORY_BAR,
            judged=not quick,
            **{f"{side}_bytes": peak for side, peak in peaks.items()},
            gradient_bytes=4 * shape.width * (shape.positions + shape.vocab_size),
        )


class Inputs:
    """Random hidden states, head, labels and targets of a shape."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.shape = shape
        self.hidden = torch.randn(shape.positions, shape.width, generator=draw).to(device).requires_grad_()
        linear = nn.Linear(shape.width, shape.vocab_size, bias=False)
        nn.init.normal_(linear.weight, std=shape.width**-0.5, generator=draw)  # logits of variance 1
        self.head = Head(linear.to(device))
        self.labels = torch.randint(shape.vocab_size, (shape.positions,), generator=draw).to(device)
        self.ids = torch.randint(shape.vocab_size, (shape.positions, shape.support), generator=draw).to(device)
        self.probs = torch.rand(shape.positions, shape.support, generator=draw).softmax(1).to(device)

    def fused(self) -> Tensor:
        """The library's loss, per position."""
        return (
            distillation_loss(
                self.hidden,
                self.labels,
                self.head,
                kl_weight=_KL_WEIGHT,
                vocab_size=self.shape.vocab_size,
                target_counts=torch.full_like(self.labels, self.shape.support),
                target_ids=self.ids.flatten(),
                target_probs=self.probs.flatten(),
            ).loss
            / self.shape.positions
        )

    def dense_label(self) -> Tensor:
        """`(P, V)` targets and labels, weighted."""
        label = torch.zeros(self.shape.positions, self.shape.vocab_size, device=self.hidden.device)
        label.scatter_add_(1, self.ids, _KL_WEIGHT * self.probs)
        return label.scatter_add_(1, self.labels[:, None], torch.full_like(self.probs[:, :1], 1 - _KL_WEIGHT))

    def dense(self, label: Tensor) -> Tensor:
        """Soft cross-entropy over all logits, per position: the loss but for the targets' entropy, a constant."""
        return nn.functional.cross_entropy(self.head(self.hidden).float(), label)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Those of hidden states and head."""
        self.clear()
        loss.backward()
        found = [tensor.grad for tensor in (self.hidden, self.head.weight)]
        return [gradient for gradient in found if gradient is not None]

    def clear(self) -> None:
        """Forget gradients."""
        self.hidden.grad = self.head.weight.grad = None

    def entropy(self) -> Tensor:
        """The targets' part of the loss that the dense side leaves out."""
        return _KL_WEIGHT * torch.special.entr(self.probs).sum() / self.shape.positions


def _autocast(shape: Shape, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=shape.dtype == torch.bfloat16)


def _pass(inputs: Inputs, label: Tensor | None) -> None:
    """Forward and backward pass of the library's loss, or of the dense one where there is a dense label."""
    inputs.clear()
    with torch.inference_mode(False), _autocast(inputs.shape, inputs.hidden.device):
        loss = inputs.fused() if label is None else inputs.dense(label)
        loss.backward()


def measure(shape: Shape, device: torch.device, *, rounds: int) -> Timing:
    """Seconds of both sides."""
    inputs = Inputs(shape, device)
    label = inputs.dense_label()
    sides = {"fused": lambda: _pass(inputs, None), "dense": lambda: _pass(inputs, label)}
    return interleave(sides, device=device, rounds=rounds, warmup=1)


def prove_loss(shape: Shape, device: torch.device) -> dict[str, float]:
    """Errors of both sides against float64, relative, on some positions.

    Raises:
        WrongAnswerError: That of the library's loss or of its gradients is more than a tenth above the dense one's.
    """
    few = Shape(min(_PROVEN, shape.positions), shape.width, shape.vocab_size, shape.support, shape.dtype)
    inputs = Inputs(few, device)
    label = inputs.dense_label()
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.head.weight))
    exact = nn.functional.cross_entropy(hidden @ weight.T, label.double())
    exact.backward()
    reference = [exact, hidden.grad, weight.grad]
    with _autocast(few, device):
        losses = {"fused": inputs.fused() + inputs.entropy(), "dense": inputs.dense(label)}
    found = {side: [loss, *inputs.gradients(loss)] for side, loss in losses.items()}
    errors: dict[str, float] = {}
    for number, part in enumerate(("loss", "hidden_gradient", "head_gradient")):
        fused, dense = (_relative_error(found[side][number], reference[number]) for side in SIDES)
        # float32 and bfloat16 step by 2**-24 and 2**-9; a dense error may happen to vanish
        prove(fused, 1.1 * dense + (1e-6 if shape.dtype == torch.float32 else 1e-3), f"{part} of {shape.name}")
        errors |= {f"fused_{part}_error": float(f"{fused:.2e}"), f"dense_{part}_error": float(f"{dense:.2e}")}
    return errors


def _relative_error(found: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm())


# --- peaks ------------------------------------------------------------------------------------------------------------


def peak_in_new_process(side: str, shape: Shape, device: torch.device) -> int:
    """Most bytes that a pass of a side held beyond those held before it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak, side, shape, device).result()


def peak(side: str, shape: Shape, device: torch.device) -> int:
    """The same in this process; memory that earlier work has freed is used again unseen."""
    tiny = Inputs(Shape(8, 16, 600, 2, shape.dtype), device)
    _pass(tiny, tiny.dense_label() if side == "dense" else None)  # what libraries set up once
    inputs = Inputs(shape, device)
    label = inputs.dense_label() if side == "dense" else None
    gc.collect()
    if device.type != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _pass(inputs, label)
        return torch.cuda.max_memory_allocated(device) - before
    before = most = _anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(1e-3):
            most = max(most, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    _pass(inputs, label)
    done.set()
    watcher.join()
    return max(most, _anonymous_bytes()) - before


def _anonymous_bytes() -> int:
    """Memory of this process that belongs to no file (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("this system does not tell anonymous memory")
