"""What should a memory be trained on? Arms that are treated alike: `python -m benchmarks.study STUDY.yaml`.

Every arm is searched over the same settings, the best point is chosen by the perplexity of its best fixed mixture on
the validation split, and only that one is judged on the test split: alone, with the weight that validation chose, and
gated; in its domain, and on general text that nothing was fitted on. Each result is a JSON line appended to one file
at once; a study that was stopped, or killed, goes on where it was.
"""

import argparse
import gc
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from benchmarks.recipe import quick_overrides
from benchmarks.report import hardware, one_line_errors
from memlm.config import read_recipe
from memlm.corpus.blocks import Corpus
from memlm.corpus.build import build_corpus
from memlm.datastore.build import load_teacher
from memlm.datastore.store import Datastore
from memlm.errors import ConfigError
from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.intervals import Resampled
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.files import digest, replacing
from memlm.manifest import read_manifest
from memlm.memory.confidence import ConfidenceHead
from memlm.mix.gate import GatedMemory, weight_rule
from memlm.mix.gate_config import GateConfig
from memlm.runs.estimate import step_costs
from memlm.runs.plan import make_step, needed_steps, recipe_steps, training_step
from memlm.runs.recipe import Recipe, data_path
from memlm.scores.gated import gated_label_log_probs
from memlm.scores.table import score_corpus
from memlm.targets.config import RetrievalConfig
from memlm.targets.teacher import judge
from memlm.text import duration
from memlm.train.gate import fit_gate

GATES = ("posterior", "both")
_HEADING = re.compile(r"^ = (?!=).*(?<!=) = $", re.MULTILINE)


@dataclass(frozen=True)
class Point:
    """One memory to be trained."""

    arm: str
    settings: dict[str, Any]
    """`section.key` to value, on top of the study's recipe: the arm's own, then those searched over, then the seed."""

    @property
    def seed(self) -> int:
        return self.settings["train.seed"]

    @property
    def key(self) -> str:
        """What names it among the results."""
        return digest([self.arm, self.settings])[:12]


