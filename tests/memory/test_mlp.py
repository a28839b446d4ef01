"""MLPMemory beyond the shared protocol: its blocks, its start from a base, its place beside it, what it refuses."""

import contextlib
import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model as model_of
from conftest import tiny_model
from families import TAPS, VOCABULARY, WIDTH, family_model, token_ids
from reference_lm import dense_distillation_loss, dense_targets, mixed_probs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.errors import ArtifactError, ConfigError, MemlmError, ModelError
from memlm.memory.config import MLPStart
from memlm.memory.loading import load_memory
from memlm.memory.mlp import SIZES, FFNStyle, MLPBlock, MLPMemory, MLPSettings, ffn_style
from memlm.memory.protocol import MemorySettings
from memlm.mix.mixed_lm import MixedLM
from memlm.models.heads import find_head
from memlm.models.taps import TapReader, capture, find_tap

PLAIN = {"gated": False, "norm": "layer", "norm_eps": 1e-5}
GATED = {"gated": True, "norm": "rms", "norm_eps": 1e-6, "bias": False}
# float32 sums in another order, of some ten numbers of order 1
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def start(base: PreTrainedModel, *, seed: int = 0, **config: Any) -> MLPMemory:
    settings = MemorySettings(kind="mlp", vocab_size=base.config.get_text_config().vocab_size)
    return MLPMemory.start(MLPStart(**config), settings, init=None, base=base, seed=seed).eval()


def moved(memory: MLPMemory) -> MLPMemory:
    """The memory as if trained: FFNs start at zero, so they would do nothing."""
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim)))
    return memory


def at_tap(base: PreTrainedModel, tap: str, tokens: Tensor) -> Tensor:
    reader = TapReader(base, tap)
    return reader.read(tokens)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# --- the network ------------------------------------------------------------------------------------------------------


def normed(x: Tensor, norm: nn.Module, style: FFNStyle) -> Tensor:
    """LayerNorm and RMSNorm as their papers write them."""
    if style.norm == "layer":
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + style.norm_eps).sqrt() * norm.weight + norm.bias
    return x / (x.pow(2).mean(-1, keepdim=True) + style.norm_eps).sqrt() * norm.weight


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


STYLES = {
    "gated": FFNStyle(**GATED, activation="silu"),
    "plain": FFNStyle(**PLAIN, bias=True, activation="relu"),
    "plain without bias": FFNStyle(**PLAIN, bias=False, activation="relu"),
}
ACTS = {"silu": lambda x: x / (1 + (-x).exp()), "relu": lambda x: x * (x > 0)}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_block_is_its_formula(style: FFNStyle) -> None:
    block = MLPBlock(6, 10, style).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    h, act = normed(x, block.norm, style), ACTS[style.activation]
    if style.gated:
        assert block.gate is not None
        inner = act(linear(h, block.gate)) * linear(h, block.up)
    else:
        inner = act(linear(h, block.up))
    torch.testing.assert_close(block(x), x + linear(inner, block.down))
    assert {name.rpartition(".")[2] for name, _ in block.up.named_parameters()} == (
        {"weight", "bias"} if style.bias else {"weight"}
    )


@pytest.mark.parametrize("width", [None, 12])
def test_the_memory_is_projection_blocks_norm_and_head(width: int | None) -> None:
    base = family_model("llama")
    memory = moved(start(base, layers=3, width=width, ffn_width=20))
    x = torch.randn(2, 5, WIDTH)
    assert (memory.input is None) == (width is None)
    found = memory.votes(memory.step(token_ids(2, 5), x), slice(None))
    h = x if memory.input is None else linear(x, memory.input)
    assert len(memory.blocks) == 3
    for block in memory.blocks:
        h = block(h)
    logits = linear(normed(h, memory.norm, memory.settings.style), memory.output)
    torch.testing.assert_close(found, logits.log_softmax(-1), **CLOSE)


