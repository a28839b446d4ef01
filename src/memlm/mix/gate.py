"""The gate: weights per token, from who explained the text so far and how sure each memory is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlm.errors import ConfigError
from memlm.memory.confidence import Columns, ConfidenceHead
from memlm.memory.voter import VoterCache, Votes, moved
from memlm.mix.gate_config import GateConfig, GateName
from memlm.mix.posterior import Explanations, FixedShare
from memlm.mix.sleep import Sleep
from memlm.mix.weights import FixedWeights, Step, Weight, WeightRule
from memlm.models.heads import summary
from memlm.targets.votes import SparseProbs

_PENDING = 64  # latest places whose votes are kept for the token to come: as many as a draft has, which may be cropped
_ALONE_BESIDE_CONFIDENCE = 0.05
"""Share of the prior that memories alone have beside those mixed by confidence. Where the head was fitted beside a much
better base than it stands beside, they explain the text; a larger share costs general text more."""


@dataclass(frozen=True)
class GatedMemory:
    """What the gate knows of a memory."""

    mix_weight: float | None
    """What validation chose."""
    head: ConfidenceHead | None = None


class Gate(WeightRule):
    """Weighs memories at every place by what the text so far and their votes there tell."""

    def __init__(self, config: GateConfig, memories: Mapping[str, GatedMemory]) -> None:
        """
        Args:
            config: Its `gate` is a name other than `none`.
            memories: By name, in their order.

        Raises:
            ConfigError: Confidence is asked for, and a memory has no head.
        """
        assert config.gate not in (None, "none")
        self.config, self.memories = config, dict(memories)
        self.by_confidence = config.gate != "posterior"
        for name, memory in self.memories.items() if self.by_confidence else ():
            if memory.head is None:
                raise ConfigError(
                    f"gate = {config.gate!r}: memory {name!r} has no confidence head; fit one with memlm gate"
                )
        self.has_own = self.by_confidence or all(m.mix_weight is not None for m in self.memories.values())
        alone = _ALONE_BESIDE_CONFIDENCE if self.by_confidence else 0.5
        self.explanations = Explanations(len(self.memories), own=self.has_own, alone_share=alone)
        self.follows = config.gate != "confidence"
        """Whether it keeps a posterior."""
        self.sleep = Sleep(config.sleep, config.sleep_below)
        self._priors: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def new_state(self, batch_size: int) -> "GateCache":
        return GateCache(batch_size)

    def places(self, keep: slice | Tensor, tokens: int) -> slice | Tensor:
        kept = places_of(keep, tokens).tolist()
        return slice(max(0, min(kept) - self.config.prompt_window), None) if kept else keep

    def asleep(self, state: VoterCache | None, past: int, unread: int, tokens: int) -> bool:
        if not self.sleep.tokens or not isinstance(state, GateCache) or state.left is None:
            return False
        return state.tokens == past - unread and bool((state.left[:, -1] >= unread + tokens).all())

    def weights(self, step: Step, state: VoterCache | None) -> list[Weight]:
        assert state is None or isinstance(state, GateCache)
        own, length = self._own(step), step.tokens.shape[1]
        kept = places_of(step.keep, length)
        places = kept.tolist()  # Python counts a few of them in less time than torch
        first = min(places, default=length)  # a place whose votes are there
        began = max(0, first - step.unread - self.config.prompt_window)
        began = began + step.unread if began else 0
        gaps = places and max(places) - first + 1 != len(set(places))
        end = min(max(places) if gaps else first, length - 1)
        before = None
        if began < end and (self.follows or self.sleep.tokens):
            before = self._hear_prompt(step, began, end)
        kinds = self.explanations.count if self.follows else 0
        known = state if state is not None and state.goes_on(step.past, kinds) and began == 0 else None
        if self.follows:
            along = self._posterior(step, own, kept, before, known)
        else:
            along = step.base.new_zeros(*step.tokens.shape, 0)
        whole = places == list(range(length))
        weights, left = self._weights(along if whole else along[:, kept], own), None
        if self.sleep.tokens:
            asleep, left = self._sleep(step, along, weights, kept, before, known)
            weights = weights.masked_fill(asleep[:, kept, None], 0.0)
        if state is not None and (self.follows or self.sleep.tokens):
            pending = _Pending.latest(step, own, kept, self.explanations) if self.follows else None
            state.extend(step.past, along, left, pending, known)
        return list(weights.unbind(-1))

    def _weights(self, posterior: Float[Tensor, "... K"], own: Float[Tensor, "... M"] | None) -> Float[Tensor, "... M"]:
        """What each memory weighs when it is awake."""
        if self.follows:
            return self.explanations.weights(posterior, own)
        assert own is not None
        return together(own)

    def _sleep(
        self,
        step: Step,
        along: Float[Tensor, "B T K"],
        weights: Float[Tensor, "B T2 M"],
        kept: Int[Tensor, "T2"],
        before: "_Heard | None",
        known: "GateCache | None",
    ) -> tuple[Tensor, Tensor]:
        """Where the memories sleep, and how many places they will from there on; each `(B, T)`."""
        rows, length = step.tokens.shape
        total = weights.new_zeros(rows, length)
        there = torch.zeros(rows, length, dtype=torch.bool, device=total.device)
        if before is not None:
            span = slice(before.began, before.end)
            total[:, span], there[:, span] = self._weights(along[:, span], before.own).sum(-1), True
        total[:, kept], there[:, kept] = weights.sum(-1), True
        if step.real is not None:
            there &= step.real
        left = torch.zeros(rows, dtype=torch.long, device=total.device)
        if known is not None and known.left is not None:
            left = known.left[:, -1].to(total.device)
        return self.sleep.along(left, total, there)

    def own_weights(
        self, like: Float[Tensor, "..."], columns: Callable[[], Sequence[Columns]]
    ) -> Float[Tensor, "... M"] | None:
        """Each memory's own weight at some places; None where there is none.

        Args:
            like: Gives their shape.
            columns: What base and memories thought there, as scores have it; asked for where confidence needs it.
        """
        if not self.has_own:
            return None
        if not self.by_confidence:
            return torch.stack([torch.full_like(like, m.mix_weight or 0.0) for m in self.memories.values()], -1)
        base, *memories = columns()
        heads = [memory.head for memory in self.memories.values() if memory.head is not None]
        found = [head.weight(m["confidence"], base, m) for head, m in zip(heads, memories, strict=True)]
        return torch.stack(found, -1)

    def _own(self, step: Step) -> Float[Tensor, "B T2 M"] | None:
        """Each memory's own weight at the places that are kept."""
        shape = step.base.shape[:2]

        def columns() -> list[Columns]:
            memories = [
                {**_summary(votes, shape), "confidence": step.confidence(name)} for name, votes in step.memories.items()
            ]
            return [summary(step.base, step.normaliser), *memories]

        return self.own_weights(step.normaliser[..., 0], columns)

    def _posterior(
        self,
        step: Step,
        own: Float[Tensor, "B T2 M"] | None,
        kept: Int[Tensor, "T2"],
        before: "_Heard | None",
        known: "GateCache | None",
    ) -> Float[Tensor, "B T K"]:
        """Log-posteriors after every token."""
        rows, length = step.tokens.shape
        prior = self._log_prior(step.base)
        start = prior.expand(rows, -1) if known is None or known.history is None else known.history[:, -1]
        # what was said of each new token before it came; of the first one by the step before
        said = torch.full((rows, length, len(prior)), float("nan"), device=step.base.device)
        if known is not None and known.pending is not None:
            said[:, 0] = known.pending.of(step.tokens[:, 0])
        if before is not None:
            said[:, before.began + 1 : before.end + 1] = before.said
        if length > 1 and len(followed := kept[kept < length - 1]):
            votes = _Pending.at(step, own, (kept < length - 1).nonzero()[:, 0], self.explanations)
            said[:, followed + 1] = votes.of_each(step.tokens[:, followed + 1])
        heard = ~said.isnan().any(-1)
        if step.real is not None:
            before_first = torch.ones_like(heard[:, 0]) if step.real_before is None else step.real_before
            heard &= step.real & torch.cat([before_first[:, None], step.real[:, :-1]], 1)
        if step.evidence is not None:
            heard &= step.evidence
        rule = FixedShare(prior, self.config.switch)
        return rule.along(start, said.nan_to_num(nan=0.0, neginf=-float("inf")), heard)

    def _log_prior(self, like: Tensor) -> Float[Tensor, "K"]:
        kind = like.dtype, like.device
        if kind not in self._priors:
            with torch.inference_mode(False):  # it outlives the call
                self._priors[kind] = self.explanations.log_prior(self.config.prior, like)
        return self._priors[kind]

    def _hear_prompt(self, step: Step, began: int, end: int) -> "_Heard":
        """What was said of the tokens after the places from `began` to `end`, whose votes are not kept."""
        columns = step.columns(began, end)
        base, *memories = columns
        own = self.own_weights(base["label"], lambda: columns)
        told = self.explanations.log_probs(base["label"], torch.stack([m["label"] for m in memories], -1), own)
        return _Heard(began, end, own, told)


