"""Recitation and repetition of what is said on its own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from memlm.cli import app
from memlm.corpus.blocks import Corpus
from memlm.errors import InputError, ModelError
from memlm.evaluate.config import GenerationConfig
from memlm.evaluate.generation import distinct, evaluate_generation, generation_table, passages_of, repeated, wilson
from memlm.mix.mixed_lm import MixedLM
from memlm.models.loading import load_causal_lm
from memlm.train.run import train_memory

pytestmark = pytest.mark.slow

SMALL = GenerationConfig(passages=12, prompt_tokens=4, new_tokens=5, batch_size=5, dtype="float32")


def test_figures_are_those_of_continuations_made_one_by_one(
    corpus_folder: Path, model_folder: str, memory_folder: Path
) -> None:
    found = evaluate_generation(
        corpus_folder, base=model_folder, memory=str(memory_folder), gate="posterior", config=SMALL
    )
    assert list(found["ways"]) == ["base", "fixed", "posterior", "text"]
    model = MixedLM.from_pretrained(model_folder, memory=str(memory_folder), gate="posterior", dtype=torch.float32)
    passages = passages_of(Corpus(corpus_folder).split("test"), SMALL)
    assert found["passages"]["held_out"] == len(passages) <= 12
    said = []
    for row in torch.from_numpy(passages[:, :4]):
        text = row[None]
        for _ in range(5):
            logits = model(text).logits[:, -1]
            if model.generation_config.eos_token_id is not None:
                logits[:, model.generation_config.eos_token_id] = -torch.inf  # none ends early
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        said.append(text[0, 4:].tolist())
    agree = np.array(said) == passages[:, 4:]
    told = found["ways"]["posterior"]["held_out"]
    assert told["recited"] == pytest.approx(agree.all(1).mean(), abs=1e-4)
    matched = [next((i for i, same in enumerate(row) if not same), 5) for row in agree.tolist()]
    assert told["matched"] == pytest.approx(np.mean(matched), abs=1e-3)
    assert told["distinct"] == [pytest.approx(distinct(said, n), abs=1e-4) for n in (1, 2, 3)]
    assert found["ways"]["text"]["held_in"]["recited"] == 1
    assert "held-out passages" in generation_table(found)


def test_a_memory_that_has_learnt_its_text_by_heart_recites_it(
    corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    config = {"dtype": "float32", "batch_size": 8, "kl_weight": 0.0, "epochs": 10, "learning_rate": 1e-2}
    train_memory(corpus_folder, init=model_folder, out=tmp_path / "m", **config)
    found = evaluate_generation(
        corpus_folder, base=model_folder, memory=str(tmp_path / "m"), mix_weight=0.95, config=SMALL
    )["ways"]
    assert found["base"]["held_in"]["recited"] == 0
    assert found["fixed"]["held_in"]["matched"] > 3 * max(0.2, found["base"]["held_in"]["matched"])


def test_a_judge_gives_the_perplexity_of_what_was_said(
    corpus_folder: Path, model_folder: str, memory_folder: Path
) -> None:
    config = SMALL.model_copy(update={"judge": model_folder})
    found = evaluate_generation(
        corpus_folder, base=model_folder, memory=str(memory_folder), mix_weight=0, config=config
    )
    passages, judge = passages_of(Corpus(corpus_folder).split("train"), SMALL), load_causal_lm(model_folder)
    nats = []
    for row in torch.from_numpy(passages):
        with torch.no_grad():
            log_probs = judge(row[None]).logits[0].log_softmax(-1)
        nats += [-float(log_probs[i - 1, row[i]]) for i in range(4, 9)]
    assert found["ways"]["text"]["held_in"]["judged"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-3)


def test_distinct_repeated_and_intervals() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == pytest.approx(2 / 4)
    assert distinct([[1]], 2) == 0
    assert repeated([[1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8]], 3) == pytest.approx((1 - 3 / 6) / 2)
    assert wilson(0, 20)[0] == 0
    assert wilson(0, 20)[1] == pytest.approx(0.1611, abs=1e-3)
    assert wilson(10, 20) == [pytest.approx(0.2993, abs=1e-3), pytest.approx(0.7007, abs=1e-3)]


def test_documents_that_are_too_short_are_one_line(corpus_folder: Path, model_folder: str, memory_folder: Path) -> None:
    with pytest.raises(InputError, match=r"split of .* has no document of 2000 tokens"):
        evaluate_generation(
            corpus_folder, base=model_folder, memory=str(memory_folder), prompt_tokens=1000, new_tokens=1000
        )


def test_the_command(corpus_folder: Path, model_folder: str, memory_folder: Path) -> None:
    arguments = ["evaluate", "generation", str(corpus_folder), "--base", model_folder, "--memory", str(memory_folder)]
    arguments += ["--passages", "4", "--prompt-tokens", "4", "--new-tokens", "3", "--dtype", "float32"]
    told = CliRunner().invoke(app, [*arguments, "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["ways"].keys() == {"base", "fixed", "posterior", "text"}
    assert "recited" in CliRunner().invoke(app, arguments).stdout


def test_a_model_that_gives_no_numbers_is_named(
    corpus_folder: Path, model_folder: str, memory_folder: Path, nan_base: str
) -> None:
    memory = str(memory_folder)
    with pytest.raises(ModelError, match=f"^base {nan_base} gives no finite scores$"):
        evaluate_generation(corpus_folder, base=nan_base, memory=memory, mix_weight=0.3, config=SMALL)
    config = SMALL.model_copy(update={"judge": nan_base})
    with pytest.raises(ModelError, match=f"^judge {nan_base} gives no finite scores$"):
        evaluate_generation(corpus_folder, base=model_folder, memory=memory, mix_weight=0.3, config=config)
