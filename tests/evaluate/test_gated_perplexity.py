"""The gate in evaluations: the figures are those of texts that a mixture reads token by token."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_corpus
from memories import ALL, LONG_TEXT

from memlm import Corpus, MixedLM
from memlm.errors import ConfigError
from memlm.evaluate.config import EvaluateConfig
from memlm.evaluate.passages import passages
from memlm.evaluate.perplexity import evaluate_perplexity
from memlm.evaluate.report import Report
from memlm.memory.confidence import ConfidenceHead
from memlm.memory.loading import load_memory
from memlm.mix.gate_config import GateConfig
from memlm.models.identity import model_identity

EXACT = EvaluateConfig(dtype="float32", bootstrap=20, shared_documents="keep")  # `short` is cut from its own text
pytestmark = pytest.mark.filterwarnings(LONG_TEXT)


def fitted(folder: Path, seed: int = 0) -> ConfidenceHead:
    """A head of random numbers for a memory."""
    memory = load_memory(folder)
    width = int(memory.hidden(memory.step(torch.tensor([[1, 2]])), (slice(None), slice(None))).shape[-1])  # type: ignore[attr-defined]
    numbers = (torch.randn(width + 5, generator=torch.Generator().manual_seed(seed)) / 3).tolist()
    return ConfidenceHead(
        memory=model_identity(str(folder)).removeprefix("memlm:"),
        tokenizer=memory.settings.tokenizer,
        state=numbers[:width],
        features=numbers[width:],
        bias=0.1,
        base="b",
    )


@pytest.fixture
def head_folder(memory_folder: Path, tmp_path: Path) -> Path:
    """The memory with a head."""
    folder = Path(shutil.copytree(memory_folder, tmp_path / "with-head"))
    fitted(folder).save(folder)
    return folder


def read_token_by_token(model: MixedLM, corpus: Path) -> tuple[list[float], list[float]]:
    """Label log-probs of the test split, and the first memory's weights, each document through a cache."""
    split, said, weights = Corpus(corpus).split("test"), [], []
    for start, end in zip(split.offsets[:-1], split.offsets[1:], strict=True):
        tokens = torch.from_numpy(np.array(split.tokens[start:end]).astype(np.int64))[None]
        cache = model.new_cache(1)
        for at in range(tokens.shape[1] - 1):
            with torch.no_grad():
                parts = model.components(tokens[:, at : at + 1], cache=cache, use_cache=True)
                logits = parts.mixed()[0, -1].double()
            weights.append(float(torch.as_tensor(parts.weights[0])))
            said.append(float(logits.log_softmax(-1)[tokens[0, at + 1]]))
    return said, weights


@pytest.fixture
def short(documents: str, model_folder: str, tmp_path: Path) -> Path:
    """A corpus of documents that a block holds, so that each is read whole."""
    text = [part[:90] for part in Path(documents).read_text(encoding="utf-8").split("\n\n")]
    (tmp_path / "short.txt").write_text("\n\n".join(text), encoding="utf-8")
    settings = {"block_size": 128, "validation_fraction": 0.2, "test_fraction": 0.2}
    return make_corpus(str(tmp_path / "short.txt"), model_folder, tmp_path / "short", **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "gate", ["posterior", "confidence", "both", GateConfig(gate="posterior", prior=0.3, switch=0.1)]
)
def test_an_evaluation_equals_reading_token_by_token(
    gate: Any, short: Path, model_folder: str, head_folder: Path
) -> None:
    report = evaluate_perplexity(short, base=model_folder, memory=str(head_folder), config=EXACT, gate=gate)
    weight = report["mixture"]["fixed"]["mix_weight"]
    model = MixedLM.from_pretrained(model_folder, memory=head_folder, mix_weight=weight, gate=gate, dtype=torch.float32)
    said, weights = read_token_by_token(model, short)
    assert report["tokens"] == len(said)
    # figures are rounded to 1e-4 of some 300; weights follow a recursion in float32
    assert report["mixture"]["perplexity"] == pytest.approx(np.exp(-np.mean(said)), rel=1e-4)
    assert report["mixture"]["mean_weight"] == pytest.approx(np.mean(weights), abs=1e-3)
    assert report["mixture"]["gate"] == (gate if isinstance(gate, str) else gate.gate)


@pytest.mark.slow
def test_live_retrieval_and_a_decoder_under_one_gate(
    short: Path, model_folder: str, memory_folder: Path, datastore_folder: Path
) -> None:
    memories = {"law": str(memory_folder), "live": str(datastore_folder)}
    report = evaluate_perplexity(short, base=model_folder, memory=memories, config=EXACT, retrieval=ALL)
    assert report["mixture"]["gate"] == "posterior"
    own = {
        name: evaluate_perplexity(short, base=model_folder, memory=place, config=EXACT, retrieval=ALL)["mixture"][
            "fixed"
        ]
        for name, place in memories.items()
    }
    weights = {name: found["mix_weight"] for name, found in own.items()}
    model = MixedLM.from_pretrained(
        model_folder,
        memory=memories,
        mix_weight=weights,
        gate="posterior",
        memory_kwargs={"retrieval": ALL},
        dtype=torch.float32,
    )
    said, _ = read_token_by_token(model, short)
    assert report["mixture"]["perplexity"] == pytest.approx(np.exp(-np.mean(said)), rel=2e-4)


def test_the_gate_in_force_follows_from_head_and_weight(short: Path, model_folder: str, head_folder: Path) -> None:
    def gate(**options: Any) -> str:
        kept = {"shared_documents": "keep", **options}
        return evaluate_perplexity(short, base=model_folder, memory=str(head_folder), **kept)["mixture"]["gate"]

    assert gate() == "both"
    assert gate(mix_weight=0.3) == "none"
    assert gate(gate="none") == "none"
    (head_folder / "gate.json").unlink()
    assert gate() == "posterior"
    with pytest.raises(ConfigError, match="memory 'memory' has no confidence head; fit one with memlm gate"):
        gate(gate="confidence")


def test_another_head_is_another_evaluation(short: Path, model_folder: str, head_folder: Path, tmp_path: Path) -> None:
    def report() -> Report:
        return evaluate_perplexity(short, base=model_folder, memory=str(head_folder), config=EXACT)

    first = report()
    assert report() == first
    fitted(head_folder, seed=1).save(head_folder)
    assert report()["mixture"]["mean_weight"] != first["mixture"]["mean_weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": "0" * 64}, "was fitted for another memory"),
        ({"tokenizer": "0" * 64}, "was fitted for another tokenizer"),
    ],
)
def test_a_head_of_something_else_is_refused(
    change: dict[str, str], message: str, short: Path, model_folder: str, head_folder: Path
) -> None:
    fitted(head_folder).model_copy(update=change).save(head_folder)
    with pytest.raises(ConfigError, match=message):
        evaluate_perplexity(short, base=model_folder, memory=str(head_folder), config=EXACT)
    with pytest.raises(ConfigError, match=message):
        load_memory(head_folder)


def test_passages_are_those_of_the_gate(short: Path, model_folder: str, head_folder: Path) -> None:
    shown = {}
    for gate in ("none", "confidence"):
        report = evaluate_perplexity(short, base=model_folder, memory=str(head_folder), config=EXACT, gate=gate)
        options: dict[str, Any] = {"base": model_folder, "memory": str(head_folder), "config": EXACT}
        shown[gate] = passages(short, report, passage_tokens=8, **options)
        assert "[helped most]" in shown[gate]
    assert shown["none"] != shown["confidence"]
