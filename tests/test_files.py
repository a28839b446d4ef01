from pathlib import Path

import numpy as np
import pytest

from memlm.errors import ArtifactError
from memlm.files import cache_dir, load_array, replacing


def test_an_array_is_read_where_its_header_is_as_expected(tmp_path: Path) -> None:
    for array, shape in ((np.arange(6, dtype=np.int32), (None,)), (np.ones((2, 3), np.float16), (2, None))):
        np.save(tmp_path / "a.npy", array)
        for mapped in (False, True):
            found = load_array(tmp_path / "a.npy", array.dtype.type, shape, mapped=mapped)
            assert isinstance(found, np.memmap) == mapped
            np.testing.assert_array_equal(found, array)
    np.save(tmp_path / "a.npy", np.empty(0, np.int64))
    assert load_array(tmp_path / "a.npy", np.int64, mapped=True).shape == (0,)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(6), "holds <i8 of shape 6, expected <i4 of shape any"),
        (np.zeros((2, 3), np.int32), "holds <i4 of shape 2 x 3"),
        (np.asfortranarray(np.zeros((2, 3), np.int32)), "is no array"),
        (np.zeros(3, [("a", np.int32)]), "is no array"),
        (np.zeros(3, ">i4"), "is no array"),
        (np.array(["x"]), "holds <U1 of shape 1"),
        (np.int32(3), "is no array"),
    ],
)
def test_an_array_of_another_type_or_shape_is_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ArtifactError, match=message):
        load_array(tmp_path / "a.npy", np.int32)


def test_an_array_of_objects_or_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(ArtifactError, match="is no array"):
        load_array(path, np.int32)
    np.save(path, np.arange(6, dtype=np.int32))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(6,), }", b"(9999999999999999,), }", 1).replace(b" " * 15 + b"\n", b"\n", 1))
    with pytest.raises(ArtifactError, match=r"has 152 bytes, which its shape \(9999999999999999,\) does not fit"):
        load_array(path, np.int32)
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="has 151 bytes"):
        load_array(path, np.int32)


def test_the_cache_is_where_memlm_home_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLM_HOME", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MEMLM_HOME")
    assert cache_dir() == Path.home() / ".cache" / "memlm"


def test_two_who_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"  # the one that was done last
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]
