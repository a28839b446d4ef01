"""The papers' tasks: rows of their formats, and what forward passes by hand give."""

import csv
import json
import math
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_model, sentences
from tiny_tokenizers import sentencepiece_like

from memlm.errors import ArtifactError, ConfigError, InputError, TokenizerMismatchError
from memlm.evaluate import tasks as tasks_module
from memlm.evaluate.judged import contains, f1, judged, normalised
from memlm.evaluate.papers import (
    GROUPS,
    TASKS,
    Candidates,
    Labelled,
    Question,
    asked_tasks,
    label_words,
    read_items,
    rows_of,
)
from memlm.evaluate.tasks import evaluate_tasks, tasks_table
from memlm.memory.loading import load_memory
from memlm.models.loading import load_causal_lm
from memlm.models.tokenizers import load_tokenizer

pytest.importorskip("lm_eval")

WORDS = "the memory reads a corpus doctors say that asthma inhalers patients terms contract frozen".split()


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of some formats, in words that the toy model knows."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS, 6))

    written(folder / "mr" / "test.csv", [{"label": number % 2, "text": text()} for number in range(12)])
    (folder / "sst2").mkdir()
    (folder / "sst2" / "label_names_sentidict.txt").write_text("hard, keeps, inhalers\nagree, next\n")
    asked = [{"question": text(), "answer": [" ".join(rng.choice(WORDS, 1))]} for _ in range(8)]
    written(folder / "nq_open" / "NQ-open.dev.jsonl", asked)
    truth = [
        {
            "Question": text(),
            "Best Answer": "red house",
            "Correct Answers": "red house; blue field",
            "Incorrect Answers": "green; the a; and",
        }
        for _ in range(6)
    ]
    written(folder / "truthfulqa" / "TruthfulQA.csv", truth)
    return folder


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "row", "expected"),
    [
        ("cr", "cr/test.csv", {"label": "1", "text": "fine"}, Labelled("fine It was", 1)),
        ("rt", "rotten_tomatoes/test.jsonl", {"input": "dull", "output": "negative"}, Labelled("dull It was", 0)),
        ("hyp", "hyp/test.csv", {"text": " News ", "label": "1"}, Labelled("News\n neutral or partisan? Answer:", 1)),
        (
            "rte",
            "rte/val.jsonl",
            {"premise": "It rains.", "hypothesis": "It is wet.", "label": "not_entailment"},
            Labelled(" It rains.\n question: It is wet. true or false?\n answer:", 1),
        ),
        (
            "cb",
            "cb/dev.jsonl",
            {"premise": "It rains.", "hypothesis": "wet", "label": "neutral"},
            Labelled(' question: Given that "It rains." Is "wet" true, false, or neither?\n answer:', 2),
        ),
        (
            "agn",
            "agnews/test.csv",
            {"Class Index": "3", "Title": "Shares", "Description": "rose"},
            Labelled("Shares \n rose topic:", 2),
        ),
        (
            "yahoo",
            "yahoo/test.jsonl",
            {"topic": 5, "question_title": "who", "question_content": "", "best_answer": "they"},
            Labelled("title: who content:  answer: they topic:", 5),
        ),
        (
            "yahoo",
            "yahoo/test.csv",
            {"topic": "9", "question_title": "who", "question_content": "won", "best_answer": "they"},
            Labelled("title: who content: won answer: they topic:", 9),
        ),
        (
            "triviaqa",
            "triviaqa/validation.jsonl",
            {"question": "Who?", "answer": {"value": "Ann", "aliases": ["Ann", "Anna"]}},
            Question("Answer the questions:\nQuestion: who? The answer is:", ["Ann", "Anna"]),
        ),
        (
            "webquestions",
            "webquestions/test.json",
            {"qText": "where is it?", "answers": ["here"]},
            Question("Answer the questions:\nQuestion: where is it? The answer is:", ["here"]),
        ),
        (
            "hotpotqa",
            "hotpotqa/hotpot_dev_v1_simplified.json",
            {"question": "Were both one?", "answer": "yes"},
            Question("Answer these questions:\nQuestion: were both one?\nAnswer:", ["yes"]),
        ),
        (
            "strategyqa",
            "strategyqa/dev.json",
            {"question": "Is it?", "answer": False},
            Labelled("Question: Is it?\nAnswer:", 1),
        ),
    ],
)
def test_rows_of_each_format_become_items(
    name: str, file: str, row: dict[str, Any], expected: object, tmp_path: Path
) -> None:
    written(tmp_path / file, [row])
    assert read_items(name, tmp_path) == [expected]


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    (tmp_path / "mr").mkdir()
    (tmp_path / "mr" / "test.csv").write_text("label,text\n1,fine\n", encoding="utf-8-sig")
    assert read_items("mr", tmp_path) == [Labelled("fine It was", 1)]


