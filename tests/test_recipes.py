"""Recipes: every one in the repository parses; stages run once; settings are checked with the nearest known name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import forbid_models
from interruption import interrupted_after

from benchmarks.recipe import quick_overrides
from memlm.config import read_recipe
from memlm.errors import ConfigError, InputError, MemlmError, OutputExistsError
from memlm.manifest import read_manifest
from memlm.runs.compare import Comparison
from memlm.runs.compare_recipe import CompareRecipe
from memlm.runs.estimate import corpus_tokens
from memlm.runs.plan import Planned, plan_recipe, plan_table, run_folder, run_recipe
from memlm.runs.recipe import SECTIONS, Recipe, data_path

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def tiny(documents: str, model: str) -> dict[str, dict[str, Any]]:
    """A recipe of all sections that runs in seconds."""
    quick = {"dtype": "float32", "max_steps": 3, "batch_size": 4}
    return {
        "corpus": {"documents": documents, "tokenizer": model, "document_separator": "\n\n", "block_size": 32},
        "teacher": {"init": model, **quick},
        "datastore": {"dtype": "float32"},
        "targets": {"k": 8, "target_temperature": 4.0},
        "train": {"init": model, "layers": 1, **quick},
        "twin": {"learning_rate": 1e-4},
        "evaluate": {"dtype": "float32", "bootstrap": 10},
    }


def changed(sections: dict[str, dict[str, Any]], name: str, **values: Any) -> dict[str, dict[str, Any]]:
    return {**sections, name: {**sections.get(name, {}), **values}}


@pytest.fixture(scope="module")
def whole(documents: str, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[str]]:
    """Folder, reports and what was said, of a run of all stages."""
    out = tmp_path_factory.mktemp("recipe") / "out"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLM_HOME", str(out.parent / "home"))
        reports = run_recipe(tiny(documents, model_folder), out, say=said.append)
    return out, reports, said


def test_the_repository_has_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_parses(path: Path) -> None:
    recipe = Recipe(read_recipe(path))
    assert recipe.configs["train"].kl_weight > 0
    assert recipe.places["corpus"]["documents"]


def toy(path: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """A recipe of the repository at toy size."""
    return read_recipe(path, quick_overrides(str(path), folder))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where toy models and texts are, and what is made of them."""
    return tmp_path_factory.mktemp("toys")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_plans_at_toy_size(path: Path, toys: Path) -> None:
    sections = toy(path, toys)
    steps = plan_recipe(sections, toys / "runs" / path.stem)
    if "compare" in sections:
        steps = [*steps, *Comparison(sections, toys / "runs" / path.stem).plan()]
    assert [step.step for step in steps if step.step in ("corpus", "memory")][:2] == ["corpus", "memory"]
    assert len(steps) >= 4
    assert all(step.seconds is not None and step.bytes is not None for step in steps)


