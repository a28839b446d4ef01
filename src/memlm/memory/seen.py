"""Whether held-out text is text that a memory was trained on, as far as its training text can be found."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from memlm.corpus.blocks import Corpus
from memlm.errors import ArtifactError, InputError
from memlm.manifest import is_artifact, read_manifest
from memlm.models.loading import resolve


def seen_documents(corpus: Corpus, memory: str, split: str) -> list[str] | None:
    """Names of the documents of a split that the memory was trained on, all their tokens the same.

    Args:
        corpus: That is to be read.
        memory: A memory or datastore, or any model; a folder of memlm says what it was made from, and where that was.
        split: Of the corpus.

    Returns:
        None where the training text cannot be found: it was deleted or moved, or the memory comes from elsewhere.
    """
    folder = Path(resolve(memory))
    if not is_artifact(folder):
        return None
    read = [Corpus(place) for place in _training_text(folder)]
    if not read:
        return None
    special = set(corpus.tokenizer.all_special_ids)
    others = [one for one in read if one.manifest.hash != corpus.manifest.hash]  # its own splits were kept apart
    known = {_key(document, special) for one in others for document in one.split("train").documents()}
    documents = zip(corpus.document_names(split), corpus.split(split).documents(), strict=True)
    return [name for name, tokens in documents if _key(tokens, special) in known] if known else []


def check_unseen(corpus: Corpus, memories: Mapping[str, str], splits: tuple[str, ...], otherwise: str = "") -> None:
    """Refuse held-out documents that a memory was trained on.

    Args:
        corpus: That is to be read.
        memories: Name to memory.
        splits: Of the corpus.
        otherwise: What can be done about it.

    Raises:
        InputError: There are some; the first are named.
    """
    for memory in memories.values():
        for split in splits:
            if found := seen_documents(corpus, memory, split):
                first = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
                raise InputError(
                    f"{len(found):,} of {corpus.split(split).n_documents:,} {split} documents of corpus {corpus.folder}"
                    f" are among those that memory {memory} was trained on ({first}): what it has read says little"
                    f" about it{otherwise}"
                )


def _training_text(folder: Path) -> Iterator[Path]:
    """The corpora that it, and the memory that it went on with, were made from, where they are still there."""
    manifest = read_manifest(folder, "memory", "datastore")
    places = [folder / "corpus"]  # a datastore's own copy
    places += [Path(manifest.sources[name]) for name in ("corpus", "data") if name in manifest.sources]
    if "datastore" in manifest.sources:
        places.append(Path(manifest.sources["datastore"]) / "corpus")
    from_targets = (manifest.facts.get("corpus") or {}).get("hash")
    wanted = manifest.inputs.get("corpus") or from_targets or manifest.inputs.get("data")
    yield from [place for place in places if _is(place, "corpus", wanted)][:1]
    start = Path(manifest.sources.get("init", ""))
    if _is(start, "memory", manifest.inputs.get("init", "").removeprefix("memlm:")):
        yield from _training_text(start)


def _is(folder: Path, kind: Literal["corpus", "memory"], wanted: str | None) -> bool:
    try:
        return is_artifact(folder) and read_manifest(folder, kind).hash == wanted
    except ArtifactError:
        return False


def _key(document: NDArray[np.int32], special: set[int]) -> bytes:
    """The tokens of a document, without those that enclose it."""
    start, end = 0, len(document)
    while start < end and int(document[start]) in special:
        start += 1
    while end > start and int(document[end - 1]) in special:
        end -= 1
    return document[start:end].tobytes()
