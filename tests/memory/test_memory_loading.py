"""What can be loaded as a memory, and how everything else is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from strangers import reseal
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from memlm.errors import ArtifactError, ConfigError, MemlmError, ModelError
from memlm.memory.confidence import ConfidenceHead
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.loading import load_memory, read_settings
from memlm.memory.protocol import MemorySettings
from memlm.models.tokenizers import fingerprint, load_tokenizer


@pytest.fixture
def copied_memory(memory_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(memory_folder, tmp_path / "memory"))


def test_a_trained_folder_is_a_memory_with_what_training_recorded(
    memory_folder: Path, tokenizer: PreTrainedTokenizerFast, model_folder: str
) -> None:
    memory = load_memory(memory_folder)
    assert isinstance(memory, MemoryDecoder)
    assert not memory.training
    assert memory.settings.tokenizer == fingerprint(tokenizer)
    assert memory.vocab_size == len(tokenizer)
    assert memory.context_length == memory.window == 32
    assert memory.settings.mix_weight is not None
    assert memory.settings.validated_with == model_folder
    votes = memory.votes(memory.step(torch.tensor([[5, 6, 7]])), slice(None))
    torch.testing.assert_close(votes.logsumexp(-1), torch.zeros(1, 3), rtol=0, atol=1e-5)


def test_a_plain_causal_lm_serves_as_a_memory(model_folder: str, tokenizer: PreTrainedTokenizerFast) -> None:
    memory = load_memory(model_folder)
    assert isinstance(memory, MemoryDecoder)
    assert memory.settings == MemorySettings(kind="decoder", vocab_size=len(tokenizer) + 8, context_length=256)
    assert read_settings(model_folder) is None


def test_keywords_go_to_the_weights(memory_folder: Path) -> None:
    memory = load_memory(memory_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in memory.parameters()} == {torch.bfloat16}


def test_an_unknown_kind_is_refused_with_the_known_ones(model_folder: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "odd"))
    (folder / "memory.json").write_text(json.dumps({"kind": "oracle", "vocab_size": 320}))
    with pytest.raises(ArtifactError, match="kind 'oracle' is unknown to this memlm; known: decoder"):
        load_memory(folder)


def test_an_unknown_setting_is_refused_with_the_nearest_known_one(model_folder: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "odd"))
    (folder / "memory.json").write_text(json.dumps({"kind": "decoder", "vocab_size": 320, "mixweight": 0.5}))
    with pytest.raises(ConfigError, match=r"'memory\.json: mixweight'; did you mean 'mix_weight'"):
        load_memory(folder)


def test_settings_that_are_no_json_are_refused(model_folder: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "odd"))
    (folder / "memory.json").write_text('{"kind": "deco')
    with pytest.raises(ArtifactError, match=r"memory\.json cannot be read: Unterminated string"):
        load_memory(folder)


def test_a_folder_that_lost_its_weights_is_refused(copied_memory: Path) -> None:
    (copied_memory / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
        load_memory(copied_memory)


def test_truncated_weights_are_refused(copied_memory: Path) -> None:
    weights = copied_memory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors has \d+ bytes, its manifest says \d+"):
        load_memory(copied_memory)


def test_a_stage_folder_that_is_no_memory_is_refused(corpus_folder: Path) -> None:
    with pytest.raises(ArtifactError, match="is a corpus folder, expected memory"):
        load_memory(corpus_folder)


def test_what_does_not_exist_is_refused_with_what_was_tried(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    with pytest.raises(ModelError, match=re.escape(missing)):
        load_memory(missing)
    with pytest.raises(ModelError, match="as a hub id"):
        load_memory("nobody/nothing")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded; tried"):
        load_memory(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers = 1000000000, but there are \d+ tensors"),
        ({"intermediate_size": 10**9}, r"config\.json asks for 192,\d+,\d+,\d+ parameters, model.safetensors holds"),
        ({"num_labels": 10**9}, "is no config that memlm writes; it may have none of num_labels, auto_map"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Model"}}, "is no config that memlm writes"),
        ({"num_attention_heads": 0}, "cannot be loaded|describes no model"),
    ],
)
def test_a_config_beyond_the_weights_is_refused_before_the_model_is_made(
    copied_memory: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied_memory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=r"config\.json (has \d+ bytes|is damaged)"):
        load_memory(copied_memory)
    reseal(copied_memory, "config.json")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(MemlmError, match=message):
        load_memory(copied_memory)


def test_settings_of_no_kind_or_that_are_changed_are_refused(copied_memory: Path) -> None:
    path = copied_memory / "memory.json"
    path.write_text(path.read_text().replace("decoder", "recoded"))
    with pytest.raises(ArtifactError, match=r"memory\.json is damaged"):
        load_memory(copied_memory)
    path.write_text('{"kind": ["decoder"]}')
    reseal(copied_memory, "memory.json")
    with pytest.raises(ArtifactError, match=r"kind \"\['decoder'\]\" is unknown"):
        load_memory(copied_memory)


@pytest.mark.parametrize(
    "name",
    [
        *("added_tokens.json", "special_tokens_map.json", "vocab.json", "tokenizer.model", "chat_template.jinja"),
        *("adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin", "modeling_own.py"),
    ],
)
@pytest.mark.parametrize("how", ["link", "file"])
def test_what_libraries_would_read_beside_a_memorys_own_files_is_refused(
    copied_memory: Path, tmp_path: Path, name: str, how: str
) -> None:
    (tmp_path / "outside").write_text("{}")
    if how == "link":
        (copied_memory / name).symlink_to(tmp_path / "outside")
    else:
        (copied_memory / name).write_text("{}")
    for look in (load_memory, lambda folder: load_tokenizer(str(folder))):
        with pytest.raises(ArtifactError, match=rf"{re.escape(name)} is none of the files that its manifest names"):
            look(copied_memory)


def test_what_no_library_reads_may_lie_beside_a_memorys_own_files(copied_memory: Path) -> None:
    for name in (".gitattributes", "notes.md", "results.csv"):
        (copied_memory / name).write_text("own")
    (copied_memory / "evaluation").mkdir()
    assert load_memory(copied_memory).vocab_size == len(load_tokenizer(str(copied_memory)))


def test_a_memory_saved_over_another_has_not_that_ones_head(memory_folder: Path, tmp_path: Path) -> None:
    memory = load_memory(memory_folder)
    memory.confidence_head = ConfidenceHead(
        memory="m", tokenizer=memory.settings.tokenizer, state=[], features=[0.0] * 5, bias=1.0, base="b"
    )
    for head in (memory.confidence_head, None):
        memory.confidence_head = head
        memory.save_pretrained(tmp_path / "m")
        assert load_memory(tmp_path / "m").confidence_head == head
