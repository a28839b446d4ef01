"""What a memory's states are made of: tokens read by a causal LM through a cache and a window, or given activations."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from memlm.errors import ModelError
from memlm.memory.voter import NoCache, VoterCache


class TokenCache(VoterCache):
    """Tokens read so far, and keys and values of those that are in the window.

    A row's window starts at token 0 until it is full; then it jumps ahead by half its size, and the tokens left in it
    are read again from place 0. So what a memory sees depends on the tokens alone, not on how they came (at once, one
    by one, padded). Keys and values are only a shortcut: where they do not fit, they are made again from the tokens.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.tokens = torch.zeros(batch_size, 0, dtype=torch.long, device=device)
        self.mask = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        self.starts: Tensor | None = None  # (B,) first token in the window, per row
        self.inner: DynamicCache | None = None
        self.inner_mask = self.mask

    def drop_inner(self) -> None:
        """Forget keys and values; the next step makes them again."""
        self.inner, self.starts = None, None

    def crop(self, tokens: int) -> None:
        if tokens <= 0:
            return
        self.tokens, self.mask = self.tokens[:, :-tokens], self.mask[:, :-tokens]
        if self.inner is None:
            return
        if tokens >= self.inner_mask.shape[1] or any(self.inner.is_sliding) or any(self.inner.is_linear):
            self.drop_inner()
        else:
            self.inner.crop(-tokens)
            self.inner_mask = self.inner_mask[:, :-tokens]

    def select(self, rows: Int[Tensor, "B2"]) -> None:
        self.tokens, self.mask = self.tokens[rows], self.mask[rows]
        if self.inner is not None and self.starts is not None:
            self.inner.batch_select_indices(rows)
            self.inner_mask, self.starts = self.inner_mask[rows], self.starts[rows]

    def repeat(self, times: int) -> None:
        self.select(torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(times))

    def reset(self) -> None:
        self.tokens, self.mask = self.tokens[:, :0], self.mask[:, :0]
        self.drop_inner()


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
        self, tokens: Tensor, activations: Tensor | None = None, attention_mask: Any = None, cache: Any = None
    ) -> Float[Tensor, "B T D"]:
        if activations is None:
            raise ModelError(f"{self._reader} reads the base's activations; there are none")
        if (width := activations.shape[-1]) != self.width:
            raise ModelError(f"{self._reader} reads activations {self.width} wide; the base's are {width} wide")
        return activations


class WindowedReader:
    """Reads tokens with a causal LM, in runs that fit its window, and gives one vector per token."""

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
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        self._warned = False

    def new_cache(self, batch_size: int) -> TokenCache:
        return TokenCache(batch_size, self.model.device)

    def window_starts(self, places: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
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
    ) -> Float[Tensor, "B T D"]:
        """One vector per new token; arguments as `Voter.step` takes them."""
        cache = cache if cache is not None else self.new_cache(len(tokens))
        assert isinstance(cache, TokenCache)
        tokens = tokens.to(self.model.device)
        mask = (
            torch.ones_like(tokens, dtype=torch.bool)
            if attention_mask is None
            else attention_mask[:, -tokens.shape[1] :].to(tokens.device).bool()
        )
        states, column = [], 0
        while column < tokens.shape[1]:
            run = self._longest_run(cache, mask[:, column:])
            states.append(self._extend(cache, tokens[:, column : column + run], mask[:, column : column + run]))
            column += run
        return torch.cat(states, 1) if len(states) != 1 else states[0]

    def _longest_run(self, cache: TokenCache, mask: Bool[Tensor, "B T"]) -> int:
        """How many of the next columns every row can read within its present window."""
        lengths = cache.mask.sum(1)
        if self.window is None or int(lengths.max()) + mask.shape[1] <= self.window:
            return mask.shape[1]
        places = lengths[:, None] + mask.cumsum(1) - mask.long()  # (B, T) place of each token in its row
        moved = mask & (self.window_starts(places) != self.window_starts(lengths)[:, None])
        columns = moved.any(0).nonzero()[:, 0].tolist()
        return max(columns[0], 1) if columns else mask.shape[1]

    def _extend(
        self, cache: TokenCache, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T D"]:
        """Read a run that lies in one window per row, after what that window holds already."""
        starts = self.window_starts(cache.mask.sum(1))
        if bool((starts > 0).any()) and not self._warned:
            self._warned = True
            warnings.warn(
                f"the text is longer than the memory's window of {self.window} tokens; the memory now sees between"
                f" {(self.window or 0) // 2} and {self.window} of the latest tokens, the base all of them",
                stacklevel=2,
            )
        new_tokens, new_mask = tokens, mask
        if cache.inner is None or cache.starts is None or bool((cache.starts != starts).any()):
            again, again_mask = _left_padded(cache.tokens, cache.mask, starts)
            cache.inner = DynamicCache(config=self.model.config)
            cache.inner_mask = again_mask[:, :0]
            tokens, mask = torch.cat([again, tokens], 1), torch.cat([again_mask, mask], 1)
        inner_mask = torch.cat([cache.inner_mask, mask], 1)
        inputs: dict[str, Tensor] = {}
        if not bool(inner_mask.all()):
            inputs["attention_mask"] = inner_mask.long()
        if self._takes_positions:
            inputs["position_ids"] = (inner_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        run = self._run or self.model.base_model
        found = run(input_ids=tokens, past_key_values=cache.inner, use_cache=True, **inputs)
        hidden = found if self._run is not None else found[0]
        cache.starts, cache.inner_mask = starts, inner_mask
        cache.tokens = torch.cat([cache.tokens, new_tokens], 1)
        cache.mask = torch.cat([cache.mask, new_mask], 1)
        return hidden[:, -new_tokens.shape[1] :]


def longest_context(config: Any) -> int | None:
    """Tokens that a model of this config has positions for; None where it needs none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _left_padded(
    tokens: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"], starts: Int[Tensor, "B"]
) -> tuple[Int[Tensor, "B W"], Bool[Tensor, "B W"]]:
    """Each row's real tokens from `starts` on, flush right."""
    rows = [row[kept][start:] for row, kept, start in zip(tokens, mask, starts.tolist(), strict=True)]
    there = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    padded, padded_mask = (pad_sequence(part, batch_first=True, padding_side="left") for part in (rows, there))
    return padded, padded_mask
