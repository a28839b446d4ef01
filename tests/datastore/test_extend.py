import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from interruption import files_written

from memlm.corpus.blocks import Corpus, Split
from memlm.corpus.build import build_corpus
from memlm.corpus.config import CorpusConfig
from memlm.datastore import build as build_module
from memlm.datastore.build import build_datastore
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.extend import same_documents
from memlm.datastore.index import INDEXES, IVFIndex, RecallSample
from memlm.datastore.store import Datastore
from memlm.errors import ArtifactError, ConfigError, InputError, MemlmError, ModelError
from memlm.manifest import Manifest, read_manifest
from memlm.models import loading
from memlm.targets.build import build_targets
from memlm.targets.config import TargetsConfig

# float32 activations of order 1, added up in another order, then rounded to float16 (half a step: 2**-11 of the value)
HALF: dict[str, Any] = {"rtol": 2**-10, "atol": 1e-4}
# a pass of one block each: no padding, so a key does not depend on which blocks are read together
ALONE: dict[str, Any] = {"batch_tokens": 1}

OLD = sentences(60, seed=2)
ADDED = sentences(25, seed=5)
GROWN = [*ADDED[:10], *OLD[:5:-1], *ADDED[10:]]  # some old ones are gone, the others come in another order


@pytest.fixture(scope="module")
def corpus_of(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A corpus folder of these documents."""

    def make(documents: list[str], **config: object) -> Path:
        folder = tmp_path_factory.mktemp("corpora")
        (folder / "documents.txt").write_text("\n\n".join(documents), encoding="utf-8")
        settings = CorpusConfig.parse({"document_separator": "\n\n", "block_size": 32, **config})
        build_corpus([str(folder / "documents.txt")], tokenizer=model_folder, out=folder / "corpus", config=settings)
        return folder / "corpus"

    return make


@pytest.fixture(scope="module")
def old(corpus_of: Callable[..., Path]) -> Path:
    return corpus_of(OLD)


@pytest.fixture(scope="module")
def grown(corpus_of: Callable[..., Path]) -> Path:
    return corpus_of(GROWN)


@pytest.fixture(scope="module")
def stores(old: Path, grown: Path, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exact datastores: of the old corpus, and of the grown one by rebuilding and by extending."""
    out = tmp_path_factory.mktemp("stores")
    build(old, out / "old", teacher=model_folder, **ALONE)
    build(grown, out / "rebuilt", teacher=model_folder, **ALONE)
    build_datastore(grown, out=out / "extended", extend=out / "old")
    return out


def build(
    corpus: Path, out: Path, *, teacher: str | None = None, extend: Path | None = None, **config: Any
) -> Manifest:
    if extend is None:
        config = {"dtype": "float32", "recall_k": 8, "shard_positions": 300, **config}
    return build_datastore(corpus, teacher=teacher, out=out, config=DatastoreConfig.parse(config), extend=extend)


def keys_of(folder: Path) -> np.ndarray:
    keys = Datastore(folder).keys
    assert keys is not None
    return keys.rows(0, len(keys))


def train_documents(corpus: Path) -> list[tuple[int, ...]]:
    split = Corpus(corpus).split("train")
    bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    return [tuple(split.tokens[start:end].tolist()) for start, end in bounds]


def is_reused(old: Path, grown: Path) -> np.ndarray:
    """For each position of the grown corpus, whether its document is an old one."""
    before = set(train_documents(old))
    return np.concatenate([[tokens in before] * (len(tokens) - 1) for tokens in train_documents(grown)])


def no_teacher(*args: object, **kwargs: object) -> None:
    raise AssertionError("the teacher was loaded")


def test_extended_equals_rebuilt(stores: Path) -> None:
    extended, rebuilt = (read_manifest(stores / name, "datastore") for name in ("extended", "rebuilt"))
    assert len([name for name in extended.payload if name.startswith("keys/")]) > 3
    assert extended.payload == rebuilt.payload
    assert {k: v for k, v in extended.facts.items() if k != "extended"} == rebuilt.facts
    assert extended.config == rebuilt.config


def test_targets_of_extended_and_rebuilt_are_the_same(stores: Path, tmp_path: Path) -> None:
    config = TargetsConfig(k=16, target_temperature=4.0)
    extended, rebuilt = (
        build_targets(stores / name, out=tmp_path / name, config=config) for name in ("extended", "rebuilt")
    )
    assert extended.payload == rebuilt.payload


def test_the_manifest_tells_what_was_reused_read_and_dropped(stores: Path, old: Path, grown: Path) -> None:
    before, after = train_documents(old), train_documents(grown)

    def count(documents: list[tuple[int, ...]]) -> dict[str, int]:
        return {"documents": len(documents), "entries": sum(len(tokens) - 1 for tokens in documents)}

    manifest = read_manifest(stores / "extended")
    assert manifest.facts["extended"] == {
        "reused": count([tokens for tokens in after if tokens in before]),
        "read": count([tokens for tokens in after if tokens not in before]),
        "dropped": count([tokens for tokens in before if tokens not in after]),
    }
    assert all(part["documents"] > 2 for part in manifest.facts["extended"].values())
    assert manifest.inputs["extended"] == read_manifest(stores / "old").hash
    assert "extended" not in read_manifest(stores / "rebuilt").facts


def test_only_new_documents_are_read(
    stores: Path, old: Path, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, read_keys = [], build_module.read_keys

    def recorded(reader: object, split: Split, blocks: np.ndarray, **options: int) -> np.ndarray:
        read.extend(blocks.tolist())
        return read_keys(reader, split, blocks, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "read_keys", recorded)
    build(grown, tmp_path / "d", extend=stores / "old", batch_tokens=4096)
    split = Corpus(grown).split("train")
    reused = is_reused(old, grown)
    assert read == [i for i in range(len(split)) if not reused[split[i].first_position]]
    # new documents share batches otherwise than in a rebuild
    np.testing.assert_allclose(keys_of(tmp_path / "d"), keys_of(stores / "rebuilt"), **HALF)
    np.testing.assert_array_equal(keys_of(tmp_path / "d")[reused], keys_of(stores / "rebuilt")[reused])


@pytest.mark.slow
@pytest.mark.parametrize("documents", [OLD, OLD[::-1], OLD[10:50]], ids=["the same", "another order", "fewer"])
def test_without_new_documents_the_teacher_is_not_loaded(
    stores: Path,
    corpus_of: Callable[..., Path],
    model_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    documents: list[str],
) -> None:
    corpus = corpus_of(documents)
    rebuilt = build(corpus, tmp_path / "rebuilt", teacher=model_folder, **ALONE)
    monkeypatch.setattr(build_module, "load_on_default_device", no_teacher)
    extended = build(corpus, tmp_path / "extended", extend=stores / "old")
    assert extended.facts["extended"]["read"] == {"documents": 0, "entries": 0}
    assert extended.payload == rebuilt.payload
    assert extended.facts["tap"] == rebuilt.facts["tap"]


@pytest.mark.slow
@pytest.mark.parametrize("index", ["exact", "ivf-flat", "ivf-pq"])
def test_an_interrupted_extension_goes_on_to_the_same_bytes(
    old: Path, grown: Path, model_folder: str, tmp_path: Path, index: str
) -> None:
    config = {} if index == "exact" else {"nlist": 6, "code_bytes": 4, "train_vectors": 64}
    build(old, tmp_path / "old", teacher=model_folder, index=index, **config)
    whole = build(grown, tmp_path / "whole", extend=tmp_path / "old")
    with files_written("keys/*", most=2):
        build(grown, tmp_path / "resumed", extend=tmp_path / "old")
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "resumed" / "keys").iterdir()}
    assert sorted(kept) == ["00000.npy", "00001.npy"]
    resumed = build(grown, tmp_path / "resumed", extend=tmp_path / "old")
    if index == "ivf-flat":  # whose index holds the keys
        assert not (tmp_path / "resumed" / "keys").exists()
    else:
        assert {name: (tmp_path / "resumed" / "keys" / name).stat().st_mtime_ns for name in kept} == kept
    assert resumed.payload == whole.payload
    assert resumed.hash == whole.hash
    assert build(grown, tmp_path / "resumed", extend=tmp_path / "old") == resumed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-pq"])
