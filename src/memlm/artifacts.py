"""Folders in which stages meet: a manifest says what is inside and from what; a folder appears when it is complete.

While a stage works it writes to `NAME.partial` beside its output, file by file, each under a temporary name first.
A second run with the same settings and inputs goes on at the first missing file. When all is there the manifest is
written and the folder renamed. Bytes are on disk before the name that stands for them, so what a kill or a power cut
leaves under a name is whole.

A folder may come from a stranger. What a manifest or an array's header says is held against the files before memory is
taken for it, and a file's checksum is verified before the file is read. Nothing is unpickled.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from memlm.config import first_problem
from memlm.errors import ArtifactError, OutputExistsError
from memlm.progress import progress_bar

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_PREVIOUS = "previous.json"  # the manifest of a folder under repair
_UNHASHED = {MANIFEST, _PREVIOUS, "run.json", "plan.json", "lock"}  # times, logs and what describes the rest
_MANIFEST_BYTES = 16 << 20  # a hundred thousand files; parsed JSON takes up to 25 times its bytes
_NESTING = 32  # of lists and objects in JSON
_NPY_HEADER = re.compile(rb"\{'descr': '([<|]\w\d)', 'fortran_order': False, 'shape': \((\d+,(?: \d+)?)\), \} *\n")
_LIBRARIES = ("memlm", "torch", "transformers", "faiss-cpu", "datasets", "pyarrow", "numpy", "tokenizers")

Kind = Literal["corpus", "datastore", "targets", "memory", "scores", "evaluation"]


class PayloadFile(BaseModel):
    """Size and checksum of one file of a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int = Field(ge=0, strict=True)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a folder is: made by which stage, with which settings, from which inputs, holding which files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    format_version: int
    config: dict[str, Any]
    """The stage's settings, without paths."""
    inputs: dict[str, str]
    """Name to content hash of everything that was read."""
    tokenizer: str | None
    """Fingerprint of the tokenizer that made the token ids."""
    facts: dict[str, Any]
    """What the stage found out: counts, shapes, recall, figures. Deterministic."""
    payload: dict[str, PayloadFile]
    sources: dict[str, str]
    """Where inputs were found, to find them again; not part of the hash."""
    versions: dict[str, str]
    """Libraries, Python, machine and thread count that wrote it; not part of the hash."""

    @property
    def hash(self) -> str:
        """What identifies the folder's content: equal for equal settings, inputs and payload bytes."""
        return digest(self.model_dump(mode="json", exclude={"sources", "versions"}))

    @property
    def identity(self) -> dict[str, Any]:
        """What decides whether a run is the same run: everything known before the work starts."""
        return {
            "kind": self.kind,
            "format_version": self.format_version,
            "config": self.config,
            "inputs": self.inputs,
            "tokenizer": self.tokenizer,
        }


class Facts(BaseModel):
    """Facts of a manifest that a reader relies on, with their types and ranges."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, protected_namespaces=())

    @classmethod
    def of(cls, folder: str | Path, manifest: Manifest) -> Self:
        """The facts in the manifest of `folder`, checked.

        Raises:
            ArtifactError: One is missing, of another type, or out of range.
        """
        try:
            return cls.model_validate(manifest.facts)
        except ValidationError as error:
            raise ArtifactError(f"{Path(folder) / MANIFEST}: facts.{first_problem(error)}") from None


def digest(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
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


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[None]:
    """Makes an OSError of what libraries raise in the block when they cannot write `path`.

    numpy, faiss and torch tell how much they wrote, but not why it was not all.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(errno.EIO, f"it could not be written whole ({reason})", str(path)) from error


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


