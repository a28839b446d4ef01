"""Live retrieval: a datastore as a memory, which is what kNN-LM is."""

import contextlib
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from memlm.corpus.blocks import IGNORE
from memlm.datastore.build import load_teacher
from memlm.datastore.store import Datastore
from memlm.errors import ArtifactError, ConfigError, ModelError
from memlm.manifest import VALIDATED, FoundLater
from memlm.memory.protocol import Memory, MemorySettings
from memlm.memory.reading import GivenActivations, WindowedReader
from memlm.models.heads import joined
from memlm.models.identity import is_what_is_stored, model_identity
from memlm.models.loading import longest_context
from memlm.models.taps import TapReader, tap_width
from memlm.targets.config import RetrievalConfig
from memlm.targets.votes import SparseProbs, retrieve, search_neighbors

_POSITIONS_AT_ONCE = 4096
_QUOTED_NEIGHBORS = 64
"""Nearest entries of which one that said the right token is taken."""


class RetrievalSettings(MemorySettings):
    """Which datastore a live retrieval memory searches, and how."""

    datastore: str
    """Its folder."""
    datastore_hash: str
    """Content hash of its manifest."""
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)
    """Neighbours and temperature."""

    def searched_by(self, config: RetrievalConfig | None) -> Self:
        """The same, but for what `config` sets."""
        given = {} if config is None else config.model_dump(include=config.model_fields_set)
        return self.model_copy(update={"retrieval": RetrievalConfig(**{**self.retrieval.model_dump(), **given})})


class Validated(FoundLater):
    """What validation text chose for a datastore, kept beside its manifest for mixtures to come."""

    file_name = VALIDATED
    cure = "delete it, the next evaluation writes it anew"

    mix_weight: float = Field(ge=0, le=1)
    """Its weight."""
    base: str
    """With which base."""
    retrieval: RetrievalConfig
    """How it was searched."""

    def settings(self, found: RetrievalSettings, asked: RetrievalConfig | None) -> RetrievalSettings:
        """A datastore's settings where nothing else is asked for; another search has no weight of its own."""
        found = found.model_copy(update={"retrieval": self.retrieval}).searched_by(asked)
        if found.retrieval.found != self.retrieval.found:
            return found
        return found.model_copy(update={"mix_weight": self.mix_weight, "validated_with": self.base})

    def keep(self, folder: str | Path) -> None:
        """Write it to a datastore's folder, if that may be written to."""
        with contextlib.suppress(OSError):
            self.save(folder)


def datastore_settings(folder: str | Path, config: RetrievalConfig | None = None) -> RetrievalSettings:
    """The settings of a memory that searches the datastore in `folder`.

    Raises:
        ArtifactError: The folder is no complete datastore.
    """
    store = Datastore(folder)
    return RetrievalSettings(
        kind=RetrievalMemory.kind,
        vocab_size=store.corpus.vocab_size,
        tokenizer=store.manifest.tokenizer,
        tap=store.facts.tap,
        datastore=str(Path(folder).resolve()),
        datastore_hash=store.manifest.hash,
        retrieval=config or RetrievalConfig(),
    )


