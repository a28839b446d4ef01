"""What benchmarks print and keep: a line per bar, and dated reports with the machine they ran on."""

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec

import torch

from memlm.errors import MemlmError
from memlm.files import write_json
from memlm.manifest import library_versions

_Given = ParamSpec("_Given")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


class WrongAnswerError(MemlmError):
    """What would be timed gives another answer than its slow twin."""


def prove(difference: float, tolerance: float, what: str) -> None:
    """Raise unless two ways to an answer agree.

    Raises:
        WrongAnswerError: They differ by more than `tolerance`, or by NaN.
    """
    if not difference <= tolerance:
        raise WrongAnswerError(f"{what}: off by {difference:g}, {tolerance:g} is allowed; nothing was timed")


def bar_line(
    name: str,
    ratio: float | None,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    judged: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """What is printed of one bar.

    Args:
        name: Benchmark, and which of its bars.
        ratio: What was measured; None where nothing was.
        at_most, at_least: The bar; neither where the figure is only reported.
        judged: False leaves `ok` open, as for sizes that mean nothing.
        more: What else helps.
    """
    bar, ok = at_least if at_most is None else at_most, None
    if judged and ratio is not None and bar is not None:
        ok = ratio <= bar if at_most is not None else ratio >= bar
    return {"name": name, "ratio": None if ratio is None else round(ratio, 4), "bar": bar, "ok": ok, **more}


def write_report(path: Path, lines: Sequence[dict[str, Any]], *, command: str, machine: dict[str, Any]) -> None:
    """Keep lines with date, command, commit, versions, and the hardware as it was before they were measured."""
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "hardware": machine,
        "versions": library_versions(),
        "lines": list(lines),
    }
    write_json(path, report)


def one_line_errors(main: Callable[_Given, int]) -> Callable[_Given, int]:
    """A main function that tells memlm's errors in a line on stderr, with the exit status 1."""

    @functools.wraps(main)
    def told(*args: _Given.args, **kwargs: _Given.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except MemlmError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return told


def hardware() -> dict[str, Any]:
    """Processor, cores, matrix instructions, memory and accelerator, and how busy the machine is."""
    found = {}
    if Path("/proc/cpuinfo").is_file():
        pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
        found = {key.strip(): value.strip() for key, _, value in pairs}
    flags = set(found.get("flags", "").split())
    accelerator = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        accelerator = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return {
        "cpu": found.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": accelerator,
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _commit() -> str | None:
    """The checked-out commit; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
