"""Mistakes that can be told before anything heavy is imported. The stages look again, and closer."""

import os
from collections.abc import Iterable
from pathlib import Path

from memlm.errors import InputError, ModelError, OutputExistsError
from memlm.files import near_here
from memlm.manifest import read_manifest


def check_folder(place: str | Path, *kinds: str) -> None:
    """Raise unless `place` is a finished folder of one of these kinds.

    Raises:
        ArtifactError: It is not.
    """
    read_manifest(place, *kinds)  # type: ignore[arg-type]


def check_documents(places: Iterable[str]) -> None:
    """Raise where a document can only be a file or folder, and is none.

    Raises:
        InputError: So it is.
    """
    from memlm.corpus.readers import text_format

    for place in places:
        if not Path(place).exists() and (text_format(Path(place)) is not None or _is_path(place)):
            raise InputError(f"{place} does not exist{near_here(place)}")


def check_models(*names: str | None) -> None:
    """Raise where a model, tokenizer or memory can only be a folder, and is none; what may be a hub id passes.

    Raises:
        ModelError: So it is.
    """
    from memlm.models.fetching import PACKAGED

    for name in names:
        if name is not None and not Path(name).exists() and _is_path(name):
            raise ModelError(f"{name} does not exist{near_here(name, PACKAGED)}")


def check_file_to_write(place: Path | None) -> None:
    """Raise unless a file can be written there, before the work whose result it is to hold.

    Raises:
        OutputExistsError: It is a folder, or stands in none that can be made or written.
    """
    if place is None:
        return
    if not place.name or place.is_dir():
        raise OutputExistsError(f"{place} is a folder; name a file")
    above = next(path for path in Path(os.path.abspath(place)).parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK) or str(above).startswith("/proc"):
        raise OutputExistsError(f"{place} cannot be written: {above} is no folder that one may write to")


def _is_path(name: str) -> bool:
    """Whether no hub id looks like this."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
