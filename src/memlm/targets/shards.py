"""Rows of a targets folder as Arrow streams: written shard by shard, and checked before they are read."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memlm.corpus.blocks import IGNORE, check_ids
from memlm.errors import ArtifactError

TRAIN_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "target_counts": pa.list_(pa.int32()),
        "target_ids": pa.list_(pa.int32()),
        "target_probs": pa.list_(pa.float16()),
    }
)
VALIDATION_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
VALIDATION_FILE = "validation.arrow"
_STATISTICS = b"memlm"  # key of a shard's statistics in its schema's metadata
_COMPRESSION = 3  # number of the field in the flatbuffer table `RecordBatch`


def write_rows(
    path: Path,
    schema: pa.Schema,
    rows: Iterable[dict[str, NDArray]],
    statistics: dict[str, Any] | None = None,
    *,
    batch_rows: int = 64,
) -> None:
    """Write an Arrow stream.

    Args:
        path: The file.
        schema: `TRAIN_SCHEMA` or `VALIDATION_SCHEMA`.
        rows: Column name to array, for each row.
        statistics: What `read_statistics` gives back.
        batch_rows: Rows in a record batch.
    """
    if statistics is not None:
        schema = schema.with_metadata({_STATISTICS: json.dumps(statistics)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        left = iter(rows)
        while batch := list(itertools.islice(left, batch_rows)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def read_statistics(path: Path) -> dict[str, Any]:
    """The statistics written with a shard."""
    with pa.memory_map(str(path)) as file:
        return json.loads(pa.ipc.open_stream(file).schema.metadata[_STATISTICS])


def check_rows(path: Path, schema: pa.Schema, vocab_size: int) -> None:
    """Raise unless the file holds rows of this schema whose lists fit each other and the vocabulary.

    Every buffer is held against the file's size. A compressed one is refused before it is unpacked, for it may unpack
    to any size.

    Raises:
        ArtifactError: It does not.
    """
    try:
        for batch in _batches(path, schema):
            batch.validate(full=True)
            columns = [_lists(column) for column in batch.columns]
            _check_fit(dict(zip(schema.names, columns, strict=True)), vocab_size, path)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ArtifactError(f"{path} cannot be read as Arrow: {reason}; rebuild the targets") from None


def _batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file:
        for message in pa.ipc.MessageReader.open_stream(file):
            if message.type == "record batch" and _is_compressed(message.metadata):
                raise ValueError("its buffers are compressed, which no stage does")
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_stream(file)
        found = reader.schema  # serialized, for `equals` overlooks the names of what is in a list
        if found.remove_metadata().serialize() != schema.serialize() or set(found.metadata or {}) - {_STATISTICS}:
            raise ValueError("its columns or types are of another stage")
        yield from reader


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Whether a record batch says so, read from its flatbuffer; pyarrow tells only after it has unpacked it.

    A flatbuffer's table starts with the distance to its list of fields, two bytes per field: 0 where it is left out,
    else where it stands in the table.

    Source: the FlatBuffers internals page; `Message.fbs` and `Schema.fbs` of Arrow.
    """
    content = memoryview(metadata)

    def number(at: int, size: int, *, signed: bool = False) -> int:
        if not 0 <= at <= len(content) - size:
            raise ValueError("a message's metadata is damaged")
        return int.from_bytes(content[at : at + size], "little", signed=signed)

    def field(table: int, position: int) -> int:
        """Where the field stands; 0 where it is left out."""
        fields = table - number(table, 4, signed=True)
        if number(fields, 2) <= 4 + 2 * position:
            return 0
        offset = number(fields + 4 + 2 * position, 2)
        return table + offset if offset else 0

    header = field(number(0, 4), 2)
    return not header or field(header + number(header, 4), _COMPRESSION) != 0


def _lists(column: pa.ListArray) -> tuple[NDArray[np.int32], NDArray]:
    """Where a column's lists end and begin, from 0, and what they hold one after another."""
    if column.null_count or column.values.null_count:
        raise ValueError("it has missing values")
    offsets = column.offsets.to_numpy()
    return offsets - offsets[0], column.flatten().to_numpy(zero_copy_only=True)


def _check_fit(columns: dict[str, tuple[NDArray[np.int32], NDArray]], vocab_size: int, path: Path) -> None:
    starts, input_ids = columns["input_ids"]
    check_ids(input_ids, vocab_size, path)
    if "labels" in columns:
        label_starts, labels = columns["labels"]
        predicted = labels != IGNORE
        if (label_starts != starts).any() or (labels[predicted] != input_ids[predicted]).any():
            raise ValueError("labels do not fit input_ids")
        firsts = predicted[starts[:-1][np.diff(starts) > 0]]
    else:
        count_starts, counts = columns["target_counts"]
        ends = np.append(0, counts.cumsum(dtype=np.int64))
        if (count_starts != starts).any() or (len(counts) and counts.min() < 0):
            raise ValueError("target_counts do not fit input_ids")
        for name in ("target_ids", "target_probs"):
            if (columns[name][0] != ends[starts]).any():
                raise ValueError(f"{name} do not fit target_counts")
        check_ids(columns["target_ids"][1], vocab_size, path)
        firsts = counts[starts[:-1][np.diff(starts) > 0]]
    if firsts.any():
        raise ValueError("a row predicts its first token")
