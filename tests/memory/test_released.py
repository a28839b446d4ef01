"""Released MLP memories, held against slow twins of their modules; and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import sentences
from families import TAPS, family_config, family_model
from released_layouts import CLASSES, FORMATS, Tensors, random_tensors, released_logits, save_released
from tiny_tokenizers import sentencepiece_like
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from memlm import MixedLM, convert_released, load_memory
from memlm.errors import ArtifactError, ConfigError, MemlmError, ModelError, OutputExistsError, TokenizerMismatchError
from memlm.manifest import read_manifest
from memlm.memory.decoder import MemoryDecoder
from memlm.memory.mlp import MLPMemory
from memlm.models.tokenizers import fingerprint

LAYOUTS = sorted(CLASSES)
ROUNDING = {"rtol": 0, "atol": 1e-5}  # float32 against float64: sums of at most 128 products, logits below 10


@pytest.fixture(scope="module")
def bases(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base of three blocks for each layout; its output layer is padded by 8 rows."""
    folders = {}
    for layout in LAYOUTS:
        folder = tmp_path_factory.mktemp("bases") / layout
        family_model(layout, len(tokenizer) + 8, tied=None).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[layout] = str(folder)
    return folders


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerFast) -> int:
    """Output rows of a released memory: padded otherwise than the base's."""
    return len(tokenizer) + 24


@pytest.fixture
def gpt2(bases: dict[str, str], rows: int, tmp_path: Path) -> Callable[..., Path]:
    """Converts a GPT-2 checkpoint of these tensors, with changes to its config and the call."""

    def convert(tensors: Tensors | None = None, config: dict | None = None, **call: str) -> Path:
        settings = family_config("gpt2", rows, layers=2, **(config or {}))
        source = save_released(
            tmp_path / "released", random_tensors(settings) if tensors is None else tensors, settings
        )
        call = {"base": bases["gpt2"], "out": str(tmp_path / "out"), **call}
        convert_released(source, **call)
        return Path(call["out"])

    return convert


@pytest.fixture
def tensors(rows: int) -> Tensors:
    """Of the checkpoint that `gpt2` converts."""
    return random_tensors(family_config("gpt2", rows, layers=2))


def logits(folder: Path, x: torch.Tensor) -> torch.Tensor:
    memory = load_memory(folder)
    assert isinstance(memory, MLPMemory)
    with torch.no_grad():
        return memory.output(memory.body(x)).double()


