import copy
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_corpus, save_model, sentences
from interruption import files_written
from reference import shared_ngrams
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memlm.corpus.blocks import SPLITS, Corpus
from memlm.corpus.build import build_corpus, corpus_notes, plan_corpus
from memlm.corpus.config import CorpusConfig
from memlm.errors import ArtifactError, ConfigError, InputError, ModelError, OutputExistsError
from memlm.manifest import Manifest, read_manifest
from memlm.stage import run_stage

HALVES = {"document_separator": "\n\n", "validation_fraction": 0.25, "test_fraction": 0.25, "block_size": 16}


@pytest.fixture
def build(tmp_path: Path, model_folder: str):
    """Builds a corpus of texts; the manifest, and each split's documents as tuples of token ids."""

    def run(
        texts: list[str], name: str = "corpus", sizes: dict[str, int] | None = None, **config: object
    ) -> tuple[Manifest, dict[str, list[tuple[int, ...]]]]:
        source = tmp_path / "documents.txt"
        source.write_text("\n\n".join(texts), encoding="utf-8")
        settings = CorpusConfig.parse({**HALVES, **config})
        plan = plan_corpus([str(source)], tokenizer=model_folder, config=settings, **(sizes or {}))
        manifest = run_stage(tmp_path / name, *plan)
        return manifest, contents(tmp_path / name)

    return run


def contents(folder: Path) -> dict[str, list[tuple[int, ...]]]:
    corpus = Corpus(folder)
    found = {}
    for name in SPLITS:
        split = corpus.split(name)
        edges = split.offsets
        found[name] = [tuple(split.tokens[a:b].tolist()) for a, b in itertools.pairwise(edges)]
    return found


