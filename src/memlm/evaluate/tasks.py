"""Tasks of lm-eval for a base and for its mixture with memories: the same items, so that differences are paired."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from memlm.errors import ArtifactError, ConfigError, InputError
from memlm.evaluate.judged import judged
from memlm.evaluate.papers import PREFIX, TASKS, asked_tasks, label_words, read_items
from memlm.files import cache_dir, digest, lasting_name, read_json, write_json
from memlm.manifest import library_versions
from memlm.mix.gate_config import GateConfig, GateName
from memlm.progress import progress_bar
from memlm.targets.config import RetrievalConfig

FIXED, BASE = "fixed", "base"  # as in speakers.py and scores, which bring torch
_WAYS = {
    BASE: "the base alone",
    FIXED: "the fixed weight",
    **{name: f"the gate {name}" for name in get_args(GateName) if name != "none"},
}
_SAME = "all models are to answer in the same tokens"
Answers = dict[str, tuple[str, NDArray[np.float64]]]


def evaluate_tasks(
    tasks: Sequence[str],
    *,
    base: str | Path,
    memory: Any,
    mix_weight: float | Mapping[str, float] | None = None,
    gate: GateName | GateConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    include: Sequence[str | Path] = (),
    data: str | Path | None = None,
    others: Mapping[str, str | Path] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
    dtype: str = "auto",
    seed: int = 0,
    bootstrap: int = 1000,
    above: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What base and mixture reach on tasks of lm-eval, with intervals, and the paired change.

    What a model answers to a task of the papers is kept in the cache, so that a run that was stopped goes on; unless a
    memory is given loaded, which nothing names. Tasks of lm-eval are asked anew: what is behind their names may change.

    Args:
        tasks: Names of tasks or groups of lm-eval, or of those in `include`; with `papers:` in front, of the papers'
            own (`memlm.evaluate.papers`).
        base: Path, hub id or packaged name.
        memory: Folder, hub id or loaded memory, or name to any of these.
        mix_weight: As `MixedLM.from_pretrained` takes it.
        gate: As there. Where a gate weighs the memories and fixed weights are known, those are evaluated beside it.
        retrieval: How datastores are searched; as they were evaluated, or by default, if None.
        include: Folders of further task files.
        data: Folder of the papers' tasks; None: the hub.
        others: Name to a further model that answers alone, such as a base that was fine-tuned.
        limit: Items of each task at most; its first ones, of a papers' task some drawn at random.
        num_fewshot: Examples in front of each item; as the task says if None. The papers' tasks have theirs.
        batch_size: Requests in one forward pass.
        chat_template: Wrap every item as a chat turn.
        dtype: Precision of base and memories.
        seed: Draws examples and resamplings.
        bootstrap: Resamplings of items behind the 95% intervals.
        above: Task to what chance gives; tasks in which the base's interval is not above it are not pooled, for where
            the base knows nothing a memory has nothing to harm. Of a task with several metrics the first is pooled.

    Returns:
        `tasks`: name to `metric`, `items`, `values` (way to `value` and `interval`; a way is `base`, `fixed`, the
        gate's name, or one of `others`) and `change` (way to difference from the base, paired); `pooled`: the mean
        over tasks in the same form, items resampled within each, or None where no task is pooled; `run`: what was
        asked for.

    Raises:
        ConfigError: lm-eval is not installed, or a setting is out of range.
        InputError: A task is unknown, its data is not there or faulty, or lm-eval cannot load it.
        ModelError: Base or memory cannot be reached, or gives scores that are not finite.
    """
    others = others or {}
    if taken := _WAYS.keys() & others.keys():
        raise ConfigError(f"{min(taken)} names a way of its own; call the further model something else")
    asked = TaskSet(
        tasks,
        include=include,
        data=data,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        chat_template=chat_template,
        seed=seed,
    )
    from memlm.evaluate.speakers import Speakers
    from memlm.mix.mixed_lm import MixedLM
    from memlm.models.loading import load_on_default_device, resolve
    from memlm.models.tokenizers import check_same, load_tokenizer

    tokenizer = load_tokenizer(resolve(str(base)))
    for other, place in others.items():
        check_same(tokenizer, load_tokenizer(resolve(str(place))), f"base {base}", f"{other} ({place})", advice=_SAME)
    options: Any = {"memory": memory, "mix_weight": mix_weight, "gate": gate}
    mixed = MixedLM.on_default_device(base, dtype=dtype, retrieval=retrieval, **options)
    kept = _kept_answers(mixed, base, memory, others, [dtype])
    speakers: Any = Speakers(mixed)
    del mixed
    told, found, ways = speakers.told, {}, [*speakers.names, *others]
    for way in ways:
        name = _WAYS.get(way) or way
        if way in others:
            speakers = None  # their place is needed

        def speaker(way: str = way, name: str = name, speakers: Any = speakers) -> Any:
            print(f"tasks with {name}", file=sys.stderr)
            return load_on_default_device(others[way], dtype) if speakers is None else speakers[way]

        found[way] = asked.answers(speaker, tokenizer, name, kept(way))
    report = paired_report(found, seed=seed, bootstrap=bootstrap, above=above, further=asked.further)
    report["run"] = {
        "base": lasting_name(str(base)),
        "memory": {n: lasting_name(str(m)) for n, m in memory.items()}
        if isinstance(memory, Mapping)
        else lasting_name(str(memory)),
        **told,
        "others": {n: lasting_name(str(place)) for n, place in others.items()},
        **({} if retrieval is None else {"retrieval": retrieval.found}),
        **asked.told,
    }
    return report


