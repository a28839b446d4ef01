"""What a comparison asks for: rows, models to be trained for them, and what can be refused before hours of work."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from memlm.config import nearest
from memlm.corpus.blocks import Corpus
from memlm.corpus.readers import find_sources, source_digest
from memlm.errors import ConfigError, InputError
from memlm.evaluate.config import IN_CONTEXT, ROWS, CompareConfig, EvaluateConfig, InContextConfig
from memlm.evaluate.in_context import context_of
from memlm.evaluate.tasks import TaskSet
from memlm.manifest import read_manifest
from memlm.memory.seen import check_unseen
from memlm.models.adapters import check_peft
from memlm.models.loading import load_config
from memlm.runs.estimate import Cost, step_costs
from memlm.runs.plan import (
    Planned,
    Step,
    found_steps,
    needed_steps,
    planned,
    recipe_steps,
    training_step,
)
from memlm.runs.recipe import Recipe, check_targets, data_path
from memlm.train.config import TrainConfig

_SECTIONS = {"twin": "twin", "memory": "train", "mlp": "mlp", "dapt": "dapt", "lora": "lora"}
"""Row to the section that its model is trained by."""

_LEARNING_RATES = {"dapt": [5e-5, 2e-4], "lora": [2e-4, 1e-3]}
"""Section to those that are tried where a recipe gives none: a default made for other models would be no baseline."""


@dataclass(frozen=True)
class Point:
    """One model to be trained: a section with the settings that are tried."""

    name: str
    """Of its step and folder."""
    section: str
    config: TrainConfig
    tried: dict[str, Any]
    """Setting to value, of those that are searched."""

    def validation_perplexity(self, there: Mapping[str, Path]) -> float:
        """Of the best checkpoint, by what its settings keep that by; `there` leads from a step to its folder."""
        facts = read_manifest(there[self.name], "memory").facts
        return facts["validation"]["best"][f"{self.config.keep}_perplexity"]


def _searched(asked: dict[str, list[Any]], sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Section to setting to the values that are tried.

    Raises:
        ConfigError: There is no such setting, or nothing is trained by the section.
    """
    known = TrainConfig.options()
    found: dict[str, dict[str, list[Any]]] = {
        section: {"learning_rate": rates}
        for section, rates in _LEARNING_RATES.items()
        if "learning_rate" not in sections.get(section, {})
    }
    for name, values in asked.items():
        section, key = name.split(".", 1)
        if key not in known:
            raise ConfigError(f"compare.search: unknown setting '{name}'{nearest(key, known)}")
        if section == "mlp" and "mlp" not in sections:
            raise ConfigError(f"compare.search: {name} needs a section mlp")
        found.setdefault(section, {})[key] = values
    return found


