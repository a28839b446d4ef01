"""What base and memories say of the next token at the same places, and whether all of it is finite."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memlm.corpus.blocks import IGNORE
from memlm.errors import ModelError
from memlm.memory.protocol import Memory
from memlm.memory.voter import Votes
from memlm.mix.base import BaseState, BaseVoter
from memlm.mix.cache import MixedCache
from memlm.mix.gate import places_of
from memlm.mix.mixture import mix_log_probs
from memlm.mix.sleep import Unread
from memlm.mix.weights import Step, Weight, WeightRule


@dataclass(frozen=True)
class Components:
    """What base and memories say of the next token at the same places."""

    base: BaseState
    """What the base made of the tokens."""
    logits: Float[Tensor, "B T V"]
    """The base's in float32, over the shared vocabulary."""
    normaliser: Float[Tensor, "B T 1"]
    """Their logsumexp."""
    votes: dict[str, Votes]
    """Per memory; none where all sleep."""
    weights: list[Weight]
    """Per memory, as the rule weighs them here."""
    states: dict[str, Any]
    """Per memory, what it made of the tokens, and of those before that it had not read; none where all sleep."""

    def mixed(self) -> Float[Tensor, "B T V"]:
        """The mixture's logits: its log-probs, moved by the base's normaliser; the base's own at weight 0."""
        if not any(isinstance(weight, Tensor) or weight for weight in self.weights):
            return self.logits
        mixed = mix_log_probs(self.logits, list(self.votes.values()), self.weights, self.normaliser)
        total = sum(self.weights)
        return torch.where(total[..., None] == 0, self.logits, mixed) if isinstance(total, Tensor) else mixed

    def check_finite(self) -> None:
        """Raise unless base and memories gave finite scores, as far as their first tells.

        Raises:
            ModelError: One did not; it is named.
        """
        if not bool(self.normaliser.isfinite().all()):
            raise not_finite()
        for name, votes in self.votes.items():
            if isinstance(votes, Tensor) and bool(votes[..., 0].isnan().any()):
                raise not_finite(name)


def read_components(
    base: BaseVoter,
    memories: Mapping[str, Memory],
    rule: WeightRule,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: MixedCache | None,
    logits_to_keep: int | Tensor,
    *,
    evidence_mask: Tensor | None,
    taps: Iterable[str],
    read: Mapping[str, tuple[Any, Votes]],
    **inputs: Any,
) -> Components:
    """Let the base read new tokens, then the memories unless they sleep, then the rule weigh what they say.

    Args as `MixedLM.components`; `inputs` go to the base.
    """
    length, past = input_ids.shape[1], cache.get_seq_length() if cache is not None else 0
    caches = {name: cache.of(name, memory) if cache is not None else None for name, memory in memories.items()}
    heard = {memory.tap for memory in memories.values() if memory.tap is not None}
    state = base.step(
        input_ids,
        attention_mask=attention_mask,
        cache=cache.of_base if cache is not None else None,
        position_ids=position_ids,
        taps={*taps, *heard},
        **inputs,
    )
    keep = _kept(logits_to_keep)
    logits = base.logits(state, keep)
    normaliser = torch.logsumexp(logits, -1, keepdim=True)

    tokens, asked, missed = input_ids, rule.places(keep, length), Unread()
    if cache is not None:
        if rule.asleep(cache.rule, past, len(cache.unread), length):
            cache.unread.add(input_ids, state.hidden, {tap: state.activations[tap] for tap in heard})
            return Components(state, logits, normaliser, {}, [0.0] * len(memories), {})
        missed, cache.unread = cache.unread, missed
    unread = len(missed)
    if unread:  # the memories wake, and read what they missed
        tokens = missed.before(input_ids)
        keep, asked = places_of(keep, length) + unread, slice(None)

    votes, states = {}, {}
    for name, memory in memories.items():
        if name in read:
            states[name], known = read[name]
        else:
            activations = state.activations[memory.tap] if memory.tap is not None else None
            if unread and memory.tap is not None and activations is not None:
                activations = missed.before_activations(memory.tap, activations)
            hint = {"keep": asked} if "keep" in inspect.signature(memory.step).parameters else {}
            states[name] = memory.step(tokens, activations, attention_mask=attention_mask, cache=caches[name], **hint)
            known = memory.votes(states[name], keep)
        votes[name] = known.to(logits.device)

    def columns(began: int, end: int) -> list[dict[str, Tensor]]:
        labels = torch.full_like(tokens, IGNORE)
        labels[:, began:end] = tokens[:, began + 1 : end + 1]
        whole = replace(state, hidden=missed.before_hidden(state.hidden)) if unread else state
        found = [base.columns(whole, labels.to(base.device))]
        found += [memory.columns(states[name], labels.to(memory.device)) for name, memory in memories.items()]
        shape = len(tokens), end - began
        return [{name: values.view(shape).to(logits.device) for name, values in part.items()} for part in found]

    step = Step(
        tokens=tokens.to(logits.device),
        past=past - unread,
        keep=keep,
        base=logits,
        normaliser=normaliser,
        memories=votes,
        real=None if attention_mask is None else attention_mask[:, -tokens.shape[1] :].bool().to(logits.device),
        evidence=_evidence(evidence_mask, past - unread, tokens.to(logits.device)),
        confidence=lambda name: memories[name].confidence(states[name], keep).to(logits.device),
        unread=unread,
        columns=columns,
    )
    weights = rule.weights(step, cache.rule if cache is not None else None)
    return Components(state, logits, normaliser, votes, weights, states)


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-logits_to_keep, None) if logits_to_keep else slice(None)


