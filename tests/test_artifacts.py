import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from memlm import manifest as manifest_module
from memlm.errors import ArtifactError, OutputExistsError
from memlm.files import cache_dir, load_array, write_json
from memlm.manifest import Manifest, check_payload, is_artifact, payload_file, read_manifest
from memlm.stage import Stage, StageSpec, check_output, open_stage, run_stage

ASKED = StageSpec("corpus", {"k": 4, "taus": (1.0, 2.0)}, {"corpus": "a" * 64}, "t" * 64)


def build(out: Path, *, texts: tuple[str, ...] = ("one", "two"), sources: dict[str, str] | None = None) -> Manifest:
    with open_stage(out, replace(ASKED, sources=sources or {})) as stage:
        assert not stage.finished
        for number, text in enumerate(texts):
            stage.save_text(f"part/{number}.txt", text)
        stage.save_array("numbers.npy", np.arange(3))
        return stage.finish({"parts": len(texts)})


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


def test_times_and_places_of_an_artifact_copied_into_another_stay_outside_its_hash(tmp_path: Path) -> None:
    hashes = []
    for place in ("here", "there"):
        with open_stage(tmp_path / place, replace(ASKED, kind="datastore")) as stage:
            (stage.path / "corpus").mkdir()
            inner = build(tmp_path / f"{place}-corpus", sources={"documents": place})
            write_json(stage.path / "corpus" / "manifest.json", inner.model_dump(mode="json"))
            write_json(stage.path / "corpus" / "run.json", {"finished": place})
            hashes.append(stage.finish({}).hash)
    assert hashes[0] == hashes[1]


def test_a_crashed_stage_goes_on_with_the_files_it_finished(tmp_path: Path) -> None:
    def crash(out: Path) -> None:
        with open_stage(out, ASKED) as stage:
            stage.save_text("part/0.txt", "one")
            with stage.writing("part/1.txt") as temporary:
                temporary.write_text("tw")
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        crash(out)
    kept = out / "part/0.txt"
    before = kept.stat().st_mtime_ns
    for look in (read_manifest, is_artifact):  # no model stands here half written
        with pytest.raises(ArtifactError, match="out is not finished: run the command that makes it again"):
            look(out)
    with open_stage(out, ASKED) as stage:
        assert [stage.has(f"part/{i}.txt") for i in range(2)] == [True, False]
        stage.save_text("part/1.txt", "two")
        stage.save_array("numbers.npy", np.arange(3))
        resumed = stage.finish({"parts": 2})
    assert (out / "part/0.txt").stat().st_mtime_ns == before
    assert resumed.hash == build(tmp_path / "other").hash
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "numbers.npy", "part", "run.json"]


def test_half_written_files_of_a_killed_process_do_not_enter_the_payload(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_stage(out, ASKED) as stage:
        stage.save_text("part/0.txt", "one")
    for name in (".manifest.json.writing", "part/.7.txt.writing"):  # kill -9 leaves no time to remove them
        (out / name).write_text("half")
    with open_stage(out, ASKED) as stage:
        stage.save_text("part/1.txt", "two")
        stage.save_array("numbers.npy", np.arange(3))
        stage.finish({"parts": 2})
    assert read_manifest(out).hash == build(tmp_path / "other").hash


def test_files_of_a_finished_folder_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with open_stage(tmp_path / "out", ASKED) as stage:
            with stage.writing("model.safetensors") as temporary:
                save_file({"x": torch.zeros(2)}, temporary)
            stage.finish({})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(["manifest.json", "model.safetensors", "run.json"], 0o640)


def test_a_process_killed_while_finishing_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "out", replace(ASKED, intermediate=("raw",))

    def killed(stage: Stage, manifest: Manifest) -> None:
        raise SystemExit("killed when the manifest was written")

    def work(stage: Stage) -> dict:
        for name in ("raw/0.txt", "part/0.txt"):
            stage.save_text(name, "one")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "settle", killed)
        with pytest.raises(SystemExit):
            run_stage(out, asked, work)
    (out / "notes.txt").write_text("years of work")
    found = run_stage(out, asked, lambda stage: pytest.fail("it was finished"))
    assert found == read_manifest(out)
    assert set(found.payload) == {"part/0.txt"}
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "notes.txt", "part", "run.json"]


