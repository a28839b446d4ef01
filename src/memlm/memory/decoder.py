"""Memory Decoder: a small causal LM that imitates a retriever."""

import inspect
import warnings
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from memlm.corpus.blocks import IGNORE
from memlm.errors import ConfigError
from memlm.memory.loss import DistillationLoss, distillation_loss
from memlm.memory.protocol import Memory, MemoryCache, MemorySettings
from memlm.models.heads import find_head, label_log_probs
from memlm.models.loading import load_causal_lm


class DecoderCache(MemoryCache):
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

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        """Real tokens per row."""
        return self.mask.sum(1)

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


class MemoryDecoder(Memory):
    """A causal LM as a memory; it reads tokens only, so one memory serves every base of its tokenizer.

    Source: Memory Decoder (arXiv:2508.09874).
    """

    kind = "decoder"
    can_draft = True

    def __init__(self, decoder: PreTrainedModel, settings: MemorySettings | None = None) -> None:
        """
        Args:
            decoder: Any causal LM of transformers.
            settings: Read from the decoder's config if None.
        """
        config = decoder.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        super().__init__(
            settings or MemorySettings(kind="decoder", vocab_size=config.vocab_size, context_length=longest)
        )
        self.decoder = decoder
        self.head = find_head(decoder)
        self.window = self.context_length
        self._takes_positions = "position_ids" in inspect.signature(decoder.base_model.forward).parameters
        self._warned = False

    @classmethod
    def load(cls, folder: str, settings: MemorySettings | None, **kwargs: Any) -> Self:
        """The memory in `folder`, or a plain causal LM as a memory where there are no settings."""
        return cls(load_causal_lm(folder, **kwargs), settings).eval()

    def save_weights(self, folder: Path) -> None:
        self.decoder.save_pretrained(folder)

    # --- training -----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        kl_weight: float,
        target_counts: Int[Tensor, "P"] | None = None,
        target_ids: Int[Tensor, "S"] | None = None,
        target_probs: Float[Tensor, "S"] | None = None,
    ) -> DistillationLoss:
        """The distillation loss of a batch, summed over its positions.

        Args:
            input_ids: Padded on the right with anything.
            labels: `input_ids` where a token is predicted, -100 elsewhere; shifted here, as transformers does.
            kl_weight: In [0, 1].
            target_counts, target_ids, target_probs: Targets of the predicted tokens in reading order.
        """
        hidden = self.decoder.base_model(input_ids=input_ids, use_cache=False)[0]
        predicted = labels[:, 1:] != IGNORE
        return distillation_loss(
            hidden[:, :-1][predicted],
            labels[:, 1:][predicted],
            self.head,
            kl_weight=kl_weight,
            vocab_size=self.vocab_size,
            target_counts=target_counts,
            target_ids=target_ids,
            target_probs=target_probs,
        )

    # --- inference ----------------------------------------------------------------------------------------------

    def new_cache(self, batch_size: int) -> DecoderCache:
        return DecoderCache(batch_size, self.decoder.device)

    def set_window(self, tokens: int) -> None:
        longest = getattr(self.decoder.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and tokens > longest:
            raise ConfigError(f"memory_window = {tokens}: the memory has positions for {longest} tokens")
        self.window = tokens

    def window_starts(self, places: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """First token that is visible to the token at each place, both counted without padding."""
        if self.window is None:
            return torch.zeros_like(places)
        half = max(1, self.window // 2)
        return ((places - self.window).div(half, rounding_mode="floor") + 1).clamp(min=0) * half

    def step(
        self,
        tokens: Int[Tensor, "B T"],
        activations: Tensor | None = None,
        attention_mask: Bool[Tensor, "B T"] | None = None,
        cache: MemoryCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        cache = cache if cache is not None else self.new_cache(len(tokens))
        assert isinstance(cache, DecoderCache)
        tokens = tokens.to(self.decoder.device)
        mask = (
            torch.ones_like(tokens, dtype=torch.bool)
            if attention_mask is None
            else attention_mask.to(tokens.device).bool()
        )
        states, column = [], 0
        while column < tokens.shape[1]:
            run = self._longest_run(cache, mask[:, column:])
            states.append(self._extend(cache, tokens[:, column : column + run], mask[:, column : column + run]))
            column += run
        return torch.cat(states, 1) if len(states) != 1 else states[0]

    def _longest_run(self, cache: DecoderCache, mask: Bool[Tensor, "B T"]) -> int:
        """How many of the next columns every row can read within its present window."""
        lengths = cache.lengths
        if self.window is None or int(lengths.max()) + mask.shape[1] <= self.window:
            return mask.shape[1]
        places = lengths[:, None] + mask.cumsum(1) - mask.long()  # (B, T) place of each token in its row
        same = self.window_starts(places) == self.window_starts(lengths)[:, None]
        changed = (~same & mask).any(0)
        run = int(changed.long().argmax()) if bool(changed.any()) else mask.shape[1]
        return max(run, 1)

    def _extend(
        self, cache: DecoderCache, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T D"]:
        """Read a run that lies in one window per row, after what that window holds already."""
        starts = self.window_starts(cache.lengths)
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
            cache.inner = DynamicCache(config=self.decoder.config)
            cache.inner_mask = again_mask[:, :0]
            tokens, mask = torch.cat([again, tokens], 1), torch.cat([again_mask, mask], 1)
        inner_mask = torch.cat([cache.inner_mask, mask], 1)
        inputs: dict[str, Tensor] = {}
        if not bool(inner_mask.all()):
            inputs["attention_mask"] = inner_mask.long()
        if self._takes_positions:
            inputs["position_ids"] = (inner_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        hidden = self.decoder.base_model(input_ids=tokens, past_key_values=cache.inner, use_cache=True, **inputs)[0]
        cache.starts, cache.inner_mask = starts, inner_mask
        cache.tokens = torch.cat([cache.tokens, new_tokens], 1)
        cache.mask = torch.cat([cache.mask, new_mask], 1)
        return hidden[:, -new_tokens.shape[1] :]

    def votes(self, state: Float[Tensor, "B T D"], keep: slice | Tensor) -> Float[Tensor, "B T2 V"]:
        logits = self.head(state[:, keep])[..., : self.vocab_size].float()
        return (logits / self.settings.memory_temperature).log_softmax(-1)

    def label_log_probs(self, state: Float[Tensor, "B T D"], labels: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        there = labels != IGNORE
        temperature = self.settings.memory_temperature
        return label_log_probs(
            state[there], labels[there], self.head, vocab_size=self.vocab_size, temperature=temperature
        )


def _left_padded(
    tokens: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"], starts: Int[Tensor, "B"]
) -> tuple[Int[Tensor, "B W"], Bool[Tensor, "B W"]]:
    """Each row's real tokens from `starts` on, flush right."""
    rows = [row[kept][start:] for row, kept, start in zip(tokens, mask, starts.tolist(), strict=True)]
    width = max((len(row) for row in rows), default=0)
    out = tokens.new_zeros(len(rows), width)
    there = mask.new_zeros(len(rows), width)
    for i, row in enumerate(rows):
        out[i, width - len(row) :] = row
        there[i, width - len(row) :] = True
    return out, there
