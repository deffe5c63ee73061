"""Loss spikes, found on the device and in the very step: no value is waited for, and what is found is the same on every rank.

A spike is a loss far above those of recent steps. OLMo-core's SkipStepAdamW skips such steps by the mean and standard
deviation of the last 128; here by their median and median absolute deviation, which no single loss moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 128
# No loss is judged before so many are known.
LEAST = 32
# Of a normal distribution: the standard deviation is this many median absolute deviations.
SIGMA = 1.4826
# However even the losses were, one that rose by less than this share is no spike.
LEAST_RISE = 0.1


class SpikeGuard:
    """The losses of recent steps and the judgement on the next.

    Args:
        sigmas: how many (robust) standard deviations above the median a loss may be.
        device: where the losses are.
    """

    def __init__(self, sigmas: float, device: torch.device) -> None:
        self.sigmas = sigmas
        self._losses = torch.full((WINDOW,), math.nan, dtype=torch.float64, device=device)
        self._count = 0

    def is_spike(self, loss: Tensor) -> Tensor:
        """Whether ``loss`` (fp64 scalar, mean of the global batch) is one: bool scalar on the device. What is not finite is none."""
        if self._count < LEAST:
            return torch.zeros((), dtype=torch.bool, device=loss.device)
        median = self._losses.nanmedian()
        deviation = SIGMA * (self._losses - median).abs().nanmedian()
        return torch.isfinite(loss) & (loss - median > torch.maximum(self.sigmas * deviation, LEAST_RISE * median))

    def accept(self, loss: Tensor) -> None:
        """Remember the loss of a step that was applied."""
        self._losses[self._count % WINDOW] = loss
        self._count += 1

    def state(self) -> list[float]:
        """The losses, the oldest first; waits for the device."""
        start = self._count % WINDOW if self._count > WINDOW else 0
        losses = torch.roll(self._losses, -start).tolist()
        return losses[: min(self._count, WINDOW)]

    def load(self, losses: Sequence[float]) -> None:
        """The reverse of ``state``."""
        self._losses.fill_(math.nan)
        self._count = min(len(losses), WINDOW)
        self._losses[: self._count] = torch.tensor(list(losses[-WINDOW:]), dtype=torch.float64)
