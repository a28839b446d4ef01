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

    _DECAY = 0.9
    _TRIED = (0, 2)
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

    def saw(self, drafted: int, judged: Sequence[tuple[int, int]], seconds: float) -> None:
        """Take a round into account.

        Args:
            drafted: Tokens that were read at once, beside those that were there.
            judged: Per text, how many were drafted for it and how many of them accepted.
            seconds: What the round took.
        """
        rows = max(1, len(judged))
        self.drafted_tokens += sum(count for count, _ in judged)
        self.accepted_tokens += sum(accepted for _, accepted in judged)
        self.accepted = self._DECAY * self.accepted + sum(accepted for _, accepted in judged) / rows
        self.refused = self._DECAY * self.refused + sum(accepted < count for count, accepted in judged) / rows
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
        drafted = [other for other in self.rounds if other]
        known = drafted if count and len(drafted) > 1 else list(self.rounds)
        a, b = sorted(known, key=lambda other: abs(other - count))[:2]
        slope = max(0.0, (self.rounds[b][0] - self.rounds[a][0]) / (b - a))
        return max(self.rounds[a][0] + slope * (count - a), 1e-9)