@pytest.mark.parametrize("kl_weight", [0.0, 0.4, 1.0])
def test_forward_gives_the_dense_loss_of_the_places_that_predict(kl_weight: float) -> None:
    memory = moved(start(family_model("llama"), layers=2))
    tokens = token_ids(2, 7)
    labels = tokens.clone()
    labels[:, 0] = labels[0, 5:] = labels[1, :3] = -100
    wanted = labels[:, 1:][labels[:, 1:] != -100]
    x = torch.randn(len(wanted), WIDTH)
    counts = torch.arange(len(wanted)) % 3 + 1
    ids = torch.cat([torch.randperm(VOCABULARY)[:count] for count in counts.tolist()])
    probs = torch.rand(len(ids)) + 0.1
    found = memory(tokens, labels, kl_weight, x, counts, ids, probs)
    found.loss.backward()
    gradient = memory.blocks[0].up.weight.grad.clone()
    memory.zero_grad()
    targets = dense_targets(counts, ids, probs, VOCABULARY)
    hidden = memory.body(x)
    loss, _, cross_entropy = dense_distillation_loss(
        hidden, memory.output.weight, None, wanted, targets, kl_weight=kl_weight, vocab_size=VOCABULARY
    )
    loss.backward()
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.cross_entropy.double(), cross_entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, memory.blocks[0].up.weight.grad, rtol=1e-3, atol=1e-4)


# --- its start from a base --------------------------------------------------------------------------------------------

BASES = {
    "gpt2": FFNStyle(**PLAIN, bias=True, activation="gelu_new"),
    "llama": FFNStyle(**GATED, activation="silu"),
    "mistral": FFNStyle(**GATED, activation="silu"),
    "qwen2": FFNStyle(**GATED, activation="silu"),
    "qwen3": FFNStyle(**GATED, activation="silu"),
    "gemma2": FFNStyle(**GATED, activation="gelu_pytorch_tanh"),
    "gemma3": FFNStyle(**GATED, activation="gelu_pytorch_tanh"),
    "gpt_neox": FFNStyle(**PLAIN, bias=True, activation="gelu"),
    "phi": FFNStyle(**PLAIN, bias=True, activation="gelu_new"),
    "opt": FFNStyle(**PLAIN, bias=True, activation="relu"),
    "bloom": FFNStyle(**PLAIN, bias=True, activation="gelu"),
    "mixtral": FFNStyle(**{**GATED, "norm_eps": 1e-5}, activation="silu"),
}
"""Family to its style, read off transformers' code by a person; a Bloom's own GELU is an approximation of this one."""


def test_every_family_with_a_tap_is_here() -> None:
    assert set(BASES) == set(TAPS)


@pytest.mark.parametrize("family", BASES)
def test_style_and_inner_width_are_read_off_the_bases_modules(family: str) -> None:
    """Four times the width where the family has no setting for it (GPT-2, Bloom), or experts (Mixtral)."""
    style, ffn_width = ffn_style(family_model(family))
    assert style == BASES[family]
    assert ffn_width == (4 if family in ("gpt2", "bloom", "mixtral") else 2) * WIDTH


FINAL_NORMS = {
    "gpt2": "transformer.ln_f",
    "bloom": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "phi": "model.final_layernorm",
    "opt": "model.decoder.final_layer_norm",
}


@pytest.mark.parametrize("family", TAPS)
def test_an_untrained_memory_is_the_bases_final_norm_and_output_layer_on_its_activations(family: str) -> None:
    """Norms are made random first: fresh ones multiply by one, so that copying nothing would do as well."""
    base = family_model(family, tied=None)
    for module in base.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.4)
    memory = start(base, layers=2, head="base")
    x = at_tap(base, memory.tap or "", token_ids())
    with torch.no_grad():
        logits = base.get_submodule(FINAL_NORMS.get(family, "model.norm"))(x) @ find_head(base).weight.T
        found = memory.votes(memory.step(token_ids(), x), slice(None))
    torch.testing.assert_close(found, logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_gemmas_norm_counts_from_one() -> None:
    base = family_model("gemma3")
    with torch.no_grad():
        base.model.norm.weight.fill_(0.5)
    # the norm of a vector of ones is its weight but for eps = 1e-6
    torch.testing.assert_close(start(base).norm.weight.data, torch.full((WIDTH,), 1.5), rtol=1e-5, atol=0)


def test_a_head_of_its_own_is_drawn_by_the_seed() -> None:
    base = family_model("llama")
    drawn = [start(base, seed=seed, head="random").output.weight for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], base.lm_head.weight, atol=0.01)
    assert torch.equal(start(base).output.weight, base.lm_head.weight)


def test_another_width_leaves_the_bases_head() -> None:
    base = family_model("llama")
    memory = start(base, width=12)
    assert memory.output.weight.shape == (VOCABULARY, 12)
    assert memory.settings.ffn_width == 48
    with pytest.raises(ConfigError, match="head = 'base': the memory is 12 wide, the base's head is not"):
        start(base, width=12, head="base")


