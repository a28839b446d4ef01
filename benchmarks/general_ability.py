"""What a memory does to general ability: classification and questions, for the base, the fixed weight and the gate.

`python -m benchmarks.general_ability FOLDER --base smollm2 --memory m/` reads the files of the kNN-prompt tasks,
StrategyQA and TruthfulQA below a folder, and pools the tasks in which the base alone is above chance.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import hardware
from memlm.errors import InputError, MemlmError
from memlm.evaluate.tasks import BASE, evaluate_tasks, tasks_table
from memlm.files import write_json

Item = tuple[str, list[str], int]
"""Prompt, answers, and which of them is right."""
_FEELING = [" negative", " positive"]
_TOPICS = [" world", " sports", " business", " technology"]
_FOLLOWS = {"entailment": " yes", "contradiction": " no", "neutral": " maybe"}
_LONGEST = 1200  # characters of a text


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            yield from (json.loads(line) for line in file if line.strip())
        elif path.suffix == ".json":
            yield from json.load(file)
        elif path.suffix == ".tsv":
            for line in file:
                label, _, text = line.rstrip("\n").partition("\t")
                yield {"label": label, "text": text}
        else:
            yield from csv.DictReader(file)


def _sentiment(text: str, label: int) -> Item:
    return f"Review: {text[:_LONGEST]}\nSentiment:", _FEELING, label


def _sst2(folder: Path) -> Iterator[Item]:
    for row in _rows(folder / "test.tsv"):
        stars = int(row["label"].removeprefix("__label__"))
        if stars != 3:
            yield _sentiment(row["text"], int(stars > 3))


def _by_label(folder: Path) -> Iterator[Item]:
    yield from (_sentiment(row["text"], int(row["label"])) for row in _rows(folder / "test.csv"))


def _tomatoes(folder: Path) -> Iterator[Item]:
    yield from (_sentiment(row["input"], int(row["output"] == "positive")) for row in _rows(folder / "test.jsonl"))


def _partisan(folder: Path) -> Iterator[Item]:
    for row in _rows(folder / "test.csv"):
        yield (
            f"{row['text'][:_LONGEST]}\nQuestion: is this article partisan?\nAnswer:",
            [" no", " yes"],
            int(row["label"]),
        )


def _news(folder: Path) -> Iterator[Item]:
    for row in _rows(folder / "test.csv"):
        yield f"{row['Title']}\n{row['Description']}\nTopic:", _TOPICS, int(row["Class Index"]) - 1


def _follows(premise: str, hypothesis: str) -> str:
    return f"{premise[:_LONGEST]}\nQuestion: {hypothesis.rstrip('.')}. True, or not?\nAnswer:"


def _rte(folder: Path) -> Iterator[Item]:
    for row in _rows(folder / "val.jsonl"):
        yield _follows(row["premise"], row["hypothesis"]), [" no", " yes"], int(row["label"] == "entailment")


def _cb(folder: Path) -> Iterator[Item]:
    names = list(_FOLLOWS)
    for row in _rows(folder / "dev.jsonl"):
        yield _follows(row["premise"], row["hypothesis"]), list(_FOLLOWS.values()), names.index(row["label"])


def _strategy(folder: Path) -> Iterator[Item]:
    for row in _rows(folder / "dev.json"):
        yield f"Question: {row['question']}\nAnswer:", [" no", " yes"], int(row["answer"])


def _truth(folder: Path) -> Iterator[Item]:
    for row in _rows(folder / "TruthfulQA.csv"):
        answers = [f" {row['Best Answer']}", f" {row['Best Incorrect Answer']}"]
        yield f"Question: {row['Question']}\nAnswer:", answers, 0


TASKS: dict[str, tuple[str, Callable[[Path], Iterator[Item]]]] = {
    "sst2": ("sst2", _sst2),
    "mr": ("mr", _by_label),
    "cr": ("cr", _by_label),
    "rotten_tomatoes": ("rotten_tomatoes", _tomatoes),
    "hyp": ("hyp", _partisan),
    "agnews": ("agnews", _news),
    "rte": ("rte", _rte),
    "cb": ("cb", _cb),
    "strategyqa": ("strategyqa", _strategy),
    "truthfulqa_two": ("truthfulqa", _truth),
}
"""Task to its folder, and how its items are read. The prompts are our own: figures compare with each other alone."""


def write_tasks(folder: Path, out: Path, limit: int, seed: int) -> dict[str, float]:
    """Write task files for lm-eval, `limit` items of each, drawn at random; task to what chance gives.

    Raises:
        InputError: A file does not hold what its task needs.
    """
    chances = {}
    for name, (place, read) in TASKS.items():
        if not (folder / place).is_dir():
            print(f"{name}: no folder {folder / place}; left out", file=sys.stderr)
            continue
        try:
            items = list(read(folder / place))
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{folder / place} is not as task {name} has it: {type(error).__name__} {error}") from None
        items = random.Random(seed).sample(items, min(limit, len(items)))
        lines = (json.dumps({"prompt": p, "answers": a, "right": r}) + "\n" for p, a, r in items)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        task = {
            "task": f"memlm_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(out / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{answers}}",
            "doc_to_target": "{{right}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (out / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
        chances[f"memlm_{name}"] = 1 / len(items[0][1])
    return chances


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 where something is wrong."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.general_ability", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the tasks' folders are")
    parser.add_argument("--base", required=True)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--gate", help="default as the memory has it")
    parser.add_argument("--limit", type=int, default=100, help="items of a task at most; default 100")
    parser.add_argument("--seed", type=int, default=0, help="draws the items")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="file for the report")
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            chances = write_tasks(given.folder, Path(scratch), given.limit, given.seed)
            asked = {"base": given.base, "memory": given.memory, "gate": given.gate, "dtype": given.dtype}
            report = evaluate_tasks(list(chances), include=[scratch], seed=given.seed, above=chances, **asked)
    except MemlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report["chance"], report["machine"] = chances, hardware()
    print(tasks_table(report))
    known = [task for task, chance in chances.items() if report["tasks"][task]["values"][BASE]["interval"][0] > chance]
    print(f"pooled: {', '.join(known) or 'none'}, where the base alone is above chance")
    if given.out is not None:
        write_json(given.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
