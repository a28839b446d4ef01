"""Who explained the text so far: the posterior over explanations, by which memories are weighed.

A text may be explained by the base alone, by each memory alone, and by each memory mixed with the base at its *own
weight*: what validation chose, or what its confidence says at that place. Their probabilities follow Bayes' rule, and
at every token a share of each goes back to the prior, so that a text may change its mind (fixed share).

Source: Herbster and Warmuth, Tracking the best expert (Machine Learning 32, 1998).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Explanations:
    """Which explanations there are: the base, then the memories alone, then each at its own weight."""

    memories: int
    """How many."""
    own: bool
    """Whether they have weights of their own."""
    alone_share: float
    """Share of the prior of memories that those alone have, where they have weights of their own."""

    @property
    def count(self) -> int:
        """How many explanations there are."""
        return 1 + self.memories * (1 + self.own)

    def log_prior(self, prior: float, like: Tensor) -> Float[Tensor, "K"]:
        """Log-probabilities before a text begins: `prior` is shared by those that need memories, equally by equal ones.

        Args:
            prior: In [0, 1].
            like: Gives device and precision.
        """
        each, alone = prior / max(1, self.memories), self.alone_share if self.own else 1.0
        shares = [1 - prior] + [alone * each] * self.memories + [(1 - alone) * each] * (self.memories * self.own)
        return torch.tensor(shares, dtype=like.dtype, device=like.device).log()

    def log_probs(
        self, base: Float[Tensor, "..."], memories: Float[Tensor, "... M"], own: Float[Tensor, "... M"] | None
    ) -> Float[Tensor, "... K"]:
        """What each explanation gave a token.

        Args:
            base, memories: What base and memories gave it.
            own: Each memory's own weight at that place; None where there are none.
        """
        parts = [base[..., None], memories]
        if self.own:
            assert own is not None
            parts.append(torch.logaddexp(base[..., None] + torch.log1p(-own), memories + own.log()))
        return torch.cat(parts, -1)

    def weights(
        self, log_posterior: Float[Tensor, "... K"], own: Float[Tensor, "... M"] | None
    ) -> Float[Tensor, "... M"]:
        """Each memory's weight: the probability of what it explains alone, and its share of what it explains mixed."""
        probs = log_posterior.exp()[..., 1:]
        if not self.own:
            return probs
        assert own is not None
        alone, mixed = probs.chunk(2, -1)
        return alone + mixed * own


@dataclass(frozen=True)
class FixedShare:
    """How the probabilities of explanations follow a text."""

    log_prior: Float[Tensor, "K"]
    switch: float

    def along(
        self,
        start: Float[Tensor, "R K"],
        log_probs: Float[Tensor, "R T K"],
        heard: Bool[Tensor, "R T"] | None = None,
    ) -> Float[Tensor, "R T K"]:
        """Log-posteriors after each token.

        Args:
            start: Before the first.
            log_probs: What each explanation gave each token.
            heard: False where a token says nothing; None: all do. One that nothing explains says nothing either.

        A prompt is followed on the CPU, where its hundreds of small steps take less time than launches elsewhere.
        """
        stay, go = _log(1 - self.switch), _log(self.switch)
        device = log_probs.device
        if device.type != "cpu" and log_probs.shape[1] > 1:
            on_cpu = FixedShare(self.log_prior.cpu(), self.switch)
            heard = None if heard is None else heard.cpu()
            return on_cpu.along(start.cpu(), log_probs.cpu(), heard).to(device)
        now, out = start, []
        for at in range(log_probs.shape[1]):
            new = now + log_probs[:, at]
            total = new.logsumexp(-1, keepdim=True)
            counts = total.isfinite() if heard is None else total.isfinite() & heard[:, at, None]
            shared = torch.logaddexp(new - torch.where(counts, total, 0.0) + stay, self.log_prior + go)
            now = torch.where(counts, shared, now)
            out.append(now)
        return torch.stack(out, 1) if out else log_probs.new_empty(*log_probs.shape)


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