def test_defaults_are_eight_blocks_as_the_bases_at_the_last_mlp() -> None:
    settings = start(family_model("opt")).settings
    assert (settings.layers, settings.width, settings.input_width, settings.ffn_width) == (8, WIDTH, WIDTH, 2 * WIDTH)
    assert (settings.tap, settings.base_blocks) == (TAPS["opt"], 3)


@pytest.mark.parametrize("like", SIZES)
def test_sizes_of_the_paper_by_name(like: Any) -> None:
    """On the meta device, for the large one has half a billion parameters; what reads weights is scripted."""
    with torch.device("meta"):
        base = family_model("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memlm.memory.mlp.ffn_style", lambda base: (BASES["gpt2"], 4 * WIDTH))
        patch.setattr("memlm.memory.mlp.resolve_tap", lambda base, tap: TAPS["gpt2"])
        with torch.device("meta"):
            settings = start(base, like=like).settings
    assert (settings.layers, settings.width, settings.ffn_width) == {
        "small": (18, 768, 3072),
        "medium": (36, 1024, 4096),
        "large": (54, 1280, 5120),
    }[like]
    assert settings.input_width == WIDTH


@pytest.mark.parametrize(
    ("tap", "block"), [("1", 2), ("0.67", 1), ("0.34", 0), ("0.01", 0), ("model.layers.1.mlp", 1), ("auto", 2)]
)
def test_the_tap_is_a_share_of_the_depth_or_a_module(tap: str, block: int) -> None:
    memory = start(family_model("llama"), tap=tap)
    assert memory.tap == f"model.layers.{block}.mlp"
    assert memory.settings.input_width == WIDTH


@pytest.mark.parametrize("tap", ["0", "1.5", "-0.5"])
def test_a_share_of_the_depth_outside_its_range_is_refused(tap: str) -> None:
    with pytest.raises(ConfigError, match=rf"tap = {tap}: a share of the depth must be in \(0, 1\]"):
        start(family_model("llama"), tap=tap)


def test_a_tap_that_does_not_exist_names_near_ones() -> None:
    with pytest.raises(ModelError, match=r"nearest: model\.layers\.1\.mlp"):
        start(family_model("llama"), tap="model.layers.1.mpl")


