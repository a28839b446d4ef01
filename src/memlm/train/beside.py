"""What the frozen base thinks of the training text, for a memory that is trained through the mixture with it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from memlm.corpus.blocks import length_batches
from memlm.datastore.build import shard_blocks
from memlm.errors import ModelError
from memlm.files import cache_dir, digest, load_array
from memlm.manifest import is_finished, payload_file, read_manifest
from memlm.mix.base import BaseVoter
from memlm.models.identity import model_identity
from memlm.models.loading import dtype_name
from memlm.progress import progress_bar
from memlm.scores.table import computing_alone
from memlm.stage import Stage, StageSpec, run_stage
from memlm.train.data import AroundRows, Rows, TrainingData, collate

_SHARD_POSITIONS = 65_536
_LOGITS = 1 << 26  # that exist at a time: 256 MiB
_LEAST = -60_000.0  # float16 holds it


class WithBase(AroundRows):
    """Rows with the base's log-probs of labels and of the targets' tokens."""

    def __init__(self, rows: Rows, folder: Path) -> None:
        """
        Args:
            rows: As the folder was made of.
            folder: From `base_on_rows`.
        """
        super().__init__(rows)
        shards, manifest = shard_blocks(rows.position_starts, _SHARD_POSITIONS), read_manifest(folder, "base-rows")

        def held(kind: str, dtype: type[np.floating]) -> list[NDArray[Any]]:
            paths = [payload_file(folder, manifest, _file(kind, i)) for i in range(len(shards))]
            return [load_array(path, dtype, (None,), mapped=True) for path in paths]

        self._ends = np.array([end for _, end in shards])
        self._labels, self._targets = held("labels", np.float32), held("targets", np.float16)

    def __getitem__(self, index: int) -> dict[str, NDArray]:
        shard = int(np.searchsorted(self._ends, index, "right"))
        first = int(self._ends[shard - 1]) if shard else 0

        def own(starts: NDArray[np.int64], values: NDArray[Any]) -> NDArray[Any]:
            return np.array(values[slice(*(starts[index : index + 2] - starts[first]))])

        row = self.rows[index] | {"base_labels": own(self.position_starts, self._labels[shard])}
        if "target_ids" in row:
            row["base_targets"] = own(self.support_starts, self._targets[shard])
        return row


def base_on_rows(
    data: TrainingData, base: str, *, dtype: torch.dtype, batch_tokens: int, load_base: Callable[[], PreTrainedModel]
) -> Path:
    """The folder in the cache that holds the base's log-probs of labels and targets, computed where they are not there.

    A stopped run goes on after the last 65,536 positions that it finished; another process that computes the same is
    waited for.

    Raises:
        ModelError: The base gives a label no finite log-prob.
    """
    spec = StageSpec(
        "base-rows",
        config={
            "dtype": dtype_name(dtype),
            "batch_tokens": batch_tokens,
            "targets": data.with_targets,
        },
        inputs={"data": data.manifest.hash, "base": model_identity(base)},
        tokenizer=data.manifest.tokenizer,
        sources={"data": str(data.folder), "base": base},
    )
    folder = cache_dir() / "base-rows" / digest([spec.config, spec.inputs])[:32]
    if not is_finished(folder):
        with computing_alone([folder]):
            run_stage(folder, spec, partial(_read, data=data, load_base=load_base, batch_tokens=batch_tokens))
    return folder


def finite(scores: NDArray[np.float32], base: str, split: str) -> NDArray[np.float32]:
    """The base's scores of a split, if they are finite.

    Raises:
        ModelError: They are not.
    """
    if bad := int(np.count_nonzero(~np.isfinite(scores))):
        raise ModelError(
            f"base {base} gives no finite score at {bad:,} of {len(scores):,} {split} positions; see to its weights,"
            " or try --dtype float32"
        )
    return scores


_KINDS = "labels", "targets"


def _file(kind: str, shard: int) -> str:
    return f"{kind}-{shard:05d}.npy"


def _read(
    stage: Stage, *, data: TrainingData, load_base: Callable[[], PreTrainedModel], batch_tokens: int
) -> dict[str, Any]:
    rows = data.train
    voter = BaseVoter(load_base(), data.vocab_size, exact=False)
    positions = int(rows.position_starts[-1])
    shards = shard_blocks(rows.position_starts, _SHARD_POSITIONS)
    to_do = [i for i in range(len(shards)) if not all(stage.has(_file(kind, i)) for kind in _KINDS)]
    starts = rows.position_starts[[[first, end] for first, end in shards]]
    done = positions - sum(int(np.diff(starts[i])[0]) for i in to_do)
    with progress_bar(positions, f"{stage.sources['base']} reads the training text", initial=done) as bar:
        for i in to_do:
            labels, targets = _read_shard(rows, voter, range(*shards[i]), batch_tokens, bar.update)
            found = finite(labels, stage.sources["base"], "training"), targets
            for kind, values in zip(_KINDS, found, strict=True):
                stage.save_array(_file(kind, i), values)
    return {"positions": positions}


@torch.inference_mode()
def _read_shard(
    rows: Rows, voter: BaseVoter, numbers: range, batch_tokens: int, progress: Callable[[int], object]
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Log-probs of labels and of targets' tokens, of these rows, in their order."""
    labels: dict[int, Tensor] = {}
    targets: dict[int, Tensor] = {}
    for batch in length_batches(rows.lengths[numbers], batch_tokens):
        members = [numbers[int(i)] for i in batch]
        held = collate([rows[number] for number in members])
        state = voter.step(held["input_ids"].to(voter.device))
        hidden = voter.hidden(state, (slice(None), slice(None))).flatten(0, 1)[held["places"].to(voter.device)]
        wanted = held["labels"].flatten()[held["places"] + 1]
        counts = held.get("target_counts", torch.zeros_like(wanted))
        ids = held.get("target_ids", torch.empty(0, dtype=torch.int32))
        of_labels, of_targets = _log_probs(voter, hidden, wanted, counts, ids)
        progress(len(wanted))
        for number, label, target in zip(
            members,
            of_labels.split(np.diff(rows.position_starts)[members].tolist()),
            of_targets.split(np.diff(rows.support_starts)[members].tolist()),
            strict=True,
        ):
            labels[number], targets[number] = label, target
    together = [torch.cat([found[number] for number in numbers]) for found in (labels, targets)]
    return together[0].numpy(), together[1].clamp(min=_LEAST).half().numpy()


def _log_probs(voter: BaseVoter, hidden: Tensor, labels: Tensor, counts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of labels `(P,)` and of the targets' tokens `(S,)` in float32 on the CPU."""
    at_once = max(1, _LOGITS // voter.vocab_size)
    of_labels, of_targets, edges = [], [], np.append(0, counts.cumsum(0).numpy())
    for start in range(0, len(hidden), at_once):
        log_probs = voter.head(hidden[start : start + at_once])[..., : voter.vocab_size].float().log_softmax(-1)
        here = slice(start, start + len(log_probs))
        of_labels.append(log_probs.gather(1, labels[here, None].to(log_probs.device))[:, 0].cpu())
        row = torch.arange(len(log_probs)).repeat_interleave(counts[here])
        own = ids[edges[start] : edges[start + len(log_probs)]].long()
        of_targets.append(log_probs[row.to(log_probs.device), own.to(log_probs.device)].cpu())
    nothing = torch.empty(0)
    return torch.cat([nothing, *of_labels]), torch.cat([nothing, *of_targets])
