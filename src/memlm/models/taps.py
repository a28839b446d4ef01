"""Where in a model activations are read: the input of a module, found from the modules themselves."""

import contextlib
import difflib
from types import TracebackType
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.errors import ModelError
from memlm.models.loading import block_list


class _ForwardStoppedError(Exception):
    """Raised inside a hook to skip what comes after the tap."""


def _matrices(module: nn.Module) -> int:
    return sum(1 for p in module.parameters() if p.ndim > 1)


def find_tap(model: PreTrainedModel) -> str:
    """Path of the last block's MLP, whose input becomes the key.

    A short probe records in which order the last block calls its children. The first that holds weight matrices mixes
    tokens (attention); the next is the MLP, or its first projection where the block has no MLP module of its own. No
    table of model names is used.

    Raises:
        ModelError: The block is not built that way; the message names `--tap`.

    Source: `last_ffn_input` of the released code, found there by a table of three models.
    """
    list_name, blocks = block_list(model)
    last = blocks[-1]
    called: list[str] = []
    handles = [
        child.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, child in last.named_children()
    ]
    try:
        with torch.no_grad():
            model.base_model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    children = dict(last.named_children())
    heavy = [name for name in dict.fromkeys(called) if _matrices(children[name])]
    refusal = (
        f"no MLP was found in the last block of {type(model).__name__} (it calls {', '.join(called) or 'no child'});"
        " name the module whose input is to be read with --tap"
    )
    if len(heavy) < 2 or _matrices(children[heavy[0]]) < 2:
        raise ModelError(refusal)
    mlp = children[heavy[1]]
    if _matrices(mlp) == 1:  # a bare projection: it must widen, or it is no MLP's first half
        rows, columns = next(p.shape for p in mlp.parameters() if p.ndim > 1)
        if rows == columns:
            raise ModelError(refusal)
    return f"{list_name}.{len(blocks) - 1}.{heavy[1]}"


def get_module(model: nn.Module, tap: str) -> nn.Module:
    """The module at path `tap`.

    Raises:
        ModelError: There is none; the nearest paths are named.
    """
    modules = dict(model.named_modules())
    if tap not in modules:
        near = difflib.get_close_matches(tap, modules, n=3, cutoff=0.4)
        raise ModelError(f"tap {tap!r} does not exist in {type(model).__name__}; nearest: {', '.join(near) or 'none'}")
    return modules[tap]


class TapReader:
    """Reads a model's activations at a tap and runs nothing behind it, so the head is never computed.

    Use as a context manager; the hook is gone afterwards.
    """

    def __init__(self, model: PreTrainedModel, tap: str) -> None:
        self.model = model
        self.module = get_module(model, tap)
        self._captured: Tensor | None = None

    def __enter__(self) -> Self:
        self._handle = self.module.register_forward_pre_hook(self._capture, with_kwargs=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handle.remove()
        self._captured = None

    def _capture(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self._captured = tensors[0].detach()
        raise _ForwardStoppedError

    @torch.no_grad()
    def read(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Activations at the tap.

        Args:
            input_ids: Right padding is harmless, for attention is causal; ignore what comes back for it.

        Raises:
            ModelError: The forward pass never calls the tap.
        """
        self._captured = None
        with contextlib.suppress(_ForwardStoppedError):
            self.model.base_model(input_ids=input_ids, use_cache=False)
        if self._captured is None:
            raise ModelError(f"the tapped module of {type(self.model).__name__} is never called in a forward pass")
        activations, self._captured = self._captured, None
        return activations.reshape(*input_ids.shape, activations.shape[-1])
