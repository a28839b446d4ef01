"""What a causal LM can do, found by doing it on a few tokens: keep a cache, take it back, heed padding."""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlm.errors import ModelError
from memlm.models.adapters import unwrapped
from memlm.models.loading import device_of
from memlm.models.taps import unwatched

_LENGTH = 8  # tokens of the probe
_PADDED = 2  # of them padding, in a row that is padded


@dataclass(frozen=True)
class Abilities:
    """What gives the logits of reading all text at once."""

    steps: bool
    """Going on behind a cache one token at a time."""
    chunks: bool
    """Going on behind a cache by several tokens."""
    takes_back: bool
    """Going on after the last tokens were cropped from the cache."""
    rows: bool
    """Going on after rows of the cache changed places, as beams do."""
    padding: bool
    """Reading rows that are padded on the left."""

    @property
    def all(self) -> bool:
        return self.steps and self.chunks and self.takes_back and self.rows and self.padding


_found: WeakKeyDictionary[PreTrainedModel, Abilities] = WeakKeyDictionary()


CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)
"""What the installed transformers calls a cache in its outputs and in `generate`: it was renamed in 5.24."""


def cache_argument(arguments: Collection[str]) -> str | None:
    """Which argument of a model's `forward` is its cache, for its own code may use the older name; None: none is."""
    return next((name for name in ("cache", "past_key_values") if name in arguments), None)


def abilities(model: PreTrainedModel) -> Abilities:
    """What `model` can do, found once by five short passes, or some more where it cannot do all."""
    if model not in _found:
        with torch.no_grad(), unwatched():
            probe = _Probe(model)
            if bool(probe.whole.isnan().any()):  # nothing can be told, and whoever lets it speak names it
                return Abilities(steps=True, chunks=True, takes_back=True, rows=True, padding=True)
            _found[model] = probe.abilities()
    return _found[model]


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model in which tokens see those to come: what it says of a text is no prediction.

    Raises:
        ModelError: It is one.
    """
    with torch.no_grad(), unwatched():
        probe = _Probe(model)
        other = probe.tokens.clone()
        other[:, -1] = other[:, 0]
        found, expected = probe.read(other)[:, :-1], probe.whole[:, :-1]
        if bool(found.isfinite().all() and expected.isfinite().all()) and not probe.same(found, expected):
            raise ModelError(
                f"{type(model).__name__} lets tokens see those to come, so it is no causal language model; one that can"
                " be a decoder needs is_decoder = true in its config"
            )


class _Probe:
    """Two rows of tokens, and their logits when all is read at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        parameters = inspect.signature(unwrapped(model).forward).parameters
        self.cache_name = cache_argument(parameters)
        self.takes_positions, self.takes_mask = "position_ids" in parameters, "attention_mask" in parameters
        size = model.config.get_text_config(decoder=True).vocab_size
        numbers = torch.arange(2 * _LENGTH, device=device_of(model)) * 7 + 5
        self.tokens: Int[Tensor, "B T"] = (numbers % size).view(2, _LENGTH)
        self.tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
        self.whole = self.read(self.tokens)

    def same(self, found: Float[Tensor, "... V"], expected: Float[Tensor, "... V"]) -> bool:
        """Whether logits are equal but for rounding, or a few experts that rounding has chosen anew."""
        if found.shape != expected.shape:
            return False
        spread = (expected - expected.mean(-1, keepdim=True)).abs().mean()
        return bool((found - expected).abs().mean() <= self.tolerance * spread)

    def read(
        self, tokens: Int[Tensor, "B T"], cache: Any = None, mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B T V"]:
        inputs: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            inputs[self.cache_name or CACHE] = cache
        if mask is not None and self.takes_mask:
            inputs["attention_mask"] = mask.long()
        if mask is not None and self.takes_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self.model(input_ids=tokens, **inputs).logits.float()

    def abilities(self) -> Abilities:
        if _succeeds(self.does_all):
            return Abilities(steps=True, chunks=True, takes_back=True, rows=True, padding=True)
        steps = _succeeds(partial(self.goes_on, [5, 6, 7]))
        return Abilities(
            steps=steps,
            chunks=steps and _succeeds(partial(self.goes_on, [3, 4])),
            takes_back=steps and _succeeds(self.takes_back),
            rows=steps and _succeeds(self.changes_rows),
            padding=_succeeds(partial(self.goes_on, [5, 6, 7] if steps else [], *self.padded())),
        )

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def padded(self) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """The rows, the second moved behind padding."""
        tokens, mask = self.tokens.clone(), torch.ones_like(self.tokens, dtype=torch.bool)
        tokens[1, _PADDED:], mask[1, :_PADDED] = self.tokens[1, :-_PADDED], False
        return tokens, mask

    def goes_on(self, cuts: Sequence[int], tokens: Tensor | None = None, mask: Tensor | None = None) -> bool:
        cache, found = self.new_cache() if cuts else None, []
        rows = self.tokens if tokens is None else tokens
        for start, end in zip([0, *cuts], [*cuts, _LENGTH], strict=True):
            found.append(self.read(rows[:, start:end], cache, None if mask is None else mask[:, :end]))
        if mask is None:
            return self.same(torch.cat(found, 1), self.whole)
        return self._same_behind_padding(torch.cat(found, 1))

    def _same_behind_padding(self, found: Float[Tensor, "B T V"]) -> bool:
        first = self.same(found[0], self.whole[0])
        return first and self.same(found[1, _PADDED:], self.whole[1, :-_PADDED])

    def takes_back(self) -> bool:
        cache = self.new_cache()
        cache.activate_past_recording()
        self.read(self.tokens[:, :5], cache)
        self.read(self.tokens[:, :2], cache)
        cache.crop(-2)
        return self.same(self.read(self.tokens[:, 5:6], cache), self.whole[:, 5:6])

    def changes_rows(self) -> bool:
        cache = self.new_cache()
        self.read(self.tokens[:, :5], cache)
        cache.reorder_cache(torch.tensor([1, 0], device=self.tokens.device))  # type: ignore[arg-type]
        return self.same(self.read(self.tokens[:, 5:6].flip(0), cache), self.whole[:, 5:6].flip(0))

    def does_all(self) -> bool:
        cache = self.new_cache()
        cache.activate_past_recording()
        tokens, mask = self.padded()
        found = [self.read(tokens[:, :4], cache, mask[:, :4])]
        found.append(self.read(tokens[:, 4:5], cache, mask[:, :5]))
        cache.reorder_cache(torch.tensor([1, 0], device=tokens.device))  # type: ignore[arg-type]
        tokens, mask = tokens.flip(0), mask.flip(0)
        self.read(tokens[:, 4:6], cache, mask[:, :7])
        cache.crop(-2)
        found.append(self.read(tokens[:, 5:], cache, mask).flip(0))
        return self._same_behind_padding(torch.cat(found, 1))


def _succeeds(attempt: Callable[[], bool]) -> bool:
    try:
        return attempt()
    except Exception:  # the model's own code, asked for what it may not have
        return False
