"""Documents from files, folders and Hugging Face datasets."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from memlm.corpus.config import CorpusConfig
from memlm.errors import InputError
from memlm.files import digest, file_digest

TEXT = (".txt", ".md")
FORMATS = (*TEXT, ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


def text_format(path: Path) -> str | None:
    """The format of a file by its name, looking through .gz and .zst; None where it is not one of `FORMATS`."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def find_sources(places: Iterable[str]) -> list[str]:
    """Files in `places`, folders searched in sorted order; dataset names and dataset folders stay as they are.

    Raises:
        InputError: A folder holds no readable file, or a file has an unknown format.
    """
    sources = []
    for place in places:
        path = Path(place)
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))  # by `datasets`
        if path.is_dir() and not saved:
            found = [str(p) for p in sorted(path.rglob("*")) if p.is_file() and text_format(p)]
            if not found:
                raise InputError(f"folder {place} holds no {', '.join(FORMATS)} file (.gz and .zst are read too)")
            sources += found
        elif path.is_file() and text_format(path) is None:
            raise InputError(f"{place} has an unknown format; known: {', '.join(FORMATS)}, each also as .gz or .zst")
        else:
            sources.append(place)
    if not sources:
        raise InputError("no documents were named")
    return sources


def source_digest(sources: list[str]) -> str:
    """A hash of everything `sources` hold: bytes of files, fingerprints of datasets."""
    return digest(
        [[Path(s).name, file_digest(Path(s)) if Path(s).is_file() else _dataset(s)._fingerprint] for s in sources]
    )


def read_documents(sources: list[str], config: CorpusConfig) -> Iterator[Document]:
    """Every non-empty document of `sources`, in order, surrounding white space removed.

    Raises:
        InputError: A file is not in the configured encoding, a line is no JSON object, or the text column is missing.
    """
    for source in sources:
        path = Path(source)
        texts = _read_file(path, config) if path.is_file() else _column(_dataset(source), config.text_column, source)
        label = path.name if path.is_file() else source
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(
                    f"{source}: column {config.text_column!r} holds {type(text).__name__}, not text;"
                    " name the right one with --text-column"
                )
            text = text.strip()
            if text:
                yield Document(f"{label}#{number}", text)


def _read_file(path: Path, config: CorpusConfig) -> Iterator[Any]:
    try:
        with _open(path) as stream:
            if text_format(path) == ".parquet":
                yield from _parquet(stream, path, config.text_column)
            else:
                yield from _decoded(stream, path, config)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{path} cannot be decompressed: {error}") from None


def _decoded(stream: IO[bytes], path: Path, config: CorpusConfig) -> Iterator[str]:
    try:
        encoding = "utf-8-sig" if config.encoding.lower() in ("utf-8", "utf8") else config.encoding  # drops a mark
        text = io.TextIOWrapper(stream, encoding=encoding, newline=None)
    except LookupError:
        raise InputError(f"encoding {config.encoding!r} is unknown") from None
    try:
        with text:
            if text_format(path) == ".jsonl":
                yield from _jsonl(text, path, config.text_column)
            else:
                yield from split_documents(text, config.document_separator)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not {config.encoding} ({error.reason} 0x{error.object[error.start]:02x});"
            " name its encoding with --encoding, such as --encoding latin-1"
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
        while packed := packed or file.read(_CHUNK):
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
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._chunks, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def split_documents(text: IO[str], separator: str | None, *, chunk_size: int = _CHUNK) -> Iterator[str]:
    """What stands between separators, read `chunk_size` characters at a time; the whole text if `separator` is None."""
    if separator is None:
        yield text.read()
        return
    rest = ""
    while chunk := text.read(chunk_size):
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    yield rest


def _jsonl(text: IO[str], path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            known = ", ".join(row) if isinstance(row, dict) else "none"
            raise InputError(
                f"{path} line {number} has no text in {column!r} (keys: {known}); name it with --text-column"
            )
        yield row[column]


def _parquet(stream: IO[bytes], path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(
            stream if stream.seekable() and path.suffix == ".parquet" else pa.BufferReader(stream.read())
        )
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not Parquet: {error}") from None
    names = file.schema_arrow.names
    if column not in names:
        raise InputError(f"{path} has no column {column!r} (columns: {', '.join(names)}); name it with --text-column")
    for batch in file.iter_batches(columns=[column]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _column(dataset: Any, column: str, source: str) -> Iterator[str]:
    if column not in dataset.column_names:
        raise InputError(f"dataset {source} has no column {column!r} (columns: {', '.join(dataset.column_names)})")
    for row in dataset.select_columns([column]):
        if row[column]:
            yield row[column]


def _dataset(source: str) -> Any:
    """A `datasets.Dataset` from a folder written by `save_to_disk`, or from the hub as `name[:config[:split]]`."""
    import datasets

    if Path(source).is_dir():
        found = datasets.load_from_disk(source)
        if isinstance(found, datasets.DatasetDict):
            found = found["train"] if "train" in found else next(iter(found.values()))
        return found
    name, _, rest = source.partition(":")
    subset, _, split = rest.partition(":")
    try:
        return datasets.load_dataset(name, subset or None, split=split or "train")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{source!r} is no file or folder here and could not be loaded as a dataset ({reason})"
        ) from None
