"""The table of scores, where several ask for it at once."""

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memlm.corpus.blocks import Corpus
from memlm.errors import ModelError
from memlm.mix.base import BaseVoter
from memlm.scores import table as table_module
from memlm.scores.score import COLUMNS
from memlm.scores.table import Scorers, ScoreTable, Text, score_corpus


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was scored, in a cache of its own; each pass takes a while, so that others come in between."""
    monkeypatch.setenv("MEMLM_HOME", str(tmp_path / "home"))
    right, told = table_module.score, []

    def slowly(voters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        told.extend(name.split()[0] for name in voters)
        time.sleep(0.3)
        return right(voters, *args, **kwargs)

    monkeypatch.setattr(table_module, "score", slowly)
    one = threading.Lock()  # transformers loads one model at a time; processes do not share it as these threads do

    def one_at_a_time(load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any, **kwargs: Any) -> Any:
            with one:
                return load(*args, **kwargs)

        return loaded

    for name in ("load_memory", "load_causal_lm", "BaseVoter"):
        monkeypatch.setattr(table_module, name, one_at_a_time(getattr(table_module, name)))
    return told


def at_once(corpus: Path, base: str, memories: list[dict[str, str]]) -> list[dict[str, ScoreTable]]:
    """Tables that several ask for at the same time."""

    def ask(its: dict[str, str]) -> dict[str, ScoreTable]:
        return score_corpus(Corpus(corpus), base, its, dtype="float32")

    with ThreadPoolExecutor(len(memories)) as pool:
        return list(pool.map(ask, memories))


def test_two_that_share_an_unscored_base_score_it_once(
    corpus_folder: Path, model_folder: str, memory_folder: Path, other_base: str, passes: list[str], capfd: Any
) -> None:
    tables = at_once(corpus_folder, model_folder, [{"a": str(memory_folder)}, {"b": other_base}])
    assert sorted(passes) == ["a", "a", "b", "b", "base", "base"]  # validation and test
    for split in ("validation", "test"):
        one, other = (table[split].voters["base"].label for table in tables)
        np.testing.assert_array_equal(one, other)
    assert "waiting" in capfd.readouterr().err


def test_three_that_ask_for_the_same_compute_it_once(
    corpus_folder: Path, model_folder: str, memory_folder: Path, other_base: str, passes: list[str]
) -> None:
    both = {"a": str(memory_folder), "b": other_base}
    turned = dict(reversed(both.items()))  # locks are taken in one order, whatever the order of the memories
    at_once(corpus_folder, model_folder, [both, turned, both])
    assert sorted(passes) == ["a", "a", "b", "b", "base", "base"]


def test_one_model_under_two_names_is_not_waited_for(
    corpus_folder: Path, model_folder: str, passes: list[str], capfd: Any
) -> None:
    at_once(corpus_folder, model_folder, [{"a": model_folder, "b": model_folder}])
    assert "waiting" not in capfd.readouterr().err


def test_what_is_scored_already_is_not_waited_for(
    corpus_folder: Path, model_folder: str, memory_folder: Path, other_base: str, passes: list[str], capfd: Any
) -> None:
    at_once(corpus_folder, model_folder, [{"a": model_folder}])
    at_once(corpus_folder, model_folder, [{"a": str(memory_folder)}, {"b": other_base}])
    assert "waiting" not in capfd.readouterr().err


def test_one_that_fails_leaves_the_pass_to_the_other(
    corpus_folder: Path, model_folder: str, memory_folder: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly, failed = table_module.score, []

    def fails_first(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(True)
            time.sleep(0.3)
            raise ModelError("gone")
        return slowly(*args, **kwargs)

    monkeypatch.setattr(table_module, "score", fails_first)
    memories = {"a": str(memory_folder)}
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(score_corpus, Corpus(corpus_folder), model_folder, memories, dtype="float32") for _ in "12"
        ]
    assert sorted(type(each.exception()).__name__ for each in asked) == ["ModelError", "NoneType"]


@pytest.mark.parametrize("between", ["nothing", "rotten", "turned"])
def test_a_pass_that_is_stopped_keeps_what_was_scored_and_says_so(
    corpus_folder: Path, model_folder: str, memory_folder: Path, other_base: str, tmp_path: Path, between: str
) -> None:
    """It is gone on with, unless its file is rotten meanwhile or the memories are asked for in another order."""
    corpus = Corpus(corpus_folder)
    text = Text(corpus.manifest.hash, "test", corpus.split("test"), corpus.manifest.tokenizer, str(corpus_folder))
    steps, step = [], BaseVoter.step

    memories = {"m": str(memory_folder), "other": other_base}

    def scored(home: str, memories: dict[str, str] = memories, *, stop_at: int = 10**9) -> dict[str, Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if len(steps) == stop_at:
                raise KeyboardInterrupt
            steps.append(1)
            return step(*args, **kwargs)

        steps.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MEMLM_HOME", str(tmp_path / home))
            patch.setattr(BaseVoter, "step", counted)
            return Scorers(
                model_folder,
                memories,
                vocab_size=corpus.vocab_size,
                dtype=torch.float32,
                batch_tokens=64,
                keep_seconds=0,
            ).score(text)

    whole = scored("whole")
    n_whole = len(steps)
    with pytest.raises(KeyboardInterrupt) as stop:
        scored("home", stop_at=4)
    (note,) = stop.value.__notes__
    total = corpus.split("test").n_positions
    kept = int(re.fullmatch(rf"the cache keeps the scores of (\d+) of {total:,} labels", note)[1])  # type: ignore[index]
    assert 0 < kept < total
    (part,) = (tmp_path / "home" / "scores" / "parts").iterdir()
    if between == "rotten":
        part.write_bytes(part.read_bytes()[:-40])
    resumed = scored("home", dict(reversed(memories.items())) if between == "turned" else memories)
    assert len(steps) == n_whole - (4 if between == "nothing" else 0)
    for name, scores in whole.items():
        for column in COLUMNS:
            np.testing.assert_array_equal(getattr(resumed[name], column), getattr(scores, column))
    assert between == "turned" or not list((tmp_path / "home" / "scores" / "parts").iterdir())
