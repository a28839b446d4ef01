from pathlib import Path

import pytest
import torch
from architectures import tiny_config, tiny_model
from families import ALTERNATING, family_config, family_model, token_ids
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from memlm.errors import ConfigError
from memlm.models.layers import check_layers, fresh_model, keep_layers, outer_layers
from memlm.models.loading import block_list, load_causal_lm


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(length=20), use_cache=False).logits


def without_block(model: PreTrainedModel, *dropped: int) -> torch.Tensor:
    """The model's logits with some blocks turned into the identity."""

    def undo(_: object, args: tuple, kwargs: dict, output: object) -> object:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    blocks = block_list(model)[1]
    handles = [blocks[number].register_forward_hook(undo, with_kwargs=True) for number in dropped]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3", "gpt_neox", "opt", "bloom", "mixtral"])
def test_keeping_layers_equals_skipping_the_others_and_survives_saving(family: str, tmp_path: Path) -> None:
    model = family_model(family, tied=None)
    smaller = keep_layers(model, [0, 2])
    expected = without_block(model, 1)
    torch.testing.assert_close(logits(smaller), expected, rtol=1e-6, atol=1e-6)  # the same float32 operations
    assert (expected - logits(model)).abs().max() > 1e-2  # the block mattered
    smaller.save_pretrained(tmp_path / "smaller")
    loaded = load_causal_lm(str(tmp_path / "smaller"))
    assert loaded.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(loaded), logits(smaller), rtol=0, atol=0)


def test_keeping_layers_keeps_what_is_told_of_each_layer() -> None:
    model = family_model("gemma3", layers=7)
    smaller = keep_layers(model, [2, 5])
    assert smaller.config.layer_types == [model.config.layer_types[i] for i in (2, 5)] == ALTERNATING
    torch.testing.assert_close(
        smaller.model.layers[1].mlp.up_proj.weight, model.model.layers[5].mlp.up_proj.weight, rtol=0, atol=0
    )


def test_keeping_all_layers_changes_nothing_and_copies() -> None:
    model = family_model("llama")
    same = keep_layers(model, 3)
    torch.testing.assert_close(logits(same), logits(model), rtol=0, atol=0)
    with torch.no_grad():
        same.get_input_embeddings().weight.zero_()
    assert model.get_input_embeddings().weight.abs().sum() > 0


def test_a_number_of_layers_takes_them_from_both_ends() -> None:
    assert outer_layers(1, 5) == [0]
    assert outer_layers(3, 5) == [0, 1, 4]
    assert outer_layers(4, 30) == [0, 1, 28, 29]
    assert outer_layers(5, 5) == [0, 1, 2, 3, 4]
    model = family_model("llama", layers=5)
    kept = keep_layers(model, 3).model.layers
    for new, old in enumerate([0, 1, 4]):
        assert torch.equal(kept[new].mlp.up_proj.weight, model.model.layers[old].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, "layers = 0: the start model has 3"),
        (4, "layers = 4: the start model has 3"),
        ([], r"layers = \[\]: give ascending numbers from 0 to 2"),
        ([0, 3], r"layers = \[0, 3\]: give ascending"),
        ([-1, 0], "give ascending"),
        ([2, 0], "give ascending"),
        ([1, 1], "give ascending"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: int | list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        keep_layers(family_model("llama"), layers)


def test_a_fresh_model_depends_on_the_seed_alone_and_leaves_the_generator() -> None:
    state = torch.get_rng_state()
    first, second, other = (fresh_model(family_config("qwen3"), 2, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(block_list(first)[1]) == 2
    torch.testing.assert_close(logits(first), logits(second), rtol=0, atol=0)
    assert not torch.equal(logits(first), logits(other))
    with pytest.raises(ConfigError, match=r"layers = 9: .* has 3"):
        fresh_model(family_config("llama"), 9, 0)


# --- models whose blocks depend on their number -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("gemma2", [0, 3]),  # windows in every other block
        ("gemma3", [1, 2]),  # a language model within a larger one
        ("recurrent_gemma", [0, 1]),
        ("xlstm", [0, 3]),
        ("jamba", [0, 3]),
        ("deepseek_v3", [0, 3]),  # the first blocks without experts
        ("glm4_moe", [0, 3]),
        ("llama4_text", [1, 2]),
        ("modernbert-decoder", [0, 3]),
        ("bart", [0, 3]),  # a depth by another name
    ],
)
def test_blocks_that_differ_stay_what_they_are(architecture: str, layers: list[int], tmp_path: Path) -> None:
    windows = ("sliding_window", "local_attention", "attention_chunk_size", "attention_window_size")
    text = tiny_config(architecture).get_text_config()
    model = tiny_model(architecture, **{name: 6 for name in windows if getattr(text, name, None)})
    check_layers(model.config, layers)
    smaller = keep_layers(model, layers)
    first, second = set(range(4)) - set(layers)
    expected = without_block(model, first, second)
    torch.testing.assert_close(logits(smaller), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(model)).abs().max() > 1e-2  # the blocks mattered
    smaller.save_pretrained(tmp_path / "smaller")
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / "smaller"))), logits(smaller), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "layers", "changes", "reason"),
    [
        ("jamba", [1, 2], {}, "layer_types follows a pattern that they break"),
        ("recurrent_gemma", [1, 2], {}, "layers_block_type follows a pattern that they break"),
        (
            "qwen3_moe",
            [1, 2],
            {"decoder_sparse_step": 2},
            r"block 1 would be .*\(mlp is: Qwen3MoeSparseMoeBlock",
        ),
        (
            "modernbert-decoder",
            [1, 2],
            {},
            r"block 1 would be .*\(attn_norm is: LayerNorm, would be Identity\)",
        ),
        ("diffllama", [0, 3], {}, r"block 3 would be another one \(self_attn.lambda_init"),
        ("gemma3n_text", [0, 3], {}, "block 0 would be another one"),
        ("hrm_text", [0, 3], {}, "does not tell its blocks one by one"),
        ("gemma4_text", [0, 3], {}, "(has a part for every layer|block 0 would be another)"),
        ("gpt2", [1, 2], {"scale_attn_by_inverse_layer_idx": True}, r"block 1 would be another one \(attn.scaling"),
    ],
)
def test_layers_that_would_be_others_are_refused_in_a_line(
    architecture: str, layers: list[int], changes: dict, reason: str
) -> None:
    message = rf"^layers = \[\d, \d\]: .*{reason}.*; leave layers out to keep all, or choose others$"
    with pytest.raises(ConfigError, match=message):
        keep_layers(tiny_model(architecture, **changes), layers)
    if "part for" not in reason:  # the blocks are not all
        with pytest.raises(ConfigError, match=message):
            check_layers(tiny_config(architecture, **changes), layers)


def test_a_list_that_is_as_long_as_the_model_is_deep_by_chance_stays() -> None:
    model = tiny_model("llama", eos_token_id=[2, 5, 6, 7])
    assert keep_layers(model, [0, 3]).config.eos_token_id == [2, 5, 6, 7]


def test_a_block_that_computes_by_its_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) * (1 + self.place[0]))
    model = family_model("llama")
    for place, block in enumerate(model.model.layers):
        block.mlp.place = torch.tensor([place])
    monkeypatch.setattr(LlamaMLP, "place", torch.tensor([0]), raising=False)
    with pytest.raises(ConfigError, match="block 1 computes something else at another place"):
        keep_layers(model, [1, 2])
