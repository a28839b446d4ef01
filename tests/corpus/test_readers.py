import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.corpus.config import CorpusConfig
from memlm.corpus.pages import page_text
from memlm.corpus.readers import FORMATS, Met, find_sources, read_documents, source_digest, split_documents
from memlm.errors import ArtifactError, InputError, MemlmError

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
    ".rst": "\n\n".join(TEXTS).encode(),
    ".json": json.dumps([TEXTS[0], {"text": TEXTS[1], "n": 1}, {"text": None}, None, " "]).encode(),
    ".jsonl": "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in [*TEXTS, None, " "]).encode() + b"\n",
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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_file_whose_first_bytes_tell_its_encoding_is_read_with_the_one_offered(tmp_path: Path, encoding: str) -> None:
    mark = "" if encoding == "utf-16" else "\ufeff"
    (tmp_path / "a.txt").write_bytes(f"{mark}naïve".encode(encoding))
    with pytest.raises(InputError, match=r"such as --encoding utf-16$"):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", encoding="utf-16") == ["naïve"]


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


def test_what_cannot_be_documents_is_refused(tmp_path: Path, corpus_folder: Path, memory_folder: Path) -> None:
    for ours in (corpus_folder, memory_folder):
        with pytest.raises(InputError, match="is a folder that memlm wrote; name the documents themselves"):
            find_sources([str(ours)])
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


# --- formats ------------------------------------------------------------------------------------------------------


def test_an_object_with_a_text_is_a_document_and_json_lines_under_its_name_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"id": 1, "text": "one"}, indent=2))
    (tmp_path / "b.json").write_text('{"text": "two"}\n{"text": "three"}\n')
    (tmp_path / "c.json").write_text("[]")
    (tmp_path / "d.json").write_text("")
    assert read(*(tmp_path / f"{name}.json" for name in "abcd")) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "a"}', r"a\.json has no text in 'text' \(keys: body\); name it with --text-column"),
        ('[{"text": "a"}, {"body": "a"}]', r"a\.json item 2 has no text in 'text' \(keys: body\)"),
        ('["a", 3]', r"a\.json item 2 has no text in 'text' \(keys: none\)"),
        ('{"text": ["a"]}', r"a\.json has no text in 'text'"),
        ("3", r"a\.json has no text"),
        ('["a", ', r"a\.json is not JSON"),
        ("[" + 5000 * "1" + "]", r"a\.json is not JSON: Exceeds the limit"),
        ('{"text": "a"}\n{"text": ', r"a\.json line 2 is not JSON"),
    ],
)
def test_json_that_holds_no_texts_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.json")


def test_json_of_something_else_is_skipped_in_a_folder_and_told_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "package.json").write_text('{"name": "x", "scripts": {}}')
    (tmp_path / "b.json").write_text('{"text": "two"}')
    met = Met()
    sources = find_sources([str(tmp_path)], met)
    assert [d.text for d in read_documents(sources, CorpusConfig(), met)] == ["one", "two"]
    assert met.skipped == ["package.json"]


PAGE = """<!DOCTYPE html><html><head><title>On  memory</title><style>p { color: red }</style>
<script>if (1 < 2) alert("no")</script></head><body><!-- note --><h1>Heading</h1>
<p>First &amp; <b>bo</b>ld,
 wrapped&nbsp;line.</p><p>Second<br>line</p><ul><li>one<li>two</ul>
<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table><pre>x = 1
    y</pre><template>no</template>end</body></html>"""


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", ["page.html", "PAGE.HTM"])
def test_of_a_page_its_text_is_read(tmp_path: Path, name: str, packing: str) -> None:
    (tmp_path / f"{name}{packing}").write_bytes(PACKED[packing](PAGE.encode()))
    (found,) = read(tmp_path / f"{name}{packing}", document_separator="\n\n")
    first = "On memory\n\nHeading\n\nFirst & bold, wrapped line.\n\nSecond\nline\n\n"
    assert found == first + "one\ntwo\n\na b\nc\n\nx = 1\n    y\n\nend"


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from(["<p>", "</p>", "<pre>", "<b", ">", "<![x", "]>", "<!", "<?", "&amp", "</script>", "a "]))
)
def test_no_page_breaks_its_reader(parts: list[str]) -> None:
    assert "<p>" not in page_text("".join(parts))