def test_an_approximate_index_grows_without_training(
    old: Path, grown: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    build(old, tmp_path / "old", teacher=model_folder, index=kind, nlist=12, code_bytes=8, rerank_factor=8)
    with monkeypatch.context() as patch:
        patch.setattr(INDEXES[kind], "build", no_teacher)  # type: ignore[index]
        manifest = build(grown, tmp_path / "new", extend=tmp_path / "old")
    store, keys = Datastore(tmp_path / "new"), keys_of(tmp_path / "new")
    index = store.index
    assert isinstance(index, IVFIndex)
    assert store.keys is not None
    assert index.index.ntotal == store.n_entries == len(keys)
    assert manifest.facts["index"]["nlist"] == 12
    assert manifest.facts["recall"]["value"] == round(RecallSample(store.keys, store.config).recall(index), 4) > 0.5
    distances, ids = index.search(keys, 32, thorough=True)
    assert ((ids >= 0) & (ids < len(keys))).all()
    assert set(ids.flatten()) == set(range(len(keys)))
    own = ((keys[ids].astype(np.float64) - keys[:, None]) ** 2).sum(-1)
    # float32 sums of 32 squares of order 1; ivf-flat takes them from its own lists, so each id stands for its key
    np.testing.assert_allclose(distances, own, rtol=1e-4, atol=1e-4)
    reused = is_reused(old, grown)
    assert distances[reused, 0].max() < 1e-4
    assert distances[~reused, 0].max() < 1e-4


def test_the_extended_datastore_can_be_extended(stores: Path, old: Path, tmp_path: Path) -> None:
    back = build(old, tmp_path / "back", extend=stores / "extended")
    assert back.payload == read_manifest(stores / "old").payload


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"nlist": 5}, {"seed": 1}, {"index": "ivf-pq", "code_bytes": 2}, {"index": "exact"}], ids=str
)
def test_an_index_of_other_settings_is_built_from_the_keys(
    old: Path, grown: Path, model_folder: str, tmp_path: Path, change: dict[str, Any]
) -> None:
    settings = {"index": "ivf-flat", "nlist": 12, **ALONE}
    build(old, tmp_path / "old", teacher=model_folder, **settings)
    extended = build(grown, tmp_path / "extended", extend=tmp_path / "old", **change)
    rebuilt = build(grown, tmp_path / "rebuilt", teacher=model_folder, **{**settings, **change})
    assert extended.payload == rebuilt.payload
    assert extended.facts["index"] == rebuilt.facts["index"]


