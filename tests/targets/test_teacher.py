"""The teacher beside its neighbours: mixed targets, and what is chosen by held-out text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from interruption import files_written

from memlm.datastore.build import build_datastore
from memlm.datastore.store import Datastore
from memlm.errors import ConfigError, ModelError
from memlm.manifest import read_manifest
from memlm.models.loading import load_causal_lm
from memlm.targets import build as build_module
from memlm.targets.build import build_targets
from memlm.targets.config import TargetsConfig
from memlm.targets.teacher import hear, judge, mixed_targets, with_teacher
from memlm.targets.votes import SparseProbs, neighbor_votes, search_neighbors


def some_votes(positions: int, vocab_size: int, k: int, seed: int) -> SparseProbs:
    rng = torch.Generator().manual_seed(seed)
    distances = torch.rand(positions, k, generator=rng).sort(1).values * 9
    values = torch.randint(0, vocab_size, (positions, k), generator=rng).int()
    return neighbor_votes(distances, values, target_temperature=1.0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.5, 0.9, 1.0]),
    st.integers(1, 12),
    st.integers(0, 999),
)
def test_a_mixed_target_is_the_dense_mixture_cut_to_its_likeliest_tokens(
    positions: int, vocab_size: int, k: int, share: float, mass: float, most: int, seed: int
) -> None:
    votes = some_votes(positions, vocab_size, k, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    log_probs = (2 * torch.randn(positions, vocab_size, generator=rng)).log_softmax(1)
    found = with_teacher(votes, log_probs, teacher_share=share, target_mass=mass, max_support=most)
    dense = share * log_probs.double().exp() + (1 - share) * votes.dense(vocab_size).double()
    for row, kept in enumerate(found.dense(vocab_size).double()):
        ranked = dense[row].sort(descending=True).values
        wanted = min(int((ranked.cumsum(0) - ranked < mass).sum()), most, int((ranked > 1e-7).sum()))
        there = int((kept > 0).sum())
        assert abs(there - wanted) <= 1, "rounding may decide about one token"
        total = ranked[:there].sum()
        torch.testing.assert_close(
            kept.sort(descending=True).values[:there], ranked[:there] / total, rtol=1e-4, atol=1e-6
        )
        assert found.lost_mass[row] == pytest.approx(1 - float(total), abs=1e-5)


@pytest.mark.slow
def test_batches_come_back_in_the_order_of_positions(targets_folder: Path, datastore_folder: Path) -> None:
    store = Datastore(datastore_folder)
    model, split = load_causal_lm(store.teacher, dtype=torch.float32), store.corpus.split("train")
    blocks = np.arange(2, 16)
    (first, end), vocab_size = split.position_starts[[2, 16]].tolist(), store.corpus.vocab_size
    votes = some_votes(end - first, vocab_size, 5, seed=0)
    shares = {"teacher_share": 0.5, "target_mass": 1.0, "max_support": 20}
    found, nats = mixed_targets(votes, hear(model, store.facts.tap, split, blocks, vocab_size), first, **shares)
    number, expected_nats = 0, 0.0
    for block in (split[int(b)] for b in blocks):
        with torch.no_grad():
            logits = model(torch.from_numpy(block.input_ids.astype(np.int64))[None]).logits[0, :, :vocab_size]
        for place in block.places:
            here = torch.tensor([number])
            log_probs = logits[place : place + 1].log_softmax(-1)
            expected_nats -= float(log_probs[0, int(block.input_ids[place + 1])])
            expected = with_teacher(votes.take(here), log_probs, **shares)
            torch.testing.assert_close(
                found.take(here).dense(vocab_size), expected.dense(vocab_size), rtol=1e-3, atol=1e-5
            )
            number += 1
    assert number == len(found.counts)
    assert nats == pytest.approx(expected_nats, rel=1e-4)


def test_what_is_judged_is_what_teacher_and_neighbours_say_of_each_label(datastore_folder: Path) -> None:
    store = Datastore(datastore_folder)
    model = load_causal_lm(store.teacher, dtype=torch.float32)
    text = store.corpus.split("validation")
    judged = judge(store, model, "validation", k=6, positions=10**6)
    heard = list(hear(model, store.facts.tap, text, np.arange(len(text)), store.corpus.vocab_size))
    labels = torch.cat([part.labels for part in heard])
    order = np.concatenate([part.positions for part in heard])
    assert labels.tolist() == text.labels()[order].tolist()
    teacher = torch.cat([part.log_probs for part in heard])[torch.arange(len(labels)), labels].exp()
    torch.testing.assert_close(judged.teacher, teacher)
    distances, ids = search_neighbors(store, torch.cat([p.keys for p in heard]).half().float().numpy(), None, k=6)
    values = torch.from_numpy(store.values[ids].astype(np.int32))
    assert len(judged.neighbours) == 9
    for temperature, found in judged.neighbours.items():
        votes = neighbor_votes(torch.from_numpy(distances), values, target_temperature=temperature)
        torch.testing.assert_close(found, votes.of(labels), rtol=1e-4, atol=1e-6)
    temperature, share = judged.best()
    chosen = judged.nats(temperature, share)
    assert chosen <= min(judged.nats(t, s) for t in judged.neighbours for s in (0.0, 0.1, 0.5, 0.9)) + 1e-9


def test_a_position_of_the_training_text_is_no_neighbour_of_its_own(datastore_folder: Path) -> None:
    store = Datastore(datastore_folder)
    model = load_causal_lm(store.teacher, dtype=torch.float32)
    judged = judge(store, model, "train", k=1, positions=50, temperature=1.0)
    assert list(judged.neighbours) == [1.0]
    assert judged.neighbours[1.0].mean() < 1, "itself would foresee each label"


def test_the_temperature_is_chosen_and_told(datastore_folder: Path, tmp_path: Path) -> None:
    facts = build_targets(datastore_folder, out=tmp_path / "t", k=8, judged_positions=40).facts
    judged = facts["judged"]
    assert f"{facts['target_temperature']:g}" == min(judged["perplexities"], key=judged["perplexities"].get)
    assert judged["validation"]["mixed"] <= judged["validation"]["teacher"]
    assert judged["train"]["positions"] >= 40
    fixed = build_targets(datastore_folder, out=tmp_path / "f", k=8, target_temperature=facts["target_temperature"])
    assert "judged" not in fixed.facts
    ours, theirs = (sorted((tmp_path / name).glob("train-*.arrow")) for name in "tf")
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


@pytest.mark.parametrize("share", [0.25, 1.0, "auto"])
def test_targets_have_the_share_of_the_teacher(datastore_folder: Path, tmp_path: Path, share: float | str) -> None:
    config = TargetsConfig(k=8, target_temperature=2.0, teacher_share=share, max_support=30, target_mass=1.0)
    facts = build_targets(datastore_folder, out=tmp_path / "t", config=config).facts
    plain = build_targets(datastore_folder, out=tmp_path / "p", k=8, target_temperature=2.0).facts
    if share == "auto":
        assert facts["teacher_share"] == pytest.approx(1 - facts["judged"]["neighbours_share"])
    else:
        assert facts["teacher_share"] == share
    assert facts["mean_support"] > plain["mean_support"]
    assert facts["mean_support"] <= 30


def test_a_stopped_run_keeps_its_choice(
    datastore_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with files_written("train-*", most=0):
        build_targets(datastore_folder, out=tmp_path / "t", k=8)
    chosen = json.loads((tmp_path / "t" / "chosen.json").read_text())
    monkeypatch.setattr(build_module, "judge", lambda *args, **kwargs: pytest.fail("it was chosen before"))
    facts = build_targets(datastore_folder, out=tmp_path / "t", k=8).facts
    assert facts["target_temperature"] == chosen["target_temperature"]
    assert not (tmp_path / "t" / "chosen.json").exists()


def test_without_held_out_text_the_training_text_judges(tmp_path: Path, documents: str, model_folder: str) -> None:
    corpus = make_corpus(documents, model_folder, tmp_path / "c", validation_fraction=0.0)
    build_datastore(corpus, teacher=model_folder, out=tmp_path / "d")
    facts = build_targets(tmp_path / "d", out=tmp_path / "t", k=8).facts
    assert next(iter(facts["judged"])) == "train"


def test_choosing_needs_the_teacher(tmp_path: Path, corpus_folder: Path, model_folder: str) -> None:
    moved = tmp_path / "teacher"
    moved.symlink_to(model_folder)
    build_datastore(corpus_folder, teacher=str(moved), out=tmp_path / "d")
    moved.unlink()
    with pytest.raises(ModelError, match=r"asks for its teacher .* give --teacher"):
        build_targets(tmp_path / "d", out=tmp_path / "t", k=8)
    build_targets(tmp_path / "d", out=tmp_path / "t", k=8, target_temperature=3.0)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "some"])
def test_a_share_is_in_range(share: float | str) -> None:
    with pytest.raises(ConfigError, match="teacher_share"):
        TargetsConfig.parse({"teacher_share": share})


def test_settings_that_decide_nothing_are_not_recorded(datastore_folder: Path, tmp_path: Path) -> None:
    assert TargetsConfig(target_temperature=4.0).model_dump().keys() == {
        "k",
        "target_temperature",
        "exclude_document",
        "target_mass",
    }
    build_targets(datastore_folder, out=tmp_path / "t", k=8, target_temperature=4.0)
    assert TargetsConfig.parse(read_manifest(tmp_path / "t").config).target_temperature == 4.0
    assert TargetsConfig.parse({"teacher_share": "0.3"}).teacher_share == 0.3
