"""Settings: frozen, documented field by field, read from YAML recipes and overridden by `--set`."""

import difflib
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic.fields import FieldInfo

from memlm.errors import ConfigError

MAX_SEED = 2**32 - 1
"""The largest seed that numpy, torch and transformers all take."""
MAX_BATCH_TOKENS = 1 << 24
"""Tokens in one forward pass at most."""
MAX_COUNT = 1 << 50
"""What no data reaches, and 64 bits hold."""

_TOLD = 100  # problems looked at one by one at most
_SHOWN = 5
_SHORT = reprlib.Repr()  # of a text all, as far as it is shown
_SHORT.maxstring = _SHORT.maxother = 1000
_SHORT.maxlist = _SHORT.maxdict = 10
_SHORT.maxlevel = 3


_Config = TypeVar("_Config", bound="StageConfig")


class StageConfig(BaseModel):
    """Settings of one stage.

    The docstring under a field is its help text, on the command line too. A wrong key or value raises `ConfigError`.
    Every number has a lower and an upper bound.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _is_utf8(cls, value: Any) -> Any:
        for part in leaves(value):
            if isinstance(part, str) and not part.isascii() and part != part.encode("utf-8", "replace").decode():
                raise ValueError("is not UTF-8")
        return value

    @classmethod
    def options(cls) -> dict[str, FieldInfo]:
        """Every setting by the name that recipes and the command line give it."""
        return dict(cls.model_fields)

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "") -> Self:
        """The settings in `values`, checked.

        Args:
            values: Field name to value.
            where: What to call the place of these values in an error, such as `targets.`; ends with a dot or is empty.

        Raises:
            ConfigError: A key is unknown (the nearest known one is named) or a value is of the wrong type or range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error, cls, where)) from None


def leaves(value: Any) -> Iterator[Any]:
    """What dictionaries and lists hold in the end, or `value` itself where it is neither."""
    if isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def settings_from(cls: type[_Config], config: _Config | None, settings: dict[str, Any]) -> _Config:
    """The settings of a stage, given as `config`, as keywords, or not at all.

    Raises:
        ConfigError: Both are given, or a keyword is unknown or has a wrong value.
    """
    if config is not None and settings:
        raise ConfigError(f"{next(iter(settings))}: give settings as keywords or as config, not both")
    return config or cls.parse(settings)


def first_problem(error: ValidationError) -> str:
    """Where the first wrong value is, and what is wrong with it; told of a stranger's file, which may have millions."""
    if error.error_count() > _TOLD:
        return f"{error.error_count():,} values are missing or wrong"
    problem = error.errors(include_url=False)[0]
    return f"{_brief('.'.join(map(str, problem['loc'])))[1:-1]}: {problem['msg'][:200]}"


def _explain(error: ValidationError, cls: type[StageConfig], where: str) -> str:
    known = cls.options()
    if error.error_count() > _TOLD:
        return f"{where.rstrip('.')}: {first_problem(error)}"
    lines = []
    for problem in error.errors():
        loc = problem["loc"]
        if loc and loc[0] in cls.model_fields.keys() - known.keys():  # settings that stand beside the others
            loc = loc[1:]
        key = _brief(".".join(str(part) for part in loc))[1:-1]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown setting '{where}{key}'{nearest(key, known)}")
        elif not key:  # settings that contradict each other
            lines.append(f"{where.rstrip('.')}: {message}" if where else message)
        else:
            lines.append(f"{where}{key} = {_brief(problem['input'])}: {message[:1].lower()}{message[1:]}")
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def _brief(value: object) -> str:
    """`value` as Python writes it, cut in the middle where it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:150]}…{text[-40:]}"


def nearest(key: object, known: Any) -> str:
    """A hint that names the known key closest to `key`, or all of them where none is close."""
    known, key = sorted(known), str(key)
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else f"; known: {', '.join(known)}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number, which plain YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, name: str) -> Any:
    """The YAML document in `text`; `name` is what an error calls it.

    Raises:
        ConfigError: The text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{name} is not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a date or number that there is not
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def read_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> dict[str, dict[str, Any]]:
    """A recipe as section name to settings, with `section.key=value` overrides applied.

    Raises:
        ConfigError: The file is missing or not a mapping of mappings, or an override is not `section.key=value`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read recipe {path}: {reason}") from None
    recipe = parse_yaml(text, f"recipe {path}")
    if not isinstance(recipe, dict) or not all(isinstance(section, dict) for section in recipe.values()):
        raise ConfigError(f"recipe {path} must hold one mapping per stage, such as 'corpus: {{block_size: 512}}'")
    for override in overrides:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", override, re.DOTALL)
        if not match:
            raise ConfigError(f"--set {override!r} is not of the form section.key=value, such as targets.k=256")
        section, key, value = match.groups()
        recipe.setdefault(section, {})[key] = parse_yaml(value, f"--set {override!r}")
    return recipe
