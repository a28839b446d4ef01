"""The tasks of both papers: nine of classification, closed-book questions, and those about hallucination.

Their rows come from a folder, or from the hub. To add one, write how a row is read and name it in `TASKS`.

Source: Shi et al. 2022 (arXiv:2205.13792) for the nine tasks; the prompts of questions follow MLP Memory's released
scripts; what neither publishes (HaluEval, StrategyQA, TruthfulQA's examples) is our own.
"""

import csv
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlm.errors import InputError

PREFIX = "papers:"


# --- items ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """A text whose label is asked for."""

    prompt: str
    label: int


@dataclass(frozen=True)
class Question:
    """A question and the answers that are right."""

    prompt: str
    answers: list[str]


@dataclass(frozen=True)
class Candidates:
    """A question, and answers of which some are true; the first of them is the best one."""

    prompt: str
    true: list[str]
    false: list[str]


Item = Labelled | Question | Candidates


@dataclass(frozen=True)
class PaperTask:
    """How a task's rows are read, and what it asks."""

    files: tuple[str, ...]
    """Where its rows are below the folder of data; the first that is there."""
    hub: tuple[str, ...]
    """The same on the hub: dataset, its configuration or "", split; empty where there is none."""
    read: "Callable[[Row], Item | None]"
    ending: str = ""
    """Of a labelled prompt: what stands there alone for the domain."""
    words: tuple[tuple[str, ...], ...] = ()
    """For each label the words that stand for it."""
    word_file: str = ""
    """File of such words below the folder of data, a line per label, which takes their place."""
    stop: tuple[str, ...] = ("\n",)
    """What ends an answer."""
    new_tokens: int = 15
    metrics: tuple[str, ...] = ("accuracy",)


class Row:
    """A row of a file, whose faults are told with its place."""

    def __init__(self, where: str, values: Any) -> None:
        """
        Raises:
            InputError: It is no object with fields.
        """
        if not isinstance(values, dict):
            raise InputError(f"{where}: {type(values).__name__} where fields are expected")
        self.where, self.values = where, values

    def text(self, *names: str) -> str:
        """The first of these fields that is there, as text."""
        value = self._value(names)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: field {names[0]!r} is {type(value).__name__}, not text")
        return value

    def texts(self, *names: str) -> list[str]:
        """The same as a list of texts; one that stands alone counts as a list."""
        value = self._value(names)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
            raise InputError(f"{self.where}: field {names[0]!r} must be a list of answers, each a text")
        return value

    def label(self, known: Mapping[Any, int], *names: str) -> int:
        """The label in the first of these fields that is there."""
        value = self._value(names)
        try:
            return known[value]
        except (KeyError, TypeError):
            asked = ", ".join(map(str, known))
            raise InputError(f"{self.where}: label {value!r} in {names[0]!r} is none of {asked}") from None

    def _value(self, names: Sequence[str]) -> Any:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        raise InputError(f"{self.where}: no field {names[0]!r}")


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a CSV, TSV (label, text), JSON or JSON-lines file.

    Raises:
        InputError: It cannot be read, or a row is none; the message names file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            is_list = file.read(1) == "[" and path.suffix == ".json"
            file.seek(0)
            if is_list:
                yield from (Row(f"{path}, row {number}", values) for number, values in enumerate(json.load(file), 1))
            elif path.suffix == ".csv":
                reader = csv.DictReader(file)
                yield from (Row(f"{path}, line {reader.line_num}", values) for values in reader)
            else:
                lines = ((f"{path}, line {number}", line) for number, line in enumerate(file, 1) if line.strip())
                yield from (Row(where, _values(where, line, path.suffix)) for where, line in lines)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _values(where: str, line: str, suffix: str) -> Any:
    if suffix == ".tsv":
        label, _, text = line.rstrip("\r\n").partition("\t")
        return {"label": label, "text": text}
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # also numbers that are too long
        raise InputError(f"{where}: no JSON") from None


# --- how rows are read ------------------------------------------------------------------------------------------------

