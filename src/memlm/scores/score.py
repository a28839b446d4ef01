"""Per position: how likely each voter finds the label; all voters in one pass over the text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memlm.corpus.blocks import IGNORE, Block, Blocks, length_batches
from memlm.errors import ModelError
from memlm.memory.voter import Voter
from memlm.mix.base import BaseVoter
from memlm.parts import Part


@dataclass(frozen=True)
class Scores:
    """What one voter thinks, per position in order; each `(P,)`."""

    label: NDArray[np.float32]
    """Log-prob of the token that came, in nats."""
    entropy: NDArray[np.float32]
    """Of the distribution, in nats."""
    top1: NDArray[np.float32]
    """Probability of the likeliest token."""
    top1_id: NDArray[np.int32]
    """The likeliest token."""
    confidence: NDArray[np.float32]
    """What a memory's own state says of how sure it is (`ConfidenceHead.of_state`); 0 where nothing is known."""


COLUMNS: dict[str, type[np.generic]] = {
    field.name: np.int32 if field.name == "top1_id" else np.float32 for field in fields(Scores)
}

ReadActivations = Callable[[list[Block], Tensor], Tensor]
"""From blocks and their tokens `(B, T)`, padded on the right, to activations `(B, T, D)`."""


def stored_activations(keys: NDArray[np.float16]) -> ReadActivations:
    """Activations read before, `(P, D)` in the order of positions; zeros where nothing is predicted."""

    def read(blocks: list[Block], tokens: Tensor) -> Tensor:
        out = torch.zeros(*tokens.shape, keys.shape[1], dtype=torch.float16)
        for row, block in enumerate(blocks):
            out[row, block.places] = torch.from_numpy(np.array(keys[block.positions]))
        return out

    return read


@torch.inference_mode()
def score(
    voters: Mapping[str, Voter],
    blocks: Blocks,
    *,
    base: BaseVoter | None = None,
    stored: ReadActivations | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int], object] = lambda tokens: None,
    part: Part | None = None,
    on_kept: Callable[[int], object] = lambda tokens: None,
    on_state: Callable[[str, Any, Tensor, NDArray[np.int64]], object] = lambda *told: None,
) -> dict[str, Scores]:
    """What each voter thinks of every label in `blocks`, in the order of blocks and of tokens in them.

    The base runs once for all: whole where it is one of the voters, else to the last tap only. Blocks are batched by
    length, so padding is small; it is on the right, where causal models do not see it.

    Args:
        voters: The base, memories, or both, by name.
        blocks: What to score.
        base: Read by memories with a tap.
        stored: Gives their activations instead.
        batch_tokens: Tokens in one forward pass, padding included.
        progress: Told how many labels were scored.
        part: Where an earlier pass of the same voters over the same blocks may have left some scores, and where this
            one keeps what it has.
        on_kept: Told how many scored labels are kept there.
        on_state: Told, of each voter and batch, its name, its state, the labels `(B, T)`, and the positions of those
            that count.

    Raises:
        ModelError: A voter gives NaN.
    """
    wanted = {voter.tap for voter in voters.values() if voter.tap is not None and stored is None}
    base_votes = any(voter is base for voter in voters.values())
    starts = blocks.position_starts
    scores: dict[str, dict[str, NDArray[Any]]] = {
        name: {column: np.empty(int(starts[-1]), dtype) for column, dtype in COLUMNS.items()} for name in voters
    }
    columns = {f"{i}.{name}": values for i, found in enumerate(scores.values()) for name, values in found.items()}
    batches = list(length_batches(blocks.lengths, batch_tokens))
    done = 0 if part is None else _take_up(part, columns, len(batches))
    scored = sum(int((starts[batch + 1] - starts[batch]).sum()) for batch in batches[:done])
    if scored:
        progress(scored)
        on_kept(scored)
    for number, batch in enumerate(batches[done:], done + 1):
        members = [blocks[int(i)] for i in batch]
        tokens = pad_sequence([torch.from_numpy(b.input_ids.astype(np.int64)) for b in members], batch_first=True)
        following = [torch.from_numpy(np.append(b.labels[1:], IGNORE)) for b in members]
        labels = pad_sequence(following, batch_first=True, padding_value=IGNORE)
        base_state, activations = None, {}
        if base is not None and base_votes:
            base_state = base.step(tokens.to(base.device), taps=wanted)
            activations = base_state.activations
        elif base is not None and wanted:
            activations = base.read(tokens.to(base.device), wanted)
        positions = np.concatenate([np.arange(*starts[[i, i + 1]]) for i in batch])
        for name, voter in voters.items():
            state = base_state
            if voter is not base:
                read = None
                if voter.tap is not None:
                    read = stored(members, tokens) if stored is not None else activations[voter.tap]
                state = voter.step(tokens.to(voter.device), read)
            here = labels.to(voter.device)
            on_state(name, state, here, positions)
            found = voter.columns(state, here)
            if any(values.isnan().any() for values in found.values()):
                raise ModelError(
                    f"{name} gives NaN, no distribution; where its weights are whole they overflow: take dtype float32"
                )
            for column, values in scores[name].items():
                values[positions] = found[column].numpy()
        progress(len(positions))
        scored += len(positions)
        if part is not None and part.offer(number, lambda: columns):
            on_kept(scored)
    return {name: Scores(**found) for name, found in scores.items()}


def _take_up(part: Part, columns: Mapping[str, NDArray[Any]], batches: int) -> int:
    """Fill in what an earlier pass has kept; how many batches that are, 0 where it does not fit."""
    done, kept = part.load()
    form = {name: (values.shape, values.dtype) for name, values in columns.items()}
    if {name: (values.shape, values.dtype) for name, values in kept.items()} != form or not 0 < done <= batches:
        return 0
    for name, values in columns.items():
        values[:] = kept[name]
    return done
