"""Options of commands: those that several share, and one for every field of a stage's settings."""

import inspect
import os
import re
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from pydantic.fields import FieldInfo

from memlm.errors import ConfigError
from memlm.memory.config import UNNAMED

_T = TypeVar("_T")


def number(low: float, high: float, told: str) -> Any:
    """An option of a command for a number from `low` to `high`, which is none of the settings."""
    return typer.Option(min=low, max=high, callback=_not_nan, help=told)


def _not_nan(value: Any) -> Any:
    if value != value:  # which no bound refuses
        raise typer.BadParameter("nan is not a number")
    return value


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Dtype = Annotated[str, typer.Option(help="Precision: float32, bfloat16, float16, or auto.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
CorpusFolder = Annotated[str, typer.Argument(metavar="CORPUS", help="Folder that memlm corpus wrote.")]
Model = "path, hub id, or a packaged name such as smollm2"
Base = Annotated[str, typer.Option(help=f"Frozen base: {Model}.")]
Memories = Annotated[
    list[str],
    typer.Option(
        "--memory",
        metavar="[NAME=]MEMORY",
        help="Memory folder or hub id, or a datastore for live retrieval; several by name, such as law=m1/ bio=m2/.",
    ),
]
MixWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--mix-weight",
        metavar="[NAME=]WEIGHT",
        help="Weight of a memory in [0, 1], by name where there are several; default what validation data chose.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; may be repeated."),
]


_GROUPS = {"config": "Settings", "gate": "Gate", "retrieval": "Live retrieval", "passage": "In-context retrieval"}
"""A command's parameter for settings to what help calls their options; those of kinds of memory are another group."""


def with_settings(*leave_out: str) -> Callable[[Callable], Callable]:
    """Decorate a command so that every field of the settings that it takes is an option of it.

    A parameter of a name in `_GROUPS` gets settings of the class that it is annotated with; None where no option was
    given. A field's docstring is the option's help.

    Args:
        leave_out: Fields that are no options.
    """

    def decorate(command: Callable) -> Callable:
        own = dict(inspect.signature(command).parameters)
        classes = {into: get_args(own.pop(into).annotation)[0] for into in _GROUPS if into in own}
        fields = {
            into: {name: field for name, field in cls.options().items() if name not in leave_out}
            for into, cls in classes.items()
        }

        @wraps(command)
        def run(**values: Any) -> None:
            settings = {}
            for into, known in fields.items():
                texts = {name: values.pop(name) for name in known}
                given = {name: _from_text(name, text, known[name]) for name, text in texts.items() if text is not None}
                settings[into] = classes[into].parse(given) if given else None
            command(**values, **settings)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in own.values()]
        for into in reversed(classes):  # what the command itself is set by comes last
            for name, field in fields[into].items():
                group = _GROUPS[into] if name in classes[into].model_fields else "Start of the memory, by its kind"
                option = _option(name, field, group)
                parameters.append(inspect.Parameter(name, keyword, default=None, annotation=option))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _option(name: str, field: FieldInfo, group: str) -> Any:
    flag, default = name.replace("_", "-"), field.default
    plain = [a for a in get_args(field.annotation) or [field.annotation] if a is not type(None)]
    kind = next((a for a in (bool, int, float) if plain == [a]), str)
    told = " ".join((field.description or "").split())
    if default is not None:
        told += f" [default: {str(default).lower() if isinstance(default, bool) else default}]"
    names = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    return Annotated[kind | None, typer.Option(names, help=told, show_default=False, rich_help_panel=group)]


def _from_text(name: str, value: Any, field: FieldInfo) -> Any:
    """What an option's text stands for: a separator with escapes, a list of numbers, or itself."""
    flag = f"--{name.replace('_', '-')} {value!r}"
    if name == "document_separator":
        try:
            return value.encode("raw_unicode_escape").decode("unicode_escape")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{flag}: {error.reason}") from None
    if list[int] in get_args(field.annotation):
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError:
            raise ConfigError(f"{flag}: give a number, such as 10, or indices, such as 0,1,28,29") from None
        return numbers if "," in value else numbers[0]
    return value


def by_name(memories: list[str], weights: list[str] | None) -> tuple[dict[str, str], dict[str, float] | None]:
    """`--memory` and `--mix-weight` options by name; None where there are no weights."""
    named = _named(memories, "--memory", len(memories), is_whole=os.path.exists)
    return named, weights_by_name(weights, named)


def models_by_name(values: list[str]) -> dict[str, str]:
    """`--other` options by name."""
    if bare := next((value for value in values if "=" not in value), None):
        raise ConfigError(f"--other {bare!r}: write --other NAME=MODEL")
    return _named(values, "--other", len(values))


def alone(named: Mapping[str, _T] | None) -> _T | Mapping[str, _T] | None:
    """What a single memory without a name has, else everything by name; None where there is nothing."""
    return named[UNNAMED] if named is not None and list(named) == [UNNAMED] else named


def _named(
    values: list[str], option: str, memories: int, *, is_whole: Callable[[str], bool] = lambda value: False
) -> dict[str, str]:
    """`NAME=VALUE` options as a dictionary; beside a single memory, a value without a name is called `memory`.

    `is_whole` tells of a text that it is a value, whatever it looks like.
    """
    named = {}
    for value in values:
        match = None if is_whole(value) else re.fullmatch(r"([\w-]+)=(.*)", value, re.DOTALL)
        if match is None and memories > 1:
            raise ConfigError(f"{option} {value!r}: with several memories write {option} NAME=VALUE for each")
        name, value = match.groups() if match is not None else (UNNAMED, value)
        if name in named:
            raise ConfigError(f"{option} names {name!r} twice")
        named[name] = value
    return named


def weights_by_name(values: list[str] | None, memories: Mapping[str, Any]) -> dict[str, float] | None:
    """`--mix-weight` options by name; None where there are none."""
    if not values:
        return None
    named = _named(values, "--mix-weight", len(memories))
    if list(named) == [UNNAMED] and len(memories) == 1:
        named = dict.fromkeys(memories, named[UNNAMED])
    try:
        return {name: float(weight) for name, weight in named.items()}
    except ValueError:
        raise ConfigError(f"--mix-weight {' '.join(values)}: give a number in [0, 1]") from None
