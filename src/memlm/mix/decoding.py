"""What drafted and drawn decoding share: texts under way, their scores after the processors, the cache and masks."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import logits_process as processors_of
from transformers.generation.utils import GenerateDecoderOnlyOutput

from memlm.errors import ConfigError
from memlm.mix.cache import MixedCache
from memlm.mix.members import Mixture
from memlm.mix.pace import MOST_DRAFTED
from memlm.models.abilities import CACHE

CACHE_NAMES = (CACHE, "past_key_values", "cache")
_OF_SCORES_ALONE = tuple(
    getattr(processors_of, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "TopHLogitsWarper",
        "LogitNormalization",
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(processors_of, name)
)
"""What they do to a distribution does not depend on the text."""
_WITH_MEMORY = ("SynthIDTextWatermark", "UnbatchedClassifierFreeGuidance", "ClassifierFreeGuidance", "Whisper", "Dia")
"""Beginnings of transformers' processors that keep something from step to step, or belong to other models."""
_BY_ROW = ("PrefixConstrained", "EncoderRepetition", "EncoderNoRepeat")
"""Beginnings of those that know the rows of a batch by number."""


def strange_processor(processors: LogitsProcessorList, rows: int = 1) -> str | None:
    """The name of one that may be more than a function of a text and its scores."""
    for processor in processors:
        kind = type(processor)
        known = (*_WITH_MEMORY, *_BY_ROW) if rows > 1 else _WITH_MEMORY
        if not kind.__module__.startswith("transformers.") or kind.__name__.startswith(known):
            return kind.__name__
    return None


def strange_criterion(criteria: StoppingCriteriaList) -> str | None:
    """The name of one that may look at more than a text of a batch by itself, or ends one that goes on being written.

    transformers puts padding behind a text that has ended only where an end token may have ended it.
    """
    known = [MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria]
    if any(isinstance(criterion, EosTokenCriteria) for criterion in criteria):
        known.append(StopStringCriteria)
    return next((type(criterion).__name__ for criterion in criteria if type(criterion) not in known), None)


@dataclass
class Text:
    """A text under way, and what ends it."""

    ids: Int[Tensor, "1 N"]
    criteria: StoppingCriteriaList
    streamer: Any
    config: GenerationConfig
    scores: list[Tensor] | None
    logits: list[Tensor] | None
    """`(1, V)` of every new token, where they are asked for."""
    done: bool = False

    def __len__(self) -> int:
        return self.ids.shape[1]

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        longest = getattr(self.criteria, "max_length", None) or self.config.max_length
        return int(longest) - len(self) if longest else MOST_DRAFTED + 1

    def add(self, token: Tensor, scores: Tensor, logits: Tensor) -> None:
        """Put a token at the end.

        Args:
            token: `(1,)`.
            scores, logits: `(1, V)`, what it was chosen by.
        """
        self.ids = torch.cat([self.ids, token[:, None].to(self.ids.device)], 1)
        self._keep(scores, logits)
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        told = None if self.scores is None else tuple(self.scores)
        self.done = bool(cast(Any, self.criteria)(self.ids, told).all())

    def _keep(self, scores: Tensor, logits: Tensor) -> None:
        if self.scores is not None:
            self.scores.append(scores.clone())  # of many that were made together
        if self.logits is not None:
            self.logits.append(logits.clone())

    @staticmethod
    def add_to_all(texts: "Sequence[Text]", tokens: Tensor, scores: Tensor, logits: Tensor) -> None:
        """Put a token at the end of each of several texts of one length, as `add` does one by one.

        Args:
            tokens: `(B,)`.
            scores, logits: `(B, V)`, what they were chosen by.
        """
        ids = torch.cat([text.ids for text in texts])
        ids = torch.cat([ids, tokens[:, None].to(ids.device)], 1)
        done = cast(Any, texts[0].criteria)(ids, None).tolist()
        for row, text in enumerate(texts):
            text.ids, text.done = ids[row : row + 1], done[row]
            text._keep(scores[row : row + 1], logits[row : row + 1])


@dataclass(frozen=True)
class Call:
    """What transformers gives to `_sample`."""

    ids: Int[Tensor, "B N"]
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any
    options: dict[str, Any]
    """Keywords of `forward`."""

    @property
    def cache(self) -> Any:
        """The one that `generate` made or was given, by whatever name; None: none."""
        return next((self.options[name] for name in CACHE_NAMES if self.options.get(name) is not None), None)

    @property
    def texts(self) -> list[Text]:
        """The texts to be gone on with, that keep what the settings ask for."""
        told = self.config.return_dict_in_generate
        scores, logits = told and self.config.output_scores, told and self.config.output_logits
        return [
            Text(row[None], self.criteria, self.streamer, self.config, [] if scores else None, [] if logits else None)
            for row in self.ids
        ]

    def chunks(self, known: int) -> list[Int[Tensor, "B C"]]:
        """What of the prompts, behind `known` tokens, is read before the last chunk, where they are read in chunks."""
        size = getattr(self.config, "prefill_chunk_size", None)
        return list(self.ids[:, known:].split(size, 1))[:-1] if size else []


