"""Teachers of folds: each speaks of the documents that it has not read."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_corpus
from hypothesis import given
from hypothesis import strategies as st
from interruption import files_written

from memlm.corpus.blocks import Corpus, Split
from memlm.datastore.build import build_datastore
from memlm.errors import ArtifactError, ConfigError, InputError
from memlm.manifest import read_manifest
from memlm.models.loading import load_causal_lm
from memlm.targets.authors import write_corpus
from memlm.targets.build import build_targets
from memlm.train.config import TrainConfig
from memlm.train.data import TrainingData
from memlm.train.run import train_memory

FOLDS = 3


@given(st.lists(st.integers(2, 30), min_size=3, max_size=30), st.integers(2, 3), st.integers(0, 99))
def test_folds_have_all_documents_and_about_as_many_tokens(lengths: list[int], count: int, seed: int) -> None:
    offsets = np.cumsum([0, *lengths])
    tokens = np.random.default_rng(seed).integers(0, 50, offsets[-1]).astype(np.int32)
    split = Split(tokens, offsets, 8, 4, cross_documents=False)
    fold = split.folds(count)
    sizes = np.bincount(fold, lengths, minlength=count)
    assert sizes.sum() == offsets[-1]
    assert sizes.max() - sizes.min() <= max(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    shuffled = split.only(np.ones(len(lengths), bool)) if seed % 2 else _in_order(split, order)
    again = shuffled.folds(count)
    assert sorted(np.bincount(again, np.diff(shuffled.offsets), minlength=count)) == sorted(sizes)
    for number in range(count):
        part = split.only(fold == number)
        expected = [text for text, of in zip(split.documents(), fold, strict=True) if of == number]
        assert [text.tolist() for text in part.documents()] == [text.tolist() for text in expected]


def _in_order(split: Split, order: np.ndarray) -> Split:
    texts = list(split.documents())
    found = [texts[number] for number in order]
    offsets = np.cumsum([0, *map(len, found)])
    return Split(np.concatenate(found), offsets, split.block_size, split.step, split.cross_documents)


@pytest.fixture(scope="module")
def teachers(corpus_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One for each fold, in no order."""
    folder, found = tmp_path_factory.mktemp("teachers"), []
    for number in (2, 3, 1):
        out = folder / str(number)
        how: dict[str, Any] = {"init": model_folder, "max_steps": 2, "dtype": "float32", "learning_rate": 1e-2}
        train_memory(corpus_folder, out=out, left_out=f"{number}/{FOLDS}", **how)
        found.append(out)
    return found


def test_a_fold_that_is_left_out_is_not_read(corpus_folder: Path) -> None:
    split = Corpus(corpus_folder).split("train")
    fold = split.folds(FOLDS)
    read = []
    for number in range(FOLDS):
        rows = TrainingData(corpus_folder, with_targets=False, left_out=(number, FOLDS)).train
        read.append({tuple(rows[i]["input_ids"].tolist()) for i in range(len(rows))})
    for block in (split[i] for i in range(len(split))):
        own = int(fold[split.documents_of(np.array([block.positions.start]))[0]])
        there = {number for number in range(FOLDS) if tuple(block.input_ids.tolist()) in read[number]}
        assert there == {*range(FOLDS)} - {own}


@pytest.mark.parametrize("source", ["corpus", "datastore"])
def test_each_position_has_what_the_teacher_says_that_has_not_read_it(
    source: str, teachers: list[Path], corpus_folder: Path, datastore_folder: Path, tmp_path: Path
) -> None:
    """The targets against whole distributions, block by block, and what is told of their teachers."""
    how: dict[str, Any] = {"teacher_share": 1, "target_mass": 1.0, "max_support": 40, "fold_teachers": teachers}
    if source == "corpus":
        made = build_targets(corpus_folder, out=tmp_path / "t", dtype="float32", **how)
    else:
        made = build_targets(datastore_folder, out=tmp_path / "t", k=8, target_temperature=4.0, **how)
    assert made.config["folds"] == FOLDS
    assert {name for name in made.inputs if name.startswith("fold-")} == {"fold-1", "fold-2", "fold-3"}
    corpus = Corpus(corpus_folder)
    split, rows = corpus.split("train"), TrainingData(tmp_path / "t", with_targets=True).train
    fold = split.folds(FOLDS)
    models = [load_causal_lm(str(place), dtype=torch.float32) for place in sorted(teachers)]
    nats: list[float] = []
    for number in range(len(split)):
        block, row = split[number], rows[number]
        own = models[int(fold[split.documents_of(np.array([block.positions.start]))[0]])]
        with torch.no_grad():
            logits = own(torch.from_numpy(block.input_ids.astype(np.int64))[None]).logits[0, :, : corpus.vocab_size]
        probs = logits.softmax(-1)
        nats += (-probs[block.places, block.input_ids[block.places + 1].astype(np.int64)].log()).tolist()
        ends = np.cumsum(row["target_counts"])
        for place, end, count in zip(np.flatnonzero(block.predicted), ends, row["target_counts"], strict=True):
            expected = probs[place - 1, row["target_ids"][end - count : end].astype(np.int64)]
            expected = expected / expected.sum()
            found = torch.from_numpy(row["target_probs"][end - count : end].astype(np.float32))
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)
    told = made.facts["teacher_perplexity"]
    assert told["train"] == pytest.approx(float(np.exp(np.mean(nats))), rel=1e-3)
    assert told["validation"] == pytest.approx(_held_out(models, corpus), rel=1e-3)


