"""Memories from a folder or the hub, whatever their kind."""

import difflib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from memlm.errors import ArtifactError, ConfigError, ModelError
from memlm.files import read_json
from memlm.manifest import is_artifact, payload_file, read_manifest
from memlm.memory.confidence import GATE_FILE, ConfidenceHead
from memlm.memory.config import KINDS
from memlm.memory.protocol import SETTINGS_FILE, Memory, MemorySettings, check_finite
from memlm.memory.released import is_released_mlp
from memlm.memory.retrieval import RetrievalSettings, datastore_settings
from memlm.models.loading import find_file, load_config, resolve, where_from
from memlm.targets.config import RetrievalConfig

_KEYWORDS = {"dtype", "torch_dtype", "device_map", "base", "retrieval", "gguf_file", "trust_remote_code"}
_KEYWORDS |= {"revision", "subfolder", "cache_dir", "token", "local_files_only"}


def memory_class(kind: str) -> type[Memory]:
    """The class of a kind that `KINDS` lists."""
    module, name = KINDS[kind].memory.split(":")
    return getattr(import_module(module), name)


def load_memory(
    source: str | Path,
    *,
    base: str | None = None,
    retrieval: RetrievalConfig | None = None,
    with_head: bool = True,
    **kwargs: Any,
) -> Memory:
    """The memory at a path, hub id or packaged name; a plain causal LM serves as a Memory Decoder.

    Args:
        source: What `memlm train` wrote, a hub repository of one, a datastore (live retrieval), or any causal LM.
        base: The base it will stand beside; a live retrieval memory whose teacher is that base reads its activations.
        retrieval: How a datastore is searched, and where its teacher is; what is not set is as saved, or the default.
            Other kinds ignore it.
        with_head: Whether its confidence head is read, where one was fitted.
        kwargs: For loading the weights: `dtype`, `device_map`, `revision` …

    Raises:
        ModelError: It cannot be reached, has to be converted first, or has weights that are not finite.
        ConfigError: A keyword is misspelt, or the kind takes none of that name.
        ArtifactError: The folder is damaged, or of a kind that is no memory.
    """
    where = where_from(kwargs)
    settings = read_settings(source, retrieval=retrieval, **where)
    _check_keywords(kwargs, settings.kind if settings else "decoder")
    if settings is None and is_released_mlp(str(source), **where):
        raise ModelError(
            f"{source} is a released MLP Memory; convert it: memlm convert {source} --base BASE --out FOLDER"
        )
    kind = memory_class(settings.kind if settings else "decoder")
    memory = kind.load(resolve(str(source)), settings, base=base, **kwargs)
    check_finite(memory, f"memory {source}")
    if with_head:
        memory.confidence_head = read_head(source, settings, **where)
    return memory


def _check_keywords(kwargs: Mapping[str, Any], kind: str) -> None:
    """Raise a ConfigError for a keyword that is nearly one of ours, and for any other that only a decoder takes."""
    for name in kwargs.keys() - _KEYWORDS:
        near = difflib.get_close_matches(name, _KEYWORDS - {"torch_dtype"}, n=1, cutoff=0.85)
        if near:
            raise ConfigError(f"{name} is no setting for loading a memory; did you mean {near[0]}?")
        if kind != "decoder":
            raise ConfigError(f"{name}: a memory of kind {kind} is not loaded with it; leave it out")


def read_head(source: str | Path, settings: MemorySettings | None, **where: Any) -> ConfidenceHead | None:
    """The confidence head that was fitted for a memory; None where there is none, or for another search.

    Args:
        source: As `load_memory` takes it.
        settings: What its folder says beside its weights.
        where: As `where_from` gives it.

    Raises:
        ArtifactError: The file is damaged.
        ConfigError: It was fitted for another memory or tokenizer.
    """
    path = find_file(str(source), GATE_FILE, **where)
    if path is None or (head := ConfidenceHead.read(path.parent)) is None:
        return None
    other = is_artifact(path.parent) and head.memory != read_manifest(path.parent).hash
    if other or (settings is not None and settings.tokenizer != head.tokenizer):
        what = "memory" if other else "tokenizer"
        raise ConfigError(f"{path} was fitted for another {what}; delete it, or fit it with memlm gate")
    if isinstance(settings, RetrievalSettings) and head.search != settings.retrieval.found:
        return None  # as such a datastore has no weight of its own either
    return head


def read_settings(
    source: str | Path, *, retrieval: RetrievalConfig | None = None, **where: Any
) -> MemorySettings | None:
    """What `memory.json` or a datastore's manifest says; None for a causal LM, whose config is then readable.

    Args:
        source, retrieval: As `load_memory` takes them.
        where: As `where_from` gives it.

    Raises:
        ModelError: Nothing can be reached there.
        ArtifactError: The folder is damaged, of another kind, or its kind is unknown.
    """
    folder = Path(resolve(str(source)))
    manifest = read_manifest(folder, "memory", "datastore") if is_artifact(folder) else None
    if manifest is not None and manifest.kind == "datastore":
        return datastore_settings(folder).searched_by(retrieval)
    path = find_file(str(source), SETTINGS_FILE, **where)
    if path is None:
        load_config(str(source), **where)
        return None
    if manifest is not None:
        path = payload_file(folder, manifest, SETTINGS_FILE)
    values = read_json(path)
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ArtifactError(f"{path}: kind {str(kind)[:40]!r} is unknown to this memlm; known: {', '.join(KINDS)}")
    settings = memory_class(kind).settings_class.parse(values, f"{path.name}: ")
    return settings.searched_by(retrieval) if isinstance(settings, RetrievalSettings) else settings
