"""The study of what a memory is trained on, at toy size."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoTokenizer

from benchmarks import scaling, study, study_plot
from memlm.config import read_recipe
from memlm.models.loading import load_causal_lm

STUDY = Path(__file__).parents[1] / "benchmarks" / "studies" / "medquad-small.yaml"

pytestmark = pytest.mark.slow


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("path", sorted(STUDY.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_parses_and_treats_its_arms_alike(path: Path, tmp_path: Path) -> None:
    held = study.Study(path, tmp_path, tmp_path / "results.jsonl")
    points = list(held.points(list(held.arms), [0, 1]))
    assert len({point.key for point in points}) == len(points)
    searched = {
        arm: sorted(str([point.settings[name] for name in held.search]) for point in points if point.arm == arm)
        for arm in held.arms
    }
    assert len({tuple(values) for values in searched.values()}) == 1
    for point in points:
        config = held.recipe(point.settings).configs["train"]
        assert config.seed == point.seed
    assert held.settings["against"] in held.arms


def test_a_study_judges_every_arm_is_gone_on_with_and_is_done_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, work = tmp_path / "results.jsonl", tmp_path / "work"
    command = [str(STUDY), "--quick", "--work", str(work), "--results", str(results), "--arms", "twin", "mixture"]
    command += ["--set", "study.live_k=[]"]
    assert study.main([*command, "--minutes", "1e-9"]) == 0
    assert [line["what"] for line in lines_of(results)] == ["point", "arm"], "what the first takes is not known before"
    assert "no time is left" in capsys.readouterr().err
    assert study.main(command) == 0
    lines = lines_of(results)
    assert [line["what"] for line in lines] == ["point", "arm", "point", "arm", "pairs"]
    assert [line["arm"] for line in lines[:4]] == ["twin", "twin", "mixture", "mixture"]
    for line in lines[1:4:2]:
        for text in ("in_domain", "general"):
            assert line[text]["base"]["perplexity"] > 1
            assert {"alone", "fixed", "posterior", "both"} <= line[text].keys()
            weight = next(p for p in lines if p["what"] == "point" and p["key"] == line["key"])["validation"][
                "mix_weight"
            ]
            assert line[text]["fixed"]["mix_weight"] == weight
    assert lines[-1]["ratios"].keys() == {"alone", "fixed", "posterior", "both"}
    before = results.read_bytes()
    assert study.main(command) == 0
    assert results.read_bytes() == before
    capsys.readouterr()
    assert study.main([*command, "--table"]) == 0
    assert [row.split(" | ")[0] for row in capsys.readouterr().out.splitlines()[2:]] == ["| twin", "| mixture"]
    (found,) = study_plot.read([results])
    assert found.reference == lines[1]
    assert found.ratios == {"mixture": {0: lines[-1]["ratios"]["both"]["mixture"]}}
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    assert [study_plot.main([str(results), "--out", str(path)]) for path in pictures] == [0, 0]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_arms_may_have_bases_of_their_own(tmp_path: Path) -> None:
    """The papers' law of size at toy size: each base is the one that its own memory stands beside."""
    results = tmp_path / "results.jsonl"
    command = [str(STUDY.parent / "paper-scaling.yaml"), "--quick", "--work", str(tmp_path), "--results", str(results)]
    settings = read_recipe(
        STUDY.parent / "paper-scaling.yaml", study.quick_settings(Path(command[0]), tmp_path / "toy")
    )
    other = tmp_path / "other"
    model = load_causal_lm(str(tmp_path / "toy" / "model"))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.5)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(tmp_path / "toy" / "model").save_pretrained(other)
    arms = {**settings["study"]["arms"], "medium": {"train.base": str(other), "train.layers": 2}}
    command += ["--arms", "small", "medium", "--set", f"study.arms={json.dumps(arms)}"]
    assert study.main(command) == 0
    small, medium, pairs = (line for line in lines_of(results) if line["what"] in ("arm", "pairs"))
    assert small["in_domain"]["base"]["perplexity"] != medium["in_domain"]["base"]["perplexity"]
    found = [line["in_domain"]["fixed"]["perplexity"] for line in (medium, small)]
    assert pairs["ratios"]["fixed"]["medium"]["perplexity"] == pytest.approx(found[0] / found[1], abs=2e-4)


