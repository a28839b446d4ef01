"""Adapters of PEFT, such as LoRA, inside a loaded model: which are there, and the model without them."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from memlm.errors import ConfigError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model of transformers inside a `PeftModel`; any other model as it is."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether PEFT's layers are in it; such a model may be in training."""
    return unwrapped(model) is not model or getattr(model, "_hf_peft_config_loaded", False)


def active_adapters(model: PreTrainedModel) -> list[str]:
    """Names of the adapters that act beside the weights: neither disabled nor merged into them.

    Args:
        model: A `PeftModel`, or a model of transformers that may have loaded adapters itself.
    """
    if not has_adapter(model) or any(
        getattr(m, flag, None) is True for m in model.modules() for flag in ("disable_adapters", "merged")
    ):
        return []
    found = model.active_adapters  # a method of transformers' models, a property of PEFT's
    return list(found() if callable(found) else found)  # type: ignore[arg-type]


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
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", bias="none")
    return LoraModel(model, config, "default")


def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that a model has apart from its adapters, by the names that they have in a model without any."""
    inner = unwrapped(model)
    kept = {"base_layer", "original_module"}  # where PEFT puts what it wraps
    wrappers = {name for name, module in inner.named_modules() if kept & dict(module.named_children()).keys()}
    state = {}
    for key, tensor in inner.state_dict().items():
        *path, last = key.split(".")
        owner = next((i for i in range(len(path)) if ".".join(path[:i]) in wrappers), None)
        if owner is None:
            state[key] = tensor
        elif path[owner] in kept:
            state[".".join([*path[:owner], *path[owner + 1 :], last])] = tensor
    return state


def save_adapter(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write a model's adapter to `folder`, as PEFT and transformers find it again.

    Args:
        model: With one active adapter.
        folder: May hold the base as well.
        base: Path or hub id of the model that the adapter belongs to.

    Raises:
        ConfigError: Several adapters are active, or the adapter is no change of weights.
    """
    from peft import get_peft_model_state_dict

    active = active_adapters(model)
    config: Any = copy.deepcopy(model.peft_config[active[0]])  # type: ignore[index]
    if len(active) > 1 or config.is_prompt_learning:
        what = f"adapters {', '.join(active)}" if len(active) > 1 else f"adapter of type {config.peft_type.value}"
        raise ConfigError(f"the base's {what} cannot be saved beside it; merge what it is to keep first")
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


def save_without_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write to `folder` the model as it is without its adapters."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_torch_state_dict(plain_state(model), folder)
