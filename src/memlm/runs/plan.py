"""A recipe's steps in order; a finished folder of the same identity is used where it lies, in this run or another's."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memlm.errors import ArtifactError, ConfigError, OutputBusyError
from memlm.manifest import MANIFEST, PLAN, read_manifest, times_of
from memlm.runs.recipe import NO_TEACHER, Recipe
from memlm.stage import Plan, StageSpec, check_output, run_stage
from memlm.text import duration, size
from memlm.train.config import TrainConfig

if TYPE_CHECKING:
    from memlm.runs.estimate import Cost


@dataclass(frozen=True)
class Step:
    """One folder of a run."""

    name: str
    inputs: tuple[str, ...]
    """Names of the steps whose folders it reads."""
    plan: Callable[[dict[str, Path]], Plan]
    """What the stage is to make of the folders of earlier steps; its identity is known once they are finished."""


def recipe_steps(recipe: Recipe) -> list[Step]:
    """The steps of a recipe that write folders of stages, each after those that it reads; evaluations come after.

    Raises:
        ConfigError: The start model or a field of the trainer does not fit.
    """
    from memlm.corpus.build import plan_corpus
    from memlm.datastore.build import plan_datastore
    from memlm.targets.authors import plan_written
    from memlm.targets.build import plan_targets
    from memlm.train.trainer import check_trainer_fields

    places, configs = recipe.places, recipe.configs
    for name in ("teacher", "train", "twin", "mlp", "dapt", "lora"):  # now, not after hours of other stages
        if name in configs:
            check_trainer_fields(configs[name], f"{name}.")
    tokenizer = places["corpus"]["tokenizer"]
    corpus = {"tokenizer": tokenizer, "given": recipe.given, "config": configs["corpus"]}
    steps = [Step("corpus", (), lambda _: plan_corpus(recipe.documents, **corpus))]
    if "teacher" in configs:
        tune = {"init": places["teacher"]["init"], "config": configs["teacher"]}
        steps.append(Step("teacher", ("corpus",), partial(_of_corpus, **tune)))
    folds = recipe.fold_teachers
    for name, config in folds.items():
        steps.append(Step(name, ("corpus",), partial(_of_corpus, init=places["teacher"]["init"], config=config)))
    if recipe.has_teacher:
        given = places["datastore"].get("teacher")
        steps.append(
            Step(
                "datastore",
                ("corpus",) if given else ("corpus", "teacher"),
                lambda there: plan_datastore(
                    there["corpus"], teacher=given or str(there["teacher"]), config=configs["datastore"]
                ),
            )
        )
    if write := configs.get("write"):
        steps.append(_asking(recipe, "written", "corpus", plan_written, write, alone=not write.folds))
    targets, source = configs["targets"], "written" if write else "corpus"
    if recipe.speaks_alone:
        alone = not targets.folds or write is not None  # what was written needs somebody beside teachers of folds
        steps.append(_asking(recipe, "targets", source, plan_targets, targets, alone=alone))
    else:
        steps.append(_asking(recipe, "targets", "datastore", plan_targets, targets, alone=False))
    steps.append(training_step(recipe, "memory", "train"))
    if "twin" in configs:
        steps.append(training_step(recipe, "twin", "twin"))
    return steps


def _asking(recipe: Recipe, name: str, source: str, plan: Callable[..., Plan], config: Any, *, alone: bool) -> Step:
    """A step in which teachers speak of a source, or write for it: those of folds, one that is alone, or both."""
    folds = [*recipe.fold_teachers] if config.folds else []
    own = ["teacher"] if alone and recipe.speaker is None else []
    return Step(
        name,
        (source, *folds, *own),
        lambda there: plan(
            there[source],
            teacher=None if not alone else str(there["teacher"]) if own else recipe.speaker,
            fold_teachers=[there[fold] for fold in folds],
            config=config,
        ),
    )


def needed_steps(steps: Sequence[Step], goals: Iterable[str]) -> list[Step]:
    """The steps of these names, and all that they are made from, in order.

    Raises:
        ConfigError: A datastore is among them, and there is no teacher to make it.
    """
    needed = set(goals)
    for step in reversed(steps):
        needed |= set(step.inputs) if step.name in needed else set()
    if "datastore" in needed and all(step.name != "datastore" for step in steps):
        raise ConfigError(NO_TEACHER)
    return [step for step in steps if step.name in needed]


def _goals(recipe: Recipe) -> set[str]:
    """Steps whose folders are evaluated."""
    return {"corpus", *(_JUDGED[row] for row in evaluated_rows(recipe))}


def _of_corpus(there: Mapping[str, Path], **how: Any) -> Plan:
    """Training on the corpus itself."""
    from memlm.train.run import plan_memory

    return plan_memory(there["corpus"], **how)


def training_step(recipe: Recipe, name: str, section: str, config: TrainConfig | None = None) -> Step:
    """The step that trains what a section says.

    Args:
        name: Of the step.
        section: `train`, `twin` or `mlp`, beside the base, on targets where they count; or `dapt` or `lora`, which
            fine-tune it on the corpus.
        config: What is trained instead of what the section says.
    """
    from memlm.train.run import plan_memory

    base = recipe.base
    config = recipe.configs[section] if config is None else config
    assert config is not None
    if section in ("dapt", "lora"):
        return Step(name, ("corpus",), partial(_of_corpus, init=base, config=config))
    places = recipe.places["mlp" if section == "mlp" else "train"]
    text = "written" if "write" in recipe.configs and section != "twin" else "corpus"
    stored, data = places.get("activations"), "targets" if config.kl_weight else text
    own = stored == "datastore"
    return Step(
        name,
        (data, "datastore") if own else (data,),
        lambda there: plan_memory(
            there[data],
            init=places.get("init"),
            base=base,
            activations=there["datastore"] if own else stored,
            config=config,
        ),
    )


_JUDGED = {"memory": "memory", "twin": "twin", "retrieval": "datastore"}
"""Row of the results to the step whose folder stands beside the base."""


def evaluated_rows(recipe: Recipe) -> list[str]:
    """What the recipe evaluates, each beside the base."""
    return [row for row in _JUDGED if row == "memory" or row in recipe.configs]


def evaluation(recipe: Recipe, row: str, there: dict[str, Path]) -> dict[str, Any]:
    """Arguments of `evaluate_perplexity`, but for where it goes."""
    return {
        "corpus": there["corpus"],
        "base": recipe.places.get("evaluate", {}).get("base", recipe.base),
        "memory": str(there[_JUDGED[row]]),
        "config": recipe.configs.get("evaluate"),
        "retrieval": recipe.configs.get("retrieval") if row == "retrieval" else None,
    }


def find_folder(out: Path, spec: StageSpec) -> Path | None:
    """The finished folder of this spec: `out`, or one of the same user's in the runs beside that of `out`.

    Manifests are read anew each time, with the presence and sizes of their files; damaged folders of others are passed.

    Raises:
        OutputExistsError: `out` holds something else.
        ArtifactError: `out` is damaged.
    """
    if check_output(out, spec):
        return out
    if is_begun(out):
        return None
    user = getattr(os, "getuid", int)()
    for manifest in sorted(Path(os.path.abspath(out)).parent.parent.glob(f"*/*/{MANIFEST}")):
        with contextlib.suppress(ArtifactError, OSError):
            folder = manifest.parent.resolve()
            if folder.stat().st_uid == user and read_manifest(folder, spec.kind).identity == spec.identity:
                return folder
    return None


def is_begun(out: Path) -> bool:
    """Whether a run has stopped in `out`, which is then finished there."""
    return any((folder / PLAN).is_file() for folder in (out, Path(f"{os.path.abspath(out)}.partial")))


_LOOK_AGAIN = 1.0  # seconds


def make_step(out: Path, plan: Plan, say: Callable[[str], None]) -> Path:
    """The finished folder of a step: found, and then linked to from `out` where the system can, or made at `out`.

    Where another process makes it there, it is waited for.
    """
    if out.is_symlink() and not out.exists() and not os.path.isabs(out.readlink()):  # the run that it led to is gone
        out.unlink()
    waits = False
    while (found := find_folder(out, plan.spec)) is None:
        if not waits:
            say(f"{out.name} -> {out}")
        try:
            run_stage(out, *plan)
        except OutputBusyError as error:
            if not waits:
                say(f"waiting: {error}")
            waits = True
            time.sleep(_LOOK_AGAIN)
        else:
            return out
    say(f"{out.name} found at {found}")
    if found != out:
        with contextlib.suppress(OSError):
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.is_dir():
                out.rmdir()  # an empty folder the user made
            out.symlink_to(os.path.relpath(found, out.parent.resolve()), target_is_directory=True)
            return out
    return found


ACCELERATOR_RATE = 3e14
"""Floating-point operations a second by which a plan tells hours on an accelerator; assumed, not measured."""


@dataclass(frozen=True)
class Planned:
    """A step of a run, as `plan_recipe` finds it."""

    step: str
    state: Literal["there", "found", "unfinished", "to be made"]
    """`found` is in another run's folder, and would be used."""
    folder: str
    tokens: int | None
    """Tokens that it reads; None where nothing tells how many its documents hold."""
    seconds: float | None
    """What its last run took where it is finished, else about what it will take."""
    bytes: int | None
    """On disk: as it is where it is finished, else about what it will be."""
    memory: int | None = None
    """Bytes that it holds at most, about."""
    operations: float | None = None
    """Floating-point operations of models, about."""

    @property
    def is_made(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in ("there", "found")


def plan_recipe(sections: dict[str, dict[str, Any]], out: str | Path) -> list[Planned]:
    """What `run_recipe` would do, step by step; reads manifests and configs, and writes nothing.

    A step is known to be there once all that it reads is. A packaged model is fetched if it was not yet.

    Raises:
        OutputExistsError: A folder of the run holds something else, as `run_recipe` would say.
    """
    recipe, out = Recipe(sections), Path(out)
    from memlm.evaluate.perplexity import report_spec
    from memlm.runs.estimate import step_costs

    steps = needed_steps(recipe_steps(recipe), _goals(recipe))
    names, there = [step.name for step in steps], found_steps(steps, out)
    for row in evaluated_rows(recipe):
        names.append(name := f"evaluation-{row}")
        known = there.keys() >= {"corpus", _JUDGED[row]}
        if known and check_output(out / name, report_spec(**evaluation(recipe, row, there))):
            there[name] = out / name
    return planned(names, there, step_costs(recipe, recipe.base, there.get("corpus")), out)


def found_steps(steps: Iterable[Step], out: Path) -> dict[str, Path]:
    """Name to folder of the steps that are finished; one is known to be once all that it reads is."""
    there: dict[str, Path] = {}
    for step in steps:
        if there.keys() >= set(step.inputs) and (found := find_folder(out / step.name, step.plan(there).spec)):
            there[step.name] = found
    return there


def planned(names: Iterable[str], there: Mapping[str, Path], costs: Mapping[str, "Cost"], out: Path) -> list[Planned]:
    """What is there and what is to be made, by name, with the costs of the latter."""
    from memlm.runs.estimate import Cost

    found_all = []
    for name in names:
        folder, cost, found = out / name, costs.get(name, Cost()), there.get(name)
        if found is not None:
            size = read_manifest(found).bytes
            took = times.seconds_last_run if (times := times_of(found)) else None
            cost, state = cost._replace(seconds=took, bytes=size), "there" if found == folder else "found"
        else:
            state = "unfinished" if is_begun(folder) else "to be made"
        found_all.append(Planned(name, state, str(found or folder), *cost))
    return found_all


def run_recipe(
    sections: dict[str, dict[str, Any]], out: str | Path, *, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run every stage of a recipe into folders below `out`; what is finished there, or in a run beside it, is used.

    Args:
        sections: As in the YAML file.
        out: Folder for those of `corpus/`, `teacher/`, `datastore/`, `targets/`, `memory/` and `twin/` that are needed,
            and their evaluations. Where a run beside it has made the same, the name is a link to that folder.
        say: Told of each step before it starts: where it goes, or where it was found.

    Returns:
        Row name (`memory`, `twin`, `retrieval`) to the report of `evaluate_perplexity`.
    """
    recipe, out = Recipe(sections), Path(out)
    from memlm.corpus.build import corpus_notes
    from memlm.evaluate.perplexity import evaluate_perplexity

    there: dict[str, Path] = {}
    for step in needed_steps(recipe_steps(recipe), _goals(recipe)):
        there[step.name] = make_step(out / step.name, step.plan(there), say)
        for line in corpus_notes(read_manifest(there["corpus"])) if step.name == "corpus" else ():
            say(f"note: {line}")
    reports = {}
    for row in evaluated_rows(recipe):
        say(f"evaluation of {row} -> {out / f'evaluation-{row}'}")
        reports[row] = evaluate_perplexity(**evaluation(recipe, row, there), out=out / f"evaluation-{row}")
    return reports


def run_folder(recipe: str | Path) -> Path:
    """Where a recipe file runs unless told otherwise: `runs/NAME`."""
    return Path("runs") / Path(recipe).stem


def plan_table(steps: list[Planned]) -> str:
    """A plan as lines of text, with the totals of what is left to do."""
    left = [step for step in steps if not step.is_made]
    rows = [("step", "", "tokens", "time", "disk", "memory", "folder")]
    for step in steps:
        figures = _figures(step.tokens, step.seconds, step.bytes, step.memory, step.is_made)
        rows.append((step.step, step.state, *figures, step.folder))

    def total(name: str) -> Any:
        values = [getattr(step, name) for step in left]
        return None if None in values else sum(values)

    most = max((step.memory for step in left if step.memory is not None), default=None)
    figures = _figures(total("tokens"), total("seconds"), total("bytes"), most, False)
    rows.append(("to do", f"{len(left)} steps", *figures, ""))
    first, state = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{r[0]:<{first}}  {r[1]:<{state}}{r[2]:>15}{r[3]:>15}{r[4]:>15}{r[5]:>15}  {r[6]}".rstrip() for r in rows]
    if operations := total("operations"):
        lines.append(
            f"models compute about {operations:.1e} operations: {duration(operations / ACCELERATOR_RATE)} on an"
            f" accelerator that reaches {ACCELERATOR_RATE:.0e} a second, about a third of an H100's bfloat16 (assumed)"
        )
    return "\n".join(lines)


def _figures(
    tokens: int | None, seconds: float | None, disk: int | None, memory: int | None, known: bool
) -> tuple[str, str, str, str]:
    about = "" if known else "about "
    took = "?" if seconds is None else about + duration(seconds)
    held = "" if known else "?" if memory is None else about + size(memory)
    return "?" if tokens is None else f"{tokens:,}", took, "?" if disk is None else about + size(disk), held