def test_general_text_is_parted_by_headings_or_by_what_is_said() -> None:
    assert study._articles(" = A = \nx\n = B = \ny", None) == [" = A = \nx\n", " = B = \ny"]
    assert study._articles("a\n\n\nb\n\n\n \n\n\n", "\n\n\n") == ["a", "b"]


def test_of_an_arm_the_best_memory_is_kept_and_judged(tmp_path: Path) -> None:
    results, work = tmp_path / "results.jsonl", tmp_path / "work"
    command = [str(STUDY), "--quick", "--work", str(work), "--results", str(results), "--arms", "twin"]
    search = "study.search={train.learning_rate: [1.0e-4, 1.0e-2]}"
    assert study.main([*command, "--set", search, "--set", "study.live_k=[]"]) == 0
    points = [line for line in lines_of(results) if line["what"] == "point"]
    (judged,) = (line for line in lines_of(results) if line["what"] == "arm")
    best = min(points, key=lambda point: point["validation"]["mixture_perplexity"])
    assert len(points) == 2
    assert judged["key"] == best["key"]
    assert [p.name for p in (work / STUDY.stem).glob("point-*")] == [f"point-{best['key']}"]


def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(STUDY), "--quick", "--work", str(tmp_path), "--results", str(tmp_path / "results.jsonl")]
    assert study.main([*command, "--arms", "twins"]) == 1
    assert capsys.readouterr().err.endswith(
        "error: no arm is called 'twins'; there are "
        + ", ".join(study.Study(STUDY, tmp_path, tmp_path / "r").arms)
        + "\n"
    )
    assert study.main([*command, "--max-gib", "0"]) == 1
    assert "GiB, above the 0 allowed, for 8 memories" in capsys.readouterr().err
    (tmp_path / "bare.yaml").write_text("corpus: {documents: a.txt, tokenizer: smollm2}\n")
    assert study.main([str(tmp_path / "bare.yaml"), "--work", str(tmp_path), "--results", str(tmp_path / "r")]) == 1
    assert "lacks 'study'" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").touch()
    assert study_plot.main([str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "picture.png")]) == 1
    assert capsys.readouterr().err.endswith("empty.jsonl: no arm was judged yet\n")


def test_the_law_of_size_is_found_with_an_interval_that_holds_it() -> None:
    sizes = [1e6, 3e6, 1e7, 5e7]
    exact = scaling.fitted(sizes, [(2e-12 * size) ** -0.25 for size in sizes])
    assert exact["exponent"] == pytest.approx(-0.25, abs=1e-4)
    assert math.exp(exact["log_scale"]) == pytest.approx(2e-12, rel=1e-3)
    noise = [1.02, 0.98, 1.01, 0.99]
    rough = scaling.fitted(sizes, [(2e-12 * size) ** -0.25 * by for size, by in zip(sizes, noise, strict=True)])
    low, high = rough["interval"]
    assert low < -0.25 < high < 0
    assert high - low > 10 * (exact["interval"][1] - exact["interval"][0])
    # the slope's interval as scipy's linregress tells it: stderr times Student's quantile of two degrees
    slope = stats.linregress(
        np.log(sizes), np.log([(2e-12 * s) ** -0.25 * by for s, by in zip(sizes, noise, strict=True)])
    )
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 2) * slope.stderr, rel=1e-3)
    with pytest.raises(ValueError, match="2 sizes tell no law"):
        scaling.fitted([1e6, 2e6], [3.0, 2.0])


def test_sizes_of_a_study_are_fitted_from_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    command = [str(STUDY.with_name("medquad-scaling-mlp.yaml")), "--quick", "--work", str(tmp_path / "work")]
    command += [
        "--results",
        str(results),
        "--set",
        'study.arms={"one": {"train.layers": 1}, "two": {"train.layers": 2}, "three": {"train.layers": 3}}',
    ]
    assert study.main([*command, "--set", "study.against=one"]) == 0
    capsys.readouterr()
    assert scaling.main([str(results), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    points = [line for line in lines_of(results) if line["what"] == "point"]
    assert [point["parameters"] for point in found["points"]] == [point["parameters"] for point in points]
    assert found["law"].keys() == set(scaling.WAYS)
    assert scaling.main([str(results)]) == 0
    assert "PPL = (b N)^g" in capsys.readouterr().out
    assert scaling.main([str(tmp_path / "nothing.jsonl")]) == 1