def flush_to_disk(path: Path) -> None:
    """Return when the bytes of a file would outlast a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


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
    """Nothing, where `value` has no more levels than these, and only texts that UTF-8 can hold."""
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
        raise ArtifactError(f"{path} is no array; {_again(path.parent)}")
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
            f"{path} holds {there[:80]}, expected {wanted.str} of shape {expected}; {_again(path.parent)}"
        )
    offset = len(start) + len(header)
    if offset + math.prod(found) * wanted.itemsize != size:
        raise ArtifactError(f"{path} has {size} bytes, which its shape {found} does not fit; {_again(path.parent)}")
    if not math.prod(found):
        return np.empty(found, wanted)
    if mapped:
        return np.memmap(path, wanted, "r", offset, found)
    return np.fromfile(path, wanted, offset=offset).reshape(found)


def _again(folder: Path) -> str:
    return f"run the command that made {folder} again with --repair"


def _is_half_written(path: Path) -> bool:
    ours = path.name.startswith(".") and path.name.endswith(".writing")
    return ours or path.name.startswith(".tmp")  # as safetensors calls them


def is_artifact(folder: str | Path) -> bool:
    """Whether `folder` holds a manifest."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: str | Path, *kinds: Kind) -> Manifest:
    """The manifest of `folder`, with its files' presence, kinds and sizes checked; `payload_file` looks at their bytes.

    Args:
        folder: What a stage wrote.
        kinds: The kinds that will do; none means any.

    Raises:
        ArtifactError: No such folder, no manifest, another kind or version, a file is missing or truncated, or leads
            out of the folder.
    """
    manifest = _parse_manifest(Path(folder), *kinds)
    for name in manifest.payload:
        _locate(Path(folder), manifest, name)
    return manifest


def _parse_manifest(folder: Path, *kinds: Kind) -> Manifest:
    path = folder / MANIFEST
    wanted = " or ".join(kinds) or "memlm"
    if not path.is_file():
        partial = partial_path(folder)
        if partial.is_dir():
            raise ArtifactError(
                f"{folder} is not finished: run the command that makes it again, it goes on in {partial}"
            )
        what = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise ArtifactError(f"{folder} {what}; expected a {wanted} folder")
    manifest = _manifest_in(path)
    if kinds and manifest.kind not in kinds:
        raise ArtifactError(f"{folder} is a {manifest.kind} folder, expected {wanted}")
    return manifest


def _manifest_in(path: Path) -> Manifest:
    raw = read_json(path, limit=_MANIFEST_BYTES)
    if not isinstance(raw, dict) or "format_version" not in raw:
        raise ArtifactError(f"{path} is not a memlm manifest")
    if type(raw["format_version"]) is not int or raw["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {_short(raw['format_version'])}, this memlm reads {FORMAT_VERSION}; rebuild it"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_problem(error)}") from None
    for name in manifest.payload:
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/"):
            raise ArtifactError(f"{path} names a file outside its folder: {_short(name)}")
        if not parts or not name.isprintable() or "/".join(parts) != name or parts[-1] in _UNHASHED:
            raise ArtifactError(f"{path} names a file that no stage writes: {_short(name)}")
    return manifest


def _locate(folder: Path, manifest: Manifest, name: str) -> os.stat_result:
    """What the file system says of a payload file, which is there, within the folder, and of the right size.

    The hub's cache has a model's files as links into its `blobs`, beside the folder of snapshots.
    """
    target = folder / name
    try:
        real, home = os.path.realpath(target, strict=True), os.path.realpath(folder)
        found = os.stat(real)
    except (OSError, ValueError):
        raise ArtifactError(f"{target} is missing; {_again(folder)}") from None
    blobs = os.path.join(os.path.dirname(os.path.dirname(home)), "blobs")
    if not stat.S_ISREG(found.st_mode) or not real.startswith((home + os.sep, blobs + os.sep)):
        raise ArtifactError(f"{target} is a link that leads out of its folder, or no file; {_again(folder)}")
    size = manifest.payload[name].bytes
    if found.st_size != size:
        raise ArtifactError(f"{target} has {found.st_size} bytes, its manifest says {size}; {_again(folder)}")
    return found


_verified: set[tuple[int, int, int, int, str]] = set()


def payload_file(folder: str | Path, manifest: Manifest, name: str) -> Path:
    """The path of a payload file, whose bytes are those that the manifest was made for.

    A file is hashed once per process, and again when its size or time of change differs.

    Raises:
        ArtifactError: The manifest has no such file, or it is missing, damaged, or a link out of the folder.
    """
    folder = Path(folder)
    if name not in manifest.payload:
        raise ArtifactError(f"{folder} has no {name}; expected of a {manifest.kind} folder")
    there, expected = _locate(folder, manifest, name), manifest.payload[name].sha256
    state = (there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, expected)
    if state not in _verified:
        if file_digest(folder / name) != expected:
            raise ArtifactError(f"{folder / name} is damaged: its checksum is not its manifest's; {_again(folder)}")
        _verified.add(state)
    return folder / name


