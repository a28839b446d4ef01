"""Fitting a confidence head: that it finds what is there, and refuses what cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_corpus, save_stranger, sentences
from memories import ALL, LONG_TEXT
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from benchmarks import gate_search
from memlm import MixedLM, train_memory
from memlm.cli import app
from memlm.corpus.blocks import Corpus
from memlm.errors import ArtifactError, ConfigError, InputError, MemlmError, TokenizerMismatchError
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.memory.confidence import FEATURES, ConfidenceHead
from memlm.memory.loading import load_memory
from memlm.mix.gate_config import GateConfig
from memlm.targets.config import RetrievalConfig
from memlm.train.gate import Heard, fit_gate, fitted

pytestmark = [pytest.mark.filterwarnings(LONG_TEXT), pytest.mark.slow]


def heard(rows: int, seed: int, *, better: float = 3.0, width: int = 3) -> Heard:
    """A text in which the memory is better where its state's first number is positive, else worse."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, width + len(FEATURES))).astype(np.float32)
    base = np.full(rows, -4.0, np.float32)
    memory = base + better * np.sign(inputs[:, 0])
    return Heard(inputs, base, memory.astype(np.float32), np.arange(rows) // 50)


def confidence(found: dict[str, Any], text: Heard) -> NDArray[np.float64]:
    weights = np.array(found["state"] + found["features"])
    return 1 / (1 + np.exp(-(text.inputs @ weights + found["bias"])))


def test_it_finds_where_the_memory_is_better() -> None:
    found, unseen = fitted([heard(2000, 0)]), heard(2000, 1)
    sure = confidence(found, unseen)
    assert sure[unseen.inputs[:, 0] > 0.5].min() > 0.8
    assert sure[unseen.inputs[:, 0] < -0.5].max() < 0.2
    assert found["facts"]["domain_gate_perplexity"] < 0.8 * found["facts"]["domain_fixed_perplexity"]
    assert len(found["state"]) == 3


def test_general_text_counts_as_much_as_the_domain() -> None:
    """There the memory is always worse, whatever the state says; a single text's head would believe it."""
    domain, rng = heard(2000, 0), np.random.default_rng(5)
    general = Heard(
        np.concatenate([heard(300, 2).inputs[:, :-1], np.full((300, 1), 9.0, np.float32)], 1),
        np.full(300, -4.0, np.float32),
        np.full(300, -7.0, np.float32) + rng.standard_normal(300).astype(np.float32) / 10,
        np.arange(300) // 50,
    )
    alone, both = fitted([domain]), fitted([domain, general])
    assert confidence(alone, general).mean() > 0.3
    assert confidence(both, general).mean() < 0.1
    facts = both["facts"]
    assert facts["general_tokens"] == 300
    assert (
        facts["general_gate_perplexity"] < 1.05 * facts["general_base_perplexity"] < facts["general_fixed_perplexity"]
    )


def test_what_it_says_of_itself_is_of_documents_it_has_not_seen() -> None:
    """States that only name their document let a head learn these by heart; judged on others it gains nothing."""
    rng, documents = np.random.default_rng(0), 40
    document = np.repeat(np.arange(documents), 25)
    luck = rng.choice([-2.0, 2.0], documents)
    inputs = np.concatenate([np.eye(documents)[document], rng.standard_normal((1000, len(FEATURES)))], 1)
    base = np.full(1000, -4.0, np.float32)
    text = Heard(inputs.astype(np.float32), base, (base + luck[document]).astype(np.float32), document)
    facts = fitted([text])["facts"]
    assert facts["domain_gate_perplexity"] > 0.97 * facts["domain_fixed_perplexity"]


def test_an_input_that_never_changes_gets_no_weight() -> None:
    text = heard(500, 0)
    text.inputs[:, 1] = 7.0
    assert fitted([text])["state"][1] == 0


def test_a_label_that_a_retriever_finds_impossible_is_no_trouble() -> None:
    text = heard(500, 0)
    text.memory[::3] = -np.inf
    assert np.isfinite([*fitted([text])["state"], fitted([text])["bias"]]).all()
    sure = heard(500, 1)  # where a weight of 1 is best, other text has an infinite perplexity
    sure.memory[:] = 0
    head = ConfidenceHead(memory="m", tokenizer=None, base="b", **fitted([sure, text]))
    assert head.facts["general_fixed_perplexity"] is None


# --- with models --------------------------------------------------------------------------------------------------


@pytest.fixture
def general(tmp_path: Path) -> str:
    """Text of other words than the domain's."""
    words = "tree stone river cloud grass field birds light night wind".split()
    rng = np.random.default_rng(3)
    path = tmp_path / "general.txt"
    path.write_text("\n\n".join(" ".join(rng.choice(words, 60)) for _ in range(40)), encoding="utf-8")
    return str(path)


@pytest.fixture
def memory(memory_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(memory_folder, tmp_path / "memory"))


SEPARATED: dict[str, Any] = {"document_separator": "\n\n", "dtype": "float32"}


def test_a_head_is_fitted_kept_and_used(memory: Path, corpus_folder: Path, model_folder: str, general: str) -> None:
    before = {path.name: path.read_bytes() for path in memory.iterdir() if path.is_file()}
    head = fit_gate(memory, corpus=corpus_folder, base=model_folder, general=[general], **SEPARATED)
    after = {path.name: path.read_bytes() for path in memory.iterdir() if path.is_file()}
    assert {name: content for name, content in after.items() if name != "gate.json"} == before
    assert ConfidenceHead.read(memory) == head == load_memory(memory).confidence_head
    assert head.facts["domain_tokens"] == 1555
    assert head.facts["domain_gate_perplexity"] <= 1.02 * head.facts["domain_fixed_perplexity"]
    parts = Path(general).read_text(encoding="utf-8").split("\n\n")
    other = Path(general).with_name("general.jsonl")
    other.write_text("".join(json.dumps({"body": part}) + "\n" for part in parts), encoding="utf-16")
    reading = {"text_column": "body", "encoding": "utf-16", "dtype": "float32"}
    for places, how in (([general], SEPARATED), ([str(other)], reading)):
        again = fit_gate(memory, corpus=corpus_folder, base=model_folder, general=places, **how)
        assert again.model_copy(update={"facts": head.facts}) == head
    model = MixedLM.from_pretrained(model_folder, memory=memory)
    assert model.gate.gate == "both"
    report = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory), dtype="float32")
    assert report["mixture"]["gate"] == "both"


