"""The manifest of a folder: which stage made it, with which settings, from what, and a checksum of every file.

A folder may come from a stranger. What its manifest says is held against the files, and a file's checksum is verified
before the file is read.
"""

import contextlib
import os
import platform
import shutil
import stat
import sys
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memlm.config import StageConfig, first_problem
from memlm.errors import ArtifactError, ConfigError
from memlm.files import damaged, digest, file_digest, read_json, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"  # the identity of a folder that is not finished
PREVIOUS = "previous.json"  # the manifest of a folder under repair
RUN = "run.json"  # times
LOCK = "lock"
VALIDATED = "validated.json"  # how a datastore is searched and weighed best, as an evaluation found later
GATE_FILE = "gate.json"  # a memory's confidence head, as memlm gate found it later
UNHASHED = {MANIFEST, PLAN, PREVIOUS, RUN, LOCK, VALIDATED, GATE_FILE}  # what describes the rest
MANIFEST_BYTES = 16 << 20  # a hundred thousand files; parsed JSON takes up to 25 times its bytes
_LONGEST = 1e9  # seconds, thirty years
_LATEST = 1e11  # seconds since 1970
_LIBRARIES = ("memlm", "torch", "transformers", "faiss-cpu", "datasets", "pyarrow", "numpy", "tokenizers")
IDENTITY = ("kind", "format_version", "config", "inputs", "tokenizer")  # fields that are known before the work starts
Kind = Literal["corpus", "datastore", "targets", "memory", "scores", "base-rows", "evaluation"]


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

    def __repr__(self) -> str:
        return f"Manifest({self.kind} {self.hash[:12]}, {len(self.payload)} files, {self.bytes:,} bytes)"

    __str__ = __repr__

    @property
    def hash(self) -> str:
        """What identifies the folder's content: equal for equal settings, inputs and payload bytes."""
        return digest(self.model_dump(mode="json", exclude={"sources", "versions"}))

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.bytes for file in self.payload.values())

    @property
    def identity(self) -> dict[str, Any]:
        """What decides whether a run is the same run."""
        return self.model_dump(mode="json", include=set(IDENTITY))


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


def is_artifact(folder: str | Path) -> bool:
    """Whether a stage has made `folder`; False where it is something else, such as a model.

    Raises:
        ArtifactError: A stage has begun it and is not finished.
    """
    if is_finished(folder):
        return True
    if (Path(folder) / PLAN).is_file():
        raise ArtifactError(f"{folder} is not finished: run the command that makes it again, it goes on where it was")
    return False


def is_finished(folder: str | Path) -> bool:
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
    manifest = parse_manifest(Path(folder), *kinds)
    home = os.path.realpath(folder)
    for name in manifest.payload:
        _locate(Path(folder), home, manifest, name)
    return manifest


def parse_manifest(folder: Path, *kinds: Kind) -> Manifest:
    """The manifest of `folder` alone, as `read_manifest`; its files are not looked at."""
    path = folder / MANIFEST
    wanted = " or ".join(kinds) or "memlm"
    if not is_artifact(folder):
        what = "is a file" if folder.is_file() else "has no manifest.json" if folder.is_dir() else "does not exist"
        raise ArtifactError(f"{folder} {what}; expected a {wanted} folder")
    manifest = manifest_in(path)
    if kinds and manifest.kind not in kinds:
        raise ArtifactError(f"{folder} is a {manifest.kind} folder, expected {wanted}")
    return manifest


def manifest_in(path: Path) -> Manifest:
    """The manifest in a file, its version and the names that it holds checked; errors as `read_manifest`."""
    raw = read_json(path, limit=MANIFEST_BYTES)
    if not isinstance(raw, dict) or "format_version" not in raw:
        raise ArtifactError(f"{path} is not a memlm manifest")
    if type(raw["format_version"]) is not int or raw["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {short(raw['format_version'])}, this memlm reads {FORMAT_VERSION}; rebuild it"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_problem(error)}") from None
    for name in manifest.payload:
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/"):
            raise ArtifactError(f"{path} names a file outside its folder: {short(name)}")
        if not parts or not name.isprintable() or "/".join(parts) != name or parts[-1] in UNHASHED:
            raise ArtifactError(f"{path} names a file that no stage writes: {short(name)}")
    return manifest


