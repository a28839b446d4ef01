"""Benchmarks, each of a claim: `python -m benchmarks [NAME...]` prints a JSON line per bar.

It exits with 1 where a bar is missed or an answer is wrong.
"""

import argparse
import ast
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

NAMES = (
    "mlp_decoding",
    "mlp_scoring",
    "mixture",
    "mixture_decoding",
    "gate_decoding",
    "drafting_exactness",
    "drafted_decoding",
    "knn_decoding",
    "mlp_quality",
    "teacher_pass",
    "target_search",
    "votes_to_targets",
    "stage_memory",
    "disk",
    "distillation_loss",
    "training_step",
    "where_time_goes",
    "help_time",
)
"""Modules with `run(quick)`. To add a benchmark, write one and name it here."""


def describe(name: str) -> str:
    """First line of a benchmark's docstring; imports nothing."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split("\n", 1)[0]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    assert __doc__
    listed = "\n".join(f"  {name:<20}{describe(name)}" for name in NAMES)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run; default all")
    parser.add_argument("--out", type=Path, help="file for a dated report with hardware and versions")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; answers are checked, timings not judged")
    settings = parser.parse_args(arguments)
    for name in settings.names:
        if name not in NAMES:
            parser.error(f"no benchmark is called {name!r}; choose from {', '.join(NAMES)}")
    return settings


def _loads(before: tuple[float, float, float]) -> dict[str, Any]:
    """What a line says of the machine: its load averages before and now."""
    found = {"before": before, "after": os.getloadavg()}
    return {"load_average": {name: [round(value, 2) for value in load] for name, load in found.items()}}


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; the exit status."""
    settings = parse(arguments)
    from transformers.utils import logging

    from benchmarks.report import hardware, write_report
    from memlm.errors import MemlmError

    logging.disable_progress_bar()
    machine = hardware()
    lines: list[dict[str, Any]] = []

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        lines.append(line)

    for name in settings.names or NAMES:
        load = os.getloadavg()
        try:
            for line in importlib.import_module(f"benchmarks.{name}").run(settings.quick):
                tell(line | _loads(load))
                load = os.getloadavg()
        except MemlmError as error:  # the others may still say something
            tell({"name": name, "ratio": None, "bar": None, "ok": False, "error": str(error), **_loads(load)})
    if settings.out is not None:
        command = " ".join(["python -m benchmarks", *settings.names, *(["--quick"] if settings.quick else [])])
        write_report(settings.out, lines, command=command, machine=machine)
    return int(any(line["ok"] is False for line in lines))


if __name__ == "__main__":
    sys.exit(main())
