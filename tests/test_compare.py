"""A comparison from one recipe: what is made and used again, figures against evaluations, the report."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import sentences
from test_recipes import changed, tiny
from typer.testing import CliRunner

from memlm.cli import app
from memlm.corpus.blocks import Corpus
from memlm.errors import ConfigError, InputError, ModelError
from memlm.evaluate.config import IN_CONTEXT, ROWS
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.evaluate.tasks import evaluate_tasks
from memlm.manifest import read_manifest
from memlm.runs import compare
from memlm.runs.compare import Comparison
from memlm.runs.comparison import comparison_text
from memlm.runs.figures import Figures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sections(documents: str, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All rows, with a search over two learning rates of DAPT; heads are fitted."""
    general = tmp_path_factory.mktemp("general")
    for name, seed in (("test", 11), ("fit", 12)):
        (general / f"{name}.txt").write_text("\n\n".join(sentences(60, seed=seed)), encoding="utf-8")
    found = tiny(documents, model_folder)
    del found["teacher"]
    found = changed(found, "datastore", teacher=model_folder)
    found["mlp"] = {"layers": 1, "dtype": "float32", "max_steps": 3, "batch_size": 4}
    found["lora"] = {"lora_rank": 2}
    found = changed(found, "corpus", validation_fraction=0.4)
    found["compare"] = {
        "general": str(general / "test.txt"),
        "general_fit": [str(general / "fit.txt")],
        "general_separator": "\n\n",
        "general_tokens": 400,
        "search": {"dapt.learning_rate": [1e-3, 1e-2]},
        "in_context": {"positions": 40, "passage_tokens": 8, "context": 40, "encoder": model_folder},
        "timed_tokens": 2,
        "tasks": ["papers:mr", "papers:cr"],
        "task_data": str(written_tasks(tmp_path_factory.mktemp("tasks"))),
        "task_limit": 5,
    }
    return found


