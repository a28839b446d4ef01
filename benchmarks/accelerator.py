"""What an accelerator is to show, in pieces: `python -m benchmarks.accelerator` runs each in a process of its own.

Each may take under eight minutes, the most valuable come first, and each leaves its JSON file as soon as it ends,
however it ends. `--quick` runs the same at toy size, for the CPU.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
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


def _recipe(name: str) -> Piece:
    recipe = ("-m", "memlm", "run", f"recipes/accelerator/{name}.yaml", "--out", f"{{work}}/{name}", "--json")
    return Piece(name, 470, recipe, None)


PIECES = (
    Piece(
        "tests",
        300,
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/accelerator"),
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/accelerator"),
        needs=("pytest", "pytest_timeout", "beartype", "jaxtyping", "hypothesis"),
    ),
    _recipe("medquad"),
    _recipe("medquad-mlp"),
    _benchmarks("training", 300, "distillation_loss", "training_step"),
    _benchmarks("decoding", 300, "mlp_decoding", "mlp_scoring"),
    _benchmarks("teacher", 300, "teacher_pass", "votes_to_targets"),
    _benchmarks("search", 470, "target_search"),
    _benchmarks("retrieval", 470, "knn_decoding"),
)
"""In order of value. To add one, name it here."""


def run_piece(piece: Piece, out: Path, *, quick: bool) -> dict[str, Any]:
    """What came of a piece, also written to `out/accelerator-NAME.json`.

    Returns:
        `status` is ok, failed, timed out or skipped; `lines` holds the JSON lines that it printed.
    """
    began = time.monotonic()
    found = {"name": piece.name, "date": datetime.now(UTC).isoformat(timespec="seconds"), "quick": quick}
    arguments = piece.quick if quick else piece.command
    missing = [package for package in piece.needs if importlib.util.find_spec(package) is None]
    if arguments is None or missing:
        found |= {"status": "skipped", "note": f"needs {', '.join(missing)}" if missing else "no toy size"}
    else:
        command = [sys.executable, *(part.replace("{work}", str(out / "runs")) for part in arguments)]
        found |= {"command": " ".join(["python", *command[1:]]), "limit_seconds": piece.seconds}
        found |= _ended(command, piece.seconds)
    found["seconds"] = round(time.monotonic() - began, 1)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"accelerator-{piece.name}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _ended(command: Sequence[str], seconds: float) -> dict[str, Any]:
    paths = os.pathsep.join([str(_ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen(
        command,
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=os.name == "posix",
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
        status = "failed" if process.returncode else "ok"
    except subprocess.TimeoutExpired:
        if os.name == "posix":
            os.killpg(process.pid, 9)  # and what it has started
        process.kill()
        printed, _ = process.communicate()
        status = "timed out"
    return {"status": status, "exit": process.returncode, "lines": _json_lines(printed), "output": printed[-_KEPT:]}


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
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument("--list", action="store_true", help="print the pieces and run nothing")
    settings = parser.parse_args(arguments)
    bad = False
    for piece in PIECES:
        if settings.list:
            print(f"{piece.name:<14}{piece.seconds:>4} s  python {' '.join(piece.command)}")
        elif not settings.only or piece.name in settings.only:
            found = run_piece(piece, settings.out.resolve(), quick=settings.quick)
            print(json.dumps({key: found[key] for key in ("name", "status", "seconds")}), flush=True)
            bad |= found["status"] in ("failed", "timed out")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
