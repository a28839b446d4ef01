from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from memlm.errors import ArtifactError
from memlm.targets.shards import TRAIN_SCHEMA, VALIDATION_SCHEMA, check_rows, read_statistics, write_rows

ROW = {
    "input_ids": np.array([5, 6, 7], np.int32),
    "target_counts": np.array([0, 2, 1], np.int32),
    "target_ids": np.array([3, 4, 9], np.int32),
    "target_probs": np.array([0.5, 0.5, 1.0], np.float16),
}
HELD_OUT = {"input_ids": np.array([5, 6, 7], np.int32), "labels": np.array([-100, 6, 7], np.int32)}


def write(path: Path, schema: pa.Schema, *rows: dict[str, np.ndarray], **statistics: int) -> Path:
    write_rows(path, schema, rows, statistics)
    return path


@pytest.mark.parametrize("batch_rows", [1, 3, 7, 100])
def test_the_batch_of_rows_changes_nothing(batch_rows: int, tmp_path: Path) -> None:
    rows = [{**HELD_OUT, "input_ids": np.full(3, number, np.int32)} for number in range(7)]
    write_rows(tmp_path / "a.arrow", VALIDATION_SCHEMA, rows, batch_rows=batch_rows)
    with pa.memory_map(str(tmp_path / "a.arrow")) as file:
        batches = list(pa.ipc.open_stream(file))
    assert len(batches) == -(-7 // batch_rows)
    found = pa.Table.from_batches(batches).to_pylist()
    assert found == [{name: values.tolist() for name, values in row.items()} for row in rows]


def test_rows_are_found_good_and_their_statistics_read_back(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", TRAIN_SCHEMA, ROW, ROW, positions=4)
    check_rows(path, TRAIN_SCHEMA, 10)
    assert read_statistics(path) == {"positions": 4}
    with pa.memory_map(str(path)) as file:
        assert pa.ipc.open_stream(file).read_all().column("target_ids").to_pylist() == [[3, 4, 9]] * 2
    check_rows(write(tmp_path / "b.arrow", VALIDATION_SCHEMA, HELD_OUT), VALIDATION_SCHEMA, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_counts": [0, 2, 2]}, "target_ids do not fit target_counts"),
        ({"target_counts": [0, 4, -1]}, "target_counts do not fit input_ids"),
        ({"target_counts": [0, 3]}, "target_counts do not fit input_ids"),
        ({"target_counts": [1, 1, 1]}, "predicts its first token"),
        ({"target_probs": [0.5, 0.5]}, "target_probs do not fit target_counts"),
        ({"target_ids": [3, 4, 10]}, "token id 10, outside the vocabulary of 10"),
        ({"input_ids": [5, -6, 7]}, "token id -6, outside"),
    ],
)
def test_rows_whose_lists_do_not_fit_are_refused(tmp_path: Path, change: dict[str, list], message: str) -> None:
    changed = {name: np.array(values, ROW[name].dtype) for name, values in change.items()}
    path = write(tmp_path / "a.arrow", TRAIN_SCHEMA, ROW, {**ROW, **changed})
    with pytest.raises(ArtifactError, match=message):
        check_rows(path, TRAIN_SCHEMA, 10)


def test_labels_are_the_tokens_themselves(tmp_path: Path) -> None:
    for labels, message in (([-100, 6, 5], "labels do not fit"), ([5, 6, 7], "predicts its first token")):
        path = write(tmp_path / "a.arrow", VALIDATION_SCHEMA, {**HELD_OUT, "labels": np.array(labels, np.int32)})
        with pytest.raises(ArtifactError, match=message):
            check_rows(path, VALIDATION_SCHEMA, 8)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_shard_is_refused_before_it_is_unpacked(tmp_path: Path, codec: str) -> None:
    zeros = pa.ListArray.from_arrays(pa.array([0, 10_000_000], pa.int32()), pa.array(np.zeros(10_000_000, np.int32)))
    batch = pa.record_batch([zeros, zeros], schema=VALIDATION_SCHEMA)
    path = tmp_path / "bomb.arrow"
    with pa.OSFile(str(path), "wb") as file:
        with pa.ipc.new_stream(file, VALIDATION_SCHEMA, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_batch(batch)
    assert path.stat().st_size < 1 << 20
    before = pa.total_allocated_bytes()
    with pytest.raises(ArtifactError, match="its buffers are compressed"):
        check_rows(path, VALIDATION_SCHEMA, 8)
    assert pa.total_allocated_bytes() == before


def test_other_columns_or_values_that_are_missing_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", VALIDATION_SCHEMA, HELD_OUT)
    with pytest.raises(ArtifactError, match="its columns or types are of another stage"):
        check_rows(path, TRAIN_SCHEMA, 10)
    batch = pa.record_batch([[[1, None]], [[-100, 1]]], schema=VALIDATION_SCHEMA)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, VALIDATION_SCHEMA) as writer:
        writer.write_batch(batch)
    with pytest.raises(ArtifactError, match="missing values"):
        check_rows(path, VALIDATION_SCHEMA, 8)
