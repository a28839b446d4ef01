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
from memlm.memory.protocol import Memory
from memlm.mix.cache import MixedCache
from memlm.mix.gate_config import LONGEST_DRAFT
from memlm.mix.sleep import Unread
from memlm.mix.weights import FixedWeights, settle_weights
from memlm.models.abilities import CACHE

if TYPE_CHECKING:
    from memlm.mix.mixed_lm import MixedLM

MOST_DRAFTED = 16
_CACHE_NAMES = (CACHE, "past_key_values", "cache")
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

    since: int = 0
    """Rounds that were chosen by what is known."""

    _DECAY = 0.9
    _TRIED = (4, 0, 2)
    _PAUSE = 24

    def next(self) -> int:
        """Tokens to draft now."""
        if self.fixed is not None:
            return self.fixed
        if untried := [count for count in self._TRIED if self.rounds.get(count, (0.0, 0.0))[1] < 1.5]:
            return untried[0]  # twice each, for the first of its kind is slow
        if self.plain_left:
            self.plain_left -= 1
            return 0
        self.since += 1
        if self.since % self._PAUSE == 0:  # what another length takes by now
            return self._TRIED[self.since // self._PAUSE % len(self._TRIED)]
        most = min(MOST_DRAFTED, 2 * max(self.rounds))
        best = max(range(most + 1), key=lambda count: self._expected(count) / self._seconds(count))
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
        before, weight = self.rounds.get(drafted, (seconds, 0.0))
        new = weight * self._DECAY + 1
        mean = before + (seconds - before) / new
        self.rounds[drafted] = (min(before, seconds) if 1 <= weight < 1.5 else mean, new)

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
    if isinstance(drafting, int) and not 1 <= drafting <= LONGEST_DRAFT:
        raise ConfigError(f"drafting = {drafting}: must be from 1 to {LONGEST_DRAFT} tokens")
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
    cache = _cache_of(model_kwargs)
    if not isinstance(cache, MixedCache):
        return "there is no cache"
    if mixed._is_stateful or not all(hasattr(layer, "crop") for layer in cache.layers):
        return f"{type(mixed.base).__name__} cannot take tokens back from its cache"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if drafter(mixed) is None:
        return "no memory drafts: only one that reads tokens can run ahead of the base"
    known = {*_CACHE_NAMES, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    known |= {"mix_weight", "evidence_mask", "cache_position", "tokenizer"}
    places = model_kwargs.get("position_ids")
    mask = model_kwargs.get("attention_mask")
    length = input_ids.shape[1] if mask is None else int(mask.sum())
    if places is not None and int(places.flatten()[-1]) != length - 1:
        return "positions are given"
    if strange := [name for name, value in model_kwargs.items() if name not in known and value is not None]:
        return f"{strange[0]} is given"
    return None


def drafter(mixed: "MixedLM") -> str | None:
    """The memory that drafts: of those that can the one with the largest weight."""
    able = [name for name, memory in mixed.named_memories().items() if memory.can_draft]
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
            self.scores.append(scores.clone())  # of many that were made together
        if self.logits is not None:
            self.logits.append(logits.clone())
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        told = None if self.scores is None else tuple(self.scores)
        self.done = bool(cast(Any, self.criteria)(self.ids, told).all())

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
    judging, cache = judging or judge, _checked_cache(mixed, input_ids, model_kwargs)
    name, text, processed = drafter(mixed), text_of(input_ids, criteria, config, streamer), Processed(processors)
    assert name is not None
    memory, sampled = mixed.named_memories()[name], bool(config.do_sample)
    mask: Tensor | None = model_kwargs.get("attention_mask")
    mask = None if mask is None else mask.to(mixed.device)
    given: dict[str, Any] = {key: model_kwargs.get(key) for key in ("mix_weight", "evidence_mask")}

    def read(tokens: Tensor, drafts: "Drafts | None" = None) -> Any:
        whole = _mask_for(mask, cache.get_seq_length() + tokens.shape[1])
        return mixed.components(
            tokens,
            whole,
            _positions(whole, tokens),
            cache,
            logits_to_keep=1 if drafts is None else tokens.shape[1],
            read=None if drafts is None else {name: (drafts.state, drafts.votes)},
            use_cache=True,
            **given,
        )

    for part in _first_chunks(text.ids[:, cache.get_seq_length() :], config):
        read(part.to(mixed.device))
    prompt_is_read = False
    while not text.done:
        began, known = time.perf_counter(), cache.get_seq_length()
        fresh = text.ids[:, known:].to(mixed.device)
        count = min(pace.next(), text.room - 1) if prompt_is_read else 0
        if count > 0 and (len(cache.unread) or mixed._rule.asleep(cache.rule, known, 0, 1)):
            count = 0
        own = cache.of(name, memory)
        drafts = _draft(name, memory, own, text.ids, fresh, count, processed, sampled) if count > 0 else None
        chunk = fresh if drafts is None else torch.cat([fresh, drafts.tokens.to(fresh.device)], 1)
        try:
            parts = read(chunk, drafts)
        except BaseException:
            if drafts is not None and cache.get_seq_length() == known:
                own.crop(chunk.shape[1])
            raise
        try:
            _check_finite(parts)
            logits = mixed._mix(parts)[0]
            scores = processed(text.ids, chunk[:, 1:] if drafts is not None else chunk[:, :0], logits)
            accepted, last = judging(scores, drafts, sampled)
            for place, token in enumerate([*(drafts.tokens[0, :accepted, None] if drafts is not None else ()), last]):
                text.add(token, scores[place : place + 1], logits[place : place + 1])
                if text.done:
                    break
        finally:  # what the caches know is all but the last token, also where a streamer or a criterion raised
            if (surplus := cache.get_seq_length() - max(known, text.ids.shape[1] - 1)) > 0:
                cache.crop(-surplus)
        if prompt_is_read:
            pace.saw(count, accepted, time.perf_counter() - began)
        else:
            cache.activate_past_recording()  # from here on sliding layers are to keep what may be taken back
            prompt_is_read = True
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
    try:
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
    except BaseException:
        if states:
            cache.crop(len(states))
        raise
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
    cache = _checked_cache(mixed, input_ids, model_kwargs)
    text, processed = text_of(input_ids, criteria, config, streamer), Processed(processors)
    memories, weights = mixed.named_memories(), _fixed_weights(mixed, model_kwargs)
    assert weights is not None
    names, chances = ["", *memories], torch.tensor([max(0.0, 1 - sum(weights)), *weights]).double()
    known = cache.get_seq_length()
    read = {name: known - len(cache.unread) if name else known for name in names}
    cache.unread = Unread()  # what the memories have not read is read from the text
    mask: Tensor | None = model_kwargs.get("attention_mask")
    mask = None if mask is None else mask.to(mixed.device)

    def catch_up(name: str, length: int) -> Any:
        """What a component makes of the tokens up to `length` that it has not read."""
        fresh = text.ids[:, read[name] : length].to(mixed.device)
        whole = _mask_for(mask, length)
        own: Any = cache.of(name, memories[name]) if name else cache.of_base
        if name:
            state = memories[name].step(fresh, None, attention_mask=whole, cache=own)
        else:
            given: dict[str, Any] = {"position_ids": _positions(whole, fresh), "use_cache": True}
            state = mixed._voter.step(fresh, attention_mask=whole, cache=own, **given)
        read[name] = length
        return state

    try:
        while not text.done:
            name = names[int(torch.multinomial(chances, 1))]
            voter: Any = memories[name] if name else mixed._voter
            votes = voter.votes(catch_up(name, text.ids.shape[1]), slice(-1, None))[0]
            if bool(votes[..., 0].isnan().any()):
                raise ModelError(f"{f'memory {name!r}' if name else 'the base'} gives no finite scores")
            scores = processed(text.ids, text.ids[:, :0], votes)
            text.add(torch.multinomial(scores.softmax(-1), 1)[0], scores, votes)
    except BaseException:
        for name in names:  # back to what all have read
            own: Any = cache.of(name, memories[name]) if name else cache.of_base
            if (ahead := read[name] - min(read.values())) > 0:
                own.crop(ahead)
        raise
    for name in names:  # so that the cache is one of all tokens but the last, as after any other decoding
        if read[name] < text.ids.shape[1] - 1:
            catch_up(name, text.ids.shape[1] - 1)
    return text.result(cache)


def _checked_cache(mixed: "MixedLM", input_ids: Tensor, model_kwargs: dict[str, Any]) -> MixedCache:
    """The cache of a text that is to be gone on with.

    Raises:
        ConfigError: Base or cache cannot go on with it.
    """
    cache = _cache_of(model_kwargs)
    assert isinstance(cache, MixedCache)
    known = cache.get_seq_length()
    if known >= input_ids.shape[1]:
        raise ConfigError("the cache holds the whole prompt, and its last token must be read: crop the cache by one")
    mixed._check_ability(input_ids[:, known:], model_kwargs.get("attention_mask"), cache)
    return cache


def _first_chunks(fresh: Int[Tensor, "1 N"], config: GenerationConfig) -> list[Int[Tensor, "1 C"]]:
    """What of a prompt is read before its last chunk, where it is to be read in chunks."""
    size = getattr(config, "prefill_chunk_size", None)
    return list(fresh.split(size, 1))[:-1] if size else []


def _mask_for(mask: Int[Tensor, "1 N"] | None, length: int) -> Int[Tensor, "1 N2"] | None:
    """The mask of a text of so many tokens, of which those beyond the prompt are no padding."""
    if mask is None:
        return None
    return torch.nn.functional.pad(mask, (0, max(0, length - mask.shape[1])), value=1)[:, :length]


def _positions(mask: Int[Tensor, "1 N"] | None, fresh: Int[Tensor, "1 T"]) -> Int[Tensor, "1 T"] | None:
    """Positions of the latest tokens of a text with padding; None: the model counts."""
    return None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]


def _fixed_weights(mixed: "MixedLM", model_kwargs: dict[str, Any]) -> list[float] | None:
    """Each memory's weight at every token of a text; None where a gate weighs them.

    Raises:
        ConfigError: A weight of this call is out of range.
    """
    asked = model_kwargs.get("mix_weight")
    if asked is None and not isinstance(mixed._rule, FixedWeights):
        return None
    weights = settle_weights(mixed._weights, asked, per_row=True)
    return [float(torch.as_tensor(weight).flatten()[0]) for weight in weights.values()]


def why_not_drawn(
    mixed: "MixedLM",
    processors: LogitsProcessorList,
    config: GenerationConfig,
    warp: str | None,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Why components cannot be drawn for this text, other than `why_plain`; None where they can."""
    if not config.do_sample:
        return "drawing samples: pass do_sample=True, or decode with drafting"
    if config.output_scores or config.output_logits:
        return "the mixture's scores are not known where only one component is read: leave them out"
    if _fixed_weights(mixed, model_kwargs) is None:
        return "a gate has to hear all components: fix the weights (gate='none' or mix_weight)"
    if not all(memory.can_draft for memory in mixed.named_memories().values()):
        return "a memory reads the base's states, so nothing is saved"
    if len(processors) and warp is None:
        return (
            f"{type(processors[0]).__name__} would act on each component instead of the mixture: sample at temperature"
            " 1 without top-k and top-p, or accept that with warp='components'"
        )
    return None


def warn_plain(why: str) -> None:
    """Say once why a text is decoded step by step."""
    warnings.warn(f"decoded step by step: {why}", stacklevel=5)


def _check_finite(parts: Any) -> None:
    if bool(parts.normaliser.isnan().any()):
        raise ModelError("the base gives no finite scores")
    for name, votes in parts.votes.items():
        if isinstance(votes, Tensor) and bool(votes[..., 0].isnan().any()):
            raise ModelError(f"memory {name!r} gives no finite scores")


def _cache_of(model_kwargs: dict[str, Any]) -> Any:
    return next((model_kwargs[name] for name in _CACHE_NAMES if model_kwargs.get(name) is not None), None)
