import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import tiny_model
from interruption import files_written
from reference import brute_neighbors, dense_votes

import memlm.stage
from memlm.corpus.blocks import Corpus
from memlm.corpus.build import build_corpus
from memlm.corpus.config import CorpusConfig
from memlm.datastore.build import build_datastore
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.store import Datastore
from memlm.errors import ArtifactError, ConfigError, InputError, ModelError
from memlm.manifest import Manifest, read_manifest
from memlm.stage import run_stage
from memlm.targets import build as build_module
from memlm.targets.build import build_targets, import_released, plan_targets
from memlm.targets.config import TargetsConfig
from memlm.targets.votes import SparseProbs, retrieve

VOCABULARY = 320
Position = tuple[int, list[int], np.ndarray]
"""Label, token ids and probabilities."""


def build(store: Path, out: Path, **config: object) -> Manifest:
    settings = TargetsConfig.parse({"k": 16, "target_temperature": 4.0, **config})
    return build_targets(store, out=out, config=settings)


def rows(folder: Path) -> list[dict]:
    files = sorted(folder.glob("train-*.arrow"))
    return [row for file in files for row in datasets.Dataset.from_file(str(file))]


def positions(folder: Path) -> list[Position]:
    """Each position's target, in the order of rows, read as slowly and plainly as can be."""
    found = []
    for row in rows(folder):
        at = 0
        for token, count in zip(row["input_ids"], row["target_counts"], strict=True):
            if count:
                found.append(
                    (token, row["target_ids"][at : at + count], np.array(row["target_probs"][at : at + count]))
                )
                at += count
        assert at == len(row["target_ids"]) == len(row["target_probs"])
    return found


