import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TAPS, VOCABULARY, family_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from memlm.errors import ConfigError, ModelError
from memlm.models.identity import model_identity
from memlm.models.loading import (
    block_list,
    load_causal_lm,
    load_config,
    parse_dtype,
    resolve,
)
from memlm.models.tokenizers import load_tokenizer


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("family", TAPS)
def test_the_block_list_is_the_list_of_blocks(family: str) -> None:
    name, blocks = block_list(family_model(family))
    assert TAPS[family].startswith(f"{name}.2.")
    assert len(blocks) == 3


def test_a_model_that_cannot_be_reached_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model 'nobody/nothing' cannot be loaded; tried: no folder 'nobody/nothing' here"
    ) as e:
        load_causal_lm("nobody/nothing")
    assert "not one of the packaged models (smollm2)" in str(e.value)
    with pytest.raises(ModelError, match="model 'SmolM2' cannot be loaded; did you mean smollm2"):
        load_causal_lm("SmolM2")
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ModelError, match=f"did you mean {tmp_path}/teacher"):
        load_causal_lm(f"{tmp_path}/techer")
    assert "as a hub id: " in str(e.value)
    assert "\n" not in str(e.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"tried: folder '.*empty'; "):
        load_config(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"tried: folder '.*empty'; "):
        load_causal_lm(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded from 'nobody/nothing' \("):
        load_tokenizer("nobody/nothing")
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded from 'smollm3'; did you mean smollm2\? \("):
        load_tokenizer("smollm3")


def test_damaged_weights_are_refused_in_one_line(model_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot be loaded; tried: folder") as caught:
        load_causal_lm(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", TAPS)
def test_a_whole_checkpoint_is_known_to_be_one(family: str, tmp_path: Path) -> None:
    model = family_model(family, layers=1, tied=None)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path), exact=True)), logits(model), rtol=0, atol=0)


def test_random_weights_in_the_place_of_missing_ones_are_refused(model_folder: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    spoilt = {
        f"lacks tensors, the first of 1 is {name}: not a LlamaForCausalLM": {name: None},
        f"has misshapen tensors, the first of 1 is {name}": {name: torch.zeros(3, 3)},
    }
    for message, change in spoilt.items():
        kept = {key: tensor for key, tensor in (whole | change).items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message):
            load_causal_lm(str(folder))
    save_file(whole | {"extra": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    load_causal_lm(str(folder))
    with pytest.raises(ModelError, match="has unknown tensors, the first of 1 is extra"):
        load_causal_lm(str(folder), exact=True)


def test_identity_changes_with_the_weights_alone(model_folder: str, tmp_path: Path) -> None:
    for name in ("same", "other"):
        shutil.copytree(model_folder, tmp_path / name)
    weights = tmp_path / "other" / "model.safetensors"
    tensors = load_file(weights)
    tensors[min(tensors)].view(-1)[0] += 1.0
    save_file(tensors, weights, metadata={"format": "pt"})
    assert model_identity(str(tmp_path / "same")) == model_identity(model_folder)
    assert model_identity(str(tmp_path / "other")) != model_identity(model_folder)


def test_a_path_stands_for_itself_and_an_unknown_name_for_a_hub_id(model_folder: str) -> None:
    assert resolve(model_folder) == model_folder
    assert resolve("someone/model") == "someone/model"


def test_loading_keeps_or_changes_the_type_of_the_weights(model_folder: str) -> None:
    assert load_causal_lm(model_folder).dtype == torch.float32
    half = load_causal_lm(model_folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert not half.training
    assert load_config(model_folder).vocab_size == half.config.vocab_size > VOCABULARY


def test_dtypes_have_names() -> None:
    assert parse_dtype("bf16") is parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype("float16") is torch.float16
    assert parse_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)
    with pytest.raises(ConfigError, match="dtype = 'int8': known are auto, float32, bfloat16, float16"):
        parse_dtype("int8")


def plain(model_folder: str, folder: Path, **change: object) -> Path:
    """A copy of a plain model, its config changed."""
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3_000_000}, r"config\.json: num_hidden_layers = 3000000, but there are \d+ tensors"),
        ({"num_hidden_layers": 10**15}, r"config\.json: num_hidden_layers = 1000000000000000, but there are \d+"),
        ({"num_hidden_layers": math.inf}, r"config\.json: num_hidden_layers = inf, but"),
        ({"text_config": {"n_layer": 10**9}}, r"config\.json: n_layer = 1000000000, but"),
        ({"vocab_size": 10**10}, r"config\.json asks for [\d,]+ parameters, but model .* has [\d,]+ bytes of weights"),
        ({"intermediate_size": 10**10}, r"config\.json asks for [\d,]+ parameters, but"),
        ({"num_hidden_layers": 900}, r"config\.json asks for [\d,]+ parameters, but"),
    ],
)
def test_a_plain_config_beyond_the_weights_is_refused_before_the_model_is_made(
    model_folder: str, tmp_path: Path, change: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain(model_folder, tmp_path / "plain", **change)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was made"))
    with pytest.raises(ModelError, match=message) as caught:
        load_causal_lm(str(folder))
    assert len(str(caught.value).splitlines()) == 1
    if "layer" in "".join(map(str, change.items())) and change.get("num_hidden_layers") != 900:
        monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("it was read"))
        with pytest.raises(ModelError, match=message):
            load_config(str(folder))


def test_a_plain_model_whose_weights_fit_loads_as_before(model_folder: str, tmp_path: Path) -> None:
    model = load_causal_lm(str(plain(model_folder, tmp_path / "plain")))
    assert sum(p.numel() for p in model.parameters()) > 0


def test_a_config_that_asks_for_a_name_for_each_of_a_great_many_labels_is_refused(
    model_folder: str, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_labels": 10_000_000}))
    for load in (load_config, load_causal_lm):
        with pytest.raises(ModelError, match="num_labels = 10000000, more than the 100,000"):
            load(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"eos_token_id": "</s>"}, "Validation error for field 'eos_token_id': TypeError: .* with value '</s>'"),
        ({"rope_parameters": "x"}, "field 'rope_parameters'"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantization requires AQLM"),
        ({"quantization_config": "x"}, "to_dict"),
        ({"hidden_act": "none such"}, "none such"),
    ],
)
def test_a_config_that_transformers_or_a_missing_library_refuses_is_one_line(
    model_folder: str, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = plain(model_folder, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=f"model '.*odd' cannot be loaded; tried: folder .*{reason}") as caught:
        load_causal_lm(str(folder))
    assert len(str(caught.value).splitlines()) == 1
