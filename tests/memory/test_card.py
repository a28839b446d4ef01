"""The card of a trained memory, and its way to the hub."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from memlm import push_to_hub
from memlm.errors import ArtifactError
from memlm.manifest import read_manifest
from memlm.memory.card import memory_card
from memlm.memory.protocol import MemorySettings
from memlm.train.config import TrainConfig


def front_matter(card: str) -> dict[str, Any]:
    _, head, body = card.split("---\n", 2)
    assert body.strip()
    return yaml.safe_load(head)


@pytest.fixture
def card(memory_folder: Path) -> str:
    return (memory_folder / "README.md").read_text(encoding="utf-8")


def test_front_matter_names_memlm_as_the_library(card: str) -> None:
    head = front_matter(card)
    assert head["library_name"] == "memlm"
    assert "memory-decoder" in head["tags"]
    assert "pipeline_tag" not in head, "it would put a widget on the hub that serves the memory alone"


def test_card_says_from_what_how_good_and_how_to_load(card: str, memory_folder: Path, model_folder: str) -> None:
    manifest = read_manifest(memory_folder, "memory")
    best = manifest.facts["validation"]["best"]
    train = manifest.facts["corpus"]["splits"]["train"]
    assert "MixedLM.from_pretrained(" in card
    assert f"mix_weight={best['mix_weight']}" in card
    assert f"| teacher | {model_folder} |" in card
    assert f"{train['tokens']:,} training tokens of {train['documents']:,} documents" in card
    assert "k 16, temperature 4, without the position itself" in card
    base = manifest.facts["validation"]["base_perplexity"]
    assert f": base {model_folder} {base:.2f}, memory {best['memory_perplexity']:.2f}, mixed" in card
    assert f"mixed {best['mixture_perplexity']:.2f} at mix_weight {best['mix_weight']:g}" in card
    assert f", {best['mixture_perplexity'] / base:.4f} of the base's" in card


FACTS = {"corpus": {"splits": {"train": {"tokens": 1234567, "documents": 9}}}, "parameters": 5, "epochs": 2.0}
CONFIG = TrainConfig(kl_weight=0.0).model_dump()


def test_card_of_plain_fine_tuning_without_validation_says_so() -> None:
    card = memory_card(MemorySettings(kind="decoder", vocab_size=9), FACTS, {"base": "b", "init": "i"}, CONFIG)
    assert front_matter(card)["library_name"] == "memlm"
    assert "| targets | none: plain fine-tuning |" in card
    assert "No validation split was held out." in card
    assert "1,234,567 training tokens" in card


@pytest.mark.parametrize(
    ("layers", "fresh", "expected"),
    [
        (None, False, "| start | i |"),
        (3, False, "| start | i (3 layers) |"),
        ([0, 4], True, "| start | i (2 layers, random weights) |"),
    ],
)
def test_card_says_what_was_kept_of_the_start_model(layers: Any, fresh: bool, expected: str) -> None:
    config = {**CONFIG, "layers": layers, "fresh": fresh}
    settings = MemorySettings(kind="decoder", vocab_size=9)
    assert expected in memory_card(settings, FACTS, {"base": "b", "init": "i"}, config)


@pytest.mark.parametrize(
    ("head", "expected"),
    [(None, "| start | fresh, head of the base where the widths are equal |"), ("random", "| start | fresh |")],
)
def test_card_of_a_memory_that_reads_its_base_names_the_only_one_it_serves(head: str | None, expected: str) -> None:
    settings = MemorySettings(kind="mlp", vocab_size=9, tap="model.layers.2.mlp")
    card = memory_card(settings, FACTS, {"base": "b"}, {**CONFIG, "kind": "mlp", "head": head})
    assert "mlp-memory" in front_matter(card)["tags"]
    assert "It reads `model.layers.2.mlp` of b and serves this base alone." in card
    assert "Any causal language model" not in card
    assert "| kind | mlp, 5 parameters |" in card
    assert expected in card


class Hub:
    """Stands in for `huggingface_hub.HfApi` and notes what it is asked."""

    calls: list[tuple[str, tuple, dict]]

    def __init__(self, token: str | None = None) -> None:
        type(self).calls = [("token", (token,), {})]

    def create_repo(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("create_repo", args, kwargs))

    def upload_folder(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append(("upload_folder", args, kwargs))
        return "https://hub/me/memory"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub


def test_push_makes_the_repository_and_uploads_the_folder(memory_folder: Path, hub: type[Hub]) -> None:
    assert push_to_hub(memory_folder, "me/memory", private=True, token="secret") == "https://hub/me/memory"
    assert hub.calls == [
        ("token", ("secret",), {}),
        ("create_repo", ("me/memory",), {"private": True, "exist_ok": True}),
        (
            "upload_folder",
            (),
            {
                "repo_id": "me/memory",
                "folder_path": memory_folder,
                "ignore_patterns": ["run.json"],
                "allow_patterns": sorted(
                    {*read_manifest(memory_folder).payload, "manifest.json", "README.md", "gate.json"}
                ),
            },
        ),
    ]


def test_push_refuses_a_folder_without_card(model_folder: str, hub: type[Hub]) -> None:
    with pytest.raises(ArtifactError, match="has no card that names memlm as its library"):
        push_to_hub(model_folder, "me/memory")
    assert not hub.calls


def test_push_refuses_a_card_of_another_library(model_folder: str, tmp_path: Path, hub: type[Hub]) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match="has no card that names memlm as its library"):
        push_to_hub(folder, "me/memory")
    assert not hub.calls


def test_push_refuses_other_stages_and_damaged_memories(
    corpus_folder: Path, memory_folder: Path, tmp_path: Path, hub: type[Hub]
) -> None:
    with pytest.raises(ArtifactError, match="is a corpus folder, expected memory"):
        push_to_hub(corpus_folder, "me/memory")
    folder = Path(shutil.copytree(memory_folder, tmp_path / "memory"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        push_to_hub(folder, "me/memory")
    assert not hub.calls


def test_push_follows_no_link_and_uploads_nothing_damaged(memory_folder: Path, tmp_path: Path, hub: type[Hub]) -> None:
    folder = Path(shutil.copytree(memory_folder, tmp_path / "memory"))
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ArtifactError, match="is a link: what it leads to would be uploaded"):
        push_to_hub(folder, "me/memory")
    (folder / "notes.txt").unlink()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ArtifactError, match="is damaged"):
        push_to_hub(folder, "me/memory")
    assert not hub.calls


def test_names_reach_the_card_as_text() -> None:
    sources = {"base": 'b"ase', "init": "<img src=x>", "teacher": "[t](http://evil)|x", "documents": "a\n# b\x1b[31m"}
    card = memory_card(MemorySettings(kind="decoder", vocab_size=9), FACTS, sources, CONFIG)
    assert 'MixedLM.from_pretrained("b\\"ase", memory' in card
    assert "| \\<img src=x\\> |" in card
    assert "| \\[t\\](http://evil)\\|x |" in card
    assert "\x1b" not in card
    assert "\n# b" not in card
