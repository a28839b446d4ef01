"""The report against plain forward passes, and what it must not depend on."""

import hashlib
import itertools
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import forbid_models, make_corpus, save_stranger, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from memlm.corpus.blocks import Corpus
from memlm.errors import (
    ArtifactError,
    ConfigError,
    InputError,
    MemlmError,
    ModelError,
    OutputExistsError,
    TokenizerMismatchError,
)
from memlm.evaluate import perplexity as perplexity_module
from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.intervals import Resampled
from memlm.evaluate.perplexity import by_label_frequency, evaluate_perplexity
from memlm.evaluate.report import Report, report_table
from memlm.manifest import read_manifest
from memlm.memory.protocol import MemorySettings
from memlm.scores.score import Scores
from memlm.scores.table import ScoreTable, score_corpus

EXACT = EvaluateConfig(dtype="float32", bootstrap=200)


@pytest.fixture(scope="module")
def report(
    corpus_folder: Path, model_folder: str, memory_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMLM_HOME", str(tmp_path_factory.mktemp("report-home")))
        return evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def label_log_probs(folder: str | Path, corpus: Path, split: str, temperature: float = 1.0) -> list[np.ndarray]:
    """By document: every token but the first, each from its own forward pass over the context the corpus defines.

    The first block of a document gives its first 32 tokens; each further block ends 16 tokens later (stride: half a
    block of 32) and predicts those 16 only.
    """
    tokens, offsets = np.load(corpus / f"{split}.tokens.npy"), np.load(corpus / f"{split}.offsets.npy")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for start, end in itertools.pairwise(offsets):
        document = tokens[start:end]
        values = []
        first, stop, predict_from = 0, min(32, len(document)), 1
        while True:
            with torch.no_grad():
                logits = model(torch.from_numpy(document[first:stop].astype(np.int64))[None]).logits[0, :, :320]
            log_probs = (logits.double() / temperature).log_softmax(-1)
            values += [float(log_probs[i - first - 1, document[i]]) for i in range(predict_from, stop)]
            if stop == len(document):
                break
            predict_from, stop = stop, min(stop + 16, len(document))
            first = stop - 32
        found.append(np.array(values))
    return found


def test_the_report_equals_plain_forward_passes(
    report: dict[str, Any], corpus_folder: Path, model_folder: str, memory_folder: Path
) -> None:
    """Our head and softmax run in float32 in other batches: 1e-5 relative; figures are rounded to 1e-4 of some 300."""
    base = np.concatenate(label_log_probs(model_folder, corpus_folder, "test"))
    memory = np.concatenate(label_log_probs(memory_folder, corpus_folder, "test"))
    assert report["tokens"] == len(base) == 1094
    assert report["documents"] == 9
    assert report["base"]["perplexity"] == pytest.approx(np.exp(-base.mean()), rel=1e-5)
    assert report["memory"]["perplexity"] == pytest.approx(np.exp(-memory.mean()), rel=1e-5)

    validation = [
        np.concatenate(label_log_probs(f, corpus_folder, "validation")) for f in (model_folder, memory_folder)
    ]
    grid = np.arange(101) / 100
    curve = [np.exp(-np.log((1 - w) * np.exp(validation[0]) + w * np.exp(validation[1])).mean()) for w in grid]
    np.testing.assert_allclose(report["validation"]["perplexities"], curve, rtol=1e-5)
    weight = grid[int(np.argmin(curve))]
    fixed = report["mixture"]["fixed"]
    assert fixed["mix_weight"] == pytest.approx(weight)
    mixture = np.log((1 - weight) * np.exp(base) + weight * np.exp(memory))
    assert fixed["perplexity"] == pytest.approx(np.exp(-mixture.mean()), rel=1e-5)
    for ratio, below in (("ratio", "base"), ("ratio_to_fixed", "fixed")):
        above = report["mixture"]["perplexity"]
        found = report[ratio] if ratio == "ratio" else report["mixture"][ratio]
        assert found["perplexity"] == pytest.approx(
            above / (report["base"] if below == "base" else fixed)["perplexity"], abs=1e-4
        )
    assert report["validation"]["tokens"] == len(validation[0])


def test_the_memorys_temperature_counts(corpus_folder: Path, model_folder: str, tmp_path: Path) -> None:
    """A base as its own memory at temperature 3: the memory's figure is that of the softened model."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "memory"))
    print_of = Corpus(corpus_folder).manifest.tokenizer
    settings = MemorySettings(kind="decoder", vocab_size=320, memory_temperature=3.0, tokenizer=print_of)
    (folder / "memory.json").write_text(settings.model_dump_json())
    report = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(folder), config=EXACT)
    soft = np.concatenate(label_log_probs(model_folder, corpus_folder, "test", temperature=3.0))
    assert report["memory"]["perplexity"] == pytest.approx(np.exp(-soft.mean()), rel=1e-5)
    assert report["memory"]["perplexity"] < 0.9 * report["base"]["perplexity"]  # a random model gains by softening


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [1, 40, 333])
def test_figures_do_not_depend_on_batch_size(
    report: dict[str, Any], corpus_folder: Path, model_folder: str, memory_folder: Path, batch_tokens: int
) -> None:
    config = EXACT.model_copy(update={"batch_tokens": batch_tokens})
    other = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=config)
    for name in ("base", "memory", "mixture"):
        assert other[name]["perplexity"] == pytest.approx(report[name]["perplexity"], rel=1e-4)
    assert other["tokens"] == report["tokens"]


def test_the_same_call_gives_the_same_report(
    report: dict[str, Any], corpus_folder: Path, model_folder: str, memory_folder: Path, fresh_cache: Path
) -> None:
    again = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT)
    assert again == report


# --- choice of the weight -----------------------------------------------------------------------------------------


def scripted(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores where the memory hurts on validation text and helps on test text."""
    source = Corpus(corpus)

    level = {("base", "validation"): -2, ("memory", "validation"): -4, ("base", "test"): -4, ("memory", "test"): -2}

    def score_corpus(corpus: Corpus, base: str, memories: dict[str, str], **kwargs: Any) -> dict[str, ScoreTable]:
        tables = {}
        for name in ("validation", "test"):
            split = source.split(name)
            voters = {}
            for voter in ("base", *memories):
                label = np.full(split.n_positions, level[voter, name], np.float32)
                voters[voter] = Scores(label, label, label, np.zeros(split.n_positions, np.int32), 0 * label)
            documents = split.documents_of(np.arange(split.n_positions))
            tables[name] = ScoreTable(voters, documents, np.ones(split.n_positions, np.int64))
        return tables

    monkeypatch.setattr(perplexity_module, "score_corpus", score_corpus)


def test_mix_weight_is_chosen_on_validation_even_where_test_disagrees(
    corpus_folder: Path, model_folder: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(corpus_folder, monkeypatch)
    report = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), gate="none")
    assert report["mixture"]["mix_weight"] == 0.0
    assert report["mixture"]["mix_weight_from"] == "validation"
    assert report["mixture"]["perplexity"] == report["base"]["perplexity"] == pytest.approx(np.exp(4), abs=1e-4)


