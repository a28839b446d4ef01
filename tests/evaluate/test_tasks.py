"""Tasks of lm-eval: the same items for base, fixed weight and gate, and what a mixture is to lm-eval."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import sentences

from benchmarks import general_ability
from memlm.cli import app
from memlm.errors import ConfigError, InputError, ModelError
from memlm.evaluate import tasks as tasks_module
from memlm.evaluate.lm_eval import FiniteLM, _batches, lm_eval_errors
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.evaluate.tasks import evaluate_tasks, tasks_table
from memlm.files import cache_dir
from memlm.mix import loading, mixed_lm
from memlm.mix.gate_config import GateConfig
from memlm.mix.mixed_lm import MixedLM
from memlm.models.loading import load_causal_lm
from memlm.models.tokenizers import load_tokenizer
from memlm.targets.config import RetrievalConfig

pytestmark = pytest.mark.slow

pytest.importorskip("lm_eval")

ITEMS = [
    ("the red house is", [" blue", " green"], 0),
    ("a green field", [" red", " and"], 1),
    ("house field red", [" the", " a"], 0),
    ("blue and green", [" house", " field"], 1),
    ("the the the", [" red", " house"], 0),
]


def write_task(folder: Path, items: list[tuple[str, list[str], int]], name: str = "toy", **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    rows = (json.dumps({"prompt": p, "answers": a, "right": r}) + "\n" for p, a, r in items)
    (folder / f"{name}.jsonl").write_text("".join(rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "{{right}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    given = {key: value for key, value in (task | more).items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(given))
    return folder


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("tasks"), ITEMS)


def by_hand(model: Any, tokenizer: Any) -> list[bool]:
    """Whether the right answer is the likelier one, item by item, from plain forward passes."""
    found = []
    for prompt, answers, right in ITEMS:
        scores = []
        for answer in answers:
            whole, context = tokenizer(prompt + answer)["input_ids"], tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(context), len(whole))
            scores.append(sum(float(log_probs[place - 1, whole[place]]) for place in places))
        found.append(int(np.argmax(scores)) == right)
    return found


def test_each_way_is_what_forward_passes_by_hand_give(
    task_folder: Path, memory_folder: Path, model_folder: str
) -> None:
    weights = {"mix_weight": 0.9, "gate": "posterior"}
    report = evaluate_tasks(["toy"], base=model_folder, memory=memory_folder, include=[task_folder], **weights)
    model = MixedLM.from_pretrained(model_folder, memory=memory_folder, dtype=torch.float32, **weights)
    tokenizer = load_tokenizer(model_folder)
    values = report["tasks"]["toy"]["values"]
    assert list(values) == ["base", "fixed", "posterior"]
    expected = {"base": by_hand(model.base, tokenizer), "posterior": by_hand(model, tokenizer)}
    model.set_gate("none")
    expected["fixed"] = by_hand(model, tokenizer)
    for way, right in expected.items():
        assert values[way]["value"] == pytest.approx(np.mean(right), abs=1e-4)
        low, high = values[way]["interval"]
        assert low <= values[way]["value"] <= high
    assert report["tasks"]["toy"]["items"] == len(ITEMS)
    change = report["tasks"]["toy"]["change"]["fixed"]["value"]
    assert change == pytest.approx(values["fixed"]["value"] - values["base"]["value"], abs=1e-4)
    assert report["run"]["mix_weight"] == {"memory": 0.9}


def test_a_datastore_is_searched_as_asked(
    task_folder: Path, datastore_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"base": model_folder, "memory": datastore_folder, "mix_weight": 0.9, "gate": "none"}
    asked: dict[str, Any] = {"include": [task_folder], "dtype": "float32", "bootstrap": 0}
    searched, seen = RetrievalConfig(k=2, target_temperature=0.5), []
    load = loading.load_mixture
    monkeypatch.setattr(mixed_lm, "load_mixture", lambda *args: seen.append(args[6]) or load(*args))
    few = evaluate_tasks(["toy"], **given, **asked, retrieval=searched)
    mixed = MixedLM.from_pretrained(
        model_folder, memory=datastore_folder, mix_weight=0.9, memory_kwargs={"retrieval": searched}
    )
    right = by_hand(mixed, load_tokenizer(model_folder))
    assert few["tasks"]["toy"]["values"]["fixed"]["value"] == pytest.approx(np.mean(right), abs=1e-4)
    assert few["run"]["retrieval"]["k"] == 2
    assert seen[0] == {"retrieval": searched}
    line = [
        "evaluate",
        "tasks",
        "toy",
        "--base",
        model_folder,
        "--memory",
        str(datastore_folder),
        "--mix-weight",
        "0.9",
    ]
    line += ["--gate", "none", "--include", str(task_folder), "--k", "2", "--target-temperature", "0.5"]
    app([*line, "--dtype", "float32", "--out", str(tmp_path / "r.json")], standalone_mode=False)
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["tasks"]["toy"]["values"]["fixed"]["value"] == few["tasks"]["toy"]["values"]["fixed"]["value"]


def test_a_way_that_answers_alike_has_changed_nothing_with_certainty() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(40).round()
    worse = right.copy()
    worse[:10] = 0
    found = {
        "base": {"a": ("acc", right), "b": ("acc", right)},
        "fixed": {"a": ("acc", worse), "b": ("acc", right)},
        "both": {"a": ("acc", right), "b": ("acc", right)},
    }
    report = tasks_module.paired_report(found, seed=0, bootstrap=500, above={})
    assert report["pooled"]["change"]["both"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert report["pooled"]["items"] == 80
    lost = report["pooled"]["change"]["fixed"]
    assert lost["value"] == pytest.approx(-(right - worse).mean() / 2, abs=1e-4)
    assert lost["interval"][0] < lost["value"] < lost["interval"][1] <= 0
    table = tasks_table(report)
    assert "pooled" in table
    assert "both +0.0 (+0.0 to +0.0)" in table


def test_tasks_in_which_the_base_is_not_above_chance_are_not_pooled() -> None:
    knows, guesses = np.ones(30), np.tile([0.0, 1.0], 15)
    found = {way: {"knows": ("acc", knows), "guesses": ("acc", guesses)} for way in ("base", "fixed")}
    report = tasks_module.paired_report(found, seed=0, bootstrap=200, above={"knows": 0.5, "guesses": 0.5})
    assert report["pooled"]["items"] == 30
    none = {way: {"guesses": ("acc", guesses)} for way in ("base", "fixed")}
    report = tasks_module.paired_report(none, seed=0, bootstrap=200, above={"guesses": 0.5})
    assert report["pooled"] is None
    assert "pooled" not in tasks_table(report)


def test_lm_evals_own_command_runs_a_mixture(
    task_folder: Path, memory_folder: Path, model_folder: str, program: Path, tmp_path: Path
) -> None:
    command = [program, "evaluate", "lm-eval", "--base", model_folder, "--memory", str(memory_folder)]
    command += ["--mix-weight", "0.9", "--gate", "none", "--tasks", "toy", "--include_path", str(task_folder)]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("results*.json")
    told = json.loads(path.read_text())
    report = evaluate_tasks(
        ["toy"], base=model_folder, memory=memory_folder, mix_weight=0.9, gate="none", include=[task_folder]
    )
    assert told["results"]["toy"]["acc,none"] == pytest.approx(
        report["tasks"]["toy"]["values"]["fixed"]["value"], abs=1e-4
    )


def test_of_several_filters_the_first_counts_and_what_has_no_values_is_left_out(
    memory_folder: Path, model_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    strict = [{"function": "regex", "regex_pattern": "(XX)"}, {"function": "take_first"}]
    loose = [{"function": "regex", "regex_pattern": "(.*)"}, {"function": "take_first"}]
    said = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 2},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "strict", "filter": strict}, {"name": "loose", "filter": loose}],
    }
    whole = {
        "output_type": "loglikelihood_rolling",
        "doc_to_choice": None,
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
    }
    write_task(tmp_path, ITEMS, name="filtered", **said)
    write_task(tmp_path, ITEMS, name="rolling", **whole, metric_list=[{"metric": "word_perplexity"}])
    report = evaluate_tasks(["filtered", "rolling"], base=model_folder, memory=memory_folder, include=[tmp_path])
    assert {task: part["items"] for task, part in report["tasks"].items()} == {"filtered": len(ITEMS)}
    assert "task rolling is left out: word_perplexity has no value for each item" in capfd.readouterr().err


def test_weights_that_cannot_be_in_force_together_are_no_way(
    task_folder: Path, memory_folder: Path, model_folder: str
) -> None:
    memories, weights = {"a": memory_folder, "b": memory_folder}, {"a": 0.7, "b": 0.8}
    asked: Any = {"memory": memories, "mix_weight": weights, "gate": "posterior", "include": [task_folder]}
    report = evaluate_tasks(["toy"], base=model_folder, **asked)
    assert list(report["tasks"]["toy"]["values"]) == ["base", "posterior"]


def test_log_likelihoods_are_lm_evals_own_and_keep_the_places_that_are_asked_for(model_folder: str) -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, rng = load_causal_lm(model_folder), load_tokenizer(model_folder), np.random.default_rng(0)
    texts = [rng.integers(0, 50, rng.integers(1, 90)).tolist() for _ in range(40)]
    requests = [(("", ""), text, rng.integers(0, 50, rng.integers(1, 6)).tolist()) for text in texts for _ in range(3)]
    requests += [(("", ""), text, [token]) for text in texts[:5] for token in range(9)]  # share what is read
    asked: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4, "max_length": 64}
    for shared in (True, False):
        expected = HFLM(**asked, logits_cache=shared)._loglikelihood_tokens(requests, disable_tqdm=True)
        places: list[int] = []
        with patched_forward(model, places):
            found = FiniteLM(**asked, logits_cache=shared)._loglikelihood_tokens(requests, disable_tqdm=True)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        np.testing.assert_allclose([p for p, _ in found], [p for p, _ in expected], rtol=1e-4, atol=1e-4)
        assert max(places) < 64
        assert np.mean(places) < 10


@contextmanager
def patched_forward(model: Any, places: list[int]) -> Iterator[None]:
    """Within the block `places` is told at how many each pass gives scores."""
    hook = model.register_forward_hook(lambda module, given, found: places.append(found.logits.shape[1]))
    try:
        yield
    finally:
        hook.remove()


def test_batches_of_long_texts_are_small_where_many_places_are_asked_for() -> None:
    requests = [(("", ""), [number] * length, [1]) for number, length in enumerate((5000, 4900, 3000, 900, 899, 898))]
    found = list(_batches(requests, 8, 8192, True))
    assert [numbers for numbers, _ in found] == [[0, 1], [2], [3, 4, 5]]
    assert [kept for _, kept in found] == [101, 1, 3]
    rolling = [(("", ""), [number], [1] * 2000) for number in range(5)]
    assert [(len(numbers), kept) for numbers, kept in _batches(rolling, 8, 8192, True)] == [
        (2, 2000),
        (2, 2000),
        (1, 2000),
    ]
    assert list(_batches([], 8, 8192, True)) == []


def test_bad_input_is_one_line(
    task_folder: Path, memory_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"base": model_folder, "memory": memory_folder, "include": [task_folder]}
    with pytest.raises(InputError, match="knows no task 'toys'"):
        evaluate_tasks(["toys"], **asked)
    with pytest.raises(InputError, match="is no folder of task files"):
        evaluate_tasks(["toy"], **{**asked, "include": [tmp_path / "nowhere"]})
    with pytest.raises(ConfigError, match="limit = 0"):
        evaluate_tasks(["toy"], limit=0, **asked)
    broken = write_task(tmp_path / "broken", ITEMS, name="broken", doc_to_target="{{nothing.here}}")
    with pytest.raises(InputError, match="lm-eval cannot run broken"):
        evaluate_tasks(["broken"], **{**asked, "include": [broken]})
    with pytest.raises(InputError, match=r"lm-eval: Tasks not found: nosuch"), lm_eval_errors("lm-eval"):
        raise ValueError("Tasks not found:\nnosuch")
    monkeypatch.setattr(tasks_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'memlm\[tasks\]' brings lm-eval"):
        evaluate_tasks(["toy"], **asked)


def test_tasks_of_general_ability_are_those_that_are_there(
    tmp_path: Path, model_folder: str, memory_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--base", model_folder, "--memory", str(memory_folder), "--gate", "posterior"]
    assert general_ability.main([str(tmp_path), *given]) == 1
    assert "holds none of the tasks sst2, mr" in capsys.readouterr().err
    (tmp_path / "mr").mkdir()
    (tmp_path / "mr" / "test.csv").write_text("label,text\n0,dull\n1,fine\n")
    assert general_ability.chances(tmp_path) == {"papers:mr": 0.5}
    assert general_ability.main([str(tmp_path), *given, "--out", str(tmp_path / "report.json")]) == 0
    assert "where the base alone is above chance" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["chance"] == {"papers:mr": 0.5}


GENERATES = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize("more", [{}, GENERATES], ids=["choices", "generation"])
def test_a_way_that_gives_no_numbers_is_named(
    more: dict[str, Any], memory_folder: Path, model_folder: str, nan_base: str, tmp_path: Path
) -> None:
    include: dict[str, Any] = {
        "memory": memory_folder,
        "mix_weight": 0.3,
        "include": [write_task(tmp_path, ITEMS, **more)],
    }
    with pytest.raises(ModelError, match=r"^the base alone gives no finite scores$"):
        evaluate_tasks(["toy"], base=nan_base, **include)
    with pytest.raises(ModelError, match=r"^tuned gives no finite scores$"):
        evaluate_tasks(["toy"], base=model_folder, others={"tuned": nan_base}, **include)


def test_answers_are_kept_for_the_search_that_a_datastore_was_validated_with(
    corpus_folder: Path, datastore_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "mr").mkdir()
    rows = "".join(f"{number % 2},{text}\n" for number, text in enumerate(sentences(12, seed=9)))
    (tmp_path / "mr" / "test.csv").write_text("label,text\n" + rows)
    copied = shutil.copytree(datastore_folder, tmp_path / "d")
    kept = []
    for temperature in (0.5, 64.0):
        searched = RetrievalConfig(k=8, target_temperature=temperature)
        how: dict[str, Any] = {"base": model_folder, "memory": copied, "dtype": "float32"}
        evaluate_perplexity(corpus_folder, retrieval=searched, bootstrap=0, **how)
        before = {*cache_dir().glob("answers/*")}
        evaluate_tasks(["papers:mr"], data=tmp_path, mix_weight=0.5, bootstrap=0, limit=4, **how)
        kept.append({*cache_dir().glob("answers/*")} - before)
    assert kept[1], "another search, other answers"


def test_log_likelihoods_under_a_gate_hang_on_no_batch(model_folder: str, memory_folder: Path) -> None:
    """A gate hears each text from its first token, as where texts are evaluated."""
    gate = GateConfig(gate="posterior", prompt_window=4)
    mixed = MixedLM.from_pretrained(model_folder, memory=memory_folder, gate=gate)
    rng = np.random.default_rng(0)
    requests = [(("", ""), rng.integers(0, 50, length).tolist(), [7, 9]) for length in (28, 9, 20, 3)]
    found = [
        [
            score
            for score, _ in FiniteLM(
                pretrained=mixed, tokenizer=load_tokenizer(model_folder), batch_size=size
            )._loglikelihood_tokens(requests, disable_tqdm=True)
        ]
        for size in (1, 4)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)
    for (_, context, going_on), score in zip(requests, found[0], strict=True):
        with torch.no_grad():
            log_probs = mixed(torch.tensor([context + going_on])).logits[0].log_softmax(-1)
        places = range(len(context), len(context) + 2)
        whole = sum(float(log_probs[at - 1, (context + going_on)[at]]) for at in places)
        assert score == pytest.approx(whole, rel=1e-3)
    assert mixed.gate == gate
