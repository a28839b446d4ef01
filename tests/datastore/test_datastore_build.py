import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from interruption import files_written
from strangers import edit_manifest, reseal
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from memlm.corpus.blocks import Corpus
from memlm.corpus.build import build_corpus
from memlm.corpus.config import CorpusConfig
from memlm.datastore.build import build_datastore, plan_datastore, shard_blocks
from memlm.datastore.config import DatastoreConfig
from memlm.datastore.store import Datastore
from memlm.errors import ArtifactError, ConfigError, InputError, ModelError, TokenizerMismatchError
from memlm.manifest import Manifest, read_manifest
from memlm.memory.loading import load_memory
from memlm.memory.retrieval import RetrievalMemory
from memlm.models import loading as loading_module
from memlm.models.taps import TapReader
from memlm.stage import run_stage

# float32 activations of order 1, added up in another order, then rounded to float16 (half a step: 2**-11 of the value)
HALF = {"rtol": 2**-10, "atol": 1e-4}


def build(corpus: Path, teacher: str, out: Path, **config: object) -> Manifest:
    settings = DatastoreConfig.parse({"dtype": "float32", "recall_k": 8, **config})
    return build_datastore(corpus, teacher=teacher, out=out, config=settings)


def all_keys(folder: Path) -> np.ndarray:
    keys = Datastore(folder).keys
    assert keys is not None
    return keys.rows(0, len(keys))


def test_keys_are_what_a_plain_hook_sees_and_values_what_comes_next(
    datastore_folder: Path, corpus_folder: Path, model_folder: str
) -> None:
    split = Corpus(corpus_folder).split("train")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    keys, values = [], []
    for block in (split[i] for i in range(len(split))):
        with torch.no_grad():
            model(input_ids=torch.from_numpy(block.input_ids.astype(np.int64))[None])  # alone, no padding
        for place in np.flatnonzero(block.predicted):
            keys.append(seen[-1][place - 1].numpy())
            values.append(int(block.input_ids[place]))
    store = Datastore(datastore_folder)
    assert store.n_entries == len(keys) == split.n_positions
    assert store.values.tolist() == values
    np.testing.assert_allclose(all_keys(datastore_folder), np.stack(keys), **HALF)
    assert np.stack(keys).std() > 0.1


def test_the_manifest_tells_what_is_inside(datastore_folder: Path, corpus_folder: Path) -> None:
    manifest = read_manifest(datastore_folder, "datastore")
    split = Corpus(corpus_folder).split("train")
    facts = manifest.facts
    assert facts["entries"] == split.n_positions
    assert facts["key_width"] == 32
    assert facts["tap"] == "model.layers.1.mlp"
    assert facts["distance"] == "squared L2"
    assert facts["key_dtype"] == "float16"
    assert facts["index"] == {"kind": "exact"}
    assert facts["recall"] == {"k": 256, "value": 1.0}
    assert manifest.inputs["corpus"] == read_manifest(corpus_folder).hash
    assert not {"tap.txt", "manifest.json", "run.json"} & {Path(name).name for name in manifest.payload}
    assert len([name for name in manifest.payload if name.startswith("keys/")]) > 1
    assert Datastore(datastore_folder).corpus.manifest == Corpus(corpus_folder).manifest


@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_keys_do_not_depend_on_the_batch(
    corpus_folder: Path, model_folder: str, datastore_folder: Path, tmp_path: Path, batch_tokens: int
) -> None:
    build(corpus_folder, model_folder, tmp_path / "d", batch_tokens=batch_tokens)
    np.testing.assert_allclose(all_keys(tmp_path / "d"), all_keys(datastore_folder), **HALF)


def test_a_tap_may_be_named_or_missing(corpus_folder: Path, model_folder: str, tmp_path: Path) -> None:
    manifest = build(corpus_folder, model_folder, tmp_path / "d", tap="model.layers.0.mlp.down_proj")
    assert manifest.facts["tap"] == "model.layers.0.mlp.down_proj"
    assert manifest.facts["key_width"] == 64  # the MLP's inner width
    with pytest.raises(ModelError, match=r"tap 'model\.layers\.7\.mlp' does not exist"):
        build(corpus_folder, model_folder, tmp_path / "e", tap="model.layers.7.mlp")
    assert build(corpus_folder, model_folder, tmp_path / "e").facts["tap"] == "model.layers.1.mlp"  # the same place