def test_a_finished_stage_is_left_alone(tmp_path: Path) -> None:
    build(tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    with open_stage(tmp_path / "out", ASKED) as stage:
        assert stage.finished
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert check_output(tmp_path / "out", ASKED)
    assert not check_output(tmp_path / "new", ASKED)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": {"k": 5, "taus": [1.0, 2.0]}}, "config.k: 4 there, 5 here"),
        ({"config": {"k": 4}}, r"config.taus: \[1.0, 2.0\] there, None here"),
        ({"inputs": {"corpus": "b" * 64}}, "inputs.corpus: 'aaaaaaaaaaaaaaa…aa' there, 'bbbbbbbbbbbbbbb…bb' here"),
        ({"tokenizer": "u" * 64}, "tokenizer: 'ttt.* there, 'uuu.* here"),
        ({"kind": "targets"}, "kind: 'corpus' there, 'targets' here"),
    ],
)
def test_an_output_made_otherwise_is_refused_and_the_difference_named(
    tmp_path: Path, complete: bool, change: dict, named: str
) -> None:
    out = tmp_path / "out"
    with open_stage(out, ASKED) as stage:
        stage.save_text("a.txt", "a")
        if complete:
            stage.finish({})
    match = rf"(exists and was made otherwise|is an unfinished run of something else) \({named}"
    with pytest.raises(OutputExistsError, match=match):
        with open_stage(out, replace(ASKED, **change)):
            pytest.fail("the body must not run")
    assert (out / "a.txt").read_text() == "a"


def test_a_run_refused_before_its_first_file_leaves_its_place_to_another(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such tap"), open_stage(tmp_path / "out", ASKED):
        raise ValueError("no such tap")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lock").touch()  # as a killed process leaves it
    write_json(tmp_path / "out" / "plan.json", ASKED.identity)
    other = replace(ASKED, config={"k": 5})
    with open_stage(tmp_path / "out", other) as stage:
        stage.save_text("a.txt", "a")
        assert json.loads((stage.path / "plan.json").read_text()) == other.identity
        stage.finish({})
    assert read_manifest(tmp_path / "out").config == {"k": 5}


def test_a_foreign_folder_or_file_is_refused_and_kept(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("thesis", "file"):
        with pytest.raises(OutputExistsError, match="no memlm folder"):
            with open_stage(tmp_path / name, ASKED):
                pytest.fail("the body must not run")
    assert [path.read_text() for path in foreign.iterdir()] == ["years of work"]
    assert (tmp_path / "file").read_text() == "a file"


def test_an_unfinished_run_of_an_earlier_memlm_goes_on_under_the_name_of_the_output(tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    write_json(partial / "plan.json", ASKED.identity)
    (partial / "lock").touch()
    (partial / "part").mkdir()
    (partial / "part" / "0.txt").write_text("one")
    kept = (partial / "part" / "0.txt").stat().st_ino
    with open_stage(out, ASKED) as stage:
        assert not partial.exists()
        assert [stage.has(f"part/{i}.txt") for i in range(2)] == [True, False]
        stage.save_text("part/1.txt", "two")
        stage.save_array("numbers.npy", np.arange(3))
        stage.finish({"parts": 2})
    assert (out / "part" / "0.txt").stat().st_ino == kept
    assert read_manifest(out).hash == build(tmp_path / "other").hash


def test_a_partial_folder_that_is_no_run_or_has_a_finished_folder_beside_it_is_left(tmp_path: Path) -> None:
    for name in ("foreign", "finished"):
        (tmp_path / f"{name}.partial").mkdir()
        (tmp_path / f"{name}.partial" / "mine.txt").write_text("mine")
    write_json(tmp_path / "finished.partial" / "plan.json", ASKED.identity)
    (tmp_path / "finished").mkdir()
    for name in ("foreign", "finished"):
        build(tmp_path / name)
        assert (tmp_path / f"{name}.partial" / "mine.txt").read_text() == "mine"
        assert not (tmp_path / name / "mine.txt").exists()


def test_an_empty_folder_may_become_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert build(tmp_path / "out") == read_manifest(tmp_path / "out")


def test_an_output_below_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"file/out: Not a directory; choose another place"):
        with open_stage(tmp_path / "file" / "out", ASKED):
            pytest.fail("the body must not run")


def test_a_second_process_on_the_same_output_is_refused(tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from memlm.stage import StageSpec, open_stage\n"
        "from memlm.errors import OutputExistsError\n"
        "try:\n"
        "    with open_stage(sys.argv[1], StageSpec(**json.loads(sys.argv[2]))):\n"
        "        print('went in')\n"
        "except OutputExistsError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out"), json.dumps(asdict(ASKED))]
    with open_stage(tmp_path / "out", ASKED):
        during = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "another process is writing" in during
    assert after == "went in\n"


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


def test_the_cache_is_where_memlm_home_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLM_HOME", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MEMLM_HOME")
    assert cache_dir() == Path.home() / ".cache" / "memlm"