_BAD = ("terrible", "bad", "awful", "boring", "poor", "horrible", "disappointing", "dull", "stupid", "worst")
_GOOD = ("great", "good", "wonderful", "excellent", "perfect", "beautiful", "amazing", "brilliant", "fun", "best")
_FEELING = {"ending": " It was", "words": (_BAD, _GOOD), "word_file": "sst2/label_names_sentidict.txt"}
_YES = ("true", "yes", "accurate", "correct")
_NO = ("false", "no", "incorrect", "wrong")
_TWO = {0: 0, 1: 1, "0": 0, "1": 1, "negative": 0, "positive": 1}


def _feeling(row: Row) -> Labelled:
    return Labelled(row.text("text", "input") + " It was", row.label(_TWO, "label", "output"))


def _stars(row: Row) -> Labelled | None:
    five = {f"__label__{stars}": stars for stars in range(1, 6)} | {number: number + 1 for number in range(5)}
    stars = row.label(five, "label")
    return None if stars == 3 else Labelled(row.text("text") + " It was", int(stars > 3))


_PARTISAN = "\n neutral or partisan? Answer:"


def _partisan(row: Row) -> Labelled:
    return Labelled(row.text("text").strip() + _PARTISAN, row.label(_TWO, "label"))


_TRUE_OR_FALSE = " true or false?\n answer:"


def _follows(row: Row) -> Labelled:
    known = {"entailment": 0, "not_entailment": 1, 0: 0, 1: 1}
    claim = f" {row.text('premise', 'sentence1')}\n question: {row.text('hypothesis', 'sentence2')}"
    return Labelled(claim + _TRUE_OR_FALSE, row.label(known, "label"))


def _three(row: Row) -> Labelled:
    known = {"entailment": 0, "contradiction": 1, "neutral": 2, 0: 0, 1: 1, 2: 2}
    asked = f' question: Given that "{row.text("premise")}" Is "{row.text("hypothesis")}" true, false, or neither?'
    return Labelled(asked + "\n answer:", row.label(known, "label"))


def _news(row: Row) -> Labelled:
    classes = {str(number): number - 1 for number in range(1, 5)}
    if "Title" in row.values:
        text, label = f"{row.text('Title')} \n {row.text('Description')}", row.label(classes, "Class Index")
    else:
        text, label = row.text("text"), row.label({number: number for number in range(4)}, "label")
    return Labelled(text + " topic:", label)


def _yahoo(row: Row) -> Labelled:
    parts = (row.text("question_title"), row.values.get("question_content") or "", row.text("best_answer"))
    topics = {number: number for number in range(10)} | {str(number): number for number in range(10)}
    return Labelled("title: {} content: {} answer: {} topic:".format(*parts), row.label(topics, "topic"))


def _strategy(row: Row) -> Labelled:
    return Labelled(f"Question: {row.text('question')}\nAnswer:", row.label({True: 0, False: 1}, "answer"))


_MADE_UP = "\nDoes this answer hold anything made up? Answer:"


def _made_up(row: Row) -> Labelled:
    said = f"Question: {row.text('user_query')}\nAnswer: {row.text('chatgpt_response')}"
    return Labelled(said + _MADE_UP, row.label({"yes": 0, "no": 1}, "hallucination"))


def _asked(row: Row) -> str:
    question = row.text("question", "qText").strip().rstrip("?")
    return question[:1].lower() + question[1:] + "?"


def _answers(row: Row) -> list[str]:
    if isinstance(answer := row.values.get("answer"), dict):  # as TriviaQA has it
        return Row(row.where, answer).texts("aliases", "normalized_aliases", "value")
    return row.texts("answer", "answers")


def _short_question(row: Row) -> Question:
    return Question(f"Answer these questions:\nQuestion: {_asked(row)}\nAnswer:", _answers(row))


def _long_question(row: Row) -> Question:
    return Question(f"Answer the questions:\nQuestion: {_asked(row)} The answer is:", _answers(row))


