"""Held-out text that a memory was trained on is found, wherever the corpora were built."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_corpus, save_model, sentences
from memories import LONG_TEXT
from tiny_tokenizers import sentencepiece_like

from memlm.cli import app
from memlm.corpus.blocks import Corpus, Split
from memlm.corpus.build import build_corpus
from memlm.errors import InputError
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.memory.adapt import adapt_memory
from memlm.memory.seen import check_unseen, seen_documents
from memlm.train.gate import fit_gate

pytestmark = pytest.mark.filterwarnings(LONG_TEXT)


@pytest.fixture(scope="module")
def other(corpus_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of other documents, but for two of its test split, and one of its validation split."""
    folder, own = tmp_path_factory.mktemp("other"), Corpus(corpus_folder)
    read = [own.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in own.split("train").documents()]
    texts = {
        "documents": sentences(40, seed=11),
        "validation_documents": [*sentences(20, seed=12), read[5]],
        "test_documents": [read[3], *sentences(20, seed=13), read[9]],
    }
    for name, documents in texts.items():
        (folder / f"{name}.txt").write_text("\n\n".join(map(str, documents)), encoding="utf-8")
    given: dict[str, Any] = {name: str(folder / f"{name}.txt") for name in texts}
    build_corpus(
        tokenizer=model_folder,
        out=folder / "corpus",
        document_separator="\n\n",
        block_size=24,
        end_token="none",
        **given,
    )
    return folder / "corpus"


def seen(corpus: Path, memory: str | Path) -> dict[str, list[str]] | None:
    """What of a corpus's held-out text a memory has read."""
    read = Corpus(corpus)
    return seen_documents(read, str(memory), {name: read.split(name) for name in ("validation", "test")})


@pytest.mark.parametrize("name", ["memory_folder", "mlp_folder", "datastore_folder"])
def test_a_kind_of_memory_is_known_by_its_text(
    name: str, other: Path, corpus_folder: Path, request: pytest.FixtureRequest
) -> None:
    memory = str(request.getfixturevalue(name))
    found = seen(other, memory)
    assert found is not None
    assert {split: len(names) for split, names in found.items()} == {"validation": 1, "test": 2}
    assert seen(corpus_folder, memory) == {"validation": [], "test": []}
    with pytest.raises(
        InputError, match=r"^2 of 22 test documents of corpus .* are among those that memory .* it; so$"
    ):
        check_unseen(Corpus(other), {"memory": memory}, {"test": Corpus(other).split("test")}, "so")