def test_a_given_mix_weight_is_used_and_named_as_given(
    corpus_folder: Path, model_folder: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(corpus_folder, monkeypatch)
    config = EvaluateConfig(mix_weight=0.25)
    report = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=config)
    assert (report["mixture"]["mix_weight"], report["mixture"]["mix_weight_from"]) == (0.25, "given")
    expected = 1 / (0.75 * np.exp(-4) + 0.25 * np.exp(-2))
    assert report["mixture"]["perplexity"] == pytest.approx(expected, abs=1e-4)
    assert "mix_weight given" in report_table(report)


# --- intervals and splits -----------------------------------------------------------------------------------------


def test_intervals_hold_the_estimate(report: dict[str, Any]) -> None:
    for name in ("base", "memory", "mixture", "ratio"):
        low, high = report[name]["interval"]
        assert low <= report[name]["perplexity"] <= high
        assert low < high


def test_a_document_is_resampled_as_a_whole() -> None:
    """All tokens of a document agree here, so resampling tokens would give an interval about ten times narrower."""
    document = np.repeat(np.arange(30), 100)
    values = np.where(document % 2, -1.0, -3.0)
    low, high = Resampled(document, {"x": values}, EvaluateConfig(bootstrap=2000)).perplexity("x")["interval"]
    # log perplexity is 2 with a standard error of 1 / sqrt(30) over documents; 4 standard errors wide, 20% for chance
    assert np.log(high) - np.log(low) == pytest.approx(4 / np.sqrt(30), rel=0.2)


