"""The table of scores: any number of voters over splits of a corpus, each computed once and kept in the cache."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import Timeout
from numpy.typing import NDArray

from memlm.corpus.blocks import Blocks, Corpus
from memlm.errors import ArtifactError
from memlm.files import cache_dir, digest, file_error, load_array
from memlm.manifest import PLAN, is_finished, payload_file, read_manifest
from memlm.memory.loading import load_memory, read_head, read_settings
from memlm.memory.retrieval import RetrievalSettings
from memlm.memory.voter import Voter
from memlm.mix.base import BaseVoter
from memlm.models.identity import model_identity
from memlm.models.loading import default_device, dtype_name, load_causal_lm, parse_dtype
from memlm.parts import KEEP_SECONDS, Due, Part, noting
from memlm.progress import progress_bar
from memlm.scores.score import COLUMNS, Scores, score
from memlm.stage import Stage, StageSpec, lock_file, run_stage
from memlm.targets.config import RetrievalConfig

BASE = "base"
SCORED_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class ScoreTable:
    """One split of a corpus, a row per position in order."""

    voters: dict[str, Scores]
    """By name; the base is `base`."""
    document: NDArray[np.int64]
    """Number of the document in its split."""
    label_count: NDArray[np.int64]
    """How often the label occurs in the training split."""


@dataclass(frozen=True)
class Text:
    """A split that is scored."""

    corpus: str
    """Hash of its corpus."""
    split: str
    blocks: Blocks
    tokenizer: str | None
    """Its fingerprint."""
    source: str
    """Folder that the text is read from."""


@dataclass(frozen=True)
class Scorers:
    """A base and memories that score texts; each is loaded when something it has not scored is asked for."""

    base: str
    """Path, hub id or packaged name."""
    memories: Mapping[str, str]
    """Name to path, hub id or packaged name; their settings (temperature, context) apply, and those with a tap read the
    base."""
    _: KW_ONLY
    vocab_size: int
    """Ids of the tokenizer are below it."""
    dtype: torch.dtype
    """Precision of all."""
    batch_tokens: int
    """Tokens in one forward pass."""
    retrieval: RetrievalConfig | None = None
    """Neighbours and temperature of datastores; as they say if None."""
    load_base: Callable[[], Any] | None = None
    """Gives the base, where the caller has it; None: it is loaded."""
    keep_seconds: float = KEEP_SECONDS
    """What a pass has scored is kept so often."""

    def score(self, text: Text) -> dict[str, Scores]:
        """What base and memories think of each label of `text`: read back where known, else computed in one pass.

        Where another process computes some of them it is waited for.

        Raises:
            ModelError: A model gives NaN; nothing is kept of the pass.
        """
        specs = {name: self._spec(text, name) for name in (BASE, *self.memories)}
        folders = {n: cache_dir() / "scores" / digest([spec.config, spec.inputs])[:32] for n, spec in specs.items()}
        if unknown := {folder for folder in folders.values() if not is_finished(folder)}:
            with computing_alone(unknown):
                missing = {name: spec for name, spec in specs.items() if not is_finished(folders[name])}
                names = [folders[name].name for name in missing]  # in order, by which its columns are numbered
                part = Part(cache_dir() / "scores", digest(names)[:32], Due(self.keep_seconds))
                for name, scores in self._compute(text, missing, part).items():
                    run_stage(folders[name], specs[name], partial(_save, scores=scores))
                part.remove()
        for name, folder in folders.items():
            if (folder / PLAN).is_file():  # killed between its last two moves
                run_stage(folder, specs[name], lambda stage: {})
        return {name: read_scores(folder, int(text.blocks.position_starts[-1])) for name, folder in folders.items()}

    def _compute(self, text: Text, specs: Mapping[str, StageSpec], part: Part) -> dict[str, Scores]:
        """The scores of these voters, from one pass over `text`, or the rest of it; none where none are asked for."""
        if not specs:
            return {}
        voters = {name: self._voter(name) for name in specs}
        titles = {name: f"{name} {spec.sources['model']} ({spec.config['dtype']})" for name, spec in specs.items()}
        reads_base = BASE in voters or any(voter.tap is not None for voter in voters.values())
        positions = int(text.blocks.position_starts[-1])
        kept: list[str] = []
        with (
            noting(lambda: kept[-1] if kept else None),
            progress_bar(positions, f"scoring {text.split}: {', '.join(voters)}") as bar,
        ):
            found = score(
                {titles[name]: voter for name, voter in voters.items()},
                text.blocks,
                base=self._base_voter if reads_base else None,
                batch_tokens=self.batch_tokens,
                progress=bar.update,
                part=part,
                on_kept=lambda n: kept.append(f"the cache keeps the scores of {n:,} of {positions:,} labels"),
            )
        return {name: found[titles[name]] for name in voters}

    def _spec(self, text: Text, name: str) -> StageSpec:
        model = self.memories.get(name, self.base)
        config: dict[str, Any] = {
            "dtype": dtype_name(self.dtype),
            "as_memory": name != BASE,
            "batch_tokens": self.batch_tokens,
            "split": text.split,
            "columns": list(COLUMNS),
        }
        inputs = {"corpus": text.corpus, "model": model_identity(model)}
        settings = read_settings(model, retrieval=self.retrieval) if name != BASE else None
        if settings is not None and settings.tap is not None:
            inputs["base"] = model_identity(self.base)
        head = read_head(model, settings) if name != BASE else None
        if head is not None:
            config["confidence"] = head.digest
        if isinstance(settings, RetrievalSettings):
            config["retrieval"] = settings.retrieval.found
        sources = {"corpus": text.source, "model": model}
        return StageSpec("scores", config=config, inputs=inputs, tokenizer=text.tokenizer, sources=sources)

    @cached_property
    def _base_voter(self) -> BaseVoter:
        load = self.load_base or (lambda: load_causal_lm(self.base, dtype=self.dtype).to(default_device()))  # type: ignore[arg-type]
        return BaseVoter(load(), self.vocab_size, exact=False)

    def _voter(self, name: str) -> Voter:
        if name == BASE:
            return self._base_voter
        voter = load_memory(self.memories[name], base=self.base, retrieval=self.retrieval, dtype=self.dtype)
        voter.settings = voter.settings.model_copy(update={"vocab_size": self.vocab_size})
        if voter.tap is not None:
            voter.check_base(self._base_voter.model)
        return voter.to(default_device())


@contextmanager
def computing_alone(folders: Iterable[Path]) -> Iterator[None]:
    """Keeps others from computing the same scores, or waits until they are done; what they made is there then.

    These locks are none of the folders' own, which are held while those are written only.
    """
    with ExitStack() as held:
        for folder in sorted(folders):  # in one order, so that no two wait for each other
            try:
                locks = cache_dir() / "locks"
                locks.mkdir(parents=True, exist_ok=True)
                try:
                    lock = lock_file(locks / folder.name)
                except Timeout:
                    print("another run computes the same scores; waiting for them", file=sys.stderr)
                    lock = lock_file(locks / folder.name, blocking=True)
            except OSError as error:
                raise file_error(error, folder) from error
            held.callback(lock.release)
        yield


def _save(stage: Stage, scores: Scores) -> dict[str, Any]:
    for column in COLUMNS:
        stage.save_array(f"{column}.npy", getattr(scores, column))
    return {"positions": len(scores.label)}


def read_scores(folder: str | Path, positions: int) -> Scores:
    """The scores that a folder of the cache holds.

    Raises:
        ArtifactError: It is damaged, or of another number of positions, or holds NaN, as earlier versions kept it.
    """
    manifest = read_manifest(folder, "scores")
    columns = {
        column: load_array(payload_file(folder, manifest, f"{column}.npy"), dtype, (positions,))
        for column, dtype in COLUMNS.items()
    }
    if any(np.isnan(values).any() for values in columns.values()):
        raise ArtifactError(f"{folder} holds NaN of {manifest.sources.get('model')}; delete it, and mend that model")
    return Scores(**columns)


def score_corpus(
    corpus: Corpus,
    base: str,
    memories: Mapping[str, str],
    *,
    dtype: str = "auto",
    batch_tokens: int = 4096,
    retrieval: RetrievalConfig | None = None,
) -> dict[str, ScoreTable]:
    """Scores of base and memories on the validation and test split.

    Args:
        corpus: What to score.
        base, memories, batch_tokens, retrieval: As `Scorers` takes them.
        dtype: `float32`, `bfloat16`, `float16` or `auto`.

    Returns:
        Split name to table. A split without positions is left out.
    """
    scorers = Scorers(
        base,
        memories,
        vocab_size=corpus.vocab_size,
        dtype=parse_dtype(dtype, default_device()),
        batch_tokens=batch_tokens,
        retrieval=retrieval,
    )
    tables = {}
    counts = corpus.label_counts
    for name in SCORED_SPLITS:
        split = corpus.split(name)
        if not split.n_positions:
            continue
        text = Text(corpus.manifest.hash, name, split, corpus.manifest.tokenizer, str(corpus.folder))
        documents = split.documents_of(np.arange(split.n_positions))
        tables[name] = ScoreTable(scorers.score(text), documents, counts[split.labels()])
    return tables
