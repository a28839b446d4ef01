"""A corpus with what teachers wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_corpus, save_stranger
from families import FAMILIES, VOCABULARY, family_model
from interruption import Interrupted
from transformers import GenerationConfig, PreTrainedTokenizerFast

from memlm.corpus.blocks import SPLITS, Corpus
from memlm.errors import ArtifactError, ConfigError, ModelError, TokenizerMismatchError
from memlm.models.abilities import CACHE
from memlm.models.loading import load_causal_lm
from memlm.targets import authors
from memlm.targets.authors import write_corpus
from memlm.train.run import train_memory

HOW: dict[str, Any] = {"dtype": "float32", "times": 3, "document_tokens": 24, "batch_size": 16}


@pytest.fixture(scope="module")
def written(corpus_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "c"
    write_corpus(corpus_folder, teacher=model_folder, out=out, **HOW)
    return out


def test_the_documents_are_there_and_behind_them_what_was_written(written: Path, corpus_folder: Path) -> None:
    before, after = Corpus(corpus_folder), Corpus(written)
    old, new = before.split("train"), after.split("train")
    texts, originals = list(new.documents()), list(old.documents())
    for text, expected in zip(texts, originals, strict=False):
        assert text.tolist() == expected.tolist()
    own = texts[len(originals) :]
    starts = [
        (document, at)
        for document, text in enumerate(originals)
        for at in range(0, len(text), 24)
        if at == 0 or len(text) - at > 16
    ]
    assert len(own) == 3 * len(starts) == after.n_written > 3 * len(originals)  # some are longer than 24 tokens
    begun = {tuple(originals[document][at : at + 4].tolist()) for document, at in starts}
    end = before.tokenizer.eos_token_id
    for text in own:
        assert tuple(text[:4].tolist()) in begun
        assert 4 < len(text) <= 24
        assert end not in text[4:-1].tolist()
        assert text.max() < before.vocab_size
    assert len({tuple(text.tolist()) for text in own}) > 2 * len(starts)  # each is drawn anew
    for name in SPLITS[1:]:
        assert after.split(name).tokens.tolist() == before.split(name).tokens.tolist()
    assert after.document_names("train")[-1].endswith(" as a teacher went on")
    assert after.config == before.config


def test_they_are_drawn_as_the_teacher_says(model_folder: str, corpus_folder: Path, tmp_path: Path) -> None:
    """Of one beginning many times: the next token's frequencies are the teacher's own probabilities."""
    model, corpus = load_causal_lm(model_folder, dtype=torch.float32), Corpus(corpus_folder)
    prompt = next(iter(corpus.split("train").documents()))[:6]
    drawn = authors._go_on(
        model, [prompt] * 4000, corpus.vocab_size, 0, temperature=0.2, top_p=1.0, longest=7, end=None
    )
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1, : corpus.vocab_size]
    expected = (logits / 0.2).softmax(-1).numpy()
    found = np.bincount([int(text[6]) for text in drawn], minlength=len(expected)) / 4000
    assert np.abs(found - expected).sum() < 0.35
    likely = np.argsort(-expected)[:5]
    np.testing.assert_allclose(found[likely], expected[likely], atol=4 * np.sqrt(0.25 / 4000))


def test_texts_of_any_length_go_on_as_each_would_alone(
    model_folder: str, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece by piece, those that have ended put aside, against transformers one by one, the surest token each time."""
    model, corpus = load_causal_lm(model_folder, dtype=torch.float32), Corpus(corpus_folder)
    padding = range(corpus.vocab_size, model.config.vocab_size)
    surest = GenerationConfig(do_sample=False, max_length=40, pad_token_id=0, suppress_tokens=[*padding])
    prompts = [text[: 3 + number % 9] for number, text in enumerate(corpus.split("train").documents())][:30]
    alone = []
    for prompt in prompts:
        given = torch.from_numpy(prompt.astype(np.int64))[None]
        found = model.generate(given, attention_mask=torch.ones_like(given), generation_config=surest)
        alone.append(found[0].numpy())
    ends = [int(np.bincount(np.concatenate([text[12:30] for text in alone])).argmax()), None]
    for end in ends:
        for piece in (1, 5, 64):
            monkeypatch.setattr(authors, "_FIRST_PIECE", piece)
            drawn = authors._go_on(
                model, prompts, corpus.vocab_size, 0, longest=40, end=end, temperature=1e-7, top_p=1.0
            )
            for prompt, text, whole in zip(prompts, drawn, alone, strict=True):
                stops = np.flatnonzero(whole[len(prompt) :] == end)
                length = len(prompt) + int(stops[0]) + 1 if len(stops) else 40
                assert text.tolist() == whole[:length].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mamba", "gemma3", "forgets", "reads padding"])