@pytest.mark.slow
@pytest.mark.parametrize("index", ["exact", "ivf-flat", "ivf-pq"])
def test_an_interrupted_pass_goes_on_to_the_same_bytes(
    corpus_folder: Path, model_folder: str, tmp_path: Path, index: str
) -> None:
    small = {"shard_positions": 200, "code_bytes": 4, "train_vectors": 64}
    config = {"index": index, "nlist": None if index == "exact" else 6, **small}
    whole = build(corpus_folder, model_folder, tmp_path / "whole", **config)
    with files_written("keys/*", most=2):
        build(corpus_folder, model_folder, tmp_path / "resumed", **config)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "resumed" / "keys").iterdir()}
    assert sorted(p.name for p in kept) == ["00000.npy", "00001.npy"]
    with pytest.raises(ArtifactError, match="is not finished: run the command that makes it again"):
        Datastore(tmp_path / "resumed")
    resumed = build(corpus_folder, model_folder, tmp_path / "resumed", **config)
    if index == "ivf-flat":  # whose index holds the keys
        assert not (tmp_path / "resumed" / "keys").exists()
    else:
        assert {p: (tmp_path / "resumed" / "keys" / p.name).stat().st_mtime_ns for p in kept} == kept
    assert resumed.payload == whole.payload
    assert resumed.hash == whole.hash
    assert build(corpus_folder, model_folder, tmp_path / "resumed", **config) == resumed


@pytest.mark.parametrize("extends", [False, True])
def test_a_pass_stopped_in_the_middle_of_a_shard_keeps_what_was_read_and_says_so(
    corpus_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extends: bool
) -> None:
    config = DatastoreConfig.parse({"batch_tokens": 100})
    extend = None
    if extends:
        extend = tmp_path / "old"
        few = CorpusConfig.parse({**Corpus(corpus_folder).config.model_dump(), "max_tokens": 400})
        sources = [read_manifest(corpus_folder).sources["documents"]]
        build_corpus(sources, tokenizer=model_folder, out=tmp_path / "few", config=few)
        build_datastore(tmp_path / "few", teacher=model_folder, out=extend, config=config)
    asked = {"teacher": model_folder, "config": config, "extend": extend}
    reads, read = [], TapReader.read
    monkeypatch.setattr(TapReader, "read", lambda *args: (reads.append(1), read(*args))[1])
    whole = build_datastore(corpus_folder, out=tmp_path / "whole", **asked)
    n_whole = len(reads)

    def stopping(*args: Any) -> Any:
        if len(reads) == n_whole + 5:
            raise KeyboardInterrupt
        reads.append(1)
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(TapReader, "read", stopping)
        with pytest.raises(KeyboardInterrupt) as stop:
            run_stage(tmp_path / "d", *plan_datastore(corpus_folder, **asked, keep_seconds=0))
    assert re.fullmatch(rf"{tmp_path}/d keeps the keys of [\d,]+ of [\d,]+ positions", stop.value.__notes__[0])
    assert not re.search(r"keys of 0 of", stop.value.__notes__[0])
    reads.clear()
    resumed = build_datastore(corpus_folder, out=tmp_path / "d", **asked)
    assert len(reads) == n_whole - 4, "the batch that was under way is read again, no other"
    assert resumed.payload == whole.payload
    assert resumed.hash == whole.hash


@pytest.mark.parametrize("rotten", [b"", b"no archive", None])
def test_what_a_stopped_pass_left_is_used_only_where_it_fits(
    corpus_folder: Path, model_folder: str, tmp_path: Path, rotten: bytes | None
) -> None:
    whole = build(corpus_folder, model_folder, tmp_path / "whole")
    with files_written("keys/*", most=0):
        build(corpus_folder, model_folder, tmp_path / "d")
    (tmp_path / "d" / "parts").mkdir()
    part = tmp_path / "d" / "parts" / "keys-00000.npz"
    if rotten is None:
        np.savez(part, steps=np.int64(1), keys=np.zeros((3, 32), np.float16))
    else:
        part.write_bytes(rotten)
    assert build(corpus_folder, model_folder, tmp_path / "d").hash == whole.hash
    assert not (tmp_path / "d" / "parts").exists()


