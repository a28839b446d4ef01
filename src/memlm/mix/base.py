"""The base as the first voter."""

import copy
import functools
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from memlm.errors import ConfigError
from memlm.memory.voter import HeadVoter, VoterCache, moved
from memlm.models.abilities import CACHE, Abilities, abilities, cache_argument, check_causal
from memlm.models.adapters import check_no_prompt, unwrapped
from memlm.models.compiling import CompiledSteps, Room, with_whole_mask
from memlm.models.heads import Head, find_head
from memlm.models.loading import device_of, embedding_rows, longest_context
from memlm.models.taps import by_row, capture


class BaseCache(VoterCache):
    """transformers' cache of the base, moved in the words of a voter's cache."""

    def __init__(self, inner: Cache) -> None:
        self.inner = inner
        self.room: Room | None = None
        self._read = 0

    def hold(self, room: Room) -> None:
        self.room = room

    @property
    def length(self) -> int:
        """Tokens of the text so far, padding included."""
        try:
            return int(self.inner.get_seq_length())  # a static cache gives the tensor that it counts in
        except ValueError:  # no layer of it counts, as where all are state spaces
            return self._read

    def has_read(self, tokens: int) -> None:
        """Count tokens that the base has read."""
        self._read += tokens

    def crop(self, tokens: int) -> None:
        self.inner.crop(-tokens)
        self._read -= tokens

    def take_back(self, surplus: Sequence[int], columns: int) -> None:
        by = [count - columns for count in surplus]
        if not any(by):
            return self.crop(columns) if columns else None
        layers: Any = self.inner.layers
        for layer in layers:
            width = layer.keys.shape[2] - columns
            layer.keys, layer.values = (moved(part, by, 2, width) for part in (layer.keys, layer.values))
        self._read -= columns

    def select(self, rows: Int[Tensor, "B2"]) -> None:
        self.inner.batch_select_indices(rows)

    def repeat(self, times: int) -> None:
        self.inner.batch_repeat_interleave(times)

    def reset(self) -> None:
        self.inner.reset()
        self._read = 0

    def empty(self) -> None:
        """Forget all tokens, whatever an interrupted step has left of them."""
        layers: Any = self.inner.layers
        counting = [layer for layer in layers if hasattr(layer, "get_seq_length")]
        if counting or not layers:
            self.inner.crop(-max((layer.get_seq_length() for layer in counting), default=0))
        else:
            self.inner.reset()
        self._read = 0


@dataclass(frozen=True)
class BaseState:
    """What the base made of some tokens."""

    hidden: Float[Tensor, "B T D"]
    """What its head reads; its logits where no head splits off."""
    activations: dict[str, Tensor]
    """Tap to what went into that module, `(B, T, D)`."""
    output: Any
    """As transformers gives it: hidden states of all layers, attentions …"""


