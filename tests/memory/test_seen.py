"""Held-out text that a memory was trained on is found, wherever the corpora were built."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_corpus, sentences
from memories import LONG_TEXT

from memlm.cli import app
from memlm.corpus.blocks import Corpus
from memlm.corpus.build import build_corpus
from memlm.errors import InputError
from memlm.evaluate.perplexity import evaluate_perplexity
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


@pytest.mark.parametrize("name", ["memory_folder", "mlp_folder", "datastore_folder"])
def test_a_kind_of_memory_is_known_by_its_text(
    name: str, other: Path, corpus_folder: Path, request: pytest.FixtureRequest
) -> None:
    memory = str(request.getfixturevalue(name))
    assert len(seen_documents(Corpus(other), memory, "test") or ()) == 2
    assert len(seen_documents(Corpus(other), memory, "validation") or ()) == 1
    assert seen_documents(Corpus(corpus_folder), memory, "test") == []
    with pytest.raises(InputError, match=r"^2 of 22 test documents of corpus .* are among those that memory .* was tr"):
        check_unseen(Corpus(other), {"memory": memory}, ("test",))


def test_what_cannot_be_told_is_not_claimed(
    other: Path, memory_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    assert seen_documents(Corpus(other), model_folder, "test") is None
    text = (memory_folder / "manifest.json").read_text()
    shutil.copytree(memory_folder, tmp_path / "moved")
    (tmp_path / "moved" / "manifest.json").write_text(text.replace(str(memory_folder.parent), "/gone"))
    assert seen_documents(Corpus(other), str(tmp_path / "moved"), "test") is None


def test_a_memory_that_went_on_with_another_knows_its_text_too(
    other: Path, memory_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    from memlm.train.run import train_memory

    strange = tmp_path / "strange.txt"
    strange.write_text("\n\n".join(sentences(40, seed=21)), encoding="utf-8")
    corpus = make_corpus(str(strange), model_folder, tmp_path / "corpus")
    settings: dict[str, Any] = {"kl_weight": 0, "max_steps": 1, "dtype": "float32", "batch_size": 2}
    train_memory(corpus, init=str(memory_folder), base=model_folder, out=tmp_path / "m", **settings)
    assert len(seen_documents(Corpus(other), str(tmp_path / "m"), "test") or ()) == 2


def test_an_evaluation_refuses_them_unless_told_to_keep_them(
    other: Path, memory_folder: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"base": model_folder, "memory": memory_folder, "dtype": "float32", "bootstrap": 0}
    with pytest.raises(InputError, match=r"1 of 21 validation documents .*; or keep them with shared_documents keep$"):
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
