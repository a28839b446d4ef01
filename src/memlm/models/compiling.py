"""Steps of single tokens behind a static cache, compiled where transformers would compile its own."""

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import Cache, CompileConfig, GenerationConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from memlm.models.abilities import CACHE, cache_argument
from memlm.models.loading import device_of
from memlm.models.taps import get_module, module_input, tap_width

_KNOWN = {"attention_mask", "position_ids"}
_OF_PICTURES = ("token_type_ids", "mm_token_type_ids", "block_sequence_ids")  # some models' masks depend on them


@dataclass(frozen=True)
class Room:
    """What a call of `generate` with `cache_implementation="static"` wants of every cache."""

    length: int
    """Tokens that it holds at most."""
    generation: GenerationConfig
    """Says whether steps are compiled, and how."""
    compiles: bool = True
    """False where rows change places between steps, and so what a graph writes into would."""


class CompiledSteps:
    """One token at a time, read by a compiled body. On an accelerator a step is hundreds of launches otherwise.

    Keys and values stand where they are, and the mask is made outside, as long as the whole cache, so that one graph
    serves all steps.
    """

    def __init__(self, model: PreTrainedModel, body: nn.Module) -> None:
        """
        Args:
            model: A causal LM.
            body: What is compiled: itself, or its body.
        """
        self._model, self._body = model, body
        self._cache_name = cache_argument(inspect.signature(body.forward).parameters) or CACHE
        self._made: tuple[CompileConfig, Callable[..., Any]] | None = None
        self._held: dict[str, Tensor] = {}  # tap to `(B, 1, D)`: what went into that module
        self._lock = threading.Lock()  # what is held is written by one thread at a time

    def __getstate__(self) -> dict[str, Any]:  # a copy compiles its own
        return self.__dict__ | {"_made": None, "_held": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def read(
        self,
        tokens: Int[Tensor, "B T"],
        cache: Cache,
        room: Room | None,
        inputs: Mapping[str, Any],
        taps: Collection[str] = (),
    ) -> tuple[Any, dict[str, Float[Tensor, "B T D"]]] | None:
        """What the body gives, states or logits first, and what goes into each tap; both are copies, for the next step
        writes where they were.

        None where nothing was read: unless tokens are one each, behind others in a static cache, nothing else is asked
        for, and transformers would compile such a step of the model (it looks at the device, the configuration, and how
        the model is quantised and laid out).

        Args:
            cache: Extended by the token.
            inputs: Further ones of the body: `position_ids`, and an `attention_mask` as `with_whole_mask` makes it.
        """
        if (
            room is None
            or not room.compiles
            or tokens.shape[1] != 1
            or not cache.is_compileable
            or not inputs.keys() <= _KNOWN
        ):
            return None
        if not all(getattr(layer, "is_initialized", True) for layer in cache.layers):
            return None  # a place that is made while a step is traced is not known to stand still
        some: Any = self._model
        if not some._valid_auto_compile_criteria({CACHE: cache}, room.generation):
            return None
        config = room.generation.compile_config or some._default_compile_config()
        if self._made is None or self._made[0] != config:
            self._made = config, torch.compile(_step_of(self._body), **config.to_dict())
        # with strides that follow from shapes alone: a slice of a growing text has others at every step, and a graph
        # serves one kind of strides
        packed = partial(torch.clone, memory_format=torch.contiguous_format)
        told = tree_map_only(Tensor, packed, {"input_ids": tokens, **inputs})
        with self._lock, self._holding(taps, len(tokens)) as held:
            output = self._made[1](held, use_cache=True, return_dict=True, **{self._cache_name: cache}, **told)
            first = next(iter(output))
            output[first] = output[first].clone()
            return output, {tap: part.clone() for tap, part in held.items()}

    @contextmanager
    def _holding(self, taps: Collection[str], rows: int) -> Iterator[dict[str, Tensor]]:
        """Where a step leaves what goes into each tap: always the same place, as its graph asks for."""
        kind = {"dtype": self._model.dtype, "device": device_of(self._model)}
        sizes = {tap: (rows, 1, tap_width(self._model, tap)) for tap in taps}
        if {tap: (*part.shape, part.dtype, part.device) for tap, part in self._held.items()} != {
            tap: (*size, *kind.values()) for tap, size in sizes.items()
        }:
            with torch.inference_mode(False):  # it outlives the call, which may be in that mode
                self._held = {tap: torch.empty(size, **kind) for tap, size in sizes.items()}
            for part in self._held.values():
                torch._dynamo.mark_static_address(part)
        with ExitStack() as hooks:
            for tap, part in self._held.items():
                module = get_module(self._model, tap)
                hooks.enter_context(module.register_forward_pre_hook(partial(_leave, part), with_kwargs=True))
            yield self._held


def _step_of(body: nn.Module) -> Callable[..., Any]:
    """A function that gives the body's output; where its hooks write is NaN unless they do."""

    def step(held: dict[str, Tensor], **inputs: Any) -> Any:
        for part in held.values():
            part.fill_(torch.nan)
        return body(**inputs)

    # with code of its own: dynamo counts graphs by it, and makes eight at most
    return FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)


def _leave(place: Tensor, module: nn.Module, args: tuple, kwargs: dict) -> None:
    if torch.compiler.is_dynamo_compiling():  # so in traced code alone: another thread may run the module as it is
        place.copy_(module_input(args, kwargs).view_as(place))


def with_whole_mask(
    model: PreTrainedModel, tokens: Int[Tensor, "B T"], cache: Cache, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Inputs of a model whose `attention_mask`, if they have one, is as its layers take it behind a static cache: a row
    for each token over all that the cache has room for, or one such for each kind of layer."""
    if inputs.get("attention_mask") is None:
        return {**inputs}
    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    found = make(
        config=model.config,
        inputs_embeds=torch.empty((*tokens.shape, 0), dtype=model.dtype, device=tokens.device),
        attention_mask=inputs["attention_mask"].long(),
        past_key_values=cache,
        position_ids=inputs.get("position_ids"),
        is_first_iteration=tokens.shape[1] > 1,
        **{name: inputs[name] for name in _OF_PICTURES if name in inputs},
    )
    return {**inputs, "attention_mask": found}
