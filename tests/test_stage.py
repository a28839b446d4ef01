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

from memlm.errors import ArtifactError, OutputExistsError
from memlm.files import write_json
from memlm.manifest import Manifest, is_artifact, read_manifest
from memlm.stage import Stage, StageSpec, check_output, open_stage, run_stage

ASKED = StageSpec("corpus", {"k": 4, "taus": (1.0, 2.0)}, {"corpus": "a" * 64}, "t" * 64)


def build(out: Path, *, texts: tuple[str, ...] = ("one", "two"), sources: dict[str, str] | None = None) -> Manifest:
    with open_stage(out, replace(ASKED, sources=sources or {})) as stage:
        assert not stage.finished
        for number, text in enumerate(texts):
            stage.save_text(f"part/{number}.txt", text)
        stage.save_array("numbers.npy", np.arange(3))
        return stage.finish({"parts": len(texts)})


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


def test_a_lock_that_a_killed_process_left_in_a_finished_folder_goes_and_nothing_else(tmp_path: Path) -> None:
    written = build(tmp_path / "out")
    (tmp_path / "out" / "lock").touch()
    (tmp_path / "out" / "notes.txt").write_text("years of work")
    assert run_stage(tmp_path / "out", ASKED, lambda stage: pytest.fail("it was finished")) == written
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "notes.txt",
        "numbers.npy",
        "part",
        "run.json",
    ]


@pytest.mark.parametrize("name", ["lock", "part", ".numbers.npy.writing", "plan.json"])
def test_a_planted_unfinished_folder_writes_nothing_outside_of_it(tmp_path: Path, name: str) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    write_json(out / "plan.json", ASKED.identity)
    (out / "begun.txt").write_text("begun")
    if name == "part":
        outside.mkdir()
    else:
        outside.write_bytes((out / "plan.json").read_bytes())
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(outside)
    before = [outside.read_bytes()] if outside.is_file() else list(outside.iterdir())
    with pytest.raises(OutputExistsError, match="is a link"):
        build(out)
    assert ([outside.read_bytes()] if outside.is_file() else list(outside.iterdir())) == before


def test_files_that_are_elsewhere_too_keep_their_mode_and_bytes_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "plan.json", ASKED.identity)
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    outside.chmod(0o600)
    os.link(outside, tmp_path / "out" / "begun.txt")
    build(tmp_path / "out")
    assert (outside.read_text(), outside.stat().st_mode & 0o777) == ("mine", 0o600)
