"""Targets of a corpus: what a teacher says, without neighbours."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_stranger
from interruption import files_written
from transformers import PreTrainedTokenizerFast

from memlm.corpus.blocks import Corpus
from memlm.errors import ConfigError, ModelError, TokenizerMismatchError
from memlm.manifest import read_manifest
from memlm.models.loading import load_causal_lm
from memlm.targets import words
from memlm.targets.build import build_targets
from memlm.train.data import TrainingData
from memlm.train.run import train_memory


@pytest.fixture(scope="module")
def made(corpus_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("words") / "t"
    build_targets(corpus_folder, teacher=model_folder, out=out, target_mass=1.0, max_support=20, dtype="float32")
    return out


def test_each_position_has_the_likeliest_tokens_of_the_teacher(
    made: Path, corpus_folder: Path, model_folder: str
) -> None:
    """Against whole distributions, block by block; so are the perplexities that are told."""
    corpus, model = Corpus(corpus_folder), load_causal_lm(model_folder, dtype=torch.float32)
    split, rows, nats = corpus.split("train"), TrainingData(made, with_targets=True).train, []
    for number in range(len(split)):
        block, row = split[number], rows[number]
        with torch.no_grad():
            said = model(torch.from_numpy(block.input_ids.astype(np.int64))[None]).logits[0, :, : corpus.vocab_size]
        places = np.flatnonzero(block.predicted)
        nats += (-said.log_softmax(-1)[places - 1, block.input_ids[places].astype(np.int64)]).tolist()
        if number % 7:
            continue
        ends = np.cumsum(row["target_counts"])
        probs, likeliest = said.softmax(-1).topk(20)
        for place, end in zip(places, ends, strict=True):
            expected = torch.zeros(corpus.vocab_size).index_put(
                (likeliest[place - 1],), probs[place - 1] / probs[place - 1].sum()
            )
            here = slice(end - 20, end)
            found = torch.zeros(corpus.vocab_size).index_put(
                (torch.from_numpy(row["target_ids"][here].astype(np.int64)),),
                torch.from_numpy(row["target_probs"][here].astype(np.float32)),
            )
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)
    facts = read_manifest(made).facts
    assert facts["teacher_perplexity"]["train"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)
    assert facts["teacher_perplexity"]["validation"] > 1
    assert facts["mean_support"] == 20


def test_they_are_what_a_datastore_gives_whose_teacher_has_all_of_the_share(
    made: Path, datastore_folder: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"target_mass": 1.0, "max_support": 20, "teacher_share": 1}
    other = build_targets(datastore_folder, out=tmp_path / "t", k=8, target_temperature=4.0, **how)
    here, there = (TrainingData(folder, with_targets=True).train for folder in (made, tmp_path / "t"))
    for number in range(0, len(here), 9):
        for name in ("input_ids", "target_counts"):
            assert (here[number][name] == there[number][name]).all()
        np.testing.assert_allclose(here[number]["target_probs"], there[number]["target_probs"], atol=1e-3)
    assert other.facts["teacher_perplexity"]["train"] == read_manifest(made).facts["teacher_perplexity"]["train"]


def test_a_memory_learns_from_them(made: Path, model_folder: str, tmp_path: Path) -> None:
    memory = train_memory(made, init=model_folder, out=tmp_path / "m", max_steps=2, dtype="float32")
    assert memory.facts["targets_config"]["teacher_share"] == 1.0
    assert "what the teacher says of the text; no neighbours" in (tmp_path / "m" / "README.md").read_text()


def test_a_stopped_run_goes_on_to_the_same_bytes(
    corpus_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_SHARD_POSITIONS", 300)
    how: dict[str, Any] = {"teacher": model_folder, "dtype": "float32"}
    whole = build_targets(corpus_folder, out=tmp_path / "whole", **how)
    with files_written("train-*", most=2):
        build_targets(corpus_folder, out=tmp_path / "cut", **how)
    assert build_targets(corpus_folder, out=tmp_path / "cut", **how).hash == whole.hash


@pytest.mark.parametrize(
    ("told", "given"),
    [
        ("has no neighbours, so its targets are what a model says: give --teacher", {"teacher": None}),
        ("k is for neighbours, which corpus .* has none of: run memlm datastore", {"k": 8}),
        (r"teacher_share = 0\.5: the rest is for neighbours, which", {"teacher_share": 0.5}),
        (r"teacher_share = auto: the rest is for neighbours, which", {"teacher_share": "auto"}),
        ("folds = 2: give as many teachers of folds, there are 0", {"folds": 2}),
        ("'nonsense'", {"dtype": "nonsense"}),
    ],
)
def test_what_does_not_fit_a_corpus_is_one_line(
    told: str, given: dict[str, Any], corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        build_targets(corpus_folder, **{"out": tmp_path / "t", "teacher": model_folder, **given})


def test_a_precision_is_refused_where_the_datastore_says_it(datastore_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is for the teachers of a corpus"):
        build_targets(datastore_folder, out=tmp_path / "t", k=8, dtype="float32")


def test_a_teacher_that_gives_no_numbers_is_one_line(corpus_folder: Path, nan_base: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^teacher {nan_base} gives no finite scores$"):
        build_targets(corpus_folder, teacher=nan_base, out=tmp_path / "t")


def test_a_teacher_of_another_tokenizer_is_refused(
    corpus_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerMismatchError):
        build_targets(corpus_folder, teacher=save_stranger(tmp_path / "s", tokenizer), out=tmp_path / "t")
