"""Every stage and memory on the default device: the accelerator where there is one, the CPU in a dry run.

What the device computed is compared with plain forward passes, float64 and mixtures on the CPU.
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import make_corpus, save_model, sentences
from reference import brute_neighbors, dense_votes
from tiny_tokenizers import sentencepiece_like
from transformers import AutoTokenizer

import memlm
from memlm.corpus.blocks import IGNORE, Corpus
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.store import Datastore
from memlm.evaluate.config import EvaluateConfig
from memlm.manifest import read_manifest
from memlm.models.loading import default_device, load_causal_lm
from memlm.targets.config import RetrievalConfig, TargetsConfig
from memlm.train.config import TrainConfig

pytestmark = pytest.mark.slow

MLP = {"kind": "mlp", "layers": 1}
TRAINED = ("decoder", "mlp-stored", "mlp-online", "adapted")
KINDS = ("decoder", "mlp-stored", "mlp-online", "retrieval")
TARGETS = TargetsConfig(k=16, target_temperature=4.0)  # as those of the shared fixture
RETRIEVAL = RetrievalConfig(k=16, target_temperature=4.0)
WEIGHT = 0.3


@pytest.fixture(scope="module")
def lists_folder(corpus_folder: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datastore again, its index with inverted lists, all of which are searched."""
    out = tmp_path_factory.mktemp("lists") / "datastore"
    config = DatastoreConfig(dtype="float32", index="ivf-flat", nlist=4, nprobe=4)
    memlm.build_datastore(corpus_folder, teacher=model_folder, out=out, config=config)
    return out


