"""How a model does on items of the papers' tasks; the model is one of lm-eval, which batches the requests.

A label is judged by its words (fuzzy verbalisers): the mean of `log p(word | prompt) - log p(word | its end alone)`
over those that are one token, so that a label which is likely anyway gains nothing (domain-conditional PMI); a label
that has none such is judged by its first word. Questions
are answered greedily; exact match, F1 and whether a right answer stands in what was said are told apart.

Source: Shi et al. 2022 (arXiv:2205.13792), whose code takes the sum; where labels have as many words, that ranks alike.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memlm.evaluate.papers import TASKS, Candidates, Item, Labelled, PaperTask, Question

_AT_ONCE = 64
"""Items that are put to a model before progress is told; among them lm-eval batches what is of a length."""


def judged(
    name: str,
    items: Sequence[Item],
    speaker: Any,
    words: Sequence[Sequence[str]],
    progress: Callable[[int], object] = lambda items: None,
) -> dict[str, NDArray[np.float64]]:
    """What a model reaches on each item: metric to a number per item.

    Args:
        speaker: A model of lm-eval.
        words: Of `label_words`; those that are one token count.
        progress: Told how many items were judged, some at a time.
    """
    task, judge = TASKS[name], partial(_by_candidates, speaker=speaker)
    if isinstance(items[0], Labelled):
        judge = _ByWords(speaker, task.ending, words)
    elif isinstance(items[0], Question):
        judge = partial(_by_answers, speaker=speaker, task=task)
    found = []
    for start in range(0, len(items), _AT_ONCE):
        some: Any = items[start : start + _AT_ONCE]
        found.append(judge(some))
        progress(len(some))
    return {metric: np.concatenate([part[metric] for part in found]) for metric in found[0]}


def _requests(kind: Any, arguments: Sequence[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=number) for number, a in enumerate(arguments)]


def _log_likelihoods(speaker: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    return [found for found, _ in speaker.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)]


class _ByWords:
    """1 where the label whose words gain most by the text is the right one."""

    def __init__(self, speaker: Any, ending: str, words: Sequence[Sequence[str]]) -> None:
        whole = [
            [word for word in label if len(speaker.tok_encode(word, add_special_tokens=False)) == 1] for label in words
        ]
        whole = [kept or list(label[:1]) for kept, label in zip(whole, words, strict=True)]
        self._speaker = speaker
        self._every = [word for label in whole for word in label]
        self._ends = np.cumsum([len(label) for label in whole])[:-1]
        self._prior = np.array(_log_likelihoods(speaker, [(ending, word) for word in self._every]))

    def __call__(self, items: Sequence[Labelled]) -> dict[str, NDArray[np.float64]]:
        pairs = [(item.prompt, word) for item in items for word in self._every]
        found = np.array(_log_likelihoods(self._speaker, pairs))
        gains = found.reshape(len(items), -1) - self._prior
        scores = np.stack([part.mean(1) for part in np.split(gains, self._ends, axis=1)], 1)
        return {"accuracy": (scores.argmax(1) == np.array([item.label for item in items])).astype(np.float64)}


def _by_answers(items: Sequence[Question], speaker: Any, task: PaperTask) -> dict[str, NDArray[np.float64]]:
    settings = {"until": list(task.stop), "max_gen_toks": task.new_tokens, "do_sample": False}
    requests = _requests("generate_until", [(item.prompt, dict(settings)) for item in items])
    said = [text.strip() for text in speaker.generate_until(requests, disable_tqdm=True)]
    pairs = list(zip(said, items, strict=True))
    return {
        "exact_match": np.array([max(float(normalised(t) == normalised(a)) for a in i.answers) for t, i in pairs]),
        "f1": np.array([max(f1(text, answer) for answer in item.answers) for text, item in pairs]),
        "contains": np.array([max(float(contains(text, answer)) for answer in item.answers) for text, item in pairs]),
    }


def _by_candidates(items: Sequence[Candidates], speaker: Any) -> dict[str, NDArray[np.float64]]:
    """By the probability of whole answers, as TruthfulQA counts.

    MC1: the best answer is likelier than all false ones. MC2: the true ones' share of the probability. MC3: the share
    of true ones that are likelier than all false ones.
    """
    pairs = [(item.prompt, f" {answer.rstrip('.')}.") for item in items for answer in (*item.true, *item.false)]
    left, found = iter(_log_likelihoods(speaker, pairs)), []
    for item in items:
        true, false = (np.array([next(left) for _ in answers]) for answers in (item.true, item.false))
        likeliest = false.max(initial=-np.inf)
        both = np.logaddexp.reduce(np.append(true, false))
        share = float(np.exp(np.logaddexp.reduce(true) - both))
        found.append((float(true[0] > likeliest), share, float((true > likeliest).mean())))
    return dict(zip(("mc1", "mc2", "mc3"), np.array(found).T, strict=True))


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and repeated blanks, as SQuAD compares answers."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words, each counted as often as it comes."""
    said, right = normalised(text).split(), normalised(answer).split()
    shared = sum((Counter(said) & Counter(right)).values())
    return 2 * shared / (len(said) + len(right)) if shared else float(said == right)


def contains(text: str, answer: str) -> bool:
    """Whether the answer's words stand in the text one after another."""
    said, right = normalised(text), normalised(answer)
    return bool(right) and f" {right} " in f" {said} "