def test_settings_not_given_are_those_of_the_extended_datastore(stores: Path, grown: Path, tmp_path: Path) -> None:
    build(grown, tmp_path / "d", extend=stores / "old", recall_k=4)
    there, here = Datastore(stores / "old").config, Datastore(tmp_path / "d").config
    assert here == there.model_copy(update={"recall_k": 4})
    assert there.shard_positions == 300


@pytest.mark.parametrize(
    ("setting", "value", "there"),
    [("tap", "0.5", "auto"), ("dtype", "bfloat16", "float32"), ("keep_keys", False, True)],
)
def test_settings_that_the_keys_depend_on_cannot_change(
    stores: Path, grown: Path, tmp_path: Path, setting: str, value: object, there: object
) -> None:
    option = setting.replace("_", "-")
    with pytest.raises(ConfigError, match=rf"{setting} = {value!r}, but datastore .*old .* {there!r}; .* --{option} "):
        build(grown, tmp_path / "d", extend=stores / "old", **{setting: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_size": 40}, r"corpus .* has block_size 40, datastore .*old 32; make the corpus with block_size 32"),
        ({"stride": 8}, r"corpus .* has stride 8, datastore .*old 16"),
        ({"start_token": "bos"}, r"corpus .* has start_token 'bos', datastore .*old 'auto'"),
        ({"end_token": "none"}, r"corpus .* has end_token 'none', datastore .*old 'auto'"),
        ({"cross_documents": True}, r"corpus .* has cross_documents set"),
    ],
    ids=str,
)
def test_a_corpus_cut_otherwise_is_refused(
    stores: Path, corpus_of: Callable[..., Path], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    refused(corpus_of(GROWN, **config), stores / "old", tmp_path, ArtifactError, message)


def test_a_stride_spelt_out_is_the_same_stride(stores: Path, corpus_of: Callable[..., Path], tmp_path: Path) -> None:
    manifest = build(corpus_of(OLD, stride=16), tmp_path / "d", extend=stores / "old")
    assert manifest.payload["values.npy"] == read_manifest(stores / "old").payload["values.npy"]


def test_a_datastore_without_keys_is_refused(old: Path, grown: Path, model_folder: str, tmp_path: Path) -> None:
    build(old, tmp_path / "codes" / "d", teacher=model_folder, keep_keys=False, code_bytes=2)
    refused(grown, tmp_path / "codes" / "d", tmp_path, ArtifactError, r"d kept no keys \(keep_keys false\)")


def test_another_teacher_is_refused(stores: Path, grown: Path, tmp_path: Path) -> None:
    tiny_model(328, seed=1).save_pretrained(tmp_path / "teacher")
    message = r"teacher .*teacher' \(files:.*\) is not the model that made datastore .*old, .*tiny' \(files:"
    refused(grown, stores / "old", tmp_path, ArtifactError, message, teacher=str(tmp_path / "teacher"))


def test_a_corpus_of_new_documents_alone_is_refused(
    stores: Path, corpus_of: Callable[..., Path], tmp_path: Path
) -> None:
    message = r"corpus .* and datastore .*old share no training document; --extend takes the whole grown corpus"
    refused(corpus_of(ADDED), stores / "old", tmp_path, InputError, message)


def test_a_teacher_must_come_from_somewhere(old: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher is missing: give --teacher, .* or --extend"):
        build(old, tmp_path / "d")


def refused(
    corpus: Path, store: Path, folder: Path, error: type[MemlmError], message: str, teacher: str | None = None
) -> None:
    """Extending fails with this one-line error and writes nothing."""
    with pytest.raises(error, match=message) as caught:
        build(corpus, folder / "out", teacher=teacher, extend=store)
    assert "\n" not in str(caught.value)
    assert not list(folder.glob("out*"))


def split_of(documents: list[list[int]]) -> Split:
    tokens = np.array([token for document in documents for token in document], np.int32)
    offsets = np.cumsum([0, *map(len, documents)])
    return Split(tokens, offsets, block_size=4, step=2, cross_documents=False)


_documents = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=3), min_size=1, max_size=8)