def test_what_cannot_be_told_is_not_claimed(
    other: Path, memory_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    assert seen(other, model_folder) is None
    text = (memory_folder / "manifest.json").read_text()
    shutil.copytree(memory_folder, tmp_path / "moved")
    for elsewhere in ("/gone", "x" * 5000, "a\\u0000b"):
        (tmp_path / "moved" / "manifest.json").write_text(text.replace(str(memory_folder.parent), elsewhere))
        assert seen(other, tmp_path / "moved") is None
    strange = {**json.loads(text), "sources": {}}
    strange["facts"]["corpus"] = "x"
    (tmp_path / "moved" / "manifest.json").write_text(json.dumps(strange))
    assert seen(other, tmp_path / "moved") is None


def test_damaged_training_text_stops_no_evaluation(other: Path, memory_folder: Path, tmp_path: Path) -> None:
    whole = memory_folder.parent
    for name in ("corpus", "datastore"):
        shutil.copytree(whole / name, tmp_path / name)
    shutil.copytree(memory_folder, tmp_path / "m")
    text = (memory_folder / "manifest.json").read_text()
    (tmp_path / "m" / "manifest.json").write_text(text.replace(str(whole), str(tmp_path)))
    assert seen(other, tmp_path / "m") == seen(other, memory_folder)
    tokens = tmp_path / "corpus" / "train.tokens.npy"
    damaged = bytearray(tokens.read_bytes())
    damaged[-5] ^= 1
    tokens.write_bytes(damaged)
    found = seen(other, tmp_path / "m")
    assert found is None or not any(found.values())


def test_a_memory_that_went_on_with_another_knows_its_text_too(
    other: Path, memory_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    from memlm.train.run import train_memory

    strange = tmp_path / "strange.txt"
    strange.write_text("\n\n".join(sentences(40, seed=21)), encoding="utf-8")
    corpus = make_corpus(str(strange), model_folder, tmp_path / "corpus")
    settings: dict[str, Any] = {"kl_weight": 0, "max_steps": 1, "dtype": "float32", "batch_size": 2}
    train_memory(corpus, init=str(memory_folder), base=model_folder, out=tmp_path / "m", **settings)
    found = seen(other, tmp_path / "m")
    assert found is not None
    assert len(found["test"]) == 2


def test_a_memory_carried_to_another_tokenizer_is_known_by_its_text(
    corpus_folder: Path, memory_folder: Path, tmp_path: Path
) -> None:
    own = Corpus(corpus_folder)
    texts = [
        str(own.tokenizer.decode(t, skip_special_tokens=True))
        for t in itertools.islice(own.split("train").documents(), 9)
    ]
    foreign = save_model(tmp_path / "foreign", sentencepiece_like(sentences(200, seed=3)), width=16)
    adapt_memory(memory_folder, tokenizer=foreign, out=tmp_path / "adapted")
    (tmp_path / "test.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "train.txt").write_text("\n\n".join(sentences(30, seed=31)), encoding="utf-8")
    build_corpus(
        tmp_path / "train.txt",
        tokenizer=foreign,
        out=tmp_path / "c",
        test_documents=tmp_path / "test.txt",
        document_separator="\n\n",
    )
    found = seen(tmp_path / "c", tmp_path / "adapted")
    assert found is not None
    assert len(found["test"]) == 9


def test_documents_of_nothing_but_ends_say_nothing(other: Path, datastore_folder: Path) -> None:
    corpus = Corpus(other)
    end = corpus.tokenizer.eos_token_id
    empty = Split(np.array([end, end, end, end], np.int32), np.array([0, 2, 4]), 24, 24, False)
    assert seen_documents(corpus, str(datastore_folder), {"test": empty}) == {"test": []}


def test_an_evaluation_refuses_them_unless_told_to_keep_them(
    other: Path, memory_folder: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"base": model_folder, "memory": memory_folder, "dtype": "float32", "bootstrap": 0}
    with pytest.raises(InputError, match=r"1 of 21 validation documents .*; keep them with shared_documents keep$"):
        evaluate_perplexity(other, **given)
    with pytest.raises(InputError, match=r"2 of 22 test documents"):
        evaluate_perplexity(other, **given, mix_weight=0.5)
    kept = evaluate_perplexity(other, **given, shared_documents="keep")
    assert kept["documents"] == 22
    assert kept["run"]["config"]["shared_documents"] == "keep"
    line = ["evaluate", "perplexity", str(other), "--base", model_folder, "--memory", str(memory_folder)]
    app([*line, "--bootstrap", "0", "--dtype", "float32", "--shared-documents", "keep"], standalone_mode=False)
    assert "perplexity" in capsys.readouterr().out


def test_a_head_is_not_fitted_on_them(other: Path, memory_folder: Path, model_folder: str, tmp_path: Path) -> None:
    shutil.copytree(memory_folder, tmp_path / "m")
    with pytest.raises(InputError, match=r"^1 of 21 validation documents"):
        fit_gate(tmp_path / "m", corpus=other, base=model_folder, dtype="float32")
    with pytest.raises(InputError, match="a head needs"):  # goes on to what is wrong next
        fit_gate(tmp_path / "m", corpus=other, base=model_folder, dtype="float32", max_tokens=20)
