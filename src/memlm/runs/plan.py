"""A recipe's steps in order; a finished folder of the same identity is used where it lies, in this run or another's."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlm.config import read_recipe
from memlm.errors import ArtifactError
from memlm.manifest import MANIFEST, PLAN, read_manifest
from memlm.runs.recipe import Recipe, data_path
from memlm.stage import Plan, StageSpec, check_output, run_stage


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
    from memlm.targets.build import plan_targets
    from memlm.train.run import plan_memory
    from memlm.train.trainer import check_trainer_fields

    places, configs = recipe.places, recipe.configs
    for name in ("teacher", "train", "twin"):  # now, not after hours of other stages
        if name in configs:
            check_trainer_fields(configs[name], f"{name}.")
    documents, tokenizer = places["corpus"]["documents"], places["corpus"]["tokenizer"]
    documents = [data_path(d) for d in ([documents] if isinstance(documents, str) else documents)]
    given, base = places["datastore"].get("teacher"), base_of(recipe)
    stored = places["train"].get("activations")
    own = stored == "datastore"

    def student(section: str) -> Callable[[dict[str, Path]], Plan]:
        return lambda there: plan_memory(
            there["targets"],
            init=places["train"].get("init"),
            base=base,
            activations=there["datastore"] if own else stored,
            config=configs[section],
        )

    steps = [Step("corpus", (), lambda _: plan_corpus(documents, tokenizer=tokenizer, config=configs["corpus"]))]
    if "teacher" in configs:
        begin, teacher = places["teacher"]["init"], configs["teacher"]
        steps.append(
            Step("teacher", ("corpus",), lambda there: plan_memory(there["corpus"], init=begin, config=teacher))
        )
    steps += [
        Step(
            "datastore",
            ("corpus",) if given else ("corpus", "teacher"),
            lambda there: plan_datastore(
                there["corpus"], teacher=given or str(there["teacher"]), config=configs["datastore"]
            ),
        ),
        Step("targets", ("datastore",), lambda there: plan_targets(there["datastore"], config=configs["targets"])),
        Step("memory", ("targets", "datastore") if own else ("targets",), student("train")),
    ]
    if "twin" in configs:
        steps.append(Step("twin", steps[-1].inputs, student("twin")))
    return steps


def base_of(recipe: Recipe) -> str:
    """The model that the memory stands beside."""
    from memlm.train.run import check_start

    given, size = recipe.places["train"], recipe.configs["corpus"].block_size
    return check_start(recipe.configs["train"], init=given.get("init"), base=given.get("base"), block_size=size)[0]


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


def make_step(out: Path, plan: Plan, say: Callable[[str], None]) -> Path:
    """The finished folder of a step: found, and then linked to from `out` where the system can, or made at `out`."""
    if out.is_symlink() and not out.exists() and not os.path.isabs(out.readlink()):  # the run that it led to is gone
        out.unlink()
    found = find_folder(out, plan.spec)
    if found is None:
        say(f"{out.name} -> {out}")
        run_stage(out, *plan)
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


def run_recipe(
    sections: dict[str, dict[str, Any]],
    out: str | Path,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run every stage of a recipe into folders below `out`; what is finished there, or in a run beside it, is used.

    Args:
        sections: As in the YAML file.
        out: Folder for `corpus/`, `teacher/`, `datastore/`, `targets/`, `memory/`, `twin/` and their evaluations.
            Where a run beside it has made the same, the name is a link to that folder.
        say: Told of each step before it starts: where it goes, or where it was found.

    Returns:
        Row name (`memory`, `twin`, `retrieval`) to the report of `evaluate_perplexity`.
    """
    recipe = Recipe({name: dict(values) for name, values in sections.items()})
    from memlm.evaluate.perplexity import evaluate_perplexity

    out = Path(out)
    there: dict[str, Path] = {}
    for step in recipe_steps(recipe):
        there[step.name] = make_step(out / step.name, step.plan(there), say)
    there["retrieval"] = there["datastore"]
    reports = {}
    for row in ("memory", "twin", "retrieval"):
        if row == "memory" or row in recipe.configs:
            say(f"evaluation of {row} -> {out / f'evaluation-{row}'}")
            reports[row] = evaluate_perplexity(
                there["corpus"],
                base=recipe.places.get("evaluate", {}).get("base", base_of(recipe)),
                memory=str(there[row]),
                out=out / f"evaluation-{row}",
                config=recipe.configs.get("evaluate"),
                retrieval=recipe.configs.get("retrieval") if row == "retrieval" else None,
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
    folder = Path(out) if out is not None else Path("runs") / Path(path).stem
    return folder, run_recipe(read_recipe(path, overrides or []), folder, say=say)
