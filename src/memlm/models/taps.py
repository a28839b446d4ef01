"""Where in a model activations are read: the input of a module, found from the modules themselves."""

import contextlib
import difflib
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from memlm.errors import ConfigError, ModelError
from memlm.models.adapters import unwrapped
from memlm.models.loading import block_list, device_of


class _ForwardStoppedError(Exception):
    """Raised inside a hook to skip what comes after the tap."""


_PROBE = 2, 7  # rows and tokens


def _weights(module: nn.Module) -> int:
    """Numbers in its matrices."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


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
        with torch.no_grad(), capture(model, [tap]) as found:
            model.base_model(input_ids=probe(model), use_cache=False)
        by_row(found, tap, probe(model))
        return tap
    depth = float(tap)
    if not 0 < depth <= 1:
        raise ConfigError(f"tap = {tap}: a share of the depth must be in (0, 1]")
    return find_tap(model, depth)


def find_tap(model: PreTrainedModel, depth: float = 1.0) -> str:
    """Path of a block's MLP, whose input is read; the last block's unless told otherwise.

    A short probe records in which order the block calls its children, and which of them let tokens look at each other
    (attention, convolutions, states). The MLP is what holds most weights of the others: a module, or the first
    projection where the block has no MLP module of its own. No table of model names is used.

    Args:
        depth: Share of the blocks that lie before the tap, its own block included, in (0, 1].

    Raises:
        ModelError: The block is not built that way; the message names `--tap`.

    Source: `last_ffn_input` of the released code, found there by a table of three models; the depth, MLP Memory, §5.5.
    """
    list_name, blocks = block_list(model)
    number = max(1, round(depth * len(blocks))) - 1
    children: dict[str, nn.Module] = {}
    for name, child in blocks[number].named_children():
        parts = child.named_children() if isinstance(child, nn.ModuleList) else ()
        children |= {f"{name}.{part}": module for part, module in parts} or {name: child}
    called: list[str] = []
    mixers: set[str] = set()

    def see(name: str, args: tuple, kwargs: dict) -> None:
        called.append(name)
        if not _weights(children[name]):
            return
        if isinstance(module_input(args, kwargs), FakeTensor):  # no values to compare: attention comes first
            mixers.update([name] if not mixers else ())
        elif _mixes_tokens(children[name], args, kwargs):
            mixers.add(name)

    with torch.no_grad(), watch(children, see):
        model.base_model(input_ids=probe(model), use_cache=False)
    weights = {name: _weights(children[name]) for name in called if name not in mixers}
    mlp, behind = None, True
    for name in called:  # the first of the last ones that no mixer parts
        behind = behind or name in mixers
        if behind and 0 < max(weights.values(), default=0) <= 2 * weights.get(name, 0):
            mlp, behind = name, False
    if mlp is None or called.count(mlp) > 1 or _is_square(children[mlp]):
        names = ", ".join(dict.fromkeys(called)) or "no child"
        raise ModelError(
            f"no MLP was found in block {number} of {type(model).__name__} (it calls {names});"
            " name the module whose input is to be read with --tap"
        )
    return f"{list_name}.{number}.{mlp}"


def probe(model: PreTrainedModel) -> Int[Tensor, "B T"]:
    """A few tokens that any model can read."""
    size = model.config.get_text_config(decoder=True).vocab_size
    return (torch.arange(math.prod(_PROBE), device=device_of(model)) % size).view(_PROBE)


def _mixes_tokens(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether what a module makes of a row's last token depends on others; also where that cannot be told.

    Args:
        args, kwargs: As it is called with the probe.
    """
    given = module_input(args, kwargs)
    try:
        others = _rows(given.clone(), _PROBE)
        others[:, :-1] *= -2
        others = others.view_as(given)
        changed = tuple(others if value is given else value for value in args)
        named = {name: others if value is given else value for name, value in kwargs.items()}
        found = [_rows(first_tensor(module.forward(*a, **k)), _PROBE) for a, k in ((changed, named), (args, kwargs))]
    except Exception:  # the model's own code, called in a way of which it knows nothing
        return True
    last, before = (f[:, -1].float() for f in found)
    return bool((last - before).abs().max() > 1e-3 * before.abs().max())  # experts may be rounded in another order


