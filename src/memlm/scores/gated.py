"""What a gated mixture gives every label, and the weights it has there, from the table of scores."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.corpus.blocks import length_batches
from memlm.mix.gate import Gate, together
from memlm.mix.posterior import FixedShare
from memlm.scores.score import COLUMNS, Scores
from memlm.scores.table import BASE, ScoreTable

_AT_ONCE = 1 << 18  # positions of documents that are followed side by side


def gated_label_log_probs(table: ScoreTable, gate: Gate) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Label log-probs of the mixture `(P,)`, and each memory's weight at the place before the label `(P, M)`.

    A document is followed from its first token to its last, as one that is generated token by token.

    Args:
        table: Has the gate's memories by their names.
        gate: Its memories are in the order of the weights.
    """
    base = table.voters[BASE]
    memories = [table.voters[name] for name in gate.memories]
    told = torch.from_numpy(np.stack([m.label for m in memories], -1).astype(np.float64))
    of_base = torch.from_numpy(base.label.astype(np.float64))
    own = gate.own_weights(of_base, lambda: [columns_of(scores) for scores in (base, *memories)])
    own = None if own is None else own.double()
    if gate.config.gate == "confidence":
        assert own is not None
        weights = together(own)
    else:
        weights = _followed(gate, table.document, of_base, told, own)
    if gate.sleep.tokens:
        weights = weights.masked_fill(_asleep(gate, table.document, weights.sum(-1))[:, None], 0.0)
    rest = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
    parts = torch.cat([of_base[:, None] + rest.log(), told + weights.log()], -1)
    return parts.logsumexp(-1).numpy(), weights.numpy()


def columns_of(scores: Scores) -> dict[str, Tensor]:
    """What a voter thinks, column by column, as tensors."""
    return {name: torch.from_numpy(getattr(scores, name)) for name in COLUMNS}


def side_by_side(document: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents of similar length, row by row: the number of each position, and False behind a document's end."""
    starts = np.flatnonzero(np.diff(document, prepend=-1))
    lengths = np.diff(np.append(starts, len(document)))
    for batch in length_batches(lengths, _AT_ONCE):
        place = np.arange(int(lengths[batch].max()))
        at = np.minimum(starts[batch, None] + place, len(document) - 1)
        yield torch.from_numpy(at), torch.from_numpy(place < lengths[batch, None])


def _followed(gate: Gate, document: NDArray[np.int64], base: Tensor, told: Tensor, own: Tensor | None) -> Tensor:
    """The posterior's weights at every position."""
    prior = gate.explanations.log_prior(gate.config.prior, base)
    log_probs = gate.explanations.log_probs(base, told, own)
    rule = FixedShare(prior, gate.config.switch)
    weights = torch.empty_like(told)
    for at, there in side_by_side(document):
        start = prior.expand(len(at), 1, -1)
        before = torch.cat([start, rule.along(start[:, 0], log_probs[at], there)[:, :-1]], 1)
        found = gate.explanations.weights(before, None if own is None else own[at])
        weights[at[there]] = found[there]
    return weights


def _asleep(gate: Gate, document: NDArray[np.int64], total: Tensor) -> Tensor:
    """Where the memories sleep, which weigh `total` together when they are awake."""
    asleep = torch.zeros(len(total), dtype=torch.bool)
    for at, there in side_by_side(document):
        asleep[at[there]] = gate.sleep.along(torch.zeros(len(at), dtype=torch.long), total[at], there)[0][there]
    return asleep