def _locate(folder: Path, home: str, manifest: Manifest, name: str) -> os.stat_result:
    """What the file system says of a payload file, which is there, within the folder, and of the right size.

    `home` is where the folder really is. The hub's cache has a model's files as links into its `blobs`, beside the
    folder of snapshots.
    """
    target = folder / name
    try:
        real = os.path.realpath(target, strict=True)
        found = os.stat(real)
    except (OSError, ValueError):
        raise damaged(target, "is missing", folder) from None
    blobs = os.path.join(os.path.dirname(os.path.dirname(home)), "blobs")
    if not stat.S_ISREG(found.st_mode) or not real.startswith((home + os.sep, blobs + os.sep)):
        raise damaged(target, "is a link that leads out of its folder, or no file", folder)
    size = manifest.payload[name].bytes
    if found.st_size != size:
        raise damaged(target, f"has {found.st_size} bytes, its manifest says {size}", folder)
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
    there, expected = _locate(folder, os.path.realpath(folder), manifest, name), manifest.payload[name].sha256
    state = (there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns, expected)
    if state not in _verified:
        if file_digest(folder / name) != expected:
            raise damaged(folder / name, "is damaged: its checksum is not its manifest's", folder)
        _verified.add(state)
    return folder / name


_READ = (  # what transformers and tokenizers look for in a model's folder by itself
    *("*config.json", "*index.json", "*.safetensors", "*.bin", "*.gguf", "*.py", "*.model", "*.jinja", "*token*"),
    *("vocab*", "merges*", "chat_template*", "additional_chat_templates", "adapter_*"),
)


def check_nothing_beside(folder: str | Path, manifest: Manifest) -> None:
    """Raise where a model's folder has a file that libraries read by themselves, and its manifest does not name.

    Raises:
        ArtifactError: It has one, such as a link to a file somewhere else.
    """
    named = {PurePosixPath(name).parts[0] for name in manifest.payload}
    for name in sorted(os.listdir(folder)):
        if name not in named | UNHASHED and any(fnmatch(name.lower(), pattern) for pattern in _READ):
            raise ArtifactError(f"{Path(folder) / name} is none of the files that its manifest names; delete it")


def check_payload(folder: str | Path, manifest: Manifest, start: str = "") -> None:
    """Raise unless the files whose names start with `start` are what the manifest was made for.

    Raises:
        ArtifactError: One is missing or damaged, as in `payload_file`.
    """
    for name in manifest.payload:
        if name.startswith(start):
            payload_file(folder, manifest, name)


def copy_payload(folder: str | Path, manifest: Manifest, out: Path, start: str = "") -> None:
    """Copy into `out` the payload files whose names start with `start`, and no other file that lies beside them.

    Raises:
        ArtifactError: One is missing or damaged, as in `payload_file`.
    """
    for name in manifest.payload:
        if name.startswith(start):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(payload_file(folder, manifest, name), out / name)


class FoundLater(StageConfig):
    """What is found out about a finished folder, and kept in it beside its manifest; no hash covers it."""

    file_name: ClassVar[str]
    most_bytes: ClassVar[int] = 1 << 20
    cure: ClassVar[str]
    """What to do where the file is damaged."""

    @classmethod
    def read(cls, folder: str | Path) -> Self | None:
        """What is kept in `folder`; None where nothing is.

        Raises:
            ArtifactError: The file is damaged.
        """
        path = Path(folder) / cls.file_name
        if not path.is_file():
            return None
        try:
            return cls.parse(read_json(path, limit=cls.most_bytes))
        except ConfigError as error:
            raise ArtifactError(f"{path}: {error}; {cls.cure}") from None

    def save(self, folder: str | Path) -> None:
        """Write it to `folder`."""
        write_json(Path(folder) / self.file_name, self.model_dump(mode="json"))


class Times(Facts):
    """Of a finished folder's last run."""

    finished: float = Field(ge=0, lt=_LATEST)
    """Seconds since 1970."""
    seconds_last_run: float = Field(ge=0, lt=_LONGEST)


def times_of(folder: str | Path) -> Times | None:
    """When a folder was finished and what its last run took; None where nothing says so that can be believed."""
    with contextlib.suppress(ArtifactError, ValidationError):
        return Times.model_validate(read_json(Path(folder) / RUN))
    return None


def library_versions() -> dict[str, str]:
    """Versions, machine and thread count, as recorded in every manifest and report."""
    versions = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if "torch" in sys.modules:
        versions["threads"] = str(sys.modules["torch"].get_num_threads())
    return versions


def short(value: Any) -> str:
    """`repr` of a value, 40 characters at most."""
    text = repr(value)
    return text if len(text) <= 40 else text[:16] + "…" + text[-3:]
