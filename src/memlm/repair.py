"""Repair: what is rotten in a finished folder goes, so that the command that made it makes that again, and no more."""

import os
from pathlib import Path, PurePosixPath

from memlm.errors import ArtifactError, OutputExistsError
from memlm.files import erase, is_half_written, write_json
from memlm.manifest import (
    MANIFEST,
    PLAN,
    PREVIOUS,
    UNHASHED,
    Manifest,
    is_finished,
    manifest_in,
    parse_manifest,
    payload_file,
)
from memlm.progress import progress_bar
from memlm.stage import locked


def repair_folder(folder: str | Path) -> list[str]:
    """What was found in `folder`, a line each, and what to do next; damaged files are removed.

    Every checksum is compared. Where a file is damaged or missing the folder becomes an unfinished one that remembers
    its manifest: the command that made it then makes the missing files, and gives it the manifest back. A folder inside
    another, as the corpus of a datastore, is repaired with the whole.

    Raises:
        ArtifactError: It is no finished folder.
        OutputExistsError: There are files of others in it, or another process works on it.
    """
    folder = Path(folder)
    if is_finished(folder.parent) and any(
        name.startswith(f"{folder.name}/") for name in parse_manifest(folder.parent).payload
    ):
        folder = folder.parent
    manifest = parse_manifest(folder)
    damaged = damaged_files(folder, manifest)
    if not damaged:
        return [f"{folder} is whole: its {len(manifest.payload)} files are what its manifest says"]
    if foreign := _foreign_files(folder, manifest):
        raise OutputExistsError(f"{folder / foreign[0]} is not of this folder; move it elsewhere before the repair")
    with locked(folder):
        write_json(folder / PLAN, manifest.identity)
        for name in damaged:
            _remove(folder, name)
        os.replace(folder / MANIFEST, folder / PREVIOUS)
    sources = ", ".join(f"{name} {place}" for name, place in sorted(manifest.sources.items()))
    return [
        *(f"{folder / name} is damaged or missing; it is made again by the command below" for name in damaged),
        f"now run the command that made {folder} again: {manifest.kind} of {sources}",
    ]


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of the payload files of `folder` that are missing or not what its manifest was made for."""
    damaged = []
    with progress_bar(manifest.bytes, f"checking {folder}", unit="B") as bar:
        for name, file in manifest.payload.items():
            try:
                payload_file(folder, manifest, name)
            except ArtifactError:
                damaged.append(name)
            bar.update(file.bytes)
    copied = f"corpus/{MANIFEST}"  # in no payload; what a datastore was made from tells what it must be
    if manifest.kind == "datastore" and not _has_hash(folder / copied, manifest.inputs.get("corpus")):
        damaged.append(copied)
    return damaged


def _has_hash(path: Path, expected: str | None) -> bool:
    try:
        return manifest_in(path).hash == expected
    except ArtifactError:
        return False


def _foreign_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of the files in `folder` that its manifest does not tell of."""
    paths = (path for path in folder.rglob("*") if not path.is_dir() and path.name not in UNHASHED)
    names = (path.relative_to(folder).as_posix() for path in paths if not is_half_written(path))
    return sorted(name for name in names if name not in manifest.payload)


def _remove(folder: Path, name: str) -> None:
    """Remove a payload file, or the link on the way to it."""
    parts = PurePosixPath(name).parts
    places = [folder.joinpath(*parts[: depth + 1]) for depth in range(len(parts))]
    erase(next((place for place in places if place.is_symlink()), folder / name))
