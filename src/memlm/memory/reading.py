"""What a memory's states are made of: tokens read by a causal LM through a cache and a window, or given activations."""

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from memlm.errors import ConfigError, ModelError
from memlm.memory.voter import NoCache, VoterCache, moved
from memlm.models.abilities import CACHE, abilities, cache_argument
from memlm.models.compiling import CompiledSteps, Room, with_whole_mask
from memlm.models.loading import device_of, embedding_rows


class TokenCache(VoterCache):
    """Tokens read so far, and keys and values of those that are in the window.

    A row's window starts at token 0 until it is full; then it jumps ahead by half its size, and the tokens left in it
    are read again from place 0. So what a memory sees depends on the tokens alone, not on how they came (at once, one
    by one, padded). Keys and values are only a shortcut: where they do not fit, they are made again from the tokens,
    for the rows concerned alone.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.tokens = torch.zeros(batch_size, 0, dtype=torch.long, device=device)
        self.mask = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        self.starts: Tensor | None = None  # (B,) first token in the window, per row
        self.fits = True  # whether all windows start at 0, which is known without asking the device
        self.inner: Cache | None = None
        self.inner_mask = self.mask
        self.is_whole = True  # whether no padding is in `inner`; False where that was not asked
        self.room: Room | None = None
        self.still: StaticCache | None = None  # where keys and values stand still, if they are to

    def hold(self, room: Room) -> None:
        self.room = room

    def loosen(self) -> None:
        """Let keys and values move, as changing rows or windows, or too many tokens, ask for."""
        if self.still is not None and self.inner is self.still:
            loose, ends = DynamicCache(), self.inner_mask.shape[1]
            loose.layers = cast(Any, [DynamicLayer() for _ in self.still.layers])
            for number, layer in enumerate(self._still_layers()):
                loose.update(layer.keys[:, :, :ends], layer.values[:, :, :ends], number)
            self.inner = loose

    def tighten(self) -> None:
        """Let keys and values stand where they stood before they were let move, if they fit there."""
        if self.still is None or self.inner is None or self.inner is self.still:
            return
        rows, columns = self.inner_mask.shape
        if columns > _room_of(self.still) or any(layer.batch_size != rows for layer in self._still_layers()):
            return
        layers: Any = self.inner.layers
        self.still.reset()
        for number, layer in enumerate(layers):
            self.still.update(layer.keys, layer.values, number)
        self.inner = self.still

    def _still_layers(self) -> list[Any]:
        layers: Any = () if self.still is None else self.still.layers
        return [layer for layer in layers if layer.is_initialized]

    def drop_inner(self) -> None:
        """Forget keys and values; the next step makes them again."""
        self.inner, self.starts = None, None

    def heed(self, mask: Tensor) -> None:
        """Take tokens for padding that were read as text, as what `generate` puts behind a text that has ended."""
        if mask.shape != self.mask.shape:
            return
        heard = self.mask & mask.to(self.mask.device).bool()
        if not torch.equal(heard, self.mask):
            self.mask = heard
            self.drop_inner()

    def crop(self, tokens: int) -> None:
        if tokens <= 0:
            return
        self.tokens, self.mask = self.tokens[:, :-tokens], self.mask[:, :-tokens]
        if self.inner is None:
            return
        if not getattr(self.inner, "is_croppable", False):  # static caches can since transformers 5.24
            self.loosen()
        kept = self.inner_mask.shape[1] - tokens
        if kept <= 0 or not self.inner_mask[:, kept:].all() or any(self.inner.is_sliding):
            self.drop_inner()
        else:
            self.inner.crop(-tokens)
            self.inner_mask = self.inner_mask[:, :-tokens]

    def take_back(self, surplus: Sequence[int], columns: int) -> None:
        by = [count - columns for count in surplus]
        if not any(by):
            return self.crop(columns)
        kept = self.mask.shape[1] - columns
        self.tokens, self.mask = moved(self.tokens, by, 1)[:, :kept], _moved_mask(self.mask, by)[:, :kept]
        if self.inner is None:
            return
        self.loosen()
        width = self.inner_mask.shape[1]
        ends = self.inner_mask.flip(1).long().cumsum(1).tolist()  # tokens from each place on, counted from the end
        there = all(
            0 < count < width and end[count - 1] == count for end, count in zip(ends, surplus, strict=True) if count
        )
        if not there or any(self.inner.is_sliding):  # a window moved meanwhile, or what is before it is gone
            return self.drop_inner()
        left = _moved_mask(self.inner_mask, surplus)
        first = int(left.any(0).int().argmax())  # columns before it are padding in all rows
        layers: Any = self.inner.layers
        for layer in layers:
            layer.keys, layer.values = (moved(part, surplus, 2)[:, :, first:] for part in (layer.keys, layer.values))
        self.inner_mask, self.is_whole = left[:, first:], False

    def select(self, rows: Int[Tensor, "B2"]) -> None:
        self.tokens, self.mask = self.tokens[rows], self.mask[rows]
        if self.inner is not None and self.starts is not None:
            self.loosen()
            self.inner.batch_select_indices(rows)
            self.inner_mask, self.starts = self.inner_mask[rows], self.starts[rows]

    def repeat(self, times: int) -> None:
        self.select(torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(times))

    def reset(self) -> None:
        self.tokens, self.mask = self.tokens[:, :0], self.mask[:, :0]
        self.drop_inner()


def _moved_mask(mask: Bool[Tensor, "B L"], by: Sequence[int]) -> Bool[Tensor, "B L"]:
    """Rows moved to the right; what comes in is padding."""
    places, shift = torch.arange(mask.shape[1], device=mask.device), torch.tensor(by, device=mask.device)[:, None]
    return moved(mask, by, 1) & (places >= shift) & (places < mask.shape[1] + shift)


class GivenActivations:
    """The base's activations as they are: no token looks at another, and nothing is kept."""

    def __init__(self, width: int, reader: str) -> None:
        """
        Args:
            reader: What an error calls the memory.
        """
        self.width, self._reader = width, reader

    def new_cache(self, batch_size: int) -> NoCache:
        return NoCache()

    def step(
        self,
        tokens: Tensor,
        activations: Tensor | None = None,
        attention_mask: Any = None,
        cache: Any = None,
        *,
        keep: Any = None,
    ) -> Float[Tensor, "B T D"]:
        if activations is None:
            raise ModelError(f"{self._reader} reads the base's activations; there are none")
        if (width := activations.shape[-1]) != self.width:
            raise ModelError(f"{self._reader} reads activations {self.width} wide; the base's are {width} wide")
        return activations


