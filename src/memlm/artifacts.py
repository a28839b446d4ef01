"""Folders in which stages meet: a manifest says what is inside and from what; a folder appears when it is complete.

While a stage works it writes to `NAME.partial` beside its output, file by file, each under a temporary name first.
A second run with the same settings and inputs goes on at the first missing file. When all is there the manifest is
written and the folder renamed. Bytes are on disk before the name that stands for them, so what a kill or a power cut
leaves under a name is whole.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from memlm.errors import ArtifactError, OutputExistsError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_UNHASHED = {MANIFEST, "run.json", "plan.json", "lock"}  # times, logs and what describes the rest
_LIBRARIES = ("memlm", "torch", "transformers", "faiss-cpu", "datasets", "pyarrow", "numpy", "tokenizers")

Kind = Literal["corpus", "datastore", "targets", "memory", "scores", "evaluation"]


class PayloadFile(BaseModel):
    """Size and checksum of one file of a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str


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


def load_array(path: Path, *, mapped: bool = False) -> np.ndarray:
    """The array in a `.npy` file of an artifact; `mapped` leaves it on disk.

    Raises:
        ArtifactError: The file is damaged.
    """
    try:
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise ArtifactError(f"{path} is no array ({reason}); rebuild the {path.parent.name} folder") from None


def _is_half_written(path: Path) -> bool:
    ours = path.name.startswith(".") and path.name.endswith(".writing")
    return ours or path.name.startswith(".tmp")  # as safetensors calls them


def is_artifact(folder: str | Path) -> bool:
    """Whether `folder` holds a manifest."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: str | Path, *kinds: Kind) -> Manifest:
    """The manifest of `folder`, with its files' presence and sizes checked.

    Args:
        folder: What a stage wrote.
        kinds: The kinds that will do; none means any.

    Raises:
        ArtifactError: No such folder, no manifest, another kind or version, or a file is missing or truncated.
    """
    folder = Path(folder)
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
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict) or "format_version" not in raw:
        raise ArtifactError(f"{path} is not a memlm manifest")
    if raw["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {raw['format_version']!r}, this memlm reads {FORMAT_VERSION}; rebuild it"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if kinds and manifest.kind not in kinds:
        raise ArtifactError(f"{folder} is a {manifest.kind} folder, expected {wanted}")
    for name, file in manifest.payload.items():
        relative = Path(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise ArtifactError(f"{path} names a file outside its folder: {name!r}")
        target = folder / relative
        if not target.is_file():
            raise ArtifactError(f"{target} is missing; rebuild {folder}")
        size = target.stat().st_size
        if size != file.bytes:
            raise ArtifactError(f"{target} has {size} bytes, its manifest says {file.bytes}; rebuild {folder}")
    return manifest


def partial_path(out: str | Path) -> Path:
    """Where a stage works until `out` is complete."""
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".partial")


def check_output(out: str | Path, identity: dict[str, Any]) -> bool:
    """Whether `out` is already complete for this identity.

    Raises:
        OutputExistsError: `out` holds something else.
    """
    out = Path(out)
    if is_artifact(out):
        there = read_manifest(out).identity
        if there == identity:
            return True
        raise OutputExistsError(
            f"{out} exists and was made otherwise ({_difference(there, identity)}); choose another output or delete it"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
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
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def finish(self, facts: dict[str, Any], *, intermediate: tuple[str, ...] = ()) -> Manifest:
        """Write the manifest and give the folder its name.

        Args:
            facts: What the stage found out.
            intermediate: Files and folders that the result does without. They go only once the manifest is there, so a
                run stopped before loses no work.
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
        manifest = Manifest(
            **self.identity, facts=facts, payload=payload, sources=self.sources, versions=library_versions()
        )
        write_json(self.path / "run.json", {"finished": time.time(), "seconds_last_run": time.time() - self._started})
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
        self.settle(manifest)
        return manifest

    def settle(self, manifest: Manifest) -> None:
        """Remove what is not part of the result and rename the folder: all that is left to do after the manifest."""
        for path in sorted(self.path.rglob("*"), reverse=True):  # what is in a folder before the folder
            name = path.relative_to(self.path).as_posix()
            if path.is_dir():
                with contextlib.suppress(OSError):  # it is not empty
                    path.rmdir()
            elif name not in manifest.payload and (path.name not in _UNHASHED or name in ("plan.json", "lock")):
                path.unlink()
        if self.out.is_dir():
            self.out.rmdir()  # an empty folder the user made
        os.replace(self.path, self.out)
        self.finished = True


@contextlib.contextmanager
def open_stage(
    out: str | Path,
    kind: Kind,
    *,
    config: dict[str, Any],
    inputs: dict[str, str],
    tokenizer: str | None,
    sources: dict[str, str] | None = None,
) -> Iterator[Stage]:
    """A stage's output folder, resumed where an earlier run with the same settings and inputs stopped.

    Yields:
        A `Stage`; where `stage.finished` is already true there is nothing to do.

    Raises:
        OutputExistsError: `out`, or its partial folder, belongs to another run, or another process works on it.
        ArtifactError: The file system failed the stage, as when the disk is full or an input is gone.
    """
    out = Path(out)
    identity = stage_identity(kind, config=config, inputs=inputs, tokenizer=tokenizer)
    stage = Stage(out, identity, sources or {})
    if check_output(out, identity):
        stage.finished = True
        yield stage
        return
    plan, complete = stage.path / "plan.json", is_artifact(stage.path)
    if stage.path.exists() and not (complete or plan.is_file()):
        if any(path.name != "lock" and not _is_half_written(path) for path in stage.path.iterdir()):
            raise OutputExistsError(
                f"{stage.path} exists and is no unfinished memlm run; delete it or choose another output"
            )
    if complete or plan.is_file():
        there = read_manifest(stage.path).identity if complete else json.loads(plan.read_text(encoding="utf-8"))
        begun = any(path.name not in ("plan.json", "lock") for path in stage.path.iterdir())
        if there != identity and begun:  # what was refused after a plan was made leaves its place to another
            raise OutputExistsError(
                f"{stage.path} is an unfinished run of something else ({_difference(there, identity)});"
                " delete it or choose another output"
            )
    try:
        stage.path.mkdir(parents=True, exist_ok=True)
        with (stage.path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputExistsError(
                    f"another process is writing {stage.path}; wait for it or choose another output"
                ) from None
            if is_artifact(out) or not os.fstat(lock.fileno()).st_nlink:
                raise OutputExistsError(f"another process has finished {out} just now; run the command again")
            if complete:  # the last run was stopped just before the renaming
                stage.settle(read_manifest(stage.path))
            else:
                write_json(plan, identity)
            yield stage
    except (OSError, SafetensorError) as error:
        raise file_error(error, stage.path) from error


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
