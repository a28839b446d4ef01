"""Documents from files, folders and Hugging Face datasets."""

import codecs
import contextlib
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import zstandard

from memlm.corpus.config import CorpusConfig
from memlm.corpus.pages import page_text
from memlm.errors import ArtifactError, InputError, reason_of
from memlm.files import digest, file_digest, file_error, near_here, read_json, utf8
from memlm.manifest import IDENTITY, MANIFEST, MANIFEST_BYTES, PLAN

TEXT = (".txt", ".md", ".rst")
FORMATS = (*TEXT, ".jsonl", ".json", ".parquet", ".html", ".htm")
COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 20
_PACKED = 1 << 10  # bytes of zstd unpacked at a time: at most 32 MB come of them
_ROWS = 64  # of Parquet at a time, for one may be long
_SIDE_FILES = ("__macosx", "thumbs.db", "desktop.ini")  # what systems leave beside files, with those that start with .
_SAVED = ("state.json", "dataset_dict.json")  # by `datasets`
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


@dataclass
class Met:
    """What is to be told of a search and a reading, beside their documents."""

    found: set[str] = field(default_factory=set)
    """Sources that nobody named, but that were found in a folder."""
    skipped: list[str] = field(default_factory=list)
    """What else is in folders, and files that were not read, for they hold nothing that is known."""
    empty: int = 0
    """Documents that are missing (null) or blank."""
    text_files: int = 0
    """Files that a separator may cut."""
    separators: int = 0
    """Separators in them."""