def check_payload(folder: str | Path, manifest: Manifest, start: str = "") -> None:
    """Nothing, where the files whose names start with `start` are what the manifest was made for.

    Raises:
        ArtifactError: One is missing or damaged, as in `payload_file`.
    """
    for name in manifest.payload:
        if name.startswith(start):
            payload_file(folder, manifest, name)


def partial_path(out: str | Path) -> Path:
    """Where a stage works until `out` is complete."""
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".partial")


def check_output(out: str | Path, identity: dict[str, Any], *, repair: bool = False) -> bool:
    """Whether `out` is already complete for this identity; with `repair`, whatever became of its files.

    Raises:
        OutputExistsError: `out` holds something else.
    """
    out = Path(out)
    if is_artifact(out):
        there = (_parse_manifest(out) if repair else read_manifest(out)).identity
        if there == identity:
            return True
        raise OutputExistsError(
            f"{out} exists and was made otherwise ({_difference(there, identity)}); choose another output or delete it"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if is_artifact(out):  # another process has finished it since the first look
            return check_output(out, identity, repair=repair)
        raise OutputExistsError(f"{out} exists and is no memlm folder; choose another output or delete it")
    return False


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    for part in ("kind", "format_version", "config", "inputs", "tokenizer"):
        old, new = there.get(part), here.get(part)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(k for k in sorted({*old, *new}) if old.get(k) != new.get(k))
            old, new, part = old.get(key), new.get(key), f"{part}.{key}"
        return f"{part}: {_short(old)} there, {_short(new)} here"
    return "no difference"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:16] + "…" + text[-3:]


class Stage:
    """A stage's output while it is being made. Use `open_stage`."""

    def __init__(self, out: Path, identity: dict[str, Any], sources: dict[str, str]) -> None:
        self.out = out
        self.path = partial_path(out)
        self.identity = identity
        self.sources = sources
        self.finished = False
        self.previous: Manifest | None = None
        """What the folder was before its repair; None where nothing is repaired."""
        self._started = time.time()

    def has(self, name: str) -> bool:
        """Whether file `name` is already complete, so that a resumed run can skip it."""
        return (self.path / name).is_file()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary path for file `name`, which appears under its name when the block ends well."""
        with _replacing(self.path / name) as temporary:
            yield temporary

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Write `array` as a `.npy` file, without pickle."""
        with self.writing(name) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    def save_text(self, name: str, text: str) -> None:
        """Write `text` as UTF-8."""
        with self.writing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def remove(self, name: str) -> None:
        """Remove an intermediate file or folder."""
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def finish(self, facts: dict[str, Any], *, intermediate: tuple[str, ...] = ()) -> Manifest:
        """Write the manifest and give the folder its name.

        Args:
            facts: What the stage found out.
            intermediate: Files and folders that the result does without. They go only once the manifest is there, so a
                run stopped before loses no work.

        Raises:
            ArtifactError: A repaired file came out otherwise than it was.
        """
        for path in self.path.rglob("*"):
            if path.is_file():  # what libraries wrote, they did not flush
                flush_to_disk(path)
        payload = {
            path.relative_to(self.path).as_posix(): PayloadFile(bytes=path.stat().st_size, sha256=file_digest(path))
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
            and path.name not in _UNHASHED  # of a folder copied into this one as well
            and not _is_half_written(path)
            and path.relative_to(self.path).parts[0] not in intermediate
        }
        if self.previous is not None:
            return self._finish_repair(self.previous, payload)
        manifest = Manifest(
            **self.identity, facts=facts, payload=payload, sources=self.sources, versions=library_versions()
        )
        write_json(self.path / "run.json", {"finished": time.time(), "seconds_last_run": time.time() - self._started})
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
        self.settle(manifest)
        return manifest

    def _finish_repair(self, previous: Manifest, payload: dict[str, PayloadFile]) -> Manifest:
        """Give the folder its manifest back, where the files are again what it says."""
        other = [name for name, file in previous.payload.items() if payload.get(name) != file]
        if other:
            now = library_versions()
            changed = [f"{k} {v}, now {now.get(k)}" for k, v in sorted(previous.versions.items()) if now.get(k) != v]
            because = f" (it was made with {'; '.join(changed)})" if changed else ""
            raise ArtifactError(
                f"{self.path / other[0]} came out otherwise than before its repair{because}; delete {self.path} and"
                " make the folder and what was made from it anew"
            )
        os.replace(self.path / _PREVIOUS, self.path / MANIFEST)
        self.settle(previous)
        return previous

    def begin_repair(self, previous: Manifest) -> None:
        """Remove what is not as `previous` says, so that the stage makes it again as any missing file."""
        self.previous, self.sources = previous, previous.sources
        for name in damaged_files(self.path, previous):
            print(f"{self.out / name} is damaged or missing; it is made again", file=sys.stderr)
            parts = PurePosixPath(name).parts
            places = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
            link = next((place for place in places if (self.path / place).is_symlink()), name)  # never what it leads to
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self.remove(link)

    def settle(self, manifest: Manifest) -> None:
        """All that is left to do after the manifest: remove what is not part of the result, rename the folder.

        Its files may be read by whom the manifest may, though safetensors writes them for their owner alone.
        """
        readers = stat.S_IMODE((self.path / MANIFEST).stat().st_mode)
        for path in sorted(self.path.rglob("*"), reverse=True):  # what is in a folder before the folder
            name = path.relative_to(self.path).as_posix()
            if path.is_dir():
                with contextlib.suppress(OSError):  # it is not empty
                    path.rmdir()
            elif name in manifest.payload:
                with contextlib.suppress(OSError):  # a file system without permissions
                    if not path.is_symlink():
                        path.chmod(readers)
            elif path.name not in _UNHASHED or name in (_PREVIOUS, "plan.json"):
                path.unlink()
        if self.out.is_dir():
            self.out.rmdir()  # an empty folder the user made
        os.replace(self.path, self.out)
        (self.out / "lock").unlink(missing_ok=True)  # held until now, so that no other run takes the folder
        self.finished = True