def test_the_ratio_is_paired() -> None:
    """Documents differ wildly and the gain is the same in all, so the ratio has no spread though its parts have."""
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(20), 10)
    below = -rng.uniform(1, 9, 20)[document]
    sums = Resampled(document, {"above": below + 0.5, "below": below}, EvaluateConfig(bootstrap=500))
    ratio = sums.ratio("above", "below")
    assert ratio["perplexity"] == pytest.approx(np.exp(-0.5), abs=1e-4)
    assert ratio["interval"] == [ratio["perplexity"]] * 2
    low, high = sums.perplexity("below")["interval"]
    assert high > 2 * low


def test_longer_documents_weigh_more_in_the_estimate() -> None:
    document = np.array([0] * 9 + [1])
    values = {"x": np.array([-1.0] * 9 + [-11.0])}
    found = Resampled(document, values, EvaluateConfig(bootstrap=0)).perplexity("x")
    assert found == {"perplexity": pytest.approx(np.exp(2), abs=1e-4), "interval": None}


@pytest.mark.parametrize("drawn_at_once", [1, 70, 10**9])
def test_draws_some_at_a_time_are_those_of_all_at_once(drawn_at_once: int) -> None:
    rng = np.random.default_rng(3)
    document = np.repeat(np.arange(23), rng.integers(1, 9, 23))
    values = {"a": -rng.uniform(1, 9, len(document)), "b": -rng.uniform(1, 9, len(document))}
    found = Resampled(document, values, EvaluateConfig(bootstrap=50, seed=5), drawn_at_once=drawn_at_once)
    draws = np.random.default_rng(5).multinomial(23, np.full(23, 1 / 23), size=50)
    counts = np.bincount(document)
    means = {name: draws @ np.bincount(document, weights=-v) / (draws @ counts) for name, v in values.items()}
    expected = (
        np.quantile(np.exp(means["a"]), [0.025, 0.975]),
        np.quantile(np.exp(means["a"] - means["b"]), [0.025, 0.975]),
    )
    assert found.perplexity("a")["interval"] == pytest.approx(expected[0], abs=1e-4)
    assert found.ratio("a", "b")["interval"] == pytest.approx(expected[1], abs=1e-4)


def test_many_documents_take_little_memory() -> None:
    """At once, 50,000 documents in 1,000 resamplings would take 400 MB in draws alone."""
    document = np.arange(50_000)
    values = {"x": -np.ones(len(document)), "y": -np.ones(len(document))}
    tracemalloc.start()
    Resampled(document, values, EvaluateConfig(bootstrap=200), drawn_at_once=1 << 19)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


def test_intervals_are_drawn_by_the_seed(corpus_folder: Path, model_folder: str, memory_folder: Path) -> None:
    def interval(seed: int) -> list[float]:
        config = EXACT.model_copy(update={"seed": seed})
        found = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=config)
        return found["base"]["interval"]

    assert interval(1) == interval(1) != interval(2)


def test_without_resampling_there_is_no_interval(corpus_folder: Path, model_folder: str, memory_folder: Path) -> None:
    config = EXACT.model_copy(update={"bootstrap": 0})
    found = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=config)
    assert found["base"]["interval"] is None
    assert "95% interval" in report_table(found)


def test_the_split_by_label_frequency_covers_all_tokens(
    report: dict[str, Any], corpus_folder: Path, model_folder: str
) -> None:
    rows = report["by_label_frequency"]
    assert sum(row["tokens"] for row in rows) == report["tokens"]
    assert len(rows) > 2
    total = sum(row["tokens"] * np.log(row["base"]) for row in rows) / report["tokens"]
    assert np.exp(total) == pytest.approx(report["base"]["perplexity"], rel=1e-5)  # rows are rounded to 1e-4

    train, test = Corpus(corpus_folder).split("train").labels(), Corpus(corpus_folder).split("test").labels()
    counts = np.array([(train == label).sum() for label in test])
    values = np.concatenate(label_log_probs(model_folder, corpus_folder, "test"))
    for row in rows:
        here = (counts >= row["from"]) & (counts < (row["below"] or np.inf))
        assert here.sum() == row["tokens"]
        assert row["base"] == pytest.approx(np.exp(-values[here].mean()), rel=1e-5)


