import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import predicted_tokens
from strangers import edit_manifest, reseal

from memlm.corpus.blocks import IGNORE, SPLITS, Corpus, Split, length_batches
from memlm.errors import ArtifactError


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Documents of two tokens and more; a token's id is its place in the split."""
    lengths = draw(st.lists(st.integers(2, 23), max_size=7))
    block_size = draw(st.integers(2, 9))
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return Split(
        np.arange(offsets[-1], dtype=np.int32),
        offsets,
        block_size=block_size,
        step=draw(st.integers(1, block_size - 1)),
        cross_documents=draw(st.booleans()),
    )


def document_lengths(split: Split) -> list[int]:
    return [int(n) for n in np.diff(split.offsets)]


@settings(deadline=None, max_examples=300)
@given(splits())
def test_every_token_but_each_documents_first_is_predicted_once_in_order_with_its_context(split: Split) -> None:
    expected = predicted_tokens(document_lengths(split))
    found = []
    for block in (split[i] for i in range(len(split))):
        assert 2 <= len(block.input_ids) <= split.block_size
        assert (np.diff(block.input_ids) == 1).all()  # one run of the split
        assert not block.predicted[0]
        for place in np.flatnonzero(block.predicted):
            assert block.first_position + (found_here := int(block.predicted[:place].sum())) == len(found), found_here
            token = int(block.input_ids[place])
            document = int(np.searchsorted(split.offsets, token, side="right") - 1)
            inside = token - int(split.offsets[document])
            available = token if split.cross_documents else inside
            assert place >= min(available, split.block_size - split.step)
            if not split.cross_documents:
                assert place <= inside  # nothing of another document is seen
            found.append((document, inside))
    assert found == expected


@settings(deadline=None)
@given(splits(), st.data())
def test_positions_know_their_token_document_and_label(split: Split, data: st.DataObject) -> None:
    expected = predicted_tokens(document_lengths(split))
    assert split.n_positions == len(expected)
    assert split.n_tokens == len(split.tokens)
    assert split.n_documents == len(document_lengths(split))
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    wanted = [int(split.offsets[d]) + i for d, i in expected]
    assert split.token_indices(start, stop).tolist() == wanted[start:stop]
    assert split.token_indices().tolist() == wanted
    assert split.labels(start, stop).tolist() == [int(split.tokens[i]) for i in wanted[start:stop]]
    assert split.documents_of(np.arange(start, stop)).tolist() == [d for d, _ in expected[start:stop]]


@settings(deadline=None)
@given(splits())
def test_blocks_agree_with_the_tables_about_them(split: Split) -> None:
    blocks = [split[i] for i in range(len(split))]
    assert split.lengths.tolist() == [len(b.input_ids) for b in blocks]
    counts = [int(b.predicted.sum()) for b in blocks]
    assert split.position_starts.tolist() == np.cumsum([0, *counts]).tolist()
    for block, first in zip(blocks, split.position_starts, strict=False):
        labels = block.labels
        assert block.first_position == first
        assert (labels[~block.predicted] == IGNORE).all()
        assert (labels[block.predicted] == block.input_ids[block.predicted]).all()


def test_a_stride_below_the_block_size_is_followed_to_the_letter() -> None:
    split = Split(np.arange(11, dtype=np.int32), np.array([0, 11]), block_size=6, step=2, cross_documents=False)
    assert [split[i].input_ids[split[i].predicted].tolist() for i in range(len(split))] == [
        [1, 2, 3, 4, 5],
        [6, 7],
        [8, 9],
        [10],
    ]
    assert [split[i].input_ids.tolist() for i in range(len(split))] == [
        [0, 1, 2, 3, 4, 5],
        [2, 3, 4, 5, 6, 7],
        [4, 5, 6, 7, 8, 9],
        [5, 6, 7, 8, 9, 10],
    ]