@pytest.mark.parametrize("unit", ["<", "<a ", "<!--", "</", '<a b="', "<![", "<?", "<!", "&", "<script>", "<pre>x"])
def test_no_page_takes_long(unit: str) -> None:
    before = time.process_time()
    assert page_text("<p>seen</p>" + unit * (200_000 // len(unit))).startswith("seen")
    assert time.process_time() - before < 5  # hours, where each tag is looked for to the end of the page


def test_an_unfinished_tag_takes_no_text_with_it() -> None:
    assert page_text("<p>one <a href='x>two</p><p>three") == "one <a href='x>two\n\nthree"
    assert page_text("one &amp; two &am") == "one & two &am"


# --- folders ------------------------------------------------------------------------------------------------------


def test_hidden_files_and_what_systems_leave_are_left_out_of_folders_and_others_are_named(tmp_path: Path) -> None:
    folder = tmp_path / ".hidden by its user"
    for name in ("a.txt", "deep/b.md", "deep/c.docx", "d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in (
        "._a.txt",
        ".DS_Store",
        "__MACOSX/a.txt",
        ".git/x.md",
        "deep/._b.md",
        "Thumbs.db",
        "deep/.cache/x.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    met = Met()
    sources = find_sources([str(folder)], met)
    assert [Path(source).name for source in sources] == ["a.txt", "b.md"]
    shown = [name.removeprefix(f"{folder.name}/") for name in met.skipped]
    assert shown == ["d.png", "deep/c.docx", "gone.txt", "linked"]
    assert read(folder) == ["a.txt", "deep/b.md"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if os.path.basename(path) == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)  # root may read everything
        with pytest.raises(InputError, match="secret: Permission denied"):
            find_sources([str(tmp_path)])


def test_a_text_given_instead_of_a_name_is_one_line() -> None:
    with pytest.raises(InputError, match="File name too long") as caught:
        find_sources(["word " * 1000])
    assert len(str(caught.value)) < 300


# --- what is missing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved"])
def test_a_missing_text_is_an_empty_document_in_every_format(tmp_path: Path, kind: str) -> None:
    import datasets

    rows: list[str | None] = ["one", None, " ", "two", ""]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps([{"text": row} for row in rows]))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": rows}), path)
    else:
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(path)
    met = Met()
    found = list(read_documents(find_sources([str(path)]), CorpusConfig(), met))
    assert [(document.name, document.text) for document in found] == [
        (f"{path if kind == 'saved' else path.name}#{number}", text) for number, text in ((0, "one"), (3, "two"))
    ]
    assert met.empty == 3


# --- separators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\r\n\r\n", "\n\n", "\r\r", "\r\n\n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_ends_of_lines_are_the_same_in_texts_and_separators(tmp_path: Path, separator: str, line_end: str) -> None:
    (tmp_path / "a.txt").write_bytes(f"one{line_end}two{line_end}{line_end}three".encode())
    met = Met()
    sources, config = find_sources([str(tmp_path / "a.txt")]), CorpusConfig(document_separator=separator)
    assert [d.text for d in read_documents(sources, config, met)] == ["one\ntwo", "three"]
    assert (met.text_files, met.separators) == (1, 1)


# --- what is no text ----------------------------------------------------------------------------------------------


def no_utf8(path: Path) -> None:
    ends = pa.array([0, 3, 6], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"abc\xff\xfe\xfd")])
    pq.write_table(pa.table({"text": texts}), path)


def corrupt(path: Path) -> None:
    pq.write_table(pa.table({"text": ["some words"] * 1000}), path)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)


def saved(path: Path, break_it: Callable[[Path], object]) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(path)
    break_it(path)