def written_tasks(folder: Path) -> Path:
    """Rows of two of the papers' tasks, so short that a tiny memory's window holds them."""
    for name, seed in (("mr", 21), ("cr", 22)):
        texts = [" ".join(text.split()[:3]) for text in sentences(16, seed=seed)]
        rows = [f'{number % 2},"{text}"' for number, text in enumerate(texts)]
        (folder / name).mkdir()
        (folder / name / "test.csv").write_text("\n".join(["label,text", *rows]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(sections: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """Folder, report and what was said of a comparison of all rows."""
    out, said = tmp_path_factory.mktemp("compare") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLM_HOME", str(out.parent / "home"))
        report = Comparison(sections, out).run(said.append)
    return out, report, said


def rows_of(report: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {row["way"]: row for row in report["rows"] if row["row"] == name}


def test_every_row_is_there_and_every_way_to_weigh_it(whole: tuple[Path, dict, list[str]]) -> None:
    found = {(row["row"], row["way"]) for row in whole[1]["rows"]}
    mixed = {
        **dict.fromkeys(("knn", "dapt+knn"), "posterior"),
        **dict.fromkeys(("dapt+memory", "lora+memory", "twin", "memory", "mlp", "memory+mlp"), "both"),
    }
    assert found == {
        *(("base", "alone"), ("dapt", "alone"), ("lora", "alone")),
        *((name, "part of the text") for name in IN_CONTEXT),
        *((name, "fixed weight") for name in mixed),
        *((name, f"gate {gate}") for name, gate in mixed.items()),
    }


@pytest.mark.parametrize("name", ["twin", "memory", "mlp", "knn"])
def test_figures_are_those_of_an_evaluation(
    whole: tuple[Path, dict, list[str]], sections: dict[str, Any], model_folder: str, name: str
) -> None:
    out, report, _ = whole
    folder = next((out / "heads").glob(f"{name}-*"), Path(report["run"]["folders"][name]))
    gate = next(way for way in rows_of(report, name) if way.startswith("gate")).partition(" ")[2]
    there = {step: out / step for step in ("corpus", "datastore")}
    retrieval = Figures(Comparison(sections, out), there, {}, {}).retrieval if name == "knn" else None
    expected = evaluate_perplexity(
        out / "corpus",
        base=model_folder,
        memory=folder,
        dtype="float32",
        bootstrap=10,
        gate=gate,  # type: ignore[arg-type]
        retrieval=retrieval,
    )
    gated, fixed = rows_of(report, name)[f"gate {gate}"], rows_of(report, name)["fixed weight"]
    assert gated["test"]["perplexity"] == pytest.approx(expected["mixture"]["perplexity"], abs=2e-4)
    assert gated["test"]["interval"] == pytest.approx(expected["mixture"]["interval"], abs=2e-4)
    assert gated["test"]["ratio"]["perplexity"] == pytest.approx(expected["ratio"]["perplexity"], abs=2e-4)
    assert fixed["test"]["perplexity"] == pytest.approx(expected["mixture"]["fixed"]["perplexity"], abs=2e-4)
    assert fixed["mix_weight"] == {name: expected["mixture"]["fixed"]["mix_weight"]}
    assert report["rows"][0]["test"]["perplexity"] == pytest.approx(expected["base"]["perplexity"], abs=2e-4)


def test_every_row_is_put_to_the_tasks_as_an_evaluation_of_tasks_would(
    whole: tuple[Path, dict, list[str]], sections: dict[str, Any], model_folder: str
) -> None:
    out, report, said = whole
    found, folders = report["tasks"], report["run"]["folders"]
    rows = ["base", *(name for name in ROWS if name not in IN_CONTEXT)]
    assert list(found["titles"]) == rows
    assert [line for line in said if line.startswith("tasks with")] == [
        f"tasks with {found['titles'][r]}" for r in rows
    ]
    expected = evaluate_tasks(
        ["papers:mr", "papers:cr"],
        base=model_folder,
        memory=next((out / "heads").glob("memory-*")),
        gate="both",
        data=sections["compare"]["task_data"],
        limit=5,
        others={"dapt": folders["dapt"], "lora": folders["lora"]},
        dtype="float32",
        bootstrap=10,
    )
    for name, task in expected["tasks"].items():
        assert found["tasks"][name]["items"] == task["items"] == 5
        for way, row in (("base", "base"), ("both", "memory"), ("dapt", "dapt"), ("lora", "lora")):
            assert found["tasks"][name]["values"][row]["value"] == task["values"][way]["value"], (name, way)
    assert found["pooled"]["change"]["memory"]["value"] == expected["pooled"]["change"]["both"]["value"]
    assert "mr: accuracy" in (out / "report.md").read_text(encoding="utf-8")


def test_answers_are_kept_and_no_model_is_asked_twice(
    whole: tuple[Path, dict, list[str]],
    sections: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, report, _ = whole
    monkeypatch.setenv("MEMLM_HOME", str(out.parent / "home"))
    (tmp_path / "compared").mkdir()
    shutil.copytree(out, tmp_path / "compared" / "out")
    said: list[str] = []
    fewer = changed(sections, "compare", rows=["memory", "knn"], timed_tokens=0)
    again = Comparison(fewer, tmp_path / "compared" / "out").run(said.append)
    assert not [line for line in said if line.startswith("tasks with")]
    for row in ("base", "knn", "memory"):
        values = [made["tasks"]["tasks"]["papers:mr"]["values"][row]["value"] for made in (again, report)]
        assert values[0] == values[1]


def test_a_fine_tuned_base_counts_alone_and_as_the_base_of_a_mixture(whole: tuple[Path, dict, list[str]]) -> None:
    out, report, _ = whole
    folders = report["run"]["folders"]
    expected = evaluate_perplexity(
        out / "corpus",
        base=folders["dapt"],
        memory=next((out / "heads").glob("memory-*")),
        dtype="float32",
        gate="both",
    )
    assert rows_of(report, "dapt")["alone"]["test"]["perplexity"] == pytest.approx(
        expected["base"]["perplexity"], abs=2e-4
    )
    mixed = rows_of(report, "dapt+memory")["gate both"]["test"]["perplexity"]
    assert mixed == pytest.approx(expected["mixture"]["perplexity"], abs=2e-4)


def test_of_what_is_searched_the_best_on_validation_text_counts(whole: tuple[Path, dict, list[str]]) -> None:
    out, report, _ = whole
    tried = {rate: out / f"dapt-learning_rate-{rate}" for rate in ("0.001", "0.01")}
    best = {rate: read_manifest(f).facts["validation"]["best"]["memory_perplexity"] for rate, f in tried.items()}
    chosen = min(best, key=lambda rate: best[rate])
    assert report["run"]["folders"]["dapt"] == str(tried[chosen])
    assert rows_of(report, "dapt")["alone"]["added"]["settings"] == {"dapt": {"learning_rate": float(chosen)}}


def test_fine_tuning_is_searched_unless_its_learning_rate_is_given(sections: dict[str, Any], tmp_path: Path) -> None:
    searched = changed(sections, "compare", search={"train.learning_rate": [1e-4, 2e-4]})
    rates = {
        row: [point.config.learning_rate for point in points]
        for row, points in Comparison(searched, tmp_path / "x").points.items()
    }
    assert rates["dapt"] == [5e-5, 2e-4]
    assert rates["lora"] == [2e-4, 1e-3]
    assert rates["memory"] == [1e-4, 2e-4]
    given = changed(changed(sections, "compare", search={}), "dapt", learning_rate=1e-5)
    assert [p.config.learning_rate for p in Comparison(given, tmp_path / "x").points["dapt"]] == [1e-5]


def test_the_report_lists_all_that_was_tried(whole: tuple[Path, dict, list[str]]) -> None:
    report = whole[1]
    found = {(entry["row"], entry["settings"]["learning_rate"]): entry for entry in report["searched"]}
    assert found.keys() == {("dapt", 1e-3), ("dapt", 1e-2), ("lora", 2e-4), ("lora", 1e-3)}
    for row in ("dapt", "lora"):
        entries = [entry for (name, _), entry in found.items() if name == row]
        best = min(entries, key=lambda entry: entry["validation_perplexity"])
        assert [entry["chosen"] for entry in entries] == [entry is best for entry in entries]


def test_heads_lie_in_the_comparisons_own_folder(whole: tuple[Path, dict, list[str]], tmp_path: Path) -> None:
    out, report, _ = whole
    assert not (Path(report["run"]["folders"]["memory"]) / "gate.json").exists()
    heads = sorted(place.name.partition("-")[0] for place in (out / "heads").iterdir())
    assert heads == ["memory", "mlp", "twin"]
    assert all((place / "gate.json").is_file() for place in (out / "heads").iterdir())


def test_general_text_is_enclosed_and_heads_compute_as_the_comparison_says(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []
    fit = compare.fit_gate
    monkeypatch.setattr(compare, "fit_gate", lambda *args, **how: fitted.append(how["dtype"]) or fit(*args, **how))
    few = changed(sections, "corpus", end_token="none", start_token="</s>")
    few = changed(changed(few, "compare", rows=["twin"], timed_tokens=0, tasks=[]), "evaluate", dtype="bfloat16")
    Comparison(few, tmp_path / "out").run()
    assert fitted == ["bfloat16"]
    own = Corpus(tmp_path / "out" / "corpus")
    (general,) = (Corpus(place) for place in (tmp_path / "out" / "general").iterdir())
    assert general.config.for_other_text == own.config.for_other_text
    texts = [next(iter(corpus.split("test").documents())) for corpus in (own, general)]
    assert texts[0][0] == texts[1][0] == 2  # </s>
    assert texts[1][-1] != 2


def test_bits_per_byte_are_nats_over_the_bytes_of_the_text(whole: tuple[Path, dict, list[str]]) -> None:
    out, report, _ = whole
    corpus = Corpus(out / "corpus")
    split, found = corpus.split("test"), report["rows"][0]["test"]
    documents = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    texts = [corpus.tokenizer.decode(split.tokens[a + 1 : b], skip_special_tokens=True) for a, b in documents]
    text = "".join(str(part) for part in texts)
    nats = math.log(found["perplexity"]) * split.n_positions
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-3)


def test_what_a_row_costs(whole: tuple[Path, dict, list[str]], model_folder: str) -> None:
    out, report, _ = whole
    folders = report["run"]["folders"]
    facts = {name: read_manifest(folders[name]).facts for name in ("memory", "mlp", "lora")}
    both = rows_of(report, "memory+mlp")["fixed weight"]["added"]
    assert both["parameters"] == facts["memory"]["parameters"] + facts["mlp"]["parameters"]
    assert rows_of(report, "lora")["alone"]["added"]["parameters"] == facts["lora"]["trained_parameters"]
    assert rows_of(report, "dapt")["alone"]["added"]["parameters"] == 0
    stages = rows_of(report, "memory")["fixed weight"]["added"]["before"]
    assert stages["stages"] == ["datastore", "targets"]
    payload = [read_manifest(out / name).payload.values() for name in stages["stages"]]
    assert stages["disk_bytes"] == sum(file.bytes for files in payload for file in files)
    assert "before" not in rows_of(report, "dapt")["alone"]["added"]
    assert rows_of(report, "knn")["fixed weight"]["added"]["parameters"] == 0  # its teacher is the base
    assert rows_of(report, "memory")["fixed weight"]["decoding"]["tokens_per_s"] > 0
    assert "decoding" not in rows_of(report, "memory+mlp")["fixed weight"]
    assert rows_of(report, "memory")["fixed weight"]["drafted"]["tokens_per_s"] > 0


def test_the_best_are_marked_within_their_interval(whole: tuple[Path, dict, list[str]]) -> None:
    rows = [row for row in whole[1]["rows"] if "test" in row]
    leader = min(rows, key=lambda row: row["test"]["perplexity"])
    assert leader["test"]["best"]
    clearly_worse = max(rows, key=lambda row: row["test"]["perplexity"])
    assert not clearly_worse["test"]["best"]


def test_one_memory_beside_other_bases(
    whole: tuple[Path, dict, list[str]], sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report, _ = whole
    monkeypatch.setenv("MEMLM_HOME", str(out.parent / "home"))
    other = report["run"]["folders"]["dapt"]
    few = changed(sections, "compare", bases=[other], timed_tokens=0)
    found = Comparison(few, out).run()["bases"]
    assert [row["way"] for row in found] == ["alone", "fixed weight", "gate both"]
    for row, name in zip(found, ("dapt", "dapt+memory", "dapt+memory"), strict=True):
        same = rows_of(report, name)[row["way"]]["test"]
        assert row["test"]["perplexity"] == pytest.approx(same["perplexity"], abs=2e-4)
    assert found[0]["parameters"] == read_manifest(other).facts["parameters"]
    assert "with the memory, gate both" in (out / "report.md").read_text(encoding="utf-8")


def test_in_context_retrieval_is_judged_beside_the_base_on_the_same_part(whole: tuple[Path, dict, list[str]]) -> None:
    for name in IN_CONTEXT:
        part = rows_of(whole[1], name)["part of the text"]["part"]
        assert 30 <= part["tokens"] <= 40
        assert part["ratio"]["perplexity"] == pytest.approx(part["perplexity"] / part["base"]["perplexity"], rel=1e-3)


def test_a_dense_search_is_a_row_where_it_is_asked_for(sections: dict[str, Any], tmp_path: Path) -> None:
    plain = {key: value for key, value in sections["compare"].items() if key != "in_context"}
    assert "in-context-dense" not in Comparison({**sections, "compare": plain}, tmp_path).rows
    asked = Comparison({**sections, "compare": {**plain, "rows": ["in-context-dense", "memory"]}}, tmp_path)
    assert asked.rows == ["in-context-dense", "memory"]
    missing = changed(sections, "compare", in_context={**sections["compare"]["in_context"], "encoder": "nobody/x"})
    with pytest.raises(ModelError, match="nobody/x"):
        Comparison(missing, tmp_path / "a").run()


def test_a_second_run_makes_nothing_and_says_the_same(
    whole: tuple[Path, dict, list[str]], sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report, _ = whole
    monkeypatch.setenv("MEMLM_HOME", str(out.parent / "home"))
    said: list[str] = []
    again = Comparison({**sections, "compare": {**sections["compare"], "timed_tokens": 0}}, out).run(said.append)
    assert all("found at" in line or line == "scoring" for line in said)
    without = [
        {key: value for key, value in row.items() if key not in ("decoding", "drafted")} for row in report["rows"]
    ]
    assert json.loads(json.dumps(again["rows"])) == json.loads(json.dumps(without))
    plan = Comparison(sections, out).plan()
    assert {step.state for step in plan if step.step != "comparison"} == {"there"}


def test_the_report_is_whole_and_needs_no_network(whole: tuple[Path, dict, list[str]]) -> None:
    out, report, _ = whole
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "https://" not in page
    for row in report["rows"]:
        assert row["title"] in page
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["rows"][0]["row"] == "base"
    written = (out / "report.md").read_text(encoding="utf-8")
    head = next(line for line in written.splitlines() if line.startswith("| method"))
    figures = [line for line in written.splitlines() if line.startswith("| base alone |  |")]
    assert figures[0].count("|") == head.count("|")
    assert f"{report['rows'][0]['test']['perplexity']:.2f}" in figures[0]
    assert (out / "perplexity.png").read_bytes()[:4] == b"\x89PNG"
    assert "base + Memory Decoder" in comparison_text(report)


def test_rows_are_chosen_and_only_what_they_need_is_made(sections: dict[str, Any], tmp_path: Path) -> None:
    few = changed(sections, "compare", rows=["dapt", "in-context"])
    assert [step.name for step in Comparison(few, tmp_path / "x").steps] == [
        *("corpus", "dapt-learning_rate-0.001", "dapt-learning_rate-0.01")
    ]
    kept = [step.name for step in Comparison(changed(sections, "compare", rows=["knn"]), tmp_path / "x").steps]
    assert kept == ["corpus", "datastore"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ["mlps"]}, "compare.rows = .*'mlps' is none of in-context, in-context-dense, knn, "),
        ({"search": {"corpus.k": [1]}}, "'corpus.k' is no SECTION.KEY of train, twin, mlp, dapt or lora"),
        (
            {"search": {"dapt.learning_rat": [1]}},
            "search: unknown setting 'dapt.learning_rat'; did you mean 'learning_",
        ),
        ({"search": {"lora.epoch": [1]}, "rows": ["memory"]}, "search: unknown setting 'lora.epoch'; did you mean"),
        ({"search": {"twin.kl_weight": [0, 0.5]}}, r"twin\.kl_weight = 0\.5: a twin is trained without targets, at 0"),
        ({"search": {"dapt.learning_rate": []}}, "has no values"),
    ],
)
def test_wrong_settings_are_one_line(sections: dict[str, Any], tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Comparison(changed(sections, "compare", **change), tmp_path / "x")


def test_a_row_that_the_recipe_cannot_have_is_refused(sections: dict[str, Any], tmp_path: Path) -> None:
    without = {name: values for name, values in sections.items() if name != "mlp"}
    with pytest.raises(ConfigError, match=r"compare.rows: mlp needs a section mlp"):
        Comparison(changed(without, "compare", rows=["mlp"]), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"compare.search: mlp.layers needs a section mlp"):
        Comparison(changed(without, "compare", search={"mlp.layers": [1]}), tmp_path / "x")
    mlp = {**without, "train": {**sections["mlp"], "kind": "mlp", "base": "x"}}
    with pytest.raises(ConfigError, match=r"compare.rows: dapt\+memory needs a memory that reads tokens"):
        Comparison(changed(mlp, "compare", rows=["dapt+memory"]), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"compare.bases: an mlp memory stands beside its own base alone"):
        Comparison(changed(mlp, "compare", bases=["x"]), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"evaluate.base: a comparison has one base"):
        Comparison(changed(sections, "evaluate", base="x"), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"evaluate.mix_weight: a comparison chooses every row's weight"):
        Comparison(changed(sections, "evaluate", mix_weight=0.5), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"compare.bases: the memory is put beside them; add memory"):
        Comparison(changed(sections, "compare", bases="x", rows=["dapt"]), tmp_path / "x")
    same = sections["compare"]["general"]
    with pytest.raises(ConfigError, match="is both general and general_fit"):
        Comparison(changed(sections, "compare", general_fit=[same]), tmp_path / "x")
    with pytest.raises(ModelError, match="nowhere/at-all"):
        Comparison(changed(sections, "compare", bases=["nowhere/at-all"]), tmp_path / "x").run()


def test_what_cannot_be_is_told_before_anything_is_trained(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = changed(sections, "corpus", validation_fraction=0.0)
    with pytest.raises(InputError, match=r"has no validation tokens, .*: raise corpus.validation_fraction"):
        Comparison(without, tmp_path / "a").run()
    assert [place.name for place in (tmp_path / "a").iterdir()] == ["corpus"]
    with pytest.raises(ConfigError, match=r"in_context.passage_tokens = 256: leaves no room"):
        Comparison(changed(sections, "compare", in_context={}), tmp_path / "b").run()
    for key in ("general", "general_fit"):
        with pytest.raises(InputError, match=r"nowhere\.txt is neither here nor in data"):
            Comparison(changed(sections, "compare", **{key: "nowhere.txt"}), tmp_path / "c").run()
    monkeypatch.setattr("memlm.models.adapters.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lora_rank needs peft"):
        Comparison(changed(sections, "compare", rows=["lora"]), tmp_path / "c").run()
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "c").exists()


def test_without_intervals_nothing_is_marked_as_best(
    whole: tuple[Path, dict, list[str]], sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = whole[0]
    monkeypatch.setenv("MEMLM_HOME", str(out.parent / "home"))
    plain = changed(changed(sections, "compare", rows=["dapt"]), "evaluate", bootstrap=0)
    report = Comparison(plain, out).run()
    assert not any(row["test"]["best"] for row in report["rows"])
    assert "notes" not in report
    assert report["rows"][0]["decoding"]["tokens_per_s"] > 0  # timed though no row searches for passages
    assert "nothing is marked as best" in (out / "report.md").read_text(encoding="utf-8")


def test_the_command_plans_and_reports(
    whole: tuple[Path, dict, list[str]], sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = whole[0]
    monkeypatch.setenv("MEMLM_HOME", str(out.parent / "home"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(sections), encoding="utf-8")
    runner, arguments = CliRunner(), ["compare", str(recipe), "--out", str(out), "--set", "compare.timed_tokens=0"]
    planned = runner.invoke(app, [*arguments, "--plan"])
    assert planned.exit_code == 0, planned.output
    assert "to do" in planned.output
    assert "note" not in planned.output
    with monkeypatch.context() as patch:
        patch.setattr("memlm.evaluate.in_context.find_spec", lambda name: None)
        planned = runner.invoke(app, [*arguments, "--plan"])
    assert planned.exit_code == 0, planned.output
    assert "note: as things are it would not start: in-context retrieval needs bm25s: pip" in planned.output
    found = runner.invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["rows"]
    assert {row["row"] for row in rows} == {"base", *ROWS}
    assert np.isfinite([row["test"]["perplexity"] for row in rows if "test" in row]).all()