def result(texts: list[Text], cache: MixedCache) -> Any:
    """What `generate` gives: all texts, filled up on the right, and what was asked for beside them."""
    config, longest = texts[0].config, max(map(len, texts))
    given = getattr(config, "_pad_token_tensor", None)  # as `generate` settled it, where the settings have none
    fill = 0 if given is None else int(given)
    ids = [torch.nn.functional.pad(text.ids, (0, longest - len(text)), value=fill) for text in texts]
    if texts[0].streamer is not None:
        texts[0].streamer.end()
    if not config.return_dict_in_generate:
        return torch.cat(ids)

    def together(of_each: list[list[Tensor] | None]) -> tuple[Tensor, ...] | None:
        """Per place those of all texts; of one that has ended, its last."""
        kept = [steps for steps in of_each if steps is not None]
        count = max((len(steps) for steps in kept), default=0)
        if not kept:
            return None
        return tuple(torch.cat([steps[min(at, len(steps) - 1)] for steps in kept]) for at in range(count))

    return GenerateDecoderOnlyOutput(
        sequences=cast(Any, torch.cat(ids)),
        scores=cast(Any, together([text.scores for text in texts])),
        logits=cast(Any, together([text.logits for text in texts])),
        past_key_values=cache if config.use_cache else None,
    )


class Processed:
    """Scores after the processors: all places at once where these look at scores alone."""

    def __init__(self, processors: LogitsProcessorList, rows: int = 1) -> None:
        self._processors = processors
        self._of_row = [
            LogitsProcessorList([_of_row(processor, row) for processor in processors]) for row in range(rows)
        ]
        self.of_scores_alone = all(isinstance(processor, _OF_SCORES_ALONE) for processor in processors)

    def __call__(
        self,
        texts: Sequence[Int[Tensor, "1 N"]],
        drafted: Int[Tensor, "B K"],
        scores: Float[Tensor, "B P V"],
        *,
        spent: bool = False,
    ) -> Float[Tensor, "B P V"]:
        """Place i of a row comes after its text and the first i of its drafted tokens.

        Args:
            spent: Nobody wants `scores` afterwards, so that processors may write to them.
        """
        scores = scores.float()
        if not self._processors:
            return scores
        if self.of_scores_alone:
            flat = scores.flatten(0, 1)
            return self._processors(cast(Any, texts[0].expand(len(flat), -1)), cast(Any, flat)).view_as(scores)
        if scores.shape[1] == 1 and len({ids.shape[1] for ids in texts}) == 1:  # as plain steps have them
            only = scores[:, 0] if spent else scores[:, 0].clone()
            return self._processors(cast(Any, torch.cat(list(texts))), cast(Any, only))[:, None]
        found = torch.empty_like(scores)
        for row, ids in enumerate(texts):
            for place in range(scores.shape[1]):
                text = torch.cat([ids, drafted[row : row + 1, :place].to(ids.device)], 1)
                here = scores[row, place : place + 1].clone()
                found[row, place] = self._of_row[row](cast(Any, text), cast(Any, here))[0]
        return found


def _of_row(processor: Any, row: int) -> Any:
    """A processor of a batch, for one of its texts alone."""
    lengths = getattr(processor, "prompt_ignore_length", None)  # of the padding before each text
    if not isinstance(lengths, Tensor):
        return processor
    part = copy.copy(processor)
    part.prompt_ignore_length = lengths[row : row + 1]
    return part


def checked_cache(mixed: Mixture, call: Call) -> MixedCache:
    """The cache of a text that is to be gone on with.

    Raises:
        ConfigError: Base or cache cannot go on with it.
    """
    cache = call.cache
    assert isinstance(cache, MixedCache)
    known = cache.get_seq_length()
    if known >= call.ids.shape[1]:
        raise ConfigError("the cache holds the whole prompt, and its last token must be read: crop the cache by one")
    mixed._voter.check_reads(call.ids[:, known:], call.options.get("attention_mask"), known)
    return cache


def mask_for(
    mask: Int[Tensor, "B N"] | None, length: int, before: Sequence[int] | None = None
) -> Int[Tensor, "B N2"] | None:
    """The mask of so many columns of texts, of which those beyond the prompt are no padding.

    Args:
        mask: Of the prompts; None: there is no padding.
        before: Columns before each prompt, which are padding; None: none.
    """
    if mask is None:
        return None
    if before is not None and any(before):
        pad = torch.nn.functional.pad
        rows = [pad(pad(row, (b, 0)), (0, max(before) - b), value=1) for row, b in zip(mask, before, strict=True)]
        mask = torch.stack(rows)
    return torch.nn.functional.pad(mask, (0, max(0, length - mask.shape[1])), value=1)[:, :length]


def positions(mask: Int[Tensor, "B N"] | None, fresh: Int[Tensor, "B T"]) -> Int[Tensor, "B T"] | None:
    """Positions of the latest tokens of texts with padding; None: the model counts."""
    return None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
