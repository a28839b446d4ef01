"""Released checkpoints of MLP Memory to memory folders: their layouts, read without running any code of theirs."""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from memlm.errors import ArtifactError, ConfigError, ModelError, reason_of
from memlm.manifest import Manifest
from memlm.memory.card import CARD_FILE, CARD_HEAD
from memlm.memory.mlp import MLPMemory, MLPSettings, check_tensors, shapes
from memlm.models.identity import model_identity
from memlm.models.loading import block_list, find_file, load_config, resolve
from memlm.models.taps import resolve_tap, tap_width
from memlm.models.tokenizers import check_same, find_tokenizer, fingerprint, load_tokenizer, vocabulary_size
from memlm.stage import Stage, StageSpec, run_stage

_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)  # as transformers prefers
_NESTED, _NESTED_CONFIG = "knn_generator", "mlp_memory_config.json"

_CARD = """
This is not a language model to be served alone. It is a *memory*: it votes on the next token beside a frozen base,
`p = w * p_memory + (1 - w) * p_base`. It reads `{tap}` of {base} and serves this base alone.

```python
from memlm import MixedLM

model = MixedLM.from_pretrained("{base}", memory="THIS_FOLDER_OR_HUB_ID", mix_weight=0.25)
```

Nothing was validated here; `memlm evaluate perplexity` finds the best mix_weight for a corpus.

| | |
|---|---|
| converted from | {released}, layout {layout} |
| parameters | {parameters:,} |
| blocks | {layers} of width {width}, {ffn_width} inside |
"""


@dataclass(frozen=True)
class Layout:
    """Where the released code for one family of bases keeps the parts of an `MLPMemory`."""

    modules: dict[str, str]
    """Our module to theirs; `{}` stands for the number of a block."""
    transposed: bool
    """Whether matrices of blocks are stored (in, out)."""
    settings: Callable[[PreTrainedConfig], dict[str, Any]]
    """From the checkpoint's config to `ffn_width` and `style`."""


def _gpt2(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "ffn_width": 4 * config.hidden_size,  # whatever n_inner says
        "style": {
            "gated": False,
            "bias": True,
            "norm": "layer",
            "norm_eps": config.layer_norm_epsilon,
            "activation": config.activation_function,
        },
    }


def _llama(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "ffn_width": config.intermediate_size,
        "style": {
            "gated": True,
            "bias": config.model_type == "llama" and config.mlp_bias,  # the Mistral module has none
            "norm": "rms",
            "norm_eps": config.rms_norm_eps,
            "activation": config.hidden_act,
        },
    }


_ENDS = {"input": "embedding_transform", "output": "lm_head"}
_LLAMA_MODULES = {
    **_ENDS,
    "blocks.{}.norm": "layers.{}.input_layernorm",
    "blocks.{}.gate": "layers.{}.mlp.gate_proj",
    "blocks.{}.up": "layers.{}.mlp.up_proj",
    "blocks.{}.down": "layers.{}.mlp.down_proj",
    "norm": "norm",
}
_GPT2_MODULES = {
    **_ENDS,
    "blocks.{}.norm": "h.{}.ln_1",
    "blocks.{}.up": "h.{}.mlp.c_fc",
    "blocks.{}.down": "h.{}.mlp.c_proj",
    "norm": "ln_f",
}
LAYOUTS = {
    "gpt2": Layout(_GPT2_MODULES, transposed=True, settings=_gpt2),  # models/mlpGPT2.py
    "llama": Layout(_LLAMA_MODULES, transposed=False, settings=_llama),  # models/mlpLlama.py
    "mistral": Layout(_LLAMA_MODULES, transposed=False, settings=_llama),  # models/mlpMistral.py
}
"""Model type of the base to the layout of its memories."""


