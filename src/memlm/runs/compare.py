"""What a memory gains over everything that could have been done instead: one comparison from one recipe."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from memlm.corpus.blocks import Corpus
from memlm.corpus.build import build_corpus, corpus_notes
from memlm.corpus.readers import find_sources, source_digest
from memlm.datastore.build import load_teacher
from memlm.datastore.store import Datastore
from memlm.errors import ConfigError, InputError, MemlmError
from memlm.evaluate.bench import bench
from memlm.evaluate.config import IN_CONTEXT, ROWS, BenchConfig, CompareConfig, EvaluateConfig, InContextConfig
from memlm.evaluate.in_context import context_of, in_context_label_log_probs
from memlm.evaluate.intervals import Resampled
from memlm.evaluate.perplexity import by_label_frequency
from memlm.evaluate.tasks import Answers, TaskSet, paired_report
from memlm.files import digest, read_json, write_json
from memlm.manifest import GATE_FILE, library_versions, read_manifest, times_of
from memlm.memory.confidence import ConfidenceHead
from memlm.mix.gate import Gate, GatedMemory, gate_config, weight_rule
from memlm.mix.mixed_lm import MixedLM
from memlm.models.adapters import check_peft
from memlm.models.identity import model_identity
from memlm.models.layers import model_size
from memlm.models.loading import default_device, load_causal_lm, load_config, parse_dtype, resolve
from memlm.models.tokenizers import load_tokenizer
from memlm.runs.comparison import write_comparison
from memlm.runs.estimate import Cost, step_costs
from memlm.runs.plan import (
    Planned,
    Step,
    base_of,
    found_steps,
    make_step,
    planned,
    recipe_steps,
    training_step,
)
from memlm.runs.recipe import Recipe, data_path
from memlm.scores.gated import gated_label_log_probs
from memlm.scores.mixtures import best_mix_weight, best_mix_weights, mixture_label_log_probs
from memlm.scores.table import BASE, ScoreTable, score_corpus
from memlm.targets.config import RetrievalConfig
from memlm.targets.teacher import judge
from memlm.train.config import TrainConfig
from memlm.train.gate import FEWEST_DOCUMENTS, FEWEST_TOKENS, fit_gate

_SECTIONS = {"twin": "twin", "memory": "train", "mlp": "mlp", "dapt": "dapt", "lora": "lora"}
"""Row to the section that its model is trained by."""
_TITLES = {
    "base": "base alone",
    "in-context": "in-context retrieval (BM25)",
    "in-context-dense": "in-context retrieval (dense)",
    "knn": "live kNN-LM",
    "dapt": "base fine-tuned (DAPT)",
    "dapt+knn": "DAPT base + live kNN-LM",
    "lora": "base fine-tuned by LoRA",
    "twin": "base + twin",
    "memory": "base + Memory Decoder",
    "mlp": "base + MLP Memory",
    "memory+mlp": "base + both memories",
    "dapt+memory": "DAPT base + Memory Decoder",
    "lora+memory": "LoRA base + Memory Decoder",
}


_SEARCHED = {"dapt.learning_rate": [5e-5, 2e-4], "lora.learning_rate": [2e-4, 1e-3]}
"""What is searched where a recipe says nothing of it: a default made for other models would be no baseline."""


@dataclass(frozen=True)
class Point:
    """One model to be trained: a section with the settings that are tried."""

    name: str
    """Of its step and folder."""
    section: str
    config: TrainConfig
    tried: dict[str, Any]
    """Setting to value, of those that are searched."""


class Comparison:
    """A recipe's comparison: what has to be made for it, and the table."""

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
        self.recipe, self.config, self.out = Recipe(filled), asked, Path(out)
        searched = {
            k: v for k, v in _SEARCHED.items() if k.partition(".")[2] not in filled.get(k.partition(".")[0], {})
        }
        self.search = {**searched, **asked.search}
        if shared := set(self.recipe.paths("compare", "general")) & set(self.recipe.paths("compare", "general_fit")):
            raise ConfigError(
                f"compare: {min(shared)} is both general and general_fit; heads must not see what is judged"
            )
        self.base = base_of(self.recipe)
        self._temperature: float | None = None  # of live kNN-LM, once it is chosen
        self.tasks: TaskSet | None = None  # once their data is read
        self.evaluate: EvaluateConfig = self.recipe.configs.get("evaluate") or EvaluateConfig()
        self.parts = {part for row in self.rows for part in row.split("+")}
        self.points = {row: self._points(row) for row in _SECTIONS if row in self.parts}

    def _points(self, row: str) -> list[Point]:
        """What is trained for a row: every combination of the settings that are searched."""
        section = _SECTIONS[row]
        config: TrainConfig = self.recipe.configs[section]
        searched = {
            name.partition(".")[2]: values for name, values in self.search.items() if name.partition(".")[0] == section
        }
        points = []
        for values in itertools.product(*searched.values()):
            tried = dict(zip(searched, values, strict=True))
            name = "-".join([row, *(f"{key}-{value}" for key, value in tried.items())]).replace("/", "_")
            points.append(Point(name, section, TrainConfig.parse(config.model_dump() | tried, f"{section}."), tried))
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
        first = {step.name: step for step in recipe_steps(self.recipe) if step.name not in ("memory", "twin")}
        needs |= {name for step in training for name in step.inputs}
        for step in reversed(first.values()):
            needs |= set(step.inputs) if step.name in needs else set()
        return [*(step for step in first.values() if step.name in needs), *training]

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

    def run(self, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
        """Make what is missing, and write `report.json`, `report.md`, `report.html` and a plot.

        Args:
            say: Told of each step before it starts.

        Returns:
            What `report.json` holds.
        """
        self._check_parts()
        there: dict[str, Path] = {}
        for step in self.steps:
            there[step.name] = make_step(self.out / step.name, step.plan(there), say)
            if step.name == "corpus":
                self._check_corpus(Corpus(there["corpus"]))
                for line in corpus_notes(read_manifest(there["corpus"])):
                    say(f"note: {line}")
        best = {row: self._best(points, there) for row, points in self.points.items()}
        folders = {row: there[point.name] for row, point in best.items()}
        if "knn" in self.parts:
            folders["knn"] = there["datastore"]
        corpus = Corpus(there["corpus"])
        trained = dict(folders)
        folders |= self._with_heads(folders, corpus, say)
        say("scoring")
        report, ways = self._report(corpus, folders, best, there)
        report["run"]["folders"] = {row: str(folder) for row, folder in trained.items()}
        write_comparison(report, self.out)
        if self.tasks is not None:
            report["tasks"] = self._on_tasks(self.tasks, ways, folders, self._retrieval(there), say)
            write_comparison(report, self.out)
        if self.config.timed_tokens:
            try:
                self._time(report["rows"], folders, corpus, self._retrieval(there))
            except MemlmError as error:  # all else is there
                report["notes"] = [f"nothing was timed: {error}"]
            write_comparison(report, self.out)
        return report

    def _check_parts(self) -> None:
        """Raise now what would be raised after hours.

        Raises:
            ConfigError: peft, bm25s or lm-eval is missing, or passage and text do not fit the base's context.
            InputError: A task is unknown, or its data is not there or faulty.
            ModelError: A base cannot be reached.
        """
        for place in (self.base, *self.other_bases):
            load_config(place)
        if "lora" in self.points:
            check_peft()
        if self.config.tasks:
            data = self.recipe.places["compare"].get("task_data")
            where = None if data is None else data_path(data)
            self.tasks = TaskSet(self.config.tasks, data=where, limit=self.config.task_limit)
        if "in-context-dense" in self.rows:
            load_config(self.config.in_context.encoder or self.base)
        for row in set(IN_CONTEXT) & set(self.rows):
            context_of(self._in_context_config(row), self.recipe.configs["corpus"].block_size, self.base)

    def _check_corpus(self, corpus: Corpus) -> None:
        """Raise unless all bases read the corpus, and it has text to choose on and to judge on.

        Raises:
            TokenizerMismatchError: A base has another tokenizer.
            InputError: A split is empty.
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

    def _best(self, points: list[Point], there: Mapping[str, Path]) -> Point:
        """The point that is best on validation text, by what its settings keep the best checkpoint by."""

        def perplexity(point: Point) -> float:
            facts = read_manifest(there[point.name], "memory").facts
            return facts["validation"]["best"][f"{point.config.keep}_perplexity"]

        return min(points, key=perplexity)

    def _with_heads(self, folders: Mapping[str, Path], corpus: Corpus, say: Callable[[str], None]) -> dict[str, Path]:
        """The memories again, with heads that were fitted here; none without general text or enough held-out text.

        A head lies in a folder of the comparison's own, beside links to the memory's files: other runs may use that
        memory, and would find their mixtures changed.
        """
        texts, split = self.recipe.paths("compare", "general_fit"), corpus.split("validation")
        if not texts or split.n_positions < FEWEST_TOKENS or split.n_documents < FEWEST_DOCUMENTS:
            return {}
        separator, found = self.config.general_separator, {}
        for row in ("twin", "memory", "mlp"):
            if row not in folders:
                continue
            hashes = [read_manifest(folders[row]).hash, corpus.manifest.hash, model_identity(self.base)]
            key = digest([*hashes, source_digest(find_sources(texts)), separator])
            place = self.out / "heads" / f"{row}-{key[:12]}"
            found[row] = place
            if ConfidenceHead.read(place) is not None:
                continue
            say(f"fitting a head for {row} -> {place}")
            _link_files(folders[row], place)
            fit_gate(
                place,
                corpus=corpus.folder,
                base=self.base,
                general=texts,
                dtype=self.evaluate.dtype,
                document_separator=separator,
            )
        return found

    # --- figures ----------------------------------------------------------------------------------------------------

    def _report(
        self, corpus: Corpus, folders: Mapping[str, Path], best: Mapping[str, Point], there: Mapping[str, Path]
    ) -> "tuple[dict[str, Any], list[Way]]":
        """The report but for tasks and times, and the rows that all of the test text was scored for."""
        retrieval = self._retrieval(there)
        voters = {row: str(folder) for row, folder in folders.items()}
        shared = {"dtype": self.evaluate.dtype, "batch_tokens": self.evaluate.batch_tokens, "retrieval": retrieval}
        tables = score_corpus(corpus, self.base, voters, **shared)
        own = self.out / "heads"  # a head that was there may have been fitted on any text
        heads = {row: ConfidenceHead.read(folder) for row, folder in folders.items() if folder.parent == own}
        ways = list(self._ways(tables["validation"], heads))
        texts = {"test": (corpus, tables["test"])}
        general = self._general(corpus)
        if general is not None:
            texts["general"] = (general, score_corpus(general, self.base, voters, **shared)["test"])
        rows = [{**way.told, "added": self._added(way.row, best, there)} for way in ways]
        for row in rows if self.reads_base else ():
            if row["row"] == "mlp":
                row["title"] += " (section mlp)"
            row["title"] = row["title"].replace("Memory Decoder", "MLP Memory")
        report: dict[str, Any] = {"rows": rows}
        for name, (source, table) in texts.items():
            parts = {str(number): way.label_log_probs(table) for number, way in enumerate(ways)}
            resampled = Resampled(table.document, parts, self.evaluate)
            bytes_ = _text_bytes(source, "test")
            leader = min(parts, key=lambda number: -float(parts[number].mean()))
            for number, row in zip(parts, rows, strict=True):
                to_leader = resampled.ratio(number, leader)["interval"]
                row[name] = {
                    **resampled.perplexity(number),
                    "ratio": resampled.ratio(number, "0"),
                    "bits_per_byte": round(float(-parts[number].sum() / np.log(2) / bytes_), 5),
                    "best": to_leader is not None and (number == leader or to_leader[0] <= 1 <= to_leader[1]),
                }
            report[name] = {"tokens": len(table.document), "documents": len(np.unique(table.document))}
            if name == "test":
                named = {f"{row['row']}|{row['way']}": part for row, part in zip(rows, parts.values(), strict=True)}
                report["by_label_frequency"] = by_label_frequency(table.label_count, named)
        rows += [self._in_context(row, corpus, tables["test"]) for row in IN_CONTEXT if row in self.rows]
        report["bases"] = self._other_bases(corpus, folders, heads)
        report["searched"] = self._searched(best, there)
        report["run"] = {
            "base": self.base,
            "corpus": corpus.manifest.hash,
            "training_tokens": corpus.split("train").n_positions,
            "validation_tokens": corpus.split("validation").n_positions,
            "dtype": self.evaluate.dtype,
            "versions": library_versions(),
        }
        return report, ways

    def _retrieval(self, there: Mapping[str, Path]) -> RetrievalConfig | None:
        """How the datastore is searched: as the section retrieval says; where it does not say, with the targets' k, and
        the temperature that is best on validation text beside the teacher."""
        if "knn" not in self.parts:
            return None
        given: RetrievalConfig = self.recipe.configs.get("retrieval") or RetrievalConfig()
        k = given.k if "k" in given.model_fields_set else self.recipe.configs["targets"].k
        k = min(k, int(read_manifest(there["datastore"], "datastore").facts["entries"]))
        if "target_temperature" in given.model_fields_set:
            return given.model_copy(update={"k": k})
        if self._temperature is None:
            store = Datastore(there["datastore"])
            teacher, _ = load_teacher(store.teacher, store.config)
            judged = judge(store, teacher, "validation", k=k, positions=self.recipe.configs["targets"].judged_positions)
            self._temperature = judged.best()[0]
        return given.model_copy(update={"k": k, "target_temperature": self._temperature})

    def _searched(self, best: Mapping[str, Point], there: Mapping[str, Path]) -> list[dict[str, Any]]:
        """Every point that was trained for a search, with what validation text said of it."""
        found = []
        for row, points in self.points.items():
            for point in points if len(points) > 1 else ():
                facts = read_manifest(there[point.name], "memory").facts["validation"]["best"]
                found.append(
                    {
                        "row": row,
                        "settings": point.tried,
                        "validation_perplexity": facts[f"{point.config.keep}_perplexity"],
                        "chosen": point == best[row],
                    }
                )
        return found

    def _ways(self, validation: ScoreTable, heads: Mapping[str, ConfidenceHead | None]) -> "Iterator[Way]":
        """Every row that all of the test text is scored for, with what validation text chose for it."""
        yield Way("base", BASE, (), None)
        for row in (row for row in self.rows if row not in IN_CONTEXT):
            if row in ("dapt", "lora"):
                yield Way(row, row, (), None)
                continue
            first, _, second = row.partition("+")
            under = first if first in ("dapt", "lora") else BASE
            memories = (second,) if under != BASE else tuple(part for part in (first, second) if part)
            yield from self._mixed(row, under, memories, validation, heads)

    def _mixed(
        self,
        row: str,
        under: str,
        memories: tuple[str, ...],
        validation: ScoreTable,
        heads: Mapping[str, ConfidenceHead | None],
    ) -> "Iterator[Way]":
        """Memories beside a base, with the weight that is best on validation text, and under the gate."""
        base = validation.voters[under].label
        labels = [validation.voters[name].label for name in memories]
        weights = best_mix_weights(base, labels)
        yield Way(row, under, memories, weights)
        own = [best_mix_weight(base, label)[0] for label in labels]
        known = {name: GatedMemory(w, heads.get(name)) for name, w in zip(memories, own, strict=True)}
        rule = weight_rule(gate_config(None), known)
        assert isinstance(rule, Gate)
        yield Way(row, under, memories, weights, rule)

    def _general(self, corpus: Corpus) -> Corpus | None:
        """General text as a corpus whose test split is nearly all of it; None where none is given."""
        documents = self.recipe.paths("compare", "general")
        if not documents:
            return None
        settings: dict[str, Any] = {
            "document_separator": self.config.general_separator,
            "block_size": corpus.config.block_size,
            "validation_fraction": 0.0,
            "test_fraction": 0.9,
            "max_test_tokens": self.config.general_tokens,
        }
        out = self.out / "general" / digest([source_digest(find_sources(documents)), settings])[:12]
        build_corpus(documents, tokenizer=self.recipe.places["corpus"]["tokenizer"], out=out, **settings)
        return Corpus(out)

    def _other_bases(
        self, corpus: Corpus, folders: Mapping[str, Path], heads: Mapping[str, ConfidenceHead | None]
    ) -> list[dict[str, Any]]:
        """The memory beside each further base: a fixed weight chosen with that one, a head fitted with the first."""
        rows = []
        for place in self.other_bases:
            voters = {"memory": str(folders["memory"])}
            tables = score_corpus(
                corpus, place, voters, dtype=self.evaluate.dtype, batch_tokens=self.evaluate.batch_tokens
            )
            ways = [Way("base", BASE, (), None), *self._mixed("memory", BASE, ("memory",), tables["validation"], heads)]
            table = tables["test"]
            parts = {str(number): way.label_log_probs(table) for number, way in enumerate(ways)}
            resampled = Resampled(table.document, parts, self.evaluate)
            for number, way in zip(parts, ways, strict=True):
                figures = {**resampled.perplexity(number), "ratio": resampled.ratio(number, "0")}
                rows.append({"base": place, "parameters": model_size(place), **way.told, "test": figures})
        return rows

    def _in_context_config(self, row: str) -> InContextConfig:
        encoder = (self.config.in_context.encoder or self.base) if row == "in-context-dense" else None
        return self.config.in_context.model_copy(update={"encoder": encoder})

    def _in_context(self, row: str, corpus: Corpus, test: ScoreTable) -> dict[str, Any]:
        """A row of in-context retrieval, with the base's figure on the same part of the text."""
        config = self._in_context_config(row)
        positions, found = in_context_label_log_probs(
            corpus,
            self.base,
            config,
            dtype=self.evaluate.dtype,
            batch_tokens=self.evaluate.batch_tokens,
        )
        parts = {row: found, BASE: test.voters[BASE].label[positions].astype(np.float64)}
        documents = np.unique(test.document[positions], return_inverse=True)[1]
        resampled = Resampled(documents, parts, self.evaluate)
        figures = {**resampled.perplexity(row), "ratio": resampled.ratio(row, BASE)}
        part = {"tokens": len(positions), "base": resampled.perplexity(BASE)}
        by = f"; found by {config.encoder}" if config.encoder else ""
        told = {
            "row": row,
            "title": _TITLES[row],
            "way": "part of the text",
            "tuned": f"nothing: the paper's setting{by}",
        }
        return {**told, "added": {}, "part": {**figures, **part}}

    def _added(self, row: str, best: Mapping[str, Point], there: Mapping[str, Path]) -> dict[str, Any]:
        """What a row adds to the base: parameters, training and disk; and the time and disk of the stages before it,
        which several rows may share."""
        added: dict[str, Any] = {}
        inputs = {step.name: step.inputs for step in self.steps}
        before: set[str] = set()
        for name in row.split("+"):
            if name == "knn":
                store = Datastore(there["datastore"])
                own = model_identity(store.teacher) != model_identity(self.base)  # which runs beside the base
                parts = {"disk_bytes": _bytes(there["datastore"]), "seconds": _seconds(there["datastore"])}
                parts["parameters"] = model_size(store.teacher) if own else 0
                made = "datastore"
            elif name in best:
                made = best[name].name
                folder = there[made]
                facts = read_manifest(folder, "memory").facts
                tokens = round(facts["epochs"] * Corpus(there["corpus"]).split("train").n_positions)
                new = {"dapt": 0, "lora": facts.get("trained_parameters")}.get(name, facts["parameters"])
                parts = {"parameters": new, "training_tokens": tokens, "seconds": _seconds(folder)}
                parts["disk_bytes"] = _bytes(folder)
                added.setdefault("settings", {})[name] = best[name].tried
            else:
                continue
            for key, value in parts.items():
                added[key] = None if value is None or added.get(key, 0) is None else added.get(key, 0) + value
            waiting = list(inputs[made])
            while waiting:
                step = waiting.pop()
                if step != "corpus" and step not in before:
                    before.add(step)
                    waiting += inputs[step]
        if before:
            seconds = [_seconds(there[step]) for step in before]
            added["before"] = {
                "stages": sorted(before),
                "seconds": None if None in seconds else round(sum(s for s in seconds if s is not None), 1),
                "disk_bytes": sum(_bytes(there[step]) for step in before),
            }
        return added

    def _on_tasks(
        self,
        tasks: TaskSet,
        ways: "Iterable[Way]",
        folders: Mapping[str, Path],
        retrieval: RetrievalConfig | None,
        say: Callable[[str], None],
    ) -> dict[str, Any]:
        """What each row reaches on the tasks, paired with the base; of memories that under the gate.

        Answers are kept, so that a comparison that was stopped asks no model twice.
        """
        found: dict[str, Answers] = {}
        tokenizer = load_tokenizer(resolve(self.base))
        for way in ways:
            if way.weights is not None and way.rule is None:
                continue
            under = self.base if way.base == BASE else str(folders[way.base])
            memories = {name: str(folders[name]) for name in way.memories}
            searched = retrieval if "knn" in memories else None
            known = () if way.rule is None else way.rule.memories.values()
            key = digest(
                [
                    [tasks.key, self.evaluate.dtype, library_versions()],
                    [model_identity(under), *(read_manifest(folder).hash for folder in memories.values())],
                    None if searched is None else searched.model_dump(mode="json"),
                    None if way.rule is None else way.rule.config.model_dump(),
                    [_told(memory) for memory in known],
                ]
            )
            path = self.out / "answers" / f"{way.row}-{key[:12]}.json"
            if not path.exists():
                say(f"tasks with {_TITLES[way.row]}")
                answers = tasks.answers(self._spoken(way, under, memories, searched), tokenizer, _TITLES[way.row])
                write_json(path, {task: (metric, values.tolist()) for task, (metric, values) in answers.items()})
            kept = read_json(path, limit=1 << 30)
            found[way.row] = {task: (metric, np.array(values)) for task, (metric, values) in kept.items()}
        report = paired_report(found, seed=0, bootstrap=self.evaluate.bootstrap, further=tasks.further)
        return report | {"titles": {row: _TITLES[row] for row in found}, "run": tasks.told}

    def _spoken(
        self,
        way: "Way",
        under: str,
        memories: Mapping[str, str],
        retrieval: RetrievalConfig | None,
    ) -> PreTrainedModel:
        """A row's model, loaded."""
        device = default_device()
        base = load_causal_lm(under, dtype=parse_dtype(self.evaluate.dtype, device)).to(device)  # type: ignore[arg-type]
        if way.rule is None:
            return base
        weights = {name: part.mix_weight for name, part in way.rule.memories.items() if part.mix_weight is not None}
        options = {} if retrieval is None else {"retrieval": retrieval}
        mixed = MixedLM.from_pretrained(
            base, memory=memories, mix_weight=weights, gate=way.rule.config, memory_kwargs=options
        )
        return mixed.to(device)  # type: ignore[return-value]

    def _time(
        self,
        rows: list[dict[str, Any]],
        folders: Mapping[str, Path],
        corpus: Corpus,
        retrieval: RetrievalConfig | None,
    ) -> None:
        """Put into each row what decoding takes that way; a fine-tuned base takes what the base takes."""
        timed = {row: str(folders[row]) for row in ("knn", "memory", "mlp") if row in folders}
        test, new = corpus.split("test"), max(2, self.config.timed_tokens)
        read = max(1, min(64, corpus.config.block_size - new))  # all within a memory's window
        prompts = [
            str(corpus.tokenizer.decode(test.tokens[start : start + read], skip_special_tokens=True))
            for start in test.offsets[:-1][:4]
        ]
        found = bench(
            self.base,
            timed,
            [prompt for prompt in prompts if prompt.strip()],
            tokenizer=corpus.tokenizer,
            retrieval=retrieval,
            in_context=corpus.folder if "in-context" in self.rows else None,
            passages=self._in_context_config("in-context"),
            config=BenchConfig(new_tokens=new, prompt_tokens=read, score_tokens=0, dtype=self.evaluate.dtype),
        )
        as_well = {"dapt": "base", "lora": "base", "twin": "memory", "dapt+memory": "memory", "lora+memory": "memory"}
        as_well["dapt+knn"] = "knn"
        for row in rows:
            name = as_well.get(row["row"], row["row"])
            if name in found:
                row["decoding"] = found[name]
            if (drafted := f"{name} drafted") in found:
                row["drafted"] = found[drafted]


@dataclass(frozen=True)
class Way:
    """One row of the table: a model, memories beside it, and how they are weighed."""

    row: str
    base: str
    """Whose label log-probs stand for the base's: the base itself, or one that was fine-tuned."""
    memories: tuple[str, ...]
    weights: list[float] | None
    """Fixed ones, chosen on validation text; None where there is no memory."""
    rule: Gate | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What the report says of it."""
        if self.weights is None:
            tuned = {"base": "nothing", "dapt": "settings, checkpoint", "lora": "settings, checkpoint"}[self.row]
            return {"row": self.row, "title": _TITLES[self.row], "way": "alone", "tuned": tuned}
        if self.rule is None:
            weights = dict(zip(self.memories, self.weights, strict=True))
            found = {"way": "fixed weight", "mix_weight": weights, "tuned": "checkpoint, weight"}
        else:
            head = self.rule.config.gate != "posterior"
            found = {"way": f"gate {self.rule.config.gate}", "tuned": "checkpoint, weight" + (", head" if head else "")}
        return {"row": self.row, "title": _TITLES[self.row], **found}

    def label_log_probs(self, table: ScoreTable) -> NDArray[np.float64]:
        """What it gives each label of a text."""
        base = table.voters[self.base]
        if self.weights is None:
            return base.label.astype(np.float64)
        parts = {name: table.voters[name] for name in self.memories}
        if self.rule is None:
            return mixture_label_log_probs(base.label, [part.label for part in parts.values()], self.weights)
        seen = ScoreTable({BASE: base, **parts}, table.document, table.label_count)
        return gated_label_log_probs(seen, self.rule)[0]


def _told(memory: GatedMemory) -> list[Any]:
    """What the gate knows of a memory, to be hashed."""
    return [memory.mix_weight, None if memory.head is None else memory.head.model_dump(mode="json")]


def _text_bytes(corpus: Corpus, split: str) -> int:
    """UTF-8 bytes of the text that the predicted tokens of a split stand for."""
    text, tokenizer = corpus.split(split), corpus.tokenizer
    documents = zip(text.offsets[:-1], text.offsets[1:], strict=True)
    return sum(
        len(str(tokenizer.decode(text.tokens[start + 1 : end], skip_special_tokens=True)).encode())
        for start, end in documents
    )


def _bytes(folder: Path) -> int:
    return sum(file.bytes for file in read_manifest(folder).payload.values())


def _seconds(folder: Path) -> float | None:
    times = times_of(folder)
    return None if times is None else round(times.seconds_last_run, 1)


def _link_files(folder: Path, out: Path) -> None:
    """Put the files of a finished folder into `out` too, but for a head; as links where the disk can."""
    for path in sorted(folder.resolve().rglob("*")):
        place = out / path.relative_to(folder.resolve())
        if path.is_dir() or path.name == GATE_FILE or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copy2(path, place)
