"""The distillation loss is no slower than a chunked, gathered or compiled one, in a tenth of a dense one's memory."""

import gc
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import bar_line, prove
from benchmarks.timing import Timing, interleave
from memlm.memory import loss as loss_module
from memlm.memory.loss import distillation_loss
from memlm.models.heads import Head
from memlm.models.loading import default_device, default_dtype

WIDTHS = (576, 896)
VOCABULARIES = (49_152, 151_936)
DTYPES = (torch.bfloat16, torch.float32)
TIME_BAR = 1.0
MEMORY_BAR = 0.1
SUPPORT = 189  # tokens of a position at most, and half of that at least: MedQuAD's, at 90 to 99.9% of the mass
_KL_WEIGHT = 0.5
_PROVEN = 320  # positions, for the reference in float64 is slow; in tiles as they are timed, two or more
_CHUNK = 1024  # positions of the chunked rival, in which its logits are as large as TRL's


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

    Time is held against the fastest rival: a loop over chunks of positions that gathers the support and goes backward
    at once (as Liger and TRL), the same over all logits (as DistillKit), that one compiled (as the torch_compile way of
    Cut Cross-Entropy) where torch can, and a dense one. The dense side gets its targets ready, one soft label per
    position with the label already in it, and does one cross-entropy; memory is held against it.

    Extra memory is what a pass adds to parameters, hidden states and targets; the gradients, which both sides leave
    behind, are counted. On the CPU that is anonymous memory of a process per side.
    """
    device = default_device()
    # where bfloat16 is not computed natively nobody trains in it, and a pass takes minutes
    dtypes = [dtype for dtype in DTYPES if dtype in (default_dtype(device), torch.float32)]
    shapes = [
        Shape(4096, width, vocab_size, SUPPORT, dtype)
        for vocab_size, width, dtype in product(VOCABULARIES, WIDTHS, dtypes)
    ]
    if quick:
        shapes = [Shape(64, 16, 3000, 8, dtype) for dtype in DTYPES]
    for shape in shapes:
        proven = prove_loss(shape, device)
        timing = measure(shape, device, rounds=1 if quick else 3, compiled=not quick)
        rivals = [side for side in timing.seconds if not side.startswith("fused")]
        rival = min(rivals, key=timing.median)
        yield bar_line(
            f"distillation_loss/time/{shape.name}",
            timing.ratio("fused", rival),
            at_most=TIME_BAR,
            judged=not quick,
            spread=timing.spread("fused", rival),
            rival=rival,
            ratios={side: round(timing.ratio("fused", side), 4) for side in timing.seconds if side != "fused"},
            **{f"{side}_seconds": round(timing.median(side), 4) for side in timing.seconds},
            **proven,
            positions=shape.positions,
            support=shape.support,
            threads=torch.get_num_threads(),
        )
        in_process = quick or device.type != "cpu"  # an accelerator counts what this process asks for
        measure_peak = peak if in_process else peak_in_new_process
        smaller = [side for side in timing.seconds if side.startswith("fused_")]
        peaks = {side: measure_peak(side, shape, device) for side in ("fused", *smaller, "chunked", "dense")}
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
        size = (shape.positions, shape.support)
        self.counts = torch.randint((shape.support + 1) // 2, shape.support + 1, size[:1], generator=draw).to(device)
        there = torch.arange(shape.support, device=device) < self.counts[:, None]
        self.ids = torch.randint(shape.vocab_size, size, generator=draw).to(device).masked_fill(~there, 0)
        self.probs = torch.rand(size, generator=draw).to(device).masked_fill(~there, -torch.inf).softmax(1)
        self.flat_ids, self.flat_probs = self.ids[there], self.probs[there]

    def fused(self, tile: tuple[int, int] | None = None) -> Tensor:
        """The library's loss, per position."""
        return (
            distillation_loss(
                self.hidden,
                self.labels,
                self.head,
                kl_weight=_KL_WEIGHT,
                vocab_size=self.shape.vocab_size,
                target_counts=self.counts,
                target_ids=self.flat_ids,
                target_probs=self.flat_probs,
                tile=tile,
            ).loss
            / self.shape.positions
        )

    def fused_25(self) -> Tensor:
        """The same in tiles of 2^25 logits, which an accelerator may rather have."""
        return self.fused(self._tile(25))

    def fused_26(self) -> Tensor:
        """The same in tiles of 2^26 logits."""
        return self.fused(self._tile(26))

    def _tile(self, bits: int) -> tuple[int, int]:
        if self.shape.dtype == torch.float32:
            return max(2**bits // self.shape.vocab_size, 1), self.shape.vocab_size
        return self.shape.positions, max(2**bits // self.shape.positions, 1)

    def gathered(self, here: slice = slice(None), hidden: Tensor | None = None) -> Tensor:
        """The same but for the targets' entropy: all logits of some positions, of which the support is gathered."""
        logits = self.head(self.hidden[here] if hidden is None else hidden).float()
        q, y = _KL_WEIGHT * self.probs[here], 1 - _KL_WEIGHT
        kept = (q * logits.gather(1, self.ids[here])).sum(1) + y * logits.gather(1, self.labels[here, None])[:, 0]
        return (logits.logsumexp(1) - kept).sum() / self.shape.positions

    def chunked(self) -> Tensor:
        """The same in chunks of positions, each of which goes backward at once; its gradients are there already."""
        parts, gradients = [], []
        for start in range(0, self.shape.positions, _CHUNK):
            here = slice(start, start + _CHUNK)
            hidden = self.hidden[here].detach().requires_grad_()
            loss = self.gathered(here, hidden)
            loss.backward()
            parts.append(loss.detach())
            gradients.append(hidden.grad)
        self.hidden.grad = torch.cat([g for g in gradients if g is not None])
        return torch.stack(parts).sum()

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
        if loss.requires_grad:  # else they are there
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


def _pass(inputs: Inputs, side: str, label: Tensor | None = None, loss: Any = None) -> None:
    """Forward and backward pass of a side; the dense one takes its label, a compiled one is given."""
    inputs.clear()
    with torch.inference_mode(False), _autocast(inputs.shape, inputs.hidden.device):
        found = loss() if loss is not None else inputs.dense(label) if label is not None else getattr(inputs, side)()
        if found.requires_grad:
            found.backward()


def measure(shape: Shape, device: torch.device, *, rounds: int, compiled: bool) -> Timing:
    """Seconds of all sides."""
    inputs = Inputs(shape, device)
    label = inputs.dense_label()
    sides: dict[str, Any] = {side: lambda side=side: _pass(inputs, side) for side in ("fused", "chunked", "gathered")}
    for side in ("fused_25", "fused_26") if device.type != "cpu" else ():
        sides[side] = lambda side=side: _pass(inputs, side)
    sides["dense"] = lambda: _pass(inputs, "dense", label)
    if compiled:
        loss = torch.compile(inputs.gathered)
        try:
            _pass(inputs, "compiled", loss=loss)
            sides["compiled"] = lambda: _pass(inputs, "compiled", loss=loss)
        except Exception as error:  # as where there is no compiler
            print(f"torch.compile: {str(error).splitlines()[0][:200]}", file=sys.stderr)
    return interleave(sides, device=device, rounds=rounds, warmup=1)


def prove_loss(shape: Shape, device: torch.device) -> dict[str, float]:
    """Errors of all sides against float64, relative, on some positions, in tiles as they are timed.

    Raises:
        WrongAnswerError: That of the library's loss or of its gradients is more than a tenth above the dense one's; or
            a rival's is, and what is compared is not the same.
    """
    few = replace(shape, positions=min(_PROVEN, shape.positions))
    inputs = Inputs(few, device)
    label = inputs.dense_label()
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.head.weight))
    exact = nn.functional.cross_entropy(hidden @ weight.T, label.double())
    exact.backward()
    reference = [exact, hidden.grad, weight.grad]
    tile = loss_module._tile(shape.positions, shape.vocab_size, shape.dtype, device)
    ways = {
        "fused": lambda: inputs.fused(tile) + inputs.entropy(),
        "chunked": inputs.chunked,
        "gathered": inputs.gathered,
        "dense": lambda: inputs.dense(label),
    }
    found = {}
    for side, way in ways.items():
        inputs.clear()
        with _autocast(few, device):
            loss = way()
        found[side] = [loss, *inputs.gradients(loss)]
    errors: dict[str, float] = {}
    for number, part in enumerate(("loss", "hidden_gradient", "head_gradient")):
        off = {side: _relative_error(found[side][number], reference[number]) for side in ways}
        # float32 and bfloat16 step by 2**-24 and 2**-9; a dense error may happen to vanish
        allowed = 1.1 * off["dense"] + (1e-6 if shape.dtype == torch.float32 else 1e-3)
        for side, error in off.items():
            prove(error, allowed, f"{part} of {shape.name}, {side}")
            errors[f"{side}_{part}_error"] = float(f"{error:.2e}")
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
    _pass(tiny, side, tiny.dense_label() if side == "dense" else None)  # what libraries set up once
    inputs = Inputs(shape, device)
    label = inputs.dense_label() if side == "dense" else None
    gc.collect()
    if device.type != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _pass(inputs, side, label)
        return torch.cuda.max_memory_allocated(device) - before
    before = most = _anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(1e-3):
            most = max(most, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    _pass(inputs, side, label)
    done.set()
    watcher.join()
    return max(most, _anonymous_bytes()) - before


def _anonymous_bytes() -> int:
    """Memory of this process that belongs to no file (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("this system does not tell anonymous memory")
