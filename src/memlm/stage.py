"""Stages: each is asked for one folder, and goes on where an earlier run stopped.

A folder is finished when its manifest is there, which is written last. While a stage works, `plan.json` tells what it
was asked for; payload files come one by one, each under a temporary name first. A second run with the same settings and
inputs goes on at the first missing file.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from memlm.errors import ArtifactError, OutputBusyError, OutputExistsError
from memlm.files import (
    erase,
    file_digest,
    file_error,
    flush_to_disk,
    is_half_written,
    out_of_memory,
    read_json,
    replacing,
    utf8,
    write_json,
)
from memlm.manifest import (
    FORMAT_VERSION,
    IDENTITY,
    LOCK,
    MANIFEST,
    MANIFEST_BYTES,
    PLAN,
    PREVIOUS,
    RUN,
    UNHASHED,
    Kind,
    Manifest,
    PayloadFile,
    is_finished,
    library_versions,
    manifest_in,
    read_manifest,
    short,
)
from memlm.parts import PARTS, noting
from memlm.progress import note
from memlm.ranks import ALONE, Ranks

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_LOOKS = 100
_SETTLED = "settled.json"
_OF_VOLUMES = "lost+found"  # what a file system keeps at its top


@dataclass(frozen=True)
class StageSpec:
    """What a stage is asked to make: all that is known before its work starts."""

    kind: Kind
    config: dict[str, Any]
    """The settings, without paths."""
    inputs: dict[str, str]
    """Name to content hash of everything that is read."""
    tokenizer: str | None
    """Fingerprint of the tokenizer of the token ids."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where the inputs are found."""
    intermediate: tuple[str, ...] = ()
    """Files and folders of the work that the result does without."""
    format_version: int = FORMAT_VERSION

    @property
    def identity(self) -> dict[str, Any]:
        """What decides whether two runs are the same run; a finished folder's manifest has it as `identity`."""
        identity = {name: getattr(self, name) for name in IDENTITY}
        return json.loads(json.dumps(identity))  # tuples become lists, as they will when read back


