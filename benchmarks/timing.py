"""Sides measured in turns in one process, so that whatever slows the machine slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds that each side took, a number per round."""

    seconds: dict[str, list[float]]

    def median(self, side: str) -> float:
        """Seconds of a side in its middle round."""
        return statistics.median(self.seconds[side])

    def ratio(self, above: str, below: str) -> float:
        """One side over another: the median of the ratios within rounds, for machines drift between rounds."""
        return statistics.median(self._ratios(above, below))

    def spread(self, above: str, below: str) -> list[float]:
        """Lowest and highest ratio of the two sides within one round."""
        ratios = self._ratios(above, below)
        return [round(min(ratios), 4), round(max(ratios), 4)]

    def _ratios(self, above: str, below: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True)]


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given; the CPU has always."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def interleave(
    sides: Mapping[str, Callable[[], object]], *, device: torch.device, rounds: int, warmup: int = 2
) -> Timing:
    """Run the sides in turns, A B A B …, and time each call.

    Args:
        sides: Name to what is timed.
        device: Where they compute.
        rounds: Timed calls per side.
        warmup: Calls per side before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, side in sides.items():
            synchronize(device)
            start = time.perf_counter()
            side()
            synchronize(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return Timing(seconds)