def test_stars_in_the_middle_are_left_out_and_json_lines_may_be_called_json(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "test.tsv").write_text("__label__3\tso so\n__label__5\tfine\n__label__1\tdull\n")
    assert read_items("sst2", tmp_path) == [Labelled("fine It was", 1), Labelled("dull It was", 0)]
    lines = tmp_path / "halueval" / "general_data.json"
    lines.parent.mkdir()
    lines.write_text('{"user_query": "q", "chatgpt_response": "r", "hallucination": "no"}\n' * 2)
    found = read_items("halueval", tmp_path)
    assert [item.label for item in found if isinstance(item, Labelled)] == [1, 1]


def test_the_best_answer_comes_first_and_the_hubs_form_is_read(tmp_path: Path, data: Path) -> None:
    (item, *_) = read_items("truthfulqa", data)
    assert isinstance(item, Candidates)
    assert (item.true, item.false) == (["red house", "blue field"], ["green", "the a", "and"])
    row = {"question": "Q", "mc2_targets": {"choices": ["x", "y", "z"], "labels": [1, 0, 1]}}
    path = written(tmp_path / "rows.jsonl", [row])
    (found,) = (TASKS["truthfulqa"].read(row) for row in rows_of(path))
    assert isinstance(found, Candidates)
    assert (found.true, found.false) == (["x", "z"], ["y"])
    for targets, message in (
        ({"choices": ["x"]}, "field 'labels' of 'mc2_targets' must have one for each"),
        ({"choices": ["x"], "labels": [1, 0]}, "must have one for each of its choices"),
        ({"choices": ["x", "y"], "labels": [0, 0]}, "needs a true answer and a false one"),
    ):
        path = written(tmp_path / "faulty.jsonl", [{"question": "Q", "mc2_targets": targets}])
        with pytest.raises(InputError, match=f"line 1: .*{message}"):
            [TASKS["truthfulqa"].read(row) for row in rows_of(path)]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("nq_open/NQ-open.dev.jsonl", '{"question": "who"}\n', "NQ-open.dev.jsonl, line 1: no field 'answer'"),
        (
            "nq_open/NQ-open.dev.jsonl",
            '{"question": "who", "answer": ["a"]}\n{"question": "who", "answer": [3]}\n',
            "line 2: field 'answer' must be a list of answers",
        ),
        ("nq_open/NQ-open.dev.jsonl", '{"question": "who", "answer": []}\n', "line 1: field 'answer' must be a list"),
        ("nq_open/NQ-open.dev.jsonl", '{"question": 7, "answer": ["a"]}\n', "line 1: field 'question' is int"),
        ("nq_open/NQ-open.dev.jsonl", '{"question": "a", "answer": ["a"]}\n{"que', "line 2: no JSON"),
        ("nq_open/NQ-open.dev.jsonl", '"who"\n', "line 1: str where fields are expected"),
        ("nq_open/NQ-open.dev.jsonl", "", "has no rows"),
        ("mr/test.csv", "label,text\n1,fine\nperhaps,dull\n", "line 3: label 'perhaps' in 'label' is none of 0, 1"),
        ("nq_open/NQ-open.dev.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("nq_open/NQ-open.dev.jsonl", '{"question": ' + "9" * 5000 + "}", "line 1: no JSON"),
    ],
)
def test_a_faulty_file_is_told_by_file_line_and_field(file: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(text)
    name = {"nq_open": "nq", "mr": "mr"}[file.split("/")[0]]
    with pytest.raises(InputError, match=message):
        read_items(name, tmp_path)


def test_names_are_taken_apart_and_faulty_ones_refused(tmp_path: Path) -> None:
    assert asked_tasks(["papers:nine", "arc", "papers:rte", "papers:nq"]) == ([*GROUPS["nine"], "nq"], ["arc"])
    with pytest.raises(InputError, match=r"papers:nosuch is none of papers:sst2, "):
        asked_tasks(["papers:nosuch"])
    with pytest.raises(InputError, match=r"papers:cb: .*cb/dev.jsonl not found"):
        read_items("cb", tmp_path)
    with pytest.raises(InputError, match="papers:mr is not on the hub"):
        read_items("mr", None)


def test_the_hub_is_asked_where_there_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*place: Any, split: str) -> list[dict[str, Any]]:
        asked.append((*place, split))
        return [{"sentence1": "It rains.", "sentence2": "Wet.", "label": 1, "idx": 0}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_items("rte", None) == [Labelled(" It rains.\n question: Wet. true or false?\n answer:", 1)]
    assert asked == [("nyu-mll/glue", "rte", "validation")]

    def fail(*place: Any, split: str) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(InputError, match=r"nyu-mll/glue cannot be loaded \(no network\); give a folder of data"):
        read_items("rte", None)


def test_as_many_words_stand_for_each_label(data: Path, tmp_path: Path) -> None:
    assert label_words("mr", data) == [[" hard", " keeps"], [" agree", " next"]]
    bad, good = label_words("mr", tmp_path)
    assert len(bad) == len(good)
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "label_names_sentidict.txt").write_text("red\n")
    with pytest.raises(InputError, match="has 1 lines, one for each of 2 labels is expected"):
        label_words("mr", tmp_path)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_compared_as_squad_compares_them() -> None:
    assert normalised("The  Cat, sat.") == "cat sat"
    assert f1("the red cat", "Cat") == pytest.approx(2 / 3)
    assert f1("dog", "cat") == 0
    assert f1("red red cat", "red cat cat") == pytest.approx(2 / 3)
    assert contains("It was the White House, then.", "white house")
    assert not contains("whitehouse", "white house")
    assert not contains("anything", "the")


