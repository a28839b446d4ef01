import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.corpus.config import CorpusConfig
from memlm.corpus.readers import find_sources, read_documents, source_digest, split_documents
from memlm.errors import InputError

TEXTS = ["first document\nof two lines", "second: naïve 北京"]


def read(*places: Path | str, **config: object) -> list[str]:
    return [d.text for d in read_documents(find_sources([str(p) for p in places]), CorpusConfig.parse(config))]


def parquet_bytes(column: str = "text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({column: [*TEXTS, None, ""], "n": [1, 2, 3, 4]}), sink)
    return sink.getvalue()


CONTENT = {
    ".txt": "\n\n".join(TEXTS).encode(),
    ".md": "\n\n".join(TEXTS).encode(),
    ".jsonl": "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in [*TEXTS, " "]).encode() + b"\n",
    ".parquet": parquet_bytes(),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("kind", CONTENT)
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"documents{kind}{packing}"
    path.write_bytes(PACKED[packing](CONTENT[kind]))
    assert read(path, document_separator="\n\n") == TEXTS


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("kind", CONTENT)
def test_a_truncated_packed_file_is_named(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"documents{kind}{packing}"
    content = PACKED[packing](CONTENT[kind])
    path.write_bytes(content[: len(content) - 9])
    with pytest.raises(InputError, match=f"documents{kind}{packing}"):
        read(path, document_separator="\n\n")
    path.write_bytes(b"not packed at all")
    with pytest.raises(InputError, match=f"documents{kind}{packing}"):
        read(path, document_separator="\n\n")


def test_a_zst_file_of_several_frames_is_read_whole(tmp_path: Path) -> None:
    frames = [PACKED[".zst"](part) for part in (b"first ", b"", b"second ", b"third")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "a.txt.zst") == ["first second third"]


def test_a_file_without_separator_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n one\n\n\ntwo \n")
    assert read(tmp_path / "a.txt") == ["one\n\n\ntwo"]


def test_a_folder_is_read_whole_and_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("three")
    (tmp_path / "a.md").write_text("two")
    (tmp_path / "B.TXT").write_text("one")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == ["one", "two", "three"]
    documents = list(read_documents(find_sources([str(tmp_path)]), CorpusConfig()))
    assert [d.name for d in documents] == ["B.TXT#0", "a.md#0", "x.txt#0"]


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_saved_dataset_is_read_from_its_folder(tmp_path: Path, as_dict: bool) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"body": [*TEXTS, ""], "n": [1, 2, 3]})
    held_out = datasets.Dataset.from_dict({"body": ["held out"]})
    (datasets.DatasetDict(validation=held_out, train=rows) if as_dict else rows).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", text_column="body") == TEXTS
    with pytest.raises(InputError, match=r"has no column 'text' \(columns: body"):
        read(tmp_path / "saved")


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="ab\n", max_size=60),
    chunk=st.integers(1, 9),
    separator=st.sampled_from(["\n\n", "\n\n\n", "aba"]),
)
def test_separators_across_chunk_edges_are_seen(text: str, chunk: int, separator: str) -> None:
    assert list(split_documents(io.StringIO(text), separator, chunk_size=chunk)) == text.split(separator)


def test_windows_line_ends_separate_documents_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree")
    assert read(tmp_path / "a.txt", document_separator="\n\n") == ["one\ntwo", "three"]


@pytest.mark.parametrize("name", ["old.txt", "old.jsonl", "old.txt.gz"])
def test_a_file_in_another_encoding_is_named_and_the_flag_offered(tmp_path: Path, name: str) -> None:
    content = '{"text": "naïve"}' if "jsonl" in name else "naïve"
    raw = content.encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(InputError, match=r"old.* is not utf-8 \(.*0xef\).*--encoding latin-1"):
        read(tmp_path / name)
    assert read(tmp_path / name, encoding="latin-1") == ["naïve"]
    with pytest.raises(InputError, match="encoding 'utf-9' is unknown"):
        read(tmp_path / name, encoding="utf-9")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ('{"body": "a", "id": 1}', r"line 1 has no text in 'text' \(keys: body, id\); name it with --text-column"),
        ('{"text": 3}', "line 1 has no text in 'text'"),
        ("[1]", r"line 1 has no text in 'text' \(keys: none\)"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=rf"a\.jsonl {message}"):
        read(tmp_path / "a.jsonl")


def test_a_bad_parquet_file_or_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"a\.parquet is not Parquet"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(parquet_bytes("body"))
    with pytest.raises(InputError, match=r"b\.parquet has no column 'text' \(columns: body, n\)"):
        read(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", text_column="body") == TEXTS
    with pytest.raises(InputError, match=r"b\.parquet: column 'n' holds int, not text"):
        read(tmp_path / "b.parquet", text_column="n")


def test_what_cannot_be_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(InputError, match=r"a\.pdf has an unknown format; known: \.txt, \.md"):
        find_sources([str(tmp_path / "a.pdf")])
    with pytest.raises(InputError, match=r"holds no \.txt, \.md"):
        find_sources([str(tmp_path)])
    with pytest.raises(InputError, match="no documents were named"):
        find_sources([])
    with pytest.raises(
        InputError, match=r"'.*nothing\.txt' is no file or folder here and could not be loaded as a dataset"
    ):
        read(tmp_path / "nothing.txt")


def test_the_digest_of_sources_changes_with_their_bytes_and_names_alone(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("same")
    first = source_digest([str(tmp_path / "a" / "x.txt")])
    assert source_digest([str(tmp_path / "b" / "x.txt")]) == first
    (tmp_path / "b" / "x.txt").write_text("else")
    assert source_digest([str(tmp_path / "b" / "x.txt")]) != first


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "second"}\n')
    assert read(tmp_path / "a.txt", tmp_path / "b.jsonl") == ["first", "second"]