class Study:
    """A study's file, the folder it works in and the results that there are."""

    def __init__(
        self,
        path: Path,
        work: Path,
        results: Path,
        overrides: list[str] | tuple[str, ...] = (),
        *,
        keep_all: bool = False,
    ) -> None:
        """
        Args:
            path: The YAML file: a recipe, and a section `study`.
            overrides: `section.key=value`, as `memlm run --set` takes them.
            work: Folder for corpora, targets and memories.
            results: JSON lines; those of this study are gone on with.
            keep_all: Keep the memory of every point; else of an arm's and a seed's the best alone.

        Raises:
            ConfigError: The file does not fit.
        """
        sections = read_recipe(path, overrides)
        try:
            self.settings = sections.pop("study")
            self.arms: dict[str, dict[str, Any]] = self.settings["arms"]
            self.search: dict[str, list[Any]] = self.settings.get("search", {})
            self.general: dict[str, Any] = self.settings["general"]
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"study {path} lacks {error}: it is a recipe and a section study") from None
        self.sections: dict[str, dict[str, Any]] = sections
        self.name, self.work, self.results, self.keep_all = path.stem, work / path.stem, results, keep_all
        self.hash = digest([self.sections, self.general])[:12]

    # --- what is asked for ------------------------------------------------------------------------------------------

    def points(self, arms: list[str], seeds: list[int], *, search_once: bool = False) -> Iterator[Point]:
        """Every point, seed by seed; with `search_once`, of other seeds than 0 only what was best with that one."""
        for seed, arm in itertools.product(seeds, arms):
            first = self.best(arm, 0) if search_once and seed else None
            for values in itertools.product(*self.search.values()):
                searched = dict(zip(self.search, values, strict=True))
                if first is None or searched.items() <= first["settings"].items():
                    yield Point(arm, {**self.arms[arm], **searched, "train.seed": seed})

    def recipe(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe of a point."""
        sections = {name: dict(values) for name, values in self.sections.items()}
        for name, value in settings.items():
            section, key = name.split(".")
            sections.setdefault(section, {})[key] = value
        return Recipe(sections)

    # --- results ----------------------------------------------------------------------------------------------------

    def found(self, what: str) -> list[dict[str, Any]]:
        """The results of a kind that are there."""
        if not self.results.is_file():
            return []
        lines = [json.loads(line) for line in self.results.read_text(encoding="utf-8").splitlines() if line]
        own = {"study": self.name, "hash": self.hash, "what": what}
        return [line for line in lines if own.items() <= line.items()]

    def keep(self, what: str, line: dict[str, Any]) -> None:
        """Append a result."""
        machine = hardware()
        line = {"study": self.name, "hash": self.hash, "what": what, **line, "machine": machine}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {name: value for name, value in line.items() if name not in ("machine", "hash", "study")}
        print(json.dumps(shown), flush=True)

    def best(self, arm: str, seed: int) -> dict[str, Any] | None:
        """The point of an arm that validation found best."""
        there = [p for p in self.found("point") if p["arm"] == arm and p["settings"]["train.seed"] == seed]
        return min(there, key=lambda point: point["validation"]["mixture_perplexity"], default=None)

    # --- work -------------------------------------------------------------------------------------------------------

    def folders(self, recipe: Recipe, name: str, *goals: str) -> dict[str, Path]:
        """The corpus and the folders of these steps, with what they are made from, made where they are not there."""
        there: dict[str, Path] = {}
        for step in needed_steps(recipe_steps(recipe), ("corpus", *goals)):
            there[step.name] = make_step(self.work / name / step.name, step.plan(there), _say)
        return there

    def memory_folder(self, key: str) -> Path:
        return self.work / f"point-{key}" / "memory"

    def train(self, point: Point) -> None:
        """Train a point's memory and keep what validation said of it."""
        step = training_step(recipe := self.recipe(point.settings), "memory", "train")
        there = self.folders(recipe, point.arm, *step.inputs)
        began, out = time.monotonic(), self.memory_folder(point.key)
        make_step(out, step.plan(there), _say)
        gc.collect()  # a trainer refers to itself, and would keep its weights on an accelerator
        facts = read_manifest(out, "memory").facts
        made = read_manifest(there["targets"]).facts if "targets" in there else {}
        told = made.get("judged") or made.get("teacher_perplexity")
        self.keep(
            "point",
            {
                "arm": point.arm,
                "key": point.key,
                "settings": point.settings,
                "validation": facts["validation"]["best"] | {"base_perplexity": facts["validation"]["base_perplexity"]},
                "history": facts["validation"]["history"],
                "steps": facts["steps"],
                "parameters": facts["parameters"],
                "targets": told,
                "seconds": round(time.monotonic() - began),
            },
        )
        best = self.best(point.arm, point.seed)
        for other in [] if self.keep_all else self.found("point"):
            if (other["arm"], other["settings"]["train.seed"]) == (point.arm, point.seed) and other != best:
                shutil.rmtree(self.memory_folder(other["key"]).parent, ignore_errors=True)

    def prepare(self, arms: list[str]) -> None:
        """Make the corpora, and what these arms train on, so that several processes that share this folder find it."""
        recipe = self.recipe({})
        self.folders(recipe, "twin")
        for arm in arms:
            of_arm = self.recipe(self.arms[arm])
            self.folders(of_arm, arm, *training_step(of_arm, "memory", "train").inputs)
        for part in ("fit", "test"):
            self.general_corpus(part, recipe.places["corpus"]["tokenizer"])

    def general_corpus(self, part: str, tokenizer: str) -> Path:
        """Corpus of general text whose test split is all of it, made of `study.general.fit` or `.test`.

        Its documents begin at headings of WikiText, or are what `study.general.separator` parts.
        """
        lines = self.work / f"general-{part}.jsonl"
        if not lines.exists():
            text = Path(data_path(self.general[part])).read_text(encoding="utf-8")
            articles = _articles(text, self.general.get("separator"))
            lines.parent.mkdir(parents=True, exist_ok=True)
            lines.write_text("".join(json.dumps({"text": article}) + "\n" for article in articles), encoding="utf-8")
        sizes = {
            "max_test_tokens": self.general["tokens"],
            "block_size": self.sections["corpus"].get("block_size", 1024),
        }
        out = self.work / "general" / part
        build_corpus([str(lines)], tokenizer=tokenizer, out=out, validation_fraction=0.0, test_fraction=0.9, **sizes)
        return out

    def judge(self, arm: str, seed: int) -> None:
        """Fit the gate of an arm's best memory, and keep what it does on both test texts."""
        best = self.best(arm, seed)
        if best is None or any(line["key"] == best["key"] for line in self.found("arm")):
            return
        recipe = self.recipe(best["settings"])
        base, tokenizer = recipe.base, recipe.places["corpus"]["tokenizer"]
        corpus, memory = self.folders(recipe, arm)["corpus"], self.memory_folder(best["key"])
        fit, test = (self.general_corpus(part, tokenizer) for part in ("fit", "test"))
        evaluation: EvaluateConfig = recipe.configs.get("evaluate") or EvaluateConfig()
        if ConfidenceHead.read(memory) is None:
            fit_gate(memory, corpus=corpus, base=base, general=[fit], dtype=evaluation.dtype)
        weight = {"mix_weight": best["validation"]["mix_weight"]}
        texts = {"in_domain": (corpus, evaluation), "general": (test, evaluation.model_copy(update=weight))}
        found: dict[str, Any] = {}
        for name, (folder, config) in texts.items():
            for gate in GATES:
                report = evaluate_perplexity(folder, base=base, memory=str(memory), config=config, gate=gate)
                mixture = report["mixture"]
                found.setdefault(name, {"tokens": report["tokens"], "documents": report["documents"]})
                found[name] |= {"base": report["base"], "alone": report["memory"], "fixed": mixture["fixed"]}
                kept = ("perplexity", "interval", "mean_weight", "ratio_to_fixed")
                found[name][gate] = {key: mixture[key] for key in kept} | {"ratio_to_base": report["ratio"]}
        self.keep("arm", {"arm": arm, "key": best["key"], "settings": best["settings"], **found})

    def live(self) -> None:
        """Keep what live kNN-LM does with the teacher's datastore: k and temperature are those best on validation."""
        if self.found("live"):
            return
        recipe = self.recipe({})
        there = self.folders(recipe, "live", "datastore")
        store = Datastore(there["datastore"])
        teacher, _ = load_teacher(store.teacher, store.read_as)
        searched: dict[tuple[int, float], float] = {}
        for k in self.settings.get("live_k", [256]):
            judged = judge(store, teacher, "validation", k=k, positions=recipe.configs["targets"].judged_positions)
            for temperature in judged.neighbours:
                searched[k, temperature] = judged.nats(temperature, judged.best_share(temperature))
        k, temperature = min(searched, key=lambda pair: searched[pair])
        evaluation: EvaluateConfig = recipe.configs.get("evaluate") or EvaluateConfig()
        report = evaluate_perplexity(
            there["corpus"],
            base=recipe.base,
            memory=str(there["datastore"]),
            config=evaluation,
            retrieval=RetrievalConfig(k=k, target_temperature=temperature),
            gate="posterior",
        )
        tried = {f"k {k}, temperature {t:g}": round(nats, 4) for (k, t), nats in searched.items()}
        found = {"k": k, "target_temperature": temperature, "nats": tried}
        found |= {name: report[name] for name in ("tokens", "documents", "base", "mixture")}
        self.keep("live", found)

    def compare(self, against: str, seed: int) -> None:
        """Keep paired ratios of every arm's mixtures over those of `against`, on the test split of the domain."""
        lines = {line["arm"]: line for line in self.found("arm") if line["settings"]["train.seed"] == seed}
        if against not in lines or len(lines) < 2:
            return
        keys = sorted(line["key"] for line in lines.values())
        if any(line["keys"] == keys for line in self.found("pairs")):
            return
        recipe = self.recipe(lines[against]["settings"])
        config: EvaluateConfig = recipe.configs.get("evaluate") or EvaluateConfig()
        corpus = Corpus(self.folders(recipe, against)["corpus"])
        ways: dict[str, dict[str, np.ndarray]] = {"alone": {}, "fixed": {}, **{gate: {} for gate in GATES}}
        document = np.empty(0, np.int64)
        for arm, line in lines.items():
            folder = self.memory_folder(line["key"])
            base = self.recipe(line["settings"]).base
            tables = score_corpus(corpus, base, {"memory": str(folder)}, dtype=config.dtype)
            test, weight = tables["test"], line["in_domain"]["fixed"]["mix_weight"]
            document = test.document
            label, own = (test.voters[name].label.astype(np.float64) for name in ("base", "memory"))
            ways["alone"][arm] = own
            ways["fixed"][arm] = np.logaddexp(label + np.log1p(-weight), own + np.log(weight)) if weight else label
            for gate in GATES:
                rule = weight_rule(GateConfig(gate=gate), {"memory": GatedMemory(weight, ConfidenceHead.read(folder))})
                ways[gate][arm] = gated_label_log_probs(test, rule)[0]  # type: ignore[arg-type]
        found = {}
        for way, parts in ways.items():
            resampled = Resampled(document, parts, config)
            found[way] = {arm: resampled.ratio(arm, against) for arm in parts if arm != against}
        self.keep("pairs", {"against": against, "keys": keys, "ratios": found})


def _articles(text: str, separator: str | None) -> list[str]:
    if separator is not None:
        return [part for part in text.split(separator) if part.strip()]
    starts = [match.start() for match in _HEADING.finditer(text)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def quick_settings(study: Path, out: Path) -> list[str]:
    """Settings that put a toy model, its text and toy sizes in a study's place."""
    found, words = quick_overrides(str(study), out), (out / "general.txt").read_text(encoding="utf-8").splitlines()
    for part, lines in (("fit", words[::2]), ("test", words[1::2])):
        articles = (f" = {number} = \n{line}\n" for number, line in enumerate(lines))
        with replacing(out / f"{part}.txt") as temporary:
            temporary.write_text("".join(articles), encoding="utf-8")
    general = {"fit": str(out / "fit.txt"), "test": str(out / "test.txt"), "tokens": 3000}
    settings = read_recipe(study)["study"]
    search = {name: values[:1] for name, values in settings.get("search", {}).items()}
    models = {"init", "teacher", "base"}
    arms = {
        arm: {key: str(out / "model") if key.partition(".")[2] in models else value for key, value in values.items()}
        for arm, values in settings["arms"].items()
    }
    return [
        *found,
        "corpus.validation_fraction=0.4",  # a head is fitted on four documents at least
        f"study.arms={json.dumps(arms)}",
        f"study.general={json.dumps(general)}",
        f"study.search={json.dumps(search)}",
        f"study.live_k={[8] if settings.get('live_k') else []}",
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(study: Study, arms: list[str], seeds: list[int], *, minutes: float | None, search_once: bool = False) -> bool:
    """Work through the study as far as the time goes, seed by seed; whether it is finished."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for seed in seeds:
        for arm in arms:
            for point in study.points([arm], [seed], search_once=search_once):
                there = study.found("point")
                if any(line["key"] == point.key for line in there):
                    continue
                needed = max((line["seconds"] for line in there), default=0)
                if end is not None and there and time.monotonic() + needed > end:
                    _say(f"no time is left for a point of {duration(needed)}; the same command goes on here")
                    return False
                study.train(point)
            study.judge(arm, seed)
        against = study.settings.get("against", next(iter(study.arms)))
        if against in arms and len(arms) > 1:
            study.compare(against, seed)
    if study.settings.get("live_k"):
        study.live()
    return True


def left_to_do(study: Study, arms: list[str], seeds: list[int]) -> tuple[int, float, float]:
    """Points that are missing, about the hours that they take, and about the GiB that the study keeps on disk."""
    done = {line["key"] for line in study.found("point")}
    points = [point for point in study.points(arms, seeds) if point.key not in done]
    if not points:
        return 0, 0.0, 0.0
    recipe = study.recipe(points[0].settings)
    costs = step_costs(recipe, recipe.base, None)
    each, shared = costs["memory"], [cost for name, cost in costs.items() if name != "memory"]
    timed = [line["seconds"] for line in study.found("point")]
    seconds = sum(timed) / len(timed) if timed else each.seconds or 0.0
    others = sum(cost.seconds or 0.0 for cost in shared) if not timed else 0.0
    kept = (each.bytes or 0) * (len(arms) * len(seeds) + 1) + sum(cost.bytes or 0 for cost in shared)
    return len(points), (len(points) * seconds + others) / 3600, kept / 2**30


def table(study: Study) -> str:
    """The arms that were judged, as lines of Markdown."""
    rows = ["| arm | settings | alone | fixed | posterior | both | general: fixed | both |", "|---" * 8 + "|"]
    for line in study.found("arm"):
        domain, general = line["in_domain"], line["general"]
        settings = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in line["settings"].items())
        cells = [domain[way]["perplexity"] for way in ("alone", "fixed", "posterior", "both")]
        harm = [general[way]["perplexity"] / general["base"]["perplexity"] - 1 for way in ("fixed", "both")]
        numbers = [*(f"{cell:.3f}" for cell in cells), *(f"{part:+.2%}" for part in harm)]
        rows.append(f"| {' | '.join([line['arm'], settings, *numbers])} |")
    return "\n".join(rows)


@one_line_errors
def main(arguments: list[str] | None = None) -> int:
    """Run a study, as far as the time goes; the exit status is 1 where something is wrong."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="YAML file: a recipe and a section study; benchmarks/studies has some")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of memories; default runs/study")
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines, added to and gone on with")
    parser.add_argument("--arms", nargs="*", metavar="ARM", help="default all; none: live kNN-LM alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default 0")
    parser.add_argument("--minutes", type=float, help="start no point that would end later")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="another setting")
    parser.add_argument("--keep-all", action="store_true", help="keep the memory of every point, not the best alone")
    parser.add_argument("--max-hours", type=float, help="refuse a study that is expected to take longer")
    parser.add_argument("--max-gib", type=float, help="refuse a study that is expected to keep more on disk")
    parser.add_argument("--quick", action="store_true", help="toy size, on random words with a random model")
    parser.add_argument("--prepare", action="store_true", help="make corpora, and what --arms train on, and no more")
    parser.add_argument("--search-once", action="store_true", help="other seeds take the settings that seed 0 chose")
    parser.add_argument("--table", action="store_true", help="print the arms that were judged, and run nothing")
    given = parser.parse_args(arguments)
    logging.disable_progress_bar()
    work = given.work.resolve()
    overrides = [*(quick_settings(given.study, work / "toy") if given.quick else []), *given.set]
    study = Study(given.study, work, given.results, overrides, keep_all=given.keep_all)
    arms = list(study.arms) if given.arms is None else given.arms
    if unknown := set(arms) - study.arms.keys():
        raise ConfigError(f"no arm is called {min(unknown)!r}; there are {', '.join(study.arms)}")
    if given.table:
        print(table(study))
        return 0
    if given.prepare:
        study.prepare(given.arms or [])
        return 0
    points, hours, gib = left_to_do(study, arms, given.seeds)
    _say(f"{points} memories to train, about {duration(3600 * hours)} and {gib:.1f} GiB")
    for name, there, most in (("hours", hours, given.max_hours), ("GiB", gib, given.max_gib)):
        if most is not None and there > most:
            raise ConfigError(f"about {there:.1f} {name}, above the {most:g} allowed, for {points} memories")
    run(study, arms, given.seeds, minutes=given.minutes, search_once=given.search_once)
    return 0


if __name__ == "__main__":
    sys.exit(main())
