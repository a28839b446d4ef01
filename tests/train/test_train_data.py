"""Training rows, batches, and the order in which rows are seen."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strangers import reseal

from memlm.corpus.blocks import IGNORE, Corpus
from memlm.errors import ArtifactError, ConfigError
from memlm.train.data import LengthGroupedSampler, TrainingData, collate


def test_rows_of_a_corpus_and_of_its_targets_hold_the_same_tokens_and_labels(
    corpus_folder: Path, targets_folder: Path
) -> None:
    plain = TrainingData(corpus_folder, with_targets=False).train
    dressed = TrainingData(targets_folder, with_targets=True).train
    assert len(plain) == len(dressed) > 10
    np.testing.assert_array_equal(plain.lengths, dressed.lengths)
    for i in range(len(plain)):
        np.testing.assert_array_equal(plain[i]["input_ids"], dressed[i]["input_ids"])
        np.testing.assert_array_equal(plain[i]["labels"], dressed[i]["labels"])


def test_every_position_of_the_training_split_is_a_label_once(corpus_folder: Path, targets_folder: Path) -> None:
    rows = TrainingData(targets_folder, with_targets=True).train
    labels = np.concatenate([rows[i]["labels"] for i in range(len(rows))])
    np.testing.assert_array_equal(labels[labels != IGNORE], Corpus(corpus_folder).split("train").labels())


def test_validation_blocks_are_the_same_from_a_corpus_and_from_its_targets(
    corpus_folder: Path, targets_folder: Path
) -> None:
    ours = TrainingData(corpus_folder, with_targets=False).validation
    theirs = TrainingData(targets_folder, with_targets=True).validation
    assert len(ours) == len(theirs) > 0
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    for i in range(len(ours)):
        np.testing.assert_array_equal(ours[i].input_ids, theirs[i].input_ids)
        np.testing.assert_array_equal(ours[i].labels, theirs[i].labels)


def test_targets_sum_to_one_for_every_predicted_token(targets_folder: Path) -> None:
    rows = TrainingData(targets_folder, with_targets=True).train
    for i in range(len(rows)):
        row = rows[i]
        assert len(row["target_counts"]) == (row["labels"] != IGNORE).sum()
        owner = np.repeat(np.arange(len(row["target_counts"])), row["target_counts"])
        sums = np.bincount(owner, weights=row["target_probs"].astype(np.float64))
        # up to 16 probabilities, each rounded to float16 (relative error 2^-11): their sum is off by 2^-11 at most
        np.testing.assert_allclose(sums, 1, atol=2**-11)


def test_a_corpus_has_no_targets_to_give(corpus_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a corpus without targets: .*leave out --kl-weight"):
        TrainingData(corpus_folder, with_targets=True)


def test_a_folder_of_another_stage_is_refused(datastore_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="is a datastore folder, expected targets or corpus"):
        TrainingData(datastore_folder, with_targets=True)


def test_a_shard_that_is_no_arrow_file_is_refused(targets_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(targets_folder, tmp_path / "targets")
    shard = folder / "train-00000.arrow"
    shard.write_bytes(b"\0" * shard.stat().st_size)  # the size in the manifest still fits
    with pytest.raises(ArtifactError, match=r"train-00000\.arrow is damaged: .* run `memlm repair "):
        TrainingData(folder, with_targets=True).train  # noqa: B018
    reseal(folder, shard.name)
    with pytest.raises(ArtifactError, match="cannot be read as Arrow"):
        TrainingData(folder, with_targets=True).train  # noqa: B018


def test_collate_pads_on_the_right_and_joins_targets_in_reading_order() -> None:
    def row(tokens: list[int], labels: list[int], counts: list[int], first: int) -> dict[str, np.ndarray]:
        ids = np.arange(first, first + sum(counts), dtype=np.int32)
        probs = np.full(sum(counts), 0.5, np.float16)
        return {
            "input_ids": np.array(tokens, np.int32),
            "labels": np.array(labels),
            "target_counts": np.array(counts, np.int32),
            "target_ids": ids,
            "target_probs": probs,
        }

    batch = collate([row([1, 2, 3], [IGNORE, 2, 3], [2, 1], 10), row([4, 5], [IGNORE, 5], [3], 20)])
    assert batch["input_ids"][0].tolist() == [1, 2, 3]
    assert batch["input_ids"][1, :2].tolist() == [4, 5]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [IGNORE, 5, IGNORE]]
    assert batch["target_counts"].tolist() == [2, 1, 3]
    assert batch["target_ids"].tolist() == [10, 11, 12, 20, 21, 22]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["target_probs"].dtype == torch.float16


def test_collate_without_targets_gives_tokens_labels_and_places_only() -> None:
    batch = collate([{"input_ids": np.array([1, 2], np.int32), "labels": np.array([IGNORE, 2])}])
    assert set(batch) == {"input_ids", "labels", "places"}
    assert batch["places"].tolist() == [0]


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=90),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    pool=st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_every_row_is_seen_once_an_epoch(lengths: list[int], batch_size: int, seed: int, epoch: int, pool: int) -> None:
    sampler = LengthGroupedSampler(np.array(lengths), batch_size, seed, pool)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)
    torch.manual_seed(epoch + 1)  # the global generators take no part
    np.random.default_rng(1).random()
    again = LengthGroupedSampler(np.array(lengths), batch_size, seed, pool)
    again.set_epoch(epoch)
    assert list(again) == order


def test_the_order_changes_with_seed_and_with_epoch() -> None:
    lengths = np.random.default_rng(0).integers(2, 33, 200)

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(lengths, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_rows_of_one_batch_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(2, 513, 1024)

    def padding(order: list[int]) -> float:
        batches = lengths[np.array(order)].reshape(-1, 8)
        return float((batches.max(1, keepdims=True) - batches).sum() / batches.sum())

    grouped = padding(list(LengthGroupedSampler(lengths, 8, 0)))
    shuffled = padding(np.random.default_rng(0).permutation(len(lengths)).tolist())
    # a pool of 256 sorted rows leaves about 510/256*7/2 = 7 tokens of padding per row of 257; by chance it is over 200
    assert grouped < 0.05 < 0.5 < shuffled


def test_batches_come_in_random_order_not_longest_first() -> None:
    lengths = np.random.default_rng(0).integers(2, 513, 256)
    first_of_batches = lengths[np.array(list(LengthGroupedSampler(lengths, 8, 0)))][::8]
    assert (np.diff(first_of_batches) > 0).sum() > 5  # sorted batches would never grow
