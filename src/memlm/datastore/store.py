"""A finished datastore: its corpus, keys, values and index."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from memlm.corpus.blocks import Corpus, check_ids
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import INDEX_FILE, INDEXES, Index, Keys, keys_in_lists
from memlm.datastore.layout import IndexFacts
from memlm.errors import ArtifactError, MemlmError, ModelError
from memlm.files import load_array
from memlm.manifest import MANIFEST, Facts, Manifest, payload_file, read_manifest
from memlm.models.identity import model_identity

CORPUS_PAYLOAD = "corpus"
VALUES_FILE = "values.npy"


class DatastoreFacts(Facts):
    """What readers of a datastore rely on."""

    entries: int = Field(ge=1)
    key_width: int = Field(ge=1, le=1 << 20)
    tap: str
    teacher_dtype: str | None = None
    """What the teacher computed in, where `auto` was asked for too; None: that was not kept yet."""
    index: IndexFacts


class _Shard:
    """Keys of one shard on disk, whose checksum, if the folder has a manifest, is verified when they are first read."""

    def __init__(self, folder: Path, manifest: Manifest | None, name: str, width: int | None) -> None:
        self._folder, self._manifest, self._name = folder, manifest, name
        self._unverified = load_array(folder / name, np.float16, (None, width), mapped=True)
        self.shape = self._unverified.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[np.float16]:
        return self._rows[rows]

    @cached_property
    def _rows(self) -> NDArray[np.float16]:
        if self._manifest is not None:
            payload_file(self._folder, self._manifest, self._name)
        return self._unverified


def open_keys(folder: Path, manifest: Manifest | None = None) -> Keys:
    """The keys in a datastore folder.

    Args:
        folder: Of a datastore.
        manifest: Its manifest; None while it is being made.

    Raises:
        ArtifactError: There are none, they are not of one width, or one is damaged; that may show later, as it is read.
    """
    if manifest is None:
        names = [path.relative_to(folder).as_posix() for path in sorted((folder / "keys").glob("*.npy"))]
    else:
        names = sorted(name for name in manifest.payload if name.startswith("keys/"))
    if not names:
        raise ArtifactError(f"{folder} has no keys; rebuild it")
    shards: list[Any] = []
    for name in names:
        shards.append(_Shard(folder, manifest, name, shards[0].shape[1] if shards else None))
    return Keys(shards)


class Datastore:
    """A datastore folder, opened for reading: deep copies share it, a pickled one is opened again where it is read."""

    def __init__(self, folder: str | Path, *, nprobe: int | None = None, teacher: str | None = None) -> None:
        """
        Args:
            nprobe: Lists that a search looks through; what was tuned if None.
            teacher: Where its teacher is found by now; where it was if None.

        Raises:
            ArtifactError: The folder is no complete datastore, or its parts do not fit together.
        """
        self.folder, self.nprobe, self._teacher = Path(folder), nprobe, teacher
        self._opened = self._state_on_disk()
        self.manifest = read_manifest(folder, "datastore")
        self.facts = DatastoreFacts.of(folder, self.manifest)
        self.config = DatastoreConfig.parse(self.manifest.config, "datastore.")
        self.corpus = Corpus(self.folder / CORPUS_PAYLOAD)
        if self.corpus.manifest.hash != self.manifest.inputs.get("corpus"):
            raise ArtifactError(f"{folder} was made from another corpus than the one it holds; rebuild it")
        self.n_entries = self.facts.entries
        if (positions := self.corpus.facts.splits["train"].positions) != self.n_entries:
            raise ArtifactError(f"{folder} has {self.n_entries} entries, its corpus {positions} positions; rebuild it")
        if "teacher" not in self.manifest.inputs or "teacher" not in self.manifest.sources:
            raise ArtifactError(f"{folder} does not name its teacher; rebuild it")

    def __repr__(self) -> str:
        return f"Datastore({self.folder}: {self.n_entries:,} entries, {self.facts.index.kind}, teacher {self.teacher})"

    def __deepcopy__(self, memo: dict) -> "Datastore":
        return self

    def __reduce__(self) -> tuple:
        return partial(Datastore, self.folder, nprobe=self.nprobe, teacher=self._teacher), ()

    def check_unchanged(self) -> None:
        """Raise unless the folder is still the one that was opened.

        Raises:
            ArtifactError: It was changed or deleted.
        """
        if self._state_on_disk() != self._opened:
            raise ArtifactError(f"datastore {self.folder} was changed or deleted while in use; load it again")

    def _state_on_disk(self) -> tuple[int, int] | None:
        try:
            found = (self.folder / MANIFEST).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    @property
    def teacher(self) -> str:
        """Where the teacher is found."""
        return self._teacher or self.manifest.sources["teacher"]

    @property
    def read_as(self) -> DatastoreConfig:
        """Its settings, with the precision that the teacher computed in, which `auto` need not be on this machine."""
        return self.config.model_copy(update={"dtype": self.facts.teacher_dtype or self.config.dtype})

    def check_teacher(self) -> None:
        """Raise unless the teacher can still be found and is the model that made the keys.

        Raises:
            ArtifactError: It is another model now.
            ModelError: It cannot be reached.
        """
        cure = "give --teacher (teacher= in Python), where that model is now"
        try:
            found = model_identity(self.teacher)
        except MemlmError as error:
            raise ModelError(
                f"datastore {self.folder} asks for its teacher {self.teacher!r}: {error}; {cure}"
            ) from None
        if found != self.manifest.inputs["teacher"]:
            raise ArtifactError(
                f"datastore {self.folder}: {self.teacher!r} is not (or no longer) the teacher that made it; {cure},"
                " or rebuild it"
            )

    @cached_property
    def keys(self) -> Keys | None:
        """The kept keys; None where only codes were kept."""
        if not self.config.keep_keys:
            return None
        if INDEXES[self.facts.index.kind].holds_keys:
            path = payload_file(self.folder, self.manifest, INDEX_FILE)
            return keys_in_lists(path, self.facts.index, (self.n_entries, self.facts.key_width))
        keys = open_keys(self.folder, self.manifest)
        if keys.shape != (self.n_entries, self.facts.key_width):
            wanted = f"{self.n_entries} of width {self.facts.key_width}"
            raise ArtifactError(f"{self.folder} has {keys.shape[0]} keys of width {keys.shape[1]}, expected {wanted}")
        return keys

    @cached_property
    def values(self) -> NDArray[np.int32]:
        """`(N,)` the token that came next, per entry."""
        path = payload_file(self.folder, self.manifest, VALUES_FILE)
        values = load_array(path, np.int32, (self.n_entries,), mapped=True)
        check_ids(values, self.corpus.vocab_size, path)
        return values

    @cached_property
    def index(self) -> Index:
        kind, shape = self.facts.index.kind, (self.facts.entries, self.facts.key_width)
        path = None if kind == "exact" else payload_file(self.folder, self.manifest, INDEX_FILE)
        keys = None if INDEXES[kind].holds_keys else self.keys
        index = INDEXES[kind].load(path, keys, self.facts.index, shape)
        if self.nprobe is not None:
            index.set_nprobe(self.nprobe)
        return index