def test_frequencies_at_the_edges_fall_in_the_higher_group() -> None:
    counts = np.array([0, 1, 9, 10, 99, 100, 999, 1000, 5000])
    rows = by_label_frequency(counts, {"base": np.zeros(len(counts))})
    assert [(row["from"], row["below"], row["tokens"]) for row in rows] == [
        (0, 1, 1),
        (1, 10, 2),
        (10, 100, 2),
        (100, 1000, 2),
        (1000, None, 2),
    ]


# --- scores -------------------------------------------------------------------------------------------------------


def test_each_model_scores_the_text_once(
    corpus_folder: Path, model_folder: str, memory_folder: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT)
    assert len(list((fresh_cache / "scores").glob("*/manifest.json"))) == 4, "two models on two splits"
    forbid_models(monkeypatch)
    assert evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT) == first
    other = EXACT.model_copy(update={"mix_weight": 0.5, "seed": 3})  # settings that change no score
    evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=other)
    with pytest.raises(ModelError, match="a model was loaded or made"):  # one that does
        evaluate_perplexity(
            corpus_folder, base=model_folder, memory=str(memory_folder), config=EvaluateConfig(dtype="bfloat16")
        )


def test_scores_of_changed_weights_are_made_anew(
    corpus_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, fresh_cache: Path
) -> None:
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    found = []
    for seed in (0, 1):
        tiny_model(len(tokenizer), seed=seed).save_pretrained(folder)
        tables = score_corpus(Corpus(corpus_folder), str(folder), {}, dtype="float32")
        found.append(tables["test"].voters["base"].label)
    assert not np.allclose(found[0], found[1], atol=0.1)


def test_scores_hold_entropy_top1_document_and_label_frequency(corpus_folder: Path, model_folder: str) -> None:
    corpus = Corpus(corpus_folder)
    tables = score_corpus(corpus, model_folder, {}, dtype="float32")
    assert set(tables) == {"validation", "test"}
    test, split = tables["test"].voters["base"], corpus.split("test")
    assert len(test.label) == len(test.entropy) == len(test.top1) == split.n_positions
    np.testing.assert_array_equal(np.bincount(tables["test"].document), np.diff(split.offsets) - 1)
    # the first document's first block, by a plain forward pass; float32 against float64 softmax
    tokens = torch.from_numpy(split.tokens[:32].astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        log_probs = model(tokens[None]).logits[0, :-1, :320].double().log_softmax(-1)
    np.testing.assert_allclose(test.entropy[:31], -(log_probs.exp() * log_probs).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(test.top1[:31], log_probs.exp().amax(-1), rtol=1e-4)
    np.testing.assert_array_equal(test.top1_id[:31], log_probs.argmax(-1))


def test_scores_whose_writing_was_stopped_are_made_again(
    corpus_folder: Path, model_folder: str, memory_folder: Path, fresh_cache: Path
) -> None:
    first = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT)
    folder = next((fresh_cache / "scores").iterdir())
    (folder / "plan.json").write_text(json.dumps(read_manifest(folder).identity))
    for name in ("manifest.json", "entropy.npy"):
        (folder / name).unlink()
    assert evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT) == first
    assert read_manifest(folder).kind == "scores"


def test_a_damaged_score_file_is_named(
    corpus_folder: Path, model_folder: str, memory_folder: Path, fresh_cache: Path
) -> None:
    evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT)
    victim = next((fresh_cache / "scores").glob("*/label.npy"))
    victim.write_bytes(victim.read_bytes()[:-4])
    with pytest.raises(MemlmError, match=r"label\.npy has \d+ bytes, its manifest says"):
        evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT)


# --- what is written ----------------------------------------------------------------------------------------------


def test_out_holds_the_report_and_a_plot(
    report: dict[str, Any], corpus_folder: Path, model_folder: str, memory_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "e"
    given = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), out=out, config=EXACT)
    assert json.loads((out / "report.json").read_text()) == given == report
    image = matplotlib.image.imread(out / "perplexity.png")
    assert image.ndim == 3
    assert image.shape[0] > 300
    assert image.std() > 0.01  # something is drawn
    manifest = read_manifest(out, "evaluation")
    assert set(manifest.payload) == {"report.json", "perplexity.png"}
    assert manifest.facts["mixture"] == report["mixture"]


