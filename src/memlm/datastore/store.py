"""A finished datastore: its corpus, keys, values and index."""

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memlm.artifacts import load_array, read_manifest
from memlm.corpus.blocks import Corpus
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.index import INDEXES, Index, Keys
from memlm.errors import ArtifactError
from memlm.models.loading import model_identity

CORPUS_PAYLOAD = "corpus"


def open_keys(folder: Path) -> Keys:
    """The keys in a datastore folder."""
    shards = [load_array(p, mapped=True) for p in sorted((folder / "keys").glob("*.npy"))]
    if not shards or any(s.ndim != 2 or s.dtype != np.float16 or s.shape[1] != shards[0].shape[1] for s in shards):
        raise ArtifactError(f"{folder}/keys holds no float16 shards of one width; rebuild the datastore")
    return Keys(shards)


class Datastore:
    """A datastore folder, opened."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            ArtifactError: The folder is no complete datastore.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, "datastore")
        self.config = DatastoreConfig.parse(self.manifest.config, "datastore.")
        self.corpus = Corpus(self.folder / CORPUS_PAYLOAD)
        if self.corpus.manifest.hash != self.manifest.inputs["corpus"]:
            raise ArtifactError(f"{folder} was made from another corpus than the one it holds; rebuild it")
        self.n_entries = int(self.manifest.facts["entries"])

    @property
    def teacher(self) -> str:
        """Where the teacher was found."""
        return self.manifest.sources["teacher"]

    def check_teacher(self) -> None:
        """Nothing, where the teacher can still be found and is the model that made the keys.

        Raises:
            ArtifactError: It is another model now.
            ModelError: It cannot be reached.
        """
        if model_identity(self.teacher) != self.manifest.inputs["teacher"]:
            raise ArtifactError(
                f"datastore {self.folder}: {self.teacher!r} is no longer the teacher that made it; rebuild it"
            )

    @cached_property
    def keys(self) -> Keys | None:
        """The kept keys; None where only codes were kept."""
        return open_keys(self.folder) if self.config.keep_keys else None

    @cached_property
    def values(self) -> NDArray[np.int32]:
        """`(N,)` the token that came next, per entry."""
        return load_array(self.folder / "values.npy", mapped=True)

    @cached_property
    def index(self) -> Index:
        settings = self.manifest.facts["index"]
        return INDEXES[settings["kind"]].load(self.folder, self.keys, settings)