@contextlib.contextmanager
def writing_behind() -> Iterator[Callable[..., None]]:
    """A function that runs a write beside the caller, one at a time and in order; all are done after the `with` block.

    So a stage computes its next shard while the last goes to disk, and holds two at most. What a write raises is raised
    by the next call, or at the end.
    """
    last: Future[None] | None = None
    with ThreadPoolExecutor(1, "memlm-writer") as disk:

        def submit(write: Callable[..., None], *args: Any) -> None:
            nonlocal last
            if last is not None:
                last.result()
            last = disk.submit(write, *args)

        yield submit
        if last is not None:
            last.result()


@contextlib.contextmanager
def open_stage(
    out: str | Path,
    kind: Kind,
    *,
    config: dict[str, Any],
    inputs: dict[str, str],
    tokenizer: str | None,
    sources: dict[str, str] | None = None,
    repair: bool = False,
) -> Iterator[Stage]:
    """A stage's output folder, resumed where an earlier run with the same settings and inputs stopped.

    With `repair` a finished folder's files are compared with its manifest. Where some are damaged or missing they are
    named, the folder becomes a partial one without them, and the stage makes them again.

    Yields:
        A `Stage`; where `stage.finished` is already true there is nothing to do.

    Raises:
        OutputExistsError: `out`, or its partial folder, belongs to another run, or another process works on it.
        ArtifactError: The file system failed the stage, as when the disk is full or an input is gone.
    """
    out = Path(out)
    identity = stage_identity(kind, config=config, inputs=inputs, tokenizer=tokenizer)
    stage = Stage(out, identity, sources or {})
    if check_output(out, identity, repair=repair):
        if not (repair and damaged_files(out)):
            with contextlib.suppress(OSError):
                (out / "lock").unlink()  # of a run that was killed after the renaming
            stage.finished = True
            yield stage
            return
        if stage.path.exists():
            raise OutputExistsError(f"{stage.path} is in the way of the repair of {out}; delete it")
        if foreign := foreign_files(out):  # a partial folder loses them when it is finished
            raise OutputExistsError(f"{out / foreign[0]} is not of this folder; move it elsewhere before the repair")
        os.replace(out, stage.path)
    plan = stage.path / "plan.json"
    try:
        _check_is_ours(stage.path)
        with _locked(stage.path, out):
            complete = is_artifact(stage.path)
            if complete or plan.is_file():
                there = _parse_manifest(stage.path).identity if complete else read_json(plan)
                begun = any(path.name not in ("plan.json", "lock") for path in stage.path.iterdir())
                if there != identity and begun:  # what was refused after a plan was made leaves its place to another
                    raise OutputExistsError(
                        f"{stage.path} is an unfinished run of something else ({_difference(there, identity)});"
                        " delete it or choose another output"
                    )
            if complete and not (repair and damaged_files(stage.path)):  # stopped just before the renaming
                stage.settle(read_manifest(stage.path))
            else:
                write_json(plan, identity)
                if complete:
                    os.replace(stage.path / MANIFEST, stage.path / _PREVIOUS)
                if (stage.path / _PREVIOUS).is_file():
                    stage.begin_repair(_manifest_in(stage.path / _PREVIOUS))
            yield stage
    except (OSError, SafetensorError) as error:
        raise file_error(error, stage.path) from error


