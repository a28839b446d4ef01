"""Causal language models with only some of their layers, or fresh."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from memlm.errors import ConfigError, reason_of
from memlm.models.loading import block_list, device_of, embedding_rows, load_config
from memlm.models.taps import first_tensor, watch

_DEPTHS = ("num_hidden_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks")
_FROM_HERE_ON = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
_WORDS = ("layer", "block", "pattern", "types", "intermediate_size", "heads")  # in names of settings that are lists
_PLAIN = (bool, int, float, str, list, tuple, type(None))


def outer_layers(count: int, total: int) -> list[int]:
    """`count` indices of `range(total)`, half from the front and half from the back.

    The middle blocks of a deep model change its stream least, so dropping them hurts least (docs/decisions/0005).
    """
    front = (count + 1) // 2
    return [*range(front), *range(total - (count - front), total)]


def depth(config: PreTrainedConfig) -> int:
    """How many layers a model of this config has.

    Raises:
        ConfigError: It does not tell.
    """
    found = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(found, int):
        raise ConfigError(
            f"layers: {type(config).__name__} does not tell how many there are; leave layers out to keep all"
        )
    return found


def chosen_layers(layers: int | Sequence[int], total: int) -> list[int]:
    """The layers, counted from 0, that a number of layers or a list of them stands for.

    Raises:
        ConfigError: A layer that a model of `total` layers does not have, or none at all.
    """
    if isinstance(layers, int) and not 1 <= layers <= total:
        raise ConfigError(f"layers = {layers}: the start model has {total}")
    chosen = outer_layers(layers, total) if isinstance(layers, int) else list(layers)
    if not chosen or any(not 0 <= i < total for i in chosen) or chosen != sorted(set(chosen)):
        raise ConfigError(f"layers = {chosen}: give ascending numbers from 0 to {total - 1}")
    return chosen


def keep_layers(model: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A new model with only some of `model`'s blocks, weights copied, ready to save and load.

    Args:
        layers: How many (half from the front, half from the back), or which, counted from 0.

    Raises:
        ConfigError: A layer that the model does not have, or none at all; or a block that the config of fewer layers
            makes another one, as where every n-th has experts.
    """
    name, blocks = block_list(model)
    chosen = chosen_layers(layers, len(blocks))
    smaller = _cut_model(type(model), model.config, chosen, model.dtype)
    smaller.to(device_of(model))  # type: ignore[arg-type]
    kept = smaller.get_submodule(name)
    _check_same_blocks(kept, blocks, chosen)
    around = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(f"{name}.")}
    held = smaller.state_dict()
    if strange := [key for key, tensor in around.items() if key not in held or held[key].shape != tensor.shape]:
        raise _other_function(chosen, f"{strange[0]} has a part for every layer")
    smaller.load_state_dict(around, strict=False)
    for block, number in zip(kept.children(), chosen, strict=True):
        block.load_state_dict(blocks[number].state_dict())
    _check_same_outputs(smaller.eval(), kept, blocks, chosen)
    smaller.generation_config = model.generation_config
    return smaller


def check_layers(config: PreTrainedConfig, layers: int | Sequence[int]) -> None:
    """Refuse what `keep_layers` would refuse for what the blocks are; takes no memory for weights.

    Raises:
        ConfigError: As there.
    """
    chosen = chosen_layers(layers, depth(config))
    with torch.device("meta"):
        try:
            whole = AutoModelForCausalLM.from_config(config)
        except Exception:  # no causal LM; who loads it will say so
            return
        name, blocks = block_list(whole)
        if len(chosen) < len(blocks):
            _check_same_blocks(_cut_model(type(whole), config, chosen).get_submodule(name), blocks, chosen)


def _other_function(chosen: Sequence[int], reason: str) -> ConfigError:
    return ConfigError(f"layers = {list(chosen)}: {reason}; leave layers out to keep all, or choose others")