@pytest.fixture(scope="module")
def asked(data: Path, memory_folder: Path, model_folder: str, other_base: str) -> dict[str, Any]:
    return {
        "tasks": ["papers:mr", "papers:nq", "papers:truthfulqa"],
        "base": model_folder,
        "memory": memory_folder,
        "mix_weight": 0.5,
        "gate": "posterior",
        "data": data,
        "others": {"other": other_base, "again": model_folder},
        "dtype": "float32",
        "bootstrap": 50,
    }


@pytest.fixture(scope="module")
def report(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.filterwarnings("ignore", "the text is longer than the memory's window")
        patch.setenv("MEMLM_HOME", str(tmp_path_factory.mktemp("home")))
        return evaluate_tasks(**asked)


class ByHand:
    """What plain forward passes of the base say."""

    def __init__(self, folder: str) -> None:
        self.model, self.tokenizer = load_causal_lm(folder, dtype=torch.float32), load_tokenizer(folder)

    def log_prob(self, prompt: str, answer: str) -> float:
        whole, context = (self.tokenizer(text)["input_ids"] for text in (prompt + answer, prompt))
        with torch.no_grad():
            log_probs = self.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(log_probs[place - 1, whole[place]]) for place in range(len(context), len(whole)))


def test_labels_are_judged_by_what_their_words_gain(report: dict[str, Any], data: Path, model_folder: str) -> None:
    by_hand, right = ByHand(model_folder), []
    words = [
        [word for word in label if len(by_hand.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]
        for label in label_words("mr", data)
    ]
    assert all(words)
    for item in read_items("mr", data):
        assert isinstance(item, Labelled)
        gains = [
            np.mean([by_hand.log_prob(item.prompt, word) - by_hand.log_prob(" It was", word) for word in label])
            for label in words
        ]
        right.append(int(np.argmax(gains)) == item.label)
    assert report["tasks"]["papers:mr"]["values"]["base"]["value"] == pytest.approx(np.mean(right), abs=1e-4)


class Speaker:
    """Says of each request what only that request decides."""

    def tok_encode(self, word: str, add_special_tokens: bool) -> list[int]:
        return [0]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool) -> list[tuple[float, bool]]:
        return [(-1.0 - zlib.crc32(repr(request.arguments).encode()) / 2**31, False) for request in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool) -> list[str]:
        return [str(zlib.crc32(request.arguments[0].encode()) % 3) for request in requests]


@pytest.mark.parametrize(
    ("task", "make"),
    [
        ("sst2", lambda number: Labelled(f"text {number}", number % 2)),
        ("nq", lambda number: Question(f"question {number}", (str(number % 3),))),
        ("truthfulqa", lambda number: Candidates(f"{number}", ("yes", f"sure {number}"), ("no",))),
    ],
)
def test_many_items_are_judged_as_each_alone_and_progress_is_told(task: str, make: Callable[[int], Any]) -> None:
    items, words, told = [make(number) for number in range(150)], [("good", "fine"), ("bad",)], []
    found = judged(task, items, Speaker(), words, told.append)
    assert sum(told) == 150
    assert len(told) > 1
    alone = [judged(task, [item], Speaker(), words) for item in items]
    for metric, values in found.items():
        assert values.tolist() == [one[metric][0] for one in alone]
        assert len(set(values.tolist())) > 1


def test_candidates_are_judged_by_their_probabilities(report: dict[str, Any], data: Path, model_folder: str) -> None:
    by_hand, found = ByHand(model_folder), []
    for item in read_items("truthfulqa", data):
        assert isinstance(item, Candidates)
        true, false = (
            [by_hand.log_prob(item.prompt, f" {answer}.") for answer in answers] for answers in (item.true, item.false)
        )
        mass = [sum(map(math.exp, part)) for part in (true, false)]
        found.append((true[0] > max(false), mass[0] / sum(mass), np.mean([score > max(false) for score in true])))
    for metric, expected in zip(("", " mc2", " mc3"), np.mean(found, 0), strict=True):
        value = report["tasks"][f"papers:truthfulqa{metric}"]["values"]["base"]["value"]
        assert value == pytest.approx(expected, abs=2e-4)