def test_a_block_across_documents_does_not_predict_their_first_tokens() -> None:
    split = Split(np.arange(6, dtype=np.int32), np.array([0, 2, 6]), block_size=6, step=3, cross_documents=True)
    assert len(split) == 1
    assert split[0].labels.tolist() == [IGNORE, 1, IGNORE, 3, 4, 5]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_every_block_once_and_keep_to_the_limit(lengths: list[int], batch_tokens: int) -> None:
    batches = list(length_batches(lengths, batch_tokens))
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens


def test_an_opened_corpus_gives_its_splits(corpus_folder: Path) -> None:
    corpus = Corpus(corpus_folder)
    for name in SPLITS:
        split, facts = corpus.split(name), corpus.manifest.facts["splits"][name]
        assert (split.n_documents, split.n_tokens, split.n_positions) == (
            facts["documents"],
            facts["tokens"],
            facts["positions"],
        )
        assert len(corpus.document_names(name)) == split.n_documents > 0
        assert int(split.tokens.max()) < corpus.vocab_size
    assert corpus.vocab_size == len(corpus.tokenizer)


@pytest.fixture
def copied(corpus_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))


@pytest.mark.parametrize("file", ["train.tokens.npy", "train.offsets.npy"])
def test_a_damaged_split_is_refused(copied: Path, file: str) -> None:
    content = bytearray((copied / file).read_bytes())
    content[-1] ^= 1  # as long as before, so only reading it can tell
    (copied / file).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{file} is damaged: .* run `memlm repair .*/corpus`"):
        Corpus(copied).split("train")


def forge(folder: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    array = np.load(folder / name)
    change(array)
    np.save(folder / name, array)
    reseal(folder, name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train.tokens.npy", lambda tokens: tokens.__setitem__(7, 320), "token id 320, outside the vocabulary of 320"),
        ("train.tokens.npy", lambda tokens: tokens.__setitem__(7, -1), "token id -1, outside"),
        ("train.offsets.npy", lambda offsets: offsets.__setitem__(0, 1), "does not fit train.tokens.npy"),
        ("train.offsets.npy", lambda offsets: offsets.__setitem__(-1, 1 << 40), "does not fit train.tokens.npy"),
        ("train.offsets.npy", lambda offsets: offsets[:3].__setitem__(1, -5), "does not fit train.tokens.npy"),
    ],
)
def test_a_split_that_fits_its_checksum_but_not_itself_is_refused(
    copied: Path, name: str, change: Callable[[np.ndarray], object], message: str
) -> None:
    forge(copied, name, change)
    with pytest.raises(ArtifactError, match=message):
        Corpus(copied).split("train")


def test_counts_and_names_that_do_not_fit_are_refused(copied: Path) -> None:
    (copied / "test.names.txt").write_text("one\n")
    reseal(copied, "test.names.txt")
    with pytest.raises(ArtifactError, match=r"test\.names\.txt has 1 names, which is not one per document"):
        Corpus(copied).document_names("test")
    edit_manifest(copied, lambda manifest: manifest["facts"]["splits"]["train"].update(positions=1))
    with pytest.raises(ArtifactError, match="train has 1 positions; rebuild"):
        Corpus(copied).split("train")
    edit_manifest(copied, lambda manifest: manifest["facts"]["splits"]["train"].update(tokens=10**15))
    with pytest.raises(ArtifactError, match=r"train\.tokens\.npy holds .* expected <i4 of shape 1000000000000000"):
        Corpus(copied).split("train")
    edit_manifest(copied, lambda manifest: manifest["facts"].update(vocab_size=10**9))
    with pytest.raises(ArtifactError, match=r"facts\.vocab_size: .*less than or equal to"):
        Corpus(copied)


def test_a_tokenizer_of_other_files_or_ids_is_refused(copied: Path) -> None:
    edit_manifest(copied, lambda manifest: manifest["facts"].update(vocab_size=400))
    with pytest.raises(ArtifactError, match="tokenizer has 320 token ids, its folder says 400"):
        _ = Corpus(copied).tokenizer
    (copied / "tokenizer" / "tokenization_own.py").write_text("raise SystemExit")
    with pytest.raises(ArtifactError, match=r"tokenization_own\.py is not of a tokenizer's folder"):
        _ = Corpus(copied).tokenizer
