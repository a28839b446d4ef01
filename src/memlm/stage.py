"""Stages: each is asked for one folder, and goes on where an earlier run stopped.

While a stage works it writes to `NAME.partial` beside its output, file by file, each under a temporary name first.
A second run with the same settings and inputs goes on at the first missing file. When all is there the manifest is
written and the folder renamed.
"""

import contextlib
import fcntl
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError

from memlm.errors import ArtifactError, OutputExistsError
from memlm.files import file_digest, file_error, flush_to_disk, is_half_written, read_json, replacing, write_json
from memlm.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    PREVIOUS,
    UNHASHED,
    Kind,
    Manifest,
    PayloadFile,
    is_artifact,
    library_versions,
    manifest_in,
    parse_manifest,
    partial_path,
    payload_file,
    read_manifest,
    short,
)
from memlm.progress import progress_bar


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

    @property
    def identity(self) -> dict[str, Any]:
        """What decides whether two runs are the same run; a finished folder's manifest has it as `identity`."""
        identity = {
            "kind": self.kind,
            "format_version": FORMAT_VERSION,
            "config": self.config,
            "inputs": self.inputs,
            "tokenizer": self.tokenizer,
        }
        return json.loads(json.dumps(identity))  # tuples become lists, as they will when read back


class Stage:
    """A stage's output while it is being made. Use `open_stage`."""

    def __init__(self, out: Path, spec: StageSpec) -> None:
        self.out = out
        self.path = partial_path(out)
        self.spec = spec
        self.sources = spec.sources
        self.finished: Manifest | None = None
        """The manifest, once there is one."""
        self.previous: Manifest | None = None
        """What the folder was before its repair; None where nothing is repaired."""
        self._started = time.time()

    def has(self, name: str) -> bool:
        """Whether file `name` is already complete, so that a resumed run can skip it."""
        return (self.path / name).is_file()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary path for file `name`, which appears under its name when the block ends well."""
        with replacing(self.path / name) as temporary:
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

    def finish(self, facts: dict[str, Any]) -> Manifest:
        """Write the manifest and give the folder its name.

        What the spec calls intermediate goes only once the manifest is there, so a run stopped before loses no work.

        Args:
            facts: What the stage found out.

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
            and path.name not in UNHASHED  # of a folder copied into this one as well
            and not is_half_written(path)
            and path.relative_to(self.path).parts[0] not in self.spec.intermediate
        }
        if self.previous is not None:
            return self._finish_repair(self.previous, payload)
        manifest = Manifest(
            **self.spec.identity, facts=facts, payload=payload, sources=self.sources, versions=library_versions()
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
        os.replace(self.path / PREVIOUS, self.path / MANIFEST)
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
            elif path.name not in UNHASHED or name in (PREVIOUS, "plan.json"):
                path.unlink()
        if self.out.is_dir():
            self.out.rmdir()  # an empty folder the user made
        os.replace(self.path, self.out)
        (self.out / "lock").unlink(missing_ok=True)  # held until now, so that no other run takes the folder
        self.finished = manifest


class Plan(NamedTuple):
    """A stage that is ready to run, whose early errors have all been raised: `run_stage(out, *plan)`."""

    spec: StageSpec
    work: Callable[[Stage], dict[str, Any]]
    """Writes the files into the stage's folder and returns the facts."""


def run_stage(
    out: str | Path, spec: StageSpec, work: Callable[[Stage], dict[str, Any]], *, repair: bool = False
) -> Manifest:
    """The manifest of `out`, which is left alone where it is finished, and else made by `work`.

    Args:
        out: Folder to write; resumed where an earlier run of the same `spec` stopped.
        spec: What is asked for.
        work: Writes the files that the stage does not have yet, and returns the facts for the manifest.
        repair: Make damaged or missing files of a finished folder again.

    Raises:
        OutputExistsError: `out`, or its partial folder, belongs to another run, or another process works on it.
        ArtifactError: The file system failed the stage, as when the disk is full or an input is gone; or a repaired
            file came out otherwise than it was.
    """
    with open_stage(out, spec, repair=repair) as stage:
        return stage.finished or stage.finish(work(stage))


@contextlib.contextmanager
def open_stage(out: str | Path, spec: StageSpec, *, repair: bool = False) -> Iterator[Stage]:
    """A stage's output folder, resumed where an earlier run with the same settings and inputs stopped.

    With `repair` a finished folder's files are compared with its manifest. Where some are damaged or missing they are
    named, the folder becomes a partial one without them, and the stage makes them again.

    Yields:
        A `Stage`; where it is `finished` already there is nothing to do.

    Raises:
        OutputExistsError: `out`, or its partial folder, belongs to another run, or another process works on it.
        ArtifactError: The file system failed the stage, as when the disk is full or an input is gone.
    """
    out = Path(out)
    identity = spec.identity
    stage = Stage(out, spec)
    if check_output(out, spec, repair=repair):
        if not (repair and damaged_files(out)):
            with contextlib.suppress(OSError):
                (out / "lock").unlink()  # of a run that was killed after the renaming
            stage.finished = read_manifest(out)
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
                there = parse_manifest(stage.path).identity if complete else read_json(plan)
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
                    os.replace(stage.path / MANIFEST, stage.path / PREVIOUS)
                if (stage.path / PREVIOUS).is_file():
                    stage.begin_repair(manifest_in(stage.path / PREVIOUS))
            yield stage
    except (OSError, SafetensorError) as error:
        raise file_error(error, stage.path) from error


def check_output(out: str | Path, spec: StageSpec, *, repair: bool = False) -> bool:
    """Whether `out` is already complete for this spec; with `repair`, whatever became of its files.

    Raises:
        OutputExistsError: `out` holds something else.
    """
    out = Path(out)
    if is_artifact(out):
        there, here = (parse_manifest(out) if repair else read_manifest(out)).identity, spec.identity
        if there == here:
            return True
        raise OutputExistsError(
            f"{out} exists and was made otherwise ({_difference(there, here)}); choose another output or delete it"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if is_artifact(out):  # another process has finished it since the first look
            return check_output(out, spec, repair=repair)
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
        return f"{part}: {short(old)} there, {short(new)} here"
    return "no difference"


def _check_is_ours(partial: Path) -> None:
    try:
        names = {path.name for path in partial.iterdir() if not is_half_written(path)}
    except FileNotFoundError:
        return
    if names - {"lock"} and not names & {MANIFEST, PREVIOUS, "plan.json"}:
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
    payload = parse_manifest(folder).payload
    paths = (path for path in folder.rglob("*") if not path.is_dir() and path.name not in UNHASHED)
    names = (path.relative_to(folder).as_posix() for path in paths if not is_half_written(path))
    return sorted(name for name in names if name not in payload)


def damaged_files(folder: Path, manifest: Manifest | None = None) -> list[str]:
    """Names of the payload files of `folder` that are missing or not what its manifest was made for."""
    manifest = manifest or parse_manifest(folder)
    damaged = []
    with progress_bar(sum(file.bytes for file in manifest.payload.values()), f"checking {folder}", unit="B") as bar:
        for name, file in manifest.payload.items():
            try:
                payload_file(folder, manifest, name)
            except ArtifactError:
                damaged.append(name)
            bar.update(file.bytes)
    return damaged


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
