"""Adapters of PEFT, such as LoRA, inside a loaded model: which are there, and the model without them."""

import copy
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from memlm.errors import ConfigError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LOST = ("VERA", "TRAINABLE_TOKENS")
"""What transformers does not load as it was saved."""
_KEPT = {"base_layer", "original_module"}
"""Where PEFT puts what it wraps."""


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model of transformers inside a `PeftModel`; any other model as it is."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether PEFT's layers are in it; such a model may be in training."""
    return unwrapped(model) is not model or getattr(model, "_hf_peft_config_loaded", False)


def check_no_prompt(model: PreTrainedModel, role: str) -> None:
    """Raise where an adapter is a prompt that the model reads before the text: its places are not those of the text.

    Raises:
        ConfigError: One is; `role` names the model.
    """
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning:
            kind = config.peft_type.value
            raise ConfigError(
                f"{role} whose adapter is a prompt ({kind}) cannot be mixed; use one that changes weights"
            )


def active_adapters(model: PreTrainedModel) -> list[str]:
    """Names of the adapters that act beside the weights: neither disabled nor merged into them.

    Args:
        model: A `PeftModel`, or a model of transformers that may have loaded adapters itself.

    Raises:
        ConfigError: transformers does not go together with the PEFT that is installed.
    """
    if not has_adapter(model) or any(
        getattr(m, flag, None) is True for m in model.modules() for flag in ("disable_adapters", "merged")
    ):
        return []
    found = model.active_adapters  # a method of transformers' models, a property of PEFT's
    try:
        return list(found() if callable(found) else found)  # type: ignore[arg-type]
    except ValueError as error:  # transformers looks which PEFT there is
        raise ConfigError(f"the adapters of the base cannot be told: {error}") from None


def check_peft() -> None:
    """Raise unless peft is there.

    Raises:
        ConfigError: It is not.
    """
    if find_spec("peft") is None:
        raise ConfigError("lora_rank needs peft: pip install 'memlm[compare]'")


def beside_all_linear(model: PreTrainedModel, rank: int) -> Any:
    """Put low-rank adapters beside all linear layers of the model but its output layer; only they are trained.

    Args:
        rank: Of each; what it learns is scaled by 2.

    Returns:
        peft's own model around it, which can merge them.

    Raises:
        ConfigError: peft has none for layers of such a model.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", bias="none")
    try:
        return LoraModel(model, config, "default")
    except ValueError as error:
        told = str(error).partition("\n")[0]
        raise ConfigError(f"lora_rank = {rank}: peft has no adapters for {type(model).__name__} ({told})") from None


def without_layers_of_peft(model: PreTrainedModel) -> PreTrainedModel:
    """The model of transformers with what its active adapters do put into its weights, and no layer of PEFT left.

    It is changed itself, and all of its weights can be trained; a model without adapters is given back as it is.

    Raises:
        ConfigError: One is no change of weights.
    """
    inner = unwrapped(model)
    if not has_layers_of_peft(inner):
        return inner
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    for name, module in list(inner.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if not module.disable_adapters:
                module.merge(safe_merge=True)
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            active = [] if module.disable_adapters else module.active_adapters
            own = [part for part in active if part in module.modules_to_save]
            plain = module.modules_to_save[own[0]] if own else module.original_module
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ConfigError(f"{name} is trained in a way that cannot be merged here; merge it with PEFT first")
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(inner.get_submodule(parent), child, plain)
    inner._hf_peft_config_loaded = False
    if hasattr(inner, "peft_config"):
        del inner.peft_config
    if hasattr(inner, "_weight_conversions"):  # in which loading an adapter puts the adapter's names
        inner._weight_conversions = get_model_conversion_mapping(inner)  # type: ignore[assignment]
    return inner.requires_grad_(True)


def has_layers_of_peft(model: nn.Module) -> bool:
    """Whether some of a model's modules stand inside layers of PEFT."""
    return bool(_wrappers(model))


def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that a model has apart from its adapters, by the names that they have in a model without any."""
    inner = unwrapped(model)
    wrappers = _wrappers(inner)
    named = ((_plain_name(key.split("."), wrappers), tensor) for key, tensor in inner.state_dict().items())
    return {name: tensor for name, tensor in named if name is not None}


def plain_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that a model has apart from its adapters, by the names that they have in a model without any."""
    inner = unwrapped(model)
    wrappers = _wrappers(inner)
    named = (
        (_plain_name(name.split("."), wrappers), module)
        for name, module in inner.named_modules()
        if name not in wrappers or not name
    )
    return {name: module for name, module in named if name is not None}


def _wrappers(model: nn.Module) -> set[str]:
    """Names of PEFT's layers around another."""
    return {name for name, module in model.named_modules() if _KEPT & dict(module.named_children()).keys()}


def _plain_name(path: list[str], wrappers: set[str]) -> str | None:
    """What stands at a path in a model without adapters; None where it is a part of one."""
    owner = next((i for i in range(len(path)) if ".".join(path[:i]) in wrappers), None)
    if owner is None:
        return ".".join(path)
    return ".".join([*path[:owner], *path[owner + 1 :]]) if path[owner] in _KEPT else None


def save_adapter(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write a model's adapter to `folder`, as PEFT and transformers find it again.

    Args:
        model: With one active adapter.
        folder: May hold the base as well.
        base: Path or hub id of the model that the adapter belongs to.

    Raises:
        ConfigError: Several adapters are active, or the adapter is no change of weights, one that transformers does not
            find again, or scaled otherwise than its config says.
    """
    from peft import get_peft_model_state_dict

    active = active_adapters(model)
    config: Any = copy.deepcopy(model.peft_config[active[0]])  # type: ignore[index]
    trains_tokens = getattr(config, "trainable_token_indices", None) is not None
    lost = config.peft_type.value in _LOST or getattr(config, "use_dora", False) or trains_tokens
    if len(active) > 1 or lost:
        kind = "DORA" if getattr(config, "use_dora", False) else config.peft_type.value
        what = f"adapters {', '.join(active)}" if len(active) > 1 else f"adapter of type {kind}"
        raise ConfigError(f"the base's {what} cannot be saved beside it; merge what it is to keep first")
    _check_scaling(model, active[0], config)
    state = get_peft_model_state_dict(model, adapter_name=active[0])
    prefix = "base_model.model." if isinstance(model, PreTrainedModel) else ""  # PEFT's own model has it already
    config.base_model_name_or_path, config.inference_mode = base, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    safetensors.torch.save_file(
        {prefix + key: tensor.contiguous() for key, tensor in state.items()},
        folder / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )


def _check_scaling(model: PreTrainedModel, name: str, config: Any) -> None:
    """Raise a ConfigError where a LoRA adapter was scaled anew, which is written nowhere."""
    if config.peft_type.value != "LORA":
        return
    for module in model.modules():
        scaling, rank = getattr(module, "scaling", {}), getattr(module, "r", {})
        if not isinstance(scaling, dict) or name not in scaling:
            continue
        alpha = module.lora_alpha[name]  # type: ignore[index]
        told = alpha / (math.sqrt(rank[name]) if config.use_rslora else rank[name])  # type: ignore[index]
        if not math.isclose(scaling[name], told, rel_tol=1e-6):
            raise ConfigError(
                "the base's adapter scales what it adds otherwise than its config says; merge what it is to keep first"
            )


def save_without_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write to `folder` the model as it is without its adapters."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_torch_state_dict(plain_state(model), folder)