def gate_config(gate: GateName | GateConfig | None, *, weight_given: bool = False) -> GateConfig:
    """The settings of a gate from a name, or from themselves; `none` where a weight is given and no gate is named.

    Raises:
        ConfigError: There is no gate of that name, or it has settings where a weight is given and it has no name.
    """
    found = gate if isinstance(gate, GateConfig) else GateConfig.parse({} if gate is None else {"gate": gate})
    if weight_given and found.gate is None and (idle := sorted(found.model_fields_set - {"gate"})):
        raise ConfigError(f"{', '.join(idle)}: of a gate, and the weight is given, so none is in force; name one too")
    return found.model_copy(update={"gate": "none"}) if weight_given and found.gate is None else found


def weight_rule(config: GateConfig, memories: Mapping[str, GatedMemory]) -> WeightRule:
    """The rule that the settings ask for; where they do not say, it follows from what is known of the memories.

    Raises:
        ConfigError: Confidence is asked for, and a memory has no head.
    """
    name = config.gate
    if name is None:
        name = "both" if all(memory.head is not None for memory in memories.values()) else "posterior"
    if name == "none" or not memories:
        return FixedWeights({label: memory.mix_weight for label, memory in memories.items()})
    return Gate(config.model_copy(update={"gate": name}), memories)


