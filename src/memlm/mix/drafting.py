"""Decoding faster than both models one after another, and exactly from the mixture: drafted, or drawn.

**Drafted.** The memory drafts some tokens, the base reads them in one pass, and each is accepted with probability
`min(1, p(d) / q(d))`, where p is the mixture and q what the memory drafted from; at the first that is not, the next
token comes from what p has above q. So all tokens are the mixture's, processors and gate included. A memory reads each
token once: what it thought while it drafted is its part of the mixture.

**Drawn.** `p = sum(w_i p_i)` is sampled by drawing the component first and reading only that one; the others catch up
in one chunk when they are drawn themselves. Exact for fixed weights and sampling without processors; with them it is
the mixture of components that are each processed, which is another distribution.

Source: speculative sampling, arXiv:2211.17192 and arXiv:2302.01318; drawing a component, arXiv:2605.00419.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as processors_of
from transformers.generation.utils import GenerateDecoderOnlyOutput

from memlm.errors import ConfigError, ModelError
from memlm.memory.protocol import Memory, ParametricMemory
from memlm.mix.cache import MixedCache
from memlm.mix.weights import FixedWeights
from memlm.models.abilities import CACHE

if TYPE_CHECKING:
    from memlm.mix.mixed_lm import MixedLM

MOST_DRAFTED = 16
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


@dataclass
class Pace:
    """How many tokens to draft, from what was accepted and what rounds took so far."""

    fixed: int | None = None
    """Always as many; None: what gives most tokens a second."""
    accepted: float = 0.0
    refused: float = 0.0
    rounds: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Drafted tokens to (seconds, weight), older rounds counting less."""
    plain_left: int = 0
    """Plain steps to take before drafts are tried again."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Of them, in all."""

    _DECAY = 0.9
    _TRIED = (4, 0, 2)
    _PAUSE = 24

    def next(self) -> int:
        """Tokens to draft now."""
        if self.fixed is not None:
            return self.fixed
        if untried := [count for count in self._TRIED if count not in self.rounds]:
            return untried[0]
        if self.plain_left:
            self.plain_left -= 1
            return 0
        best = max(range(MOST_DRAFTED + 1), key=lambda count: self._expected(count) / self._seconds(count))
        if best == 0:
            self.plain_left = self._PAUSE
            return 2  # so that it is seen when drafts begin to pay
        return best

    def saw(self, drafted: int, accepted: int, seconds: float) -> None:
        """Take a round into account."""
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        self.accepted = self._DECAY * self.accepted + accepted
        self.refused = self._DECAY * self.refused + (accepted < drafted)
        before, weight = self.rounds.get(drafted, (0.0, 0.0))
        new = weight * self._DECAY + 1
        self.rounds[drafted] = (before + (seconds - before) / new, new)

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted, of those that were judged."""
        judged = self.accepted + self.refused
        return self.accepted / judged if judged else 0.5

    def _expected(self, count: int) -> float:
        """Tokens that a round with so many drafted ones gives."""
        rate = min(self.acceptance, 0.999)
        return (1 - rate ** (count + 1)) / (1 - rate)

    def _seconds(self, count: int) -> float:
        """What such a round takes: as measured, or on the line through the nearest two that were."""
        if count in self.rounds:
            return max(self.rounds[count][0], 1e-9)
        known = sorted(other for other in self.rounds if other) if count else sorted(self.rounds)
        near = sorted(known, key=lambda other: abs(other - count))[:2]
        if len(near) < 2:
            return self.rounds[near[0]][0] * (count + 1) / (near[0] + 1)
        a, b = near
        slope = max(0.0, (self.rounds[b][0] - self.rounds[a][0]) / (b - a))
        return max(self.rounds[a][0] + slope * (count - a), 1e-9)


def check_drafting(drafting: Any, drawing: bool, warp: str | None) -> None:
    """Raise unless these are values that `MixedLM.generate` takes.

    Raises:
        ConfigError: They are not.
    """
    if isinstance(drafting, Pace):
        drafting = drafting.fixed
    if drafting not in (None, "auto") and (not isinstance(drafting, int) or isinstance(drafting, bool)):
        raise ConfigError(f"drafting = {drafting!r}: give a number of tokens, auto, or None")
    if isinstance(drafting, int) and not 1 <= drafting <= 64:
        raise ConfigError(f"drafting = {drafting}: must be from 1 to 64 tokens")
    if warp not in (None, "components"):
        raise ConfigError(f"warp = {warp!r}: must be components, or None for the mixture's own distribution")
    if drawing and drafting is not None:
        raise ConfigError("drafting and drawing are two ways to decode: ask for one of them")
    if warp is not None and not drawing:
        raise ConfigError("warp is for drawing: without it, processors see the mixture")


def can_draft(mixed: "MixedLM") -> bool:
    """Whether drafting is possible for a single text."""
    return not mixed._is_stateful and drafter(mixed) is not None


def why_plain(
    mixed: "MixedLM", input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> str | None:
    """Why a text can only be decoded step by step; None where drafts can be made."""
    if len(input_ids) > 1:
        return "a batch is decoded step by step so far"
    if not isinstance(_cache_of(model_kwargs), MixedCache):
        return "there is no cache"
    if mixed._is_stateful:
        return f"{type(mixed.base).__name__} cannot take tokens back from its cache"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if drafter(mixed) is None:
        return "no memory drafts: one that reads the base's states cannot run ahead of it"
    known = {CACHE, "past_key_values", "cache", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    known |= {"mix_weight", "evidence_mask", "cache_position"}
    places = model_kwargs.get("position_ids")
    mask = model_kwargs.get("attention_mask")
    length = input_ids.shape[1] if mask is None else int(mask.sum())
    if places is not None and int(places.flatten()[-1]) != length - 1:
        return "positions are given"
    if strange := [name for name, value in model_kwargs.items() if name not in known and value is not None]:
        return f"{strange[0]} is given"
    return None


def drafter(mixed: "MixedLM") -> str | None:
    """The memory that drafts: of those that read tokens alone the one with the largest weight."""
    able = [
        name
        for name, memory in mixed.named_memories().items()
        if memory.tap is None and isinstance(memory, ParametricMemory)
    ]
    return max(able, key=lambda name: mixed.mix_weights.get(name, 0.0), default=None)


def strange_processor(processors: LogitsProcessorList) -> str | None:
    """The name of one that may be more than a function of text and scores."""
    for processor in processors:
        kind = type(processor)
        if not kind.__module__.startswith("transformers.") or kind.__name__.startswith(_WITH_MEMORY):
            return kind.__name__
    return None


@dataclass
class Text:
    """A text under way, and what ends it."""

    ids: Int[Tensor, "1 N"]
    criteria: StoppingCriteriaList
    streamer: Any
    config: GenerationConfig
    scores: list[Tensor] | None
    logits: list[Tensor] | None
    done: bool = False

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        longest = getattr(self.criteria, "max_length", None) or self.config.max_length
        return int(longest) - self.ids.shape[1] if longest else MOST_DRAFTED + 1

    def add(self, token: Tensor, scores: Tensor, logits: Tensor) -> None:
        """Put a token at the end.

        Args:
            token: `(1,)`.
            scores, logits: `(1, V)`, what it was chosen by.
        """
        self.ids = torch.cat([self.ids, token[:, None].to(self.ids.device)], 1)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        self.done = bool(cast(Any, self.criteria)(self.ids, None).all())

    def result(self, cache: MixedCache) -> Any:
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        told = {"scores": self.scores, "logits": self.logits}
        return GenerateDecoderOnlyOutput(
            sequences=cast(Any, self.ids),
            past_key_values=cache if self.config.use_cache else None,
            **cast(Any, {name: None if found is None else tuple(found) for name, found in told.items()}),
        )


def text_of(input_ids: Tensor, criteria: StoppingCriteriaList, config: GenerationConfig, streamer: Any) -> Text:
    """A text to be gone on with, that keeps what the settings ask for."""
    told = config.return_dict_in_generate
    return Text(
        input_ids,
        criteria,
        streamer,
        config,
        [] if told and config.output_scores else None,
        [] if told and config.output_logits else None,
    )


class Processed:
    """Scores after the processors: all places at once where these look at scores alone."""

    def __init__(self, processors: LogitsProcessorList) -> None:
        self._processors = processors
        self.of_scores_alone = all(isinstance(processor, _OF_SCORES_ALONE) for processor in processors)

    def __call__(self, ids: Int[Tensor, "1 N"], drafted: Int[Tensor, "1 K"], scores: Float[Tensor, "P V"]) -> Tensor:
        """`(P, V)`; place i comes after the text and the first i of the drafted tokens."""
        scores = scores.float()
        if not self._processors:
            return scores
        if self.of_scores_alone:
            return self._processors(cast(Any, ids.expand(len(scores), -1)), cast(Any, scores))
        found = []
        for place in range(len(scores)):
            text = torch.cat([ids, drafted[:, :place]], 1)
            found.append(self._processors(cast(Any, text), cast(Any, scores[place : place + 1].clone())))
        return torch.cat(found)


def decode_drafted(
    mixed: "MixedLM",
    input_ids: Int[Tensor, "1 N"],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
    pace: Pace,
    model_kwargs: dict[str, Any],
    judging: "Judge | None" = None,
) -> Any:
    """Go on with a text, the memory drafting; arguments as `_sample` of transformers takes them.

    Args:
        judging: What decides which drafted tokens are accepted; `judge` if None.
    """
    judging = judging or judge
    cache = _cache_of(model_kwargs)
    assert isinstance(cache, MixedCache)
    name, text, processed = drafter(mixed), text_of(input_ids, criteria, config, streamer), Processed(processors)
    assert name is not None
    memory = mixed.named_memories()[name]
    device, sampled = mixed.device, bool(config.do_sample)
    mask: Tensor | None = model_kwargs.get("attention_mask")
    given: dict[str, Any] = {key: model_kwargs.get(key) for key in ("mix_weight", "evidence_mask")}
    while not text.done:
        began = time.perf_counter()
        known = cache.get_seq_length()
        fresh = text.ids[:, known:].to(device)
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, text.ids.shape[1] - mask.shape[1]), value=1)
        count = min(pace.next(), text.room - 1) if known and fresh.shape[1] == 1 else 0
        if count > 0 and (len(cache.unread) or mixed._rule.asleep(cache.rule, known, 0, 1)):
            count = 0
        drafts = (
            _draft(name, memory, cache.of(name, memory), text.ids, fresh, count, processed, sampled) if count else None
        )
        chunk = fresh if drafts is None else torch.cat([fresh, drafts.tokens.to(device)], 1)
        whole_mask = mask
        if mask is not None:
            whole_mask = torch.nn.functional.pad(mask, (0, known + chunk.shape[1] - mask.shape[1]), value=1)
        parts = mixed.components(
            chunk,
            whole_mask,
            None if whole_mask is None else (whole_mask.long().cumsum(1) - 1).clamp(min=0)[:, -chunk.shape[1] :],
            cache,
            logits_to_keep=count + 1,
            read=None if drafts is None else {name: (drafts.state, drafts.votes)},
            use_cache=True,
            **given,
        )
        logits = mixed._mix(parts)[0]
        _check_finite(parts)
        scores = processed(text.ids, chunk[:, 1:] if count else chunk[:, :0], logits)
        accepted, last = judging(scores, drafts, sampled)
        tokens = [last] if drafts is None else [*drafts.tokens[0, :accepted, None], last]
        for place, token in enumerate(tokens):
            text.add(token, scores[place : place + 1], logits[place : place + 1])
            if text.done:
                break
        # what the caches know is all but the last token
        if (surplus := cache.get_seq_length() - (text.ids.shape[1] - 1)) > 0:
            cache.crop(-surplus)
        if known:
            pace.saw(count, accepted, time.perf_counter() - began)
    return text.result(cache)


@dataclass(frozen=True)
class Drafts:
    """What a memory drafted, and what it thought meanwhile."""

    tokens: Int[Tensor, "1 K"]
    probs: Float[Tensor, "K V"] | None
    """What they were drawn from; None where they are the likeliest."""
    state: Tensor
    """Of the token before them and of each of them, as one step over all would give it."""
    votes: Float[Tensor, "1 K+1 V"]


def _draft(
    name: str,
    memory: Memory,
    cache: Any,
    ids: Int[Tensor, "1 N"],
    fresh: Int[Tensor, "1 1"],
    count: int,
    processed: Processed,
    sampled: bool,
) -> Drafts:
    """Let a memory go on by itself for `count` tokens; it reads the last of them too."""
    token, tokens = fresh, ids[:, :0]
    states: list[Tensor] = []
    votes: list[Tensor] = []
    probs: list[Tensor] = []
    for place in range(count + 1):
        states.append(memory.step(token, None, cache=cache))
        votes.append(cast(Tensor, memory.votes(states[-1], slice(None))))
        if bool(votes[-1][0, 0, 0].isnan()):
            raise ModelError(f"memory {name!r} gives no finite scores")
        if place == count:
            break
        scores = processed(torch.cat([ids, tokens.to(ids.device)], 1), tokens[:, :0], votes[-1][0])
        if sampled:
            probs.append(scores.softmax(-1))
            token = torch.multinomial(probs[-1], 1)
        else:
            token = scores.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens.to(token.device), token], 1)
    return Drafts(tokens, torch.cat(probs) if probs else None, torch.cat(states, 1), torch.cat(votes, 1))


Judge = Callable[[Tensor, "Drafts | None", bool], tuple[int, Tensor]]
"""As `judge`."""


def judge(scores: Float[Tensor, "K+1 V"], drafts: Drafts | None, sampled: bool) -> tuple[int, Int[Tensor, "1"]]:
    """How many drafted tokens are accepted, and the token that comes after them."""
    if not sampled:
        likeliest = scores.argmax(-1)
        if drafts is None:
            return 0, likeliest
        agrees = (likeliest[:-1] == drafts.tokens[0].to(likeliest.device)).long().cumprod(0)
        accepted = int(agrees.sum())
        return accepted, likeliest[accepted : accepted + 1]
    probs = scores.softmax(-1)
    if drafts is None:
        return 0, torch.multinomial(probs, 1)[0]
    assert drafts.probs is not None
    drafted, of_memory = drafts.tokens.to(probs.device).T, drafts.probs.to(probs.device)
    ratio = (probs[:-1].gather(1, drafted) / of_memory.gather(1, drafted))[:, 0]
    accepted = int((torch.rand_like(ratio) < ratio).long().cumprod(0).sum())
    left = probs[accepted]
    if accepted < len(ratio):
        above = (left - of_memory[accepted]).clamp(min=0)
        left = above if float(above.sum()) > 0 else left  # they are equal but for rounding
    return accepted, torch.multinomial(left, 1)


def decode_drawn(
    mixed: "MixedLM",
    input_ids: Int[Tensor, "1 N"],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Any:
    """Sample a text, at each token only from the component that is drawn; arguments as `_sample` takes them."""
    cache = _cache_of(model_kwargs)
    assert isinstance(cache, MixedCache)
    text, processed = text_of(input_ids, criteria, config, streamer), Processed(processors)
    memories = mixed.named_memories()
    names = ["", *memories]
    weights = torch.tensor([1 - sum(mixed.mix_weights.values()), *mixed.mix_weights.values()]).clamp(min=0).double()
    read = dict.fromkeys(names, cache.get_seq_length())
    mask: Tensor | None = model_kwargs.get("attention_mask")

    def catch_up(name: str, length: int) -> Any:
        """What a component makes of the tokens up to `length` that it has not read."""
        fresh, padding = text.ids[:, read[name] : length].to(mixed.device), None
        if mask is not None:
            padding = torch.nn.functional.pad(mask, (0, max(0, length - mask.shape[1])), value=1)[:, :length]
        read[name] = length
        if name:
            return memories[name].step(fresh, None, attention_mask=padding, cache=cache.of(name, memories[name]))
        places = None if padding is None else (padding.long().cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        return mixed._voter.step(
            fresh, attention_mask=padding, cache=cache.of_base, position_ids=places, use_cache=True
        )

    while not text.done:
        name = names[int(torch.multinomial(weights, 1))]
        voter: Any = memories[name] if name else mixed._voter
        votes = voter.votes(catch_up(name, text.ids.shape[1]), slice(-1, None))[0]
        if not bool(votes.isfinite().any()):
            raise ModelError(f"{f'memory {name!r}' if name else 'the base'} gives no finite scores")
        scores = processed(text.ids, text.ids[:, :0], votes)
        text.add(torch.multinomial(scores.softmax(-1), 1)[0], scores, votes)
    for name in names:  # so that the cache is one of all tokens but the last, as after any other decoding
        if read[name] < text.ids.shape[1] - 1:
            catch_up(name, text.ids.shape[1] - 1)
    surplus = {name: read[name] - (text.ids.shape[1] - 1) for name in names}
    for name, count in surplus.items():
        if count > 0:
            (cache.of(name, memories[name]) if name else cache.of_base).crop(count)
    return text.result(cache)


def why_not_drawn(
    mixed: "MixedLM", processors: LogitsProcessorList, config: GenerationConfig, warp: str | None, plain: str | None
) -> str | None:
    """Why components cannot be drawn for this text; None where they can."""
    if plain is not None:
        return plain
    if not config.do_sample:
        return "drawing samples: pass do_sample=True, or decode with drafting"
    if config.output_scores or config.output_logits:
        return "the mixture's scores are not known where only one component is read: leave them out"
    if not isinstance(mixed._rule, FixedWeights):
        return "a gate has to hear all components: fix the weights (gate='none' or mix_weight)"
    if any(
        memory.tap is not None or not isinstance(memory, ParametricMemory) for memory in mixed.named_memories().values()
    ):
        return "a memory reads the base's states, so nothing is saved"
    if len(processors) and warp is None:
        return (
            f"{type(processors[0]).__name__} would act on each component instead of the mixture: sample at temperature"
            " 1 without top-k and top-p, or accept that with warp='components'"
        )
    return None


def warn_plain(why: str) -> None:
    """Say once why a text is decoded step by step."""
    warnings.warn(f"decoded step by step: {why}", stacklevel=4)


def _check_finite(parts: Any) -> None:
    if bool(parts.normaliser.isnan().any()):
        raise ModelError("the base gives no finite scores")
    for name, votes in parts.votes.items():
        if isinstance(votes, Tensor) and bool(votes[..., 0].isnan().any()):
            raise ModelError(f"memory {name!r} gives no finite scores")


def _cache_of(model_kwargs: dict[str, Any]) -> Any:
    return next((model_kwargs[n] for n in (CACHE, "past_key_values", "cache") if model_kwargs.get(n) is not None), None)
