"""Text as people see it: what came from elsewhere made harmless; durations, sizes, tables."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")


def printable(text: str) -> str:
    """`text` with control characters as escapes, so that a terminal obeys none; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def without_controls(text: str) -> str:
    """`text` with control characters, such as those that begin a terminal's commands, as escapes; line ends and tabs
    stay, and so does all else that no screen shows by itself but languages need."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def as_markdown(text: str) -> str:
    """`text` as one line of Markdown that shows it as it is, and is no markup."""
    line = printable(text).replace("\n", " ").replace("\t", " ")
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", line)


def one_line(text: str) -> str:
    """`text`, made harmless, without line ends."""
    return printable(text).replace("\n", "\\n")


def duration(seconds: float) -> str:
    """Such as 3 h: whole numbers of the largest unit that gives at least two."""
    unit, name = next(((u, n) for u, n in ((86_400, "d"), (3600, "h"), (60, "min")) if seconds >= 2 * u), (1, "s"))
    return f"{seconds / unit:.0f} {name}"


def size(bytes_: float) -> str:
    """Such as 1.5 GB."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if bytes_ >= u), (1e3, "kB"))
    return f"{bytes_ / unit:.1f} {name}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, columns aligned on the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def in_runs(items: Iterable[_T], text_of: Callable[[_T], str], characters: int) -> Iterator[list[_T]]:
    """The items in order, so many together that their texts have `characters` at least."""
    run, size = [], 0
    for item in items:
        run.append(item)
        size += len(text_of(item))
        if size >= characters:
            yield run
            run, size = [], 0
    if run:
        yield run


def flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values; what is within another carries its name."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{key} · {inner}", told) for inner, told in flat(value))
        else:
            yield str(key), value
