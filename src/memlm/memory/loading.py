"""Memories from a folder or the hub, whatever their kind."""

import json
from pathlib import Path
from typing import Any

from memlm.artifacts import is_artifact, read_manifest
from memlm.errors import ArtifactError, ModelError
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.protocol import SETTINGS_FILE, Memory, MemorySettings
from memlm.models.loading import load_config, resolve

KINDS: dict[str, type[MemoryDecoder]] = {"decoder": MemoryDecoder}


def load_memory(source: str | Path, **kwargs: Any) -> Memory:
    """The memory at a path, hub id or packaged name; a plain causal LM serves as a Memory Decoder.

    Args:
        source: What `memlm train` wrote, a hub repository of one, or any causal LM.
        kwargs: For loading the weights: `dtype`, `device_map`, `revision` …

    Raises:
        ModelError: It cannot be reached.
        ArtifactError: The folder is damaged, or of a kind that is no memory.
    """
    folder = resolve(str(source))
    settings = read_settings(folder, revision=kwargs.get("revision"))
    return KINDS[settings.kind if settings else "decoder"].load(folder, settings, **kwargs)


def read_settings(source: str | Path, *, revision: str | None = None) -> MemorySettings | None:
    """What `memory.json` says; None for a plain causal LM, whose config is then known to be readable.

    Raises:
        ModelError: Nothing can be reached there.
        ArtifactError: The folder is damaged, of another kind, or its kind is unknown.
    """
    folder = Path(resolve(str(source)))
    if not folder.is_dir():
        path = _from_hub(str(source), revision)
    else:
        if is_artifact(folder):
            read_manifest(folder, "memory")
        path = folder / SETTINGS_FILE
    if path is None or not path.is_file():
        load_config(str(source), revision=revision)
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from None
    settings = MemorySettings.parse(values, f"{path.name}: ")
    if settings.kind not in KINDS:
        raise ArtifactError(f"{path}: kind {settings.kind!r} is unknown to this memlm; known: {', '.join(KINDS)}")
    return settings


def _from_hub(source: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, SETTINGS_FILE, revision=revision))
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"memory {source!r} cannot be loaded; tried: no such folder; as a hub id: {reason}") from None