def text_format(path: Path) -> str | None:
    """The format of a file by its name, looking through .gz and .zst; None where it is not one of `FORMATS`."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def listed(places: str | Path | Iterable[str | Path] | None) -> list[str]:
    """One place, several or none, as a list of strings."""
    return [str(place) for place in ([places] if isinstance(places, str | Path) else places or ())]


def find_sources(places: Iterable[str], met: Met | None = None) -> list[str]:
    """Files in `places`, folders searched in sorted order; dataset names and dataset folders stay as they are.

    Hidden files, and what systems leave beside others, are left out of folders. `met` is told what is in them.

    Raises:
        InputError: A folder holds no readable file, cannot be read or is memlm's own, or a file has an unknown format.
    """
    sources, met = [], Met() if met is None else met
    for place in places:
        path = Path(place)
        try:
            if path.is_dir() and _is_ours(path):
                raise InputError(f"{place} is a folder that memlm wrote; name the documents themselves")
            if path.is_dir() and not any((path / name).is_file() for name in _SAVED):
                sources += _search(path, met)
            elif path.is_file() and text_format(path) is None:
                known = ", ".join(FORMATS)
                raise InputError(f"{place} has an unknown format; known: {known}, each also as .gz or .zst")
            else:
                sources.append(place)
        except OSError as error:
            raise InputError(f"{str(error.filename or place)[:200]}: {error.strerror}") from None
    if not sources:
        raise InputError("no documents were named")
    return sources


def _search(folder: Path, met: Met) -> list[str]:
    """The files in a folder."""

    def stop(error: OSError) -> None:
        raise error

    paths = []
    for where, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not _is_ours(Path(where, name))]
        links = [name for name in folders if Path(where, name).is_symlink()]
        paths += [Path(where, name) for name in (*names, *links)]
    known = []
    for path in sorted(paths):
        inside = path.relative_to(folder)
        if any(part.startswith(".") or part.lower() in _SIDE_FILES for part in inside.parts):
            continue
        if path.is_file() and text_format(path):
            known.append(str(path))
        else:
            met.skipped.append(utf8(str(Path(folder.name, inside))))
    if not known:
        raise InputError(f"folder {folder} holds no {', '.join(FORMATS)} file (.gz and .zst are read too)")
    met.found.update(known)
    return known


def _is_ours(folder: Path) -> bool:
    """Whether a stage has made a folder, or has begun: what is in it are no documents."""
    for name in (MANIFEST, PLAN):
        with contextlib.suppress(ArtifactError):
            found = read_json(folder / name, limit=MANIFEST_BYTES) if (folder / name).is_file() else None
            if isinstance(found, dict) and set(IDENTITY) <= set(found):
                return True
    return False


def source_digest(sources: list[str]) -> str:
    """A hash of everything `sources` hold: bytes of files, fingerprints of datasets."""
    return digest([[Path(s).name, file_digest(Path(s)) if Path(s).is_file() else _fingerprint(s)] for s in sources])


def read_documents(sources: Iterable[str], config: CorpusConfig, met: Met | None = None) -> Iterator[Document]:
    """Every non-empty document of `sources`, in order, surrounding white space removed.

    Args:
        sources: From `find_sources`.
        config: Which column, encoding and separator.
        met: Told what there is beside documents.

    Raises:
        InputError: A file is damaged or not in the configured encoding, a line is no JSON object, the text column is
            missing, a text is longer than `max_document_characters` or holds what is no text.
    """
    met = Met() if met is None else met
    for source in sources:
        path = Path(source)
        label = utf8(path.name if path.is_file() else source)
        for number, (place, text) in enumerate(_rows(source, config, met)):
            if text is None:
                met.empty += 1
                continue
            if not isinstance(text, str):
                raise InputError(
                    f"{source}: column {config.text_column!r} holds {type(text).__name__}, not text;"
                    " name the right one with --text-column"
                )
            if len(text) > config.max_document_characters:
                raise _too_long(source, config, place)
            if not text.isascii() and (half := _SURROGATE.search(text)):
                raise InputError(
                    f"{source}{place} holds half a surrogate pair (\\u{ord(half.group()):04x}), which is no character;"
                    " correct it or leave it out"
                )
            if text := text.strip():
                yield Document(f"{label}#{number}", text)
            else:
                met.empty += 1


def _rows(source: str, config: CorpusConfig, met: Met) -> Iterator[tuple[str, Any]]:
    """What should be texts, each with its place in the source, such as ` line 3`."""
    path = Path(source)
    try:
        if not path.is_file():
            yield from _saved(path, config.text_column) if path.is_dir() else _hub_rows(source, config.text_column)
            return
        with _open(path) as stream:
            if text_format(path) == ".parquet":
                yield from _parquet(stream, path, config)
            else:
                yield from _decoded(stream, path, config, met)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{source} cannot be decompressed: {error}") from None
    except MemoryError:
        raise InputError(f"{source} is too large for the memory here; split it into smaller files") from None
    except OSError as error:
        raise file_error(error, source) from None


def _decoded(stream: IO[bytes], path: Path, config: CorpusConfig, met: Met) -> Iterator[tuple[str, Any]]:
    try:
        encoding = codecs.lookup(config.encoding).name
        text = io.TextIOWrapper(stream, encoding="utf-8-sig" if encoding == "utf-8" else encoding)  # drops a mark
    except (LookupError, ValueError):
        raise InputError(f"encoding {config.encoding!r} is unknown") from None
    kind = text_format(path)
    try:
        with text:
            if kind == ".jsonl":
                yield from _jsonl(text, path, config)
            elif kind == ".json":
                yield from _json(text, path, config, met)
            elif kind in TEXT:
                met.text_files += 1
                limit = config.max_document_characters
                for number, part in enumerate(split_documents(text, config.document_separator, limit=limit)):
                    met.separators += number > 0
                    yield f" document {number + 1}", part
            else:
                yield "", page_text(_whole(text, path, config))
    except UnicodeError as error:
        reason, other = str(error), "utf-16-le"
        if isinstance(error, UnicodeDecodeError):
            reason, other = f"{error.reason} 0x{error.object[error.start]:02x}", "latin-1"
            other = "utf-16" if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else other
        raise InputError(
            f"{path} is not {config.encoding} ({reason}); name its encoding with --encoding, such as --encoding {other}"
        ) from None


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_Chunks(_unpacked(path)))
    return path.open("rb")


def _unpacked(path: Path) -> Iterator[bytes]:
    """The content of a .zst file, all frames of it. zstandard's own reader ends quietly where a file was cut off."""
    with path.open("rb") as file:
        frame, packed = None, b""
        while packed := packed or file.read(_PACKED):
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(packed)
            packed = b""
            if frame.eof:
                packed, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it was cut off")


