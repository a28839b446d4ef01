"""How many tokens to draft at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_DRAFTED = 16


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
    share: float = 0.0
    """What drafting one token costs at least, of a plain step: a memory's part of it; 0 for a lookup."""
    observed: bool = False
    """Whether plain steps tell how often drafts would be accepted."""
    plain: int = 0
    """Plain steps taken so far."""

    _DECAY = 0.9
    _TRIED = (0, 2)
    _PAUSE = 24
    _ASKED = (4, 8)
    """Of the plain steps the first few are asked what a draft would have been worth, then one of so many."""

    def next(self) -> int:
        """Tokens to draft now."""
        if self.fixed is not None:
            return self.fixed
        for count in self._TRIED:  # twice each, for the first of its kind is slow
            if self.rounds.get(count, (0.0, 0.0))[1] < 1.5:
                return count if self._may_pay() else 0
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
            return 0 if self.observed else 2  # so that it is seen when drafts begin to pay
        return best

    @property
    def asks(self) -> bool:
        """Whether the plain step at hand should tell how likely a draft would have been accepted, which costs time."""
        first, every = self._ASKED
        return self.fixed is None and (self.plain < first or self.plain % every == 0)

    def saw(self, drafted: int, judged: Sequence[tuple[int, int]], seconds: float, likely: float | None = None) -> None:
        """Take a round into account.

        Args:
            drafted: Tokens that were read at once, beside those that were there.
            judged: Per text, how many were drafted for it and how many of them accepted.
            seconds: What the round took.
            likely: Chance that a token drafted for a plain step would have been accepted; None: not known.
        """
        rows = max(1, len(judged))
        self.plain += drafted == 0
        self.drafted_tokens += sum(count for count, _ in judged)
        self.accepted_tokens += sum(accepted for _, accepted in judged)
        accepted = sum(accepted for _, accepted in judged) / rows
        refused = sum(accepted < count for count, accepted in judged) / rows
        if likely is not None:
            self.observed = True
            accepted, refused = accepted + likely, refused + 1 - likely
        if judged or likely is not None:  # else nothing was learnt, and nothing is forgotten
            self.accepted = self._DECAY * self.accepted + accepted
            self.refused = self._DECAY * self.refused + refused
        before, weight = self.rounds.get(drafted, (seconds, 0.0))
        new = weight * self._DECAY + 1
        mean = before + (seconds - before) / new
        self.rounds[drafted] = (min(before, seconds) if 1 <= weight < 1.5 else mean, new)

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were accepted, of those that were judged."""
        judged = self.accepted + self.refused
        return self.accepted / judged if judged else 0.5

    def _may_pay(self) -> bool:
        """Whether drafts would save time if the base read all of them in the time of one token."""
        if not self.observed:
            return True
        return any(self._expected(count) > 1 + count * self.share for count in range(1, MOST_DRAFTED + 1))

    def _expected(self, count: int) -> float:
        """Tokens that a round with so many drafted ones gives."""
        rate = min(self.acceptance, 0.999)
        return (1 - rate ** (count + 1)) / (1 - rate)

    def _seconds(self, count: int) -> float:
        """What such a round takes: as measured, or on the line through the nearest two that were."""
        if count in self.rounds:
            return max(self.rounds[count][0], 1e-9)
        drafted = [other for other in self.rounds if other]
        known = drafted if count and len(drafted) > 1 else list(self.rounds)
        a, b = sorted(known, key=lambda other: abs(other - count))[:2]
        slope = max(0.0, (self.rounds[b][0] - self.rounds[a][0]) / (b - a))
        return max(self.rounds[a][0] + slope * (count - a), 1e-9)