class BaseVoter(HeadVoter):
    """A frozen base, read by its body; its head runs where votes are asked for.

    Where body and head do not give the model's own logits, the whole model is read and its logits are the state.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, *, exact: bool = True) -> None:
        """
        Args:
            model: Any causal LM.
            vocab_size: Ids of the tokenizer are below it; output rows beyond are padding.
            exact: Split a head off only where this changes no bit; otherwise rounding may differ.

        Raises:
            ModelError: Tokens of the model see those to come.
            ConfigError: It has an adapter that is a prompt.
        """
        check_no_prompt(model, "a base")
        check_causal(model)
        self.model = model
        self.vocab_size = vocab_size
        self.tap = None
        try:
            self._head: Head | None = find_head(model, exact=exact)
        except Exception:  # the model is a stranger's code; whatever goes wrong with its parts, the whole may work
            self._head = None
        self._reader = model if self._head is None else model.base_model
        forward = unwrapped(model).forward if self._head is None else self._reader.forward
        parameters = inspect.signature(forward).parameters
        if "input_ids" not in parameters:  # a body that only hands on what it is given
            parameters = inspect.signature(unwrapped(model).forward).parameters
        self.arguments = set(parameters)
        self._cache_name = cache_argument(self.arguments)
        self._takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._compiled = CompiledSteps(model, self._reader)

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def keeps_cache(self) -> bool:
        """Whether the model keeps its past in a cache of transformers; where not, it reads all text at every step."""
        inner: Any = unwrapped(self.model)
        takes = self._cache_name is not None and inner._supports_default_dynamic_cache()
        return takes and self.abilities.steps

    @property
    def abilities(self) -> Abilities:
        """What the model does right, as it was found on a probe."""
        return abilities(self.model)

    @property
    def head(self) -> Head:  # type: ignore[override]
        if self._head is None:
            return Head(nn.Identity())
        return replace(self._head, linear=self.model.get_output_embeddings())  # an adapter may have wrapped it since

    def hidden(self, state: BaseState, places: Any) -> Float[Tensor, "... D"]:
        return state.hidden[places]

    def new_cache(self, batch_size: int) -> BaseCache:
        return BaseCache(DynamicCache(config=self.model.config.get_text_config(decoder=True)))

    def step(
        self,
        tokens: Int[Tensor, "B T"],
        activations: None = None,
        attention_mask: Tensor | None = None,
        cache: BaseCache | None = None,
        *,
        position_ids: Tensor | None = None,
        taps: Iterable[str] = (),
        use_cache: bool = False,
        **inputs: Any,
    ) -> BaseState:
        """Read tokens, as `Voter.step`.

        Args:
            position_ids: `(B, T)`; None: the model counts.
            taps: Modules whose inputs are kept.
            use_cache: Passed to the model.
            inputs: Further arguments; those that the model does not know are left out.
        """
        known = {name: value for name, value in inputs.items() if name in self.arguments or self._takes_more}
        for name, value in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if value is not None and name in self.arguments:
                known[name] = value
        taps = tuple(taps)
        if cache is not None and cache.room is not None:
            known = with_whole_mask(self.model, tokens, cache.inner, known)
        read = None if cache is None else self._compiled.read(tokens, cache.inner, cache.room, known, taps)
        if read is not None:
            output, found = read
        else:
            if cache is not None:
                known[self._cache_name or CACHE] = cache.inner
            with capture(self.model, taps) as found:
                output = self._reader(input_ids=tokens, use_cache=use_cache, return_dict=True, **known)
        if cache is not None:
            cache.has_read(tokens.shape[1])
        return BaseState(
            output.logits if self._head is None else output[0],
            {tap: by_row(found, tap, tokens) for tap in found},
            output,
        )

    def check_reads(self, tokens: Int[Tensor, "B T"], mask: Tensor | None = None, past: int = 0) -> None:
        """Raise unless the model can read these tokens at once, behind `past` others that a cache holds.

        Args:
            tokens: The new ones.
            mask: `(B, past + T)`, 0 at padding.
            past: How many came before.

        Raises:
            ConfigError: They are more than it has positions for, a token has no row, or it reads no padding, or nothing
                but single tokens behind a cache.
        """
        name, length = type(self.model).__name__, past + tokens.shape[1]
        rows, longest = embedding_rows(self.model), longest_context(self.model.config)
        if longest is not None and length > longest:
            raise ConfigError(f"{length} tokens are more than the {longest} that base {name} has positions for")
        if not past and tokens.numel() and (largest := int(tokens.max())) >= rows:  # a token made later has one
            raise ConfigError(f"token id {largest} is outside the {rows} of base {name}; leave that token out")
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()) and not self.abilities.padding:
            raise ConfigError(f"{name} reads padding on the left as text: give it rows one by one, or of one length")
        if past and tokens.shape[1] > 1 and not self.abilities.chunks:
            raise ConfigError(f"{name} goes on behind a cache by single tokens only: give one at a time, or no cache")

    def read(self, tokens: Int[Tensor, "B T"], taps: Iterable[str]) -> dict[str, Tensor]:
        """Tap to what goes into that module, `(B, T, D)`; nothing behind the last tap is computed."""
        with capture(self.model, taps, stop=True) as found:
            self._reader(input_ids=tokens, use_cache=False)
        return {tap: by_row(found, tap, tokens) for tap in found}


def narrowed(model: PreTrainedModel, vocab_size: int) -> PreTrainedModel:
    """The model, but for output rows from `vocab_size` on, which are padding; weights are shared."""
    forward, part = model.forward, copy.copy(model)
    part.config = copy.deepcopy(model.config)
    part.config.get_text_config().vocab_size = vocab_size

    @functools.wraps(forward)
    def narrow(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits[..., :vocab_size]
        return output

    part.forward = narrow  # type: ignore[method-assign]
    return part


def positions_restart(position_ids: Tensor, attention_mask: Tensor | None, past: int) -> bool:
    """Whether positions go down from a token to the next, as where documents are packed into a row.

    Of `past` tokens before them, those that the mask shows count. One token at a time is not looked at on an
    accelerator, which would have to be waited for at each.
    """
    if position_ids.ndim != 2 or (position_ids.shape[1] < 2 and (not past or position_ids.device.type != "cpu")):
        return False
    there = torch.ones_like(position_ids, dtype=torch.bool)
    before = torch.full_like(position_ids[:, 0], past)
    if attention_mask is not None and attention_mask.shape[1] >= position_ids.shape[1]:
        there = attention_mask[:, -position_ids.shape[1] :].bool().to(there.device)
        before = attention_mask[:, : -position_ids.shape[1]].sum(1).to(there.device)
    down = (position_ids[:, 1:] <= position_ids[:, :-1]) & there[:, 1:] & there[:, :-1]
    behind = (position_ids[:, 0] < before) & there[:, 0] if past else down[:, :0]
    return bool(down.any() | behind.any())