def test_of_what_was_written_the_teacher_speaks(
    teachers: list[Path], corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    """Documents as the teachers of folds say them of the corpus before, what was written as the teacher does."""
    how: dict[str, Any] = {"target_mass": 1.0, "max_support": 10, "dtype": "float32"}
    wrote = write_corpus(
        corpus_folder, fold_teachers=teachers, out=tmp_path / "c", times=1, document_tokens=20, dtype="float32"
    )
    assert wrote.facts["written"]["folds"] == FOLDS
    sources = {
        "both": (tmp_path / "c", {"teacher": model_folder, "fold_teachers": teachers}),
        "whole": (tmp_path / "c", {"teacher": model_folder}),
        "folds": (corpus_folder, {"fold_teachers": teachers}),
    }
    made = {name: build_targets(place, out=tmp_path / name, **who, **how) for name, (place, who) in sources.items()}
    assert made["both"].config["folds"] == FOLDS
    assert made["both"].inputs.keys() == {"corpus", "teacher", *(f"fold-{n}" for n in range(1, FOLDS + 1))}
    rows = {name: TrainingData(tmp_path / name, with_targets=True).train for name in sources}
    assert len(rows["both"]) == len(rows["whole"]) > len(rows["folds"])
    for number in range(len(rows["both"])):
        other = rows["folds" if number < len(rows["folds"]) else "whole"][number]
        for name in ("input_ids", "target_counts", "target_ids"):
            assert (rows["both"][number][name] == other[name]).all()
        np.testing.assert_allclose(rows["both"][number]["target_probs"], other["target_probs"], atol=1e-3)


def test_who_does_not_speak_of_what_was_written_is_one_line(
    teachers: list[Path], corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    both: dict[str, Any] = {"teacher": model_folder, "fold_teachers": teachers}
    with pytest.raises(ConfigError, match="holds nothing that was written"):
        build_targets(corpus_folder, out=tmp_path / "t", **both)
    with pytest.raises(ConfigError, match="who is to write"):
        write_corpus(corpus_folder, out=tmp_path / "c", **both)
    with pytest.raises(ConfigError, match=rf"folds = 2: give as many teachers of folds, there are {FOLDS}"):
        write_corpus(corpus_folder, out=tmp_path / "c", fold_teachers=teachers, folds=2)
    how: dict[str, Any] = {"times": 1, "document_tokens": 20, "dtype": "float32"}
    write_corpus(corpus_folder, teacher=model_folder, out=tmp_path / "w", **how)
    with pytest.raises(ArtifactError, match="but on the one before teachers wrote: of that --teacher speaks"):
        build_targets(tmp_path / "w", out=tmp_path / "t", fold_teachers=teachers)
    manifest = tmp_path / "w" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["facts"]["written"]["documents"] = 10_000
    manifest.write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match="more documents than there are"):
        Corpus(tmp_path / "w")


def _held_out(models: list[Any], corpus: Corpus) -> float:
    """Perplexity of all validation text under all models, position by position."""
    split, nats = corpus.split("validation"), []
    for model, block in product(models, (split[number] for number in range(len(split)))):
        with torch.no_grad():
            logits = model(torch.from_numpy(block.input_ids.astype(np.int64))[None]).logits[0, :, : corpus.vocab_size]
        log_probs = logits.log_softmax(-1)
        nats += (-log_probs[block.places, block.input_ids[block.places + 1].astype(np.int64)]).tolist()
    return float(np.exp(np.mean(nats)))


def test_a_stopped_run_goes_on_to_the_same_bytes(
    teachers: list[Path], corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    build_datastore(corpus_folder, teacher=model_folder, out=tmp_path / "d", shard_positions=300, dtype="float32")
    how: dict[str, Any] = {"fold_teachers": teachers, "k": 8, "target_temperature": 4.0, "teacher_share": 0.5}
    whole = build_targets(tmp_path / "d", out=tmp_path / "whole", **how)
    with files_written("train-*", most=1):
        build_targets(tmp_path / "d", out=tmp_path / "cut", **how)
    assert build_targets(tmp_path / "d", out=tmp_path / "cut", **how).hash == whole.hash


@pytest.mark.parametrize(
    ("error", "told", "change"),
    [
        (ConfigError, "left out 2/3, 3/3; 1/3, 2/3, 3/3 are needed", lambda t: {"fold_teachers": t[:2]}),
        (ConfigError, "with a share that is given", lambda t: {"teacher_share": "auto"}),
        (ConfigError, "with a share that is given", lambda t: {"teacher_share": 0.0}),
        (ConfigError, "folds = 2: give as many teachers of folds, there are 3", lambda t: {"folds": 2}),
        (ConfigError, "folds = 2: give as many teachers of folds, there are 0", lambda t: _none(2)),
    ],
)
def test_teachers_that_do_not_fit_together_are_one_line(
    error: type[Exception],
    told: str,
    change: Callable[[list[Path]], dict[str, Any]],
    teachers: list[Path],
    datastore_folder: Path,
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {"fold_teachers": teachers, "teacher_share": 1, "k": 8, **change(teachers)}
    with pytest.raises(error, match=told):
        build_targets(datastore_folder, out=tmp_path / "t", **given)


def _none(folds: int) -> dict[str, Any]:
    return {"fold_teachers": [], "folds": folds}


def test_teachers_of_other_text_are_refused(
    teachers: list[Path], memory_folder: Path, documents: str, model_folder: str, corpus_folder: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"teacher_share": 1, "k": 8}
    other = make_corpus(documents, model_folder, tmp_path / "c", test_fraction=0.3)
    build_datastore(other, teacher=model_folder, out=tmp_path / "d", dtype="float32")
    with pytest.raises(ArtifactError, match="was not trained on corpus"):
        build_targets(tmp_path / "d", out=tmp_path / "t", fold_teachers=teachers, **how)
    whole = train_memory(corpus_folder, init=model_folder, out=tmp_path / "w", max_steps=1, dtype="float32")
    build_datastore(corpus_folder, teacher=model_folder, out=tmp_path / "d2", dtype="float32")
    assert whole.inputs["data"] == read_manifest(tmp_path / "d2").inputs["corpus"]
    with pytest.raises(ConfigError, match="has read all documents: a teacher of a fold is trained with --left-out"):
        build_targets(tmp_path / "d2", out=tmp_path / "t", fold_teachers=[tmp_path / "w"], **how)
    crossed = make_corpus(documents, model_folder, tmp_path / "x", cross_documents=True)
    build_datastore(crossed, teacher=model_folder, out=tmp_path / "d3", dtype="float32")
    train_memory(crossed, init=model_folder, out=tmp_path / "a", max_steps=1, dtype="float32", left_out="1/2")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match="left out 1/2, 1/2; 1/2, 2/2 are needed"):
        build_targets(tmp_path / "d3", out=tmp_path / "t", fold_teachers=[tmp_path / "a", tmp_path / "b"], **how)
    train_memory(crossed, init=model_folder, out=tmp_path / "b2", max_steps=1, dtype="float32", left_out="2/2")
    with pytest.raises(InputError, match="cross documents"):
        build_targets(tmp_path / "d3", out=tmp_path / "t", fold_teachers=[tmp_path / "a", tmp_path / "b2"], **how)


@pytest.mark.parametrize("value", ["0/2", "3/2", "1/1", "1", "a/b", "1/200"])
def test_what_is_no_fold_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="left_out"):
        TrainConfig.parse({"left_out": value})


def test_a_fold_is_left_out_of_plain_fine_tuning_alone(
    corpus_folder: Path, targets_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"init": model_folder, "out": tmp_path / "m", "left_out": "1/2"}
    with pytest.raises(ConfigError, match="has targets of all documents; train such a teacher on the corpus"):
        train_memory(targets_folder, **how)
    with pytest.raises(ConfigError, match="left_out is for plain fine-tuning"):
        train_memory(corpus_folder, objective="mixture", **how)
    with pytest.raises(InputError, match="99 folds of"):
        train_memory(corpus_folder, **how | {"left_out": "1/99"})


def test_settings_without_folds_are_as_they_were(datastore_folder: Path, tmp_path: Path) -> None:
    """So that older folders are still recognised."""
    assert "left_out" not in TrainConfig().model_dump()
    made = build_targets(datastore_folder, out=tmp_path / "t", k=8, target_temperature=4.0)
    assert "folds" not in made.config