@pytest.fixture
def flat(corpus_folder: Path, model_folder: str, tmp_path: Path) -> Path:
    build(corpus_folder, model_folder, tmp_path / "flat", index="ivf-flat", nlist=6, shard_positions=200)
    return tmp_path / "flat"


def test_a_datastore_of_lists_of_keys_holds_each_key_once_and_gives_it_as_any_other(
    flat: Path, datastore_folder: Path, tmp_path: Path
) -> None:
    store = Datastore(flat)
    centroids = 6 * 32 * 4
    files = {name: file.bytes for name, file in store.manifest.payload.items() if not name.startswith("corpus/")}
    assert files.keys() == {"index.faiss", "values.npy"}
    assert files["index.faiss"] < store.n_entries * (2 * 32 + 8) + centroids + 6 * 8 + 500  # keys, ids, header
    expected = all_keys(datastore_folder)
    np.testing.assert_allclose(all_keys(flat), expected, **HALF)  # batches differ
    assert store.keys is not None
    ids = np.random.default_rng(0).integers(store.n_entries, size=(7, 3))
    np.testing.assert_array_equal(store.keys.gather(ids), all_keys(flat)[ids])
    found, _ = store.index.search(all_keys(flat), 1, thorough=True)
    assert found.max() < 1e-4  # float32 sums of 32 squares of order 1: each key is where its entry is searched


def test_a_datastore_that_holds_its_keys_twice_as_before_is_still_read(flat: Path, tmp_path: Path) -> None:
    keys, old = all_keys(flat), Path(shutil.copytree(flat, tmp_path / "old"))
    (old / "keys").mkdir()
    np.save(old / "keys" / "00000.npy", keys.astype(np.float16))
    edit_manifest(old, lambda manifest: manifest["payload"].update({"keys/00000.npy": {"bytes": 0, "sha256": ""}}))
    reseal(old, "keys/00000.npy")
    np.testing.assert_array_equal(all_keys(old), keys)


def test_shards_hold_whole_blocks_and_at_least_the_positions_asked_for(corpus_folder: Path) -> None:
    split = Corpus(corpus_folder).split("train")
    for size in (1, 50, 10**6):
        shards = shard_blocks(split.position_starts, size)
        assert [first for first, _ in shards] == [0, *[end for _, end in shards[:-1]]]
        assert shards[-1][1] == len(split)
        counts = [int(split.position_starts[end] - split.position_starts[first]) for first, end in shards]
        assert all(count >= size for count in counts[:-1])
        largest = int(np.diff(split.position_starts).max())
        assert all(count < size + largest for count in counts)


def test_without_keys_only_codes_are_kept(corpus_folder: Path, model_folder: str, tmp_path: Path) -> None:
    manifest = build(corpus_folder, model_folder, tmp_path / "d", keep_keys=False, code_bytes=9)
    assert not (tmp_path / "d" / "keys").exists()
    assert not [name for name in manifest.payload if name.startswith("keys")]
    assert manifest.facts["index"]["kind"] == "ivf-pq"
    assert manifest.facts["index"]["code_bytes"] == 8
    assert 0.5 < manifest.facts["recall"]["value"] < 1.0  # of codes, not of the keys that are gone
    store = Datastore(tmp_path / "d")
    assert store.keys is None
    distances, ids = store.index.search(np.zeros((2, 32), np.float32), 5)
    assert np.isfinite(distances).all()
    assert (ids >= 0).all()