@pytest.fixture(scope="module")
def memories(
    targets_folder: Path,
    datastore_folder: Path,
    documents: str,
    model_folder: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A memory of each kind, trained in the precision of the device; one of them carried on to another tokenizer."""
    out = tmp_path_factory.mktemp("memories")

    def train(name: str, targets: Path = targets_folder, **given: Any) -> None:
        quick = {"max_steps": 20, "batch_size": 4, "learning_rate": 5e-3, **given.pop("settings", {})}
        memlm.train_memory(targets, out=out / name, config=TrainConfig(**quick), **given)

    train("decoder", init=model_folder)
    train("mlp-stored", base=model_folder, activations=datastore_folder, settings=MLP)
    train("mlp-online", base=model_folder, settings=MLP)
    other = save_model(out / "other", sentencepiece_like(sentences(100, seed=3)), seed=5)
    memlm.adapt_memory(str(out / "decoder"), tokenizer=other, out=out / "carried")
    make_corpus(documents, other, out / "corpus")
    memlm.build_datastore(out / "corpus", teacher=other, out=out / "datastore")
    memlm.build_targets(out / "datastore", out=out / "targets", config=TARGETS)
    train("adapted", out / "targets", init=str(out / "carried"), base=other)
    return {"retrieval": datastore_folder, **{name: out / name for name in TRAINED}}


def mixed(kind: str, memories: dict[str, Path], base: str) -> memlm.MixedLM:
    """The base and a memory on the CPU, in float32."""
    given = {"retrieval": RETRIEVAL} if kind == "retrieval" else {}
    return memlm.MixedLM.from_pretrained(
        base, memory=str(memories[kind]), mix_weight=WEIGHT, dtype=torch.float32, memory_kwargs=given
    ).eval()


def test_keys_and_values_are_the_activations_and_the_labels_of_the_corpus(
    datastore_folder: Path, model_folder: str
) -> None:
    store = Datastore(datastore_folder)
    teacher = load_causal_lm(model_folder, dtype=torch.float64)
    inputs: list[torch.Tensor] = []
    teacher.get_submodule(store.manifest.facts["tap"]).register_forward_pre_hook(
        lambda _, given: inputs.append(given[0])
    )
    keys, labels = [], []
    split = store.corpus.split("train")
    for block in (split[i] for i in range(len(split))):
        with torch.inference_mode():
            teacher(torch.from_numpy(block.input_ids.astype(np.int64))[None])
        keys.append(inputs.pop()[0, :-1][torch.from_numpy(block.predicted[1:])])
        labels.append(block.labels[block.labels != IGNORE])
    assert store.values.tolist() == np.concatenate(labels).tolist()
    assert store.keys is not None
    found, expected = store.keys.rows(0, store.n_entries), torch.cat(keys).numpy()
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()  # kept in float16


@pytest.mark.parametrize("index", ["exact", "ivf"])
def test_targets_are_the_votes_of_the_nearest_keys(
    index: str, datastore_folder: Path, lists_folder: Path, targets_folder: Path, tmp_path: Path
) -> None:
    store = Datastore(datastore_folder if index == "exact" else lists_folder)
    if index == "ivf":
        targets_folder = tmp_path / "targets"
        memlm.build_targets(lists_folder, out=targets_folder, config=TARGETS)
    assert store.keys is not None
    positions = np.arange(0, 200, 10)
    keys = store.keys.rows(0, store.n_entries)
    distances, ids = brute_neighbors(keys, keys[positions], TARGETS.k, [{int(p)} for p in positions])
    expected, _ = dense_votes(
        distances,
        store.values[ids],
        vocab_size=store.corpus.vocab_size,
        target_temperature=TARGETS.target_temperature,
        target_mass=TARGETS.target_mass,
    )
    rows = datasets.Dataset.from_file(str(min(targets_folder.glob("train-*.arrow"))))
    counts = np.concatenate([[count for count in row["target_counts"] if count] for row in rows])
    starts = np.cumsum(counts) - counts
    ids, probs = (np.concatenate([row[name] for row in rows]) for name in ("target_ids", "target_probs"))
    found = np.zeros_like(expected)
    for row, position in enumerate(positions):
        here = slice(starts[position], starts[position] + counts[position])
        found[row, ids[here].astype(int)] = probs[here]
    assert np.abs(found - expected).sum(1).max() < 5e-3  # kept in float16; the last of equal neighbours may differ


@pytest.mark.parametrize("name", TRAINED)
def test_training_comes_nearer_to_the_targets(name: str, memories: dict[str, Path]) -> None:
    facts = read_manifest(memories[name]).facts
    first, *_, last = facts["training"]
    assert last["kl_nats"] < first["kl_nats"]


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_that_of_a_mixture_on_the_cpu(
    kind: str, memories: dict[str, Path], corpus_folder: Path, model_folder: str
) -> None:
    report = memlm.evaluate_perplexity(
        corpus_folder,
        base=model_folder,
        memory=str(memories[kind]),
        config=EvaluateConfig(dtype="float32", mix_weight=WEIGHT, bootstrap=0),
        retrieval=RETRIEVAL if kind == "retrieval" else None,
    )
    model, split = mixed(kind, memories, model_folder), Corpus(corpus_folder).split("test")
    lost = []
    for block in (split[i] for i in range(len(split))):
        with torch.inference_mode():
            log_probs = model(torch.from_numpy(block.input_ids.astype(np.int64))[None]).logits.double().log_softmax(-1)
        places = np.flatnonzero(block.predicted)
        lost.append(-log_probs[0, places - 1, block.input_ids[places].astype(np.int64)].numpy())
    assert report["mixture"]["perplexity"] == pytest.approx(np.exp(np.concatenate(lost).mean()), rel=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_takes_the_likeliest_token_at_each_step(
    kind: str, cache: str, memories: dict[str, Path], model_folder: str
) -> None:
    """Its logits come from caches, static ones by compiled steps; here each step is read anew, on the CPU."""
    prompt = AutoTokenizer.from_pretrained(model_folder)("the memory reads", return_tensors="pt")
    model = mixed(kind, memories, model_folder)
    device = default_device()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    found = model.to(device).generate(**prompt.to(device), **options)
    assert found.device.type == device.type
    model, found = model.cpu(), found.cpu()
    assert found.shape[1] > prompt["input_ids"].shape[1]
    for place in range(prompt["input_ids"].shape[1], found.shape[1]):
        with torch.inference_mode():
            logits = model(found[:, :place], use_cache=False).logits[0, -1]
        assert logits.max() - logits[found[0, place]] < 1e-3  # float32 on two devices


@pytest.mark.parametrize("kind", KINDS)
def test_an_explanation_adds_up_and_names_near_places(
    kind: str, memories: dict[str, Path], datastore_folder: Path, model_folder: str
) -> None:
    found = memlm.explain(
        mixed(kind, memories, model_folder).to(default_device()),
        AutoTokenizer.from_pretrained(model_folder),
        "the memory reads",
        datastore=datastore_folder,
        max_new_tokens=4,
    )
    names = set(Datastore(datastore_folder).corpus.document_names("train"))
    assert found.tokens
    for token in found.tokens:
        (memory,) = token.memory_probs.values()
        assert token.mixture_prob == pytest.approx((1 - WEIGHT) * token.base_prob + WEIGHT * memory, abs=1e-4)
        distances = [neighbor.distance for neighbor in token.neighbors]
        assert len(distances) == 3
        assert distances == sorted(distances)
        assert {neighbor.document for neighbor in token.neighbors} <= names
