import json
import os
from pathlib import Path

import pytest
from test_stage import ASKED, build

from memlm import manifest as manifest_module
from memlm.errors import ArtifactError
from memlm.manifest import check_payload, payload_file, read_manifest, times_of


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = build(tmp_path / "out")
    read = read_manifest(tmp_path / "out", "corpus")
    assert read == written
    assert read.hash == written.hash
    assert set(read.payload) == {"part/0.txt", "part/1.txt", "numbers.npy"}
    assert read.payload["part/0.txt"].bytes == 3
    assert read.facts == {"parts": 2}
    assert read.identity == ASKED.identity


def test_the_hash_covers_payload_facts_and_settings_but_not_sources_times_or_versions(tmp_path: Path) -> None:
    first = build(tmp_path / "a", sources={"documents": "here"})
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps({**run, "finished": 0.0, "more": "x" * 99}))
    assert (
        read_manifest(tmp_path / "a").hash == first.hash == build(tmp_path / "b", sources={"documents": "there"}).hash
    )
    assert first.model_copy(update={"versions": {"python": "2"}}).hash == first.hash
    assert build(tmp_path / "c", texts=("one", "twx")).hash != first.hash
    for change in ({"facts": {"parts": 3}}, {"config": {"k": 5}}, {"inputs": {}}, {"tokenizer": None}):
        assert first.model_copy(update=change).hash != first.hash, change


def test_a_missing_or_truncated_file_is_found(tmp_path: Path) -> None:
    build(tmp_path / "out")
    part = tmp_path / "out" / "part" / "1.txt"
    part.write_text("t")
    with pytest.raises(ArtifactError, match=r"1\.txt has 1 bytes, its manifest says 3; run `memlm repair .*/out`"):
        read_manifest(tmp_path / "out")
    part.unlink()
    with pytest.raises(
        ArtifactError, match=r"1\.txt is missing; run `memlm repair .*/out`, then the command that made it"
    ):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "part/../../outside.txt"])
def test_a_path_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    build(tmp_path / "out")
    (tmp_path / "outside.txt").write_text("x")
    edit_manifest(tmp_path / "out", payload={name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ArtifactError, match="names a file outside its folder"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize("name", ["", ".", "./a", "a//b", "a/", "a\0b", "a\nb", "manifest.json", "part/lock"])
def test_a_name_that_no_stage_writes_is_refused(tmp_path: Path, name: str) -> None:
    build(tmp_path / "out")
    edit_manifest(tmp_path / "out", payload={name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ArtifactError, match="names a file that no stage writes"):
        read_manifest(tmp_path / "out")


def test_links_out_of_the_folder_and_what_is_no_file_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out)
    (out / "part" / "1.txt").rename(out / "part" / "2.txt")
    (out / "part" / "1.txt").symlink_to("2.txt")
    read_manifest(out)  # within the folder
    (out / "part" / "1.txt").unlink()
    (out / "part" / "2.txt").rename(tmp_path / "outside.txt")
    (out / "part" / "1.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(ArtifactError, match=r"1\.txt is a link that leads out of its folder"):
        read_manifest(out)
    (out / "part" / "1.txt").unlink()
    os.mkfifo(out / "part" / "1.txt")
    with pytest.raises(ArtifactError, match=r"1\.txt is a link .*, or no file"):
        read_manifest(out)
    (out / "part" / "1.txt").unlink()
    (tmp_path / "outside.txt").rename(out / "part" / "1.txt")
    (out / "part").rename(tmp_path / "part")
    (out / "part").symlink_to(tmp_path / "part")
    with pytest.raises(ArtifactError, match=r"0\.txt is a link that leads out of its folder"):
        read_manifest(out)


def test_the_links_of_a_snapshot_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me--law" / "snapshots" / "abc", tmp_path / "models--me--law" / "blobs"
    written = build(snapshot)
    blobs.mkdir()
    for name in written.payload:
        depth = "../" * (2 + name.count("/"))
        (snapshot / name).rename(blobs / name.replace("/", "-"))
        (snapshot / name).symlink_to(f"{depth}blobs/{name.replace('/', '-')}")
    assert read_manifest(snapshot) == written
    check_payload(snapshot, written)


def test_a_files_checksum_is_verified_when_it_is_read_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    written, hashed = build(out), []
    digest = manifest_module.file_digest
    monkeypatch.setattr(manifest_module, "file_digest", lambda path: hashed.append(path) or digest(path))
    for _ in range(2):
        assert payload_file(out, written, "part/0.txt").read_text() == "one"
    assert hashed == [out / "part/0.txt"]
    (out / "part" / "0.txt").write_text("two")
    with pytest.raises(ArtifactError, match=r"0\.txt is damaged: .*; run `memlm repair .*/out`"):
        payload_file(out, written, "part/0.txt")
    with pytest.raises(ArtifactError, match=r"0\.txt is damaged"):
        check_payload(out, written, "part/")
    check_payload(out, written, "numbers")
    with pytest.raises(ArtifactError, match=r"out has no part/7\.txt; expected of a corpus folder"):
        payload_file(out, written, "part/7.txt")


def test_another_format_version_or_kind_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "out")
    with pytest.raises(ArtifactError, match="is a corpus folder, expected datastore or targets"):
        read_manifest(tmp_path / "out", "datastore", "targets")
    edit_manifest(tmp_path / "out", format_version=99)
    with pytest.raises(ArtifactError, match=r"format version 99, this memlm reads 1; rebuild"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a memlm manifest"),
        ('{"format_version": 1}', "Field required"),
        ('{"format_version": 1.0}', r"format version 1\.0, this memlm reads 1"),
        ('{"format_version": 1, "format_version": 1}', "a key is there twice"),
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        (r'{"format_version": 1, "kind": "\ud800"}', "surrogates not allowed"),
        (" " * (16 << 20) + "{}", "16,777,218 bytes, 16,777,216 at most"),
        (
            json.dumps({"format_version": 1, "payload": dict.fromkeys(map(str, range(300)))}),
            r"\d+ values are missing or wrong",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    build(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_manifest(tmp_path / "out")


def test_a_folder_that_is_not_there_and_one_without_a_manifest_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; expected a corpus folder"):
        read_manifest(tmp_path / "nothing", "corpus")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json; expected a memlm folder"):
        read_manifest(tmp_path)
    (tmp_path / "text").write_text("x")
    with pytest.raises(ArtifactError, match="text is a file; expected a memlm folder"):
        read_manifest(tmp_path / "text")


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        ('{"seconds_last_run": 12.5, "finished": 1}', 12.5),
        ('{"seconds_last_run": 0, "finished": 1}', 0.0),
        *(
            (content, None)
            for content in (
                *("[]", "3", '"text"', "", "{", "null", '{"seconds_last_run": "12"}', '{"seconds_last_run": null}'),
                *(f'{{"finished": 1, "seconds_last_run": {t}}}' for t in ("NaN", "Infinity", "-1", "1e300", "[1]")),
                *(f'{{"finished": {made}, "seconds_last_run": 1}}' for made in ("NaN", "-1", "1e300", '"now"')),
                *("[" * 5000, '{"a": "\\ud800"}', '{"seconds_last_run": 1}'),
            )
        ),
    ],
)
def test_times_that_cannot_be_believed_are_none(tmp_path: Path, content: str, seconds: float | None) -> None:
    (tmp_path / "run.json").write_text(content)
    found = times_of(tmp_path)
    assert (found and found.seconds_last_run) == seconds
    assert times_of(tmp_path / "nowhere") is None