def refused(error: type[MemlmError], match: str, convert: Callable[[], object], folder: Path) -> None:
    """The refusal is one line, and nothing was written."""
    with pytest.raises(error, match=match) as caught:
        convert()
    assert "\n" not in str(caught.value)
    assert not list(folder.glob("out*"))


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_memory_computes_what_the_released_module_does(
    layout: str, how: str, bases: dict[str, str], rows: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = family_config(layout, rows, layers=2)
    tensors = random_tensors(config)
    source = save_released(tmp_path / "released", tensors, config, how)
    convert_released(source, base=bases[layout], out=tmp_path / "out")
    x = torch.randn(5, config.hidden_size)
    expected = released_logits(tensors, config, x)[:, : len(tokenizer)]
    torch.testing.assert_close(logits(tmp_path / "out", x), expected, **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("gpt2", {"layer_norm_epsilon": 0.5}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"n_inner": 20}),  # the released module does not look at it
        ("llama", {"rms_norm_eps": 0.5}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"intermediate_size": 20}),  # as the memory of Llama-3 has another than its base
        ("llama", {"mlp_bias": True}),
        ("mistral", {"rms_norm_eps": 0.5}),
        ("mistral", {"intermediate_size": 20, "num_hidden_layers": 5}),
        ("mistral", {"mlp_bias": True}),  # nor at this
    ],
)
def test_fields_of_the_config_decide(
    layout: str, changes: dict, bases: dict[str, str], rows: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = family_config(layout, rows, layers=2, **changes)
    tensors = random_tensors(config)
    source = save_released(tmp_path / "released", tensors, config)
    convert_released(source, base=bases[layout], out=tmp_path / "out")
    x = torch.randn(3, config.hidden_size)
    expected = released_logits(tensors, config, x)[:, : len(tokenizer)]
    torch.testing.assert_close(logits(tmp_path / "out", x), expected, **ROUNDING)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_reads_the_bases_last_mlp_and_mixes(
    layout: str, bases: dict[str, str], rows: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = family_config(layout, rows, layers=2)
    tensors = random_tensors(config)
    out = tmp_path / "mlp"
    convert_released(save_released(tmp_path / "released", tensors, config), base=bases[layout], out=out)
    mixed = MixedLM.from_pretrained(bases[layout], memory=out, mix_weight=0.25)
    base = AutoModelForCausalLM.from_pretrained(bases[layout]).eval()
    blocks = base.transformer.h if layout == "gpt2" else base.model.layers
    seen = []
    blocks[-1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        own = base(tokens).logits[0, :, : len(tokenizer)].double().softmax(-1)
        voted = released_logits(tensors, config, seen[0][0])[:, : len(tokenizer)].softmax(-1)
        found = mixed(tokens).logits[0, :, : len(tokenizer)].double().softmax(-1)
    torch.testing.assert_close(found, 0.75 * own + 0.25 * voted, rtol=1e-4, atol=1e-6)
    assert mixed.generate(tokens, max_new_tokens=3, do_sample=False).shape[1] > 4


def test_a_projection_before_the_blocks_is_kept(
    bases: dict[str, str], rows: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = family_config("llama", rows, layers=2, width=16)
    tensors = random_tensors(config, input_width=32)
    source = save_released(tmp_path / "released", tensors, config)
    convert_released(source, base=bases["llama"], out=tmp_path / "out")
    x = torch.randn(3, 32)
    expected = released_logits(tensors, config, x)[:, : len(tokenizer)]
    torch.testing.assert_close(logits(tmp_path / "out", x), expected, **ROUNDING)


def test_weights_keep_their_precision(gpt2: Callable[..., Path], tensors: Tensors) -> None:
    memory = load_memory(gpt2({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    assert {p.dtype for p in memory.parameters()} == {torch.bfloat16}


# --- the folder ---------------------------------------------------------------------------------------------------


def test_the_folder_says_what_it_is(
    gpt2: Callable[..., Path], bases: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    out = gpt2()
    manifest = read_manifest(out, "memory")
    assert manifest.tokenizer == fingerprint(tokenizer)
    assert manifest.sources["base"] == bases["gpt2"]
    assert manifest.facts["parameters"] == sum(p.numel() for p in load_memory(out).parameters())
    assert manifest.facts["output_rows"] == {"released": len(tokenizer) + 24, "kept": len(tokenizer)}
    settings = load_memory(out).settings
    assert settings.tap == TAPS["gpt2"]
    assert settings.vocab_size == len(tokenizer)
    assert settings.mix_weight is None
    assert "library_name: memlm" in (out / "README.md").read_text(encoding="utf-8")
    assert not list(out.glob("*.bin"))


def test_pickle_and_safetensors_give_the_same_bytes(bases: dict[str, str], rows: int, tmp_path: Path) -> None:
    config = family_config("gpt2", rows, layers=2)
    made = []
    for how in FORMATS:
        source = save_released(tmp_path / how, random_tensors(config), config, how)
        made.append(convert_released(source, base=bases["gpt2"], out=tmp_path / f"{how} converted"))
    assert len({manifest.payload["model.safetensors"].sha256 for manifest in made}) == 1


def test_a_finished_conversion_is_left_alone_and_another_is_refused(gpt2: Callable[..., Path]) -> None:
    written = (gpt2() / "model.safetensors").stat().st_mtime_ns
    assert (gpt2() / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(OutputExistsError, match="made otherwise"):
        gpt2(tap="0.5")


def test_the_tap_can_be_named(gpt2: Callable[..., Path], tmp_path: Path) -> None:
    assert load_memory(gpt2(tap="transformer.h.1.mlp")).tap == "transformer.h.1.mlp"
    assert load_memory(gpt2(tap="0.3", out=str(tmp_path / "other"))).tap == "transformer.h.0.mlp"


@pytest.mark.parametrize(("position", "block"), [(-1, 2), (0, 0), (1, 1), (-3, 0)])
def test_the_block_that_a_trained_model_names_is_read(
    position: int, block: int, bases: dict[str, str], rows: int, tmp_path: Path
) -> None:
    config = family_config("gpt2", rows, layers=1)
    save_released(tmp_path / "whole" / "knn_generator", random_tensors(config), config)
    said = {"layer_position": position, "is_train": True}
    (tmp_path / "whole" / "mlp_memory_config.json").write_text(json.dumps(said))
    made = convert_released(tmp_path / "whole", base=bases["gpt2"], out=tmp_path / "out")
    assert made.facts["tap"] == f"transformer.h.{block}.mlp"


# --- refusals: tensors --------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(gpt2: Callable[..., Path], tensors: Tensors, tmp_path: Path) -> None:
    del tensors["h.1.mlp.c_fc.bias"]
    refused(ArtifactError, r"lacks 1 tensor, the first is h\.1\.mlp\.c_fc\.bias$", partial(gpt2, tensors), tmp_path)


def test_too_few_blocks_for_the_config_are_refused(gpt2: Callable[..., Path], tensors: Tensors, tmp_path: Path) -> None:
    convert = partial(gpt2, tensors, {"n_layer": 3})
    refused(ArtifactError, r"lacks 6 tensors, the first is h\.2\.ln_1\.bias$", convert, tmp_path)


def test_an_extra_tensor_is_named(gpt2: Callable[..., Path], tensors: Tensors, tmp_path: Path) -> None:
    tensors["router.weight"] = torch.zeros(2)
    refused(ArtifactError, r"holds 1 tensor that .* the first is router\.weight$", partial(gpt2, tensors), tmp_path)


def test_a_tensor_of_another_shape_is_named(gpt2: Callable[..., Path], tensors: Tensors, tmp_path: Path) -> None:
    tensors["h.0.mlp.c_fc.weight"] = tensors["h.0.mlp.c_fc.weight"].T.contiguous()
    refused(
        ArtifactError,
        r"h\.0\.mlp\.c_fc\.weight has shape \(128, 32\), expected \(32, 128\)$",
        partial(gpt2, tensors),
        tmp_path,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_tensors_of_other_types_are_refused(
    dtype: torch.dtype, gpt2: Callable[..., Path], tensors: Tensors, tmp_path: Path
) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    refused(ArtifactError, f"{dtype}.*expected one floating type", partial(gpt2, tensors), tmp_path)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(
    bases: dict[str, str], rows: int, tmp_path: Path
) -> None:
    config = family_config("gpt2", rows, layers=2)
    source = save_released(tmp_path / "released", random_tensors(config), config)
    trap = {**random_tensors(config), "h.9.mlp": Trap(tmp_path / "sprung")}
    torch.save(trap, Path(source) / "pytorch_model.bin")
    convert = partial(convert_released, source, base=bases["gpt2"], out=tmp_path / "out")
    refused(ArtifactError, r"pytorch_model\.bin is refused: .* Python objects", convert, tmp_path)
    refused(ArtifactError, r"pytorch_model\.bin is refused: .* Python objects", partial(load_memory, source), tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("how", FORMATS)
def test_truncated_weights_are_refused(how: str, bases: dict[str, str], rows: int, tmp_path: Path) -> None:
    config = family_config("llama", rows, layers=2)
    source = Path(save_released(tmp_path / "released", random_tensors(config), config, how))
    last = max(path for path in source.iterdir() if path.suffix in (".bin", ".safetensors"))
    last.write_bytes(last.read_bytes()[:-1000])
    convert = partial(convert_released, source, base=bases["llama"], out=tmp_path / "out")
    refused(ArtifactError, rf"{re.escape(str(last))} (cannot be read|is refused: it is damaged)", convert, tmp_path)


def _index(shard: object) -> Callable[[Path], None]:
    """Puts an index that names this shard in the place of the weights."""

    def spoil(folder: Path) -> None:
        (folder / "pytorch_model.bin").unlink()
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"ln_f.bias": shard}}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda folder: (folder / "pytorch_model.bin").unlink(), "has no weights; looked for model.safetensors"),
        (_index("gone.bin"), "names gone.bin, which is not there"),
        (_index("../released/x.bin"), "names a file outside its folder"),
        (_index(3), "is no index of shards"),
        (lambda folder: torch.save([torch.ones(2)], folder / "pytorch_model.bin"), "something else than tensors"),
        (lambda folder: torch.save({"epoch": 3}, folder / "pytorch_model.bin"), "something else than tensors"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "cannot be read"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused(
    spoil: Callable[[Path], object], match: str, bases: dict[str, str], rows: int, tmp_path: Path
) -> None:
    config = family_config("gpt2", rows, layers=2)
    source = Path(save_released(tmp_path / "released", random_tensors(config), config))
    spoil(source)
    refused(ArtifactError, match, partial(convert_released, source, base=bases["gpt2"], out=tmp_path / "out"), tmp_path)


# --- refusals: config and base --------------------------------------------------------------------------------------


def test_a_config_that_no_memory_has_is_refused(gpt2: Callable[..., Path], tensors: Tensors, tmp_path: Path) -> None:
    unknown = partial(gpt2, tensors, {"activation_function": "gelou"})
    refused(ConfigError, "activation = 'gelou'", unknown, tmp_path)
    refused(ConfigError, "norm_eps = -1.0", partial(gpt2, tensors, {"layer_norm_epsilon": -1.0}), tmp_path)
    refused(ConfigError, "layers = 0", partial(gpt2, tensors, {"n_layer": 0}), tmp_path)


def test_a_causal_lm_needs_no_conversion(bases: dict[str, str], tmp_path: Path) -> None:
    convert = partial(convert_released, bases["llama"], base=bases["llama"], out=tmp_path / "out")
    refused(ArtifactError, "is no MLP Memory; a plain causal LM needs no conversion", convert, tmp_path)


def test_another_family_is_refused(gpt2: Callable[..., Path], bases: dict[str, str], tmp_path: Path) -> None:
    match = "was made for a gpt2 base; base .* is llama"
    refused(ModelError, match, partial(gpt2, base=bases["llama"]), tmp_path)
    source = save_released(tmp_path / "odd", {"h.0.mlp.x": torch.zeros(1)}, family_config("gpt2", 32, layers=1))
    said = json.loads((Path(source) / "config.json").read_text())
    (Path(source) / "config.json").write_text(json.dumps({**said, "model_type": "bloom"}))
    convert = partial(convert_released, source, base=bases["gpt2"], out=tmp_path / "out")
    refused(ArtifactError, "model_type = 'bloom'; released MLP memories are gpt2, llama, mistral", convert, tmp_path)


def changed_base(bases: dict[str, str], tmp_path: Path, config: PreTrainedConfig) -> str:
    """The GPT-2 base with another config; of a base nothing else is read."""
    folder = shutil.copytree(bases["gpt2"], tmp_path / "base")
    config.save_pretrained(folder)
    return str(folder)


def test_a_base_of_another_width_is_refused(
    gpt2: Callable[..., Path], bases: dict[str, str], rows: int, tmp_path: Path
) -> None:
    base = changed_base(bases, tmp_path, family_config("gpt2", rows, layers=3, width=64))
    refused(ModelError, r"reads activations 32 wide; .* has 64$", partial(gpt2, base=base), tmp_path)


def test_a_memory_of_fewer_tokens_is_refused(
    bases: dict[str, str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = family_config("gpt2", len(tokenizer) - 1, layers=2)
    source = save_released(tmp_path / "released", random_tensors(config), config)
    convert = partial(convert_released, source, base=bases["gpt2"], out=tmp_path / "out")
    refused(ModelError, "votes on 319 tokens, base .* has 320", convert, tmp_path)


def test_a_memory_with_another_tokenizer_is_refused(
    bases: dict[str, str], rows: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = family_config("gpt2", rows, layers=2)
    source = save_released(tmp_path / "released", random_tensors(config), config)
    sentencepiece_like(sentences(100, seed=3)).save_pretrained(source)
    convert = partial(convert_released, source, base=bases["gpt2"], out=tmp_path / "out")
    refused(TokenizerMismatchError, "have different tokenizers", convert, tmp_path)
    tokenizer.save_pretrained(source)
    convert()


def test_a_block_that_the_base_has_not_is_refused(bases: dict[str, str], rows: int, tmp_path: Path) -> None:
    config = family_config("gpt2", rows, layers=1)
    save_released(tmp_path / "whole" / "knn_generator", random_tensors(config), config)
    convert = partial(convert_released, tmp_path / "whole", base=bases["gpt2"], out=tmp_path / "out")
    for said, match in (
        ('{"layer_position": 7}', "reads block 7; base .* has 3"),
        ('{"layer_position": "x"}', "layer_position = 'x' is no number of a block"),
        ("{}", "names no layer_position"),
    ):
        (tmp_path / "whole" / "mlp_memory_config.json").write_text(said)
        refused(MemlmError, match, convert, tmp_path)


# --- loading without conversion -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loading_a_released_mlp_memory_as_it_is_names_the_command(
    layout: str, how: str, bases: dict[str, str], rows: int, tmp_path: Path
) -> None:
    config = family_config(layout, rows, layers=2)
    source = save_released(tmp_path / "released", random_tensors(config), config, how)
    match = rf"is a released MLP Memory; convert it: memlm convert {re.escape(source)} --base BASE"
    refused(ModelError, match, partial(load_memory, source), tmp_path)
    mix = partial(MixedLM.from_pretrained, bases[layout], memory=source, mix_weight=0.25)
    refused(ModelError, match, mix, tmp_path)


@pytest.fixture
def released_decoder(bases: dict[str, str], tmp_path: Path) -> Callable[[Tensors], str]:
    """A released Memory Decoder: a causal LM whose state, changed, is one pickle."""

    def save(changes: Tensors, prefix: str = "transformer.") -> str:
        folder = Path(shutil.copytree(bases["gpt2"], tmp_path / "decoder"))
        (folder / "model.safetensors").unlink()
        state = AutoModelForCausalLM.from_pretrained(bases["gpt2"]).state_dict() | changes
        kept = {
            name.removeprefix("transformer."): t for name, t in state.items() if name != "lm_head.weight" and len(t)
        }
        torch.save({prefix + name: tensor for name, tensor in kept.items()}, folder / "pytorch_model.bin")
        return str(folder)

    return save


@pytest.mark.parametrize("prefix", ["transformer.", ""])  # GPT-2 was first published without
def test_a_released_memory_decoder_loads_as_it_is(
    prefix: str, released_decoder: Callable[..., str], bases: dict[str, str]
) -> None:
    memory = load_memory(released_decoder({}, prefix))
    assert isinstance(memory, MemoryDecoder)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(bases["gpt2"])(tokens).logits.log_softmax(-1)
        torch.testing.assert_close(memory.votes(memory.step(tokens), slice(None)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"transformer.h.1.attn.c_attn.weight": torch.zeros(0)},
            r"lacks tensors, .* transformer\.h\.1\.attn\.c_attn\.weight",
        ),
        ({"transformer.h.1.gate.weight": torch.zeros(2)}, r"has unknown tensors, .* transformer\.h\.1\.gate\.weight"),
        ({"transformer.ln_f.weight": torch.zeros(2)}, r"has misshapen tensors, .* transformer\.ln_f\.weight"),
    ],
)
def test_a_released_memory_decoder_with_other_tensors_is_refused(
    changes: Tensors, match: str, released_decoder: Callable[..., str], tmp_path: Path
) -> None:
    source = released_decoder(changes)
    refused(ModelError, match, partial(load_memory, source), tmp_path)
