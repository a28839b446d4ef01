"""Recipes: one YAML, a section per stage, run in order; finished stages are skipped when their inputs' hashes match."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memlm.config import StageConfig, nearest, read_recipe
from memlm.corpus.config import CorpusConfig
from memlm.datastore.config import DatastoreConfig
from memlm.errors import ConfigError
from memlm.evaluate.config import EvaluateConfig
from memlm.targets.config import RetrievalConfig, TargetsConfig
from memlm.train.config import TrainConfig

SECTIONS: dict[str, tuple[type[StageConfig], dict[str, str]]] = {
    "corpus": (CorpusConfig, {"documents": "files below $MEMLM_DATA, or dataset names", "tokenizer": "of which model"}),
    "teacher": (TrainConfig, {"init": "start model; the section fine-tunes a teacher, kl_weight is 0"}),
    "datastore": (DatastoreConfig, {"teacher": "model; default the teacher section's"}),
    "targets": (TargetsConfig, {}),
    "train": (
        TrainConfig,
        {
            "init": "start model; an mlp memory needs none",
            "base": "validated with, and read by an mlp; default init",
            "activations": "for an mlp: a datastore of the base, `datastore` for the recipe's own; default online",
        },
    ),
    "twin": (TrainConfig, {}),
    "retrieval": (RetrievalConfig, {}),
    "evaluate": (EvaluateConfig, {"base": "model"}),
}
"""Section name to its settings and what it takes besides."""


class Recipe:
    """A checked recipe."""

    def __init__(self, sections: dict[str, dict[str, Any]]) -> None:
        """
        Args:
            sections: Section name to settings, as in the YAML file.

        Raises:
            ConfigError: A section or key is unknown (the nearest is named), a value is wrong, or one is missing.
        """
        for name in sections:
            if name not in SECTIONS:
                raise ConfigError(f"unknown section '{name}'{nearest(name, SECTIONS)}")
        for name in ("corpus", "datastore", "targets", "train"):
            sections.setdefault(name, {})
        if "twin" in sections:  # what the train section says, without targets
            sections["twin"] = {
                **{k: v for k, v in sections["train"].items() if k not in SECTIONS["train"][1]},
                "kl_weight": 0,
                **sections["twin"],
            }
        if "teacher" in sections:
            sections["teacher"] = {"kl_weight": 0, **sections["teacher"]}
        self.places: dict[str, dict[str, Any]] = {}
        self.configs: dict[str, Any] = {}
        for name, values in sections.items():
            config, extra = SECTIONS[name]
            known = {*config.options(), *extra}
            for key in values:
                if key not in known:
                    raise ConfigError(f"unknown setting '{name}.{key}'{nearest(key, known)}")
            self.places[name] = {key: _place(name, key, values[key]) for key in extra if key in values}
            settings = {key: value for key, value in values.items() if key not in extra}
            self.configs[name] = config.parse(settings, f"{name}.")
        for name, key in (("corpus", "documents"), ("corpus", "tokenizer")):
            if key not in self.places[name]:
                raise ConfigError(f"{name}.{key} is missing: {SECTIONS[name][1][key]}")
        if not {"init", "base"} & self.places["train"].keys():
            raise ConfigError("train.init is missing: the start model; an mlp memory needs train.base instead")
        if "teacher" not in self.places["datastore"] and "teacher" not in sections:
            raise ConfigError("datastore.teacher is missing: a model, or a teacher section that fine-tunes one")
        if "teacher" in sections and "init" not in self.places["teacher"]:
            raise ConfigError("teacher.init is missing: the model to fine-tune")
        for name in ("teacher", "twin"):
            if name in sections and (kl_weight := self.configs[name].kl_weight) != 0:
                raise ConfigError(f"{name}.kl_weight = {kl_weight:g}: a {name} is trained without targets, at 0")


def _place(section: str, key: str, value: Any) -> Any:
    """`value`, where it is a text, or for documents also a list of texts."""
    several = key == "documents" and isinstance(value, list) and value and all(isinstance(v, str) for v in value)
    if not isinstance(value, str) and not several:
        wanted = "a path, or a list of paths" if key == "documents" else "a path, hub id or packaged name"
        raise ConfigError(f"{section}.{key} = {value!r}: give {wanted}")
    return value


def data_path(place: str) -> str:
    """A document path of a recipe below `$MEMLM_DATA` (default `data/`); absolute paths and dataset names stay."""
    below = Path(os.environ.get("MEMLM_DATA", "data")) / place
    return str(below) if below.exists() else place


def run_recipe(
    sections: dict[str, dict[str, Any]],
    out: str | Path,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run every stage of a recipe into folders below `out`; finished stages are skipped.

    Args:
        sections: As in the YAML file.
        out: Folder for `corpus/`, `teacher/`, `datastore/`, `targets/`, `memory/`, `twin/` and their evaluations.
        say: Told what starts, a line a stage.

    Returns:
        Row name (`memory`, `twin`, `retrieval`) to the report of `evaluate_perplexity`.
    """
    recipe = Recipe({name: dict(values) for name, values in sections.items()})
    from memlm.corpus.build import build_corpus
    from memlm.datastore.build import build_datastore
    from memlm.evaluate.perplexity import evaluate_perplexity
    from memlm.targets.build import build_targets
    from memlm.train.run import check_start, train_memory
    from memlm.train.trainer import check_trainer_fields

    for name in ("teacher", "train", "twin"):  # now, not after hours of other stages
        if name in recipe.configs:
            check_trainer_fields(recipe.configs[name], f"{name}.")
    out = Path(out)
    places, configs = recipe.places, recipe.configs
    documents = places["corpus"]["documents"]
    documents = [data_path(d) for d in ([documents] if isinstance(documents, str) else documents)]
    folder = {name: out / name for name in ("corpus", "teacher", "datastore", "targets", "memory", "twin")}
    init, block_size = places["train"].get("init"), configs["corpus"].block_size
    base, _ = check_start(configs["train"], init=init, base=places["train"].get("base"), block_size=block_size)
    activations = places["train"].get("activations")
    activations = folder["datastore"] if activations == "datastore" else activations
    shared = {"init": init, "base": base, "activations": activations}

    def stage(name: str) -> None:
        say(f"{name} -> {folder[name]}")

    stage("corpus")
    tokenizer = places["corpus"]["tokenizer"]
    build_corpus(documents, tokenizer=tokenizer, out=folder["corpus"], config=configs["corpus"])
    if "teacher" in configs:
        stage("teacher")
        start = places["teacher"]["init"]
        train_memory(folder["corpus"], init=start, out=folder["teacher"], config=configs["teacher"])
    stage("datastore")
    teacher = places["datastore"].get("teacher", str(folder["teacher"]))
    build_datastore(folder["corpus"], teacher=teacher, out=folder["datastore"], config=configs["datastore"])
    stage("targets")
    build_targets(folder["datastore"], out=folder["targets"], config=configs["targets"])
    stage("memory")
    train_memory(folder["targets"], out=folder["memory"], config=configs["train"], **shared)
    if "twin" in configs:
        stage("twin")
        train_memory(folder["targets"], out=folder["twin"], config=configs["twin"], **shared)
    reports = {}
    folder["retrieval"] = folder["datastore"]
    for row in ("memory", "twin", "retrieval"):
        if row == "memory" or row in configs:
            say(f"evaluation of {row} -> {out / f'evaluation-{row}'}")
            reports[row] = evaluate_perplexity(
                folder["corpus"],
                base=places.get("evaluate", {}).get("base", base),
                memory=str(folder[row]),
                out=out / f"evaluation-{row}",
                config=configs.get("evaluate"),
                retrieval=configs.get("retrieval") if row == "retrieval" else None,
            )
    return reports


def run_recipe_file(
    path: str | Path,
    out: str | Path | None = None,
    *,
    overrides: list[str] | None = None,
    say: Callable[[str], None],
) -> tuple[Path, dict[str, Any]]:
    """`run_recipe` for a YAML file, into `runs/NAME` unless told otherwise; returns that folder and the reports."""
    sections = read_recipe(path, overrides or [])
    folder = Path(out) if out is not None else Path("runs") / Path(path).stem
    return folder, run_recipe(sections, folder, say=say)