class Stage:
    """A stage's folder while it is being made. Use `run_stage`."""

    def __init__(self, path: Path, spec: StageSpec) -> None:
        self.path = path
        self.spec = spec
        self.sources = spec.sources
        self.finished: Manifest | None = None
        """The manifest, once there is one."""
        self.previous: Manifest | None = None
        """What the folder was before its repair; None where nothing is repaired."""
        self.kept: str | None = None
        """What a stop would leave, in words; None: nothing worth a word."""
        self._started = time.time()

    def has(self, name: str) -> bool:
        """Whether file `name` is already complete, so that a resumed run can skip it."""
        return (self.path / name).is_file()

    def writing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A temporary path for file `name`, which appears under its name when the block ends well."""
        return replacing(self.path / name)

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Write `array` as a `.npy` file, without pickle."""
        with self.writing(name) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    def save_text(self, name: str, text: str) -> None:
        """Write `text` as UTF-8."""
        with self.writing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def settled(self, name: str, value: str) -> str:
        """What was settled when the work began, which goes on with it; `value` where it begins."""
        path = self.path / _SETTLED
        there = read_json(path) if path.is_file() else {}
        if name not in there:
            there[name] = value
            write_json(path, there)
        return there[name]

    def remove(self, name: str) -> None:
        """Remove an intermediate file or folder."""
        erase(self.path / name)

    def has_begun(self) -> bool:
        """Whether there is anything but the plan, and what was settled."""
        return any(path.name not in (PLAN, LOCK, _SETTLED, _OF_VOLUMES) for path in self.path.iterdir())

    def begin(self) -> None:
        """Write the plan, or go on with the one that is there.

        Raises:
            OutputExistsError: The folder is another run's, which has made something already.
        """
        plan, identity = self.path / PLAN, self.spec.identity
        if self.has_begun() and plan.is_file() and (there := read_json(plan, limit=MANIFEST_BYTES)) != identity:
            raise OutputExistsError(
                f"{self.path} is an unfinished run of something else ({_difference(there, identity)});"
                " delete it or choose another output"
            )
        if not self.has_begun():
            (self.path / _SETTLED).unlink(missing_ok=True)
        write_json(plan, identity)
        if (self.path / PREVIOUS).is_file():
            self.previous = manifest_in(self.path / PREVIOUS)
            self.sources = self.previous.sources

    def finish(self, facts: dict[str, Any]) -> Manifest:
        """Write the manifest, and remove what the work left.

        What the spec calls intermediate goes only once the manifest is there, so a run stopped before loses no work.

        Args:
            facts: What the stage found out.

        Raises:
            ArtifactError: A repaired file came out otherwise than it was.
        """
        payload = {}
        readers = stat.S_IMODE((self.path / PLAN).stat().st_mode)
        for path in _inside(self.path):
            # what is unhashed of a folder copied into this one too is left out
            if path.is_file() and path.name not in UNHASHED and not self._is_left_over(path) and not _is_hidden(path):
                flush_to_disk(path)  # what libraries wrote, they did not flush
                name = path.relative_to(self.path).as_posix()
                payload[name] = PayloadFile(bytes=path.stat().st_size, sha256=file_digest(path))
                with contextlib.suppress(OSError):  # a file system without permissions
                    if not path.is_symlink():
                        path.chmod(readers)  # safetensors writes for the owner alone
        if self.previous is not None:
            self._check_repaired(self.previous, payload)
            manifest = self.previous
            os.replace(self.path / PREVIOUS, self.path / MANIFEST)
        else:
            manifest = Manifest(
                **self.spec.identity,
                facts=facts,
                payload=payload,
                sources={name: utf8(place) for name, place in self.sources.items()},
                versions=library_versions(),
            )
            write_json(self.path / RUN, {"finished": time.time(), "seconds_last_run": time.time() - self._started})
            write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
        self.settle(manifest)
        return manifest

    def _check_repaired(self, previous: Manifest, payload: dict[str, PayloadFile]) -> None:
        other = [name for name, file in previous.payload.items() if payload.get(name) != file]
        if other:
            now = library_versions()
            changed = [f"{k} {v}, now {now.get(k)}" for k, v in sorted(previous.versions.items()) if now.get(k) != v]
            because = f" (it was made with {'; '.join(changed)})" if changed else ""
            raise ArtifactError(
                f"{self.path / other[0]} came out otherwise than before its repair{because}; delete {self.path} and"
                " make the folder and what was made from it anew"
            )

    def settle(self, manifest: Manifest) -> None:
        """All that is left to do after the manifest: remove what the work left, and the plan last."""
        for path in reversed(_inside(self.path)):  # what is in a folder before the folder
            if path.is_dir():
                with contextlib.suppress(OSError):  # it is not empty
                    path.rmdir()
            elif self._is_left_over(path):
                path.unlink()
        (self.path / PLAN).unlink(missing_ok=True)
        self.finished = manifest

    def _is_left_over(self, path: Path) -> bool:
        first = path.relative_to(self.path).parts[0]
        return is_half_written(path) or first in (PARTS, _SETTLED, *self.spec.intermediate)


def _is_hidden(path: Path) -> bool:
    """Whether a system keeps it for itself, as .DS_Store: no stage writes a file of such a name."""
    return path.name.startswith(".")


Work = Callable[[Stage], dict[str, Any]]
"""Writes the files that a stage does not have yet, and returns the facts for its manifest."""


class Plan(NamedTuple):
    """A stage that is ready to run, whose early errors have all been raised: `run_stage(out, *plan)`."""

    spec: StageSpec
    work: Work