NO_TEXT: dict[str, tuple[Callable[[Path], object], str]] = {
    "half.jsonl": (lambda p: p.write_text('{"text": "a"}\n{"text": "\\ud800 b"}'), r"half\.jsonl line 2 holds half a"),
    "half.json": (lambda p: p.write_text(r'["a", "\udfff"]'), r"half\.json item 2 holds half a surrogate"),
    "key.json": (lambda p: p.write_text(r'{"\udfff": 1}'), r"key\.json has no text in 'text' \(keys: \\udfff\)"),
    "deep.jsonl": (lambda p: p.write_text('\n{"text": ' + "[" * 50_000), r"deep\.jsonl line 2 is not JSON: nested too"),
    "deep.json": (lambda p: p.write_text("[" * 50_000), r"deep\.json is not JSON: nested too deeply"),
    "no-utf8.parquet": (no_utf8, r"no-utf8\.parquet row 2 is not UTF-8"),
    "corrupt.parquet": (corrupt, r"corrupt\.parquet is not Parquet: "),
    "state": (lambda p: saved(p, lambda f: (f / "state.json").write_text("{}")), "state is no dataset that `datasets`"),
    "list": (lambda p: saved(p, lambda f: (f / "state.json").write_text("[]")), "list is no dataset that `datasets`"),
    "gone": (lambda p: saved(p, lambda f: next(f.glob("*.arrow")).unlink()), "gone is no dataset .*files are missing"),
    "cut": (
        lambda p: saved(p, lambda f: os.truncate(next(f.glob("*.arrow")), 200)),
        r"cut/.*\.arrow cannot be read as Arrow",
    ),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_named_with_its_place(tmp_path: Path, name: str) -> None:
    make, message = NO_TEXT[name]
    make(tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).encode()


def test_a_saved_dataset_leads_to_no_file_outside_of_it(tmp_path: Path) -> None:
    def lead_out(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        next(folder.glob("*.arrow")).rename(tmp_path / "other.arrow")
        (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": "../other.arrow"}]}))

    saved(tmp_path / "saved", lead_out)
    with pytest.raises(InputError, match="is no dataset that `datasets` saved"):
        read(tmp_path / "saved")


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf_16_without_a_mark_is_named_with_the_encoding_to_give(tmp_path: Path, order: str) -> None:
    (tmp_path / "a.txt").write_bytes("one two".encode(f"utf-16-{order}"))
    with pytest.raises(InputError, match=r"a\.txt is not utf-16 \(.*BOM\); .*--encoding utf-16-le"):
        read(tmp_path / "a.txt", encoding="utf-16")
    assert read(tmp_path / "a.txt", encoding=f"utf-16-{order}") == ["one two"]
    (tmp_path / "b.txt").write_text("one two", encoding="utf-16")
    assert read(tmp_path / "b.txt", encoding="utf-16") == ["one two"]


@pytest.mark.parametrize("encoding", ["undefined", "utf\0", "hex", "idna", "", "utf-7"])
def test_no_encoding_ends_in_a_traceback(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"+2AA- \xff")
    with pytest.raises(InputError, match=r"a\.txt is not|is unknown"):
        read(tmp_path / "a.txt", encoding=encoding)
    (tmp_path / "b.txt").write_bytes(b"+2AA-")  # half a pair in UTF-7
    with pytest.raises(InputError, match=r"b\.txt"):
        read(tmp_path / "b.txt", encoding="utf-7")


def test_a_file_whose_name_is_no_utf_8_is_read(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve.txt")
    Path(path).write_text("one")
    for place in (path, str(tmp_path)):
        (document,) = read_documents(find_sources([place]), CorpusConfig())
        assert (document.name, document.text) == (r"na\udcefve.txt#0", "one")


# --- size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".html", ".parquet"])
def test_a_document_above_the_limit_is_refused_with_the_setting_that_raises_it(
    tmp_path: Path, kind: str, packing: str
) -> None:
    def content(length: int) -> bytes:
        text = "x" * length
        if kind == ".parquet":
            sink = io.BytesIO()
            pq.write_table(pa.table({"text": [text]}), sink)
            return sink.getvalue()
        return json.dumps({"text": text}).encode() if kind.startswith(".js") else text.encode()

    path = tmp_path / f"a{kind}{packing}"
    path.write_bytes(PACKED[packing](content(3000)))
    with pytest.raises(InputError, match=rf"a{kind}{packing}.* more than 2,000 .*raise --max-document-characters"):
        read(path, max_document_characters=2000)
    assert read(path, max_document_characters=30_000) == ["x" * 3000]


def test_a_name_that_is_nearly_a_file_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "medquad.txt").write_text("one")
    with pytest.raises(InputError, match=r"'medquad' is no file or folder here .*; did you mean medquad\.txt\?"):
        read(Path("medquad"))


def test_a_long_file_of_short_documents_is_within_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n\n" * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "one two three"}\n' * 100)
    for name in ("a.txt", "b.jsonl"):
        assert len(read(tmp_path / name, document_separator="\n\n", max_document_characters=30)) == 100
    with pytest.raises(InputError, match=r"a\.txt document 1 has more than 30 characters; name what stands between"):
        read(tmp_path / "a.txt", max_document_characters=30)


class Counting(io.StringIO):
    """Text that counts what was read of it."""

    taken = 0

    def read(self, size: int | None = -1) -> str:
        found = super().read(size)
        self.taken += len(found)
        return found


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_no_more_is_read_of_a_document_than_the_limit_and_a_chunk(separator: str | None) -> None:
    text = Counting("short\n\n" * (separator is not None) + "x" * 10_000)
    *_, last = split_documents(text, separator, chunk_size=10, limit=100)
    assert 100 < len(last) <= 120
    assert text.taken <= 130


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_is_unpacked_bit_by_bit(tmp_path: Path, packing: str) -> None:
    """400 MB of one letter, in less memory than they take."""
    blocks = zstandard.ZstdCompressor(level=1).compressobj() if packing == ".zst" else zlib.compressobj(1, wbits=31)
    content = b"".join([*(blocks.compress(b"x" * (1 << 20)) for _ in range(400)), blocks.flush()])
    (tmp_path / f"bomb.txt{packing}").write_bytes(content)
    code = (
        "import resource, sys\n"
        "from memlm.corpus.readers import *\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)\n"
        "config = CorpusConfig(max_document_characters=1 << 20)\n"
        "try: list(read_documents([sys.argv[1]], config))\n"
        "except InputError as error: print(error)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / f"bomb.txt{packing}")]
    found = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "has more than 1,048,576 characters" in found.stdout


def test_columns_that_are_not_asked_for_are_not_unpacked(tmp_path: Path) -> None:
    saved(tmp_path / "saved", lambda folder: None)
    table = pa.table({"text": ["one", "two"], "junk": pa.array([b"\0" * (16 << 20)] * 2, pa.binary())})
    path = next((tmp_path / "saved").glob("*.arrow"))
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
        writer.write_table(table)
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    del table
    for source in (tmp_path / "saved", tmp_path / "a.parquet"):
        before, most = pa.total_allocated_bytes(), 0
        for document in read_documents([str(source)], CorpusConfig()):
            assert document.text in ("one", "two")
            most = max(most, pa.total_allocated_bytes() - before)
        assert most < 1 << 20


def test_a_text_that_parquet_keeps_once_is_not_unpacked_for_every_row(tmp_path: Path) -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 40 + [1]), pa.array(["x" * (1 << 20), "two"]))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="zstd", store_schema=False)
    before, most = pa.total_allocated_bytes(), 0
    for number, document in enumerate(read_documents([str(tmp_path / "a.parquet")], CorpusConfig())):
        assert document.text == ("two" if number == 40 else "x" * (1 << 20))
        most = max(most, pa.total_allocated_bytes() - before)
    assert number == 40
    assert most < 8 << 20


def test_memory_that_runs_out_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import memlm.corpus.readers as readers

    def fail(*_: object) -> None:
        raise MemoryError

    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    monkeypatch.setattr(readers, "_field", fail)
    with pytest.raises(InputError, match=r"a\.jsonl is too large for the memory here; split it"):
        read(tmp_path / "a.jsonl")


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import memlm.corpus.readers as readers

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    monkeypatch.setattr(readers, "_field", fail)
    with pytest.raises(ArtifactError, match=r"a\.jsonl: Input/output error"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", FORMATS)
@settings(deadline=None, max_examples=40)
@given(content=st.binary(max_size=200))
def test_no_bytes_break_a_reader(tmp_path_factory: pytest.TempPathFactory, kind: str, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{kind}"
    path.write_bytes(content)
    with contextlib.suppress(MemlmError):
        read(path)


def test_a_column_of_lists_is_named(tmp_path: Path) -> None:
    turns = pa.array([[{"role": "user", "content": "hello"}]])
    pq.write_table(pa.table({"messages": turns}), tmp_path / "chat.parquet")
    sources = find_sources([str(tmp_path / "chat.parquet")])
    with pytest.raises(InputError, match=r"column 'messages' holds list.* not text; name another"):
        list(read_documents(sources, CorpusConfig(text_column="messages"), Met()))
