"""A grown corpus against a datastore: which documents keep their keys, and which are new."""

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memlm.corpus.blocks import Corpus, Split
from memlm.datastore.config import DatastoreConfig, IndexKind
from memlm.datastore.index import Index, Keys
from memlm.datastore.store import Datastore
from memlm.errors import ArtifactError, ConfigError, InputError
from memlm.models.loading import default_device, parse_dtype

_CORPUS_SETTINGS = ("block_size", "step", "start_token", "end_token")  # they decide what stands before a position
_FIXED = ("tap", "dtype", "keep_keys")
_TRAINED = ("nlist", "code_bytes", "train_vectors", "seed")


class Extension:
    """What the datastore of a grown corpus takes over from the datastore of the smaller one.

    A training document whose tokens the old datastore holds keeps its keys. The others are new, and documents that are
    gone take their entries with them.
    """

    def __init__(self, folder: str | Path, corpus: Corpus) -> None:
        """
        Args:
            folder: The old datastore.
            corpus: Old and new documents together.

        Raises:
            ArtifactError: The datastore kept no keys, or its corpus was cut or tokenised otherwise.
            InputError: No training document is in both.
        """
        self.store = Datastore(folder)
        if self.store.keys is None:
            raise ArtifactError(f"{folder} kept no keys (keep_keys false), so none can be reused; leave out --extend")
        self._keys: Keys = self.store.keys
        _check_corpora(self.store, corpus)
        self._old, self._new = self.store.corpus.split("train"), corpus.split("train")
        self._source = same_documents(self._old, self._new)
        if (self._source < 0).all():
            raise InputError(
                f"corpus {corpus.folder} and datastore {folder} share no training document; --extend takes the whole"
                " grown corpus, old and new documents together"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """Documents and entries that were reused, read by the teacher, and dropped."""
        reused = self._source >= 0
        dropped = ~np.isin(np.arange(self._old.n_documents), self._source)
        parts = {"reused": (self._new, reused), "read": (self._new, ~reused), "dropped": (self._old, dropped)}
        return {
            name: {"documents": int(chosen.sum()), "entries": int((np.diff(split.offsets) - 1)[chosen].sum())}
            for name, (split, chosen) in parts.items()
        }

    def settings(self, config: DatastoreConfig) -> DatastoreConfig:
        """`config`, with the old datastore's settings where none were given.

        Raises:
            ConfigError: A setting that the old keys are made with is given otherwise.
        """
        given = config.model_dump(include=config.model_fields_set)
        there = self.store.config.model_dump()
        for name in _FIXED:
            if name in given and given[name] != there[name]:
                raise ConfigError(
                    f"{name} = {given[name]!r}, but datastore {self.store.folder} has keys made with {there[name]!r};"
                    f" leave out --{name.replace('_', '-')} or --extend"
                )
        read_in = self.store.facts.teacher_dtype
        if read_in is not None and parse_dtype(there["dtype"], default_device()) != parse_dtype(read_in):
            there["dtype"] = read_in  # auto is another precision on this machine
        return DatastoreConfig.parse({**there, **given})

    def check_teacher(self, teacher: str, identity: str) -> None:
        """Raise unless `identity` is that of the model that made the old keys.

        Raises:
            ArtifactError: It is another model's.
        """
        there = self.store.manifest.inputs["teacher"]
        if identity != there:
            raise ArtifactError(
                f"teacher {teacher!r} ({_short(identity)}) is not the model that made datastore {self.store.folder},"
                f" {self.store.teacher!r} ({_short(there)}); give that one, or leave out --extend"
            )

    def is_new(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of these blocks belongs to a new document."""
        return self._source[self._new.documents_of(self._new.position_starts[blocks])] < 0

    def complete(self, read: NDArray[np.float16] | None, start: int, stop: int) -> NDArray[np.float16]:
        """Keys of the positions `start` to `stop`: those of new documents from `read`, the others reused.

        Args:
            read: Keys of those positions that belong to new documents, in order; None if there are none.
        """
        old_ids = self._old_ids(start, stop)
        reused = old_ids >= 0
        keys = np.empty((stop - start, self._keys.shape[1]), np.float16)
        keys[reused] = self._keys.gather(old_ids[reused], np.float16)
        if read is not None:
            keys[~reused] = read
        return keys

    def fits_index(self, kind: IndexKind, config: DatastoreConfig) -> bool:
        """Whether the old index can grow into one of this kind and these settings, without training it again."""
        there = self.store.config
        same = all(getattr(config, name) == getattr(there, name) for name in _TRAINED)
        return same and self.store.facts.index.kind == kind

    def index(self, keys: Keys, config: DatastoreConfig) -> Index:
        """The old index over the new `keys`."""
        old_ids = self._old_ids(0, self._new.n_positions)
        new_ids = np.full(self.store.n_entries, -1)
        new_ids[old_ids[old_ids >= 0]] = np.flatnonzero(old_ids >= 0)
        index = self.store.index
        index.extend(keys, new_ids, config)
        return index

    def _old_ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """Which entry of the old datastore the positions `start` to `stop` were; -1 where they are new."""
        positions = np.arange(start, stop)
        documents = self._new.documents_of(positions)
        source = self._source[documents]
        within = positions - (self._new.offsets[documents] - documents)
        return np.where(source < 0, -1, self._old.offsets[source] - source + within)


def _check_corpora(store: Datastore, corpus: Corpus) -> None:
    if corpus.manifest.tokenizer != store.manifest.tokenizer:
        raise ArtifactError(
            f"corpus {corpus.folder} and datastore {store.folder} were made with different tokenizers"
            f" ({_short(str(corpus.manifest.tokenizer))} and {_short(str(store.manifest.tokenizer))});"
            " make the corpus with that of the datastore"
        )
    for owner, config in (
        (f"corpus {corpus.folder}", corpus.config),
        (f"datastore {store.folder}", store.corpus.config),
    ):
        if config.cross_documents:
            raise ArtifactError(
                f"{owner} has cross_documents set: its keys depend on neighbouring documents, so none can be reused;"
                " leave out --extend"
            )
    for name in _CORPUS_SETTINGS:
        here, there = getattr(corpus.config, name), getattr(store.corpus.config, name)
        if here != there:
            name = "stride" if name == "step" else name
            raise ArtifactError(
                f"corpus {corpus.folder} has {name} {here!r}, datastore {store.folder} {there!r}; make the corpus with"
                f" {name} {there!r}, or leave out --extend"
            )


def same_documents(old: Split, new: Split) -> NDArray[np.int64]:
    """`(documents of new,)` the document of `old` with the same tokens; -1 where there is none.

    Each document of `old` is found at most once, also if several texts have the same tokens: an entry keeps one id.
    """
    unused: dict[bytes, list[int]] = defaultdict(list)
    for number, tokens in enumerate(old.documents()):
        unused[_digest(tokens)].append(number)
    found = np.full(new.n_documents, -1)
    for number, tokens in enumerate(new.documents()):
        if candidates := unused.get(_digest(tokens)):
            found[number] = candidates.pop(0)
    return found


def _digest(tokens: NDArray[np.int32]) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _short(identity: str) -> str:
    return identity if len(identity) <= 24 else identity[:24] + "…"