class RetrievalMemory(Memory):
    """The distribution that targets are made of, at inference: neighbours of the hidden state vote for their tokens.

    It reads the base's activations where the base is the datastore's teacher, and otherwise runs the teacher itself,
    with a cache of its own.

    Source: kNN-LM (arXiv:1911.00172).
    """

    kind = "retrieval"
    can_quote = True
    settings_class = RetrievalSettings
    settings: RetrievalSettings

    def __init__(
        self,
        datastore: str | Path | RetrievalSettings,
        config: RetrievalConfig | None = None,
        *,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        """
        Args:
            datastore: Folder of the datastore stage, or the settings of an earlier memory.
            config: Neighbours, temperature and nprobe.
            teacher: Run beside the base; None: the base is the teacher, and its activations are read.

        Raises:
            ArtifactError: The datastore is gone, incomplete, or another than the settings name.
            ConfigError: nprobe is given and the index has none.
        """
        settings = datastore if isinstance(datastore, RetrievalSettings) else datastore_settings(datastore, config)
        search = settings.retrieval
        store = Datastore(settings.datastore, nprobe=search.nprobe, teacher=search.teacher)
        super().__init__(settings.model_copy(update={"tap": store.facts.tap if teacher is None else None}))
        self.store = store
        self._check_store()
        self.teacher = teacher
        if teacher is None:
            self.reader = GivenActivations(self.width, f"datastore {store.folder}")
        else:
            run = TapReader(teacher, store.facts.tap).read
            self.reader = WindowedReader(teacher, longest_context(teacher.config), run)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._check_store()

    def _check_store(self) -> None:
        if self.store.manifest.hash != self.settings.datastore_hash:
            raise ArtifactError(f"datastore {self.store.folder} is another than when this memory was saved")
        if self.settings.retrieval.nprobe is not None:
            _ = self.store.index  # which may have none

    @classmethod
    def load(cls, source: str, settings: RetrievalSettings, *, base: str | None = None, **kwargs: Any) -> Self:
        """
        Args:
            base: Reads this base's activations where it is the datastore's teacher; else the teacher is loaded.
            kwargs: Ignored, for the teacher must run as it ran for the keys.

        Raises:
            ArtifactError: The teacher is no longer the model that made the keys.
            ModelError: It cannot be reached.
        """
        store = Datastore(settings.datastore, teacher=settings.retrieval.teacher)
        if base is not None and model_identity(base) == store.manifest.inputs["teacher"]:
            return cls(settings).eval()
        store.check_teacher()
        teacher, _ = load_teacher(store.teacher, store.read_as)
        return cls(settings, teacher=teacher).eval()

    def save_weights(self, folder: Path) -> None:
        # nothing is written: the settings name the datastore, and that its teacher
        if self.teacher is not None and not is_what_is_stored(self.teacher, self.store.teacher):
            raise ConfigError(
                f"the teacher of datastore {self.store.folder} is not what {self.store.teacher} holds (it was edited):"
                " a memory of live retrieval names it, and would be loaded with another"
            )

    def check_base(self, base: PreTrainedModel) -> None:
        if self.tap is not None and (width := tap_width(base, self.tap)) != self.width:
            raise ModelError(
                f"datastore {self.store.folder} holds keys {self.width} wide, {self.tap} of this"
                f" {type(base).__name__} is {width} wide: its teacher was {self.store.teacher}"
            )

    @property
    def width(self) -> int:
        """Width of the keys."""
        return self.store.facts.key_width

    # --- inference ------------------------------------------------------------------------------------------------

    def votes(self, state: Float[Tensor, "B T D"], keep: slice | Tensor) -> SparseProbs:
        return self.retrieve(state[:, keep].flatten(0, 1)).below(self.vocab_size).to(state.device)

    def label_log_probs(self, state: Float[Tensor, "B T D"], labels: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        there = labels != IGNORE
        queries, wanted = state[there], labels[there].cpu()
        parts = []
        for start in range(0, len(queries), _POSITIONS_AT_ONCE):
            found = self.retrieve(queries[start : start + _POSITIONS_AT_ONCE])
            label = found.of(wanted[start : start + _POSITIONS_AT_ONCE]).log()
            parts.append({"label": label, **found.summary()})
        return joined(parts)

    def evidence(self, state: Float[Tensor, "B T D"], places: Any) -> Float[Tensor, "... D"]:
        return state[places]  # the queries: where they are, it is seen whether neighbours can be trusted

    def quote(self, states: Float[Tensor, "R D"], tokens: Int[Tensor, "R"], count: int) -> list[list[int]]:
        values, split = self.store.values, self.store.corpus.split("train")
        found: list[list[int]] = []
        for entries, token in zip(self.neighbors(states, _QUOTED_NEIGHBORS)[1], tokens.tolist(), strict=True):
            quoted: list[int] = []
            for entry in entries[(entries >= 0) & (values[entries] == token)]:
                after = np.arange(entry, min(entry + 1 + count, len(values)))
                documents = split.documents_of(after)
                quoted = values[after[documents == documents[0]][1:]].tolist()
                if quoted:
                    break
            found.append(quoted)
        return found

    # --- the search -----------------------------------------------------------------------------------------------

    def retrieve(
        self, queries: Float[Tensor, "P D"], own: NDArray[np.int64] | None = None, *, exclude_document: bool = False
    ) -> SparseProbs:
        """The neighbours' votes for each query.

        Args:
            queries: Activations of the teacher.
            own: `(P,)` entry ids of the queries, left out of their neighbours; None for text outside the datastore.
            exclude_document: Leave out all entries of the query's document as well.

        Raises:
            ArtifactError: The datastore was changed or deleted since it was opened.
            ModelError: An activation does not fit float16.
        """
        keys, config = self._as_keys(queries), self.settings.retrieval
        k, temperature = min(config.k, self.store.n_entries), config.target_temperature
        return retrieve(self.store, keys, own, k=k, target_temperature=temperature, exclude_document=exclude_document)

    def neighbors(self, queries: Float[Tensor, "P D"], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Squared L2 distances `(P, k)`, ascending, and entry ids `(P, k)`; errors as `retrieve`."""
        return search_neighbors(self.store, self._as_keys(queries), None, k=min(k, self.store.n_entries))

    def _as_keys(self, queries: Float[Tensor, "P D"]) -> NDArray[np.float32]:
        self.store.check_unchanged()
        keys = queries.half()  # as stored keys are
        if not torch.isfinite(keys).all():
            raise ModelError("an activation at the tap overflows float16 (or is NaN)")
        return keys.float().cpu().numpy()
