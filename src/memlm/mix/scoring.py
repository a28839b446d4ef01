"""Per-token scores: how likely each component finds the label. Mixtures, tables and gates read them, no model twice."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from memlm.corpus.blocks import IGNORE, Block, Blocks, length_batches
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import Memory, MemorySettings
from memlm.models.taps import TapReader

COLUMNS = ("label", "entropy", "top1")


def as_voter(base: PreTrainedModel, vocab_size: int) -> Memory:
    """A base in the shape of a memory without window, so that one function scores both."""
    return MemoryDecoder(base, MemorySettings(kind="decoder", vocab_size=vocab_size))


ReadActivations = Callable[[list[Block], Tensor], Tensor]
"""From blocks and their tokens `(B, T)`, padded on the right, to activations `(B, T, D)`."""


@contextlib.contextmanager
def live_activations(base: PreTrainedModel, tap: str) -> Iterator[ReadActivations]:
    """Activations of the base, which runs up to the tap."""
    with TapReader(base, tap) as reader:
        yield lambda blocks, tokens: reader.read(tokens.to(base.device))


def stored_activations(keys: NDArray[np.float16]) -> ReadActivations:
    """Activations read before, `(P, D)` in the order of positions; zeros where nothing is predicted."""

    def read(blocks: list[Block], tokens: Tensor) -> Tensor:
        out = torch.zeros(*tokens.shape, keys.shape[1], dtype=torch.float16)
        for row, block in enumerate(blocks):
            before = np.flatnonzero(block.predicted) - 1
            first = block.first_position
            out[row, before] = torch.from_numpy(np.array(keys[first : first + len(before)]))
        return out

    return read


@torch.inference_mode()
def score(
    voter: Memory,
    blocks: Blocks,
    *,
    activations: ReadActivations | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, NDArray[np.float32]]:
    """What `voter` thinks of every label in `blocks`, in the order of blocks and of tokens in them.

    Blocks are batched by length, so padding is small; it is on the right, where causal models do not see it.

    Args:
        voter: A memory, or a base from `as_voter`.
        blocks: What to score.
        activations: Where a memory with a tap gets the base's.
        batch_tokens: Tokens in one forward pass, padding included.
        progress: Told how many labels were scored.

    Returns:
        Per column of `COLUMNS` an array `(P,)`: log-prob of the label and entropy (nats), top-1 probability.
    """
    device = voter.device
    pieces: dict[int, dict[str, NDArray[np.float32]]] = {}
    for batch in length_batches(blocks.lengths, batch_tokens):
        members = [blocks[int(i)] for i in batch]
        longest = max(len(b.input_ids) for b in members)
        tokens = np.stack([np.pad(b.input_ids, (0, longest - len(b.input_ids))) for b in members])
        labels = np.full(tokens.shape, IGNORE, np.int64)
        for row, block in enumerate(members):
            labels[row, : len(block.input_ids) - 1] = block.labels[1:]
        batch_ids = torch.from_numpy(tokens).long()
        found_activations = activations(members, batch_ids) if activations is not None else None
        state = voter.step(batch_ids.to(device), found_activations)
        found = voter.label_log_probs(state, torch.from_numpy(labels).to(device))
        counts = (labels != IGNORE).sum(1)
        edges = np.cumsum([0, *counts])
        for row, index in enumerate(batch):
            pieces[int(index)] = {c: found[c][edges[row] : edges[row + 1]].numpy() for c in COLUMNS}
        progress(int(counts.sum()))
    return {c: np.concatenate([np.empty(0, np.float32), *(pieces[i][c] for i in sorted(pieces))]) for c in COLUMNS}


GRID = np.linspace(0.0, 1.0, 101)


def mixture_label_log_probs(
    base: NDArray[np.float32], memory: NDArray[np.float32], mix_weight: float
) -> NDArray[np.float64]:
    """Label log-probs of the mixture, `(P,)` in float64; exact at weights 0 and 1."""
    if mix_weight in (0.0, 1.0):
        return (memory if mix_weight else base).astype(np.float64)
    return np.logaddexp(base.astype(np.float64) + np.log1p(-mix_weight), memory.astype(np.float64) + np.log(mix_weight))


def perplexity_curve(
    base: NDArray[np.float32], memory: NDArray[np.float32], grid: NDArray[np.float64] = GRID
) -> NDArray[np.float64]:
    """Perplexity of the mixture at each weight of `grid`."""
    return np.array([np.exp(-mixture_label_log_probs(base, memory, float(w)).mean()) for w in grid])


def best_mix_weight(base: NDArray[np.float32], memory: NDArray[np.float32]) -> tuple[float, float]:
    """The weight of `GRID` with the lowest perplexity, and that perplexity. Call it on validation scores only."""
    curve = perplexity_curve(base, memory)
    best = int(curve.argmin())
    return float(round(GRID[best], 4)), float(curve[best])