def _rows(values: Tensor, shape: tuple[int, int]) -> Float[Tensor, "B T D"]:
    """Values with a vector for each token, of a model that may flatten rows.

    Raises:
        ValueError: They are laid out in another way.
    """
    if values.shape[:2] != shape and values.shape[0] != math.prod(shape):
        raise ValueError(f"shape {tuple(values.shape)}")
    return values.reshape(*shape, -1)


def first_tensor(output: Any) -> Tensor:
    """The tensor that a module gives, or the first of several."""
    return output if isinstance(output, Tensor) else next(first_tensor(part) for part in output if part is not None)


def _is_square(module: nn.Module) -> bool:
    """Whether it is a bare projection that does not widen, and so is no first half of an MLP."""
    shapes = [p.shape for p in module.parameters() if p.ndim > 1]
    return len(shapes) == 1 and shapes[0][-2:].count(shapes[0][-1]) == 2


_Steps = tuple[tuple[str, nn.Module], ...]
_paths: WeakKeyDictionary[nn.Module, dict[str, _Steps]] = WeakKeyDictionary()
"""Model to tap to the names and modules on the way there: a step of decoding asks for it each time."""


def get_module(model: PreTrainedModel, tap: str) -> nn.Module:
    """The module at path `tap`, found once as long as all modules on the way there are the same.

    Raises:
        ModelError: There is none; the nearest paths are named.
    """
    model = unwrapped(model)
    known = _paths.get(model, {}).get(tap, ())
    if known and _leads(model, known):
        return known[-1][1]
    try:
        steps, found = (), cast(nn.Module, model)
        for name in tap.split("."):
            found = found.get_submodule(name)
            steps = (*steps, (name, found))
        if _leads(model, steps):
            _paths.setdefault(model, {})[tap] = steps
        return found
    except AttributeError:
        modules = [name for name, _ in model.named_modules()]
        near = difflib.get_close_matches(tap, modules, n=3, cutoff=0.4)
        raise ModelError(
            f"tap {tap!r} does not exist in {type(model).__name__}; nearest: {', '.join(near) or 'none'}"
        ) from None


def _leads(model: nn.Module, steps: _Steps) -> bool:
    """Whether each module is still its parent's child of that name."""
    for name, child in steps:
        if model._modules.get(name) is not child:
            return False
        model = child
    return True


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


def module_input(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor that a module is called with."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


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
def unwatched() -> Iterator[None]:
    """Have nobody told of what the `with` block calls."""
    before = _watchers.set(())
    try:
        yield
    finally:
        _watchers.reset(before)


@contextlib.contextmanager
def capture(model: PreTrainedModel, taps: Iterable[str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """What goes into each tap during the one forward pass of a `with` block; other threads may run the same model.

    Costs nothing but a reference per tap: nothing is copied and no other layer's activations are kept.

    Args:
        stop: End the block at the last tap; what the model would compute after it is not needed.

    Yields:
        Tap to `(B, T, D)`, filled in when the model runs.

    Raises:
        ModelError: A tap does not exist, or is called again.
    """
    found: dict[str, Tensor] = {}
    modules = {tap: get_module(model, tap) for tap in taps}

    def keep(tap: str, args: tuple, kwargs: dict) -> None:
        if tap in found:
            raise ModelError(
                f"tap {tap} of {type(model).__name__} is called several times in a forward pass; name another"
            )
        found[tap] = module_input(args, kwargs).detach()
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
        return by_row(found, self.tap, input_ids)


def by_row(found: Mapping[str, Tensor], tap: str, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    """What `capture` found at a tap, a row of vectors for each of `tokens`.

    Raises:
        ModelError: The forward pass never called the tap, or with anything but a vector for each token.
    """
    if tap not in found:
        raise ModelError(f"tap {tap} is never called in a forward pass; name another module")
    try:
        return _rows(found[tap], (tokens.shape[0], tokens.shape[1]))
    except ValueError as error:
        raise ModelError(
            f"what goes into tap {tap} has not one vector for each token ({error}); name another"
        ) from None