def test_a_plot_can_be_drawn_without_validation_text(
    corpus_folder: Path, model_folder: str, memory_folder: Path, unvalidated: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig(dtype="float32", mix_weight=0.5, bootstrap=0)
    evaluate_perplexity(unvalidated, base=model_folder, memory=str(memory_folder), out=tmp_path / "e", config=config)
    assert matplotlib.image.imread(tmp_path / "e" / "perplexity.png").std() > 0.01
    assert json.loads((tmp_path / "e" / "report.json").read_text())["validation"]["perplexities"] is None


def test_without_out_nothing_is_written_outside_the_cache(
    corpus_folder: Path,
    model_folder: str,
    memory_folder: Path,
    tmp_path: Path,
    fresh_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def everything() -> dict[Path, int]:
        roots = (corpus_folder.parent, Path(model_folder), tmp_path / "cwd")
        return {p: p.stat().st_mtime_ns for root in roots for p in root.rglob("*")}

    before = everything()
    evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT)
    assert everything() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "home"]
    assert {p.name for p in fresh_cache.iterdir()} <= {"digests", "locks", "scores"}


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unvalidated(model_folder: str, documents: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with test text and no validation text."""
    return make_corpus(documents, model_folder, tmp_path_factory.mktemp("unvalidated") / "c", validation_fraction=0)


def test_a_corpus_without_validation_tokens_needs_a_given_weight(
    unvalidated: Path, model_folder: str, memory_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_models(monkeypatch)
    with pytest.raises(InputError, match="no validation tokens to choose mix_weight on; give --mix-weight"):
        evaluate_perplexity(unvalidated, base=model_folder, memory=str(memory_folder))


def test_a_corpus_without_test_tokens_is_refused(
    documents: str, model_folder: str, memory_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untested = make_corpus(documents, model_folder, tmp_path / "c", test_fraction=0)
    forbid_models(monkeypatch)
    with pytest.raises(InputError, match="no test tokens; build it with a larger --test-fraction"):
        evaluate_perplexity(untested, base=model_folder, memory=str(memory_folder))


def test_an_output_that_holds_something_else_is_refused_before_models_load(
    corpus_folder: Path,
    model_folder: str,
    memory_folder: Path,
    tmp_path: Path,
    fresh_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    forbid_models(monkeypatch)
    for out in (tmp_path / "mine", corpus_folder):
        with pytest.raises(OutputExistsError, match="choose another output or delete it"):
            evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), out=out)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("role", ["base", "memory"])
def test_models_that_cannot_be_used_are_refused_before_any_is_loaded(
    corpus_folder: Path,
    model_folder: str,
    memory_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
) -> None:
    forbid_models(monkeypatch)
    good = {"base": model_folder, "memory": str(memory_folder)}
    with pytest.raises(ModelError, match="'no/such' cannot be loaded; tried"):
        evaluate_perplexity(corpus_folder, **{**good, role: "no/such"})

    tiny_config(300).save_pretrained(tmp_path / "small")  # without tokenizer
    with pytest.raises((InputError, ConfigError), match=r"outside the 300|fewer output rows"):
        evaluate_perplexity(corpus_folder, **{**good, role: str(tmp_path / "small")})

    other = save_stranger(tmp_path / "other", tokenizer)
    with pytest.raises(TokenizerMismatchError, match="320 and 321 tokens"):
        evaluate_perplexity(corpus_folder, **{**good, role: other})


def test_the_table_names_every_row(report: dict[str, Any]) -> None:
    table = report_table(report)
    for words in (
        "base alone",
        "memory alone",
        f"mixture, weight {report['mixture']['fixed']['mix_weight']:g}",
        "mixture, gate posterior",
        f"gate / fixed weight {report['mixture']['ratio_to_fixed']['perplexity']:.4f}",
        "1,094 test tokens",
    ):
        assert words in table
    assert f"{report['base']['perplexity']:.2f}" in table


# --- several memories -----------------------------------------------------------------------------------------------


def test_several_memories_are_mixed_with_weights_of_their_own(
    corpus_folder: Path, model_folder: str, memory_folder: Path, datastore_folder: Path, tmp_path: Path
) -> None:
    """The mixture equals the one that plain arithmetic makes of the two single reports' scores."""
    memories = {"law": str(memory_folder), "live": str(datastore_folder)}
    report = evaluate_perplexity(corpus_folder, base=model_folder, memory=memories, out=tmp_path / "e", config=EXACT)
    fixed = report["mixture"]["fixed"]
    weights = fixed["mix_weight"]
    assert list(weights) == list(report["mixture"]["mean_weight"]) == ["law", "live"]
    assert 0 < sum(weights.values()) <= 1
    table = score_corpus(Corpus(corpus_folder), model_folder, memories, dtype="float32")["test"]
    probs = {name: np.exp(scores.label.astype(np.float64)) for name, scores in table.voters.items()}
    mixed = (1 - sum(weights.values())) * probs["base"] + sum(w * probs[name] for name, w in weights.items())
    assert fixed["perplexity"] == pytest.approx(np.exp(-np.log(mixed).mean()), rel=1e-5)
    alone = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT)
    assert report["law"] == alone["memory"]
    assert report["live"]["perplexity"] is None, "a retriever finds some labels impossible"
    curve = [value for value in report["validation"]["perplexities"] if value is not None]
    assert min(curve) <= min(value for value in alone["validation"]["perplexities"] if value is not None) + 1e-4
    assert "law alone" in report_table(report)
    assert (tmp_path / "e" / "perplexity.png").is_file()