def everything(splits: dict[str, list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    return [document for documents in splits.values() for document in documents]


def test_every_document_is_in_one_split_and_decodes_to_its_text(build, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = sentences(60, seed=3)
    manifest, splits = build(texts)
    assert all(splits.values())
    assert sorted(tokenizer.decode(d, skip_special_tokens=True) for d in everything(splits)) == sorted(texts)
    for name, documents in splits.items():
        order = [texts.index(tokenizer.decode(d, skip_special_tokens=True)) for d in documents]
        assert order == sorted(order)  # of reading
        facts = manifest.facts["splits"][name]
        assert facts["documents"] == len(documents)
        assert facts["tokens"] == sum(map(len, documents))
        assert facts["positions"] == sum(len(d) - 1 for d in documents)


def test_adding_documents_moves_none(build) -> None:
    texts = sentences(120, seed=4)
    _, before = build(texts[:60], "before")
    _, after = build([*texts[60:], *texts[:60]], "after")
    for name in SPLITS:
        assert set(before[name]) <= set(after[name])
        assert len(after[name]) > len(before[name])


def test_another_seed_draws_other_splits(build) -> None:
    texts = sentences(60, seed=3)
    _, first = build(texts, "a")
    _, second = build(texts, "b", seed=1)
    assert sorted(everything(first)) == sorted(everything(second))
    assert set(first["test"]) != set(second["test"])


def test_exact_repetitions_are_kept_once_where_they_stood_first(build) -> None:
    texts = sentences(40, seed=5)
    _, once = build(texts, "once")
    manifest, twice = build([*texts, *texts[10:20], *texts[10:15]], "twice")
    assert twice == once
    assert manifest.facts["documents_read"] == 55
    assert manifest.facts["documents_repeated"] == 15


def test_documents_under_two_tokens_are_skipped_and_counted(build) -> None:
    texts = sentences(30, seed=6)
    _, expected = build(texts, "without", end_token="none")
    manifest, found = build([*texts[:10], "a", *texts[10:], "q"], "with", end_token="none")
    assert found == expected
    assert manifest.facts["documents_too_short"] == 2
    assert manifest.facts["documents_read"] == 32


def test_no_document_at_all_is_an_error(build, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the corpus is empty: 0 documents were read"):
        build([" ", "\n"])
    with pytest.raises(InputError, match="the corpus is empty: 2 documents were read, none of two tokens"):
        build(["a", "b"], "short", end_token="none")
    assert not (tmp_path / "corpus").exists()


def test_limited_splits_are_filled_to_the_token_and_grow_by_whole_documents(build) -> None:
    texts = sentences(60, seed=7)
    _, whole = build(texts, "whole")
    before: set[tuple[int, ...]] = set()
    for limit in (20, 150, 151, 152, 600):
        manifest, found = build(texts, f"limit-{limit}", max_tokens=limit, max_validation_tokens=33)
        full = [d for d in found["train"] if d in whole["train"]]
        cut = [d for d in found["train"] if d not in whole["train"]]
        assert manifest.facts["splits"]["train"]["tokens"] in (limit, limit - 1)  # a single token would predict nothing
        assert len(cut) <= 1
        assert all(any(d == w[: len(d)] for w in whole["train"]) for d in cut)
        assert before <= set(full)
        before = set(full)
        assert manifest.facts["splits"]["validation"]["tokens"] in (33, 32)
        assert manifest.facts["splits"]["test"]["tokens"] in (limit // 10, limit // 10 - 1)
    assert len(before) > 3


def test_a_limit_above_what_is_there_changes_nothing(build) -> None:
    texts = sentences(30, seed=7)
    _, whole = build(texts, "whole")
    _, limited = build(texts, "limited", max_tokens=10**6)
    assert limited == whole


def test_near_duplicates_across_splits_are_removed_and_others_kept(build) -> None:
    rng = random.Random(8)
    originals = [" ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=60)) for _ in range(60)]
    altered = [f"{text[:60]} X {text[60:]}" for text in originals]  # one letter put into the middle
    texts = [*originals[:40], *altered[:40], *originals[40:]]
    _, all_splits = build(texts, "all")
    n, share = 8, 0.3
    manifest, found = build(texts, "kept", near_duplicate_ngram=n, near_duplicate_overlap=share)

    def distinct(documents: list, against: list) -> list:
        return [d for d in documents if shared_ngrams(list(d), [list(o) for o in against], n) <= share]

    validation = distinct(all_splits["validation"], all_splits["train"])
    test = distinct(all_splits["test"], [*all_splits["train"], *validation])
    assert found == {"train": all_splits["train"], "validation": validation, "test": test}
    dropped = len(everything(all_splits)) - len(everything(found))
    assert manifest.facts["documents_near_duplicate"] == dropped > 10
    assert len(validation) > 3
    assert len(test) > 3


@pytest.mark.parametrize(
    ("settings", "first", "last"),
    [
        ({}, None, "</s>"),
        ({"start_token": "bos"}, "<s>", "</s>"),
        ({"start_token": "bos", "end_token": "none"}, "<s>", None),
        ({"end_token": "none"}, None, None),
        ({"start_token": "</s>", "end_token": "<pad>"}, "</s>", "<pad>"),
    ],
)
def test_documents_start_and_end_with_the_tokens_asked_for(
    build, tokenizer: PreTrainedTokenizerFast, settings: dict, first: str | None, last: str | None
) -> None:
    text = sentences(30, seed=9)
    _, found = build(text, **settings)
    ids = {tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in text}
    convert = tokenizer.convert_tokens_to_ids
    head = [] if first is None else [convert(first)]
    tail = [] if last is None else [convert(last)]
    assert {(*head, *i, *tail) for i in ids} == set(everything(found))


def test_auto_starts_with_bos_where_the_tokenizer_itself_does(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, documents: str
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    adding = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    adding.save_pretrained(tmp_path / "adding")
    build_corpus([documents], tokenizer=str(tmp_path / "adding"), out=tmp_path / "c", config=CorpusConfig.parse(HALVES))
    for document in everything(contents(tmp_path / "c")):
        assert document[0] == tokenizer.bos_token_id
        assert document[1] != tokenizer.bos_token_id
        assert document[-1] == tokenizer.eos_token_id


def test_a_token_that_the_tokenizer_lacks_is_refused(build) -> None:
    with pytest.raises(ConfigError, match=r"end_token = '</S>' is no token of the tokenizer; did you mean '</s>'\?"):
        build(sentences(5, seed=1), end_token="</S>")
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        build_corpus(["pyproject.toml.txt"], tokenizer="nobody/nothing", out="never")


@pytest.mark.parametrize("stop_at", [2, 7, 14])
def test_interrupted_tokenising_goes_on_to_the_same_bytes(build, tmp_path: Path, stop_at: int) -> None:
    texts, small = sentences(40, seed=10), {"shard_characters": 1000}
    expected, _ = build(texts, "whole")
    with files_written("raw/*.npy", most=stop_at):
        build(texts, "resumed", small)
    kept = sorted((tmp_path / "resumed" / "raw").glob("*.names.txt"))
    assert len(kept) == stop_at // 4  # four arrays a shard
    with files_written("raw/*.names.txt") as written:
        resumed, _ = build(texts, "resumed", small)
    assert written
    assert not {f"raw/{path.name}" for path in kept} & set(written)
    assert resumed.hash == expected.hash
    assert resumed.payload == expected.payload
    assert not (tmp_path / "resumed" / "raw").exists()


def test_a_finished_corpus_is_not_made_again(build, tmp_path: Path) -> None:
    texts = sentences(20, seed=11)
    first, _ = build(texts)
    with files_written() as written:
        again, _ = build(texts)
    assert not written
    assert again == first == read_manifest(tmp_path / "corpus", "corpus")


SPELLED = "you write </s> after it </s> and <s> in front"


@pytest.mark.parametrize("special_tokens", [False, True])
def test_special_tokens_that_a_document_spells_are_text_unless_asked_for_and_are_counted(
    build, tokenizer: PreTrainedTokenizerFast, special_tokens: bool
) -> None:
    manifest, found = build([SPELLED, *sentences(20, seed=1)], special_tokens=special_tokens)
    documents = everything(found)
    ends = sum(document[:-1].count(tokenizer.eos_token_id) for document in documents)
    assert ends == (2 if special_tokens else 0)
    assert sum(document.count(tokenizer.bos_token_id) for document in documents) == (1 if special_tokens else 0)
    assert any(tokenizer.decode(document[:-1]) == SPELLED for document in documents)
    assert manifest.facts["special_tokens_spelled"] == {"</s>": 2, "<s>": 1}
    (note,) = corpus_notes(manifest)
    assert "</s> 2 times, <s> 1 times" in note
    assert ("--special-tokens makes them tokens" in note) is not special_tokens


def test_a_rendered_document_gets_each_end_once(build, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"<s>{text}</s>" for text in sentences(20, seed=1)]
    _, found = build(texts, special_tokens=True, start_token="bos")
    for document in everything(found):
        assert document[0] == tokenizer.bos_token_id not in document[1:]
        assert document[-1] == tokenizer.eos_token_id not in document[:-1]


def test_interrupted_tokenising_counts_special_tokens_once(build) -> None:
    texts, small = [SPELLED, *sentences(40, seed=10)], {"shard_characters": 1000}
    with files_written("raw/*.npy", most=7):
        build(texts, "resumed", small)
    resumed, _ = build(texts, "resumed", small)
    assert resumed.facts["special_tokens_spelled"] == {"</s>": 2, "<s>": 1}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_splits_that_no_document_fell_to_are_the_ends_of_training_documents(
    build, tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> None:
    texts = sentences(count, seed=seed)
    manifest, found = build(texts, seed=seed, validation_fraction=0.1, test_fraction=0.1)
    assert all(found.values())
    assert manifest.facts["held_out_inside_documents"]
    wholes = {(*tokenizer(text, add_special_tokens=False)["input_ids"], 2) for text in texts}
    pieces = {name: list(documents) for name, documents in found.items()}
    for whole in wholes:  # each token of a document is in one split
        if whole in [*found["validation"], *found["test"], *found["train"]]:
            continue
        assert any(
            a + b + c == whole
            for a in pieces["train"]
            for b in [(), *pieces["validation"]]
            for c in [(), *pieces["test"]]
        )
    assert sum(map(len, everything(found))) == sum(map(len, wholes))
    (note,) = corpus_notes(manifest)
    assert "the last part of each training document is held out instead" in note
    assert "another --document-separator" in note


def test_a_split_that_nothing_asks_for_stays_empty_without_a_word(build) -> None:
    manifest, found = build(sentences(2, seed=1), validation_fraction=0, test_fraction=0)
    assert not found["validation"] + found["test"]
    assert manifest.facts["held_out_inside_documents"] == corpus_notes(manifest) == []


def test_a_split_that_is_empty_in_spite_of_all_is_said_with_the_cure(build) -> None:
    manifest, _ = build(["a b"], end_token="none", document_separator=None)
    notes = corpus_notes(manifest)
    assert [note.split(":")[0] for note in notes] == ["the validation split is empty", "the test split is empty"]
    assert "--document-separator" in notes[0]


# --- what is said of a reading --------------------------------------------------------------------------------------


def built(folder: Path, model: str, **config: object) -> Manifest:
    settings = CorpusConfig.parse({"validation_fraction": 0, "test_fraction": 0, **config})
    return run_stage(folder.with_name("corpus"), *plan_corpus([str(folder)], tokenizer=model, config=settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.txt").write_text("\n\n".join(sentences(3, seed=1)))
    return tmp_path / "documents"


def test_files_that_are_not_read_are_counted_and_named(folder: Path, model_folder: str) -> None:
    assert built(folder, model_folder).facts["files_skipped"] == 0
    for number in range(12):
        (folder / f"picture{number:02}.png").write_bytes(b"")
    (folder / "package.json").write_text('{"name": "x"}')
    shutil.rmtree(folder.with_name("corpus"))
    manifest = built(folder, model_folder)
    assert manifest.facts["files_skipped"] == 13
    assert manifest.facts["files_skipped_first"] == [f"documents/picture{number:02}.png" for number in range(10)]
    (note,) = corpus_notes(manifest)
    assert note.startswith("files that memlm does not read: 13 (documents/picture00.png, ")
    assert note.endswith("picture09.png, …)")


def test_a_corpus_of_nothing_that_is_read_says_what_was_skipped(folder: Path, model_folder: str) -> None:
    (folder / "a.txt").unlink()
    (folder / "a.json").write_text('{"body": "some text"}')
    with pytest.raises(
        InputError, match=r"is empty: 0 documents were read.*; files that memlm does not read: 1 \(a\.json"
    ):
        built(folder, model_folder)
    assert built(folder, model_folder, text_column="body").facts["documents_read"] == 1


def test_a_separator_that_is_nowhere_is_said(folder: Path, model_folder: str) -> None:
    assert corpus_notes(built(folder, model_folder, document_separator="\n\n")) == []
    shutil.rmtree(folder.with_name("corpus"))
    (note,) = corpus_notes(built(folder, model_folder, document_separator="\n---\n"))
    assert "the separator '\\n---\\n' is in none of the text files" in note
    shutil.rmtree(folder.with_name("corpus"))
    (folder / "a.txt").rename(folder / "a.html")  # which no separator cuts
    assert corpus_notes(built(folder, model_folder, document_separator="\n---\n")) == []


@pytest.mark.parametrize(("eaten", "meant"), [("nn", r"\n\n"), ("n", r"\n"), ("rnrn", r"\r\n\r\n"), ("ntn", r"\n\t\n")])
def test_a_separator_whose_backslashes_a_shell_took_is_said(
    folder: Path, model_folder: str, eaten: str, meant: str
) -> None:
    (note,) = corpus_notes(built(folder, model_folder, document_separator=eaten))
    assert f"were cut at the letters '{eaten}'" in note
    assert f"--document-separator '{meant}'" in note


def test_lines_of_json_are_not_told_to_be_cut(folder: Path, model_folder: str) -> None:
    (folder / "a.txt").unlink()
    (folder / "a.jsonl").write_text('{"text": "a b"}\n')
    fractions = {"validation_fraction": 0.25, "test_fraction": 0.25}
    for separator in (None, "\n\n"):
        manifest = built(folder, model_folder, document_separator=separator, end_token="none", **fractions)
        notes = corpus_notes(manifest)
        assert notes
        assert all("give more documents, or a larger" in note for note in notes)
        shutil.rmtree(folder.with_name("corpus"))


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", ["train", "validation"])
def test_documents_that_cannot_be_read_leave_nothing_in_the_way_of_others(
    tmp_path: Path, model_folder: str, spoilt: str
) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.jsonl"
    good.write_text("\n\n".join(sentences(30, seed=1)))
    bad.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(30, seed=2)) + "no JSON\n")
    places = [str(bad if spoilt == split else good) for split in ("train", "validation")]
    given = {"validation": places[1:]}
    config = CorpusConfig.parse({**HALVES, "shared_documents": "keep"})
    plan = plan_corpus(places[:1], tokenizer=model_folder, given=given, config=config, shard_characters=200)
    with pytest.raises(InputError, match=r"bad\.jsonl line 31 is not JSON"):
        run_stage(tmp_path / "corpus", *plan)
    bad.write_text(bad.read_text().replace("no JSON\n", ""))
    plan = plan_corpus(places[:1], tokenizer=model_folder, given=given, config=config, shard_characters=200)
    assert run_stage(tmp_path / "corpus", *plan).facts["documents_read"] == 60


def test_the_output_inside_the_folder_of_documents_is_no_document(folder: Path, model_folder: str) -> None:
    config = CorpusConfig(validation_fraction=0, test_fraction=0)
    with files_written("raw/*.npy", most=2):
        build_corpus([str(folder)], tokenizer=model_folder, out=folder / "c", config=config)
    made = build_corpus([str(folder)], tokenizer=model_folder, out=folder / "c", config=config)
    assert made.facts["documents_read"] == 1
    assert build_corpus([str(folder)], tokenizer=model_folder, out=folder / "c", config=config) == made
    (folder / "web").mkdir()
    (folder / "web" / "manifest.json").write_text('{"text": "of something else"}')
    assert plan_corpus([str(folder)], tokenizer=model_folder, config=config).spec.inputs != made.inputs


def test_the_limit_of_a_document_decides_nothing_that_a_corpus_holds(folder: Path, model_folder: str) -> None:
    made = built(folder, model_folder)
    assert built(folder, model_folder, max_document_characters=10_000) == made
    assert "max_document_characters" not in made.config


def test_a_corpus_of_an_earlier_version_has_the_same_notes(folder: Path, model_folder: str) -> None:
    made = built(folder, model_folder, document_separator="\n\n")
    kept = {name: made.facts[name] for name in ("splits", "vocab_size")}
    assert corpus_notes(made.model_copy(update={"facts": kept})) == []


@pytest.mark.parametrize("name", ["special_tokens_spelled", "files_skipped", "held_out_inside_documents", "splits"])
@pytest.mark.parametrize("value", [None, "many", [3], {"a": []}])
def test_facts_that_no_corpus_has_are_one_line(folder: Path, model_folder: str, name: str, value: object) -> None:
    made = built(folder, model_folder)
    with pytest.raises(ArtifactError, match=rf"facts\.{name}") as caught:
        corpus_notes(made.model_copy(update={"facts": made.facts | {name: value}}))
    assert len(str(caught.value).splitlines()) == 1


def given_files(tmp_path: Path, **texts: list[str]) -> dict[str, list[str]]:
    """A file of documents per split."""
    paths = {}
    for split, documents in texts.items():
        paths[split] = [str(tmp_path / f"{split}.txt")]
        Path(paths[split][0]).write_text("\n\n".join(documents), encoding="utf-8")
    return paths


def test_a_split_may_be_given(tmp_path: Path, model_folder: str, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = sentences(60, seed=3)
    places = given_files(tmp_path, train=texts[:40], validation=texts[40:50], test=texts[50:])
    held = {f"{split}_documents": places[split] for split in ("validation", "test")}
    out = tmp_path / "c"
    manifest = build_corpus(places["train"], tokenizer=model_folder, out=out, **held, document_separator="\n\n")

    def told(folder: Path) -> dict[str, list[str]]:
        return {
            split: [tokenizer.decode(document, skip_special_tokens=True) for document in documents]
            for split, documents in contents(folder).items()
        }

    assert told(out) == {"train": texts[:40], "validation": texts[40:50], "test": texts[50:]}
    assert manifest.sources["test_documents"] == places["test"][0]
    other = tmp_path / "d"
    build_corpus(
        places["train"], tokenizer=model_folder, out=other, test_documents=places["test"], document_separator="\n\n"
    )
    found = told(other)
    assert found["test"] == texts[50:]
    assert found["validation"]
    assert sorted(found["train"] + found["validation"]) == sorted(texts[:40])
    Path(places["test"][0]).write_text("another text", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="test_documents"):
        build_corpus(places["train"], tokenizer=model_folder, out=out, **held, document_separator="\n\n")


def test_a_given_split_that_shares_documents_is_refused_unless_told_otherwise(
    tmp_path: Path, model_folder: str
) -> None:
    texts = sentences(40, seed=3)
    places = given_files(tmp_path, train=[*texts[:30], texts[0]], validation=texts[29:33], test=[*texts[32:], texts[5]])
    asked = {
        "tokenizer": model_folder,
        "validation_documents": places["validation"],
        "test_documents": places["test"],
        "document_separator": "\n\n",
    }
    message = r"1 of 4 documents of the validation split stand in another split too \(validation.txt#0\)"
    with pytest.raises(InputError, match=message):
        build_corpus(places["train"], out=tmp_path / "c", **asked)
    dropped = build_corpus(places["train"], out=tmp_path / "c", shared_documents="drop", **asked)
    assert {split: len(found) for split, found in contents(tmp_path / "c").items()} == {
        "train": 30,
        "validation": 3,
        "test": 7,
    }
    assert dropped.facts["documents_shared"] == 3
    assert dropped.facts["documents_repeated"] == 1
    assert any("stand in another: 3 documents" in line for line in corpus_notes(dropped))
    build_corpus(places["train"], out=tmp_path / "d", shared_documents="keep", **asked)
    assert {split: len(found) for split, found in contents(tmp_path / "d").items()} == {
        "train": 30,
        "validation": 4,
        "test": 9,
    }


def test_a_corpus_with_given_splits_goes_on_after_a_stop(tmp_path: Path, model_folder: str) -> None:
    texts = sentences(60, seed=3)
    places = given_files(tmp_path, train=texts[:40], validation=texts[40:50], test=texts[50:])
    given = {split: places[split] for split in ("validation", "test")}

    def make(out: Path) -> Manifest:
        config = CorpusConfig(document_separator="\n\n")
        plan = plan_corpus(places["train"], tokenizer=model_folder, given=given, config=config, shard_characters=200)
        return run_stage(out, *plan)

    whole = make(tmp_path / "whole")
    with files_written("raw/*.npy", most=7):
        make(tmp_path / "stopped")
    assert make(tmp_path / "stopped").hash == whole.hash


def test_one_document_needs_no_list(documents: str, model_folder: str, tmp_path: Path) -> None:
    settings: dict[str, str] = {"document_separator": "\n\n"}
    listed = build_corpus([documents], tokenizer=model_folder, out=tmp_path / "a", **settings)
    for number, alone in enumerate((documents, Path(documents))):
        assert build_corpus(alone, tokenizer=model_folder, out=tmp_path / str(number), **settings).hash == listed.hash


def test_a_tokenizer_with_several_chat_templates_is_kept(
    tokenizer: PreTrainedTokenizerFast, documents: str, tmp_path: Path
) -> None:
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"default": "{{ messages }}", "tool_use": "T{{ messages }}"}
    folder = make_corpus(documents, save_model(tmp_path / "m", several), tmp_path / "c")
    assert Corpus(folder).tokenizer.chat_template == several.chat_template


@pytest.mark.parametrize("number", range(8))
def test_given_documents_never_become_training_text(number: int, model_folder: str, tmp_path: Path) -> None:
    """Not even where the only other document would have been dealt to a held-out split."""
    book, given = (tmp_path / f"{name}.txt" for name in ("book", "given"))
    book.write_text(" ".join(sentences(40, seed=number)), encoding="utf-8")
    given.write_text(" ".join(sentences(5, seed=100)), encoding="utf-8")
    how: dict[str, Any] = {"tokenizer": model_folder, "validation_fraction": 0.3, "test_fraction": 0.3}
    build_corpus(book, out=tmp_path / "c", test_documents=given, **how)
    made = Corpus(tmp_path / "c")
    assert [*made.document_names("train")] == [*made.document_names("validation")] == ["book.txt#0"]
    assert [*made.document_names("test")] == ["given.txt#0"]
    book.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="the corpus is empty"):
        build_corpus(book, out=tmp_path / "d", test_documents=given, **how)


def test_a_given_document_is_in_no_other_held_out_split(model_folder: str, tmp_path: Path) -> None:
    texts = sentences(60, seed=3)
    for name, part in (("docs", texts), ("val", texts[:30])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(part), encoding="utf-8")
    how: dict[str, Any] = {"tokenizer": model_folder, "document_separator": "\n\n", "test_fraction": 0.5}
    for mode in ("refuse", "drop"):
        given: dict[str, Any] = {"validation_documents": tmp_path / "val.txt", "shared_documents": mode}
        if mode == "refuse":
            with pytest.raises(InputError, match="stand in another split too"):
                build_corpus(tmp_path / "docs.txt", out=tmp_path / mode, **given, **how)
            continue
        build_corpus(tmp_path / "docs.txt", out=tmp_path / mode, **given, **how)
        made = Corpus(tmp_path / mode)
        splits = [{text.tobytes() for text in made.split(split).documents()} for split in SPLITS]
        assert all(splits)
        assert not any(one & other for one, other in itertools.combinations(splits, 2))
