"""The scores artefact: what one model thinks of every label of a corpus's held-out splits, computed once."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memlm.artifacts import cache_dir, digest, open_stage
from memlm.corpus.blocks import Corpus
from memlm.memory.loading import load_memory
from memlm.mix.scoring import COLUMNS, as_voter, score
from memlm.models.loading import default_device, load_causal_lm, model_identity, parse_dtype
from memlm.progress import progress_bar

SCORED_SPLITS = ("validation", "test")


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
    corpus: Corpus, model: str, *, as_memory: bool, dtype: str, batch_tokens: int, out: str | Path | None = None
) -> dict[str, Scores]:
    """Scores of `model` on the validation and test split; read back where they were computed before.

    Args:
        corpus: What to score.
        model: Base or memory: path, hub id or packaged name.
        as_memory: Whether the folder's memory settings (temperature, context) apply.
        dtype: `float32`, `bfloat16`, `float16` or `auto`.
        batch_tokens: Tokens in one forward pass.
        out: Folder of the artefact; in the cache if None.

    Returns:
        Split name to scores. A split without positions is left out.
    """
    device = default_device()
    precision = parse_dtype(dtype, device)
    config = {"dtype": str(precision).removeprefix("torch."), "as_memory": as_memory, "batch_tokens": batch_tokens}
    inputs = {"corpus": corpus.manifest.hash, "model": model_identity(model)}
    folder = Path(out) if out is not None else cache_dir() / "scores" / digest([config, inputs])[:32]
    splits = {name: corpus.split(name) for name in SCORED_SPLITS}
    splits = {name: split for name, split in splits.items() if split.n_positions}
    sources = {"corpus": str(corpus.folder), "model": model}
    with open_stage(
        folder, "scores", config=config, inputs=inputs, tokenizer=corpus.manifest.tokenizer, sources=sources
    ) as stage:
        if not stage.finished:
            if as_memory:
                voter = load_memory(model, dtype=precision).to(device)
                voter.settings = voter.settings.model_copy(update={"vocab_size": corpus.vocab_size})
            else:
                voter = as_voter(load_causal_lm(model, dtype=precision).to(device), corpus.vocab_size)  # type: ignore[arg-type]
            counts = np.bincount(corpus.split("train").labels(), minlength=corpus.vocab_size)
            total = sum(split.n_positions for split in splits.values())
            with progress_bar(total, f"scoring {'memory' if as_memory else 'base'}") as bar:
                for name, split in splits.items():
                    found = score(voter, split, batch_tokens=batch_tokens, progress=bar.update)
                    columns = found | {
                        "document": split.documents_of(np.arange(split.n_positions)),
                        "label_count": counts[split.labels()],
                    }
                    for column, values in columns.items():
                        stage.save_array(f"{name}.{column}.npy", values)
            stage.finish({name: {"positions": split.n_positions} for name, split in splits.items()})
    names = (*COLUMNS, "document", "label_count")
    return {
        split: Scores(**{c: np.load(folder / f"{split}.{c}.npy", allow_pickle=False) for c in names})
        for split in splits
    }
