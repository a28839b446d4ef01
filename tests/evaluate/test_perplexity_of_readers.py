"""Perplexity with memories that read the base: an MLP memory, and a datastore as it is (kNN-LM)."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import forbid_models, make_corpus, save_model, save_stranger
from reference import dense_votes
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from memlm.corpus.blocks import Corpus
from memlm.datastore.store import Datastore
from memlm.errors import ArtifactError, MemlmError, ModelError, TokenizerMismatchError
from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.evaluate.report import report_table
from memlm.manifest import read_manifest
from memlm.memory.loading import load_memory
from memlm.memory.mlp import MLPMemory
from memlm.memory.retrieval import RetrievalMemory
from memlm.mix.mixed_lm import MixedLM
from memlm.models.loading import load_causal_lm
from memlm.models.taps import TapReader
from memlm.repair import repair_folder
from memlm.scores.table import score_corpus
from memlm.targets.config import RetrievalConfig

pytestmark = pytest.mark.slow

EXACT = EvaluateConfig(dtype="float32", bootstrap=50)
FEW = RetrievalConfig(k=16, target_temperature=4.0)


@pytest.fixture(scope="module")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def knn_report(corpus_folder: Path, model_folder: str, datastore_folder: Path, own_home: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLM_HOME", own_home)
        return evaluate_perplexity(
            corpus_folder, base=model_folder, memory=str(datastore_folder), config=EXACT, retrieval=FEW
        )


def queries_and_labels(model: str, corpus: Path, split: str) -> tuple[torch.Tensor, np.ndarray]:
    """What goes into the last MLP before every token but each document's first, and those tokens.

    Blocks of 32 that step by half of themselves, each in a pass of its own.
    """
    tokens, offsets = np.load(corpus / f"{split}.tokens.npy"), np.load(corpus / f"{split}.offsets.npy")
    states, labels = [], []
    reader = TapReader(load_causal_lm(model), "model.layers.1.mlp")
    for start, end in itertools.pairwise(offsets):
        document = tokens[start:end]
        predict_from, stop = 1, min(32, len(document))
        while True:
            first = max(0, stop - 32)
            block = torch.from_numpy(document[first:stop].astype(np.int64))[None]
            states.append(reader.read(block)[0, predict_from - 1 - first : stop - 1 - first])
            labels.append(document[predict_from:stop])
            if stop == len(document):
                break
            predict_from, stop = stop, min(stop + 16, len(document))
    return torch.cat(states), np.concatenate(labels)


def base_log_probs(model: str, corpus: Path, split: str) -> np.ndarray:
    """Of each label, from the head on what the last block makes of the same blocks."""
    split_blocks = Corpus(corpus).split(split)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for number in range(len(split_blocks)):
        block = split_blocks[number]
        with torch.no_grad():
            logits = loaded(torch.from_numpy(block.input_ids[None].astype(np.int64))).logits[0, :, :320]
        places = np.flatnonzero(block.predicted)
        found.append(logits.double().log_softmax(-1)[places - 1, block.input_ids[places]].numpy())
    return np.concatenate(found)


# --- an MLP memory ----------------------------------------------------------------------------------------------------


def test_figures_of_an_mlp_memory_equal_plain_passes_over_the_bases_activations(
    corpus_folder: Path, model_folder: str, mlp_folder: Path
) -> None:
    """Float32 in other batches: 1e-5 relative; figures are rounded to 1e-4."""
    report = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(mlp_folder), config=EXACT)
    memory = load_memory(mlp_folder)
    assert isinstance(memory, MLPMemory)
    states, labels = queries_and_labels(model_folder, corpus_folder, "test")
    with torch.no_grad():
        log_probs = memory.output(memory.body(states)).double().log_softmax(-1).numpy()
    ours = log_probs[np.arange(len(labels)), labels]
    base = base_log_probs(model_folder, corpus_folder, "test")
    assert report["tokens"] == len(labels) == len(base)
    assert report["memory"]["perplexity"] == pytest.approx(np.exp(-ours.mean()), rel=1e-5)
    assert report["base"]["perplexity"] == pytest.approx(np.exp(-base.mean()), rel=1e-5)
    weight = report["mixture"]["fixed"]["mix_weight"]
    mixture = np.log((1 - weight) * np.exp(base) + weight * np.exp(ours))
    assert report["mixture"]["fixed"]["perplexity"] == pytest.approx(np.exp(-mixture.mean()), rel=1e-5)


def test_an_mlp_memory_is_scored_anew_beside_another_base(
    corpus_folder: Path, model_folder: str, mlp_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(tmp_path / "other", tokenizer, seed=3)
    found = [
        evaluate_perplexity(corpus_folder, base=base, memory=str(mlp_folder), config=EXACT)["memory"]["perplexity"]
        for base in (model_folder, str(tmp_path / "other"))
    ]
    assert found[1] != pytest.approx(found[0], rel=0.01)


def test_a_base_that_an_mlp_memory_cannot_read_is_refused(
    corpus_folder: Path, mlp_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(tmp_path / "deeper", tokenizer, layers=3)
    with pytest.raises(ModelError, match="a base with 2 blocks, 32 wide; this LlamaForCausalLM has 3, 32 wide"):
        evaluate_perplexity(corpus_folder, base=str(tmp_path / "deeper"), memory=str(mlp_folder), config=EXACT)


# --- a datastore ------------------------------------------------------------------------------------------------------


def test_figures_of_a_datastore_equal_a_brute_force_knn_lm(
    knn_report: dict[str, Any], corpus_folder: Path, model_folder: str, datastore_folder: Path
) -> None:
    """Every key in float64.

    A query that float32 rounds to the other neighbour in float16, or a tie at the sixteenth neighbour, moves the
    log-prob of a label among some thousand; most labels depend on neither.
    """
    store = Datastore(datastore_folder)
    assert store.keys is not None
    keys = store.keys.rows(0, store.n_entries)
    states, labels = queries_and_labels(model_folder, corpus_folder, "test")
    queries = states.half().double().numpy()
    all_distances = np.stack([((keys - query) ** 2).sum(1) for query in queries])
    ids = all_distances.argsort(1, kind="stable")[:, :16]
    distances = np.take_along_axis(all_distances, ids, 1)
    votes, _ = dense_votes(distances, store.values[ids], vocab_size=320, target_temperature=4.0)
    ours, base = votes[np.arange(len(labels)), labels], np.exp(base_log_probs(model_folder, corpus_folder, "test"))
    weight = knn_report["mixture"]["fixed"]["mix_weight"]
    assert 0 < weight < 1
    expected = np.exp(-np.log((1 - weight) * base + weight * ours).mean())
    assert knn_report["mixture"]["fixed"]["perplexity"] == pytest.approx(expected, rel=2e-3)
    assert (ours == 0).any(), "some label was never voted for, so alone it is infinite"
    assert knn_report["memory"] == {"perplexity": None, "interval": None}


def test_an_infinite_perplexity_is_none_in_valid_json_and_infinite_in_words(
    knn_report: dict[str, Any], corpus_folder: Path, model_folder: str, datastore_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "e"
    again = evaluate_perplexity(
        corpus_folder, base=model_folder, memory=str(datastore_folder), out=out, config=EXACT, retrieval=FEW
    )
    assert again == knn_report
    assert parsed_strictly(out / "report.json") == knn_report
    assert parsed_strictly(out / "manifest.json")["facts"]["memory"]["perplexity"] is None
    assert knn_report["validation"]["perplexities"][-1] is None
    assert all(value is not None for value in knn_report["validation"]["perplexities"][:-1])
    assert knn_report["run"]["retrieval"] == FEW.found
    rows = report_table(knn_report).splitlines()
    assert [row.split() for row in rows if row.startswith("memory alone")] == [["memory", "alone", "infinite"]]
    image = matplotlib.image.imread(out / "perplexity.png")
    assert image.std() > 0.01  # something is drawn


def parsed_strictly(path: Path) -> Any:
    """JSON as its standard has it: without Infinity and NaN, which Python's reader lets pass."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_datastore_alone_as_the_whole_mixture_is_infinite_too(
    corpus_folder: Path, model_folder: str, datastore_folder: Path, tmp_path: Path
) -> None:
    config = EXACT.model_copy(update={"mix_weight": 1.0})
    out = tmp_path / "e"
    report = evaluate_perplexity(
        corpus_folder, base=model_folder, memory=str(datastore_folder), out=out, config=config, retrieval=FEW
    )
    assert report["mixture"]["perplexity"] is None
    assert report["ratio"] == {"perplexity": None, "interval": None}
    assert parsed_strictly(out / "report.json") == report
    assert "mixture, weight 1           infinite" in report_table(report)


