"""The gate: weights per token, from who explained the text so far and how sure each memory is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlm.errors import ConfigError
from memlm.memory.confidence import Columns, ConfidenceHead
from memlm.memory.voter import VoterCache, Votes
from memlm.mix.gate_config import GateConfig, GateName
from memlm.mix.posterior import Explanations, FixedShare
from memlm.mix.weights import FixedWeights, Step, Weight, WeightRule
from memlm.models.heads import summary
from memlm.targets.votes import SparseProbs

_PENDING = 64  # latest places whose votes are kept for the token to come: as many as a draft has, which may be cropped


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
        self.explanations = Explanations(len(self.memories), alone=not self.by_confidence, own=self.has_own)

    def new_state(self, batch_size: int) -> "GateCache":
        return GateCache(batch_size)

    def places(self, keep: slice | Tensor, tokens: int) -> slice | Tensor:
        kept = places_of(keep, tokens)
        return slice(max(0, int(kept[0]) - self.config.prompt_window), None) if len(kept) else keep

    def weights(self, step: Step, state: VoterCache | None) -> list[Weight]:
        assert state is None or isinstance(state, GateCache)
        own = self._own(step)
        if self.config.gate == "confidence":
            assert own is not None
            return list(together(own).unbind(-1))
        posterior = self._posterior(step, own, state)
        return list(self.explanations.weights(posterior, own).unbind(-1))

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
            return [summary(step.base - step.normaliser), *memories]

        return self.own_weights(step.normaliser[..., 0], columns)

    def _posterior(
        self, step: Step, own: Float[Tensor, "B T2 M"] | None, state: "GateCache | None"
    ) -> Float[Tensor, "B T2 K"]:
        """Log-posteriors at the places that are kept, each after the tokens up to it."""
        rows, length = step.tokens.shape
        prior = self.explanations.log_prior(self.config.prior, step.base)
        kept = places_of(step.keep, length)
        first = int(kept[0]) if len(kept) else length  # a place whose votes are there
        began = max(0, first - self.config.prompt_window)
        known = state if state is not None and state.tokens == step.past and began == 0 else None
        start = prior.expand(rows, -1) if known is None or known.history is None else known.history[:, -1]
        # what was said of each new token before it came; of the first one by the step before
        said = torch.full((rows, length, len(prior)), float("nan"), device=step.base.device)
        if known is not None and known.pending is not None:
            said[:, 0] = known.pending.of(step.tokens[:, 0])
        if began < first and first > 0:
            self._hear_prompt(step, began, min(first, length - 1), said)
        followed = kept[kept < length - 1]
        if len(followed):
            votes = _Pending.at(step, own, torch.arange(len(followed)), self.explanations)
            said[:, followed + 1] = votes.of_each(step.tokens[:, followed + 1])
        heard = ~said.isnan().any(-1)
        if step.real is not None:
            heard &= step.real & torch.nn.functional.pad(step.real[:, :-1], (1, 0), value=True)
        rule = FixedShare(prior, self.config.switch)
        along = rule.along(start, said.nan_to_num(nan=0.0, neginf=-float("inf")), heard)
        if state is not None:
            state.extend(step, along, own, kept, known is not None, self.explanations)
        return along[:, kept]

    def _hear_prompt(self, step: Step, began: int, end: int, said: Tensor) -> None:
        """Fill in what was said of the tokens after the places from `began` to `end`, whose votes are not kept."""
        columns = step.columns(began, end)
        base, *memories = columns
        own = self.own_weights(base["label"], lambda: columns)
        told = self.explanations.log_probs(base["label"], torch.stack([m["label"] for m in memories], -1), own)
        said[:, began + 1 : end + 1] = told


def gate_config(gate: GateName | GateConfig | None) -> GateConfig:
    """The settings of a gate from a name, or from themselves.

    Raises:
        ConfigError: There is no gate of that name.
    """
    return gate if isinstance(gate, GateConfig) else GateConfig.parse({} if gate is None else {"gate": gate})


def weight_rule(config: GateConfig, memories: Mapping[str, GatedMemory]) -> WeightRule:
    """The rule that the settings ask for; where they do not say, it follows from what is known of the memories.

    Raises:
        ConfigError: Confidence is asked for, and a memory has no head.
    """
    name = config.gate
    if name is None and memories:
        name = "both" if all(memory.head is not None for memory in memories.values()) else "posterior"
    if name in (None, "none"):
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
        return self.taken(places=torch.tensor([self.base.shape[1] - 1])).of_each(token[:, None])[:, 0]

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
    """What the gate keeps of a text: the posterior after every token, and the latest votes, for the token to come."""

    def __init__(self, batch_size: int) -> None:
        self.tokens = 0
        self.history: Float[Tensor, "B N K"] | None = None
        """Log-posteriors."""
        self.pending: _Pending | None = None
        """Votes at the latest places, as far as they were kept."""

    def extend(
        self, step: Step, along: Tensor, own: Tensor | None, kept: Tensor, known: bool, explanations: Explanations
    ) -> None:
        """Add the tokens of a step."""
        before = self.history if known and self.history is not None else None
        if before is None and step.past:  # what another rule has weighed counts for nothing here
            before = along[:, :1].expand(-1, step.past, -1)
        self.history = along if before is None else torch.cat([before, along], 1)
        self.tokens = step.past + along.shape[1]
        length = along.shape[1]
        run = 0  # places at the end of which all are kept, in order
        latest = kept.tolist()[-_PENDING:]
        while run < len(latest) and latest[-1 - run] == length - 1 - run:
            run += 1
        places = torch.arange(len(kept) - run, len(kept))
        self.pending = _Pending.at(step, own, places, explanations) if run else None

    def crop(self, tokens: int) -> None:
        if tokens <= 0 or self.history is None:
            return
        self.tokens = max(0, self.tokens - tokens)
        self.history = self.history[:, : self.tokens] if self.tokens else None
        left = 0 if self.pending is None else self.pending.base.shape[1] - tokens
        if self.pending is not None and left > 0:
            self.pending = self.pending.taken(places=torch.arange(left))
        else:
            self.pending = None

    def select(self, rows: Int[Tensor, "B2"]) -> None:
        if self.history is not None:
            rows = rows.to(self.history.device)
            self.history = self.history[rows]
        if self.pending is not None:
            self.pending = self.pending.taken(rows=rows)

    def repeat(self, times: int) -> None:
        if self.history is not None:
            rows = torch.arange(len(self.history), device=self.history.device)
            self.select(rows.repeat_interleave(times))

    def reset(self) -> None:
        self.tokens, self.history, self.pending = 0, None, None
