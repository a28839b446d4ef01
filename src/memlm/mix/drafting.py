"""Decoding a mixture faster than both models one after another, and exactly, by drafts.

Some tokens are drafted, by a memory that runs ahead of the base or by a lookup (`drafts.py`); the base reads them in
one pass, and each is accepted with probability `min(1, p(d) / q(d))`, where p is the mixture and q what the token was
drafted from; at the first that is not, the next token comes from what p has above q. So all tokens are the mixture's,
processors and gate included. A memory that drafts reads each token once: what it thought meanwhile is its part of the
mixture.

Texts of a batch are accepted each for itself. What each has of its draft in vain is taken back from the caches, whose
rows are moved so that all end together: what is left before a text is padding, as on the left of a short prompt.

Source: speculative sampling, arXiv:2211.17192 and arXiv:2302.01318.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from memlm.errors import ConfigError
from memlm.mix.cache import MixedCache
from memlm.mix.decoding import (
    CACHE_NAMES,
    Call,
    Processed,
    Text,
    checked_cache,
    mask_for,
    positions,
    result,
    strange_criterion,
)
from memlm.mix.drafts import Drafts, drafter_of
from memlm.mix.gate_config import LONGEST_DRAFT
from memlm.mix.members import Mixture
from memlm.mix.pace import Pace
from memlm.models.heads import likeliest
from memlm.models.loading import longest_context


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


def can_draft(mixed: Mixture) -> bool:
    """Whether drafting is possible for a single text."""
    return not mixed._is_stateful


def drafts_itself(mixed: Mixture) -> bool:
    """Whether a memory can run ahead of the base; where none can, drafts are looked up."""
    return any(memory.can_draft for memory in mixed.named_memories().values())


def why_plain(mixed: Mixture, call: Call) -> str | None:
    """Why texts can only be decoded step by step; None where drafts can be made."""
    base, cache, given = type(mixed.base).__name__, call.cache, call.options
    if not isinstance(cache, MixedCache):
        return "there is no cache"
    if mixed._is_stateful or not all(map(_crops, cache.layers)):
        return f"{base} cannot take tokens back from its cache"
    if call.config.output_attentions or call.config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if len(call.ids) > 1 and (why := _why_one_text(mixed, call, cache)):
        return f"a batch, and {why}"
    known = {*CACHE_NAMES, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    known |= {"mix_weight", "evidence_mask", "cache_position", "tokenizer"}
    places, mask = given.get("position_ids"), given.get("attention_mask")
    lengths = torch.tensor(call.ids.shape[1]) if mask is None else mask.sum(1)
    if mask is not None and not bool(mask[:, -1].all()):
        return "there is padding on the right"
    if places is not None and bool((places[:, -1].to(lengths.device) != lengths - 1).any()):
        return "positions are given"
    if strange := [name for name, value in given.items() if name not in known and value is not None]:
        return f"{strange[0]} is given"
    return None


def _crops(layer: Any) -> bool:
    """Whether tokens can be taken back; a static layer with a window knows that from the start."""
    return hasattr(layer, "crop") and (not isinstance(layer, StaticLayer) or layer.is_croppable)


def _why_one_text(mixed: Mixture, call: Call, cache: MixedCache) -> str | None:
    """Why drafts can be made for one text at a time only; None where they can be for a batch."""
    base, heard = type(mixed.base).__name__, call.options.get("evidence_mask")
    if not mixed._voter.abilities.padding:
        return f"{base} reads padding as text"
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return f"the cache of {base} keeps a window or another form of its past"
    if not cache.takes_back_rows:
        return "what a part keeps of texts cannot be moved row by row"
    if mixed.gate.sleep and mixed.gate.gate != "none":
        return "its memories sleep"
    if call.streamer is not None:
        return "a streamer hears all texts at once"
    if strange := strange_criterion(call.criteria):
        return f"{strange} may look at all texts at once"
    if heard is not None and heard.shape[1] > call.ids.shape[1]:
        return "the evidence mask is longer than the prompts"
    if (turn := _turn(mixed)) is not None and (call.config.max_length or turn + 1) > turn:
        return f"{base} reads all texts otherwise once one has {turn} tokens"
    return None


def _turn(mixed: Mixture) -> int | None:
    """The length from which on the base reads all of a text otherwise, as with LongRoPE; None: none."""
    config = mixed.base.config.get_text_config(decoder=True)
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return None
    found = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return None if found is None else int(found)


def _most(mixed: Mixture, texts: list[Text]) -> int:
    """Tokens that may be drafted for all texts at most."""
    longest = max(map(len, texts))
    most, context, turn = max(text.room for text in texts) - 1, longest_context(mixed.base.config), _turn(mixed)
    if context is not None and len(texts) > 1:  # texts that wait or run ahead are read as far as the others
        most = min(most, context - longest)
    if turn is not None and longest <= turn:  # what is read at once is read in one way
        most = min(most, turn - longest)
    return most


def decode_drafted(mixed: Mixture, call: Call, pace: Pace, judging: "Judge | None" = None) -> Any:
    """Go on with texts by drafts.

    Args:
        pace: How many are drafted at a time.
        judging: What decides which drafted tokens are accepted; `judge` if None.
    """
    judging, cache, texts = judging or judge, checked_cache(mixed, call), call.texts
    processed, sampled = Processed(call.processors, len(texts)), bool(call.config.do_sample)
    drafter = drafter_of(mixed, processed, sampled=sampled)
    pace.share = drafter.share
    mask: Tensor | None = call.options.get("attention_mask")
    if mask is None and len(texts) > 1:
        mask = torch.ones_like(call.ids)
    mask, padded = (None, False) if mask is None else (mask.to(mixed.device), not bool(mask.all()))
    before = [0] * len(texts)  # columns of the cache that hold nothing of a text; they come first
    given: dict[str, Any] = {key: call.options.get(key) for key in ("mix_weight", "evidence_mask")}

    def read(tokens: Int[Tensor, "B T"], drafts: Drafts | None = None) -> Any:
        whole = mask_for(mask, cache.get_seq_length() + tokens.shape[1], before) if padded or any(before) else None
        return mixed.components(
            tokens,
            whole,
            positions(whole, tokens),
            cache,
            logits_to_keep=1 if drafts is None else tokens.shape[1],
            read=None if drafts is None else drafts.read,
            use_cache=True,
            **given,
        )

    def keep(lengths: list[int]) -> None:
        """Leave so many tokens of each text in the cache, all of which end together."""
        held, longest = cache.get_seq_length(), max(lengths)
        cache.take_back([held - b - length for b, length in zip(before, lengths, strict=True)], held - longest)
        before[:] = [longest - length for length in lengths]

    prompt_is_read = False
    try:
        for part in call.chunks(cache.get_seq_length()):
            read(part.to(mixed.device))
        while not all(text.done for text in texts):
            began, known = time.perf_counter(), cache.get_seq_length()
            live, ids = [not text.done for text in texts], [text.ids for text in texts]
            fresh = torch.cat([row[:, -1:] for row in ids]) if prompt_is_read else call.ids[:, known:]
            fresh = fresh.to(mixed.device)
            count = min(pace.next(), _most(mixed, texts)) if prompt_is_read else 0
            if count > 0 and (len(cache.unread) or mixed._rule.asleep(cache.rule, known, 0, 1)):
                count = 0
            drafts = drafter.draft(ids, fresh, cache, count) if count > 0 else None
            chunk = fresh if drafts is None else torch.cat([fresh, drafts.tokens.to(fresh.device)], 1)
            try:
                parts = read(chunk, drafts)
            except BaseException:
                for name in drafts.read if drafts is not None and cache.get_seq_length() == known else ():
                    cache.of(name, mixed.named_memories()[name]).crop(chunk.shape[1])
                raise
            try:
                parts.check_finite()
                logits = parts.mixed()
                tokens = chunk[:, :0] if drafts is None else drafts.tokens
                scores = processed(ids, tokens, logits, spent=texts[0].logits is None)
                accepted, last = judging(scores, drafts, sampled)
                _write(texts, drafts, accepted, last, scores, logits)
            finally:  # what the caches know is all but the last token, also where a streamer or a criterion raised
                keep([len(text) - 1 for text in texts])
            drafter.saw(parts.states, [0 if drafts is None else place for place in accepted], logits.shape[1])
            if prompt_is_read:
                lengths = [0] * len(texts) if drafts is None else drafts.lengths
                judged = [pair for pair, alive in zip(zip(lengths, accepted, strict=True), live, strict=True) if alive]
                likely = None
                if drafts is None and pace.asks and judging is judge:
                    likely = drafter.agreement(ids, parts.votes, scores[:, -1])
                    likely = None if likely is None else float(likely[torch.tensor(live)].mean())
                pace.saw(chunk.shape[1] - 1, judged if drafts is not None else [], time.perf_counter() - began, likely)
            else:
                cache.activate_past_recording()  # from here on sliding layers are to keep what may be taken back
                prompt_is_read = True
    except BaseException:
        if len(texts) > 1:  # nobody knows how far each text came
            cache.empty()
        raise
    if any(before):  # as plain steps leave it: the end token of a shorter text is read, and what is missing is behind
        read(torch.cat([text.ids[:, -1:] for text in texts]).to(mixed.device))
        cache.take_back([1 - b for b in before], 1)
    return result(texts, cache)


def _write(
    texts: list[Text], drafts: Drafts | None, accepted: list[int], last: Tensor, scores: Tensor, logits: Tensor
) -> None:
    """Put what was accepted at the end of each text, and the token that comes after it."""
    if drafts is None and len(texts) > 1 and not any(text.done for text in texts) and len(set(map(len, texts))) == 1:
        return Text.add_to_all(texts, last, scores[:, 0], logits[:, 0])
    for row, text in enumerate(texts):
        drafted = () if drafts is None else drafts.tokens[row, : accepted[row], None]
        for place, token in enumerate((*drafted, last[row : row + 1])):
            if text.done:
                break
            text.add(token, scores[row, place, None], logits[row, place, None])


Judge = Callable[[Tensor, "Drafts | None", bool], tuple[list[int], Tensor]]
"""As `judge`."""


def judge(scores: Float[Tensor, "B P V"], drafts: Drafts | None, sampled: bool) -> tuple[list[int], Int[Tensor, "B"]]:
    """How many drafted tokens of each text are accepted, and the token that comes after them.

    Args:
        scores: The mixture's after the processors, of the token that comes after the text and after each drafted one.
        drafts: None where there are none; `scores` then has one place.
        sampled: Whether tokens are drawn; else each is the likeliest.
    """
    rows = torch.arange(len(scores), device=scores.device)
    if drafts is None:
        last = torch.multinomial(scores[:, 0].softmax(-1), 1)[:, 0] if sampled else likeliest(scores[:, 0])
        return [0] * len(scores), last
    drafted, lengths = drafts.tokens.to(scores.device), torch.tensor(drafts.lengths, device=scores.device)
    there = torch.arange(drafted.shape[1], device=scores.device) < lengths[:, None]
    if not sampled:
        chosen = likeliest(scores)
        accepted = ((chosen[:, :-1] == drafted) & there).long().cumprod(1).sum(1)
        return accepted.tolist(), chosen[rows, accepted]
    probs, of_drafter = scores.softmax(-1), drafts.probs
    chance = probs[:, :-1].gather(2, drafted[..., None])[..., 0]
    if of_drafter is not None:
        chance = chance / of_drafter.to(probs.device).gather(2, drafted[..., None])[..., 0]
    accepted = ((torch.rand_like(chance) < chance) & there).long().cumprod(1).sum(1)
    left, refused = probs[rows, accepted], accepted.clamp(max=drafted.shape[1] - 1)
    above = left.clone()
    if of_drafter is not None:
        above -= of_drafter.to(probs.device)[rows, refused]
    else:
        above[rows, drafted[rows, refused]] = 0
    above = above.clamp(min=0)
    some = (accepted < lengths) & (above.sum(-1) > 0)  # none: p and q are equal but for rounding
    return accepted.tolist(), torch.multinomial(torch.where(some[:, None], above, left), 1)[:, 0]


def warn_plain(why: str) -> None:
    """Say once why texts are decoded step by step."""
    warnings.warn(f"decoded step by step: {why}", stacklevel=5)
