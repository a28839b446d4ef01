"""Files that are written whole or not at all, and read only as far as what they say fits what they are.

Bytes are on disk before the name that stands for them, so what a kill or a power cut leaves under a name is whole.
A file may come from a stranger: no memory is taken for what its header claims, and nothing is unpickled.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memlm.errors import ArtifactError

_NESTING = 32  # of lists and objects in JSON
_NPY_HEADER = re.compile(rb"\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \((\d+,(?: \d+)?)\), \} *\n")
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EIO: "see whether the disk is full or failing",
    errno.EROFS: "make it writable",
    errno.EACCES: "give permission",
    errno.EPERM: "give permission",
    errno.ENOENT: "put it back",
    errno.ENOTDIR: "choose another place",
}


def digest(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """Where fetched models and scores are kept: `$MEMLM_HOME`, or `~/.cache/memlm`."""
    return Path(os.environ.get("MEMLM_HOME") or Path.home() / ".cache" / "memlm").expanduser()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it on success and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with written_whole(path):
            yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_half_written(path: Path) -> bool:
    """Whether a process was killed while it wrote this file."""
    ours = path.name.startswith(".") and path.name.endswith(".writing")
    return ours or path.name.startswith(".tmp")  # as safetensors calls them


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[None]:
    """An OSError instead of what libraries raise in the block when they cannot write `path`.

    numpy, faiss and torch tell how much they wrote, but not why it was not all.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(errno.EIO, f"it could not be written whole ({reason})", str(path)) from error


def flush_to_disk(path: Path) -> None:
    """Return when the bytes of a file would outlast a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_error(error: Exception, place: str | Path = "") -> ArtifactError:
    """What the file system refused to do, as one line with path and fix.

    Args:
        error: An OSError, or a library's own error in its stead.
        place: Where it happened, for an error that does not say.
    """
    where = getattr(error, "filename", None) or place
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    remedy = _REMEDIES.get(getattr(error, "errno", None) or 0, "see to the cause")
    return ArtifactError(f"{where}: {reason}; {remedy}, then the same command goes on where this one stopped")


def read_json(path: Path, *, limit: int = 1 << 20) -> Any:
    """The JSON in a small file.

    Args:
        path: A file that may be a stranger's.
        limit: Bytes at most.

    Raises:
        ArtifactError: It is too large, no JSON, nested too deeply, or names a key twice.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise ValueError(f"{size:,} bytes, {limit:,} at most")
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique_keys)
        _check_json(value, _NESTING)
    except RecursionError:
        raise ArtifactError(f"{path} cannot be read: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {str(error)[:200]}") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is there twice")
    return value


def _check_json(value: Any, levels: int) -> None:
    """Raise unless `value` has no more levels than these, and only texts that UTF-8 can hold."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict | list):
        if not levels:
            raise ValueError("nested too deeply")
        if isinstance(value, dict):
            for key in value:
                key.encode()
            value = value.values()
        for part in value:
            _check_json(part, levels - 1)


def load_array(
    path: Path, dtype: type[np.generic], shape: tuple[int | None, ...] = (None,), *, mapped: bool = False
) -> np.ndarray:
    """The array in a `.npy` file, whose header is held against what is expected and the file's size beforehand.

    Args:
        path: A file that `numpy.save` wrote; of a finished folder, what `payload_file` gave.
        dtype: The type it must have.
        shape: The shape it must have; None where any length will do.
        mapped: Leave it on disk.

    Raises:
        ArtifactError: The file is no such array.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(10)
            header = file.read(int.from_bytes(start[8:], "little"))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    match = _NPY_HEADER.fullmatch(header) if start[:8] == b"\x93NUMPY\x01\x00" else None
    if match is None:
        raise ArtifactError(f"{path} is no array; {repair_hint(path.parent)}")
    found = tuple(int(length) for length in match[2].decode().split(",") if length)
    wanted = np.dtype(dtype)
    if (
        match[1].decode() != wanted.str
        or len(found) != len(shape)
        or any(asked not in (None, there) for asked, there in zip(shape, found, strict=True))
    ):
        expected = " x ".join("any" if length is None else str(length) for length in shape)
        there = f"{match[1].decode()} of shape {' x '.join(map(str, found))}"
        raise ArtifactError(
            f"{path} holds {there[:80]}, expected {wanted.str} of shape {expected}; {repair_hint(path.parent)}"
        )
    offset = len(start) + len(header)
    if offset + math.prod(found) * wanted.itemsize != size:
        raise ArtifactError(
            f"{path} has {size} bytes, which its shape {found} does not fit; {repair_hint(path.parent)}"
        )
    if not math.prod(found):
        return np.empty(found, wanted)
    if mapped:
        return np.memmap(path, wanted, "r", offset, found)
    return np.fromfile(path, wanted, offset=offset).reshape(found)


def repair_hint(folder: Path) -> str:
    """What to do about a damaged file of `folder`, as the end of a message."""
    return f"run `memlm repair {folder}`, then the command that made it"