def run_stage(out: str | Path, spec: StageSpec, work: Work, ranks: Ranks = ALONE) -> Manifest:
    """The manifest of `out`, which is left alone where it is finished, and else made by `work`.

    Args:
        out: Folder to write; resumed where an earlier run of the same `spec` stopped.
        spec: What is asked for.
        work: What makes it.
        ranks: Who works together; the first opens and finishes the folder, and `work` leaves writing to it.

    Raises:
        OutputExistsError: `out` belongs to another run, or another process works on it.
        ArtifactError: The file system failed the stage, as when the disk is full or an input is gone; or a repaired
            file came out otherwise than it was.
    """
    with open_stage(out, spec) if ranks.first else contextlib.nullcontext(Stage(Path(out), spec)) as stage:
        if finished := ranks.from_first(stage.finished):
            note(f"{out} is there already: nothing to do")
            return finished
        with noting(lambda: stage.kept and f"{out} keeps {stage.kept}"):
            facts = work(stage)
            return ranks.once(lambda: stage.finish(facts))


@contextlib.contextmanager
def open_stage(out: str | Path, spec: StageSpec) -> Iterator[Stage]:
    """A stage's folder, resumed where an earlier run with the same settings and inputs stopped.

    Yields:
        A `Stage`; where it is `finished` already there is nothing to do.

    Raises:
        OutputExistsError, ArtifactError: As in `run_stage`.
    """
    out = Path(out)
    stage = Stage(out, spec)
    if utf8(str(out)) != str(out):
        raise ArtifactError(f"{out}: the name of an output must be UTF-8; choose another output")
    try:
        _take_over(out)
        stage.finished = check_output(out, spec)
        if stage.finished and not any((out / name).exists() for name in (PLAN, LOCK)):
            yield stage
            return
        out.mkdir(parents=True, exist_ok=True)
        if links := [path for path in _inside(out) if path.is_symlink()]:  # which could lead out of it
            raise OutputExistsError(f"{links[0]} is a link, which no stage makes; delete it or choose another output")
        with locked(out):
            if manifest := check_output(out, spec):
                stage.settle(manifest)  # of a run that was stopped just before the end, or that ended just now
            else:
                stage.begin()
                _part_hard_links(out)
            try:
                yield stage
            finally:
                if not stage.has_begun():
                    for name in (PLAN, _SETTLED):  # what was refused leaves no trace
                        (out / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise file_error(error, out) from error
    except (MemoryError, RuntimeError) as error:
        if told := out_of_memory(error, out):
            raise told from error
        raise


def check_output(out: str | Path, spec: StageSpec) -> Manifest | None:
    """The manifest of `out` where it is finished; None where there is something to do.

    Raises:
        OutputExistsError: `out` holds something else.
    """
    out = Path(out)
    if is_finished(out):
        manifest, here = read_manifest(out), spec.identity
        if manifest.identity == here:
            return manifest
        raise OutputExistsError(
            f"{out} exists and was made otherwise ({_difference(manifest.identity, here)});"
            " choose another output or delete it"
        )
    if out.exists():
        names = {path.name for path in out.iterdir() if not is_half_written(path)} if out.is_dir() else {out.name}
        if names - {LOCK, _OF_VOLUMES} and PLAN not in names:
            if is_finished(out):  # another process has finished it since the first look
                return check_output(out, spec)
            raise OutputExistsError(f"{out} exists and is no memlm folder; choose another output or delete it")
    _check_place(out)
    return None


def _check_place(out: Path) -> None:
    """Raise unless `out` is a folder that may be written, or can be made."""
    place = next(path for path in (out, *Path(os.path.abspath(out)).parents) if os.path.lexists(path))
    if place.is_symlink() and not place.exists():
        raise OutputExistsError(f"{place} is a link that leads nowhere; delete it or choose another output")
    with contextlib.suppress(FileNotFoundError):  # another process has removed it since
        number = 0
        if not stat.S_ISDIR(place.stat().st_mode):
            number = errno.ENOTDIR
        elif os.statvfs(place).f_flag & os.ST_RDONLY:
            number = errno.EROFS
        elif not os.access(place, os.W_OK | os.X_OK) and place.exists():
            number = errno.EACCES
        if number:
            raise file_error(OSError(number, os.strerror(number), str(out)))


def _inside(folder: Path) -> list[Path]:
    """Everything in a folder, a folder before what is in it."""
    for look in range(1, _LOOKS + 1):
        try:
            return sorted(path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != _OF_VOLUMES)
        except FileNotFoundError:  # another process clears up its own there
            if look == _LOOKS:
                raise
    return []


def _part_hard_links(folder: Path) -> None:
    """Give the folder copies of its own of the files that are somewhere else too, for some are written in place."""
    for path in _inside(folder):
        if path.is_file() and path.stat().st_nlink > 1:
            with replacing(path) as temporary:
                shutil.copy2(path, temporary)


def _difference(there: Any, here: dict[str, Any]) -> str:
    if not isinstance(there, dict):
        return f"its plan is {short(there)}"
    for part in IDENTITY:
        old, new = there.get(part), here.get(part)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(k for k in sorted({*old, *new}) if k not in old or k not in new or old[k] != new[k])
            old, new, part = old.get(key), new.get(key), f"{part}.{key}"
        return f"{part}: {short(old)} there, {short(new)} here"
    return "no difference"


def lock_file(path: Path, *, blocking: bool = False) -> BaseFileLock:
    """A lock on a file, held; where the file system has no locks, one that consists in the file's being there.

    Raises:
        Timeout: Another has it, and `blocking` is not set.
    """
    was_there = path.exists()
    try:
        (lock := FileLock(path)).acquire(blocking=blocking)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:  # as of a Timeout
            raise
        if not was_there:
            path.unlink(missing_ok=True)  # what the attempt left would be a lock
        (lock := SoftFileLock(path)).acquire(blocking=blocking)
    return lock


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from `folder`.

    The lock's file stays in an unfinished folder. From others it is removed before another process can have it.

    Raises:
        OutputBusyError: Another process works on it.
    """
    path = folder / LOCK
    if path.is_symlink() or (path.exists() and not (path.is_file() and path.stat().st_nlink == 1)):
        raise OutputExistsError(f"{path} is a link, or no file; delete it or choose another output")
    try:
        lock = lock_file(path)
    except Timeout:
        cure = f" (or delete {path} if there is none)" if path.is_file() and path.stat().st_size else ""
        raise OutputBusyError(
            f"another process is writing {folder}; wait for it{cure} or choose another output"
        ) from None
    try:
        yield
    finally:
        if not (folder / PLAN).is_file():
            with contextlib.suppress(OSError):  # where open files cannot be removed, the release does it
                (folder / LOCK).unlink()
                folder.rmdir()  # where it is empty
        lock.release()


def _take_over(out: Path) -> None:
    """Give an unfinished `OUT.partial`, as memlm 0.1.0 left it, the name OUT where nothing else has it."""
    partial = Path(f"{os.path.abspath(out)}.partial")
    if not out.exists() and any((partial / name).is_file() for name in (PLAN, MANIFEST)):
        with contextlib.suppress(FileNotFoundError), locked(partial):  # where another process was faster
            partial.rename(out)


@contextlib.contextmanager
def writing_behind() -> Iterator[Callable[..., None]]:
    """A function that runs a write beside the caller, one at a time and in order; all are done after the `with` block.

    So a stage computes its next shard while the last goes to disk, and holds two at most. What a write raises is raised
    by the next call, or at the end.
    """
    with ThreadPoolExecutor(1, "memlm-writer") as disk:
        last = disk.submit(lambda: None)

        def submit(write: Callable[..., None], *args: Any) -> None:
            nonlocal last
            last.result()
            last = disk.submit(write, *args)

        yield submit
        last.result()