@given(_documents, _documents)
def test_documents_are_matched_by_their_tokens_each_once(before: list[list[int]], after: list[list[int]]) -> None:
    found = same_documents(split_of(before), split_of(after)).tolist()
    assert all(before[source] == tokens for source, tokens in zip(found, after, strict=True) if source >= 0)
    taken = [source for source in found if source >= 0]
    assert len(set(taken)) == len(taken)
    for tokens in after:  # as many as there are on both sides
        matched = sum(source >= 0 for source, other in zip(found, after, strict=True) if other == tokens)
        assert matched == min(before.count(tokens), after.count(tokens))


def test_an_extension_whose_teacher_is_gone_says_which_datastore_asks_for_it(
    old: Path, grown: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    build(old, tmp_path / "d", teacher="teacher")
    monkeypatch.chdir("/")
    build_datastore(grown, out=tmp_path / "d2", extend=tmp_path / "d")
    (tmp_path / "teacher").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"datastore .*/d asks for its teacher '.*/teacher': .*; give --teacher"):
        build_datastore(grown, out=tmp_path / "d3", extend=tmp_path / "d")
    build_datastore(grown, out=tmp_path / "d3", extend=tmp_path / "d", teacher=str(tmp_path / "moved"))


def test_new_documents_are_read_in_the_precision_of_the_old_ones(
    old: Path, grown: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is another one on another machine."""
    monkeypatch.setattr(loading, "default_dtype", lambda device: torch.bfloat16)
    build_datastore(old, teacher=model_folder, out=tmp_path / "old")
    build_datastore(grown, teacher=model_folder, out=tmp_path / "rebuilt")
    monkeypatch.setattr(loading, "default_dtype", lambda device: torch.float32)
    extended = build_datastore(grown, extend=tmp_path / "old", out=tmp_path / "extended")
    assert extended.config["dtype"] == extended.facts["teacher_dtype"] == "bfloat16"
    new = ~is_reused(old, grown)
    gaps = np.abs(keys_of(tmp_path / "extended") - keys_of(tmp_path / "rebuilt"))[new]
    assert (gaps == 0).all(1).mean() > 0.9  # batches differ, so that few may round otherwise