@pytest.mark.parametrize(
    ("config", "init", "goes_on", "message"),
    [
        ({"fresh": True}, None, False, "unknown setting 'fresh'"),
        ({"layers": [0, 1]}, None, False, r"layers = \[0, 1\]: input should be a valid integer"),
        ({"layers": 0}, None, False, "layers = 0: input should be greater than or equal to 1"),
        ({"like": "small", "layers": 3}, None, False, "like = 'small' and layers = 3: give one of them"),
        ({"like": "small", "ffn_width": 8}, None, False, "like = 'small' and ffn_width = 8: give one of them"),
        ({}, "gpt2", False, "init = 'gpt2': an mlp memory starts fresh, or from another mlp memory's folder"),
        ({"layers": 3}, "m", True, "layers = 3: --init m decides it"),
        ({"like": "small"}, "m", True, "like = 'small': --init m decides it"),
        ({"tap": "0.5"}, "m", True, "tap = '0.5': --init m decides it"),
        ({"head": "random"}, "m", True, "head = 'random': --init m decides it"),
    ],
    ids=str,
)
def test_starts_that_contradict_themselves_are_refused(
    config: dict[str, Any], init: str | None, goes_on: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MLPMemory.check_start(MLPStart.parse(config), init=init, goes_on=goes_on, block_size=32)


# --- beside its base --------------------------------------------------------------------------------------------------


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_model(64)


@pytest.fixture
def mixed(base: PreTrainedModel) -> MixedLM:
    return MixedLM(base, moved(start(base, layers=2)), 0.4)


def mixed_by_hand(mixed: MixedLM, tokens: Tensor) -> Tensor:
    """What the mixture says after the last of `tokens`, each part read apart."""
    memory = mixed.named_memories()["memory"]
    with torch.no_grad():
        theirs = mixed.base(tokens).logits[:, -1].double().softmax(-1)
        ours = memory.votes(memory.step(tokens, at_tap(mixed.base, str(memory.tap), tokens)), slice(-1, None))[:, 0]
    return mixed_probs(theirs, [ours.double().exp()], [0.4])


def test_generation_takes_what_base_and_memory_say_together(mixed: MixedLM) -> None:
    prompt = token_ids(1, 6)
    found = mixed.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    tokens = prompt
    for _ in range(8):
        tokens = torch.cat([tokens, mixed_by_hand(mixed, tokens).argmax(-1, keepdim=True)], 1)
    assert found.tolist() == tokens.tolist()


def test_decoding_runs_blocks_and_head_for_one_place_per_row(mixed: MixedLM) -> None:
    memory = mixed.named_memories()["memory"]
    assert isinstance(memory, MLPMemory)
    seen: dict[str, list[int]] = {"head": [], "block": []}
    memory.output.register_forward_pre_hook(lambda _, args: seen["head"].append(args[0].shape[:-1].numel()))
    memory.blocks[0].register_forward_pre_hook(lambda _, args: seen["block"].append(args[0].shape[:-1].numel()))
    mixed.generate(token_ids(3, 7), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert seen == {"head": [3] * 5, "block": [3] * 5}


def test_no_hooks_are_left_on_the_base(mixed: MixedLM, base: PreTrainedModel) -> None:
    before = hooks(base)
    mixed(token_ids())
    mixed.generate(token_ids(), max_new_tokens=3)
    assert hooks(base) == before
    with pytest.raises(IndexError):
        mixed(torch.full((1, 3), -1))
    assert hooks(base) == before
    memory = mixed.named_memories()["memory"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(memory), "step", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mixed(token_ids())
    assert hooks(base) == before


def test_capture_keeps_no_activations_alive(base: PreTrainedModel) -> None:
    with capture(base, [find_tap(base)]) as found:
        base(token_ids())
    activation = weakref.ref(found.pop(find_tap(base)))
    gc.collect()
    assert activation() is None


def test_a_base_of_other_width_or_depth_is_refused(base: PreTrainedModel) -> None:
    memory = start(base)
    memory.check_base(tiny_model(64, seed=1))
    with pytest.raises(ModelError, match=r"a base with 2 blocks, 32 wide; this LlamaForCausalLM has 2, 16 wide: train"):
        memory.check_base(tiny_model(64, width=16))
    with pytest.raises(ModelError, match=r"has 3, 32 wide: train one for it \(memlm train --kind mlp\)"):
        MixedLM(tiny_model(64, layers=3), memory, 0.5)


def test_a_base_without_the_tap_is_refused_with_near_names(base: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp' does not exist in OPT.*nearest: model\.decoder\."):
        start(base).check_base(family_model("opt"))


def test_activations_that_are_missing_or_of_another_width_are_refused(base: PreTrainedModel) -> None:
    memory = start(base)
    with pytest.raises(ModelError, match="reads the base's activations; there are none"):
        memory.step(token_ids())
    with pytest.raises(ModelError, match="reads activations 32 wide; the base's are 31 wide"):
        memory.step(token_ids(), torch.zeros(2, 9, 31))


# --- its folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(base: PreTrainedModel, tmp_path: Path) -> Path:
    moved(start(base, layers=2)).save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


def test_it_loads_in_the_precision_asked_for(folder: Path) -> None:
    assert {p.dtype for p in load_memory(folder).parameters()} == {torch.float32}
    for asked in ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": "bfloat16", "device_map": "auto"}):
        memory = load_memory(folder, **{"device_map": {"": "cpu"}, **asked})
        assert {p.dtype for p in memory.parameters()} == {torch.bfloat16}
    for wrong in ({"dtype": "bf15"}, {"device_map": {"blocks": 0, "output": 1}}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            load_memory(folder, **wrong)


def test_device_map_auto_is_the_accelerator_where_there_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("meta"))
    assert load_memory(folder, device_map="auto").device.type == "meta"
    assert load_memory(folder).device.type == "cpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.up.weight": None}, r"lacks 1 tensors?, the first is blocks\.1\.up\.weight"),
        ({"blocks.2.up.weight": torch.zeros(2)}, r"holds 1 tensors? .* the first is blocks\.2\.up\.weight"),
        ({"output.weight": torch.zeros(63, 32)}, r"output\.weight has shape \(63, 32\)"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_weights_that_do_not_fit_the_settings_are_refused(
    folder: Path, change: dict[str, Tensor | None], message: str
) -> None:
    path = folder / "model.safetensors"
    state = load_file(path) | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_memory(folder)
    assert str(path) in str(caught.value)


def test_missing_and_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged")) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read"):
        load_memory(damaged.parent)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has no model\.safetensors"):
        load_memory(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 10**9}, "layers = 1000000000: input should be less than or equal to 10000"),
        ({"layers": 9999}, "layers = 9999, but .*safetensors holds \\d+ tensors"),
        ({"ffn_width": 1 << 20}, r"shape \(\d+, \d+\), expected \(1048576, \d+\)"),
        ({"width": 10**12}, "width = 1000000000000: input should be less than"),
        ({"vocab_size": 1 << 24}, r"output\.weight has shape .*, expected \(16777216,"),
    ],
)
def test_sizes_beyond_the_weights_are_refused_before_anything_is_made_of_them(
    folder: Path, change: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "memory.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    monkeypatch.setattr(MLPMemory, "load_state_dict", None)
    with pytest.raises(MemlmError, match=message):
        load_memory(folder)


def test_weights_that_are_no_numbers_with_a_point_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ArtifactError, match="holds tensors of type I32, expected floating-point ones"):
        load_memory(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("activation", "swoosh", "style.activation = 'swoosh'"),
        ("norm", "batch", "style.norm = 'batch'"),
        ("gatd", True, "unknown setting 'memory.json: style.gatd'"),
    ],
)
def test_a_style_that_is_unknown_is_refused(folder: Path, key: str, value: Any, message: str) -> None:
    path = folder / "memory.json"
    settings = MLPSettings.model_validate_json(path.read_text()).model_dump(mode="json")
    path.write_text(json.dumps({**settings, "style": {**settings["style"], key: value}}))
    with pytest.raises(MemlmError) as caught:
        load_memory(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("nemotron", {}),  # a LayerNorm that multiplies by 1 + weight
        ("cohere", {"logit_scale": 0.25}),  # one without a bias, of its own kind
        ("gemma", {}),  # an RMSNorm that multiplies by 1 + weight
        ("gpt2", {}),
        ("llama", {}),
        ("phi4_multimodal", {}),  # an eye with a norm of its own
        ("xlstm", {}),
    ],
)
def test_it_starts_as_the_bases_final_norm_and_head(architecture: str, changes: dict[str, Any]) -> None:
    base = model_of(architecture, **changes)
    with torch.no_grad():
        for name, parameter in base.named_parameters():  # as if trained
            if parameter.ndim == 1 and "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
        memory = start(base)
        seen: list[Tensor] = []
        handle = base.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with watch_norms(base) as given:
            logits = base(input_ids=token_ids()).logits
        handle.remove()
        before = next(value for norm, value in given if torch.equal(norm.forward(value), seen[0]))
        found = memory.output(memory.norm(before))
    cap = 30.0 if architecture == "xlstm" else None
    found = found if cap is None else cap * torch.tanh(found / cap)
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)