@pytest.mark.parametrize("name", ["memory-decoder-wikitext103", "mlp-memory-wikitext103"])
def test_a_papers_table_is_made_at_toy_size(name: str, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLM_HOME", str(toys / "home"))
    comparison = Comparison(toy(ROOT / "recipes" / "paper" / f"{name}.yaml", toys), toys / "runs" / name)
    report = comparison.run()
    assert {row["row"] for row in report["rows"]} == {"base", *comparison.rows}
    assert all(row["test"]["perplexity"] > 0 for row in report["rows"] if "test" in row)
    assert len(report["bases"]) == 3 * len(comparison.other_bases)


def test_all_stages_run_and_leave_folders_of_their_kind(whole: tuple[Path, dict, list[str]]) -> None:
    out, reports, said = whole
    kinds = {p.name: read_manifest(p).kind for p in out.iterdir()}
    assert kinds == {
        "corpus": "corpus",
        "teacher": "memory",
        "datastore": "datastore",
        "targets": "targets",
        "memory": "memory",
        "twin": "memory",
        "evaluation-memory": "evaluation",
        "evaluation-twin": "evaluation",
    }
    assert set(reports) == {"memory", "twin"}
    assert [line.split(" ")[0] for line in said] == [
        *("corpus", "teacher", "datastore", "targets", "memory", "twin", "evaluation", "evaluation")
    ]


def test_the_fine_tuned_teacher_makes_the_keys(whole: tuple[Path, dict, list[str]]) -> None:
    out = whole[0]
    teacher = read_manifest(out / "teacher").hash
    assert read_manifest(out / "datastore").inputs["teacher"] == f"memlm:{teacher}"


def test_the_twin_differs_from_the_memory_in_kl_weight_and_what_its_section_says(
    whole: tuple[Path, dict, list[str]],
) -> None:
    memory, twin = (read_manifest(whole[0] / name) for name in ("memory", "twin"))
    differing = {key for key in memory.config if memory.config[key] != twin.config[key]}
    assert differing == {"kl_weight", "learning_rate"}
    assert (twin.config["kl_weight"], twin.config["learning_rate"]) == (0, 1e-4)
    assert twin.inputs == {**memory.inputs, "data": read_manifest(whole[0] / "corpus").hash}


def test_the_twin_of_a_memory_trained_through_the_mixture_is_plainly_fine_tuned(
    documents: str, model_folder: str
) -> None:
    sections = tiny(documents, model_folder)
    sections["train"] |= {"objective": "mixture", "mixture_share": 0.3}
    configs = Recipe(sections).configs
    assert (configs["train"].objective, configs["train"].mixture_share) == ("mixture", 0.3)
    assert (configs["twin"].objective, configs["twin"].kl_weight) == ("imitation", 0)
    assert configs["twin"].epochs == configs["train"].epochs


def test_a_second_run_skips_every_stage(
    whole: tuple[Path, dict, list[str]], documents: str, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, reports, _ = whole

    monkeypatch.setenv("MEMLM_HOME", str(out.parent / "home"))
    forbid_models(monkeypatch)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert run_recipe(tiny(documents, model_folder), out) == reports
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("section", "values", "match"),
    [
        ("corpus", {"block_size": 16}, r"corpus exists .*config\.block_size: 32 there, 16 here"),
        ("teacher", {"max_steps": 4}, r"teacher exists .*config\.max_steps: 3 there, 4 here"),
        ("datastore", {"seed": 1}, r"datastore exists .*config\.seed: 0 there, 1 here"),
        ("targets", {"k": 9}, r"targets exists .*config\.k: 8 there, 9 here"),
        ("train", {"seed": 2}, r"memory exists .*config\.seed: 0 there, 2 here"),
        ("twin", {"learning_rate": 1e-3}, r"twin exists .*config\.learning_rate: 0\.0001 there, 0\.001 here"),
        ("evaluate", {"mix_weight": 0.5}, r"evaluation-memory exists .*config\.gate: "),
    ],
)
def test_a_changed_setting_into_the_same_folder_is_refused_with_the_difference(
    whole: tuple[Path, dict, list[str]],
    documents: str,
    model_folder: str,
    section: str,
    values: dict[str, Any],
    match: str,
) -> None:
    out = whole[0]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(OutputExistsError, match=match):
        run_recipe(changed(tiny(documents, model_folder), section, **values), out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_recipe_file_runs_below_runs_under_its_own_name(
    whole: tuple[Path, dict, list[str]],
    documents: str,
    model_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The finished folder stands where the run would write, so that being there means being found."""
    out, reports, _ = whole
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMLM_HOME", str(out.parent / "home"))
    Path("runs").mkdir()
    Path("runs/small.tiny").symlink_to(out, target_is_directory=True)
    Path("small.tiny.yaml").write_text(yaml.safe_dump(tiny(documents, model_folder)))
    said: list[str] = []
    folder = run_folder("small.tiny.yaml")
    found = run_recipe(read_recipe("small.tiny.yaml", ["evaluate.bootstrap=10"]), folder, say=said.append)
    assert folder == Path("runs/small.tiny")
    assert {k: v["base"] for k, v in found.items()} == {k: v["base"] for k, v in reports.items()}
    assert said[0] == "corpus found at runs/small.tiny/corpus"


def test_teachers_of_folds_are_made_where_targets_ask_for_them(
    documents: str, model_folder: str, tmp_path: Path
) -> None:
    sections = changed(tiny(documents, model_folder), "targets", folds=2, teacher_share=1)
    planned = {step.step: step for step in plan_recipe(sections, tmp_path / "out")}
    assert [*planned][:5] == ["corpus", "fold-1", "fold-2", "targets", "memory"]  # no neighbours are asked
    mixed = [*(step.step for step in plan_recipe(changed(sections, "targets", teacher_share=0.5), tmp_path / "y"))]
    assert mixed[:5] == ["corpus", "teacher", "fold-1", "fold-2", "datastore"]
    longer = changed(changed(sections, "teacher", max_steps=None), "targets", folds=4, teacher_share=0.5)
    costs = {step.step: step.tokens for step in plan_recipe(longer, tmp_path / "x")}
    assert costs["fold-4"] == pytest.approx(0.75 * costs["teacher"], rel=0.01)
    del sections["twin"]
    run_recipe(sections, tmp_path / "out", say=lambda line: None)
    made = read_manifest(tmp_path / "out" / "targets")
    for number in (1, 2):
        of_fold = read_manifest(tmp_path / "out" / f"fold-{number}")
        assert of_fold.config["left_out"] == f"{number}/2"
        assert made.inputs[f"fold-{number}"] == of_fold.hash
    without = {name: section for name, section in sections.items() if name != "teacher"}
    with pytest.raises(ConfigError, match=r"targets.folds: teachers of folds are trained as the teacher section says"):
        Recipe(changed(without, "datastore", teacher=model_folder))


@pytest.mark.parametrize("speaking", [0, 2])
def test_teachers_write_for_a_memory(documents: str, model_folder: str, tmp_path: Path, speaking: int) -> None:
    """Its targets are of the longer corpus; twin and teachers have read the documents alone."""
    sections = changed(tiny(documents, model_folder), "write", times=2, folds=2, document_tokens=24, dtype="float32")
    sections = changed(sections, "targets", teacher_share=1, folds=speaking)
    planned = {step.step: step for step in plan_recipe(sections, tmp_path / "runs" / "r")}
    names = ["corpus", "teacher", "fold-1", "fold-2", "written", "targets", "memory", "twin"]
    assert [*planned][:8] == names
    assert planned["targets"].tokens == pytest.approx(3 * planned["corpus"].tokens * 0.8, rel=0.1)
    epochs = changed(changed(sections, "train", max_steps=None), "twin", max_steps=None)
    read = {step.step: step.tokens for step in plan_recipe(epochs, tmp_path / "runs" / "r")}
    assert read["memory"] == 3 * read["twin"]
    out = tmp_path / "runs" / "r"
    run_recipe(sections, out)
    made = {name: read_manifest(out / name) for name in names}
    assert made["written"].inputs["corpus"] == made["corpus"].hash
    assert {"fold-1", "fold-2"} <= made["written"].inputs.keys()
    assert made["targets"].inputs["corpus"] == made["written"].hash
    assert ("fold-1" in made["targets"].inputs, "teacher" in made["targets"].inputs) == (bool(speaking), True)
    assert made["memory"].inputs["data"] == made["targets"].hash
    for name in ("twin", "teacher", "fold-1"):
        assert made[name].inputs["data"] == made["corpus"].hash
    assert read_manifest(out / "evaluation-memory").inputs["corpus"] == made["corpus"].hash


def test_what_a_model_writes_is_read_without_targets_too(documents: str, model_folder: str, tmp_path: Path) -> None:
    sections = changed(tiny(documents, model_folder), "write", times=1)
    for name in ("teacher", "datastore", "twin"):
        del sections[name]
    sections = changed(changed(sections, "train", kl_weight=0), "targets", teacher=model_folder, teacher_share=1)
    steps = [step.step for step in plan_recipe(sections, tmp_path / "out")]
    assert steps == ["corpus", "written", "memory", "evaluation-memory"]


@pytest.mark.parametrize(
    ("told", "changes"),
    [
        ("write: who writes", {"teacher": None, "datastore": {"teacher": None}, "train": {"kl_weight": 0}}),
        (r"^write\.folds: teachers of folds are trained", {"teacher": None, "write": {"folds": 2}}),
        (r"write\.folds = 2, targets\.folds = 3", {"write": {"folds": 2}, "targets": {"folds": 3}}),
        (r"write: what teachers wrote has no neighbours", {"targets": {"teacher_share": 0.5}}),
        (r"write\.times = 0", {"write": {"times": 0}}),
        (r"train\.activations: no datastore has", {"train": {"kind": "mlp", "base": "b", "activations": "datastore"}}),
    ],
)
def test_recipes_in_which_nothing_can_be_written_are_one_line(
    documents: str, model_folder: str, told: str, changes: dict[str, Any]
) -> None:
    sections = changed(tiny(documents, model_folder), "datastore", teacher=model_folder)
    sections = changed(changed(sections, "targets", teacher_share=1), "write", times=2)
    for name, values in changes.items():
        if values is None:
            del sections[name]
        else:
            sections[name] = {key: v for key, v in {**sections[name], **values}.items() if v is not None}
    with pytest.raises(ConfigError, match=told):
        Recipe(sections)


def test_a_recipe_makes_what_its_rows_are_made_from(documents: str, model_folder: str, tmp_path: Path) -> None:
    """No index where neighbours have no share, and no teacher where nothing asks for one."""

    def steps(sections: dict[str, dict[str, Any]]) -> list[str]:
        return [step.step for step in plan_recipe(sections, tmp_path / "out")]

    sections = tiny(documents, model_folder)
    del sections["twin"]
    words = changed(sections, "targets", teacher_share=1)
    assert steps(words) == ["corpus", "teacher", "targets", "memory", "evaluation-memory"]
    given = changed(words, "targets", teacher=model_folder)
    assert steps(given) == ["corpus", "targets", "memory", "evaluation-memory"]
    assert steps(changed(words, "retrieval", k=8))[:3] == ["corpus", "teacher", "datastore"]
    plain = changed(sections, "train", kl_weight=0)
    assert steps(plain) == ["corpus", "memory", "evaluation-memory"]
    for name in ("teacher", "datastore"):
        for made in (given, plain):
            made.pop(name, None)
    assert steps(given) == ["corpus", "targets", "memory", "evaluation-memory"]
    assert steps(plain) == ["corpus", "memory", "evaluation-memory"]
    reports = run_recipe(given, tmp_path / "out")
    assert reports["memory"]["mixture"]["perplexity"] > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(steps(given))
    with pytest.raises(ConfigError, match=r"targets.teacher is for targets that are its words alone"):
        Recipe(changed(sections, "targets", teacher=model_folder))
    for needing in ({"retrieval": {"k": 8}}, {"mlp": {}}):
        with pytest.raises(ConfigError, match=r"datastore\.teacher is missing"):
            Recipe({**plain, **needing})
    knn = {**plain, "compare": {"rows": ["knn"]}}
    with pytest.raises(ConfigError, match=r"datastore\.teacher is missing"):
        _ = CompareRecipe(knn, tmp_path / "out").steps


def test_documents_are_looked_for_below_memlm_data(
    documents: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_path("corpus/a.txt") == "corpus/a.txt"
    with pytest.raises(InputError, match=r"corpus/a\.txt is neither here nor in data: .* MEMLM_DATA=FOLDER"):
        _ = Recipe(tiny("corpus/a.txt", model_folder)).documents
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"; did you mean notes\.txt\?$"):
        _ = Recipe(tiny("note.txt", model_folder)).documents
    assert Recipe(tiny("corpus/a", model_folder)).documents == ["corpus/a"]  # perhaps the name of a dataset
    (tmp_path / "data" / "corpus").mkdir(parents=True)
    (tmp_path / "data" / "corpus" / "a.txt").touch()
    assert data_path("corpus/a.txt") == "data/corpus/a.txt"
    assert data_path(documents) == documents
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text(Path(documents).read_text())
    monkeypatch.setenv("MEMLM_DATA", str(tmp_path / "elsewhere"))
    assert data_path("corpus/a.txt") == "corpus/a.txt"
    recipe = changed(tiny("b.txt", model_folder), "targets", k=100_000)  # stops once the corpus is there
    with pytest.raises(ConfigError, match="k = 100000 is larger"):
        run_recipe(recipe, tmp_path / "out")
    assert read_manifest(tmp_path / "out" / "corpus").sources["documents"] == str(tmp_path / "elsewhere" / "b.txt")


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_runs_share_what_is_equal_and_leave_each_other_alone(
    whole: tuple[Path, dict, list[str]], documents: str, model_folder: str, tmp_path: Path
) -> None:
    out, reports, _ = whole
    before = files(out)
    recipe = changed(tiny(documents, model_folder), "targets", k=6)
    said: list[str] = []
    shared = run_recipe(recipe, out.parent / "k6", say=said.append)
    alone = run_recipe(recipe, tmp_path / "alone" / "k6")
    found = [line.split(" ")[0] for line in said if " found at " in line]
    assert found == ["corpus", "teacher", "datastore", "twin"]  # which reads no targets
    assert (out.parent / "k6" / "datastore").readlink() == Path("../out/datastore")
    for name in ("targets", "memory", "twin"):
        here, there = (read_manifest(run / "k6" / name) for run in (out.parent, tmp_path / "alone"))
        differing = {file for file in here.payload | there.payload if here.payload.get(file) != there.payload.get(file)}
        assert differing <= {"README.md"}  # the card says where the teacher lies
        assert here.facts == there.facts
    assert [r["mixture"] for r in shared.values()] == [r["mixture"] for r in alone.values()]
    assert files(out) == before
    assert [r["mixture"] for r in reports.values()] != [r["mixture"] for r in shared.values()]


def test_a_sweep_over_the_learning_rate_makes_only_the_memories(
    whole: tuple[Path, dict, list[str]], documents: str, model_folder: str
) -> None:
    out = whole[0]
    recipe = changed(tiny(documents, model_folder), "train", learning_rate=3e-4)
    said: list[str] = []
    run_recipe(recipe, out.parent / "rate", say=said.append)
    made = [line.split(" ")[0] for line in said if " -> " in line and "evaluation" not in line]
    assert made == ["memory"]  # the twin's own learning rate is as it was


def test_damaged_folders_and_changed_documents_are_not_shared_and_dead_links_are_made_anew(
    documents: str, model_folder: str, tmp_path: Path
) -> None:
    text = tmp_path / "documents.txt"
    text.write_text(Path(documents).read_text())
    recipe = changed(tiny(str(text), model_folder), "targets", k=100_000)  # stops once the datastore is there

    def run(name: str) -> Path:
        with pytest.raises(ConfigError, match="k = 100000 is larger"):
            run_recipe(recipe, tmp_path / "runs" / name)
        return tmp_path / "runs" / name / "corpus"

    first, second = run("a"), run("b")
    assert second.is_symlink()
    payload = first / next(iter(read_manifest(first).payload))
    payload.unlink()
    third = run("c")
    assert not third.is_symlink()
    first.rename(tmp_path / "elsewhere")
    assert not second.exists()
    assert run("b").resolve() == third
    text.write_text(text.read_text() + "\n\nOne more document.\n")
    assert not run("d").is_symlink()


# --- plans --------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_is_there_and_leaves_no_trace(
    whole: tuple[Path, dict, list[str]], documents: str, model_folder: str, no_models: None
) -> None:
    out, before = whole[0], files(whole[0].parent)
    recipe = tiny(documents, model_folder)
    assert {(step.step, step.state) for step in plan_recipe(recipe, out)} == {(p.name, "there") for p in out.iterdir()}
    steps = {s.step: s for s in plan_recipe(changed(recipe, "targets", k=7), out.parent / "k7")}
    assert {name: s.state for name, s in steps.items() if s.state != "to be made"} == dict.fromkeys(
        ("corpus", "teacher", "datastore", "twin"), "found"
    )
    assert steps["datastore"].folder == str(out / "datastore")
    assert steps["memory"].folder == str(out.parent / "k7" / "memory")
    assert steps["targets"].tokens == read_manifest(out / "corpus").facts["splits"]["train"]["tokens"]
    assert steps["memory"].tokens == 3 * 4 * 32  # steps, blocks, tokens
    with pytest.raises(OutputExistsError, match=r"targets exists .*config\.k: 8 there, 7 here"):
        plan_recipe(changed(recipe, "targets", k=7), out)
    assert files(whole[0].parent) == before


@pytest.mark.parametrize("kind", ["decoder", "mlp"])
def test_disk_and_tokens_are_guessed_within_a_factor_of_two(
    whole: tuple[Path, dict, list[str]],
    documents: str,
    model_folder: str,
    tmp_path: Path,
    kind: str,
) -> None:
    """Before anything is there, from configs and the size of the documents alone.

    The tiny tokenizer's tokens are shorter than the four characters that are expected, so a limit holds the corpus.
    """
    recipe = changed(tiny(documents, model_folder), "corpus", max_tokens=3000)
    if kind == "mlp":
        given = {"base": model_folder, "kind": "mlp", "layers": 1, "max_steps": 1, "dtype": "float32"}
        recipe = {**recipe, "train": given, "twin": {}, "retrieval": {"k": 8}}
    guessed = plan_recipe(recipe, tmp_path / "other" / "run")
    assert {step.state for step in guessed} == {"to be made"}
    run_recipe(recipe, tmp_path / "runs" / "real")
    for about, real in zip(guessed, plan_recipe(recipe, tmp_path / "runs" / "real"), strict=True):
        assert about.step == real.step
        assert real.state == "there"
        assert about.seconds
        for name in ("bytes", "tokens"):
            assert 0.5 < getattr(about, name) / getattr(real, name) < 2, (about.step, name)


def test_a_dataset_of_unknown_size_is_planned_without_figures(model_folder: str, tmp_path: Path) -> None:
    recipe = Recipe(tiny("documents", model_folder))
    assert corpus_tokens(recipe.configs["corpus"], ["name:of:dataset"], None) == (0, None)
    limited = recipe.configs["corpus"].model_copy(update={"max_tokens": 1000})
    assert corpus_tokens(limited, ["name:of:dataset"], None) == (
        1200,
        {"train": 1000, "validation": 100, "test": 100},
    )
    table = plan_table([Planned("corpus", "to be made", "runs/a/corpus", None, None, None)])
    assert table.splitlines()[-1].split() == ["to", "do", "1", "steps", "?", "?", "?", "?"]


def test_a_plan_tells_memory_and_operations(documents: str, model_folder: str, tmp_path: Path) -> None:
    steps = plan_recipe(tiny(documents, model_folder), tmp_path / "runs" / "r")
    assert all(step.memory and step.operations is not None for step in steps)
    costs = {step.step: (step.operations or 0.0, step.seconds or 0.0) for step in steps}
    assert costs["memory"] == costs["twin"]
    for name in ("datastore", "evaluation-memory"):
        shares = [mine / other for mine, other in zip(costs["memory"], costs[name], strict=True)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-3)
    last = plan_table(steps).splitlines()[-1]
    assert re.search(r"models compute about \S+ operations: .* on an accelerator", last)


def test_a_stopped_run_is_planned_as_unfinished_and_goes_on_where_it_was(
    whole: tuple[Path, dict, list[str]], documents: str, model_folder: str
) -> None:
    out = whole[0].parent / "stopped"
    recipe = changed(tiny(documents, model_folder), "train", learning_rate=2e-4)
    with interrupted_after(2):
        run_recipe(recipe, out)
    states = {step.step: step.state for step in plan_recipe(recipe, out)}
    assert (states["targets"], states["memory"], states["twin"]) == ("there", "unfinished", "found")
    run_recipe(recipe, out)
    assert {step.state for step in plan_recipe(recipe, out)} == {"there"}


def test_what_memlm_0_1_left_unfinished_is_finished_there_though_another_run_has_it(
    whole: tuple[Path, dict, list[str]], documents: str, model_folder: str
) -> None:
    """Folders were called `NAME.partial` until they were finished."""
    out = whole[0].parent / "old"
    partial = out / "corpus.partial"
    partial.mkdir(parents=True)
    (partial / "plan.json").write_text(json.dumps(read_manifest(whole[0] / "corpus").identity))
    recipe = changed(tiny(documents, model_folder), "targets", k=100_000)  # stops once the datastore is there
    with pytest.raises(ConfigError, match="k = 100000 is larger"):
        run_recipe(recipe, out)
    assert not (out / "corpus").is_symlink()
    assert not partial.exists()
    assert (out / "datastore").is_symlink()


# --- what is refused before anything runs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "values", "match"),
    [
        ("trian", {"epochs": 1}, "unknown section 'trian'; did you mean 'train'?"),
        ("zzz", {}, "unknown section 'zzz'; known: compare, corpus, dapt, datastore, "),
        ("targets", {"target_temprature": 4}, "unknown setting 'targets.target_temprature'; did you mean 'target_temp"),
        ("corpus", {"tokeniser": "x"}, "unknown setting 'corpus.tokeniser'; did you mean 'tokenizer'?"),
        ("train", {"xyz": 1.0}, "unknown setting 'train.xyz'; known: accumulation, activations, base, "),
        ("targets", {"k": "many"}, "targets.k = 'many': input should be a valid integer"),
        ("targets", {"k": 1.5}, "targets.k = 1.5: "),
        ("targets", {"target_temperature": 0}, "targets.target_temperature = 0: input should be greater than 0"),
        ("train", {"fresh": "perhaps"}, "train.fresh = 'perhaps': "),
        ("train", {"schedule": "wavy"}, "train.schedule = 'wavy': "),
        ("evaluate", {"mix_weight": 2}, "evaluate.mix_weight = 2: "),
        ("corpus", {"documents": []}, r"corpus.documents = \[\]: give a path, or a list of paths"),
        ("corpus", {"documents": ["a", 5]}, r"corpus.documents = \['a', 5\]: give a path"),
        ("corpus", {"tokenizer": 5}, "corpus.tokenizer = 5: give a path, hub id or packaged name"),
        ("teacher", {"kl_weight": 0.5}, r"teacher.kl_weight = 0\.5: a teacher is trained without targets"),
        ("twin", {"kl_weight": 0.5}, r"twin.kl_weight = 0\.5: a twin is trained without targets"),
        ("twin", {"init": "other"}, "unknown setting 'twin.init'"),
        ("train", {"trainer": {"adam_beta3": 1}}, r"unknown setting 'train.trainer.adam_beta3'; did you mean 'adam_b"),
        ("teacher", {"trainer": {"fdsp": 1}}, r"unknown setting 'teacher.trainer.fdsp'; did you mean 'fsdp'?"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(
    documents: str, model_folder: str, tmp_path: Path, section: str, values: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        run_recipe(changed(tiny(documents, model_folder), section, **values), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "key"), [("corpus", "documents"), ("corpus", "tokenizer"), ("train", "init"), ("teacher", "init")]
)
def test_missing_places_are_named(documents: str, model_folder: str, section: str, key: str) -> None:
    sections = tiny(documents, model_folder)
    del sections[section][key]
    with pytest.raises(ConfigError, match=f"{section}.{key} is missing"):
        Recipe(sections)


def test_keys_need_a_teacher_from_somewhere(documents: str, model_folder: str) -> None:
    sections = tiny(documents, model_folder)
    del sections["teacher"]
    with pytest.raises(ConfigError, match=r"datastore\.teacher is missing"):
        Recipe(sections)
    assert Recipe(changed(sections, "datastore", teacher=model_folder)).places["datastore"] == {"teacher": model_folder}


def test_a_given_teacher_of_keys_wins_over_the_teacher_section(documents: str, model_folder: str) -> None:
    recipe = Recipe(changed(tiny(documents, model_folder), "datastore", teacher="other"))
    assert recipe.places["datastore"]["teacher"] == "other"


def test_sections_of_the_caller_are_left_as_they_are(documents: str, model_folder: str, tmp_path: Path) -> None:
    sections = tiny(documents, model_folder)
    sections["targets"]["k"] = 100_000
    del sections["datastore"]
    with pytest.raises(MemlmError):
        run_recipe(sections, tmp_path / "out")
    assert "datastore" not in sections
    assert sections["twin"] == {"learning_rate": 1e-4}


def test_every_stage_setting_can_be_given_in_its_section(documents: str, model_folder: str) -> None:
    """All defaults spelt out parse to the defaults, so every knob is a recipe field."""
    sections = tiny(documents, model_folder)
    for name, (config, _) in SECTIONS.items():
        sections[name] = {**config().model_dump(), **sections.get(name, {})}
    for name in ("teacher", "twin", "dapt", "lora"):
        sections[name]["kl_weight"] = 0
    sections["mlp"]["kind"] = "mlp"
    sections["targets"]["teacher_share"] = 1  # what teachers write has no neighbours
    recipe = Recipe(sections)
    assert recipe.configs["targets"] == SECTIONS["targets"][0](**sections["targets"])