def convert_released(source: str | Path, *, base: str, out: str | Path, tap: str | None = None) -> Manifest:
    """Write a released MLP Memory to `out` as a memory folder, with its card.

    Names and shapes are checked against the checkpoint's config, and the whole against the base, before any weights
    are copied; of the base only config and tokenizer are read. Weights keep their precision. Rows of the output layer
    beyond the tokenizer's ids are padding and are left out; so is dropout, which the GPT-2 layout has in training.

    Args:
        source: Folder or hub id of the checkpoint (`config.json` and safetensors or pickled weights, sharded or not),
            or a folder that holds it as `knn_generator`.
        base: The model that the memory was trained for: path, hub id or packaged name.
        out: Folder to write.
        tap: Where it reads the base: a module path, or a share of the depth in (0, 1]. None: the block that the
            checkpoint names, else the last, from which all released ones read.

    Raises:
        ArtifactError: Tensors are missing, too many, of another shape or type, or the file holds other objects; or it
            is no MLP Memory.
        ModelError: The checkpoint or the base cannot be reached, or they do not belong together.
        TokenizerMismatchError: The checkpoint comes with another tokenizer than the base.
        ConfigError: The config holds a value that no memory has, or the tap is no share of the depth.
        OutputExistsError: `out` holds something else.

    Source: `models/mlpGPT2.py`, `models/mlpLlama.py`, `models/mlpMistral.py` and `models/mlpMemory.py` of the released
        code (the MLPMemory repository of arXiv:2508.01832).
    """
    name, position = _find(str(source))
    config, base_config = load_config(name), load_config(base)
    if config.model_type not in LAYOUTS:
        raise ArtifactError(
            f"{name}: model_type = {config.model_type!r}; released MLP memories are {', '.join(LAYOUTS)}"
        )
    if base_config.model_type != config.model_type:
        raise ModelError(f"{name} was made for a {config.model_type} base; base {base} is {base_config.model_type}")
    tensors = read_tensors(name)
    if not _is_released(tensors):
        raise ArtifactError(f"{name} is no MLP Memory; a plain causal LM needs no conversion: --memory {name}")
    tokenizer = load_tokenizer(resolve(base))
    if (own_tokenizer := find_tokenizer(name)) is not None:
        check_same(own_tokenizer, tokenizer, name, f"base {base}")
    tap, width, blocks = _place(base, base_config, tap, position)
    ids = vocabulary_size(tokenizer)
    if config.vocab_size < min(ids, base_config.vocab_size):
        raise ModelError(f"{name} votes on {config.vocab_size} tokens, base {base} has {ids}: it is of another base")
    known = {"vocab_size": min(ids, config.vocab_size), "tokenizer": fingerprint(tokenizer)}
    settings = _settings(config, tensors, name, **known, tap=tap, base_blocks=blocks)
    if settings.input_width != width:
        raise ModelError(f"{name} reads activations {settings.input_width} wide; {tap} of base {base} has {width}")
    with torch.device("meta"):
        memory = MLPMemory(settings)
    state = _state(memory, tensors, LAYOUTS[config.model_type], config.vocab_size, name)
    spec = StageSpec(
        "memory",
        config={"released": True, "tap": tap},
        inputs={"released": model_identity(name), "base": model_identity(base)},
        tokenizer=settings.tokenizer,
        sources={"released": name, "base": base},
    )

    def work(stage: Stage) -> dict[str, Any]:
        memory.load_state_dict(state, assign=True)
        facts = {
            "parameters": sum(p.numel() for p in memory.parameters()),
            "layout": config.model_type,
            **settings.model_dump(include={"tap", "layers", "width", "ffn_width"}),
            "output_rows": {"released": config.vocab_size, "kept": settings.vocab_size},
        }
        memory.save_pretrained(stage.path)
        tokenizer.save_pretrained(stage.path)
        head = CARD_HEAD.format(tag="mlp-memory", title="A released MLP Memory")
        stage.save_text(CARD_FILE, head + _CARD.format(**facts, **stage.sources))
        return facts

    return run_stage(out, spec, work)


# --- the checkpoint -----------------------------------------------------------------------------------------------


def is_released_mlp(source: str, **where: Any) -> bool:
    """Whether a folder or hub repository holds a released MLP Memory, by its tensors' names.

    Its config is that of its base, so without this look it would load as a causal LM of mostly random weights.

    Raises:
        ArtifactError: The weights cannot be read.
    """
    path = _weights_file(source, **where)
    if path is None:
        return False
    return _is_released(_weight_map(path) if path.suffix == ".json" else _load(path))


def _is_released(names: Iterable[str]) -> bool:
    """Blocks with an MLP at the top level, where causal LMs of transformers have a body around them, and no attention.

    The attention is looked for because GPT-2 was first published without the body's name.
    """
    blocks = [name for name in names if re.match(r"(h|layers)\.\d+\.", name)]
    return any(".mlp." in name for name in blocks) and not any("attn" in name for name in blocks)


