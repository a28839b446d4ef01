"""The scores artefact: what one model thinks of every label of a corpus's held-out splits, computed once."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from memlm.corpus.blocks import Corpus
from memlm.files import cache_dir, digest, load_array
from memlm.manifest import payload_file
from memlm.memory.loading import load_memory, read_settings
from memlm.memory.protocol import Memory
from memlm.memory.retrieval import RetrievalSettings
from memlm.mix.scoring import COLUMNS, as_voter, live_activations, score
from memlm.models.loading import default_device, load_causal_lm, model_identity, parse_dtype
from memlm.progress import progress_bar
from memlm.stage import Stage, StageSpec, run_stage
from memlm.targets.config import RetrievalConfig

SCORED_SPLITS = ("validation", "test")
_COLUMNS = {**dict.fromkeys(COLUMNS, np.float32), "document": np.int64, "label_count": np.int64}


@dataclass(frozen=True)
class Scores:
    """Per position of a split, in order."""

    label: NDArray[np.float32]
    """Log-prob of the token that came, in nats."""
    entropy: NDArray[np.float32]
    """Of the distribution, in nats."""
    top1: NDArray[np.float32]
    """Probability of the likeliest token."""
    document: NDArray[np.int64]
    """Number of the document in its split."""
    label_count: NDArray[np.int64]
    """How often the label occurs in the training split."""


def score_corpus(
    corpus: Corpus,
    model: str,
    *,
    beside: str | None,
    dtype: str,
    batch_tokens: int,
    retrieval: RetrievalConfig | None = None,
    out: str | Path | None = None,
) -> dict[str, Scores]:
    """Scores of `model` on the validation and test split; read back where they were computed before.

    Args:
        corpus: What to score.
        model: Base or memory: path, hub id or packaged name.
        beside: The base, where `model` is a memory: its settings (temperature, context) then apply, and a memory with
            a tap reads that base. None: `model` is a base.
        dtype: `float32`, `bfloat16`, `float16` or `auto`.
        batch_tokens: Tokens in one forward pass.
        retrieval: Neighbours and temperature of a datastore; the defaults if None.
        out: Folder of the artefact; in the cache if None.

    Returns:
        Split name to scores. A split without positions is left out.
    """
    device = default_device()
    precision = parse_dtype(dtype, device)
    settings = read_settings(model) if beside is not None else None
    config: dict[str, Any] = {
        "dtype": str(precision).removeprefix("torch."),
        "as_memory": beside is not None,
        "batch_tokens": batch_tokens,
    }
    inputs = {"corpus": corpus.manifest.hash, "model": model_identity(model)}
    if settings is not None and settings.tap is not None:
        assert beside is not None
        inputs["base"] = model_identity(beside)
    if isinstance(settings, RetrievalSettings):
        config["retrieval"] = (retrieval or settings.retrieval).model_dump()
    folder = Path(out) if out is not None else cache_dir() / "scores" / digest([config, inputs])[:32]
    splits = {name: corpus.split(name) for name in SCORED_SPLITS}
    splits = {name: split for name, split in splits.items() if split.n_positions}
    sources = {"corpus": str(corpus.folder), "model": model}
    spec = StageSpec("scores", config=config, inputs=inputs, tokenizer=corpus.manifest.tokenizer, sources=sources)

    def work(stage: Stage) -> dict[str, Any]:
        voter, base = _load(model, beside, retrieval, precision, corpus.vocab_size)
        counts = np.bincount(corpus.split("train").labels(), minlength=corpus.vocab_size)
        total = sum(split.n_positions for split in splits.values())
        with contextlib.ExitStack() as open_now:
            bar = open_now.enter_context(progress_bar(total, f"scoring {'base' if beside is None else 'memory'}"))
            activations = None
            if base is not None and voter.tap is not None:
                activations = open_now.enter_context(live_activations(base, voter.tap))
            for name, split in splits.items():
                if all(stage.has(f"{name}.{column}.npy") for column in _COLUMNS):
                    bar.update(split.n_positions)
                    continue
                found = score(voter, split, activations=activations, batch_tokens=batch_tokens, progress=bar.update)
                columns = found | {
                    "document": split.documents_of(np.arange(split.n_positions)),
                    "label_count": counts[split.labels()],
                }
                for column, values in columns.items():
                    stage.save_array(f"{name}.{column}.npy", values)
        return {name: {"positions": split.n_positions} for name, split in splits.items()}

    manifest = run_stage(folder, spec, work)

    def read(split: str, column: str) -> NDArray:
        path = payload_file(folder, manifest, f"{split}.{column}.npy")
        return load_array(path, _COLUMNS[column], (splits[split].n_positions,))

    return {split: Scores(**{column: read(split, column) for column in _COLUMNS}) for split in splits}


def _load(
    model: str, beside: str | None, retrieval: RetrievalConfig | None, dtype: torch.dtype, vocab_size: int
) -> tuple[Memory, PreTrainedModel | None]:
    """What gives the scores, and the base that it reads, where it reads one."""
    device = default_device()
    if beside is None:
        return as_voter(load_causal_lm(model, dtype=dtype).to(device), vocab_size), None  # type: ignore[arg-type]
    voter = load_memory(model, base=beside, retrieval=retrieval, dtype=dtype).to(device)
    voter.settings = voter.settings.model_copy(update={"vocab_size": vocab_size})
    if voter.tap is None:
        return voter, None
    base: PreTrainedModel = load_causal_lm(beside, dtype=dtype).to(device)  # type: ignore[arg-type]
    voter.check_base(base)
    return voter, base
