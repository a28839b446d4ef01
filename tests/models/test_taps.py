import copy

import pytest
import torch
from architectures import tiny_model
from families import TAPS, WIDTH, family_model, token_ids
from torch import nn
from transformers import PreTrainedModel

from memlm.errors import ModelError
from memlm.models.taps import TapReader, capture, find_tap, get_module, resolve_tap, tap_width


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def input_in_full_forward(model: PreTrainedModel, module_name: str, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    module = model.get_submodule(module_name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", TAPS)
def test_the_tap_is_the_input_of_the_last_mlp_and_the_head_is_never_computed(family: str) -> None:
    model, tokens = family_model(family), token_ids()
    expected = input_in_full_forward(model, TAPS[family], tokens)

    def computed(*_: object) -> None:
        raise AssertionError("the output layer ran")

    head = model.get_output_embeddings()
    head.register_forward_pre_hook(computed)
    before = hooks(model)
    tap = find_tap(model)
    assert tap == TAPS[family]
    reader = TapReader(model, tap)
    found = reader.read(tokens)
    again = reader.read(tokens)
    assert found.shape == (*tokens.shape, WIDTH)
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=0, atol=0)
    torch.testing.assert_close(again, found, rtol=0, atol=0)
    assert hooks(model) == before


@pytest.mark.parametrize(
    ("architecture", "tap"),
    [
        ("falcon_h1", "model.layers.3.feed_forward"),  # a Mamba beside the attention
        ("gemma3n_text", "model.layers.3.mlp"),  # a low-rank projection before the attention
        ("axk2", "model.layers.3.mlp"),  # norms with matrices
        ("deepseek_v4", "model.layers.3.mlp"),  # connections with matrices
        ("inkling_text", "model.layers.3.mlp"),  # a convolution behind the MLP
        ("longcat_flash", "model.layers.3.mlps.1"),  # two attentions and two MLPs in a block
        ("nemotron_h", "model.layers.3.mixer"),  # a block that is an MLP
        ("got_ocr2", "model.language_model.layers.3.mlp"),  # an eye larger than the language model
        ("git", "git.encoder.layer.3.intermediate"),
    ],
)
def test_the_tap_is_found_by_what_modules_do(architecture: str, tap: str) -> None:
    assert find_tap(tiny_model(architecture)) == tap


@pytest.mark.parametrize(
    ("architecture", "tap", "fault"),
    [
        ("hrm_text", "model.L_module.layers.3.mlp", "is called several times"),
        ("xlnet", "transformer.layer.3.ff", "has not one vector for each token"),  # tokens first, rows second
        ("prophetnet", "prophetnet.decoder.layers.3.feed_forward", "has not one vector for each token"),
        ("llama", "lm_head", "is never called"),
    ],
)
def test_a_tap_without_one_vector_for_each_token_is_refused(architecture: str, tap: str, fault: str) -> None:
    model = tiny_model(architecture)
    with pytest.raises(ModelError, match=fault):
        resolve_tap(model, tap)
    if architecture != "llama":
        with pytest.raises(ModelError, match="no MLP was found"):
            find_tap(model)


def test_nothing_behind_the_tap_runs() -> None:
    model = family_model("llama")
    tap = find_tap(model)
    ran = []
    get_module(model, "model.layers.0").register_forward_pre_hook(lambda *_: ran.append("first block"))
    for name in ("model.layers.2.mlp.gate_proj", "model.layers.2.mlp.down_proj", "model.norm"):
        get_module(model, name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    reader = TapReader(model, tap)
    reader.read(token_ids())
    assert ran == ["first block"]


def test_right_padding_changes_nothing_before_it() -> None:
    model = family_model("llama")
    tokens = token_ids(1, 6)
    padded = torch.cat([tokens, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    reader = TapReader(model, find_tap(model))
    alone, beside = reader.read(tokens), reader.read(padded)[:, :6]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_hooks_are_gone_after_an_error_too() -> None:
    model = family_model("llama")
    before = hooks(model)
    reader = TapReader(model, find_tap(model))
    with pytest.raises(IndexError):
        reader.read(torch.full((1, 3), 10_000))
    assert hooks(model) == before
    model(input_ids=token_ids())  # whole again


def test_a_state_space_model_is_refused_in_one_line_that_names_tap() -> None:
    model = family_model("mamba")
    before = hooks(model)
    with pytest.raises(ModelError, match=r"^no MLP .* block 2 of MambaForCausalLM.*with --tap$") as caught:
        find_tap(model)
    assert "\n" not in str(caught.value)
    assert hooks(model) == before


def test_a_named_tap_reads_where_no_mlp_is_found() -> None:
    model, tokens = family_model("mamba"), token_ids()
    reader = TapReader(model, "backbone.layers.2.mixer")
    found = reader.read(tokens)
    expected = input_in_full_forward(model, "backbone.layers.2.mixer", tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_tap_that_does_not_exist_names_near_ones() -> None:
    with pytest.raises(ModelError, match=r"tap 'model\.layers\.2\.mpl' does not exist.*nearest: model\.layers\.2\.mlp"):
        TapReader(family_model("llama"), "model.layers.2.mpl")


def test_a_tap_that_is_never_called_is_refused() -> None:
    model = family_model("llama")
    reader = TapReader(model, "lm_head")
    with pytest.raises(ModelError, match="is never called in a forward pass"):
        reader.read(token_ids())


@pytest.mark.parametrize("family", TAPS)
def test_capture_gives_what_goes_in_during_a_whole_forward_pass(family: str) -> None:
    model, tokens = family_model(family), token_ids()
    taps = {TAPS[family], find_tap(model, 0.5)}
    expected = {tap: input_in_full_forward(model, tap, tokens) for tap in taps}
    before = hooks(model)
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        with capture(model, taps) as found:
            logits = model(input_ids=tokens).logits
    assert found.keys() == expected.keys()
    assert len(taps) == 2
    for tap in taps:
        torch.testing.assert_close(found[tap], expected[tap], rtol=0, atol=0)
    assert torch.equal(logits, plain)
    assert hooks(model) == before


def test_capture_leaves_no_hook_behind_an_error() -> None:
    model = family_model("llama")
    before = hooks(model)
    with (
        pytest.raises(ModelError, match="does not exist"),
        capture(model, ["model.layers.0.mlp", "model.layers.7.mlp"]),
    ):
        pass
    assert hooks(model) == before
    with pytest.raises(IndexError), capture(model, ["model.layers.0.mlp"]):
        model(input_ids=torch.full((1, 3), 10_000))
    assert hooks(model) == before


@pytest.mark.parametrize("family", TAPS)
def test_the_width_is_known_without_running_the_model(family: str) -> None:
    model = family_model(family)
    assert tap_width(model, TAPS[family]) == input_in_full_forward(model, TAPS[family], token_ids()).shape[-1]


def test_the_width_is_that_of_the_taps_own_input() -> None:
    assert tap_width(family_model("llama"), "model.layers.2.mlp.down_proj") == 2 * WIDTH
    assert tap_width(family_model("gpt2"), "transformer.h.0.mlp.c_proj") == 4 * WIDTH
    assert tap_width(family_model("llama"), "model.layers.2.input_layernorm") == WIDTH


def test_a_module_is_found_once_and_anew_where_one_on_the_way_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("llama")
    tap = find_tap(model)
    walked: list[str] = []
    walk = torch.nn.Module.get_submodule
    monkeypatch.setattr(torch.nn.Module, "get_submodule", lambda self, path: walked.append(path) or walk(self, path))
    first = get_module(model, tap)
    walked.clear()
    assert get_module(model, tap) is first
    assert not walked
    parent, _, name = tap.rpartition(".")
    other = copy.deepcopy(walk(model, parent))
    block = walk(model, parent.rpartition(".")[0])
    if block is walk(model, "model.layers"):
        block[int(parent.rpartition(".")[2])] = other
    else:
        setattr(block, parent.rpartition(".")[2], other)
    assert get_module(model, tap) is getattr(other, name) is not first
    copied = copy.deepcopy(model)
    assert get_module(copied, tap) is walk(copied, tap)
