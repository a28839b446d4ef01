"""What commands print: results on stdout, all else on stderr."""

import json
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from memlm.memory.gain import gain_line
from memlm.ranks import speaks
from memlm.text import printable


def say(line: str) -> None:
    """Tell what is no result."""
    if speaks():
        print(printable(line), file=sys.stderr)


def print_result(value: dict[str, Any], as_json: bool, text: str = "", *, styled: bool = False) -> None:
    """Print `value` as one JSON object, or `text` where there is some; `styled` text may hold colours, and what came
    from elsewhere is harmless in it already."""
    if speaks() and (as_json or text):
        print(json.dumps(value) if as_json else text if styled else printable(text))


def print_made(folder: Path, manifest: Any, as_json: bool, text: str) -> None:
    """Print what a stage made: its facts as JSON, or `text` behind the folder's name."""
    made = {"folder": str(folder), "kind": manifest.kind, "hash": manifest.hash, **manifest.facts}
    print_result(made, as_json, f"{folder}: {text}")


def quiet() -> None:
    """Leave stderr to our own bars and errors."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # it tells of every retry; what failed in the end is our own error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.showwarning = lambda message, *_, **__: say(f"memlm: warning: {message}")
    datasets.disable_progress_bars()


def next_line(*command: str | Path) -> str:
    """What to type next; words in capitals are for the user to fill in."""
    return "next: " + " ".join(shlex.quote(str(word)) for word in command)


def perplexity_text(perplexity: float | None) -> str:
    """As people read it; None stands for infinity, which JSON has not."""
    return "inf" if perplexity is None else f"{perplexity:.2f}"


def memory_line(facts: dict[str, Any]) -> str:
    """How large a memory is, how it came about, and how good it is."""
    line = f"{facts['parameters']:,} parameters"
    if "steps" in facts:
        line += f", {facts['steps']:,} steps"
    elif "layout" in facts:
        line += f", converted from a released checkpoint of layout {facts['layout']}"
    else:
        line += ", not trained since it was given a new tokenizer"
    return f"{line}; {gain_line(facts)}" if "validation" in facts else line
