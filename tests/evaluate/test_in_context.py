"""In-context retrieval: which tokens are predicted after which passage, and that scores are those of the base there."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memlm.corpus.blocks import Corpus
from memlm.corpus.build import build_corpus
from memlm.errors import ConfigError, ModelError
from memlm.evaluate import in_context
from memlm.evaluate.decoding import decode
from memlm.evaluate.in_context import (
    InContextBase,
    InContextConfig,
    in_context_blocks,
    in_context_label_log_probs,
    passages_of,
)
from memlm.models.loading import load_causal_lm
from memlm.models.tokenizers import load_tokenizer

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
    assert in_context.ByWords(passages).best(["bark dogs", "law", "", "zebra", "day night"]) == [1, 2, 0, 0, 3]


def test_a_passage_ends_before_the_end_token_and_begins_after_bos(corpus_folder: Path) -> None:
    corpus = Corpus(corpus_folder)
    split, eos = corpus.split("train"), corpus.tokenizer.eos_token_id
    assert isinstance(eos, int)
    assert int(split.tokens[split.offsets[1] - 1]) == eos
    whole, without = passages_of(split, 8), passages_of(split, 8, eos=eos)
    assert any(eos in passage for passage in whole)
    assert not any(eos in passage for passage in without)
    first = int(split.tokens[0])
    assert passages_of(split, 8, bos=first)[0].tolist() == split.tokens[1:9].tolist()


def test_text_and_passage_are_read_whole_unless_the_base_is_too_short(corpus_folder: Path, model_folder: str) -> None:
    corpus, config = Corpus(corpus_folder), InContextConfig(positions=40, passage_tokens=8)
    assert in_context.context_of(config, corpus.config.block_size, model_folder) == corpus.config.block_size + 12
    for block in in_context_blocks(corpus, "test", config).blocks:
        assert len(block.input_ids) <= corpus.config.block_size + 12
    long = InContextConfig(passage_tokens=300)
    with pytest.raises(ConfigError, match="leaves no room for text in a context of 256"):
        in_context.context_of(long, corpus.config.block_size, model_folder)


def test_across_documents_no_first_token_is_predicted(documents: str, model_folder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"document_separator": "\n\n", "block_size": 32, "cross_documents": True}
    build_corpus([documents], tokenizer=model_folder, out=tmp_path / "c", test_fraction=0.4, **settings)
    corpus = Corpus(tmp_path / "c")
    found, split = (
        in_context_blocks(corpus, "test", InContextConfig(**{**SMALL, "positions": 5000})),
        corpus.split("test"),
    )
    predicted = np.concatenate([block.input_ids[block.predicted] for block in found.blocks])
    assert predicted.tolist() == split.labels()[found.positions].tolist()
    assert len(set(found.positions.tolist())) == len(found.positions)


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
    with pytest.raises(
        ConfigError, match=r"in_context.passage_tokens = 22: leaves no room for text in a context of 24"
    ):
        in_context_blocks(Corpus(corpus_folder), "test", InContextConfig(**{**SMALL, "passage_tokens": 22}))
    find = importlib.util.find_spec
    monkeypatch.setattr(in_context, "find_spec", lambda name: None if name == "bm25s" else find(name))
    with pytest.raises(ConfigError, match=r"needs bm25s: pip install 'memlm\[compare\]'"):
        in_context_blocks(Corpus(corpus_folder), "test", InContextConfig(**SMALL))


def test_a_dense_search_finds_the_nearest_mean_of_states(model_folder: str) -> None:
    passages = ["the cat sat on a mat", "dogs bark at night", "a court of law, and what it says", "night and day"]
    queries = ["dogs bark at night", "night and day", "the cat sat on a"]
    assert in_context.by_meaning(passages, queries[:2], model_folder, batch_size=2) == [1, 3]
    model, tokenizer = load_causal_lm(model_folder, dtype=torch.float32), load_tokenizer(model_folder)
    with torch.no_grad():
        means = [
            model.base_model(torch.tensor([tokenizer(text)["input_ids"]]))[0][0].mean(0) for text in passages + queries
        ]
    keys, wanted = torch.stack(means[:4]), torch.stack(means[4:])
    near = torch.nn.functional.cosine_similarity(wanted[:, None], keys[None], dim=-1)
    assert in_context.by_meaning(passages, queries, model_folder, batch_size=3) == near.argmax(1).tolist()


def test_an_encoder_puts_other_passages_in_front(corpus_folder: Path, model_folder: str) -> None:
    corpus, words = Corpus(corpus_folder), InContextConfig(**SMALL)
    dense = InContextConfig(**SMALL, encoder=model_folder)
    found = [in_context_label_log_probs(corpus, model_folder, config, dtype="float32") for config in (words, dense)]
    assert found[0][0].tolist() == found[1][0].tolist()
    assert (found[0][1] != found[1][1]).any()
    with pytest.raises(ModelError, match="nobody/nothing"):
        in_context_blocks(corpus, "test", InContextConfig(**SMALL, encoder="nobody/nothing"))


def test_a_base_goes_on_from_a_passage_that_is_found_anew(corpus_folder: Path, model_folder: str) -> None:
    corpus, config = Corpus(corpus_folder), InContextConfig(passage_tokens=8, stride=3, query_tokens=5)
    base = load_causal_lm(model_folder, dtype=torch.float32)
    reader = InContextBase(base, corpus, config)
    split = corpus.split("test")
    prompts = torch.from_numpy(np.stack([split.tokens[:9], split.tokens[20:29]]).astype(np.int64))
    found = decode(reader, prompts, 7)
    assert found.shape == (2, 7)
    for text, new in zip(prompts, found, strict=True):  # by the slow way: one token at a time, no cache, no batch
        passage = None
        for number in range(7):
            if number % 3 == 0:
                passage, begins = reader.read(text)[: -len(text)], len(text)
            assert begins + number % 3 == len(text)
            logits = base(input_ids=torch.cat([passage, text])[None], use_cache=False).logits[0, -1]
            logits[[] if (end := base.generation_config.eos_token_id) is None else end] = -torch.inf
            assert int(logits.argmax()) == int(new[number])
            text = torch.cat([text, new[number : number + 1]])
    assert not torch.equal(reader.read(prompts[0])[:8], reader.read(prompts[1])[:8])


def test_a_base_reads_a_passage_and_the_end_of_a_text(corpus_folder: Path, model_folder: str) -> None:
    corpus = Corpus(corpus_folder)
    reader = InContextBase(
        load_causal_lm(model_folder, dtype=torch.float32), corpus, InContextConfig(passage_tokens=8, context=24)
    )
    text = torch.from_numpy(corpus.split("test").tokens[:40].astype(np.int64))
    read = reader.read(text)
    assert len(read) <= 24 - 4
    kept = int(len(read) - 8 - len(reader._between))
    assert read[-kept:].tolist() == text[-kept:].tolist()