def test_a_search_over_gates_has_the_librarys_own_among_them(
    memory: Path, corpus_folder: Path, model_folder: str, general: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(general).with_name("other.txt")
    other.write_text("\n\n".join(reversed(Path(general).read_text(encoding="utf-8").split("\n\n"))), encoding="utf-8")
    asked = [str(corpus_folder), str(memory), "--base", model_folder, "--fit", general, "--test", str(other)]
    assert gate_search.main([*asked, "--document-separator", "\n\n", "--dtype", "float32"]) == 0
    *lines, machine = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert "machine" in machine
    assert len(lines) == 5 * len(gate_search.RULES)
    fit_gate(memory, corpus=corpus_folder, base=model_folder, general=[general], **SEPARATED)
    for gate in ("confidence", "both", GateConfig(gate="both", prior=0.1), GateConfig(gate="both", switch=0.003)):
        name = gate if isinstance(gate, str) else "prior 0.1" if gate.prior == 0.1 else "fewer switches"
        report = evaluate_perplexity(corpus_folder, base=model_folder, memory=str(memory), dtype="float32", gate=gate)
        (found,) = (line for line in lines if (line["head"], line["rule"]) == ("linear", name))
        assert found["over_fixed"] == pytest.approx(report["mixture"]["ratio_to_fixed"]["perplexity"], abs=2e-4)
        assert found["fixed_perplexity"] == pytest.approx(report["mixture"]["fixed"]["perplexity"], abs=2e-3)
    assert len({line["over_fixed"] for line in lines}) > len(lines) // 2


def test_states_are_in_the_order_of_positions(memory: Path, corpus_folder: Path, model_folder: str) -> None:
    """Whatever the batches, the head is the same: each row's state stands beside its own label."""
    found = [
        fit_gate(memory, corpus=corpus_folder, base=model_folder, dtype="float32", batch_tokens=tokens)
        for tokens in (64, 4096)
    ]
    np.testing.assert_allclose(found[0].state, found[1].state, rtol=1e-2, atol=1e-3)
    assert found[0].facts["domain_gate_perplexity"] == pytest.approx(found[1].facts["domain_gate_perplexity"], rel=1e-4)


def test_an_mlp_memory_and_live_retrieval_get_heads_too(
    mlp_folder: Path, datastore_folder: Path, corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    for name, folder, width in (("mlp", mlp_folder, 32), ("live", datastore_folder, 32)):
        copied = Path(shutil.copytree(folder, tmp_path / name))
        head = fit_gate(copied, corpus=corpus_folder, base=model_folder, dtype="float32", retrieval=ALL)
        assert len(head.state) == width
        model = MixedLM.from_pretrained(model_folder, memory=copied, memory_kwargs={"retrieval": ALL})
        assert model.gate.gate == "both"
        with torch.no_grad():
            assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_datastores_head_is_for_the_search_that_it_was_fitted_on(
    datastore_folder: Path, corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(datastore_folder, tmp_path / "d"))
    one, other = (RetrievalConfig(k=20, target_temperature=t) for t in (1.0, 64.0))
    how: dict[str, Any] = {"corpus": corpus_folder, "base": model_folder, "dtype": "float32"}
    evaluate_perplexity(memory=copied, retrieval=one, **how)
    validated = fit_gate(copied, **how)
    assert validated == fit_gate(copied, retrieval=one, **how) != fit_gate(copied, retrieval=other, **how)
    for search, gate in ((one, "posterior"), (other, "both"), (None, "posterior")):  # None: as it was validated
        report = evaluate_perplexity(memory=copied, retrieval=search or one, **how)
        assert report["mixture"]["gate"] == gate
        loaded = MixedLM.from_pretrained(model_folder, memory=copied, memory_kwargs={"retrieval": search})
        assert loaded.gate.gate == gate
        evaluate_perplexity(memory=copied, retrieval=one, **how)
    with pytest.raises(ConfigError, match="has no confidence head"):
        evaluate_perplexity(memory=copied, retrieval=one, gate="both", **how)


def test_every_place_of_general_text_is_heard(
    memory: Path, documents: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much there is of the first; and enclosed by the tokens that the domain's documents are enclosed by."""
    heard_text: list[Any] = []
    monkeypatch.setattr("memlm.train.gate._hear", lambda part, voter, text, config: heard_text.append(text))
    monkeypatch.setattr("memlm.train.gate.fitted", lambda *_, **__: {"state": [], "features": [0.0] * 5, "bias": 0.0})
    places = []
    for number, letter in enumerate("xyz"):
        path = tmp_path / f"{letter}.txt"
        path.write_text("\n\n".join(f"{letter} {text}" for text in sentences(200, seed=number + 50)), encoding="utf-8")
        places.append(str(path))
    with_start = {"start_token": "bos", "end_token": "none", "document_separator": "\n\n"}
    domain, other = (
        make_corpus(text, model_folder, tmp_path / name, validation_fraction=0.4, **with_start)
        for name, text in (("c", documents), ("o", places[0]))
    )
    kept: dict[str, Any] = {"general_tokens": 2000, "shared_documents": "keep"}
    fit_gate(memory, corpus=domain, base=model_folder, general=[other, *places[1:]], **SEPARATED, **kept)
    tokenizer = Corpus(domain).tokenizer
    tokens = dict.fromkeys(("<s>x ", "<s>y ", "<s>z "), 0)
    for text in heard_text[1].documents():
        tokens[tokenizer.decode(text)[:5]] += len(text)
    assert max(tokens.values()) < 1.5 * min(tokens.values())


def test_one_head_serves_another_base(
    memory: Path, corpus_folder: Path, model_folder: str, other_base: str, general: str
) -> None:
    fit_gate(memory, corpus=corpus_folder, base=model_folder, general=[general], **SEPARATED)
    report = evaluate_perplexity(corpus_folder, base=other_base, memory=str(memory), dtype="float32")
    assert report["mixture"]["gate"] == "both"
    assert report["mixture"]["perplexity"] < report["base"]["perplexity"]


def test_a_head_may_be_fitted_beside_several_bases(
    memory: Path, corpus_folder: Path, model_folder: str, other_base: str
) -> None:
    asked: dict[str, Any] = {"corpus": corpus_folder, "dtype": "float32"}
    one, two = fit_gate(memory, base=model_folder, **asked), fit_gate(memory, base=other_base, **asked)
    both = fit_gate(memory, base=[model_folder, other_base], **asked)
    assert both.base == f"{model_folder}, {other_base}"
    assert both.features != one.features
    assert both.features != two.features
    assert both.facts["domain_base_perplexity"] == one.facts["domain_base_perplexity"], "figures are of the first"
    assert both.facts.keys() == one.facts.keys(), "the domain beside the second is no general text"
    assert fit_gate(memory, base=[model_folder], **asked) == one


def test_a_corpus_folder_gives_its_held_out_text(
    memory: Path, corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text("\n\n".join(sentences(80, seed=77)), encoding="utf-8")
    other = make_corpus(str(tmp_path / "other.txt"), model_folder, tmp_path / "other")
    head = fit_gate(memory, corpus=corpus_folder, base=model_folder, general=[other], dtype="float32")
    assert head.facts["general_tokens"] > 1000


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"general": ["documents"]}, ConfigError, "general documents are in corpus .* too"),
        ({"general": ["short"]}, InputError, "general text has .* tokens; a head needs 1,000 at least"),
        ({"corpus": "small"}, InputError, "a head needs 1,000 of 4 at least: build it with a larger"),
        ({"max_tokens": 900}, InputError, "documents at --max-tokens 900; a head needs .* at least: raise that"),
        ({"general": ["elsewhere"]}, TokenizerMismatchError, "general text .*elsewhere have different tokenizers"),
        ({"memory": "model"}, ConfigError, "is no folder that memlm made"),
        ({"memory": "corpus"}, ArtifactError, "corpus"),
        ({"base": "stranger"}, TokenizerMismatchError, "320 and 321 tokens"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_line(
    change: dict[str, Any],
    error: type[MemlmError],
    message: str,
    memory: Path,
    corpus_folder: Path,
    documents: str,
    model_folder: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    (tmp_path / "short.txt").write_text("one two three", encoding="utf-8")
    few = "\n\n".join(sentences(12, seed=9))
    (tmp_path / "few.txt").write_text(few, encoding="utf-8")
    places = {
        "documents": documents,
        "short": str(tmp_path / "short.txt"),
        "small": make_corpus(str(tmp_path / "few.txt"), model_folder, tmp_path / "small"),
        "model": model_folder,
        "corpus": corpus_folder,
        "stranger": (stranger := save_stranger(tmp_path / "stranger", tokenizer)),
        "elsewhere": make_corpus(documents, stranger, tmp_path / "elsewhere"),
    }
    options: dict[str, Any] = {"memory": memory, "corpus": corpus_folder, "base": model_folder, "general": []}
    for name, value in change.items():
        options[name] = [places[v] for v in value] if isinstance(value, list) else places.get(value, value)
    with pytest.raises(error, match=message):
        fit_gate(options.pop("memory"), **options, **SEPARATED)
    assert not (memory / "gate.json").exists()


def test_a_damaged_head_is_named(memory: Path, model_folder: str) -> None:
    (memory / "gate.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"gate\.json"):
        load_memory(memory)
    (memory / "gate.json").write_text(json.dumps({"bias": 1}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="delete it, or fit it anew with memlm gate"):
        MixedLM.from_pretrained(model_folder, memory=memory)


def test_a_head_is_left_behind_by_training_and_one_that_does_not_fit_is_replaced(
    memory: Path, targets_folder: Path, corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    head = fit_gate(memory, corpus=corpus_folder, base=model_folder, dtype="float32")
    on = tmp_path / "on"
    train_memory(targets_folder, init=str(memory), base=model_folder, out=on, max_steps=1, dtype="float32")
    assert load_memory(on).confidence_head is None
    for content in (head.model_dump_json(), "{"):
        (on / "gate.json").write_text(content, encoding="utf-8")
        with pytest.raises(MemlmError, match=r"gate\.json"):
            load_memory(on)
        again = fit_gate(on, corpus=corpus_folder, base=model_folder, dtype="float32")
        assert load_memory(on).confidence_head == again != head


def test_the_command_line_fits_and_tells(
    memory: Path, corpus_folder: Path, model_folder: str, general: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["gate", str(memory), "--corpus", str(corpus_folder), "--base", model_folder, "--dtype", "float32"]
    app([*command, "--general", general, "--document-separator", "\\n\\n"], standalone_mode=False)
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["tokens", "base", "fixed", "gate"]
    assert "general" in out
    assert f"next: memlm evaluate perplexity {corpus_folder}" in out
    app([*command, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["domain_tokens"] == 1555
    app(command, standalone_mode=False)
    assert "no general text was given" in capsys.readouterr().out