def places_of(keep: slice | Tensor, tokens: int) -> Int[Tensor, "T2"]:
    """The places that are kept, on the CPU."""
    return torch.arange(tokens)[keep if isinstance(keep, slice) else keep.cpu()]


def together(own: Float[Tensor, "... M"]) -> Float[Tensor, "... M"]:
    """Weights of several memories from those that each would have alone beside the base; one keeps its own."""
    if own.shape[-1] == 1:
        return own
    odds = own.double() / (1 - own.double()).clamp(min=1e-12)
    return (odds / (1 + odds.sum(-1, keepdim=True))).to(own.dtype)


def _summary(votes: Votes, shape: torch.Size) -> dict[str, Tensor]:
    if isinstance(votes, SparseProbs):
        return {name: values.view(shape) for name, values in votes.summary().items()}
    return summary(votes)


@dataclass(frozen=True)
class _Heard:
    """What was thought at places of a prompt."""

    began: int
    end: int
    own: Float[Tensor, "B E M"] | None
    said: Float[Tensor, "B E K"]
    """What each explanation gave the token after the place."""


@dataclass
class _Pending:
    """Votes at some places, for the tokens that come after them."""

    base: Float[Tensor, "B P V"]
    normaliser: Float[Tensor, "B P 1"]
    memories: list[Votes]
    own: Float[Tensor, "B P M"] | None
    explanations: Explanations

    @classmethod
    def at(cls, step: Step, own: Tensor | None, places: Int[Tensor, "P"], explanations: Explanations) -> "_Pending":
        """The votes of a step at some of the places that it kept."""
        whole = cls(step.base, step.normaliser, list(step.memories.values()), own, explanations)
        return whole if len(places) == step.base.shape[1] else whole.taken(places=places)

    @classmethod
    def latest(
        cls, step: Step, own: Tensor | None, kept: Int[Tensor, "T2"], explanations: Explanations
    ) -> "_Pending | None":
        """The votes at the end of a step, as far back as all places were kept, in order."""
        length, run = step.tokens.shape[1], 0
        latest = kept.tolist()[-_PENDING:]
        while run < len(latest) and latest[-1 - run] == length - 1 - run:
            run += 1
        return cls.at(step, own, torch.arange(len(kept) - run, len(kept)), explanations) if run else None

    def of_each(self, tokens: Int[Tensor, "B P"]) -> Float[Tensor, "B P K"]:
        """What each explanation gave the token after each place."""
        base = (self.base.gather(-1, tokens[..., None]) - self.normaliser)[..., 0]
        memories = [
            votes.of(tokens.flatten()).view(tokens.shape).log()
            if isinstance(votes, SparseProbs)
            else votes.gather(-1, tokens[..., None])[..., 0]
            for votes in self.memories
        ]
        return self.explanations.log_probs(base, torch.stack(memories, -1), self.own)

    def of(self, token: Int[Tensor, "B"]) -> Float[Tensor, "B K"]:
        """What each explanation gave the token after the last place."""
        last = self
        if self.base.shape[1] > 1:
            last = self.taken(places=torch.tensor([self.base.shape[1] - 1]))
        return last.of_each(token[:, None])[:, 0]

    def without(self, surplus: Sequence[int], before: "_Pending | None") -> "_Pending":
        """The votes but for those at the last places of each row; what is left ends where it did.

        Args:
            surplus: Per row, how many places.
            before: Votes at the places before these, for a row of which none is left.
        """
        rows, length = self.base.shape[:2]
        before = before if max(surplus) >= length else None
        older = 0 if before is None else before.base.shape[1]
        places = torch.arange(older, older + length) - torch.tensor(surplus)[:, None]
        places = places.clamp(0, older + length - 1)  # of both, the older ones first
        row = torch.arange(rows)[:, None]
        flat = torch.where(places < older, row * older + places, rows * older + row * length + places - older).flatten()

        def left(new: Votes, old: Votes | None) -> Any:
            if isinstance(new, SparseProbs):
                both = new if old is None else SparseProbs.concatenate([cast(SparseProbs, old), new])
                return both.take(flat.to(both.counts.device))
            parts = [new] if old is None else [cast(Tensor, old), new]
            found = torch.cat([part.flatten(0, 1) for part in parts])[flat.to(new.device)]
            return found.view(rows, length, -1)

        return _Pending(
            left(self.base, before and before.base),
            left(self.normaliser, before and before.normaliser),
            [left(v, before and before.memories[number]) for number, v in enumerate(self.memories)],
            None if self.own is None else left(self.own, before and before.own),
            self.explanations,
        )

    def taken(self, *, rows: Tensor | None = None, places: Tensor | None = None) -> "_Pending":
        """The votes of some rows, or at some places, in this order."""
        count, length = self.base.shape[:2]
        row = torch.arange(count) if rows is None else rows
        place = torch.arange(length) if places is None else places
        flat = (row[:, None] * length + place.to(row.device)).flatten()

        def dense(part: Tensor) -> Tensor:
            return part[row] if places is None else part[:, place]

        return _Pending(
            dense(self.base),
            dense(self.normaliser),
            [votes.take(flat) if isinstance(votes, SparseProbs) else dense(votes) for votes in self.memories],
            None if self.own is None else dense(self.own),
            self.explanations,
        )


