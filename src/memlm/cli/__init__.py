"""The command line: a thin shell over one function per stage.

Options come from the stages' settings, so a field's docstring is its help. Nothing heavy is imported until a command
runs.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import typer

from memlm.cli.folders import info, repair
from memlm.cli.printing import say
from memlm.cli.road import adapt, convert, corpus, datastore, demo, fetch, perplexity, run, targets, train, version
from memlm.cli.use import chat, explain, generate
from memlm.errors import MemlmError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a small memory on a corpus once, then put it beside any frozen language model.\n\n"
    "The road: fetch, corpus, datastore, targets, train, evaluate perplexity, generate. `memlm demo` walks it in ten"
    " minutes; `memlm COMMAND --help` teaches each step.",
)
for command in (
    *(fetch, corpus, datastore, targets, train, adapt, convert),
    *(generate, explain, chat, run, info, repair, demo, version),
):
    app.command()(command)
evaluate = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure what a memory gains.")
evaluate.command()(perplexity)
app.add_typer(evaluate, name="evaluate")

_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as shells report a process that a signal ended


def main() -> None:
    """The `memlm` command. A `MemlmError`, or what the file system refused, is one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    sys.unraisablehook = partial(_stop_again, sys.unraisablehook)
    try:
        app(prog_name="memlm")
    except MemlmError as error:
        _end(error)
    except SystemExit as stop:
        if stop.code in (_INTERRUPTED, _TERMINATED):
            say("\nmemlm: stopped; the same command goes on where this one was")
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        from memlm.files import file_error

        _end(file_error(error))
    except (MemoryError, RuntimeError) as error:
        from memlm.files import out_of_memory

        if (told := out_of_memory(error)) is None:
            raise
        _end(told)


def _stop_again(otherwise: Callable[[Any], Any], lost: Any) -> None:
    """Sends a signal once more whose exception came up where Python drops exceptions, as in a `__del__`."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
    if number is None:
        otherwise(lost)
    else:  # a moment later, for here it would be dropped again
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()


def _end(error: MemlmError) -> NoReturn:
    say(f"memlm: error: {' '.join(str(error).split())}")
    sys.exit(2)