def dense(found: list[Position]) -> np.ndarray:
    table = np.zeros((len(found), VOCABULARY))
    for p, (_, ids, probs) in enumerate(found):
        table[p, ids] = probs / probs.sum()
    return table


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Total variation distance of each pair of rows."""
    return np.abs(first - second).sum(1) / 2


def test_rows_are_the_blocks_and_positions_carry_the_votes_of_their_neighbours(
    targets_folder: Path, datastore_folder: Path
) -> None:
    store = Datastore(datastore_folder)
    split = store.corpus.split("train")
    found = rows(targets_folder)
    assert len(found) == len(split)
    for row, block in zip(found, (split[i] for i in range(len(split))), strict=True):
        assert row["input_ids"] == block.input_ids.tolist()
        assert (np.array(row["target_counts"]) > 0).tolist() == block.predicted.tolist()
    targets = positions(targets_folder)
    assert [label for label, _, _ in targets] == split.labels().tolist()
    keys = store.keys.rows(0, store.n_entries)  # type: ignore[union-attr]
    chosen = np.random.default_rng(0).choice(store.n_entries, 40, replace=False)
    distances, ids = brute_neighbors(keys, keys[chosen], 17, [{int(i)} for i in chosen])
    clear = distances[:, 16] - distances[:, 15] > 1e-3  # otherwise either of two may be the sixteenth neighbour
    assert clear.sum() > 30
    expected, _ = dense_votes(
        distances[:, :16], store.values[ids[:, :16]], vocab_size=VOCABULARY, target_temperature=4.0, target_mass=0.999
    )
    # probabilities are kept in float16 (2**-11 of a value); 1e-3 more where one token more or less makes up the mass
    assert difference(dense(targets)[chosen], expected)[clear].max() < 2e-3


def test_the_folder_loads_with_datasets(targets_folder: Path) -> None:
    loaded = datasets.Dataset.from_file(str(targets_folder / "train-00000.arrow"))
    assert loaded.column_names == ["input_ids", "target_counts", "target_ids", "target_probs"]
    assert [loaded.features[name].feature.dtype for name in loaded.column_names] == ["int32"] * 3 + ["float16"]


def test_validation_blocks_and_tokenizer_are_in_the_folder(targets_folder: Path, corpus_folder: Path) -> None:
    corpus = Corpus(corpus_folder)
    split = corpus.split("validation")
    found = datasets.Dataset.from_file(str(targets_folder / "validation.arrow"))
    assert [row["input_ids"] for row in found] == [split[i].input_ids.tolist() for i in range(len(split))]
    assert [row["labels"] for row in found] == [split[i].labels.tolist() for i in range(len(split))]
    for file in (corpus_folder / "tokenizer").iterdir():
        assert (targets_folder / "tokenizer" / file.name).read_bytes() == file.read_bytes()


def test_the_facts_are_means_over_positions(targets_folder: Path, datastore_folder: Path, corpus_folder: Path) -> None:
    manifest, found = read_manifest(targets_folder, "targets"), positions(targets_folder)
    facts = manifest.facts
    assert facts["positions"] == len(found)
    assert facts["mean_support"] == pytest.approx(np.mean([len(ids) for _, ids, _ in found]), abs=1e-3)  # three digits
    assert facts["mean_top1"] == pytest.approx(np.mean([probs[0] for _, _, probs in found]), abs=1e-3)  # float16
    assert 0 <= facts["mean_lost_mass"] <= 1e-3
    labels = Corpus(corpus_folder).split("train").labels()
    likeliest = [ids[0] == label for (_, ids, _), label in zip(found, labels, strict=True)]
    kept = [label in ids for (_, ids, _), label in zip(found, labels, strict=True)]
    assert 0.2 < np.mean(likeliest) < np.mean(kept) < 1
    assert (facts["label_likeliest"], facts["label_kept"]) == pytest.approx(
        (np.mean(likeliest), np.mean(kept)), abs=1e-4
    )
    assert facts["vocab_size"] == VOCABULARY
    assert manifest.inputs == {"datastore": read_manifest(datastore_folder).hash}
    assert not [name for name in manifest.payload if name.startswith("stats")]


def test_less_mass_keeps_fewer_tokens_and_tells_what_is_lost(
    datastore_folder: Path, targets_folder: Path, tmp_path: Path
) -> None:
    cut = build(datastore_folder, tmp_path / "cut", target_mass=0.5).facts
    whole = read_manifest(targets_folder).facts
    assert cut["mean_support"] < whole["mean_support"]
    assert 0.01 < cut["mean_lost_mass"] < 0.5
    assert cut["mean_top1"] > whole["mean_top1"]


def test_neighbours_of_the_own_document_can_be_left_out(
    datastore_folder: Path, targets_folder: Path, tmp_path: Path
) -> None:
    store = Datastore(datastore_folder)
    build(datastore_folder, tmp_path / "t", exclude_document=True)
    keys = store.keys.rows(0, store.n_entries)  # type: ignore[union-attr]
    document = store.corpus.split("train").documents_of(np.arange(store.n_entries))
    chosen = np.random.default_rng(1).choice(store.n_entries, 20, replace=False)
    excluded = [set(np.flatnonzero(document == document[i]).tolist()) for i in chosen]
    distances, ids = brute_neighbors(keys, keys[chosen], 17, excluded)
    clear = distances[:, 16] - distances[:, 15] > 1e-3
    assert clear.sum() > 14
    expected, _ = dense_votes(
        distances[:, :16], store.values[ids[:, :16]], vocab_size=VOCABULARY, target_temperature=4.0, target_mass=0.999
    )
    found = dense(positions(tmp_path / "t"))
    assert difference(found[chosen], expected)[clear].max() < 2e-3
    assert difference(found, dense(positions(targets_folder))).max() > 0.1  # it matters


def test_the_chunk_of_queries_changes_a_float16_step_at_most(
    datastore_folder: Path, targets_folder: Path, tmp_path: Path
) -> None:
    plan = plan_targets(datastore_folder, config=TargetsConfig(k=16, target_temperature=4.0), positions_at_once=37)
    run_stage(tmp_path / "t", *plan)
    for found, expected in zip(rows(tmp_path / "t"), rows(targets_folder), strict=True):
        probs = [np.array(row.pop("target_probs"), np.float16) for row in (found, expected)]
        assert found == expected
        np.testing.assert_array_max_ulp(*probs, maxulp=1, dtype=np.float16)  # products of other shapes round otherwise


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    datastore_folder: Path, targets_folder: Path, tmp_path: Path, stop_at: int
) -> None:
    whole = read_manifest(targets_folder)
    assert len([name for name in whole.payload if name.startswith("train-")]) > 2
    with files_written("train-*", most=stop_at):
        build(datastore_folder, tmp_path / "t")
    with files_written() as written:
        resumed = build(datastore_folder, tmp_path / "t")
    assert written[0] == f"train-{stop_at:05d}.arrow"
    assert resumed.payload == whole.payload
    assert resumed.hash == whole.hash


def test_a_search_stopped_in_the_middle_of_a_shard_keeps_what_was_found_and_says_so(
    datastore_folder: Path, targets_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_targets(
        datastore_folder,
        config=TargetsConfig(k=16, target_temperature=4.0),
        positions_at_once=50,
        keep_seconds=0,
    )
    whole = run_stage(tmp_path / "whole", *plan)
    searched: list[int] = []

    def stopping(store: Datastore, queries: torch.Tensor, own: np.ndarray, **settings: Any) -> SparseProbs:
        if len(searched) == 3:
            raise KeyboardInterrupt
        searched.append(len(own))
        return retrieve(store, queries, own, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "retrieve", stopping)
        with pytest.raises(KeyboardInterrupt) as stop:
            run_stage(tmp_path / "t", *plan)
        total = whole.facts["positions"]
        assert stop.value.__notes__ == [f"{tmp_path}/t keeps the targets of 150 of {total:,} positions"]
        searched += [0]
        resumed = run_stage(tmp_path / "t", *plan)
    assert sum(searched[3:]) == total - 150
    assert resumed.hash == whole.hash


def test_a_run_stopped_while_its_files_are_hashed_loses_nothing(
    datastore_folder: Path, targets_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(memlm.stage, "file_digest", stopped)
        with pytest.raises(KeyboardInterrupt):
            build(datastore_folder, tmp_path / "t")
    with files_written("train-*") as written:
        assert build(datastore_folder, tmp_path / "t").hash == read_manifest(targets_folder).hash
    assert not written


def test_a_k_above_the_datastore_is_refused_before_any_work(datastore_folder: Path, tmp_path: Path) -> None:
    entries = Datastore(datastore_folder).n_entries
    with pytest.raises(ConfigError, match=rf"k = {entries} is larger than the {entries - 1} other entries"):
        build(datastore_folder, tmp_path / "t", k=entries)
    assert list(tmp_path.iterdir()) == []


def test_every_other_entry_may_be_a_neighbour(documents: str, model_folder: str, tmp_path: Path) -> None:
    small = CorpusConfig(document_separator="\n\n", block_size=32, max_tokens=600)
    build_corpus([documents], tokenizer=model_folder, out=tmp_path / "c", config=small)
    build_datastore(tmp_path / "c", teacher=model_folder, out=tmp_path / "d", config=DatastoreConfig(dtype="float32"))
    entries = Datastore(tmp_path / "d").n_entries
    manifest = build(tmp_path / "d", tmp_path / "t", k=entries - 1, target_temperature=1e6, target_mass=1.0)
    table = dense(positions(tmp_path / "t"))
    values = np.bincount(Datastore(tmp_path / "d").values, minlength=VOCABULARY)
    labels = Datastore(tmp_path / "d").values
    for p in (0, entries // 2, entries - 1):  # so flat that all entries but the own one count the same
        expected = (values - np.eye(VOCABULARY)[labels[p]]) / (entries - 1)
        np.testing.assert_allclose(table[p], expected, rtol=2e-3, atol=1e-6)  # float16, and distances over 1e6
    assert manifest.facts["mean_lost_mass"] < 1e-5


@pytest.mark.slow
def test_a_datastore_without_keys_gives_nearly_the_same_targets(
    corpus_folder: Path, model_folder: str, targets_folder: Path, tmp_path: Path
) -> None:
    settings = DatastoreConfig(dtype="float32", keep_keys=False, recall_k=16, code_bytes=8)
    shutil.copytree(model_folder, tmp_path / "teacher")
    build_datastore(corpus_folder, teacher=str(tmp_path / "teacher"), out=tmp_path / "d", config=settings)
    build(tmp_path / "d", tmp_path / "t")
    approximate, exact = positions(tmp_path / "t"), positions(targets_folder)
    assert [label for label, _, _ in approximate] == [label for label, _, _ in exact]
    distances = difference(dense(approximate), dense(exact))
    shifted = difference(np.roll(dense(approximate), 1, axis=0), dense(exact))
    assert distances.mean() < 0.35 < 0.6 < shifted.mean()  # codes blur distances, but each position has its own target
    tiny_model(328, seed=9).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ArtifactError, match=r"/d: '.*teacher' is not .*the teacher that made it; give --teacher"):
        build(tmp_path / "d", tmp_path / "t2")


def test_a_datastore_without_keys_finds_its_teacher_from_any_folder_or_says_who_asks_for_it(
    corpus_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    settings = DatastoreConfig(dtype="float32", keep_keys=False, recall_k=4, code_bytes=8, nlist=2)
    build_datastore(corpus_folder, teacher="teacher", out="d", config=settings)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made = build_targets(tmp_path / "d", out="t", k=4)
    assert made.sources["teacher"] == str(tmp_path / "teacher")
    (tmp_path / "teacher").rename(tmp_path / "moved")
    with pytest.raises(
        ModelError, match=r"datastore .*/d asks for its teacher '.*/teacher': .*; give --teacher"
    ) as error:
        build_targets(tmp_path / "d", out="t2", k=4)
    assert "\n" not in str(error.value)
    again = build_targets(tmp_path / "d", out="t2", k=4, teacher="../moved")
    assert again.payload == made.payload
    assert again.hash == made.hash
    other = tiny_model(328, seed=9)
    other.save_pretrained(tmp_path / "moved")
    with pytest.raises(ArtifactError, match=r"d: '../moved' is not .*the teacher that made it"):
        build_targets(tmp_path / "d", out="t3", k=4, teacher="../moved")


def test_an_index_that_probes_too_little_still_finds_each_position_a_neighbour(
    corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    settings = DatastoreConfig(dtype="float32", index="ivf-flat", nlist=400, nprobe=1, recall_k=4)
    build_datastore(corpus_folder, teacher=model_folder, out=tmp_path / "d", config=settings)
    manifest = build(tmp_path / "d", tmp_path / "t")
    assert manifest.facts["positions"] == Datastore(tmp_path / "d").n_entries


def test_a_truncated_shard_of_the_datastore_is_refused(datastore_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(datastore_folder, tmp_path / "d")
    values = tmp_path / "d" / "values.npy"
    values.write_bytes(values.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"values\.npy has \d+ bytes"):
        build(tmp_path / "d", tmp_path / "t")


RELEASED = pa.schema(
    {"id_cnt": pa.int32(), "token_id": pa.list_(pa.int32()), "prob": pa.list_(pa.float16()), "label": pa.int32()}
)


def released_columns(folder: Path) -> dict[str, list]:
    found = positions(folder)
    return {
        "id_cnt": [len(ids) for _, ids, _ in found],
        "token_id": [ids for _, ids, _ in found],
        "prob": [probs.astype(np.float16) for _, _, probs in found],
        "label": [label for label, _, _ in found],
    }


def write_released(columns: dict[str, list], path: Path) -> Path:
    table = pa.table({name: pa.array(column, RELEASED.field(name).type) for name, column in columns.items()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return path


def test_a_released_file_is_read_back(targets_folder: Path, corpus_folder: Path, tmp_path: Path) -> None:
    file = write_released(released_columns(targets_folder), tmp_path / "released.arrow")
    manifest = import_released(corpus_folder, file, out=tmp_path / "t", shard_positions=150)
    found, original = positions(tmp_path / "t"), positions(targets_folder)
    assert len(list((tmp_path / "t").glob("train-*.arrow"))) > 2
    assert [(label, ids) for label, ids, _ in found] == [(label, ids) for label, ids, _ in original]
    for (_, _, ours), (_, _, theirs) in zip(found, original, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-7)  # renormalised, then float16 again
    assert [row["input_ids"] for row in rows(tmp_path / "t")] == [row["input_ids"] for row in rows(targets_folder)]
    assert manifest.facts["mean_support"] == read_manifest(targets_folder).facts["mean_support"]
    assert (tmp_path / "t" / "validation.arrow").read_bytes() == (targets_folder / "validation.arrow").read_bytes()
    assert import_released(corpus_folder, file, out=tmp_path / "t") == manifest


def test_other_columns_of_a_released_file_are_not_unpacked(
    targets_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    plain = write_released(released_columns(targets_folder), tmp_path / "plain.arrow")
    table = pa.ipc.open_stream(plain.read_bytes()).read_all()
    junk = pa.array([b"\0" * (64 << 20), *[b""] * (len(table) - 1)], pa.binary())
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    packed = tmp_path / "packed.arrow"
    with pa.OSFile(str(packed), "wb") as file:
        table = table.append_column("junk", junk)
        with pa.ipc.new_stream(file, table.schema, options=options) as writer:
            writer.write_table(table)
    del table, junk
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        made = import_released(corpus_folder, packed, out=tmp_path / "t")
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 32 << 20
    assert made.payload == import_released(corpus_folder, plain, out=tmp_path / "t2").payload


def test_a_released_file_may_list_tokens_in_any_order(
    targets_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    columns = released_columns(targets_folder)
    backwards = {**columns, **{name: [row[::-1] for row in columns[name]] for name in ("token_id", "prob")}}
    import_released(corpus_folder, write_released(backwards, tmp_path / "r.arrow"), out=tmp_path / "t")
    found = positions(tmp_path / "t")
    assert all((np.diff(probs) <= 0).all() for _, _, probs in found)
    np.testing.assert_allclose(dense(found), dense(positions(targets_folder)), rtol=2e-3, atol=1e-7)


def test_probabilities_of_a_released_file_need_not_add_up(
    targets_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    columns = released_columns(targets_folder)
    columns["prob"] = [probs * np.float16(0.5) for probs in columns["prob"]]
    import_released(corpus_folder, write_released(columns, tmp_path / "r.arrow"), out=tmp_path / "t")
    assert all(probs.sum() == pytest.approx(1, abs=5e-3) for _, _, probs in positions(tmp_path / "t"))  # float16 sums


def test_a_released_file_of_other_text_is_refused(targets_folder: Path, corpus_folder: Path, tmp_path: Path) -> None:
    columns = released_columns(targets_folder)
    count = len(columns["label"])
    changed = {**columns, "label": [*columns["label"][:7], 319 - columns["label"][7], *columns["label"][8:]]}
    fewer = {name: column[:-1] for name, column in columns.items()}
    for wrong, message in ((changed, "they differ in position 7"), (fewer, "they differ in their number")):
        file = write_released(wrong, tmp_path / "r.arrow")
        with pytest.raises(InputError, match=rf"{len(wrong['label']):,} labels, corpus .* {count:,} .*{message}"):
            import_released(corpus_folder, file, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("id_cnt", lambda column: [column[0] + 1, *column[1:]], "id_cnt does not fit the lengths of token_id and prob"),
        ("id_cnt", lambda column: [column[0] + 1, column[1] - 1, *column[2:]], "id_cnt does not fit"),
        ("prob", lambda column: [column[0][:0], *column[1:]], "id_cnt does not fit"),
        (
            "token_id",
            lambda column: [[VOCABULARY] * len(column[0]), *column[1:]],
            "token id 320 is outside the vocabulary of 320",
        ),
        (
            "token_id",
            lambda column: [[-1] * len(column[0]), *column[1:]],
            "token id -1 is outside the vocabulary of 320",
        ),
        (
            "prob",
            lambda column: [column[0] * np.float16("nan"), *column[1:]],
            "prob holds no distribution at position 0",
        ),
        (
            "prob",
            lambda column: [*column[:9], -column[9], *column[10:]],
            "prob holds no distribution at position 9",
        ),
        (
            "prob",
            lambda column: [*column[:-1], column[-1] * np.float16(0)],
            r"prob holds no distribution at position \d+",
        ),
    ],
)
def test_a_damaged_released_file_is_refused(
    targets_folder: Path, corpus_folder: Path, tmp_path: Path, column: str, change, message: str
) -> None:
    columns = released_columns(targets_folder)
    file = write_released({**columns, column: change(columns[column])}, tmp_path / "r.arrow")
    with pytest.raises(InputError, match=message):
        import_released(corpus_folder, file, out=tmp_path / "t")


def test_a_file_that_is_no_released_one_is_refused(corpus_folder: Path, targets_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has columns input_ids, .*; expected id_cnt, label, prob, token_id"):
        import_released(corpus_folder, targets_folder / "train-00000.arrow", out=tmp_path / "t")
    (tmp_path / "text.arrow").write_text(json.dumps({"id_cnt": 3}))
    for name in ("text.arrow", "nothing.arrow"):
        with pytest.raises(InputError, match=rf"{name} is no Arrow stream"):
            import_released(corpus_folder, tmp_path / name, out=tmp_path / "t")