class GateCache(VoterCache):
    """What the gate keeps of a text: the posterior after every token, the latest votes, for the token to come, and how
    long the memories are to sleep."""

    def __init__(self, batch_size: int) -> None:
        self.tokens = 0
        self.history: Float[Tensor, "B N K"] | None = None
        """Log-posteriors."""
        self.left: Int[Tensor, "B N"] | None = None
        """Places that the memories are to sleep after each token; None: they never do."""
        self.pending: _Pending | None = None
        """Votes at the latest places, as far as they were kept."""
        self.before: _Pending | None = None
        """Those that were pending before the latest step, where there are several rows."""

    def goes_on(self, past: int, kinds: int) -> bool:
        """Whether it knows the `past` tokens before a step, by as many kinds of explanations; False where another rule
        has weighed them."""
        return self.tokens == past and (self.history is None or self.history.shape[-1] == kinds)

    def extend(
        self, past: int, along: Tensor, left: Tensor | None, pending: _Pending | None, known: "GateCache | None"
    ) -> None:
        """Add the tokens of a step.

        Args:
            past: How many came before.
            along, left: Of each, as `history` and `left` have them.
            pending: What is kept from here on.
            known: This, where what it has of the tokens before goes on to count.
        """
        goes_on = known is not None and known.history is not None
        if goes_on and self.history is not None:
            along = torch.cat([self.history, along], 1)
            if left is not None and self.left is not None:
                left = torch.cat([self.left.to(left.device), left], 1)
            elif left is not None:  # nobody slept before
                left = torch.nn.functional.pad(left, (past, 0))
        elif past:  # what another rule has weighed counts for nothing here
            along = torch.cat([along[:, :1].expand(-1, past, -1), along], 1)
            left = None if left is None else torch.nn.functional.pad(left, (past, 0))
        self.before = self.pending if len(along) > 1 else None
        self.history, self.left, self.pending, self.tokens = along, left, pending, along.shape[1]

    def crop(self, tokens: int) -> None:
        if tokens <= 0 or self.history is None:
            return
        self.before = None
        self.tokens = max(0, self.tokens - tokens)
        self.history = self.history[:, : self.tokens] if self.tokens else None
        self.left = self.left[:, : self.tokens] if self.tokens and self.left is not None else None
        left = 0 if self.pending is None else self.pending.base.shape[1] - tokens
        if self.pending is not None and left > 0:
            self.pending = self.pending.taken(places=torch.arange(left))
        else:
            self.pending = None

    def take_back(self, surplus: Sequence[int], columns: int) -> None:
        by = [count - columns for count in surplus]
        if not any(by) or self.history is None:
            return self.crop(columns)
        self.tokens -= columns
        self.history = moved(self.history, by, 1, self.tokens)
        self.left = None if self.left is None else moved(self.left, by, 1, self.tokens)
        self.pending = None if self.pending is None else self.pending.without(surplus, self.before)
        self.before = None

    def select(self, rows: Int[Tensor, "B2"]) -> None:
        self.before = None
        if self.history is not None:
            rows = rows.to(self.history.device)
            self.history = self.history[rows]
        if self.left is not None:
            self.left = self.left[rows]
        if self.pending is not None:
            self.pending = self.pending.taken(rows=rows)

    def repeat(self, times: int) -> None:
        if self.history is not None:
            rows = torch.arange(len(self.history), device=self.history.device)
            self.select(rows.repeat_interleave(times))

    def reset(self) -> None:
        self.tokens, self.history, self.left, self.pending, self.before = 0, None, None, None, None