def _check_is_ours(partial: Path) -> None:
    try:
        names = {path.name for path in partial.iterdir() if not _is_half_written(path)}
    except FileNotFoundError:
        return
    if names - {"lock"} and not names & {MANIFEST, _PREVIOUS, "plan.json"}:
        raise OutputExistsError(f"{partial} exists and is no unfinished memlm run; delete it or choose another output")


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Keeps others from the partial folder of `out`, which is made where there is none.

    Raises:
        OutputExistsError: Another process works on it, or has finished it since this one looked.
    """
    finished = OutputExistsError(f"another process has finished {out} just now; run the command again")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / "lock").open("w")
    except FileNotFoundError:  # it was renamed in between
        raise finished from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputExistsError(
                f"another process is writing {partial}; wait for it or choose another output"
            ) from None
        if is_artifact(out) or not os.fstat(lock.fileno()).st_nlink:
            with contextlib.suppress(OSError):  # where it was made here, for nothing
                (partial / "lock").unlink()
                partial.rmdir()
            raise finished
        yield


def foreign_files(folder: Path) -> list[str]:
    """Names of the files in a finished folder that no manifest of it tells of."""
    payload = _parse_manifest(folder).payload
    paths = (path for path in folder.rglob("*") if not path.is_dir() and path.name not in _UNHASHED)
    names = (path.relative_to(folder).as_posix() for path in paths if not _is_half_written(path))
    return sorted(name for name in names if name not in payload)


def damaged_files(folder: Path, manifest: Manifest | None = None) -> list[str]:
    """Names of the payload files of `folder` that are missing or not what its manifest was made for."""
    manifest = manifest or _parse_manifest(folder)
    damaged = []
    with progress_bar(sum(file.bytes for file in manifest.payload.values()), f"checking {folder}", unit="B") as bar:
        for name, file in manifest.payload.items():
            try:
                payload_file(folder, manifest, name)
            except ArtifactError:
                damaged.append(name)
            bar.update(file.bytes)
    return damaged


def stage_identity(
    kind: Kind, *, config: dict[str, Any], inputs: dict[str, str], tokenizer: str | None
) -> dict[str, Any]:
    """What decides whether two runs of a stage are the same run."""
    identity = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "config": config,
        "inputs": inputs,
        "tokenizer": tokenizer,
    }
    return json.loads(json.dumps(identity))  # tuples become lists, as they will when read back


def library_versions() -> dict[str, str]:
    """Versions, machine and thread count, as recorded in every manifest and report."""
    versions = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if "torch" in sys.modules:
        versions["threads"] = str(sys.modules["torch"].get_num_threads())
    return versions


def cache_dir() -> Path:
    """Where fetched models and scores are kept: `$MEMLM_HOME`, or `~/.cache/memlm`."""
    return Path(os.environ.get("MEMLM_HOME") or Path.home() / ".cache" / "memlm").expanduser()