class _Chunks(io.RawIOBase):
    """Chunks of bytes as one file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = filter(None, chunks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def split_documents(
    text: IO[str], separator: str | None, *, chunk_size: int = _CHUNK, limit: int = 1 << 40
) -> Iterator[str]:
    """What stands between separators, read `chunk_size` characters at a time; the whole text if `separator` is None.

    No more is read of a document than one chunk beyond `limit` characters, where it ends.
    """
    held, size, rest = [], 0, ""  # of the document that has begun; `rest` may hold the start of a separator
    while chunk := text.read(chunk_size):
        first, *others = (rest + chunk).split(separator) if separator else [rest + chunk]
        if others:
            yield "".join([*held, first])
            yield from others[:-1]
            held, size, first = [], 0, others[-1]
        kept = len(separator) - 1 if separator else 0
        cut = max(0, len(first) - kept)
        held.append(first[:cut])
        size, rest = size + cut, first[cut:]
        if size > limit:
            break
    yield "".join([*held, rest])


def _whole(text: IO[str], path: Path, config: CorpusConfig) -> str:
    """The whole of a file that is one document, or JSON."""
    found = text.read(config.max_document_characters + 1)
    if len(found) > config.max_document_characters:
        raise _too_long(path, config)
    return found


def _too_long(source: str | Path, config: CorpusConfig, place: str = "") -> InputError:
    cure = "raise --max-document-characters"
    if config.document_separator is None and text_format(Path(source)) in TEXT:
        cure = f"name what stands between its documents with --document-separator, or {cure}"
    return InputError(f"{source}{place} has more than {config.max_document_characters:,} characters; {cure}")


def _jsonl(text: IO[str], path: Path, config: CorpusConfig) -> Iterator[tuple[str, Any]]:
    number, limit = 0, config.max_document_characters
    while line := text.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise _too_long(path, config, f" line {number}")
        if line.strip():
            value = _parse(line, f"{path} line {number}")
            yield f" line {number}", _field(value, f"{path} line {number}", config.text_column)


def _json(text: IO[str], path: Path, config: CorpusConfig, met: Met) -> Iterator[tuple[str, Any]]:
    """The texts of a list of strings or objects, or of one object; JSON Lines under this name are read as such."""
    whole, column = _whole(text, path, config), config.text_column
    if not whole.strip():
        return
    try:
        value = json.loads(whole)
    except (RecursionError, ValueError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg.startswith("Extra data"):
            yield from _jsonl(io.StringIO(whole), path, config)
            return
        value = _parse(whole, str(path))
    one = not isinstance(value, list)
    rows = [value] if one else value
    texts = [row for row in rows if isinstance(row, str | None) or (isinstance(row, dict) and column in row)]
    if str(path) in met.found and not texts:  # a file of something else, that nobody named
        met.skipped.append(utf8(path.name))
        return
    for number, row in enumerate(rows, start=1):
        place = "" if one else f" item {number}"
        yield place, row if isinstance(row, str | None) else _field(row, f"{path}{place}", column)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where} is not JSON: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None


def _field(row: Any, where: str, column: str) -> str | None:
    """The text of an object; None where it is null."""
    if not isinstance(row, dict) or not isinstance(row.get(column, 0), str | None):
        known = ", ".join(row) if isinstance(row, dict) else "none"
        raise InputError(f"{where} has no text in {column!r} (keys: {utf8(known[:200])}); name it with --text-column")
    return row[column]


def _parquet(stream: IO[bytes], path: Path, config: CorpusConfig) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = config.text_column
    if path.suffix.lower() != ".parquet":  # Parquet is read from its end, so a packed one is unpacked whole
        content = stream.read(config.max_document_characters + 1)
        if len(content) > config.max_document_characters:
            raise InputError(
                f"{path} unpacks to more than {config.max_document_characters:,} bytes; unpack it before, or raise"
                " --max-document-characters"
            )
        stream = io.BytesIO(content)
    number = 0
    try:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        _check_column(column, names, str(path), "; name it with --text-column")
        if pa.types.is_nested(kind := file.schema_arrow.field(column).type):
            raise InputError(f"{path}: column {column!r} holds {kind}, not text; name another with --text-column")
        # a text that is kept once, for many rows, is not unpacked for each of them
        file = pq.ParquetFile(stream, metadata=file.metadata, read_dictionary=[column])
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            for value in batch.column(0):
                number += 1
                yield f" row {number}", value.as_py()
    except UnicodeDecodeError:
        raise InputError(f"{path} row {number} is not UTF-8, as Parquet's texts are") from None
    except (pa.ArrowException, OSError, ValueError, TypeError, EOFError) as error:
        if isinstance(error, InputError | pa.ArrowMemoryError):
            raise
        raise InputError(f"{path} is not Parquet: {reason_of(error)}") from None


def _saved_files(folder: Path) -> tuple[list[Path], str]:
    """The Arrow files of a dataset that `save_to_disk` wrote, of several splits the training one, and its fingerprint.

    Raises:
        InputError: There is none.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = read_json(folder / "dataset_dict.json")["splits"]
            folder = folder / ("train" if "train" in splits else splits[0])
        state = read_json(folder / "state.json")
        names, fingerprint = [file["filename"] for file in state["_data_files"]], state["_fingerprint"]
        if state.get("_indices_data_files") or not isinstance(fingerprint, str):
            raise ValueError("of an old version")
        if not all((folder / name).is_file() and Path(name).name == name for name in names):
            raise ValueError("files are missing")
    except (ArtifactError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{folder} is no dataset that `datasets` saved ({reason_of(error)})") from None
    return [folder / name for name in names], fingerprint


def _saved(folder: Path, column: str) -> Iterator[tuple[str, Any]]:
    """The column of a saved dataset; other columns are not unpacked."""
    import pyarrow as pa

    number = 0
    for path in _saved_files(folder)[0]:
        try:
            with pa.memory_map(str(path)) as file:
                names = pa.ipc.open_stream(file).schema.names
                _check_column(column, names, f"dataset {folder}")
                file.seek(0)
                options = pa.ipc.IpcReadOptions(included_fields=[names.index(column)])
                for batch in pa.ipc.open_stream(file, options=options):
                    for value in batch.column(0):
                        number += 1
                        yield f" row {number}", value.as_py()
        except UnicodeDecodeError:
            raise InputError(f"{path} row {number} is not UTF-8, as Arrow's texts are") from None
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, InputError | pa.ArrowMemoryError):
                raise
            raise InputError(f"{path} cannot be read as Arrow: {reason_of(error)}") from None


def _check_column(column: str, names: list[str], where: str, cure: str = "") -> None:
    if column not in names:
        raise InputError(f"{where} has no column {column!r} (columns: {', '.join(names)[:200]}){cure}")


def _hub_rows(source: str, column: str) -> Iterator[tuple[str, Any]]:
    dataset = _from_hub(source)
    _check_column(column, dataset.column_names, f"dataset {source}")
    for number, row in enumerate(dataset.select_columns([column]), start=1):
        yield f" row {number}", row[column]


def _fingerprint(source: str) -> str:
    return _saved_files(Path(source))[1] if Path(source).is_dir() else _from_hub(source)._fingerprint


def _from_hub(source: str) -> Any:
    """A `datasets.Dataset`, named as `name[:config[:split]]`."""
    import datasets

    name, _, rest = source.partition(":")
    subset, _, split = rest.partition(":")
    try:
        return datasets.load_dataset(name, subset or None, split=split or "train")
    except Exception as error:
        raise InputError(
            f"{source!r} is no file or folder here and could not be loaded as a dataset ({reason_of(error)})"
            f"{near_here(name)}"
        ) from None