@contextlib.contextmanager
def watch_norms(model: PreTrainedModel) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """What goes into each module whose name says that it is a norm."""
    given: list[tuple[nn.Module, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda m, args: given.append((m, args[0])))
        for name, module in model.named_modules()
        if "norm" in name.lower() or "ln_f" in name
    ]
    yield given
    for handle in handles:
        handle.remove()


def test_a_final_norm_of_no_kind_of_ours_is_said_where_it_was_asked_for() -> None:
    base = model_of("olmo")  # a norm without weights
    start(base)
    with pytest.raises(ConfigError, match="head = 'base': the memory cannot have the final norm of OlmoForCausalLM"):
        start(base, head="base")


@pytest.mark.parametrize(
    ("architecture", "inner"),
    [
        ("qwen3_moe", 128),  # a router before the experts
        ("qwen2_moe", 128),  # and a gate of the shared expert
        ("granitemoe", 128),
        ("gpt_oss", 128),
        ("dbrx", 128),
        ("deepseek_v3", 128),  # shared experts that look like an MLP
        ("llama", 64),
        ("phi3", 64),  # gate and up in one
        ("bert", 64),
        ("opt", 64),
    ],
)
def test_experts_are_no_projection(architecture: str, inner: int) -> None:
    base = model_of(architecture)
    style, found = ffn_style(base)
    assert found == inner
    assert style.gated == (style.norm == "rms")
    assert start(base).settings.ffn_width == inner