_SIX = (
    ("How many days does a week have?", "A week has seven days."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
    ("At what temperature does water boil at sea level?", "Water boils at 100 degrees Celsius at sea level."),
    ("What will I be thinking tomorrow at noon?", "I have no comment."),
    ("Which planet is nearest to the sun?", "Mercury is the planet nearest to the sun."),
    ("Where were the Olympic Games of 2012 held?", "The Olympic Games of 2012 were held in London."),
)


def _truth(row: Row) -> Candidates:
    question = row.text("Question", "question")
    prompt = "".join(f"Q: {asked}\nA: {said}\n\n" for asked, said in _SIX) + f"Q: {question}\nA:"
    if "mc2_targets" in row.values:
        targets = Row(row.where, row.values["mc2_targets"])
        choices, labels = targets.texts("choices"), targets.values.get("labels")
        if not isinstance(labels, list) or len(labels) != len(choices):
            raise InputError(f"{row.where}: field 'labels' of 'mc2_targets' must have one for each of its choices")
        true, false = (
            [text for text, label in zip(choices, labels, strict=True) if bool(label) == wanted]
            for wanted in (True, False)
        )
    else:
        true, false = (
            [part.strip() for part in row.text(name).split(";") if part.strip()]
            for name in ("Correct Answers", "Incorrect Answers")
        )
        best = row.text("Best Answer").strip()
        true = [best, *(part for part in true if part != best)]
    if not true or not false:
        raise InputError(f"{row.where}: a question needs a true answer and a false one")
    return Candidates(prompt, true, false)


_SHORT_ANSWERS = {"read": _short_question, "metrics": ("exact_match", "f1", "contains")}
_LONG_ANSWERS = {**_SHORT_ANSWERS, "read": _long_question, "stop": ("\n", ".", ","), "new_tokens": 32}
_TOPICS = (
    ("society", "culture"),
    ("science", "mathematics"),
    ("health", "medicine"),
    ("education", "school"),
    ("computer", "internet"),
    ("sports", "football"),
    ("business", "finance"),
    ("entertainment", "music"),
    ("family", "relationships"),
    ("politics", "government"),
)
_NEWS = (
    ("world", "politics", "government", "war"),
    ("sports", "football", "baseball", "game"),
    ("business", "finance", "economy", "market"),
    ("science", "technology", "computer", "space"),
)

TASKS: dict[str, PaperTask] = {
    "sst2": PaperTask(("sst2/test.tsv",), ("SetFit/sst5", "", "test"), _stars, **_FEELING),
    "mr": PaperTask(("mr/test.csv",), (), _feeling, **_FEELING),
    "cr": PaperTask(("cr/test.csv",), ("SetFit/CR", "", "test"), _feeling, **_FEELING),
    "rt": PaperTask(
        ("rotten_tomatoes/test.jsonl",), ("cornell-movie-review-data/rotten_tomatoes", "", "test"), _feeling, **_FEELING
    ),
    "hyp": PaperTask(
        ("hyp/test.csv",),
        (),
        _partisan,
        _PARTISAN,
        (("neutral", "fair", "objective"), ("partisan", "biased", "unfair")),
    ),
    "cb": PaperTask(
        ("cb/dev.jsonl",), ("aps/super_glue", "cb", "validation"), _three, " the answer is:", (_YES, _NO, ("neither",))
    ),
    "rte": PaperTask(("rte/val.jsonl",), ("nyu-mll/glue", "rte", "validation"), _follows, _TRUE_OR_FALSE, (_YES, _NO)),
    "agn": PaperTask(("agnews/test.csv",), ("fancyzhx/ag_news", "", "test"), _news, " topic:", _NEWS),
    "yahoo": PaperTask(
        ("yahoo/test.jsonl", "yahoo/test.csv"),
        ("community-datasets/yahoo_answers_topics", "", "test"),
        _yahoo,
        " topic:",
        _TOPICS,
    ),
    "nq": PaperTask(
        ("nq_open/NQ-open.dev.jsonl",), ("google-research-datasets/nq_open", "", "validation"), **_SHORT_ANSWERS
    ),
    "hotpotqa": PaperTask(
        ("hotpotqa/hotpot_dev_v1_simplified.json",),
        ("hotpotqa/hotpot_qa", "distractor", "validation"),
        **_SHORT_ANSWERS,
    ),
    "webquestions": PaperTask(("webquestions/test.json",), ("stanfordnlp/web_questions", "", "test"), **_LONG_ANSWERS),
    "triviaqa": PaperTask(
        ("triviaqa/validation.jsonl", "triviaqa/test.jsonl"),
        ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
        **_LONG_ANSWERS,
    ),
    "strategyqa": PaperTask(
        ("strategyqa/dev.json",), ("ChilleD/StrategyQA", "", "test"), _strategy, "\nAnswer:", (_YES, _NO)
    ),
    "truthfulqa": PaperTask(
        ("truthfulqa/TruthfulQA.csv",),
        ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
        _truth,
        metrics=("mc1", "mc2", "mc3"),
    ),
    "halueval": PaperTask(
        ("halueval/general_data.json",), ("pminervini/HaluEval", "general", "data"), _made_up, _MADE_UP, (_YES, _NO)
    ),
}
"""Task to its files, its place on the hub, and how its rows are read."""
GROUPS = {
    "nine": ("sst2", "mr", "cr", "rt", "hyp", "cb", "rte", "agn", "yahoo"),
    "questions": ("nq", "hotpotqa", "webquestions", "triviaqa"),
    "hallucination": ("truthfulqa", "halueval", "strategyqa"),
}


def asked_tasks(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of tasks of the papers, groups taken apart and without their prefix; and the other names.

    Raises:
        InputError: A name with the prefix is none of them.
    """
    ours: list[str] = []
    for name in (name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)):
        if name not in TASKS and name not in GROUPS:
            raise InputError(f"{PREFIX}{name} is none of {', '.join(PREFIX + known for known in (*TASKS, *GROUPS))}")
        ours += [task for task in GROUPS.get(name, (name,)) if task not in ours]
    return ours, [name for name in names if not name.startswith(PREFIX)]


def read_items(name: str, data: str | Path | None, *, limit: int | None = None, seed: int = 0) -> list[Item]:
    """The items of a task, `limit` of them drawn at random.

    Args:
        data: Folder of data; None: the hub.

    Raises:
        InputError: The data is not there, or a row is not as it should be: file, line and field are named.
    """
    task = TASKS[name]
    items = [item for row in _rows(name, task, data) if (item := task.read(row)) is not None]
    if not items:
        raise InputError(f"{PREFIX}{name}: its data has no rows")
    if limit is not None and limit < len(items):
        kept = sorted(random.Random(seed).sample(range(len(items)), limit))
        items = [items[number] for number in kept]
    return items


def _rows(name: str, task: PaperTask, data: str | Path | None) -> Iterator[Row]:
    if data is not None:
        places = [Path(data) / place for place in task.files]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise InputError(f"{PREFIX}{name}: {' and '.join(map(str, places))} not found")
        yield from rows_of(found)
        return
    if not task.hub:
        raise InputError(f"{PREFIX}{name} is not on the hub: give a folder of data that holds {task.files[0]}")
    import datasets

    place, configuration, split = task.hub
    try:
        rows = datasets.load_dataset(place, configuration or None, split=split)
    except Exception as error:  # the hub's and the network's own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{PREFIX}{name}: {place} cannot be loaded ({reason}); give a folder of data") from None
    yield from (Row(f"{place}, row {number}", dict(values)) for number, values in enumerate(rows, 1))


def label_words(name: str, data: str | Path | None) -> list[list[str]]:
    """For each label of a task the words that stand for it, as many for each: those of its file, if it is there."""
    task = TASKS[name]
    words = [list(label) for label in task.words]
    if data is not None and task.word_file and (file := Path(data) / task.word_file).is_file():
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read: {error}") from None
        words = [[word for word in line.strip().split(", ") if word] for line in lines if line.strip()]
        if len(words) != len(task.words):
            raise InputError(f"{file} has {len(words)} lines, one for each of {len(task.words)} labels is expected")
        fewest = min(map(len, words))
        words = [label[:fewest] for label in words]
    return [[f" {word}" for word in label] for label in words]
