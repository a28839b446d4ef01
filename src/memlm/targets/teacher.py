"""The teacher's own voice beside its neighbours': which temperature serves, what retrieval can win, mixed targets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from memlm.corpus.blocks import Split, length_batches
from memlm.datastore.store import Datastore
from memlm.errors import ModelError
from memlm.models.loading import device_of
from memlm.models.taps import by_row, capture
from memlm.targets.votes import SparseProbs, likeliest, search_neighbors

_CPU_LOGITS = 1 << 26  # that exist at a time: 256 MiB
_DEVICE_LOGITS = 1 << 29  # fewer leave an accelerator waiting for its next step
_SHARES = np.linspace(0.0, 1.0, 51)
_TEMPERATURES = 9  # each twice the one before


@dataclass(frozen=True)
class Heard:
    """What a teacher says at some positions of a split."""

    positions: NDArray[np.int64]
    keys: Tensor
    """`(P, D)` its activations at the tap."""
    log_probs: Float[Tensor, "P V"]
    """On the teacher's device, for they are too many to be carried away; the rest is on the CPU."""
    labels: Tensor
    """`(P,)` the tokens that came."""

    @property
    def of_labels(self) -> Float[Tensor, "P"]:
        """The labels' log-probabilities, on the CPU."""
        return self.log_probs.gather(1, self.labels[:, None].to(self.log_probs.device))[:, 0].cpu()

    @property
    def nats(self) -> float:
        """The cross-entropy of all labels together."""
        return float(-self.of_labels.double().sum())