def _kept_answers(
    mixed: Any, base: str | Path, memory: Any, others: Mapping[str, str | Path], settings: list[Any]
) -> Callable[[str], Path | None]:
    """Gives a way's folder in the cache; None where a memory was given loaded, which nothing names."""
    from memlm.memory.retrieval import RetrievalSettings
    from memlm.models.identity import model_identity

    places = memory if isinstance(memory, Mapping) else dict.fromkeys(mixed.memories, memory)
    heads = [part.confidence_head and part.confidence_head.digest for part in mixed.memories.values()]
    searches = [s.retrieval.found for m in mixed.memories.values() if isinstance(s := m.settings, RetrievalSettings)]
    rule = [mixed.gate.model_dump(), mixed.mix_weights, heads, searches]

    def folder(way: str) -> Path | None:
        who: list[Any] = [model_identity(str(others.get(way, base)))]
        if way not in (BASE, *others):
            if not all(isinstance(place, str | Path) for place in places.values()):
                return None
            who += [way, rule, *([name, model_identity(str(place))] for name, place in places.items())]
        return cache_dir() / "answers" / digest([who, settings, library_versions()])[:32]

    return folder


class TaskSet:
    """Tasks whose items are at hand, to be put to any number of models of one tokenizer."""

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        include: Sequence[str | Path] = (),
        data: str | Path | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        chat_template: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args, Raises:
            As for `evaluate_tasks`.
        """
        check_lm_eval()
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: must be 1 or more")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for talker in ("lm_eval", "lm-eval"):
            logging.getLogger(talker).setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager

        if missing := next((place for place in include if not Path(place).is_dir()), None):
            raise InputError(f"{missing} is no folder of task files")
        ours, self._theirs = asked_tasks(tasks)
        self._items = {name: read_items(name, data, limit=limit, seed=seed) for name in ours}
        self._words = {name: label_words(name, data) for name in ours}
        if chat_template and ours:
            raise ConfigError(f"{PREFIX}{ours[0]} has a prompt of its own: leave out --chat-template")
        places: list[str | Path] = [str(place) for place in include]
        # lm-eval's own take seconds to list; a group in a folder may name some of them
        self._manager = TaskManager(include_path=places or None, include_defaults=False)
        if not set(self._theirs) <= set(self._manager.all_subtasks):
            self._manager = TaskManager(include_path=places or None)
        if unknown := [task for task in self._theirs if task not in self._manager.all_tasks]:
            raise InputError(
                f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them, --include adds folders"
            )
        self._asked = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": chat_template}
        self._seed, self._batch_size = seed, batch_size
        self.further = {f"{PREFIX}{task} {metric}" for task in ours for metric in TASKS[task].metrics[1:]}
        """Rows of what is told of a task beside its first metric."""
        self.told = {
            "words": {PREFIX + task: found for task, found in self._words.items() if found},
            **self._asked,
            "seed": seed,
        }
        """What a report says of it."""

    def answers(
        self, model: Callable[[], Any], tokenizer: Any, name: str, keep: Path | None = None, *, theirs: bool = False
    ) -> "Answers":
        """What a model answers: task to the name of its metric, and what that is for each item.

        Args:
            model: Gives it, where it is to be asked.
            name: What an error calls the model.
            keep: Folder for what this model answers, task by task; what is there is not asked again.
            theirs: Keep the answers to lm-eval's own tasks as well, by their names.

        Raises:
            ModelError: It gives scores that are not finite.
            InputError: lm-eval cannot run a task.
        """
        from memlm.evaluate.lm_eval import FiniteLM

        @cache
        def speaker() -> Any:
            found = cast(Any, FiniteLM)(pretrained=model(), tokenizer=tokenizer, batch_size=self._batch_size)
            found.called = name
            return found

        found: Answers = {}
        if self._theirs:
            place = keep / f"{digest([self._theirs, self._asked, self._seed])[:16]}.json" if keep and theirs else None
            found |= _once(place, lambda: _items(speaker(), self._theirs, self._manager, self._seed, self._asked))
        if not self._items:
            return found
        places: dict[str, Path | None] = {}
        for task, items in self._items.items():
            asked = digest([[dataclasses.asdict(item) for item in items], self._words[task]])[:16]
            places[task] = keep / f"{task}-{asked}.json" if keep else None
        left = {task for task, place in places.items() if place is None or not place.exists()}
        known = sum(len(items) for task, items in self._items.items() if task not in left)
        with progress_bar(sum(map(len, self._items.values())), name, initial=known, unit="item") as bar:
            for task, place in places.items():
                found |= _once(place, lambda task=task: self._judged(task, speaker(), bar.update))
        return found

    def _judged(self, task: str, speaker: Any, progress: Callable[[int], object]) -> "Answers":
        found = {}
        for metric, values in judged(task, self._items[task], speaker, self._words[task], progress).items():
            row = f"{PREFIX}{task} {metric}"
            found[row if row in self.further else f"{PREFIX}{task}"] = metric, values
        return found


def _once(place: Path | None, ask: Callable[[], "Answers"]) -> "Answers":
    """The answers that a file holds; where it is not there they are asked for and written to it."""
    if place is None:
        return ask()
    if not place.exists():
        write_json(place, [(row, metric, values.tolist()) for row, (metric, values) in ask().items()])
    try:
        kept = [
            (row, str(metric), np.array(values, np.float64)) for row, metric, values in read_json(place, limit=1 << 30)
        ]
    except (TypeError, ValueError):
        raise ArtifactError(f"{place} holds no answers; delete it, and they are asked for again") from None
    return {row: (metric, values) for row, metric, values in kept}


def check_lm_eval() -> None:
    """Raise unless lm-eval is installed.

    Raises:
        ConfigError: It is not.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is missing: pip install 'memlm[tasks]' brings lm-eval")


