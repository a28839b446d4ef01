"""`memlm --help` answers at once, for it loads nothing heavy."""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.report import bar_line, prove

BAR_SECONDS = 0.3
HEAVY = ("torch", "faiss", "transformers")
_COMMAND = "from memlm.cli import main; main()"  # what the installed script does
_LOADED = """
import sys
try:
    from memlm.cli import main
    main()
finally:
    print("loaded:", *(name for name in sys.modules if "." not in name))
"""


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """One line, whose ratio is the median in seconds, from the start of Python to its end."""
    if importlib.util.find_spec("typer") is None:
        yield bar_line("help_time", None, at_most=BAR_SECONDS, note="skipped: the command line needs typer")
        return
    with tempfile.TemporaryDirectory() as cache:
        settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        settings["PYTHONPYCACHEPREFIX"] = cache  # compiled by the first call, as an installed package is
        listed = _python(_LOADED, settings).stdout.rsplit("loaded:", 1)[1].split()
        prove(len(set(HEAVY) & set(listed)), 0, f"heavy packages that --help loads, of {', '.join(HEAVY)}")
        seconds: dict[str, list[float]] = {"help": [], "python": []}
        for _ in range(1 if quick else 15):
            for name, code in (("help", _COMMAND), ("python", "pass")):
                start = time.perf_counter()
                _python(code, settings)
                seconds[name].append(time.perf_counter() - start)
    yield bar_line(
        "help_time",
        statistics.median(seconds["help"]),
        at_most=BAR_SECONDS,
        judged=not quick,
        spread=[round(min(seconds["help"]), 4), round(max(seconds["help"]), 4)],
        python_alone_seconds=round(statistics.median(seconds["python"]), 4),
        packages=len(listed),
    )


def _python(code: str, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A new Python that runs `code` with `--help` behind it."""
    command = [sys.executable, "-c", code, "--help"]
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