def _find(source: str) -> tuple[str, int | None]:
    """Where config and weights are, and the block that the memory reads, where that is said."""
    nested, path = Path(source) / _NESTED, Path(source) / _NESTED_CONFIG
    if not nested.is_dir():
        return source, None
    if not path.is_file():
        return str(nested), None
    try:
        position = json.loads(path.read_text(encoding="utf-8"))["layer_position"]
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path} names no layer_position") from None
    if not isinstance(position, int):
        raise ArtifactError(f"{path}: layer_position = {position!r} is no number of a block")
    return str(nested), position


def read_tensors(source: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name; they stay on disk until they are used, but for pickles of old versions.

    Raises:
        ArtifactError: There are no weights, a shard is missing, or a file holds anything else than tensors.
    """
    path = _weights_file(source)
    if path is None:
        raise ArtifactError(f"{source} has no weights; looked for {', '.join(_WEIGHTS)}")
    if path.suffix != ".json":
        return _load(path)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(_weight_map(path).values())):
        file = find_file(source, shard)
        if file is None:
            raise ArtifactError(f"{path} names {shard}, which is not there")
        tensors |= _load(file)
    return tensors


def _weights_file(source: str, **where: Any) -> Path | None:
    paths = (find_file(source, name, **where) for name in _WEIGHTS)
    return next((path for path in paths if path is not None), None)


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor to shard, as an index says."""
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        outside = [name for name in shards.values() if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{path} is no index of shards") from None
    if outside:
        raise ArtifactError(f"{path} names a file outside its folder: {outside[0]!r}")
    return shards


def _load(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tensors = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ArtifactError(
            f"{path} is refused: it is damaged or holds Python objects other than tensors, which could run code"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {reason_of(error)}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ArtifactError(f"{path} holds something else than tensors by name")
    return tensors


# --- the memory ---------------------------------------------------------------------------------------------------


def _place(base: str, config: PreTrainedConfig, tap: str | None, position: int | None) -> tuple[str, int, int]:
    """Where the base is read, how wide its activations are there, and how many blocks it has; from its config alone."""
    with FakeTensorMode():  # meta tensors will not do: transformers branches on the values of masks
        model = AutoModelForCausalLM.from_config(config)
        blocks = len(block_list(model)[1])
        if tap is None:
            position = -1 if position is None else position
            if not -blocks <= position < blocks:
                raise ModelError(f"the memory reads block {position}; base {base} has {blocks}")
            tap = str((position % blocks + 1) / blocks)
        tap = resolve_tap(model, tap)
        return tap, tap_width(model, tap), blocks


def _settings(config: PreTrainedConfig, tensors: dict[str, Tensor], name: str, **known: Any) -> MLPSettings:
    """The memory's settings: those that the checkpoint's config says, beside those known of base and tokenizer."""
    projection = tensors.get("embedding_transform.weight")
    try:
        values = LAYOUTS[config.model_type].settings(config) | {
            "input_width": config.hidden_size if projection is None else projection.shape[-1],
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
        }
    except (AttributeError, IndexError, TypeError) as error:
        raise ConfigError(f"{name}: {error}") from None
    return MLPSettings.parse({**values, "kind": MLPMemory.kind, **known}, f"{name}/config.json: ")


def _state(
    memory: MLPMemory, tensors: dict[str, Tensor], layout: Layout, output_rows: int, name: str
) -> dict[str, Tensor]:
    """The released tensors under our names, as views."""
    theirs = {ours: _released_name(ours, layout) for ours in memory.state_dict()}
    flipped = {ours for ours in theirs if layout.transposed and re.match(r"blocks\.\d+\.(up|down)\.weight", ours)}
    wanted = {theirs[ours]: shape[::-1] if ours in flipped else shape for ours, shape in shapes(memory).items()}
    wanted["lm_head.weight"] = (output_rows, memory.settings.width)
    check_tensors(wanted, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, name)
    types = {tensor.dtype for tensor in tensors.values()}
    if len(types) > 1 or not all(dtype.is_floating_point for dtype in types):
        raise ArtifactError(f"{name} holds tensors of {', '.join(sorted(map(str, types)))}; expected one floating type")
    state = {ours: tensors[its].T if ours in flipped else tensors[its] for ours, its in theirs.items()}
    return state | {"output.weight": state["output.weight"][: memory.vocab_size]}


def _released_name(ours: str, layout: Layout) -> str:
    module, _, kind = ours.rpartition(".")
    numbers = re.findall(r"\d+", module)
    return f"{layout.modules[re.sub(r'[0-9]+', '{}', module)].format(*numbers)}.{kind}"
