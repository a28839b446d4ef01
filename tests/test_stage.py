import errno
import fcntl
import json
import os
import socket
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


# --- where an output may be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["folder", "link to a folder", "volume", "."])
def test_an_output_may_be_any_empty_folder(tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    if there == "link to a folder":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    else:
        out.mkdir()
    if there == "volume":
        (out / "lost+found").mkdir()
        monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("a volume cannot be renamed"))
        monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("a volume cannot be renamed"))
    if there == ".":
        monkeypatch.chdir(out)
        out = Path()
    made = build(out)
    assert read_manifest(out) == made
    assert (out / "lost+found").is_dir() == (there == "volume")
    assert run_stage(out, ASKED, lambda stage: pytest.fail("it is finished")) == made
    assert set(made.payload) == {"part/0.txt", "part/1.txt", "numbers.npy"}


def test_a_refused_run_leaves_a_volume_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    with pytest.raises(ArtifactError, match="refused"), open_stage(tmp_path, ASKED):
        raise ArtifactError("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["lost+found"]


@pytest.mark.parametrize("case", ["dangling", "loop", "link to a file", "below a file", "read-only", "root", "parent"])
def test_where_no_output_can_be_is_said_before_all_work(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("work")
    (tmp_path / "link").symlink_to({"loop": "link", "link to a file": "file"}.get(case, "nowhere"))
    (tmp_path / "inner").mkdir()
    if case == "read-only":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.chdir(tmp_path / "inner")
    out, message = {
        "dangling": (tmp_path / "link", "link is a link that leads nowhere"),
        "loop": (tmp_path / "link", "link is a link that leads nowhere"),
        "link to a file": (tmp_path / "link", "exists and is no memlm folder"),
        "below a file": (tmp_path / "file" / "deep" / "out", "Not a directory; choose another place"),
        "read-only": (tmp_path / "deep" / "out", "Permission denied; give permission"),
        "root": (Path("/"), "/ exists and is no memlm folder"),
        "parent": (Path(".."), "exists and is no memlm folder"),
    }[case]
    before = sorted(tmp_path.rglob("*"))
    for look in (lambda: check_output(out, ASKED), lambda: run_stage(out, ASKED, lambda _: pytest.fail("it works"))):
        with pytest.raises(ArtifactError, match=message) as caught:
            look()
        assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_whose_name_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/o\xff"))
    with pytest.raises(ArtifactError, match="the name of an output must be UTF-8"), open_stage(out, ASKED):
        pytest.fail("the body must not run")
    assert not list(tmp_path.iterdir())


def test_a_place_whose_name_is_no_utf_8_is_told_with_escapes(tmp_path: Path) -> None:
    made = build(tmp_path / "out", sources={"documents": os.fsdecode(b"na\xefve.txt")})
    assert read_manifest(tmp_path / "out") == made
    assert made.sources == {"documents": r"na\udcefve.txt"}


# --- file systems without locks -------------------------------------------------------------------------------------


@pytest.fixture(params=[errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK], ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_there_are_no_locks_a_stage_works_and_keeps_others_out(tmp_path: Path) -> None:
    with open_stage(tmp_path / "out", ASKED) as stage:
        stage.save_text("part/0.txt", "one")
        lock = tmp_path / "out" / "lock"
        with pytest.raises(OutputExistsError, match=rf"another process is writing .*wait for it \(or delete {lock} if"):
            with open_stage(tmp_path / "out", ASKED):
                pytest.fail("the body must not run")
    build(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "numbers.npy",
        "part",
        "run.json",
    ]


@pytest.mark.usefixtures("no_locks")
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_there_are_no_locks_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "plan.json", ASKED.identity)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (tmp_path / "out" / "lock").write_text(f"{int(dead.stdout)}\n{socket.gethostname()}\n")
    build(tmp_path / "out")
    assert read_manifest(tmp_path / "out").facts == {"parts": 2}


def test_another_failure_of_a_lock_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ArtifactError, match="Input/output error; see whether the disk is full"):
        build(tmp_path / "out")


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("f4")),  # type: ignore[attr-defined]
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore"),
    ],
    ids=["python", "numpy", "torch", "cuda"],
)
def test_memory_that_runs_out_is_one_line_with_the_cure(tmp_path: Path, error: Exception) -> None:
    def work(stage: Stage) -> dict:
        stage.save_text("part/0.txt", "one")
        raise error

    with pytest.raises(ArtifactError, match=r"out: memory ran out.*; lower .*--batch-tokens") as caught:
        run_stage(tmp_path / "out", ASKED, work)
    assert len(str(caught.value).splitlines()) == 1
    build(tmp_path / "out")  # the same run goes on


def test_another_error_of_a_library_stays_as_it_is(tmp_path: Path) -> None:
    def work(stage: Stage) -> dict:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_stage(tmp_path / "out", ASKED, work)


# --- plans of strangers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", ["[]", "3", "null", '"plan"', "{}", '{"config": 3}', '{"config": {"k": [[]]}}', '{"inputs": null}', "{", ""]
)
def test_a_plan_of_no_run_is_refused_in_one_line(tmp_path: Path, plan: str) -> None:
    (tmp_path / "plan.json").write_text(plan)
    (tmp_path / "part.txt").write_text("work")
    with pytest.raises(
        ArtifactError, match=r"is an unfinished run of something else|plan\.json cannot be read"
    ) as caught:
        build(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "part.txt").read_text() == "work"


def test_what_a_system_leaves_in_the_folder_is_no_part_of_it(tmp_path: Path) -> None:
    def work(stage: Stage, *, disturbed: bool) -> dict[str, object]:
        stage.save_text("text.txt", "text")
        if disturbed:
            (stage.path / ".DS_Store").write_text("left by a system")
        return {}

    spec = StageSpec("corpus", config={}, inputs={}, tokenizer=None)
    alone = run_stage(tmp_path / "a", spec, lambda stage: work(stage, disturbed=False))
    disturbed = run_stage(tmp_path / "b", spec, lambda stage: work(stage, disturbed=True))
    assert disturbed.hash == alone.hash
    (tmp_path / "b" / ".DS_Store").write_text("changed")
    assert read_manifest(tmp_path / "b").hash == alone.hash


def test_what_was_settled_is_gone_on_with(tmp_path: Path) -> None:
    spec, found = StageSpec("corpus", config={}, inputs={}, tokenizer=None), []

    def work(stage: Stage, value: str) -> dict[str, object]:
        found.append(stage.settled("dtype", value))
        if not stage.has("made.txt"):
            stage.save_text("made.txt", "made")
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "a", spec, lambda stage: work(stage, "bfloat16"))
    made = run_stage(tmp_path / "a", spec, lambda stage: work(stage, "float32"))
    assert found == ["bfloat16", "bfloat16"]
    assert [*made.payload] == ["made.txt"]
    assert not (tmp_path / "a" / "settled.json").exists()


def test_what_was_settled_of_a_run_that_made_nothing_is_gone(tmp_path: Path) -> None:
    spec = StageSpec("corpus", config={}, inputs={}, tokenizer=None)

    def work(stage: Stage) -> dict[str, object]:
        stage.settled("dtype", "bfloat16")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "a", spec, work)
    assert not (tmp_path / "a" / "settled.json").exists()
    run_stage(tmp_path / "a", replace(spec, config={"other": 1}), lambda stage: {})
