"""What the rows of a comparison reach: perplexities, tasks, times, and what they add to the base."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from memlm.corpus.blocks import Corpus
from memlm.corpus.build import build_corpus
from memlm.corpus.readers import find_sources, source_digest
from memlm.datastore.build import load_teacher
from memlm.datastore.store import Datastore
from memlm.evaluate.bench import bench
from memlm.evaluate.config import IN_CONTEXT, BenchConfig
from memlm.evaluate.in_context import in_context_label_log_probs
from memlm.evaluate.intervals import Resampled
from memlm.evaluate.perplexity import by_label_frequency
from memlm.evaluate.tasks import Answers, TaskSet, paired_report
from memlm.files import digest
from memlm.manifest import library_versions, read_manifest, times_of
from memlm.memory.confidence import ConfidenceHead
from memlm.mix.gate import GatedMemory
from memlm.mix.mixed_lm import MixedLM
from memlm.models.identity import model_identity
from memlm.models.layers import model_size
from memlm.models.loading import load_on_default_device, resolve
from memlm.models.tokenizers import load_tokenizer
from memlm.runs.compare_recipe import CompareRecipe, Point
from memlm.runs.ways import TITLES, Way, all_ways
from memlm.scores.table import BASE, ScoreTable, score_corpus
from memlm.targets.config import RetrievalConfig
from memlm.targets.teacher import judge


@dataclass(frozen=True)
class Figures:
    """Models that were made for a comparison, and what is found out about them."""

    asked: CompareRecipe
    there: Mapping[str, Path]
    """Step to its folder."""
    best: Mapping[str, Point]
    """Row to the best point that was trained for it."""
    folders: Mapping[str, Path]
    """Row to its model, with the head that was fitted for it."""

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus of the comparison."""
        return Corpus(self.there["corpus"])

    def report(self) -> dict[str, Any]:
        """What `report.json` holds, but for tasks and times."""
        asked, tables = self.asked, self.tables
        rows = [{**way.told, "added": self._added(way.row)} for way in self.ways]
        texts = {"test": (self.corpus, tables["test"])}
        if (general := self._general()) is not None:
            texts["general"] = (general, self._scores(general, asked.base, self.folders)["test"])
        for row in rows if asked.reads_base else ():
            if row["row"] == "mlp":
                row["title"] += " (section mlp)"
            row["title"] = row["title"].replace("Memory Decoder", "MLP Memory")
        report: dict[str, Any] = {"rows": rows}
        for name, (source, table) in texts.items():
            parts = {str(number): way.label_log_probs(table) for number, way in enumerate(self.ways)}
            resampled = Resampled(table.document, parts, asked.evaluate)
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
        rows += [self._in_context(row, tables["test"]) for row in IN_CONTEXT if row in asked.rows]
        report["bases"] = self._other_bases()
        report["searched"] = self._searched()
        report["run"] = {
            "base": asked.base,
            "corpus": self.corpus.manifest.hash,
            "training_tokens": self.corpus.split("train").n_positions,
            "validation_tokens": self.corpus.split("validation").n_positions,
            "dtype": asked.evaluate.dtype,
            "versions": library_versions(),
        }
        return report

    @cached_property
    def retrieval(self) -> RetrievalConfig | None:
        """How the datastore is searched: as the section retrieval says; where it does not say, with the targets' k, and
        the temperature that is best on validation text beside the teacher."""
        if "knn" not in self.asked.parts:
            return None
        given: RetrievalConfig = self.asked.recipe.configs.get("retrieval") or RetrievalConfig()
        k = given.k if "k" in given.model_fields_set else self.asked.recipe.configs["targets"].k
        k = min(k, int(read_manifest(self.there["datastore"], "datastore").facts["entries"]))
        if "target_temperature" in given.model_fields_set:
            return given.model_copy(update={"k": k})
        store = Datastore(self.there["datastore"])
        teacher, _ = load_teacher(store.teacher, store.read_as)
        judged = judge(
            store, teacher, "validation", k=k, positions=self.asked.recipe.configs["targets"].judged_positions
        )
        return given.model_copy(update={"k": k, "target_temperature": judged.best()[0]})

    @cached_property
    def heads(self) -> dict[str, ConfidenceHead | None]:
        """Row to the head that this comparison fitted; one that was there may have been fitted on any text."""
        own = self.asked.out / "heads"
        return {row: ConfidenceHead.read(folder) for row, folder in self.folders.items() if folder.parent == own}

    @cached_property
    def tables(self) -> dict[str, ScoreTable]:
        """What base and models make of each split."""
        return self._scores(self.corpus, self.asked.base, self.folders)

    @cached_property
    def ways(self) -> list[Way]:
        """The rows that all of the test text is scored for."""
        return list(all_ways(self.asked.rows, self.tables["validation"], self.heads))

    def _scores(self, corpus: Corpus, base: str, folders: Mapping[str, Path]) -> dict[str, ScoreTable]:
        return score_corpus(
            corpus,
            base,
            {row: str(folder) for row, folder in folders.items()},
            dtype=self.asked.evaluate.dtype,
            batch_tokens=self.asked.evaluate.batch_tokens,
            retrieval=self.retrieval if "knn" in folders else None,
        )

    def _searched(self) -> list[dict[str, Any]]:
        """Every point that was trained for a search, with what validation text said of it."""
        found = []
        for row, points in self.asked.points.items():
            for point in points if len(points) > 1 else ():
                found.append(
                    {
                        "row": row,
                        "settings": point.tried,
                        "validation_perplexity": point.validation_perplexity(self.there),
                        "chosen": point == self.best[row],
                    }
                )
        return found

    def _general(self) -> Corpus | None:
        """General text as a corpus whose test split is nearly all of it; None where none is given."""
        documents = self.asked.recipe.paths("compare", "general")
        if not documents:
            return None
        settings: dict[str, Any] = {
            "document_separator": self.asked.config.general_separator,
            **self.corpus.config.for_other_text,
            "validation_fraction": 0.0,
            "test_fraction": 0.9,
            "max_test_tokens": self.asked.config.general_tokens,
        }
        out = self.asked.out / "general" / digest([source_digest(find_sources(documents)), settings])[:12]
        build_corpus(documents, tokenizer=self.asked.recipe.places["corpus"]["tokenizer"], out=out, **settings)
        return Corpus(out)

    def _other_bases(self) -> list[dict[str, Any]]:
        """The memory beside each further base: a fixed weight chosen with that one, a head fitted with the first."""
        rows = []
        for place in self.asked.other_bases:
            tables = self._scores(self.corpus, place, {"memory": self.folders["memory"]})
            ways = list(all_ways(["memory"], tables["validation"], self.heads))
            table = tables["test"]
            parts = {str(number): way.label_log_probs(table) for number, way in enumerate(ways)}
            resampled = Resampled(table.document, parts, self.asked.evaluate)
            for number, way in zip(parts, ways, strict=True):
                figures = {**resampled.perplexity(number), "ratio": resampled.ratio(number, "0")}
                rows.append({"base": place, "parameters": model_size(place), **way.told, "test": figures})
        return rows

    def _in_context(self, row: str, test: ScoreTable) -> dict[str, Any]:
        """A row of in-context retrieval, with the base's figure on the same part of the text."""
        config = self.asked.in_context_config(row)
        positions, found = in_context_label_log_probs(
            self.corpus,
            self.asked.base,
            config,
            dtype=self.asked.evaluate.dtype,
            batch_tokens=self.asked.evaluate.batch_tokens,
        )
        parts = {row: found, BASE: test.voters[BASE].label[positions].astype(np.float64)}
        documents = np.unique(test.document[positions], return_inverse=True)[1]
        resampled = Resampled(documents, parts, self.asked.evaluate)
        figures = {**resampled.perplexity(row), "ratio": resampled.ratio(row, BASE)}
        part = {"tokens": len(positions), "base": resampled.perplexity(BASE)}
        by = f"; found by {config.encoder}" if config.encoder else ""
        told = {
            "row": row,
            "title": TITLES[row],
            "way": "part of the text",
            "tuned": f"nothing: the paper's setting{by}",
        }
        return {**told, "added": {}, "part": {**figures, **part}}

    def _added(self, row: str) -> dict[str, Any]:
        """What a row adds to the base: parameters, training and disk; and the time and disk of the stages before it,
        which several rows may share."""
        added: dict[str, Any] = {}
        inputs = {step.name: step.inputs for step in self.asked.steps}
        there, before = self.there, set[str]()
        for name in row.split("+"):
            if name == "knn":
                store = Datastore(there["datastore"])
                own = model_identity(store.teacher) != model_identity(self.asked.base)  # which runs beside the base
                parts = {"disk_bytes": store.manifest.bytes, "seconds": _seconds(there["datastore"])}
                parts["parameters"] = model_size(store.teacher) if own else 0
                made = "datastore"
            elif name in self.best:
                made = self.best[name].name
                folder = there[made]
                manifest = read_manifest(folder, "memory")
                facts = manifest.facts
                tokens = round(facts["epochs"] * self.corpus.split("train").n_positions)
                new = {"dapt": 0, "lora": facts.get("trained_parameters")}.get(name, facts["parameters"])
                parts = {"parameters": new, "training_tokens": tokens, "seconds": _seconds(folder)}
                parts["disk_bytes"] = manifest.bytes
                added.setdefault("settings", {})[name] = self.best[name].tried
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
                "disk_bytes": sum(read_manifest(there[step]).bytes for step in before),
            }
        return added

    def on_tasks(self, tasks: TaskSet, say: Callable[[str], None]) -> dict[str, Any]:
        """What each row reaches on the tasks, paired with the base; of memories that under the gate.

        Answers are kept, so that a comparison that was stopped asks no model twice.
        """
        found: dict[str, Answers] = {}
        tokenizer = load_tokenizer(resolve(self.asked.base))
        for way in self.ways:
            if way.weights is not None and way.rule is None:
                continue
            under = self.asked.base if way.base == BASE else str(self.folders[way.base])
            memories = {name: str(self.folders[name]) for name in way.memories}
            searched = self.retrieval if "knn" in memories else None
            known = () if way.rule is None else way.rule.memories.values()
            key = digest(
                [
                    [self.asked.evaluate.dtype, library_versions()],
                    [model_identity(under), *(read_manifest(folder).hash for folder in memories.values())],
                    None if searched is None else searched.model_dump(mode="json"),
                    None if way.rule is None else way.rule.config.model_dump(),
                    [_told(memory) for memory in known],
                ]
            )
            keep, title = self.asked.out / "answers" / f"{way.row}-{key[:12]}", TITLES[way.row]

            model = partial(self._spoken, way, under, memories, searched, say)
            found[way.row] = tasks.answers(model, tokenizer, title, keep, theirs=True)
        report = paired_report(found, seed=0, bootstrap=self.asked.evaluate.bootstrap, further=tasks.further)
        return report | {"titles": {row: TITLES[row] for row in found}, "run": tasks.told}

    def _spoken(
        self,
        way: Way,
        under: str,
        memories: Mapping[str, str],
        retrieval: RetrievalConfig | None,
        say: Callable[[str], None],
    ) -> PreTrainedModel:
        """A row's model, loaded for the tasks."""
        say(f"tasks with {TITLES[way.row]}")
        base = load_on_default_device(under, self.asked.evaluate.dtype)
        if way.rule is None:
            return base
        weights = {name: part.mix_weight for name, part in way.rule.memories.items() if part.mix_weight is not None}
        return MixedLM.from_pretrained(
            base, memory=memories, mix_weight=weights, gate=way.rule.config, memory_kwargs={"retrieval": retrieval}
        )

    def time(self, rows: list[dict[str, Any]]) -> None:
        """Put into each row what decoding takes that way; a fine-tuned base takes what the base takes."""
        timed = {row: str(self.folders[row]) for row in ("knn", "memory", "mlp") if row in self.folders}
        test, new = self.corpus.split("test"), max(2, self.asked.config.timed_tokens)
        read = max(1, min(64, self.corpus.config.block_size - new))  # all within a memory's window
        prompts = [
            str(self.corpus.tokenizer.decode(test.tokens[start : start + read], skip_special_tokens=True))
            for start in test.offsets[:-1][:4]
        ]
        searches = "in-context" in self.asked.rows
        found = bench(
            self.asked.base,
            timed,
            [prompt for prompt in prompts if prompt.strip()],
            tokenizer=self.corpus.tokenizer,
            retrieval=self.retrieval,
            in_context=self.corpus.folder if searches else None,
            passages=self.asked.in_context_config("in-context") if searches else None,
            config=BenchConfig(new_tokens=new, prompt_tokens=read, score_tokens=0, dtype=self.asked.evaluate.dtype),
        )
        as_well = {"dapt": "base", "lora": "base", "twin": "memory", "dapt+memory": "memory", "lora+memory": "memory"}
        as_well["dapt+knn"] = "knn"
        for row in rows:
            name = as_well.get(row["row"], row["row"])
            if name in found:
                row["decoding"] = found[name]
            if (drafted := f"{name} drafted") in found:
                row["drafted"] = found[drafted]


def _told(memory: GatedMemory) -> list[Any]:
    """What the gate knows of a memory, to be hashed."""
    return [memory.mix_weight, None if memory.head is None else memory.head.model_dump(mode="json")]


def _text_bytes(corpus: Corpus, split: str) -> int:
    """UTF-8 bytes of the text that the predicted tokens of a split stand for."""
    text, tokenizer = corpus.split(split), corpus.tokenizer
    return sum(len(str(tokenizer.decode(tokens[1:], skip_special_tokens=True)).encode()) for tokens in text.documents())


def _seconds(folder: Path) -> float | None:
    times = times_of(folder)
    return None if times is None else round(times.seconds_last_run, 1)