def test_other_neighbours_are_searched_anew(
    knn_report: dict[str, Any], corpus_folder: Path, model_folder: str, datastore_folder: Path
) -> None:
    other = evaluate_perplexity(
        corpus_folder,
        base=model_folder,
        memory=str(datastore_folder),
        config=EXACT,
        retrieval=FEW.model_copy(update={"k": 4}),
    )
    assert other["mixture"]["perplexity"] != knn_report["mixture"]["perplexity"]


def test_beside_another_base_the_teacher_reads_for_itself(
    corpus_folder: Path, model_folder: str, datastore_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Votes do not depend on the base; its own cache, or none, only changes the order of float32 sums."""
    save_model(tmp_path / "other", tokenizer, seed=3, width=16)
    beside, apart = (
        score_corpus(Corpus(corpus_folder), base, {"live": str(datastore_folder)}, dtype="float32", retrieval=FEW)[
            "test"
        ].voters["live"]
        for base in (model_folder, str(tmp_path / "other"))
    )
    # a query rounded to the other neighbour in float16 moves a vote by some 1e-3, rarely a neighbour out of the sixteen
    assert (np.abs(np.exp(beside.label) - np.exp(apart.label)) > 2e-3).mean() < 0.01
    assert (np.abs(beside.top1 - apart.top1) > 2e-3).mean() < 0.01


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "datastore"])
def test_a_memory_of_another_tokenizer_is_refused_with_advice(
    kind: str,
    documents: str,
    mlp_folder: Path,
    datastore_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the corpus and the base have the other tokenizer, so it is the memory that does not fit."""
    other = save_stranger(tmp_path / "other", tokenizer)
    make_corpus(documents, other, tmp_path / "c")

    forbid_models(monkeypatch)
    memory = str(mlp_folder) if kind == "mlp" else str(datastore_folder)
    with pytest.raises(TokenizerMismatchError, match=f"memory {memory} have different tokenizers; .*memlm adapt"):
        evaluate_perplexity(tmp_path / "c", base=other, memory=memory)


def test_a_stage_that_is_no_memory_is_refused(corpus_folder: Path, targets_folder: Path, model_folder: str) -> None:
    with pytest.raises(MemlmError, match="is a targets folder, expected memory or datastore"):
        evaluate_perplexity(corpus_folder, base=model_folder, memory=str(targets_folder))


def test_a_mixture_searches_and_weighs_a_datastore_as_the_evaluation_found(
    corpus_folder: Path, model_folder: str, datastore_folder: Path, tmp_path: Path
) -> None:
    store = shutil.copytree(datastore_folder, tmp_path / "d")

    def evaluate(**given: Any) -> dict[str, Any]:
        return evaluate_perplexity(
            corpus_folder, base=model_folder, memory=str(store), bootstrap=0, dtype="float32", **given
        )

    plain = evaluate(mix_weight=0.5)
    assert not (store / "validated.json").exists(), "a weight that was given is no choice"
    hash_before = read_manifest(store).hash
    report = evaluate(retrieval=FEW)
    mixed = MixedLM.from_pretrained(model_folder, memory=store)
    assert mixed.mix_weights == {"memory": report["mixture"]["fixed"]["mix_weight"]}
    memory = mixed.named_memories()["memory"]
    assert isinstance(memory, RetrievalMemory)
    assert (memory.settings.retrieval.k, memory.settings.retrieval.target_temperature) == (16, 4.0)
    assert memory.settings.validated_with == model_folder
    other = MixedLM.from_pretrained(
        model_folder, memory=store, mix_weight=0.5, memory_kwargs={"retrieval": RetrievalConfig(k=9)}
    ).named_memories()["memory"]
    assert isinstance(other, RetrievalMemory)
    assert (other.settings.retrieval.k, other.settings.retrieval.target_temperature) == (9, 4.0)
    assert other.settings.mix_weight is None, "another search has another best weight"
    assert evaluate(mix_weight=0.5) == plain, "an evaluation does not depend on those before it"
    assert read_manifest(store).hash == hash_before
    assert repair_folder(store)[0].startswith(f"{store} is whole: ")


@pytest.mark.parametrize("text", ["{", '{"mix_weight": 2, "base": "b", "retrieval": {}}', "[]"])
def test_a_damaged_note_of_an_evaluation_is_named(
    model_folder: str, datastore_folder: Path, tmp_path: Path, text: str
) -> None:
    store = shutil.copytree(datastore_folder, tmp_path / "d")
    (store / "validated.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"validated\.json"):
        MixedLM.from_pretrained(model_folder, memory=store)


def test_a_datastore_that_may_not_be_written_to_is_evaluated_all_the_same(
    corpus_folder: Path, model_folder: str, datastore_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> None:
        raise PermissionError

    monkeypatch.setattr("memlm.manifest.write_json", refused)
    assert evaluate_perplexity(corpus_folder, base=model_folder, memory=datastore_folder, config=EXACT)["tokens"]
