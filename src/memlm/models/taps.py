"""Where in a model activations are read: the input of a module, found from the modules themselves."""

import contextlib
import difflib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from memlm.errors import ConfigError, ModelError
from memlm.models.adapters import unwrapped
from memlm.models.loading import block_list


class _ForwardStoppedError(Exception):
    """Raised inside a hook to skip what comes after the tap."""


def _matrices(module: nn.Module) -> int:
    return sum(1 for p in module.parameters() if p.ndim > 1)


def resolve_tap(model: PreTrainedModel, tap: str) -> str:
    """The module path that a tap setting stands for.

    Args:
        tap: A module path; a share of the depth in (0, 1] such as `0.7`; or `auto`, the same as `1.0`.

    Raises:
        ModelError: The module does not exist, or no MLP is found at that depth.
        ConfigError: A share of the depth outside (0, 1].
    """
    if tap == "auto":
        return find_tap(model)
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", tap):
        get_module(model, tap)
        return tap
    depth = float(tap)
    if not 0 < depth <= 1:
        raise ConfigError(f"tap = {tap}: a share of the depth must be in (0, 1]")
    return find_tap(model, depth)


def find_tap(model: PreTrainedModel, depth: float = 1.0) -> str:
    """Path of a block's MLP, whose input is read; the last block's unless told otherwise.

    A short probe records in which order the block calls its children. The first that holds weight matrices mixes
    tokens (attention); the next is the MLP, or its first projection where the block has no MLP module of its own. No
    table of model names is used.

    Args:
        depth: Share of the blocks that lie before the tap, its own block included, in (0, 1].

    Raises:
        ModelError: The block is not built that way; the message names `--tap`.

    Source: `last_ffn_input` of the released code, found there by a table of three models; the depth, MLP Memory, §5.5.
    """
    list_name, blocks = block_list(model)
    number = max(1, round(depth * len(blocks))) - 1
    last = blocks[number]
    called: list[str] = []
    children = dict(last.named_children())
    with torch.no_grad(), watch(children, lambda name, *_: called.append(name)):
        model.base_model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    heavy = [name for name in dict.fromkeys(called) if _matrices(children[name])]
    refusal = (
        f"no MLP was found in block {number} of {type(model).__name__} (it calls {', '.join(called) or 'no child'});"
        " name the module whose input is to be read with --tap"
    )
    if len(heavy) < 2 or _matrices(children[heavy[0]]) < 2:
        raise ModelError(refusal)
    mlp = children[heavy[1]]
    if _matrices(mlp) == 1:  # a bare projection: it must widen, or it is no MLP's first half
        rows, columns = next(p.shape for p in mlp.parameters() if p.ndim > 1)
        if rows == columns:
            raise ModelError(refusal)
    return f"{list_name}.{number}.{heavy[1]}"


def get_module(model: PreTrainedModel, tap: str) -> nn.Module:
    """The module at path `tap`.

    Raises:
        ModelError: There is none; the nearest paths are named.
    """
    model = unwrapped(model)
    try:
        return model.get_submodule(tap)
    except AttributeError:
        modules = [name for name, _ in model.named_modules()]
        near = difflib.get_close_matches(tap, modules, n=3, cutoff=0.4)
        raise ModelError(
            f"tap {tap!r} does not exist in {type(model).__name__}; nearest: {', '.join(near) or 'none'}"
        ) from None


def tap_width(model: PreTrainedModel, tap: str) -> int:
    """Width of the activations at `tap`: what its first matrix reads, else the model's hidden size.

    Raises:
        ModelError: There is no such module.
    """
    for module in get_module(model, tap).modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, Conv1D):
            return module.nx
    return model.config.get_text_config().hidden_size


def _module_input(args: tuple, kwargs: dict) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach()


# Hooks belong to a module, and so to all threads that run it. One hook per watched module serves them all: it tells
# those who watch in the thread (the context) that it is called in, and is gone when nobody watches.
_watchers: ContextVar[tuple[tuple[Mapping[str, nn.Module], Callable[[str, tuple, dict], None]], ...]] = ContextVar(
    "watchers", default=()
)
_hooks: WeakKeyDictionary[nn.Module, tuple[RemovableHandle, int]] = WeakKeyDictionary()
_hooks_lock = threading.Lock()


def _tell(module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
    for modules, see in _watchers.get():
        for name, watched in modules.items():
            if watched is module:
                see(name, args, kwargs or {})


@contextlib.contextmanager
def watch(modules: Mapping[str, nn.Module], see: Callable[[str, tuple, dict], None]) -> Iterator[None]:
    """Have `see(name, args, kwargs)` called whenever the `with` block calls one of the modules, in its thread only."""
    before = _watchers.set((*_watchers.get(), (modules, see)))
    with _hooks_lock:
        for module in modules.values():
            handle, users = _hooks.get(module) or (module.register_forward_pre_hook(_tell, with_kwargs=True), 0)
            _hooks[module] = handle, users + 1
    try:
        yield
    finally:
        _watchers.reset(before)
        with _hooks_lock:
            for module in modules.values():
                handle, users = _hooks.pop(module)
                if users > 1:
                    _hooks[module] = handle, users - 1
                else:
                    handle.remove()


@contextlib.contextmanager
def capture(model: PreTrainedModel, taps: Iterable[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """What goes into each tap during the forward passes of a `with` block; other threads may run the same model.

    Costs nothing but a reference per tap: nothing is copied and no other layer's activations are kept.

    Args:
        stop: End the block at the last tap; what the model would compute after it is not needed.

    Yields:
        Tap to `(B, T, D)`, filled in when the model runs.

    Raises:
        ModelError: A tap does not exist.
    """
    found: dict[str, Tensor] = {}
    modules = {tap: get_module(model, tap) for tap in taps}

    def keep(tap: str, args: tuple, kwargs: dict) -> None:
        found[tap] = _module_input(args, kwargs)
        if stop and len(found) == len(modules):
            raise _ForwardStoppedError

    with contextlib.suppress(_ForwardStoppedError), watch(modules, keep):
        yield found


class TapReader:
    """Reads a model's activations at a tap and runs nothing behind it, so the head is never computed."""

    def __init__(self, model: PreTrainedModel, tap: str) -> None:
        """
        Raises:
            ModelError: The tap does not exist.
        """
        get_module(model, tap)
        self.model, self.tap = model, tap

    @torch.no_grad()
    def read(self, input_ids: Int[Tensor, "B T"], **inputs: Any) -> Float[Tensor, "B T D"]:
        """Activations at the tap.

        Args:
            input_ids: Right padding is harmless, for attention is causal; ignore what comes back for it.
            inputs: Further arguments of the model's body, such as a cache; layers behind the tap never see them.

        Raises:
            ModelError: The forward pass never calls the tap.
        """
        with capture(self.model, [self.tap], stop=True) as found:
            self.model.base_model(input_ids=input_ids, **{"use_cache": False, **inputs})
        if self.tap not in found:
            raise ModelError(f"the tapped module of {type(self.model).__name__} is never called in a forward pass")
        return found[self.tap].reshape(*input_ids.shape, -1)