@torch.inference_mode()
def hear(
    model: PreTrainedModel, tap: str | None, split: Split, blocks: NDArray[np.int64], vocab_size: int
) -> Iterator[Heard]:
    """Let the teacher read these blocks; positions come batch by batch, those of a block in order.

    Args:
        tap: Where its activations are read; None: nowhere, and keys have no width.
        vocab_size: Ids of the tokenizer are below it; output rows beyond are padding.

    Raises:
        ModelError: It gives scores that are no numbers.
    """
    device = device_of(model)
    logits_at_once = _CPU_LOGITS if device.type == "cpu" else _DEVICE_LOGITS
    for batch in length_batches(split.lengths[blocks], max(1, logits_at_once // vocab_size)):
        read = [split[int(blocks[i])] for i in batch]
        tokens = pad_sequence([torch.from_numpy(block.input_ids.astype(np.int64)) for block in read], batch_first=True)
        fed = tokens.to(device)
        with capture(model, [] if tap is None else [tap]) as found:
            logits = model(input_ids=fed, use_cache=False).logits
        keys = logits[..., :0] if tap is None else by_row(found, tap, fed)
        rows = np.repeat(np.arange(len(read)), [len(block.places) for block in read])
        places = np.concatenate([block.places for block in read])
        log_probs = logits[rows, places, :vocab_size].float().log_softmax(-1)
        if bool(log_probs.amax(-1).isnan().any()):
            raise ModelError(f"teacher {model.config.name_or_path} gives no finite scores")
        yield Heard(
            positions=np.concatenate([np.arange(block.positions.start, block.positions.stop) for block in read]),
            keys=keys[rows, places].float().cpu(),
            log_probs=log_probs,
            labels=tokens[rows, places + 1],
        )


# --- mixed targets ------------------------------------------------------------------------------------------------


def with_teacher(
    votes: SparseProbs | None,
    log_probs: Float[Tensor, "P V"],
    *,
    teacher_share: float,
    target_mass: float,
    max_support: int,
) -> SparseProbs:
    """`teacher_share * p_teacher + (1 - teacher_share) * p_neighbours`, of which the likeliest tokens are kept.

    It is computed where `log_probs` are.

    Args:
        votes: Of the neighbours; None where they have no share.
        log_probs: The teacher's.
        teacher_share: In [0, 1].
        target_mass: The smallest set of tokens that holds so much is kept.
        max_support: But so many at most.
    """
    mixed = teacher_share * log_probs.exp()
    if votes is not None:
        votes = votes.to(log_probs.device)
        mixed.index_put_((votes.owner, votes.ids.long()), (1 - teacher_share) * votes.probs, accumulate=True)
    probs, tokens = mixed.topk(min(max_support, mixed.shape[1]), dim=1)
    return likeliest(probs, tokens.int(), target_mass)


def mixed_targets(
    votes: SparseProbs | None,
    heard: Iterator[Heard],
    first: int,
    progress: Callable[[int], object] = lambda positions: None,
    **settings: Any,
) -> tuple[SparseProbs, float]:
    """Neighbours' votes with the teacher's own, position by position, and the teacher's cross-entropy of the labels.

    Args:
        votes: Of positions from `first` on; None where neighbours have no share.
        heard: All these positions, in any order.
        settings: Of `with_teacher`.

    Returns:
        The targets in the order of positions, and nats, of all labels together.
    """
    parts, places, nats = [], [], 0.0
    for part in heard:
        at = torch.from_numpy(part.positions - first)
        own = None if votes is None else votes.take(at)
        parts.append(with_teacher(own, part.log_probs, **settings).to(torch.device("cpu")))
        places.append(at)
        nats += part.nats
        progress(len(at))
    return SparseProbs.concatenate(parts).take(torch.cat(places).argsort()), nats


# --- the choice ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """How well neighbours and teacher together foresee text, by the temperature of the votes."""

    teacher: Float[Tensor, "P"]
    """The teacher's probabilities of the labels."""
    neighbours: dict[float, Float[Tensor, "P"]]
    """Temperature to the neighbours'."""

    def nats(self, temperature: float, share: float) -> float:
        """Mean cross-entropy where the neighbours have this share."""
        mixed = share * self.neighbours[temperature].double() + (1 - share) * self.teacher.double()
        return float(-mixed.clamp(min=1e-30).log().mean())

    def best_share(self, temperature: float) -> float:
        """The neighbours' best share."""
        return float(min(_SHARES, key=lambda share: self.nats(temperature, float(share))).round(4))

    def best(self) -> tuple[float, float]:
        """The temperature that is best with its best share, and that share."""
        shares = {temperature: self.best_share(temperature) for temperature in self.neighbours}
        temperature = min(shares, key=lambda t: self.nats(t, shares[t]))
        return temperature, shares[temperature]


def judge(
    store: Datastore,
    model: PreTrainedModel,
    split: str,
    *,
    k: int,
    positions: int,
    temperature: float | None = None,
    exclude_document: bool = False,
    seed: int = 0,
) -> Judged:
    """Let neighbours and teacher foresee some blocks of a split.

    Args:
        model: The datastore's teacher.
        split: Of its corpus; in `train` a position is no neighbour of its own.
        positions: Blocks are drawn until they have so many.
        temperature: The only one to judge; None: nine of them, by the spread of the distances.
        exclude_document: Neighbours of the same document are left out.
        seed: Draws the blocks.
    """
    text = store.corpus.split(split)
    blocks = draw_blocks(text, positions, seed)
    distances, hits, teacher = [], [], []
    for heard in hear(model, store.facts.tap, text, blocks, store.corpus.vocab_size):
        own = heard.positions if split == "train" else None
        queries = heard.keys.half().float().numpy()
        found, ids = search_neighbors(store, queries, own, k=k, exclude_document=exclude_document and own is not None)
        values = torch.from_numpy(np.where(ids >= 0, store.values[np.maximum(ids, 0)], -1))
        distances.append(torch.from_numpy(found))
        hits.append(values == heard.labels[:, None])
        teacher.append(heard.of_labels.exp())
    farther, hit = torch.cat(distances), torch.cat(hits)
    farther = farther - farther.amin(1, keepdim=True)
    grid = [temperature] if temperature is not None else _grid(farther)
    neighbours = {t: (torch.softmax(-farther / t, 1) * hit).sum(1) for t in grid}
    return Judged(torch.cat(teacher), neighbours)


def draw_blocks(text: Split, positions: int, seed: int = 0) -> NDArray[np.int64]:
    """Blocks of a split, drawn until they have so many positions, in the order of the text."""
    order = np.random.default_rng(seed).permutation(len(text))
    counts = np.diff(text.position_starts)[order].cumsum()
    return np.sort(order[: int(np.searchsorted(counts, positions)) + 1])


def _grid(farther: Float[Tensor, "P K"]) -> list[float]:
    """Temperatures from a 64th to four times the typical distance between nearest and farthest neighbour."""
    spread = float(farther.masked_fill(farther.isinf(), 0).amax(1).median())
    middle = 2.0 ** np.round(np.log2(max(spread, 1e-6)))
    return [float(middle * 2.0**power) for power in range(3 - _TEMPERATURES, 3)]
