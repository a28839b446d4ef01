"""Whether held-out text is text that a memory was trained on, as far as its training text can be found."""

from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memlm.corpus.blocks import Corpus, Split
from memlm.errors import ArtifactError, InputError
from memlm.manifest import is_artifact, read_manifest
from memlm.models.loading import resolve

_Key = Callable[[NDArray[np.int32]], bytes]


def seen_documents(corpus: Corpus, memory: str, texts: Mapping[str, Split]) -> dict[str, list[str]] | None:
    """Names of the documents that the memory was trained on: of another corpus, all their text the same.

    Args:
        corpus: That is to be read.
        memory: A memory or datastore, or any model; a folder of memlm says what it was made from, and where that was.
        texts: Name of a split to it, or to its first documents.

    Returns:
        By split. None where no training text can be found: it was deleted, moved or damaged, a relative path led to it
        from another folder, or the memory comes from elsewhere.
    """
    folder = Path(resolve(memory))
    if not is_artifact(folder):
        return None
    found: dict[str, list[str]] = {name: [] for name in texts}
    wanted: dict[bool, dict[bytes, list[tuple[str, int]]]] = {}
    known = False
    for place in _training_text(folder):
        try:
            trained = Corpus(place)
            known = True
            if trained.manifest.hash == corpus.manifest.hash:
                continue  # its own splits were kept apart
            alike = trained.manifest.tokenizer == corpus.manifest.tokenizer
            if alike not in wanted:
                wanted[alike] = _by_key(texts, _key(corpus, alike))
            key = _key(trained, alike)
            for document in trained.split("train").documents():
                for name, number in wanted[alike].pop(key(document), ()):
                    found[name].append(corpus.document_names(name)[number])
        except ArtifactError:  # what is only looked up stops nobody
            continue
    return found if known else None


def check_unseen(corpus: Corpus, memories: Mapping[str, str], texts: Mapping[str, Split], otherwise: str) -> None:
    """Refuse held-out documents that a memory was trained on.

    Args:
        corpus: That is to be read.
        memories: Name to memory.
        texts: Name of a split to it, or to its first documents.
        otherwise: What can be done about it.

    Raises:
        InputError: There are some; the first are named.
    """
    for memory in memories.values():
        for name, found in (seen_documents(corpus, memory, texts) or {}).items():
            if found:
                first = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
                raise InputError(
                    f"{len(found):,} of {texts[name].n_documents:,} {name} documents of corpus {corpus.folder} are"
                    f" among those that memory {memory} was trained on ({first}): what it has read says little about"
                    f" it; {otherwise}"
                )


def _training_text(folder: Path) -> Iterator[Path]:
    """The corpora that it, and the memories before it, were made from, where they are still there."""
    manifest = read_manifest(folder, "memory", "datastore")
    sources: Mapping[str, Any] = manifest.sources
    places = [folder / "corpus"]  # a datastore's own copy
    places += [Path(sources[name]) for name in ("corpus", "data") if name in sources]
    if "datastore" in sources:
        places.append(Path(sources["datastore"]) / "corpus")
    targets = manifest.facts.get("corpus")
    from_targets = targets.get("hash") if isinstance(targets, dict) else None
    wanted = manifest.inputs.get("corpus") or from_targets or manifest.inputs.get("data")
    yield from [place for place in places if _is(place, "corpus", wanted)][:1]
    for before in ("init", "memory"):  # what it went on with, or was carried to another tokenizer from
        start = sources.get(before)
        if start and _is(Path(start), "memory", manifest.inputs.get(before, "").removeprefix("memlm:")):
            yield from _training_text(Path(start))


def _is(folder: Path, kind: Literal["corpus", "memory"], wanted: str | None) -> bool:
    try:
        return is_artifact(folder) and read_manifest(folder, kind).hash == wanted
    except (ArtifactError, OSError, ValueError):  # of others, too long, or no path at all
        return False


def _by_key(texts: Mapping[str, Split], key: _Key) -> dict[bytes, list[tuple[str, int]]]:
    """The documents of all texts by their keys; empty ones say nothing, and are left out."""
    found: dict[bytes, list[tuple[str, int]]] = {}
    for name, text in texts.items():
        for number, document in enumerate(text.documents()):
            if made := key(document):
                found.setdefault(made, []).append((name, number))
    return found


def _key(corpus: Corpus, alike: bool) -> _Key:
    """What tells documents of a corpus apart from those of another: their tokens but for those that enclose them, or,
    where tokenizers differ, their text."""
    tokenizer = corpus.tokenizer
    ids = (getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "cls", "sep"))
    ends = [id_ for id_ in ids if id_ is not None]

    def of_text(document: NDArray[np.int32]) -> bytes:
        text = str(tokenizer.decode(document, skip_special_tokens=True)).strip()
        return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() if text else b""

    def of_tokens(document: NDArray[np.int32]) -> bytes:
        own = np.flatnonzero(~np.isin(document, ends))
        return blake2b(document[own[0] : own[-1] + 1].tobytes(), digest_size=16).digest() if len(own) else b""

    return of_tokens if alike else of_text