class _Segment(NamedTuple):
    """New tokens of a row that see the same window."""

    row: int
    start: int
    """First token in the window, counted without padding, as are the others."""
    first: int
    end: int
    """The new tokens, from the first to before the end; none, where only the window is to be known."""


class WindowedReader:
    """Reads tokens with a causal LM, in runs that fit its window, and gives one vector per token.

    A model that keeps more than keys and values (a state, as state-space and linear-attention models do) reads its
    window anew in every step.
    """

    def __init__(self, model: PreTrainedModel, window: int | None, run: Callable[..., Tensor] | None = None) -> None:
        """
        Args:
            window: Tokens it looks back on at most; None: no limit.
            run: From `input_ids` and further arguments of the model's body to `(B, T, D)`; the body's last hidden
                states if None.
        """
        self.model = model
        self.window = window
        self._run = run
        parameters = inspect.signature(model.base_model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._cache_name = cache_argument(parameters)
        self._takes_cache = self._cache_name is not None and _keeps_keys_alone(model)
        self._compiled = CompiledSteps(model, model.base_model)
        self._warned = False

    @property
    def keeps_keys(self) -> bool:
        """Whether keys and values stand for the tokens read; where not, windows are read anew."""
        return self._takes_cache and abilities(self.model).all

    def new_cache(self, batch_size: int) -> TokenCache:
        return TokenCache(batch_size, device_of(self.model))

    def _with_rows(self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The tokens, if the model has rows for all of them; padding may be one that only others have."""
        rows = embedding_rows(self.model)
        if not tokens.numel() or int(tokens.max()) < rows:
            return tokens
        tokens = tokens.masked_fill(~mask, 0)
        if (largest := int(tokens.max())) >= rows:
            name = type(self.model).__name__
            raise ConfigError(f"token id {largest} is outside the {rows} of memory {name}; leave that token out")
        return tokens

    def window_starts(self, places: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """First token that is visible to the token at each place, both counted without padding."""
        if self.window is None:
            return torch.zeros_like(places)
        half = max(1, self.window // 2)
        return ((places - self.window).div(half, rounding_mode="floor") + 1).clamp(min=0) * half

    def step(
        self,
        tokens: Int[Tensor, "B T"],
        activations: None = None,
        attention_mask: Bool[Tensor, "B L"] | None = None,
        cache: VoterCache | None = None,
        *,
        keep: slice | Tensor | None = None,
    ) -> Float[Tensor, "B T D"]:
        """One vector per new token; arguments as `Voter.step` takes them."""
        cache = cache if cache is not None else self.new_cache(len(tokens))
        assert isinstance(cache, TokenCache)
        tokens = tokens.to(device_of(self.model))
        mask = (
            torch.ones_like(tokens, dtype=torch.bool)
            if attention_mask is None
            else attention_mask[:, -tokens.shape[1] :].to(tokens.device).bool()
        )
        if tokens.shape[1] > 1:
            tokens = self._with_rows(tokens, mask)
        if attention_mask is not None and tokens.shape[1] > 1:
            cache.heed(attention_mask[:, : -tokens.shape[1]])
        if self.keeps_keys and not cache.tokens.shape[1]:
            cache.still = self._still(cache.room)
            cache.inner, cache.inner_mask = self._empty() if cache.still is None else cache.still, mask[:, :0]
            cache.starts = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
            cache.fits = cache.is_whole = True
        text, text_mask = torch.cat([cache.tokens, tokens], 1), torch.cat([cache.mask, mask], 1)
        known = cache.mask.sum(1)
        fits = self.window is None or text.shape[1] <= self.window
        if fits and cache.fits and cache.starts is not None:
            starts, stay = cache.starts, True
        else:
            last = (known + mask.sum(1) - 1).clamp(min=0)
            starts, before = self.window_starts(last), self.window_starts(torch.minimum(known, last))  # (B,)
            self._warn_beyond_window(starts)
            stay = cache.starts is not None and torch.equal(cache.starts, starts) and torch.equal(starts, before)
        if cache.inner is not None and stay:
            cache.is_whole = cache.is_whole and (attention_mask is None or bool(mask.all()))
            if cache.still is not None and cache.inner_mask.shape[1] + tokens.shape[1] > _room_of(cache.still):
                cache.loosen()
            states = self._go_on(cache.inner, cache.inner_mask, tokens, mask, is_whole=cache.is_whole, room=cache.room)
            cache.inner_mask = torch.cat([cache.inner_mask, mask], 1)
        else:
            cache.loosen()
            states = self._read_windows(cache, text, text_mask, known, mask, keep)
            cache.is_whole = bool(cache.inner_mask.all())
            cache.tighten()
        cache.starts, cache.tokens, cache.mask, cache.fits = starts, text, text_mask, fits
        return states

    def _read_windows(
        self,
        cache: TokenCache,
        text: Int[Tensor, "B L"],
        text_mask: Bool[Tensor, "B L"],
        known: Int[Tensor, "B"],
        mask: Bool[Tensor, "B T"],
        keep: slice | Tensor | None,
    ) -> Float[Tensor, "B T D"]:
        """The states of a step in which some windows move; leaves keys and values of the last ones in `cache`.

        A row whose window stays goes on with its keys and values; every other window that is needed is read by itself.
        """
        wanted = torch.ones(mask.shape[1], dtype=torch.bool)
        if keep is not None:
            wanted[:] = False
            wanted[keep.cpu() if isinstance(keep, Tensor) else keep] = True
        rows = [row[there] for row, there in zip(text, text_mask, strict=True)]  # without padding
        columns = [row.nonzero()[:, 0] for row in mask]  # of the new tokens
        before = known.tolist()
        held = cache.starts.tolist() if cache.inner is not None and cache.starts is not None else None
        staying, leaving, passing, last = [], [], [], []
        for row, (first, end) in enumerate(zip(before, map(len, rows), strict=True)):
            places = torch.arange(first, end)
            runs = groupby(zip(self.window_starts(places).tolist(), places.tolist(), strict=True), lambda pair: pair[0])
            segments = [_Segment(row, start, (there := [p for _, p in run])[0], there[-1] + 1) for start, run in runs]
            if not segments:
                start = int(self.window_starts(torch.tensor(max(end - 1, 0))))
                segments = [_Segment(row, start, end, end)]
            for segment in segments:
                goes_on = held is not None and segment is segments[0] and held[row] == segment.start
                if segment is segments[-1]:
                    (staying if goes_on else last).append(segment)
                elif bool(wanted[columns[row][segment.first - first : segment.end - first].cpu()].any()):
                    (leaving if goes_on else passing).append(segment)
        out: Tensor | None = None

        def put(segments: Sequence[_Segment], hidden: Tensor, begins: Sequence[int]) -> None:
            """Leave each segment's states, which begin there in its row of `hidden`, at its columns."""
            nonlocal out
            out = hidden.new_zeros(*mask.shape, hidden.shape[-1]) if out is None else out
            for (row, _, first, end), states, begin in zip(segments, hidden, begins, strict=True):
                at = columns[row][first - before[row] : end - before[row]]
                out[row, at] = states[begin : begin + end - first]

        def padded(parts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
            there = [torch.ones_like(part, dtype=torch.bool) for part in parts]
            both = (pad_sequence(p, batch_first=True, padding_side=side) for p in (parts, there))
            return cast(tuple[Tensor, Tensor], tuple(both))

        def read_alone(segments: list[_Segment]) -> None:
            """Whole windows, nothing kept; padding is on the right, where no causal model sees it."""
            found, _ = padded([rows[row][start:end] for row, start, _, end in segments], "right")
            put(segments, self._hidden(found), [first - start for _, start, first, _ in segments])

        if leaving:
            assert cache.inner is not None
            at = torch.tensor([segment.row for segment in leaving], device=text.device)
            new, new_mask = padded([rows[row][first:end] for row, _, first, end in leaving], "right")
            put(leaving, self._go_on(_rows_of(cache.inner, at), cache.inner_mask[at], new, new_mask), [0] * len(at))
        for group in range(0, len(passing), len(rows)):
            read_alone(passing[group : group + len(rows)])
        if not self.keeps_keys:
            last = [segment for segment in last if segment.end > segment.first]
            if last:
                read_alone(last)
            cache.inner = None
        else:
            kept = []
            if staying:
                assert cache.inner is not None
                at = torch.tensor([segment.row for segment in staying], device=text.device)
                inner, new, new_mask = _rows_of(cache.inner, at), text[at, -mask.shape[1] :], mask[at]
                if not cache.inner_mask.shape[1]:  # what stands before all texts is not read
                    begin = int(new_mask.any(0).int().argmax())
                    new, new_mask = new[:, begin:], new_mask[:, begin:]
                hidden = self._go_on(inner, cache.inner_mask[at], new, new_mask)
                out = hidden.new_zeros(*mask.shape, hidden.shape[-1]) if out is None else out
                out[at, mask.shape[1] - new.shape[1] :] = hidden
                kept.append((at, inner, torch.cat([cache.inner_mask[at], new_mask], 1)))
            if last:
                at, inner = torch.tensor([segment.row for segment in last], device=text.device), self._empty()
                found, there = padded([rows[row][start:end] for row, start, _, end in last], "left")
                if found.shape[1]:
                    hidden = self._go_on(inner, there[:, :0], found, there)
                    put(last, hidden, [found.shape[1] - (end - first) for _, _, first, end in last])
                kept.append((at, inner, there))
            cache.inner, cache.inner_mask = _joined(kept, len(rows))
        if out is None:  # no token was new
            out = self._hidden(text[:, -mask.shape[1] :])
        return out

    def _empty(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def _still(self, room: Room | None) -> StaticCache | None:
        """Where keys and values stand still, if they are to and all are kept alike."""
        if room is None or self._run is not None:
            return None
        length = room.length if self.window is None else min(room.length, self.window)
        still = StaticCache(config=self.model.config, max_cache_len=length)
        return None if any(still.is_sliding) else still

    def _hidden(self, tokens: Int[Tensor, "B T"], **inputs: Any) -> Float[Tensor, "B T D"]:
        run = self._run or self.model.base_model
        found = run(input_ids=tokens, **{"use_cache": False, **inputs})
        return found if self._run is not None else found[0]

    def _go_on(
        self,
        inner: Cache,
        inner_mask: Bool[Tensor, "B L"],
        tokens: Tensor,
        mask: Bool[Tensor, "B T"],
        *,
        is_whole: bool = False,
        room: Room | None = None,
    ) -> Float[Tensor, "B T D"]:
        """States of tokens behind those in `inner`, which is extended.

        Args:
            is_whole: That there is no padding is known, and the device need not be asked.
            room: Of a static cache, behind which single tokens may be read by what is compiled.
        """
        inner_mask = torch.cat([inner_mask, mask], 1)
        inputs: dict[str, Tensor] = {}
        if not is_whole and not bool(inner_mask.all()):
            inputs["attention_mask"] = inner_mask.long()
        if self._takes_positions:
            inputs["position_ids"] = (inner_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        if isinstance(inner, StaticCache):
            inputs = with_whole_mask(self.model, tokens, inner, inputs)
        if (read := self._compiled.read(tokens, inner, room, inputs)) is not None:
            return read[0][0]
        return self._hidden(tokens, use_cache=True, **{self._cache_name or CACHE: inner}, **inputs)

    def _warn_beyond_window(self, starts: Int[Tensor, "B"]) -> None:
        if self.window is None or self._warned or not bool((starts > 0).any()):
            return
        self._warned = True
        warnings.warn(
            f"the text is longer than the memory's window of {self.window} tokens; the memory now sees between"
            f" {self.window // 2} and {self.window} of the latest tokens, the base all of them",
            stacklevel=3,
        )


def _keeps_keys_alone(model: PreTrainedModel) -> bool:
    """Whether all that a model keeps of its past are keys and values, which transformers' plain layers hold."""
    some: Any = model
    if getattr(model, "_is_stateful", False) or not some._supports_default_dynamic_cache():
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # a config's own code; what it keeps is not known
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _room_of(cache: StaticCache) -> int:
    """Tokens that a static cache holds at most."""
    return cast(Any, cache.layers[0]).max_cache_len


def _rows_of(cache: Cache, rows: Int[Tensor, "B2"]) -> Cache:
    """A cache of some rows of the batch; the other is left as it is."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    part.batch_select_indices(rows)
    return part


def _joined(parts: Sequence[tuple[Tensor, Cache, Tensor]], batch_size: int) -> tuple[Cache, Bool[Tensor, "B L"]]:
    """One cache of the rows of several, flush right, and its mask.

    Args:
        parts: Which rows of the whole each has, its cache, and its mask.
    """
    columns = [int(mask.any(0).int().argmax()) for _, _, mask in parts]  # those before are padding
    lengths = [mask.shape[1] - first for first, (_, _, mask) in zip(columns, parts, strict=True)]
    longest = max(lengths)
    whole_mask = parts[0][2].new_zeros(batch_size, longest)
    for (rows, _, mask), length in zip(parts, lengths, strict=True):
        whole_mask[rows, longest - length :] = mask[:, mask.shape[1] - length :]
    whole = copy.copy(parts[0][1])
    whole.layers = []
    for layers in zip(*(cache.layers for _, cache, _ in parts), strict=True):
        there = [(rows, layer) for (rows, _, _), layer in zip(parts, layers, strict=True) if layer.is_initialized]
        made: Any = copy.copy(there[0][1] if there else layers[0])
        size = longest
        if isinstance(made, DynamicSlidingWindowLayer):
            made.cumulative_length, size = longest, min(longest, made.sliding_window - 1)
        for name in ("keys", "values") if there else ():
            first = getattr(made, name)
            tensor = first.new_zeros(batch_size, first.shape[1], size, first.shape[3])
            for rows, layer in there:
                held = getattr(layer, name)
                length = min(size, held.shape[2])
                tensor[rows, :, size - length :] = held[:, :, held.shape[2] - length :]
            setattr(made, name, tensor)
        whole.layers.append(made)
    return whole, whole_mask