def test_approximate_indexes_say_their_recall(corpus_folder: Path, model_folder: str, tmp_path: Path) -> None:
    manifest = build(corpus_folder, model_folder, tmp_path / "d", index="ivf-flat", nlist=16, recall_target=0.9)
    assert manifest.facts["index"]["kind"] == "ivf-flat"
    assert manifest.facts["recall"]["k"] == 8
    assert 0.9 <= manifest.facts["recall"]["value"] <= 1.0
    blind = build(corpus_folder, model_folder, tmp_path / "e", index="ivf-flat", nlist=16, nprobe=1)
    assert blind.facts["index"]["nprobe"] == 1
    assert blind.facts["recall"]["value"] < manifest.facts["recall"]["value"]


def test_a_teacher_with_another_tokenizer_is_refused_before_it_loads(
    corpus_folder: Path, model_folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    other = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(
        TokenizerMismatchError, match=r"corpus .* and model .*teacher have different tokenizers \(2 ids differ"
    ):
        build(corpus_folder, str(tmp_path / "teacher"), tmp_path / "d")
    assert not list(tmp_path.glob("d*"))


def test_token_ids_outside_the_teachers_vocabulary_are_refused(corpus_folder: Path, tmp_path: Path) -> None:
    tiny_model(100).save_pretrained(tmp_path / "teacher")  # no tokenizer beside it
    with pytest.raises(InputError, match=r"has token '.*' \(id \d\d\d\), outside the 100 of model .*teacher"):
        build(corpus_folder, str(tmp_path / "teacher"), tmp_path / "d")


def test_a_teacher_without_tokenizer_is_used_where_its_vocabulary_fits(corpus_folder: Path, tmp_path: Path) -> None:
    tiny_model(320, seed=1).save_pretrained(tmp_path / "teacher")
    assert build(corpus_folder, str(tmp_path / "teacher"), tmp_path / "d").facts["entries"] > 0


def test_a_teacher_that_is_not_there_is_named(corpus_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'nobody/nothing' cannot be loaded; tried"):
        build(corpus_folder, "nobody/nothing", tmp_path / "d")


def test_more_lists_than_entries_are_refused_before_the_teacher_reads(
    corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"nlist = 100000 is more than the datastore's 5560 entries; lower --nlist"):
        plan_datastore(corpus_folder, teacher=model_folder, config=DatastoreConfig(index="ivf-flat", nlist=100_000))
    unused = DatastoreConfig(index="exact", nlist=100_000)
    assert plan_datastore(corpus_folder, teacher=model_folder, config=unused).spec.config["nlist"] == 100_000


def test_an_activation_that_float16_cannot_hold_is_refused(
    corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.layers[-1].post_attention_layernorm.weight.fill_(1e6)
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ModelError, match="an activation at the tap overflows float16"):
        build(corpus_folder, str(tmp_path / "teacher"), tmp_path / "d")


def test_another_teacher_or_setting_at_the_same_output_is_refused(
    corpus_folder: Path, datastore_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    tiny_model(328, seed=1).save_pretrained(tmp_path / "teacher")
    config = {"shard_positions": 300, "recall_k": 256}
    assert build(corpus_folder, model_folder, datastore_folder, **config) == read_manifest(datastore_folder)
    with pytest.raises(ArtifactError, match=r"was made otherwise \(inputs\.teacher"):
        build(corpus_folder, str(tmp_path / "teacher"), datastore_folder, **config)
    with pytest.raises(ArtifactError, match=r"was made otherwise \(config\.shard_positions: 300 there, 301 here"):
        build(corpus_folder, model_folder, datastore_folder, **{**config, "shard_positions": 301})


@pytest.fixture
def copied(datastore_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(datastore_folder, tmp_path / "copy"))


def test_a_missing_or_truncated_shard_of_keys_is_found(copied: Path) -> None:
    shard = copied / "keys" / "00001.npy"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"keys/00001\.npy has \d+ bytes, its manifest says \d+"):
        Datastore(copied)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"keys/00001\.npy is missing"):
        Datastore(copied)


def test_keys_overwritten_by_something_else_are_refused(copied: Path) -> None:
    shard = copied / "keys" / "00001.npy"
    size = shard.stat().st_size
    shard.write_bytes(bytes(size))
    with pytest.raises(ArtifactError, match=r"00001\.npy is no array"):
        _ = Datastore(copied).keys
    array = np.zeros((size - 128) // 4, np.float32)  # as many bytes, of another type and shape
    np.save(shard, array)
    assert shard.stat().st_size == size
    with pytest.raises(ArtifactError, match=r"00001\.npy holds <f4 of shape .*, expected <f2 of shape any x 32"):
        _ = Datastore(copied).keys


def test_a_damaged_shard_of_keys_is_found_when_it_is_first_read(copied: Path) -> None:
    shard = copied / "keys" / "00001.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    keys = Datastore(copied).keys
    assert keys is not None
    first = len(np.load(copied / "keys" / "00000.npy"))
    assert keys.rows(0, first).shape == (first, 32)
    with pytest.raises(ArtifactError, match=r"00001\.npy is damaged: .* run `memlm repair "):
        keys.rows(first - 1, first + 1)


def test_keys_values_and_entries_must_fit_each_other(copied: Path) -> None:
    values = np.load(copied / "values.npy")
    values[3] = 320
    np.save(copied / "values.npy", values)
    reseal(copied, "values.npy")
    with pytest.raises(ArtifactError, match=r"values\.npy has token id 320, outside"):
        _ = Datastore(copied).values
    np.save(copied / "keys" / "00001.npy", np.zeros((5, 32), np.float16))
    reseal(copied, "keys/00001.npy")
    with pytest.raises(ArtifactError, match=r"has \d+ keys of width 32, expected \d+ of width 32"):
        _ = Datastore(copied).keys
    edit_manifest(copied, lambda manifest: manifest["facts"].update(entries=10**12))
    with pytest.raises(ArtifactError, match=r"has 1000000000000 entries, its corpus \d+ positions"):
        Datastore(copied)


def test_a_corpus_exchanged_inside_a_datastore_is_refused(copied: Path) -> None:
    path = copied / "corpus" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "facts": {**manifest["facts"], "documents_read": 3}}))
    with pytest.raises(ArtifactError, match="was made from another corpus than the one it holds"):
        Datastore(copied)