def _evidence(mask: Tensor | None, past: int, tokens: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"] | None:
    """A mask of a text at these tokens, that come after `past` others; True beyond its end."""
    if mask is None or mask.shape[1] <= past:
        return None
    here = mask[:, past : past + tokens.shape[1]].bool()
    return nn.functional.pad(here, (0, tokens.shape[1] - here.shape[1]), value=True).to(tokens.device)


class Watch:
    """Whether base and memories give finite scores in all steps of a call of `generate`.

    On a CPU the step raises. An accelerator is not waited for: sums are kept there, which are not finite where one of
    their parts was not, and read once at the end.
    """

    def __init__(self, deferred: bool) -> None:
        """
        Args:
            deferred: Whether to raise at the end only.
        """
        self._deferred = deferred
        self._base: Tensor | None = None
        self._memories: dict[str, Tensor] = {}

    def saw(self, parts: Components, logits: Tensor) -> Tensor:
        """The mixture's logits of a step, without NaN, which an accelerator that samples would die of.

        Raises:
            ModelError: As `Components.check_finite`, where that is not deferred.
        """
        if not self._deferred:
            parts.check_finite()
            return logits
        said = parts.normaliser.sum()
        self._base = said if self._base is None else self._base + said
        for name, votes in parts.votes.items():
            if isinstance(votes, Tensor):
                said = votes[..., 0].sum()  # minus infinity is a log-prob
                self._memories[name] = self._memories[name] + said if name in self._memories else said
        return torch.nan_to_num(logits, nan=0.0, posinf=0.0, neginf=-torch.inf)

    def end(self) -> None:
        """Raise unless all that was seen is finite.

        Raises:
            ModelError: It is not; who gave it is named.
        """
        if self._base is not None and not bool(self._base.isfinite()):
            raise not_finite()
        for name, said in self._memories.items():
            if bool(said.isnan()):
                raise not_finite(name)


def not_finite(memory: str | None = None) -> ModelError:
    """What to raise where a memory, or else the base, gives NaN."""
    return ModelError(f"{'the base' if memory is None else f'memory {memory!r}'} gives no finite scores")
