"""Files that are written whole or not at all, and read only as far as what they say fits what they are.

Bytes are on disk before the name that stands for them, so what a kill or a power cut leaves under a name is whole.
A file may come from a stranger: no memory is taken for what its header claims, and nothing is unpickled.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.errors import ArtifactError, OutputExistsError

if TYPE_CHECKING:
    import numpy as np

_NESTING = 32  # of lists and objects in JSON
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?s:..)"  # version, length
    rb"\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \((\d+,(?: \d+)?)\), \} *\n"
)
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


def utf8(name: str) -> str:
    """A file's name as text: bytes of it that are no UTF-8 are escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def lasting_name(name: str) -> str:
    """The absolute path of a folder, so that it is found from everywhere; any other name as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def near_here(name: str, others: Iterable[str] = ()) -> str:
    """A hint that names what is there and nearly called so."""
    path = Path(name)
    beside = [str(path.with_name(p.name)) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), [*others, *beside], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def links_in(folder: Path) -> list[Path]:
    """The links in a folder, which reading and writing would follow."""
    return [path for path in sorted(folder.rglob("*")) if path.is_symlink()]


def check_no_links(folder: Path) -> None:
    """Raise where a folder that is to be written to holds a link, which writing would follow.

    Raises:
        OutputExistsError: It does.
    """
    if links := links_in(folder):
        raise OutputExistsError(f"{links[0]} is a link, which would be followed; delete it or choose another folder")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it on success and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")  # another process may write it too
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


def out_of_memory(error: BaseException, place: str | Path = "") -> ArtifactError | None:
    """One line for an error that says that memory ran out; None for any other.

    Args:
        error: What numpy, pyarrow or torch raised.
        place: The folder that was being made, if one was.
    """
    reason = str(error).partition("\n")[0][:200]
    told = ("allocate memory", "out of memory", "bad_alloc")
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and any(t in reason for t in told)):
        return None
    where, because = f"{place}: " if place else "", f" ({reason})" if reason else ""
    return ArtifactError(
        f"{where}memory ran out{because}; lower what is done at a time (such as --batch-tokens, --batch-size or --k) or"
        " free some, then run the same command again"
    )


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
        _check_nesting(value, _NESTING)
        json.dumps(value, ensure_ascii=False).encode()  # an escape may stand for what UTF-8 cannot hold
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


def _check_nesting(value: Any, levels: int) -> None:
    if isinstance(value, dict | list):
        if not levels:
            raise ValueError("nested too deeply")
        for part in value.values() if isinstance(value, dict) else value:
            _check_nesting(part, levels - 1)


def load_array(
    path: Path, dtype: "type[np.generic]", shape: tuple[int | None, ...] = (None,), *, mapped: bool = False
) -> "np.ndarray":
    """The array in a `.npy` file, whose header is held against what is expected and the file's size beforehand.

    Args:
        path: A file that `numpy.save` wrote; of a finished folder, what `payload_file` gave.
        dtype: The type it must have.
        shape: The shape it must have; None where any length will do.
        mapped: Leave it on disk.

    Raises:
        ArtifactError: The file is no such array.
    """
    import numpy as np  # here, for settings and with them the command line's help import this module

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(10)
            header += file.read(int.from_bytes(header[8:], "little"))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    match = _NPY_HEADER.fullmatch(header)
    if match is None:
        raise damaged(path, "is no array")
    wanted, kind = np.dtype(dtype), match[1].decode()
    found = tuple(int(length) for length in match[2].decode().split(",") if length)
    fits = len(found) == len(shape) and all(a in (None, b) for a, b in zip(shape, found, strict=True))
    if kind != wanted.str or not fits:
        expected = " x ".join("any" if length is None else str(length) for length in shape)
        there = f"{kind} of shape {' x '.join(map(str, found))}"
        raise damaged(path, f"holds {there[:80]}, expected {wanted.str} of shape {expected}")
    if len(header) + math.prod(found) * wanted.itemsize != size:
        raise damaged(path, f"has {size} bytes, which its shape {found} does not fit")
    if mapped and math.prod(found):
        return np.memmap(path, wanted, "r", len(header), found)
    return np.fromfile(path, wanted, offset=len(header)).reshape(found)


def damaged(path: Path, problem: str, folder: Path | None = None) -> ArtifactError:
    """What is wrong with a file, and how to get it back; `folder` has its manifest, by default where it lies."""
    return ArtifactError(f"{path} {problem}; run `memlm repair {folder or path.parent}`, then the command that made it")


def erase(path: Path) -> None:
    """Remove a file or folder, if it is there; of a link, never what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
