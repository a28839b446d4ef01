"""In-context retrieval: which tokens are predicted after which passage, and that scores are those of the base there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memlm.corpus.blocks import Corpus
from memlm.errors import ConfigError
from memlm.evaluate import in_context
from memlm.evaluate.in_context import InContextConfig, in_context_blocks, in_context_label_log_probs, passages_of
from memlm.models.loading import load_causal_lm

SMALL: dict[str, Any] = {"positions": 40, "query_tokens": 6, "passage_tokens": 8, "context": 24, "stride": 4}


def test_each_block_is_a_passage_and_the_text_before_what_it_predicts(corpus_folder: Path) -> None:
    corpus = Corpus(corpus_folder)
    config = InContextConfig(**SMALL)
    found, split = in_context_blocks(corpus, "test", config), corpus.split("test")
    passages = {passage.tobytes() for passage in passages_of(corpus.split("train"), 8)}
    labels, at = split.labels(), 0
    assert len(found.positions) == len(set(found.positions.tolist())) <= 40
    assert len(found.positions) >= 30
    for block in found.blocks:
        count = int(block.predicted.sum())
        assert 1 <= count <= 4
        assert block.predicted[-count:].all()
        assert len(block.input_ids) <= 24
        positions = found.positions[at : at + count]
        assert block.input_ids[-count:].tolist() == labels[positions].tolist()
        indices = split.token_indices()[positions]
        rest = next(
            len(block.input_ids) - n
            for n in range(8, 0, -1)
            if block.input_ids[:n].astype(np.int32).tobytes() in passages
        )
        between = corpus.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        assert block.input_ids[-rest:].tolist()[: len(between)] == between
        rest -= len(between)
        assert block.input_ids[-rest:].tolist() == split.tokens[indices[-1] + 1 - rest : indices[-1] + 1].tolist()
        at += count
    assert found.position_starts[-1] == len(found.positions)


def test_the_passage_is_the_one_with_the_words_of_the_query() -> None:
    passages = ["the cat sat on a mat", "dogs bark at night", "a court of law", "night and day"]
    assert in_context._search(passages, ["bark dogs", "law", "", "zebra", "day night"]) == [1, 2, 0, 0, 3]


def test_scores_are_the_bases_behind_the_passage(corpus_folder: Path, model_folder: str) -> None:
    corpus, config = Corpus(corpus_folder), InContextConfig(**SMALL)
    positions, found = in_context_label_log_probs(corpus, model_folder, config, dtype="float32")
    model, blocks = load_causal_lm(model_folder, dtype=torch.float32), in_context_blocks(corpus, "test", config)
    expected = []
    for block in blocks.blocks:
        ids = torch.from_numpy(block.input_ids).long()[None]
        with torch.no_grad():
            log_probs = model(ids).logits[0, :, : corpus.vocab_size].double().log_softmax(-1)
        expected += [float(log_probs[i - 1, ids[0, i]]) for i in np.flatnonzero(block.predicted)]
    assert positions.tolist() == blocks.positions.tolist()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_one_line(corpus_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="leaves no room for text in a context of 24"):
        in_context_blocks(Corpus(corpus_folder), "test", InContextConfig(**{**SMALL, "passage_tokens": 22}))
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"needs bm25s: pip install 'memlm\[compare\]'"):
        in_context_blocks(Corpus(corpus_folder), "test", InContextConfig(**SMALL))