def test_any_model_writes_to_its_last_position(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginnings of several lengths side by side, where the model can, against each alone without a cache."""

    class Flawed(type(family_model("llama"))):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
            if kind == "reads padding":
                attention_mask = None
            elif (cache := kwargs.get(CACHE)) is not None and cache.get_seq_length() > 4:
                cache.reset()
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model = family_model(kind if kind in FAMILIES else "llama")
    random, alone = np.random.default_rng(0), []
    prompts = [random.integers(1, VOCABULARY, 2 + n % 6).astype(np.int32) for n in range(12)]
    surest = GenerationConfig(do_sample=False, max_length=24, pad_token_id=0, use_cache=False)  # gpt2 has no more
    for prompt in prompts:
        given = torch.from_numpy(prompt.astype(np.int64))[None]
        found = model.generate(given, attention_mask=torch.ones_like(given), generation_config=surest)
        alone.append(found[0].tolist())
    if kind not in FAMILIES:
        model.__class__ = Flawed
    monkeypatch.setattr(authors, "_FIRST_PIECE", 5)
    drawn = authors._go_on(model, prompts, VOCABULARY, 0, longest=24, end=None, temperature=1e-7, top_p=1.0)
    assert [text.tolist() for text in drawn] == alone


def test_authors_go_on_from_what_they_have_not_read(
    corpus_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"init": model_folder, "max_steps": 1, "dtype": "float32"}
    for number in (1, 2):
        train_memory(corpus_folder, out=tmp_path / f"t{number}", left_out=f"{number}/2", **how)
    given: dict[str, list[tuple[int, ...]]] = {}
    go_on = authors._go_on

    def watched(model: Any, prompts: list[np.ndarray], *more: Any, **drawing: Any) -> list[np.ndarray]:
        given.setdefault(model.config.name_or_path, []).extend(tuple(prompt.tolist()) for prompt in prompts)
        return go_on(model, prompts, *more, **drawing)

    monkeypatch.setattr(authors, "_go_on", watched)
    teachers = [tmp_path / "t2", tmp_path / "t1"]
    write_corpus(corpus_folder, fold_teachers=teachers, out=tmp_path / "c", prompt_tokens=20, times=1, dtype="float32")
    split = Corpus(corpus_folder).split("train")
    fold, texts = split.folds(2), [tuple(text.tolist()) for text in split.documents()]
    size = Corpus(corpus_folder).config.block_size
    assert sum(map(len, given.values())) == Corpus(tmp_path / "c").manifest.facts["written"]["documents"] >= len(texts)
    for number in (1, 2):
        for prompt in given[str(tmp_path / f"t{number}")]:
            parts = (
                (d, text[at : at + len(prompt)]) for d, text in enumerate(texts) for at in range(0, len(text), size)
            )
            assert number - 1 in {int(fold[d]) for d, part in parts if part == prompt}


def test_a_stopped_run_goes_on_to_the_same_bytes(
    corpus_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = authors.plan_written
    monkeypatch.setattr(authors, "plan_written", lambda *args, **how: plan(*args, keep_seconds=0, **how))
    whole = write_corpus(corpus_folder, teacher=model_folder, out=tmp_path / "whole", **HOW)
    asked, go_on = [], authors._go_on

    def stopping(*args: Any, **how: Any) -> list[np.ndarray]:
        asked.append(1)
        if len(asked) == 3:
            raise Interrupted
        return go_on(*args, **how)

    monkeypatch.setattr(authors, "_go_on", stopping)
    with pytest.raises(Interrupted):
        write_corpus(corpus_folder, teacher=model_folder, out=tmp_path / "cut", **HOW)
    assert write_corpus(corpus_folder, teacher=model_folder, out=tmp_path / "cut", **HOW).hash == whole.hash
    assert len(asked) == 1 + -(-whole.facts["written"]["documents"] // 16)  # the one that was stopped, again


def test_what_resembles_held_out_text_is_left_out(
    documents: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(documents, model_folder, tmp_path / "c", near_duplicate_ngram=16)
    held_out = next(iter(Corpus(corpus).split("test").documents()))
    monkeypatch.setattr(
        authors,
        "_go_on",
        lambda model, prompts, *more, **drawing: [
            np.concatenate([prompt, held_out]) if number == 0 else np.append(prompt, 7)
            for number, prompt in enumerate(prompts)
        ],
    )
    made = write_corpus(corpus, teacher=model_folder, out=tmp_path / "w", times=1, dtype="float32", batch_size=10_000)
    assert made.facts["written"]["documents_left_out"] == 1


@pytest.mark.parametrize(
    ("error", "told", "given"),
    [
        (ConfigError, "who is to write", lambda here: {"teacher": None}),
        (ConfigError, "who is to write", lambda here: {"fold_teachers": [here]}),
        (
            ArtifactError,
            "expected a memory folder|is a corpus",
            lambda here: {"teacher": None, "fold_teachers": [here]},
        ),
        (ConfigError, "times = 0", lambda here: {"times": 0}),
        (
            ConfigError,
            "document_tokens = 1048576: teacher .* has positions for 256",
            lambda here: {"document_tokens": 1 << 20},
        ),
    ],
)
def test_what_cannot_be_written_is_one_line(
    error: type[Exception],
    told: str,
    given: Callable[[Path], dict[str, Any]],
    corpus_folder: Path,
    model_folder: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=told):
        write_corpus(corpus_folder, **{"out": tmp_path / "c", "teacher": model_folder, **given(corpus_folder)})


def test_an_author_that_gives_no_numbers_is_one_line(corpus_folder: Path, nan_base: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^teacher {nan_base} gives no finite scores$"):
        write_corpus(corpus_folder, teacher=nan_base, out=tmp_path / "c")


def test_an_author_of_another_tokenizer_is_refused(
    corpus_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerMismatchError):
        write_corpus(corpus_folder, teacher=save_stranger(tmp_path / "s", tokenizer), out=tmp_path / "c")