def test_a_further_model_answers_the_same_items_and_first_metrics_are_pooled(report: dict[str, Any]) -> None:
    rows = report["tasks"]
    assert list(rows) == [
        "papers:mr",
        "papers:nq",
        "papers:nq f1",
        "papers:nq contains",
        "papers:truthfulqa",
        "papers:truthfulqa mc2",
        "papers:truthfulqa mc3",
    ]
    for row in rows.values():
        assert list(row["values"]) == ["base", "fixed", "posterior", "other", "again"]
        assert row["values"]["again"] == row["values"]["base"]
        assert row["change"]["again"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert any(row["values"]["other"] != row["values"]["base"] for row in rows.values())
    assert report["pooled"]["items"] == 12 + 8 + 6
    first = [rows[f"papers:{name}"]["values"]["base"]["value"] for name in ("mr", "nq", "truthfulqa")]
    assert report["pooled"]["values"]["base"]["value"] == pytest.approx(np.mean(first), abs=1e-3)
    assert report["run"]["words"] == {"papers:mr": [[" hard", " keeps"], [" agree", " next"]]}
    assert "papers:nq contains" in tasks_table(report)


@pytest.mark.filterwarnings("ignore:the text is longer than the memory's window")
def test_what_was_answered_is_kept_and_asked_no_more(
    asked: dict[str, Any],
    report: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MEMLM_HOME", str(tmp_path))
    seen: list[tuple[str, str]] = []

    def stopped(task: str, items: Any, speaker: Any, words: Any, progress: Any) -> dict[str, np.ndarray]:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append((speaker.called, task))
        return judged(task, items, speaker, words, progress)

    monkeypatch.setattr(tasks_module, "judged", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(**asked)
    base = [("the base alone", task) for task in ("mr", "nq", "truthfulqa")]
    assert seen == [*base, ("the fixed weight", "mr")]
    seen[:] = []
    monkeypatch.setattr(tasks_module, "judged", lambda *given: seen.append(given[2].called) or judged(*given))
    assert evaluate_tasks(**asked) == report
    assert seen == ["the fixed weight"] * 2 + ["the gate posterior"] * 3 + ["other"] * 3  # again: the base, by its hash
    capsys.readouterr()
    seen[:] = []
    assert evaluate_tasks(**asked) == report
    assert not seen
    assert "tasks with" not in capsys.readouterr().err
    evaluate_tasks(**(asked | {"mix_weight": 0.4, "others": {}}))
    assert set(seen) == {"the fixed weight", "the gate posterior"}
    for kept in (tmp_path / "answers").glob("*/mr-*.json"):
        kept.write_text("[1]")
    with pytest.raises(ArtifactError, match="holds no answers; delete it"):
        evaluate_tasks(**asked)


@pytest.mark.filterwarnings("ignore:the text is longer than the memory's window")
def test_a_memory_that_was_given_loaded_is_asked_anew(
    asked: dict[str, Any], model_folder: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(tasks_module, "judged", lambda *given: told.append(given[2].called) or judged(*given))
    loaded = load_memory(memory_folder, base=model_folder, dtype=torch.float32)
    for _ in range(2):
        evaluate_tasks(**(asked | {"tasks": ["papers:mr"], "others": {}, "gate": "none", "memory": loaded}))
    assert told.count("the fixed weight") == 2
    assert told.count("the base alone") < 2


def test_a_template_or_a_taken_name_is_refused(data: Path, memory_folder: Path, model_folder: str) -> None:
    given: dict[str, Any] = {"base": model_folder, "memory": memory_folder, "data": data}
    with pytest.raises(ConfigError, match="papers:mr has a prompt of its own"):
        evaluate_tasks(["papers:mr"], chat_template=True, **given)
    with pytest.raises(ConfigError, match="fixed names a way of its own"):
        evaluate_tasks(["papers:mr"], others={"fixed": model_folder}, **given)


def test_a_further_model_of_another_tokenizer_is_refused_at_once(
    data: Path, memory_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", sentencepiece_like(sentences(100, seed=3)), seed=5)
    with pytest.raises(TokenizerMismatchError, match="all models are to answer in the same tokens"):
        evaluate_tasks(["papers:mr"], base=model_folder, memory=memory_folder, data=data, others={"o": other})


def test_line_ends_of_windows_are_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "test.tsv").write_bytes(b"__label__1\ta dull film\r\n__label__5\ta great film\r\n")
    assert [item.prompt for item in read_items("sst2", tmp_path)] == ["a dull film It was", "a great film It was"]
