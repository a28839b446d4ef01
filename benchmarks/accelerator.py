"""What an accelerator is to show, in pieces: `python -m benchmarks.accelerator` runs each in a process of its own.

Each may take under eight minutes, the most valuable come first, and each leaves its JSON file as soon as it ends,
however it ends. `--quick` runs the same at toy size, for the CPU.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_RESULTS = Path(__file__).with_name("results")
_KEPT = 4000  # characters of output, from its end


@dataclass(frozen=True)
class Piece:
    """One command with a time limit."""

    name: str
    seconds: int
    """What it may take, in [1, 480)."""
    command: tuple[str, ...]
    """Arguments of Python; `{work}` stands for the folder of runs."""
    quick: tuple[str, ...] | None
    """The same at toy size; None: left out there."""
    needs: tuple[str, ...] = ()
    """Packages without which it cannot run."""


def _benchmarks(name: str, seconds: int, *names: str) -> Piece:
    command = ("-m", "benchmarks", *names)
    return Piece(name, seconds, command, (*command, "--quick"))


def _recipe(name: str, calls: int) -> list[Piece]:
    """A recipe that needs several times its limit: each call goes on where the one before was cut off."""
    command = ("-m", "benchmarks.recipe", f"recipes/accelerator/{name}.yaml", "--out", f"{{work}}/full/{name}")
    first = Piece(name, 470, command, (*command, "--quick"))
    return [first, *(replace(first, name=f"{name}-call-{call}", quick=None) for call in range(2, calls + 1))]


def _side_by_side(calls: int) -> list[Piece]:
    """Two studies and a comparison of a million tokens, as far as they come in so many calls."""
    command = ("-m", "benchmarks.side_by_side", "--work", "{work}/side-by-side", "--minutes")
    first = Piece("studies", 470, (*command, "7.5"), (*command, "7.5", "--quick"))
    return [first, *(replace(first, name=f"studies-call-{call}", quick=None) for call in range(2, calls + 1))]


# the project's options would need plugins, and a warning of another version is no failure here
_TESTS = ("-m", "pytest", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", "tests/accelerator")

PIECES = (
    Piece("machine", 300, ("-m", "benchmarks.machine"), ("-m", "benchmarks.machine", "--quick")),
    Piece("tests", 300, _TESTS, (*_TESTS, "-k", "keys_and_values"), needs=("pytest",)),  # CI runs them all besides
    _benchmarks("where-time-goes", 300, "where_time_goes"),
    _benchmarks("training", 300, "distillation_loss", "training_step"),
    *_side_by_side(2),
    *_recipe("medquad", 3),
    *_recipe("medquad-mlp", 3),
    _benchmarks("decoding", 300, "mixture", "mixture_decoding", "mlp_decoding", "mlp_scoring", "gate_decoding"),
    _benchmarks("drafting", 420, "drafted_decoding", "drafting_exactness"),
    _benchmarks("teacher", 300, "teacher_pass", "votes_to_targets"),
    _benchmarks("retrieval", 470, "knn_decoding"),
    _benchmarks("search", 470, "target_search"),
    Piece("quality", 470, ("-m", "benchmarks", "mlp_quality"), None),
    _benchmarks("host", 470, "help_time", "disk", "stage_memory"),
)
"""In order of value; `host` hardly touches the accelerator. To add one, name it here."""


def run_piece(piece: Piece, out: Path, work: Path, *, quick: bool) -> dict[str, Any]:
    """What came of a piece, also written to `out/accelerator-NAME.json`.

    Returns:
        `status` is ok, failed, timed out or skipped (running, in a file whose run was cut off); `lines` holds the JSON
        lines that it printed.
    """
    began = time.monotonic()
    found = {"name": piece.name, "date": datetime.now(UTC).isoformat(timespec="seconds"), "quick": quick}
    arguments = piece.quick if quick else piece.command
    missing = [package for package in piece.needs if importlib.util.find_spec(package) is None]
    path = out / f"accelerator-{piece.name}.json"
    if arguments is None or missing:
        found |= {"status": "skipped", "note": f"needs {', '.join(missing)}" if missing else "no toy size"}
    else:
        command = [sys.executable, *(part.replace("{work}", str(work)) for part in arguments)]
        found |= {"command": " ".join(["python", *command[1:]]), "limit_seconds": piece.seconds, "status": "running"}
        _write(path, found)
        settings = {"MEMLM_BENCH": str(work / "subset"), **({"OMP_NUM_THREADS": "1"} if quick else {})}
        found |= _ended(command, piece.seconds, settings)
    found["seconds"] = round(time.monotonic() - began, 1)
    _write(path, found)
    return found


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _ended(command: Sequence[str], seconds: float, settings: dict[str, str]) -> dict[str, Any]:
    """What came of a command; `settings` stand in its environment where nothing else is said."""
    paths = os.pathsep.join([str(_ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    process = subprocess.Popen(
        command,
        cwd=_ROOT,
        env={**settings, **os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=os.name == "posix",
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
        status = "failed" if process.returncode else "ok"
    except subprocess.TimeoutExpired:
        _kill(process)
        printed, _ = process.communicate()
        status = "timed out"
    except BaseException:  # a signal is ours alone: the process is in a session of its own
        _kill(process)
        raise
    return {"status": status, "exit": process.returncode, "lines": _json_lines(printed), "output": printed[-_KEPT:]}


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process, and where that can be done what it has started."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _json_lines(printed: str) -> list[Any]:
    """Every line of a text that is a JSON object."""
    found = []
    for line in printed.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the pieces; the exit status is 1 where one failed or ran out of time."""
    assert __doc__
    names = [piece.name for piece in PIECES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or _RESULTS), help="default $OUT")
    parser.add_argument("--work", type=Path, help="folder of runs, gone on with; default runs/accelerator")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="toy size, two pieces at once")
    parser.add_argument("--list", action="store_true", help="print the pieces and run nothing")
    settings = parser.parse_args(arguments)
    chosen = [piece for piece in PIECES if not settings.only or piece.name in settings.only]
    if settings.list:
        for piece in chosen:
            print(f"{piece.name:<20}{piece.seconds:>4} s  python {' '.join(piece.command)}")
        return 0
    work = settings.work or _ROOT / "runs" / ("accelerator-quick" if settings.quick else "accelerator")
    run = partial(run_piece, out=settings.out.resolve(), work=work.resolve(), quick=settings.quick)
    bad = False
    with ThreadPoolExecutor(2 if settings.quick else 1) as pool:
        for found in pool.map(run, chosen):
            print(json.dumps({key: found[key] for key in ("name", "status", "seconds")}), flush=True)
            bad |= found["status"] in ("failed", "timed out")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