def _items(speaker: Any, tasks: Sequence[str], manager: Any, seed: int, asked: Mapping[str, Any]) -> Answers:
    """Task to its first metric, and what that is for each item, in the order of items."""
    import lm_eval

    from memlm.evaluate.lm_eval import lm_eval_errors

    library = cast(Any, lm_eval)  # it keeps its signatures from type checkers
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    with lm_eval_errors(f"lm-eval cannot run {', '.join(tasks)}"):
        results = library.simple_evaluate(
            model=speaker,
            tasks=list(tasks),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            **asked,
            **seeds,
        )
    found = {}
    for task, samples in results["samples"].items():
        metric = results["configs"][task]["metric_list"][0]["metric"]
        first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]  # each has all items
        try:
            kept = sorted(first, key=lambda sample: sample["doc_id"])
            found[task] = metric, np.array([float(sample[metric]) for sample in kept])
        except (KeyError, TypeError, ValueError):
            print(f"task {task} is left out: {metric} has no value for each item", file=sys.stderr)
    if not found:
        raise InputError(f"{', '.join(tasks)}: no metric that has a value for each item")
    return found


def paired_report(
    found: Mapping[str, Answers],
    *,
    seed: int,
    bootstrap: int,
    above: Mapping[str, float] | None = None,
    further: Collection[str] = (),
) -> dict[str, Any]:
    """Values and paired changes, per task and pooled, but for rows of `further` metrics; all ways share the draws.

    Args:
        found: Way to its answers; `base` is one of them.
        seed, bootstrap, above: As for `evaluate_tasks`.
        further: Rows that are not pooled.

    Returns:
        `tasks` and `pooled`, as `evaluate_tasks` gives them.
    """
    above = above or {}
    rng = np.random.default_rng(seed)
    tasks, pooled, drawn_pooled, pooled_items = {}, {}, {}, 0
    for task, (metric, of_base) in found[BASE].items():
        items = len(of_base)
        draws = rng.integers(items, size=(bootstrap, items))
        values = {way: results[task][1] for way, results in found.items()}
        drawn = {way: value[draws].mean(1) for way, value in values.items()}
        means = {way: float(value.mean()) for way, value in values.items()}
        tasks[task] = {"metric": metric, "items": items, **_figures(means, drawn)}
        if task in further:
            continue
        if task in above and not (bootstrap and np.quantile(drawn[BASE], 0.025) > above[task]):
            continue
        pooled_items += items
        for way in values:
            pooled.setdefault(way, []).append(means[way])
            drawn_pooled.setdefault(way, []).append(drawn[way])
    if not pooled:
        return {"tasks": tasks, "pooled": None}
    means = {way: float(np.mean(values)) for way, values in pooled.items()}
    drawn = {way: np.mean(values, 0) for way, values in drawn_pooled.items()}
    return {"tasks": tasks, "pooled": {"items": pooled_items, **_figures(means, drawn)}}


