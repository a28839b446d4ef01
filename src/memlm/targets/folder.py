"""A targets folder's files: a shard of rows with what the facts need of it, and what stands beside the shards."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memlm.corpus.blocks import Block, Corpus
from memlm.manifest import copy_payload
from memlm.stage import Stage
from memlm.targets.shards import TRAIN_SCHEMA, VALIDATION_FILE, VALIDATION_SCHEMA, read_statistics, write_rows
from memlm.targets.votes import SparseProbs


def shard_name(number: int) -> str:
    return f"train-{number:05d}.arrow"


def write_shard(
    stage: Stage, number: int, blocks: list[Block], votes: SparseProbs, teacher_nats: float | None = None
) -> None:
    """Write the blocks of one shard, with what the facts will need of it.

    Args:
        votes: The targets.
        teacher_nats: The teacher's cross-entropy of all labels together, where it has a share.
    """
    counts = votes.counts.numpy()
    first_of = np.cumsum(counts) - counts
    ids, probs = votes.ids.numpy().astype(np.int32), votes.probs.half().numpy()
    labels = np.concatenate([block.input_ids[block.predicted] for block in blocks])
    statistics = {
        "positions": len(counts),
        "support": int(counts.sum()),
        "lost_mass": float(votes.lost_mass.double().sum()),
        "top1": float(votes.probs[torch.from_numpy(first_of)].double().sum()),
        "label_likeliest": int((ids[first_of] == labels).sum()),
        "label_kept": int((ids == np.repeat(labels, counts)).sum()),
    }
    if teacher_nats is not None:
        statistics["teacher_nats"] = teacher_nats
    bounds = np.append(first_of, counts.sum())

    def rows() -> Iterator[dict[str, NDArray]]:
        position = 0
        for block in blocks:
            end = position + int(block.predicted.sum())
            per_token = np.zeros(len(block.input_ids), np.int32)
            per_token[block.predicted] = counts[position:end]
            here = slice(bounds[position], bounds[end])
            target = {"target_counts": per_token, "target_ids": ids[here], "target_probs": probs[here]}
            yield {"input_ids": block.input_ids, **target}
            position = end

    with stage.writing(shard_name(number)) as temporary:
        write_rows(temporary, TRAIN_SCHEMA, rows(), statistics)


def write_rest(
    stage: Stage,
    corpus: Corpus,
    n_shards: int,
    datastore_facts: dict[str, Any] | None = None,
    held_out: float | None = None,
) -> dict[str, Any]:
    """Write what stands beside the shards, and return the facts.

    Args:
        datastore_facts: Of the datastore, where there is one.
        held_out: The teachers' perplexity of validation text, where it was asked for.
    """
    validation = corpus.split("validation")
    blocks = (validation[i] for i in range(len(validation)))
    rows = ({"input_ids": block.input_ids, "labels": block.labels.astype(np.int32)} for block in blocks)
    with stage.writing(VALIDATION_FILE) as temporary:
        write_rows(temporary, VALIDATION_SCHEMA, rows)
    copy_payload(corpus.folder, corpus.manifest, stage.path, "tokenizer/")
    stats = [read_statistics(stage.path / shard_name(i)) for i in range(n_shards)]
    positions = sum(s["positions"] for s in stats)

    def mean(name: str, digits: int) -> float | None:
        """Over positions; None where an older version, which did not count it, wrote a shard."""
        return round(sum(s[name] for s in stats) / positions, digits) if all(name in s for s in stats) else None

    spoken = mean("teacher_nats", 8)
    foreseen = {"train": None if spoken is None else math.exp(spoken), "validation": held_out}
    told = {name: round(perplexity, 4) for name, perplexity in foreseen.items() if perplexity is not None}
    return {
        "positions": positions,
        "mean_support": mean("support", 3),
        "mean_lost_mass": mean("lost_mass", 6),
        "mean_top1": mean("top1", 4),
        "label_likeliest": mean("label_likeliest", 4),
        "label_kept": mean("label_kept", 4),
        "vocab_size": corpus.vocab_size,
        "corpus": {"hash": corpus.manifest.hash, **corpus.manifest.facts},
        "corpus_config": corpus.manifest.config,
        **({"datastore": datastore_facts} if datastore_facts is not None else {}),
        **({"teacher_perplexity": told} if told else {}),
    }
