"""Who speaks of a position: a teacher, or teachers of folds, each of the documents that it has not read."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from memlm.corpus.blocks import Corpus
from memlm.errors import ArtifactError, ConfigError, InputError
from memlm.files import lasting_name
from memlm.manifest import read_manifest
from memlm.models.abilities import check_causal
from memlm.models.identity import model_identity
from memlm.models.loading import load_on_default_device
from memlm.targets.teacher import Heard, draw_blocks, hear


def check_folds(corpus: Corpus, corpus_hash: str, teachers: Sequence[str | Path]) -> dict[str, Path]:
    """Name of an input to the teacher that left this fold out, in the order of the folds.

    Args:
        corpus: Whose documents they are to speak of.
        corpus_hash: Of its manifest.
        teachers: Folders of models that were trained with `left_out`, in any order.

    Raises:
        ArtifactError: One was trained on another corpus.
        ConfigError: One has read all documents, or a fold has none, or several.
        InputError: Documents cross blocks, so that a teacher would have read some of what it is to speak of.
    """
    found, given = {}, []
    for place in teachers:
        made = read_manifest(place, "memory")
        if made.inputs.get("data") != corpus_hash:
            before = made.inputs.get("data") == corpus.manifest.inputs.get("corpus")
            more = ", but on the one before teachers wrote: of that --teacher speaks, give one too" if before else ""
            raise ArtifactError(f"{place} was not trained on corpus {corpus.folder}{more}")
        if (left_out := made.config.get("left_out")) is None:
            raise ConfigError(f"{place} has read all documents: a teacher of a fold is trained with --left-out")
        found[str(left_out)] = Path(place)
        given.append(str(left_out))
    count = next((int(name.partition("/")[2]) for name in found), 0)
    wanted = [f"{number}/{count}" for number in range(1, count + 1)]
    if sorted(given) != sorted(wanted):
        raise ConfigError(f"teachers of folds left out {', '.join(sorted(given))}; {', '.join(wanted)} are needed")
    if found and corpus.config.cross_documents:
        raise InputError(
            f"blocks of {corpus.folder} cross documents: some would be of several folds; build another corpus"
        )
    return {f"fold-{number}": found[name] for number, name in enumerate(wanted, 1)}


@dataclass(frozen=True)
class Named:
    """Who speaks of a corpus, as a stage's plan has it: a teacher, teachers of folds, or both."""

    places: list[str]
    """Where they are, those of folds first, in the order of the folds."""
    inputs: dict[str, str]
    """Name to content hash."""
    sources: dict[str, str]
    """Name to place."""

    @property
    def folds(self) -> int:
        """How many speak of a fold each; 0 where one speaks of all."""
        return len(self.places) - ("teacher" in self.inputs)


def named_speakers(corpus: Corpus, teacher: str | None, fold_teachers: Sequence[str | Path]) -> Named:
    """The teacher, or the teachers of folds; with both, those of folds have read the corpus that others wrote for.

    Raises:
        ConfigError, ArtifactError, InputError: As `check_folds`.
        TokenizerMismatchError: The teacher has another tokenizer than the corpus.
    """
    named = Named([], {}, {})
    if fold_teachers:
        read = corpus.manifest.hash if teacher is None else corpus.manifest.inputs["corpus"]
        for name, place in check_folds(corpus, read, fold_teachers).items():
            named.places.append(str(place))
            named.inputs[name], named.sources[name] = read_manifest(place).hash, str(place)
    if teacher is not None:
        corpus.check_read_by(teacher)
        named.places.append(teacher)
        named.inputs["teacher"], named.sources["teacher"] = model_identity(teacher), lasting_name(teacher)
    return named


class Speakers:
    """Teachers that speak of a corpus: one for each fold, of that fold alone, and one of all that is left."""

    def __init__(self, corpus: Corpus, models: Sequence[Callable[[], PreTrainedModel]], folds: int) -> None:
        """
        Args:
            corpus: What they speak of.
            models: Load them, those of folds first; each is loaded once, when it is first asked.
            folds: How many of them are of folds. One more speaks of what was written, or, with none, of all.
        """
        self._corpus, self._models = corpus, [cache(load) for load in models]
        self._asked = cache(lambda: _dealt(corpus, folds, len(models)))

    def hear(self, blocks: NDArray[np.int64]) -> Iterator[Heard]:
        """What is said of these training blocks, by whom it is asked of."""
        split, vocab_size = self._corpus.split("train"), self._corpus.vocab_size
        asked = self._asked()[split.documents_of(split.position_starts[blocks])]
        parts = ((load, blocks[asked == number]) for number, load in enumerate(self._models))
        return chain.from_iterable(hear(load(), None, split, part, vocab_size) for load, part in parts if len(part))

    def perplexity(self, positions: int) -> float | None:
        """Of about so many positions of the validation split, of all teachers together; None where there are none."""
        split = self._corpus.split("validation")
        if not split.n_positions:
            return None
        blocks, nats, count = draw_blocks(split, positions), 0.0, 0
        for load in self._models:
            for heard in hear(load(), None, split, blocks, self._corpus.vocab_size):
                nats, count = nats + heard.nats, count + len(heard.positions)
        return math.exp(nats / count)


def _dealt(corpus: Corpus, folds: int, models: int) -> NDArray[np.int64]:
    """`(D,)` who is asked of each training document."""
    split = corpus.split("train")
    if not folds:
        return np.zeros(split.n_documents, np.int64)
    read = split.n_documents - (corpus.n_written if models > folds else 0)
    own = split.only(np.arange(split.n_documents) < read).folds(folds)
    return np.concatenate([own, np.full(split.n_documents - read, folds)])


def load_speaker(teacher: str | Path, dtype: str) -> PreTrainedModel:
    """A teacher where this machine computes, in a precision that `parse_dtype` takes."""
    model = load_on_default_device(teacher, dtype)
    check_causal(model)
    return model


def loaders(teachers: Sequence[str | Path], dtype: str) -> list[Callable[[], PreTrainedModel]]:
    """How each is loaded."""
    return [partial(load_speaker, teacher, dtype) for teacher in teachers]
