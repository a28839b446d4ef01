"""RetrievalMemory beyond the shared protocol: it says what targets say, and knows when its datastore is another."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_model, tiny_model
from numpy.typing import NDArray
from reference import brute_neighbors, dense_votes
from reference_lm import dense_targets, mixed_probs
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from memlm.corpus.blocks import Corpus
from memlm.datastore.build import build_datastore
from memlm.datastore.config import DatastoreConfig
from memlm.errors import ArtifactError, ConfigError, ModelError
from memlm.memory.loading import load_memory
from memlm.memory.retrieval import RetrievalMemory
from memlm.memory.voter import VoterCache
from memlm.mix.mixed_lm import MixedLM
from memlm.models.loading import load_causal_lm
from memlm.models.taps import TapReader
from memlm.targets.build import build_targets
from memlm.targets.config import RetrievalConfig, TargetsConfig
from memlm.train.data import TrainingData

VOCAB = 320
FEW = RetrievalConfig(k=16, target_temperature=4.0)


@pytest.fixture(scope="module")
def memory(datastore_folder: Path) -> RetrievalMemory:
    """Reads the base's activations."""
    return RetrievalMemory(datastore_folder, FEW)


@pytest.fixture(scope="module")
def inner(corpus_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore with inverted lists whose tap lies in the first of two blocks."""
    out = tmp_path_factory.mktemp("inner") / "datastore"
    config = DatastoreConfig(dtype="float32", tap="0.5", index="ivf-flat", nlist=20, nprobe=3, recall_k=4)
    build_datastore(corpus_folder, teacher=model_folder, out=out, config=config)
    return out


def all_keys(memory: RetrievalMemory) -> NDArray[np.float32]:
    assert memory.store.keys is not None
    return memory.store.keys.rows(0, memory.store.n_entries)


def unseen(corpus_folder: Path, rows: int = 3, length: int = 20) -> Tensor:
    """Text that the datastore does not hold."""
    tokens = Corpus(corpus_folder).split("test").tokens[: rows * length]
    return torch.from_numpy(np.array(tokens, np.int64)).reshape(rows, length)


def at_tap(model_folder: str, memory: RetrievalMemory, tokens: Tensor) -> Tensor:
    reader = TapReader(load_causal_lm(model_folder), memory.store.manifest.facts["tap"])
    return reader.read(tokens)


def dense_rows(memory: RetrievalMemory, state: Tensor) -> NDArray[np.float32]:
    return memory.retrieve(state.flatten(0, -2)).dense(VOCAB).numpy()


# --- it says what targets say -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("exclude_document", [False, True])
def test_asked_about_its_own_corpus_it_gives_the_stored_targets(
    memory: RetrievalMemory, datastore_folder: Path, model_folder: str, tmp_path: Path, exclude_document: bool
) -> None:
    """Probabilities are kept in float16: 2**-11 of a value that is 1 at most."""
    config = TargetsConfig(k=16, target_temperature=4.0, target_mass=1.0, exclude_document=exclude_document)
    build_targets(datastore_folder, out=tmp_path / "t", config=config)
    rows = TrainingData(tmp_path / "t", with_targets=True).train
    stored = {name: np.concatenate([rows[i][name] for i in range(len(rows))]) for name in TARGETS}
    expected = dense_targets(*(torch.from_numpy(stored[name]) for name in TARGETS), vocab_size=VOCAB)

    own = np.arange(memory.store.n_entries)
    kept = memory.retrieve(torch.from_numpy(all_keys(memory)), own, exclude_document=exclude_document)
    torch.testing.assert_close(kept.dense(VOCAB).double(), expected, rtol=0, atol=2**-11)

    split = memory.store.corpus.split("train")
    for number in (0, 1, len(split) - 1):  # read by the model now
        block = split[number]
        state = at_tap(model_folder, memory, torch.from_numpy(block.input_ids[None].astype(np.int64)))[0]
        before = np.flatnonzero(block.predicted) - 1
        numbers = block.first_position + np.arange(len(before))
        live = memory.retrieve(state[before], numbers, exclude_document=exclude_document)
        # float32 sums of another batch may round a key to its neighbour in float16, 0.001 of one value in 32
        torch.testing.assert_close(live.dense(VOCAB).double(), expected[numbers], rtol=0, atol=2e-3)


TARGETS = ("target_counts", "target_ids", "target_probs")


def test_without_exclusion_an_entry_finds_itself(memory: RetrievalMemory) -> None:
    distances, ids = memory.neighbors(torch.from_numpy(all_keys(memory)[:40]), 3)
    # float32: a difference of squares of some 30 leaves 1e-5 where the distance is zero
    assert (distances[:, 0] < 1e-4).all()
    assert (ids[:, 0] == np.arange(40)).mean() > 0.5  # equal keys may stand before it


def test_its_votes_are_those_of_a_brute_force_knn_lm(
    memory: RetrievalMemory, corpus_folder: Path, model_folder: str
) -> None:
    """Every key in float64, one by one; queries rounded to float16 as keys are."""
    state = at_tap(model_folder, memory, unseen(corpus_folder, rows=2))
    queries = state.flatten(0, 1).half().float().numpy()
    distances, ids = brute_neighbors(all_keys(memory), queries, 17)
    clear = distances[:, 16] - distances[:, 15] > 1e-3  # otherwise either of two may be the sixteenth neighbour
    assert clear.sum() > 30
    expected, _ = dense_votes(
        distances[:, :16], memory.store.values[ids[:, :16]], vocab_size=VOCAB, target_temperature=4.0
    )
    # squared distances of some 30 in float32, over a temperature of 4: 1e-5
    np.testing.assert_allclose(dense_rows(memory, state)[clear], expected[clear], atol=1e-5)


@pytest.mark.parametrize("store", ["datastore_folder", "inner"])
def test_its_own_teacher_says_what_the_tapped_base_says(
    store: str, model_folder: str, corpus_folder: Path, request: pytest.FixtureRequest
) -> None:
    folder, tokens = request.getfixturevalue(store), unseen(corpus_folder)
    tapped = RetrievalMemory(folder, FEW)
    alone = RetrievalMemory(folder, FEW, teacher=load_causal_lm(model_folder))
    assert (tapped.tap, alone.tap) == (tapped.store.manifest.facts["tap"], None)
    state = tapped.step(tokens, at_tap(model_folder, tapped, tokens))
    torch.testing.assert_close(alone.step(tokens), state, rtol=0, atol=1e-5)  # float32, other products for a cache
    np.testing.assert_allclose(dense_rows(alone, alone.step(tokens)), dense_rows(tapped, state), atol=2e-3)


def test_a_tap_inside_the_teacher_leaves_a_cache_that_goes_on(
    inner: Path, model_folder: str, corpus_folder: Path
) -> None:
    """Blocks behind the tap never run, so their part of the cache stays empty, also when it is cropped or selected."""
    memory = RetrievalMemory(inner, FEW, teacher=load_causal_lm(model_folder))
    ran: list[str] = []
    assert memory.teacher is not None
    assert memory.reader.keeps_keys  # the probe reads the teacher whole
    memory.teacher.model.layers[1].register_forward_pre_hook(lambda *_: ran.append("behind the tap"))
    tokens = unseen(corpus_folder)
    cache: VoterCache = memory.new_cache(3)
    memory.step(tokens[:, :12], cache=cache)
    cache.crop(4)
    cache.select(torch.tensor([2, 0]))
    cache.repeat(2)
    rows = torch.tensor([2, 2, 0, 0])
    went_on = torch.cat([memory.step(piece, cache=cache) for piece in tokens[rows, 8:].split([1, 5, 6], 1)], 1)
    torch.testing.assert_close(went_on, memory.step(tokens)[rows, 8:], rtol=0, atol=1e-5)
    assert not ran


def test_a_label_that_no_neighbour_voted_for_is_impossible(
    memory: RetrievalMemory, corpus_folder: Path, model_folder: str
) -> None:
    tokens = unseen(corpus_folder)
    labels = torch.cat([tokens[:, 1:], torch.full((3, 1), -100)], 1)
    labels[1, :5] = -100
    state = memory.step(tokens, at_tap(model_folder, memory, tokens))
    votes = memory.votes(state, slice(None)).dense(VOCAB).reshape(3, 20, VOCAB)[labels != -100]
    found = memory.label_log_probs(state, labels)
    expected = votes.gather(1, labels[labels != -100][:, None])[:, 0].log()
    # votes of one neighbour among sixteen are computed twice in float32
    torch.testing.assert_close(found["label"], expected, rtol=0, atol=1e-4)
    assert 0 < int(torch.isneginf(found["label"]).sum()) < len(expected)
    torch.testing.assert_close(found["entropy"], -torch.xlogy(votes, votes).sum(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(found["top1"], votes.amax(1), rtol=0, atol=1e-4)


def test_no_labels_give_no_scores(memory: RetrievalMemory) -> None:
    state = torch.zeros(1, 2, 32)
    found = memory.label_log_probs(state, torch.full((1, 2), -100))
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(
        ("label", "entropy", "top1", "top1_id"), 0
    )


# --- how it searches --------------------------------------------------------------------------------------------------


def test_more_neighbours_than_entries_are_all_entries(datastore_folder: Path) -> None:
    """At a temperature so high that all votes weigh the same, its votes are the frequencies of tokens."""
    memory = RetrievalMemory(datastore_folder, RetrievalConfig(k=2**20, target_temperature=1e7))
    entries = memory.store.n_entries
    expected = np.bincount(memory.store.values, minlength=VOCAB) / entries
    np.testing.assert_allclose(dense_rows(memory, torch.zeros(1, 32))[0], expected, atol=1e-5)
    distances, ids = memory.neighbors(torch.zeros(2, 32), 10**9)
    assert distances.shape == ids.shape == (2, entries)


def test_nprobe_says_how_many_lists_are_searched(inner: Path) -> None:
    def lists(nprobe: int | None) -> int:
        memory = RetrievalMemory(inner, RetrievalConfig(k=16, nprobe=nprobe))
        return memory.store.index.describe()["nprobe"]

    assert [lists(None), lists(1), lists(20), lists(10_000)] == [3, 1, 20, 20]
    queries = torch.randn(30, 32)
    reached = [RetrievalMemory(inner, RetrievalConfig(nprobe=n)).neighbors(queries, 8)[0].mean() for n in (1, 20)]
    assert reached[1] < reached[0], "more lists find nearer entries"


def test_an_exact_index_has_no_lists(datastore_folder: Path) -> None:
    with pytest.raises(ConfigError, match="nprobe = 4: an index of kind exact has no lists to choose from"):
        RetrievalMemory(datastore_folder, RetrievalConfig(nprobe=4))


@pytest.mark.parametrize("wrong", [1e6, float("nan")])
def test_an_activation_that_no_key_could_have_is_refused(memory: RetrievalMemory, wrong: float) -> None:
    with pytest.raises(ModelError, match="overflows float16"):
        memory.votes(memory.step(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1, 32), wrong)), slice(None))


# --- which model it reads ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_base(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model than the teacher, with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("other") / "model", tokenizer, seed=4, width=16, layers=1)


def test_beside_its_teacher_it_reads_the_bases_activations_else_it_runs_the_teacher(
    datastore_folder: Path, model_folder: str, other_base: str, corpus_folder: Path
) -> None:
    prompt = unseen(corpus_folder, rows=2, length=9)
    for base, own_teacher in ((model_folder, False), (other_base, True)):
        mixed = MixedLM.from_pretrained(
            base, memory=datastore_folder, mix_weight=0.6, memory_kwargs={"retrieval": FEW}, dtype=torch.float32
        )
        memory = mixed.named_memories()["memory"]
        assert isinstance(memory, RetrievalMemory)
        assert (memory.teacher is not None) == own_teacher
        assert (memory.tap is None) == own_teacher
        assert memory.settings.retrieval == FEW
        with torch.no_grad():
            found = mixed(prompt).logits.softmax(-1)
            theirs = mixed.base(prompt).logits[..., :VOCAB].softmax(-1)
        ours = torch.from_numpy(dense_rows(memory, at_tap(model_folder, memory, prompt))).reshape(2, 9, VOCAB)
        # a query rounded to the other neighbour in float16 moves a vote by some 1e-3
        torch.testing.assert_close(found.double(), mixed_probs(theirs, [ours], [0.6]), rtol=0, atol=2e-3)


def test_a_base_whose_activations_are_no_keys_is_refused(memory: RetrievalMemory, model_folder: str) -> None:
    with pytest.raises(ModelError, match=f"holds keys 32 wide, .* 16 wide: its teacher was {re.escape(model_folder)}"):
        memory.check_base(tiny_model(VOCAB, width=16))
    with pytest.raises(ModelError, match=r"tap 'model\.layers\.1\.mlp' does not exist"):
        MixedLM(tiny_model(VOCAB, layers=1), memory, 0.5)


def test_activations_that_are_missing_or_of_another_width_are_refused(memory: RetrievalMemory) -> None:
    tokens = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ModelError, match=f"datastore {memory.store.folder} reads the base's activations; there are no"):
        memory.step(tokens)
    with pytest.raises(ModelError, match="reads activations 32 wide; the base's are 31 wide"):
        memory.step(tokens, torch.zeros(1, 2, 31))


# --- its datastore ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(datastore_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(datastore_folder, tmp_path / "datastore"))


def changed(datastore: Path) -> None:
    """Make the folder that of another run; its files are whole."""
    path = datastore / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["facts"]["recall"]["value"] = 0.5
    path.with_suffix(".new").write_text(json.dumps(manifest))
    os.replace(path.with_suffix(".new"), path)


def test_a_datastore_that_goes_while_in_use_is_named(copied: Path) -> None:
    memory = RetrievalMemory(copied, FEW)
    state = memory.step(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 32))
    memory.votes(state, slice(None))
    changed(copied)
    with pytest.raises(ArtifactError, match=f"datastore {re.escape(str(copied))} was changed or deleted while in use"):
        memory.votes(state, slice(None))
    memory = RetrievalMemory(copied, FEW)
    shutil.rmtree(copied)
    with pytest.raises(ArtifactError, match=f"datastore {re.escape(str(copied))} was changed or deleted while in use"):
        memory.label_log_probs(state, torch.ones(1, 1, dtype=torch.long))


def test_a_saved_memory_wants_the_datastore_it_was_saved_with(copied: Path, model_folder: str, tmp_path: Path) -> None:
    RetrievalMemory(copied, FEW).save_pretrained(tmp_path / "memory")
    loaded = load_memory(tmp_path / "memory", base=model_folder)
    assert isinstance(loaded, RetrievalMemory)
    assert loaded.settings.retrieval == FEW
    changed(copied)
    for base in (model_folder, None):
        with pytest.raises(ArtifactError, match=f"{re.escape(str(copied))} is another than when this memory was saved"):
            load_memory(tmp_path / "memory", base=base)
    shutil.rmtree(copied)
    with pytest.raises(ArtifactError, match=f"{re.escape(str(copied))} does not exist; expected a datastore folder"):
        load_memory(tmp_path / "memory", base=model_folder)


def test_a_folder_that_is_no_datastore_is_refused(corpus_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="is a corpus folder, expected datastore"):
        RetrievalMemory(corpus_folder)


def test_a_teacher_that_changed_since_the_keys_were_made_is_refused(
    corpus_folder: Path, model_folder: str, other_base: str, tmp_path: Path
) -> None:
    teacher = shutil.copytree(model_folder, tmp_path / "teacher")
    build_datastore(
        corpus_folder, teacher=str(teacher), out=tmp_path / "d", config=DatastoreConfig(dtype="float32", recall_k=4)
    )
    assert load_memory(tmp_path / "d", base=str(teacher)).tap is not None
    tiny_model(VOCAB, seed=9).save_pretrained(teacher)
    for base in (str(teacher), other_base, None):
        with pytest.raises(ArtifactError, match=r"teacher' is not .*the teacher that made it; give --teacher"):
            load_memory(tmp_path / "d", base=base)


def test_a_teacher_that_was_moved_is_named_anew(
    corpus_folder: Path, model_folder: str, other_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside another base, in every door; the new place is kept as a whole path."""
    shutil.copytree(model_folder, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    build_datastore(corpus_folder, teacher="teacher", out="d", config=DatastoreConfig(dtype="float32", recall_k=4))
    before = load_memory(tmp_path / "d", base=other_base, retrieval=FEW)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"datastore .*d asks for its teacher '.*teacher': .*; give --teacher"):
        load_memory("d", base=other_base)
    there = RetrievalConfig(k=16, target_temperature=4.0, teacher="moved")
    memory = load_memory("d", base=other_base, retrieval=there)
    assert isinstance(memory, RetrievalMemory)
    assert isinstance(before, RetrievalMemory)
    assert memory.settings.retrieval.teacher == str(tmp_path / "moved")
    tokens = torch.arange(12)[None]
    found, expected = (each.votes(each.step(tokens, None), slice(None)) for each in (memory, before))
    assert torch.equal(found.dense(VOCAB), expected.dense(VOCAB))
    assert there.found == FEW.found
    memory.save_pretrained(tmp_path / "memory")
    monkeypatch.chdir("/")
    saved = load_memory(tmp_path / "memory", base=other_base)
    assert isinstance(saved, RetrievalMemory)
    (tmp_path / "moved").rename(tmp_path / "again")
    once_more = load_memory(
        tmp_path / "memory", base=other_base, retrieval=RetrievalConfig(teacher=str(tmp_path / "again"))
    )
    assert isinstance(once_more, RetrievalMemory)
    assert once_more.settings.retrieval.found == FEW.found  # what is not said is as it was saved


def test_a_base_that_is_the_teacher_serves_wherever_the_teacher_is(
    corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    teacher = shutil.copytree(model_folder, tmp_path / "teacher")
    build_datastore(
        corpus_folder, teacher=str(teacher), out=tmp_path / "d", config=DatastoreConfig(dtype="float32", recall_k=4)
    )
    shutil.rmtree(teacher)
    assert load_memory(tmp_path / "d", base=model_folder).tap is not None


def test_a_teacher_that_was_edited_is_not_saved_by_name(datastore_folder: Path, tmp_path: Path) -> None:
    memory = load_memory(datastore_folder)
    memory.save_pretrained(tmp_path / "as it was")
    assert isinstance(memory, RetrievalMemory)
    assert memory.teacher is not None
    with torch.no_grad():
        next(memory.teacher.parameters()).mul_(2)
    with pytest.raises(ConfigError, match="it was edited"):
        memory.save_pretrained(tmp_path / "memory")