def test_weights_of_several_memories_are_given_by_name(
    corpus_folder: Path, model_folder: str, memory_folder: Path
) -> None:
    memories = {"a": str(memory_folder), "b": model_folder}
    config = EXACT.model_copy(update={"mix_weight": {"a": 0.5, "b": 0.25}})
    report = evaluate_perplexity(corpus_folder, base=model_folder, memory=memories, config=config)
    assert report["mixture"]["mix_weight"] == {"a": 0.5, "b": 0.25}
    same = evaluate_perplexity(
        corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT.model_copy(update={"mix_weight": 0.5})
    )
    assert report["mixture"]["perplexity"] == pytest.approx(same["mixture"]["perplexity"], rel=1e-4)  # b is the base


@pytest.mark.parametrize(
    ("memories", "weights", "message"),
    [
        ({"a": "x", "b": "y"}, 0.5, r"give one weight per memory \(a, b\), by name"),
        ({"a": "x", "b": "y"}, {"a": 0.5}, "mix_weight of 'b' is missing"),
        ({"a": "x", "b": "y"}, {"a": 0.7, "b": 0.7}, "sum to 1.4, above 1"),
        ({"mixture": "x"}, None, "memory name 'mixture' is what the report calls something of its own"),
    ],
)
def test_names_and_weights_that_do_not_fit_are_refused(
    corpus_folder: Path, model_folder: str, memories: dict[str, str], weights: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_perplexity(corpus_folder, base=model_folder, memory=memories, mix_weight=weights)


def test_without_matplotlib_the_report_is_written_and_the_plot_is_named_as_missing(
    corpus_folder: Path,
    model_folder: str,
    memory_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(perplexity_module, "find_spec", lambda name: None)
    out = tmp_path / "e"
    evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), out=out, config=EXACT)
    assert set(read_manifest(out).payload) == {"report.json"}
    assert "pip install 'memlm[plot]'" in capsys.readouterr().err


# --- where things are -----------------------------------------------------------------------------------------------