class CompareRecipe:
    """A recipe of a comparison: its settings, and the steps that it needs."""

    def __init__(self, sections: dict[str, dict[str, Any]], out: str | Path) -> None:
        """
        Args:
            sections: As in the YAML file of a recipe.
            out: Folder for the stages, as `memlm run` makes them, and for the report.

        Raises:
            ConfigError: A section, key or value is wrong, or a row is asked for that the recipe cannot have.
        """
        filled = {name: dict(values) for name, values in sections.items()}
        asked = CompareConfig.parse(
            {k: v for k, v in filled.get("compare", {}).items() if k in CompareConfig.model_fields}, "compare."
        )
        self.reads_base = filled.get("train", {}).get("kind") == "mlp"  # and stands beside no other
        able = [row for row in ROWS if row not in ("mlp", "memory+mlp") or "mlp" in filled]
        able = [row for row in able if not (self.reads_base and row.endswith("+memory"))]
        if "evaluate" in filled and "base" in filled["evaluate"]:
            raise ConfigError("evaluate.base: a comparison has one base, that of the memory; leave it out")
        if filled.get("evaluate", {}).get("mix_weight") is not None:
            raise ConfigError("evaluate.mix_weight: a comparison chooses every row's weight; leave it out")
        if impossible := [row for row in asked.rows or [] if row not in able]:
            needs = "a memory that reads tokens" if impossible[0].endswith("+memory") else "a section mlp"
            raise ConfigError(f"compare.rows: {impossible[0]} needs {needs}")
        usual = [row for row in able if row != "in-context-dense" or asked.in_context.encoder]
        self.rows = usual if asked.rows is None else [row for row in able if row in asked.rows]
        others = filled.get("compare", {}).get("bases", [])
        self.other_bases: list[str] = [others] if isinstance(others, str) else list(others)
        if self.other_bases and "memory" not in self.rows:
            raise ConfigError("compare.bases: the memory is put beside them; add memory to compare.rows")
        if self.other_bases and self.reads_base:
            raise ConfigError("compare.bases: an mlp memory stands beside its own base alone; leave them out")
        for section in ("twin", "dapt", "lora"):
            if any(section in row.split("+") for row in self.rows):
                filled.setdefault(section, {})
        self.search = _searched(asked.search, filled)
        self.recipe, self.config, self.out = Recipe(filled), asked, Path(out)
        if shared := set(self.recipe.paths("compare", "general")) & set(self.recipe.paths("compare", "general_fit")):
            raise ConfigError(
                f"compare: {min(shared)} is both general and general_fit; heads must not see what is judged"
            )
        self.base = self.recipe.base
        self.tasks: TaskSet | None = None  # once their data is read
        self.evaluate: EvaluateConfig = self.recipe.configs.get("evaluate") or EvaluateConfig()
        self.parts = {part for row in self.rows for part in row.split("+")}
        self.points = {row: self._points(row) for row in _SECTIONS if row in self.parts}

    def _points(self, row: str) -> list[Point]:
        """What is trained for a row: every combination of the settings that are searched."""
        section = _SECTIONS[row]
        config: TrainConfig = self.recipe.configs[section]
        searched = self.search.get(section, {})
        points = []
        for values in itertools.product(*searched.values()):
            tried = dict(zip(searched, values, strict=True))
            name = "-".join([row, *(f"{key}-{value}" for key, value in tried.items())]).replace("/", "_")
            here = TrainConfig.parse(config.model_dump() | tried, f"{section}.")
            check_targets(section, here)
            points.append(Point(name, section, here, tried))
        return points

    @cached_property
    def steps(self) -> list[Step]:
        """All that has to be made, in order."""
        needs = {"corpus"} | ({"datastore"} if "knn" in self.parts else set())
        training = [
            training_step(self.recipe, point.name, point.section, point.config)
            for points in self.points.values()
            for point in points
        ]
        first = [step for step in recipe_steps(self.recipe) if step.name not in ("memory", "twin")]
        needs |= {name for step in training for name in step.inputs}
        return [*needed_steps(first, needs), *training]

    def plan(self) -> list[Planned]:
        """What there is and what is to be made, with rough costs; reads manifests and configs, and writes nothing."""
        steps = self.steps
        there = found_steps(steps, self.out)
        trained = {point.name: (point.section, point.config) for points in self.points.values() for point in points}
        costs = step_costs(self.recipe, self.base, there.get("corpus"), trained)
        evaluation = [costs[f"evaluation-{name}"] for name in trained if f"evaluation-{name}" in costs]
        if evaluation:
            costs["comparison"] = Cost(
                sum(cost.tokens or 0 for cost in evaluation), sum(cost.seconds or 0 for cost in evaluation), 100_000
            )
        return planned([*(step.name for step in steps), "comparison"], there, costs, self.out)

    def in_context_config(self, row: str) -> InContextConfig:
        encoder = (self.config.in_context.encoder or self.base) if row == "in-context-dense" else None
        return self.config.in_context.model_copy(update={"encoder": encoder})

    def check_parts(self) -> None:
        """Raise now what would be raised after hours.

        Raises:
            ConfigError: peft, bm25s or lm-eval is missing, or passage and text do not fit the base's context.
            InputError: A task is unknown, or its data or general text is not there or faulty.
            ModelError: A base cannot be reached.
        """
        for place in (self.base, *self.other_bases):
            load_config(place)
        if "lora" in self.points:
            check_peft()
        for key in ("general", "general_fit"):
            if texts := self.recipe.paths("compare", key):
                source_digest(find_sources(texts))
        if self.config.tasks:
            data = self.recipe.places["compare"].get("task_data")
            where = None if data is None else data_path(data)
            self.tasks = TaskSet(self.config.tasks, data=where, limit=self.config.task_limit)
        if "in-context-dense" in self.rows:
            load_config(self.config.in_context.encoder or self.base)
        for row in set(IN_CONTEXT) & set(self.rows):
            context_of(self.in_context_config(row), self.recipe.configs["corpus"].block_size, self.base)

    def check_corpus(self, corpus: Corpus) -> None:
        """Raise unless all bases read the corpus, and it has text to choose on and to judge on.

        Raises:
            TokenizerMismatchError: A base has another tokenizer.
            InputError: A split is empty, or shares documents with what a memory that training goes on with has read.
        """
        for place in (self.base, *self.other_bases):
            corpus.check_read_by(place)
            corpus.check_fits(place)
        for split in ("validation", "test"):
            if not corpus.split(split).n_positions:
                raise InputError(
                    f"corpus {corpus.folder} has no {split} tokens, and all is chosen on validation text and judged on"
                    f" test text: raise corpus.{split}_fraction, or give more documents"
                )
        if self.evaluate.shared_documents == "refuse":
            starts = {name: str(places["init"]) for name, places in self.recipe.places.items() if places.get("init")}
            held_out = {name: corpus.split(name) for name in ("validation", "test")}
            check_unseen(corpus, starts, held_out, "keep them with evaluate.shared_documents: keep")