def _figures(means: Mapping[str, float], drawn: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    def figure(mean: float, draws: NDArray[np.float64]) -> dict[str, Any]:
        interval = np.quantile(draws, [0.025, 0.975]).round(4).tolist() if len(draws) else None
        return {"value": round(mean, 4), "interval": interval}

    return {
        "values": {way: figure(mean, drawn[way]) for way, mean in means.items()},
        "change": {way: figure(means[way] - means[BASE], drawn[way] - drawn[BASE]) for way in means if way != BASE},
    }


def tasks_table(report: Mapping[str, Any]) -> str:
    """The report as lines of text; changes are in points, with their paired intervals."""
    rows = report["tasks"] | ({"pooled": report["pooled"]} if report["pooled"] is not None else {})
    ways = list(next(iter(rows.values()))["values"])
    width = max(len(name) for name in rows) + 2
    lines = [f"{'':<{width}}{'items':>7}" + "".join(f"{way:>11}" for way in ways) + "   change in points"]
    for name, row in rows.items():
        values = "".join(f"{row['values'][way]['value']:>11.3f}" for way in ways)
        lines.append(f"{name:<{width}}{row['items']:>7,}{values}   {_changes(row)}".rstrip())
    return "\n".join(lines)


def _changes(row: Mapping[str, Any]) -> str:
    told = []
    for way, change in row["change"].items():
        interval = change["interval"]
        low_high = "" if interval is None else " ({:+.1f} to {:+.1f})".format(*(100 * end for end in interval))
        told.append(f"{way} {100 * change['value']:+.1f}{low_high}")
    return ", ".join(told)
