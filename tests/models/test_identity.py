"""Two models count as one only where their weights are equal."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memlm import files
from memlm.models import identity
from memlm.models.identity import is_what_is_stored, model_identity
from memlm.models.loading import WEIGHTS_FILE


def edited(source: str, folder: Path, at: float) -> str:
    """A copy of a model folder with one byte of its weights changed, at a share of the file."""
    shutil.copytree(source, folder)
    path = folder / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    return str(folder)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9, 1.0])
def test_a_single_bit_anywhere_makes_another_model(model_folder: str, tmp_path: Path, at: float) -> None:
    assert model_identity(edited(model_folder, tmp_path / "edited", at)) != model_identity(model_folder)


def test_a_large_file_that_differs_in_the_middle_makes_another_model(tmp_path: Path) -> None:
    """Both ends of eight MiB are alike."""
    for name, byte in (("a", b"a"), ("b", b"b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS_FILE).write_bytes(bytes(4 << 20) + byte + bytes(4 << 20))
    assert model_identity(str(tmp_path / "a")) != model_identity(str(tmp_path / "b"))


def test_files_are_hashed_once_and_again_when_they_change(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    monkeypatch.setattr(identity, "_UNSETTLED_NS", 0)
    hashed: list[str] = []
    monkeypatch.setattr(identity, "file_digest", lambda path: hashed.append(path.name) or files.file_digest(path))
    first = model_identity(str(folder))
    assert set(hashed) == {path.name for path in folder.iterdir()}
    hashed.clear()
    assert model_identity(str(folder)) == first
    assert not hashed
    state = (folder / WEIGHTS_FILE).stat()
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    time.sleep(0.01)
    (folder / WEIGHTS_FILE).write_bytes(data)
    os.utime(folder / WEIGHTS_FILE, ns=(state.st_atime_ns, state.st_mtime_ns))  # as rsync and cp -p set it
    assert model_identity(str(folder)) != first
    assert hashed == [WEIGHTS_FILE]


def test_a_file_of_this_moment_is_not_remembered(model_folder: str, tmp_path: Path) -> None:
    """It may change again within the file system's clock tick."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = identity.known_digest(path)
    path.write_bytes(b"two")
    assert identity.known_digest(path) != first


def test_a_hub_model_is_known_by_its_commit(model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache as it stands before and after somebody pushed other weights."""
    place = hub_cache(tmp_path, monkeypatch)
    commits = ["1" * 40, "2" * 40]
    for seed, commit in enumerate(commits):
        shutil.copytree(model_folder, place / "snapshots" / commit)
        tiny_model(328, seed=seed).save_pretrained(place / "snapshots" / commit)
    found = []
    for commit in commits:
        (place / "refs" / "main").write_text(commit)
        found.append(model_identity("someone/model"))
    assert found == [f"someone/model@{commit}" for commit in commits]


def hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of `someone/model` in an empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    place = folder / "models--someone--model"
    (place / "refs").mkdir(parents=True)
    return place


# --- a loaded model against what is stored ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_as_it_was_loaded_is_what_is_stored(model_folder: str, dtype: torch.dtype) -> None:
    assert is_what_is_stored(AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype), model_folder)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_changed_number_is_seen(model_folder: str, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.get_parameter(name).data[3, 5] += 1e-3
    assert not is_what_is_stored(model, model_folder)


def test_a_checkpoint_under_other_names_is_compared_too(model_folder: str, tmp_path: Path) -> None:
    """As GPT-2's, whose tensors lack the name of the body; transformers adds it."""
    shutil.copytree(model_folder, tmp_path / "renamed")
    tensors = load_file(tmp_path / "renamed" / WEIGHTS_FILE)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "renamed" / WEIGHTS_FILE, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "renamed")
    assert is_what_is_stored(model, str(tmp_path / "renamed"))
    model.get_parameter("model.norm.weight").data[0] += 1
    assert not is_what_is_stored(model, str(tmp_path / "renamed"))