def test_equal_runs_give_equal_bytes_however_paths_are_written(
    corpus_folder: Path, model_folder: str, memory_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed from another folder, and copied to one of another name."""
    shutil.copytree(corpus_folder, tmp_path / "the-corpus")
    shutil.copytree(model_folder, tmp_path / "the-base")
    shutil.copytree(memory_folder, tmp_path / "the-memory")
    monkeypatch.chdir(tmp_path)
    there = {"base": "the-base", "memory": "./the-memory"}
    here: dict[str, Any] = {"base": model_folder, "memory": str(memory_folder)}
    for several in (False, True):
        made = []
        for name, corpus, models in (("here", corpus_folder, here), ("there", Path("the-corpus"), there)):
            out = tmp_path / f"{name}-{several}"
            memory: Any = {"law": models["memory"], "bio": models["base"]} if several else models["memory"]
            report = evaluate_perplexity(corpus, base=models["base"], memory=memory, out=out, config=EXACT)
            assert str(tmp_path) not in json.dumps(report)
            made.append(out)
        one, other = (read_manifest(out) for out in made)
        assert one.payload == other.payload
        assert one.hash == other.hash
        assert other.sources["base"] == "the-base"
        run = json.loads((made[0] / "report.json").read_text())["run"]
        assert run["corpus"] == read_manifest(corpus_folder).hash
        assert run["memory"] == (
            {n: one.inputs[f"memory.{n}"] for n in ("law", "bio")} if several else one.inputs["memory"]
        )


# --- what is no number ----------------------------------------------------------------------------------------------


def changed(folder: str | Path, out: Path, change: Callable[[torch.nn.Module], object]) -> str:
    """The model of a folder with its weights changed, and all else that the folder has."""
    shutil.copytree(folder, out)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        change(model)
    model.save_pretrained(out)
    return str(out)


def one_nan(model: Any) -> None:
    model.model.norm.weight[3] = torch.nan


def nan_for_one_token(model: Any) -> None:
    model.get_output_embeddings().weight[17] = torch.nan


def too_large(model: Any) -> None:
    """For float16, whose largest number is 65,504."""
    model.model.layers[0].mlp.down_proj.weight *= 1e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "change", "dtype"),
    [
        ("memory", one_nan, "float32"),
        ("memory", nan_for_one_token, "float32"),
        ("memory", too_large, "float16"),
        ("base", one_nan, "float32"),
        ("base", too_large, "float16"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("weight", [None, 0.25])
def test_a_model_that_is_not_finite_is_named_and_nothing_is_kept(
    corpus_folder: Path,
    model_folder: str,
    tmp_path: Path,
    fresh_cache: Path,
    role: str,
    change: Any,
    dtype: str,
    several: bool,
    weight: float | None,
) -> None:
    models = {"base": model_folder, "memory": model_folder}
    models[role] = broken = changed(model_folder, tmp_path / "broken", change)
    memory: Any = {"memory": models["memory"], "other": model_folder} if several else models["memory"]
    given: Any = {"memory": weight, "other": 0.5} if several and weight else weight
    config = EvaluateConfig(dtype=dtype, bootstrap=5, mix_weight=given)
    with pytest.raises(ModelError) as error:
        evaluate_perplexity(corpus_folder, base=models["base"], memory=memory, out=tmp_path / "e", config=config)
    assert f"{role} {broken}" in str(error.value)
    assert any(reason in str(error.value) for reason in (f"({dtype}) gives NaN", "weights that are not finite"))
    assert "\n" not in str(error.value)
    assert not list(fresh_cache.rglob("label.npy"))
    assert not (tmp_path / "e").exists()


def test_a_base_too_large_for_float16_is_measured_in_float32(
    corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    large = changed(model_folder, tmp_path / "large", too_large)
    report = evaluate_perplexity(corpus_folder, base=large, memory=model_folder, config=EXACT)
    assert report["base"]["perplexity"] > 1


def test_nan_that_an_earlier_version_kept_is_refused(
    corpus_folder: Path, model_folder: str, memory_folder: Path, fresh_cache: Path
) -> None:
    evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT)
    kept = sorted(fresh_cache.rglob("label.npy"))[0]
    label = np.load(kept)
    label[2] = np.nan
    np.save(kept, label)
    manifest = json.loads((kept.parent / "manifest.json").read_text())
    manifest["payload"]["label.npy"]["sha256"] = hashlib.sha256(kept.read_bytes()).hexdigest()
    (kept.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="holds NaN"):
        evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory_folder), config=EXACT)


def test_a_notebook_shows_a_report_as_a_table() -> None:
    figure = {"perplexity": 12.5, "interval": [12.0, 13.0]}
    named = {"a<b>": figure, "c": {"perplexity": None, "interval": None}}
    mixture = {**figure, "mix_weight": {"a<b>": 0.2, "c": 0.1}, "mix_weight_from": "validation"}
    ratio = {"perplexity": 0.9, "interval": [0.8, 0.95]}
    report = Report({"base": figure, **named, "mixture": mixture, "ratio": ratio, "tokens": 100, "documents": 2})
    page = report._repr_html_()
    assert "<td>a&lt;b&gt; alone</td><td>12.50</td><td>12.00 to 13.00</td>" in page
    assert "<td>c alone</td><td>infinite</td><td></td>" in page
    assert "<td>mixture, weight a&lt;b&gt; 0.2, c 0.1</td>" in page
    assert "0.9000 (0.8000 to 0.9500); 100 test tokens of 2 documents; mix_weight chosen on validation" in page
    assert json.loads(json.dumps(report)) == report