def _cut_model(
    kind: type[PreTrainedModel], config: PreTrainedConfig, chosen: Sequence[int], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model of only the chosen layers."""
    try:
        model = AutoModelForCausalLM.from_config(layered_config(config, chosen), dtype=dtype)
        blocks = len(block_list(model)[1])
    except ConfigError:
        raise
    except Exception as error:  # the model's own code, given a config that it was not written for
        raise _other_function(chosen, f"no {kind.__name__} can be made of them ({reason_of(error)})") from None
    if type(model) is not kind or blocks != len(chosen):
        raise _other_function(chosen, f"the config of {kind.__name__} does not tell its blocks one by one")
    return model


def _check_same_blocks(kept: nn.Module, blocks: nn.ModuleList, chosen: Sequence[int]) -> None:
    """Raise unless each block is what it was: modules, shapes, and what they were told."""
    for place, (block, number) in enumerate(zip(kept.children(), chosen, strict=True)):
        ours = dict(_described(block, place, range(len(chosen))))
        theirs = dict(_described(blocks[number], number, chosen, len(blocks)))
        for name in (*theirs, *ours):
            if (was := theirs.get(name)) != (now := ours.get(name)):
                raise _other_function(chosen, f"block {number} would be another one ({name}: {was}, would be {now})")


def _described(
    block: nn.Module, number: int, chosen: Sequence[int], total: int | None = None
) -> Iterator[tuple[str, Any]]:
    """What a block is made of, but for its weights and its number, by name; of lists of all layers the chosen."""
    for name, module in block.named_modules():
        yield f"{name} is", type(module).__name__
        for key, value in plain_attributes(module):
            if type(value) is int and value in (number, number + 1) and "layer" in key:
                yield f"{name}.{key}", "its number"
            elif isinstance(value, list | tuple):
                cut = len(value) == total and _tells_of_layers(key)
                yield f"{name}.{key}", [value[i] for i in chosen] if cut else list(value)
            else:
                yield f"{name}.{key}", value
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield f"{name}.{key}", None if tensor is None else tuple(tensor.shape)


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module itself keeps beside weights, parts and its mode: numbers, texts, and lists of them."""
    for key, value in vars(module).items():
        if not key.startswith("_") and key != "training" and isinstance(value, _PLAIN):
            yield key, value


@torch.no_grad()
def _check_same_outputs(model: PreTrainedModel, kept: nn.Module, blocks: nn.ModuleList, chosen: Sequence[int]) -> None:
    """Raise unless each block computes what it did, whatever its number is."""
    pairs = zip(kept.children(), chosen, strict=True)
    originals = {str(place): (block, blocks[number]) for place, (block, number) in enumerate(pairs)}

    def see(place: str, args: tuple, kwargs: dict) -> None:
        found = [first_tensor(block.forward(*args, **kwargs)) for block in originals[place]]
        if not torch.allclose(*found, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise _other_function(chosen, f"block {chosen[int(place)]} computes something else at another place")

    tokens = torch.arange(7, device=device_of(model))[None] % embedding_rows(model)
    try:
        with watch({place: block for place, (block, _) in originals.items()}, see):
            model(input_ids=tokens, use_cache=False)
    except ConfigError:
        raise
    except Exception as error:  # the model's own code
        reason = f"what they compute cannot be compared with what they did ({reason_of(error)})"
        raise _other_function(chosen, reason) from None


def layered_config(config: PreTrainedConfig, chosen: Sequence[int]) -> PreTrainedConfig:
    """A copy of `config` for only the chosen layers, as it is when saved and loaded; what it tells of each is cut.

    Raises:
        ConfigError: There can be no such config, or it tells something else of a layer.
    """
    text = config.get_text_config(decoder=True)
    settings = config.to_dict()
    part = next((name for name, value in vars(config).items() if value is text), None)
    depths = {text.attribute_map.get(name, name) for name in _DEPTHS}
    _cut(settings if part is None else settings[part], depths, text.num_hidden_layers, chosen)
    try:
        cut = type(config).from_dict(type(config).from_dict(settings).to_dict())
    except Exception as error:  # the config's own checks
        raise _other_function(chosen, f"no {type(config).__name__} can tell of them ({reason_of(error)})") from None
    now = cut.get_text_config(decoder=True)
    for name, was in _of_each_layer(text):
        if list(getattr(now, name, ())) != [was[i] for i in chosen]:
            raise _other_function(chosen, f"{name} follows a pattern that they break")
    return cut


def _of_each_layer(config: PreTrainedConfig) -> Iterator[tuple[str, Sequence[Any]]]:
    """Settings and properties with an entry for each layer."""
    for name in sorted({*vars(config), *dir(type(config))}):
        if _tells_of_layers(name):
            value = getattr(config, name, None)
            if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers and not _numbers(value):
                yield name, value


def _tells_of_layers(name: str) -> bool:
    return not name.startswith("_") and any(word in name for word in _WORDS)


def _numbers(values: Sequence[Any]) -> bool:
    """Whether these are numbers of layers."""
    whole = all(type(value) is int for value in values)
    return whole and all(a < b for a, b in itertools.pairwise(values))


def _cut(settings: dict[str, Any], depths: set[str], total: int, chosen: Sequence[int]) -> None:
    """Make settings of a model of `total` layers those of the chosen ones, as far as their kind tells how."""
    for key, value in settings.items():
        if key in depths and value == total:
            settings[key] = len(chosen)
        elif key in _FROM_HERE_ON and isinstance(value, int):
            settings[key] = sum(number < value for number in chosen)
        elif isinstance(value, dict) and value and all(str(number).isdigit() for number in value):  # by layer
            by_number = {int(number): told for number, told in value.items()}
            settings[key] = {place: by_number[number] for place, number in enumerate(chosen) if number in by_number}
        elif isinstance(value, list) and value and _tells_of_layers(key):
            if _numbers(value):
                settings[key] = [place for place, number in enumerate(chosen) if number in value]
            elif len(value) == total:
                settings[key] = [value[i] for i in chosen]


def fresh_model(config: PreTrainedConfig, layers: int | Sequence[int] | None, seed: int) -> PreTrainedModel:
    """A randomly initialised model of `config`, with fewer layers where asked."""
    if layers is not None:
        config = layered_config(config, chosen_layers(layers, depth(config)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def model_size(name: str, layers: int | Sequence[int] | None = None) -> int:
    """Parameters of the model `name`, by its config; with only some of its layers where asked."""
    with torch.device("meta"):
        return fresh_model(load_config(name), layers, 0).num_parameters()