def test_codes_without_keys_need_a_fitting_index() -> None:
    with pytest.raises(ConfigError, match="keep_keys false keeps codes only"):
        DatastoreConfig.parse({"keep_keys": False, "index": "ivf-flat"})


def test_the_hash_does_not_depend_on_where_the_corpus_lies(
    corpus_folder: Path, model_folder: str, tmp_path: Path
) -> None:
    shutil.copytree(corpus_folder, tmp_path / "moved")
    for file in ("manifest.json", "run.json"):
        content = json.loads((tmp_path / "moved" / file).read_text())
        changed = {"sources": {"documents": "elsewhere"}} if file == "manifest.json" else {"finished": 0}
        (tmp_path / "moved" / file).write_text(json.dumps({**content, **changed}))
    first = build(corpus_folder, model_folder, tmp_path / "a")
    assert build(tmp_path / "moved", model_folder, tmp_path / "b").hash == first.hash


def test_the_teacher_goes_on_in_the_precision_that_it_began_in(
    corpus_folder: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though `auto` is another one on the machine that goes on, or that searches."""
    how: dict[str, Any] = {"teacher": model_folder, "shard_positions": 300}
    build_datastore(corpus_folder, out=tmp_path / "whole", dtype="float32", **how)
    monkeypatch.setattr(loading_module, "default_dtype", lambda device="cpu": torch.float32)
    with files_written("keys/*", most=1):
        build_datastore(corpus_folder, out=tmp_path / "cut", **how)
    monkeypatch.setattr(loading_module, "default_dtype", lambda device="cpu": torch.bfloat16)
    build_datastore(corpus_folder, out=tmp_path / "cut", **how)
    np.testing.assert_array_equal(all_keys(tmp_path / "cut"), all_keys(tmp_path / "whole"))
    assert Datastore(tmp_path / "cut").facts.teacher_dtype == "float32"
    memory = load_memory(tmp_path / "cut")
    assert isinstance(memory, RetrievalMemory)
    assert memory.teacher is not None
    assert memory.teacher.dtype == torch.float32
