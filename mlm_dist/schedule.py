"""The learning rate over a run: a pure function of how far it is, for runs counted in steps and in epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mlm_dist.errors import UserError

Schedule = Literal["linear", "cosine", "inverse_sqrt", "constant", "wsd"]
DecayShape = Literal["linear", "cosine", "sqrt"]

# With no warm-up to take it from, the step from which inverse_sqrt counts, as in transformers.
TIMESCALE = 10_000


@dataclass
class ScheduleConfig:
    """How the learning rate moves; part of the section ``optim``.

    Attributes:
        warmup: length of the linear warm-up, a fraction of the run when below 1, else a number of steps.
        schedule: after the warm-up, linear and cosine fall to the run's end; constant stays; inverse_sqrt falls as 1 / sqrt(step);
            wsd (warm-up, stable, decay) stays at the peak until the last ``decay`` of the run.
        decay: for wsd and inverse_sqrt, length of the decay at the end of the run, a fraction of it when below 1, else a number of steps.
        decay_shape: of that decay: linear, cosine, or sqrt (1 - sqrt of the share done; Haegele et al. 2024, arXiv:2405.18392).
        final: what is left of the peak at the end of linear, cosine or a decay.
    """

    warmup: float = 0.0
    schedule: Schedule = "linear"
    decay: float | None = None
    decay_shape: DecayShape = "linear"
    final: float = 0.0

    def check_schedule(self) -> None:
        """Raises UserError, naming the field, for a value that cannot be meant."""
        length = "a fraction of the run in [0, 1) or a whole number of steps"
        if not _is_length(self.warmup):
            raise UserError(f"optim.warmup: {self.warmup!r} is not possible; it must be {length}")
        if self.decay is not None and not (_is_length(self.decay) and self.decay > 0):
            raise UserError(f"optim.decay: {self.decay!r} is not possible; it must be {length}, and above 0")
        if not 0 <= self.final <= 1:
            raise UserError(f"optim.final: {self.final!r} is not possible; it must be a share of the peak in [0, 1]")
        if self.schedule == "wsd" and self.decay is None:
            raise UserError(
                "optim.decay: null, but optim.schedule wsd needs it: a fraction of the run (0.1 to 0.2 is usual) or a number of steps"
            )
        if self.decay is not None and self.schedule not in ("wsd", "inverse_sqrt"):
            raise UserError(
                f"optim.decay: {self.decay!r} does nothing with optim.schedule {self.schedule}; set that to wsd or inverse_sqrt, or optim.decay to null"
            )
        if self.decay_shape != "linear" and self.decay is None:
            raise UserError(f"optim.decay_shape: {self.decay_shape} does nothing without optim.decay")
        if self.final and self.decay is None and self.schedule not in ("linear", "cosine"):
            raise UserError(
                f"optim.final: {self.final!r} does nothing with optim.schedule {self.schedule} and no optim.decay"
            )
        if self.decay is not None and self.decay < 1 and self.warmup < 1 and self.decay + self.warmup > 1:
            raise UserError(f"optim.decay: {self.decay!r} and optim.warmup {self.warmup!r} are more than the run")

    def check_steps(self, steps: int) -> None:
        """Raises UserError for a warm-up and a decay that do not fit into a run of ``steps``."""
        if self.decay is None:
            return
        warmup, decay = (n if n >= 1 else n * steps for n in (self.warmup, self.decay))
        if warmup + decay > steps:
            raise UserError(
                f"optim.decay: {self.decay:g} and optim.warmup {self.warmup:g} are more than the run's {steps} steps; shorten them, or raise train.steps"
            )


def lr_factor(step: int, progress: float, config: ScheduleConfig) -> float:
    """What the peak learning rate is multiplied by at a step; in [0, 1].

    Args:
        step: steps taken before this one, so 0 for the first.
        progress: the fraction of the run that was done before this step, in [0, 1].
        config: the schedule.

    For a run counted in steps (progress = step / steps) the schedules are those of transformers' ``get_*_schedule``. A run counted in epochs
    does not know its number of steps: what is given in steps is turned into progress by the run's pace so far.
    """
    progress = min(max(progress, 0.0), 1.0)
    if config.warmup < 1:
        warm, warmed_at = (progress / config.warmup if config.warmup > 0 else 1.0), config.warmup
    else:
        warm, warmed_at = step / config.warmup, (progress * config.warmup / step if step > 0 else 0.0)
    if warm < 1:
        return warm
    if config.schedule in ("linear", "cosine"):
        shape: DecayShape = "cosine" if config.schedule == "cosine" else "linear"
        return _fall((progress - warmed_at) / (1.0 - warmed_at) if warmed_at < 1 else 1.0, shape, config.final)
    factor = 1.0
    if config.schedule == "inverse_sqrt":
        factor = warm**-0.5 if config.warmup > 0 else (1.0 + step / TIMESCALE) ** -0.5
    if config.decay is not None:
        # The decay's length in progress; before the first step nothing is known of the pace, and nothing decays.
        decay = config.decay if config.decay < 1 else (config.decay * progress / step if step > 0 else 0.0)
        left = 1.0 - progress
        factor *= _fall(1.0 - left / decay, config.decay_shape, config.final) if left < decay else 1.0
    return factor


def _fall(done: float, shape: DecayShape, final: float) -> float:
    """From 1 to ``final`` as ``done`` goes from 0 to 1. Rounding may put it a bit outside, where nothing moves."""
    done = min(max(done, 0.0), 1.0)
    if shape == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        left = 1.0 - (math.sqrt(done) if shape == "sqrt" else done)
    return final + (1.0 - final) * left


def _is_length(value: float) -> bool:
    return 0 <= value < 1 or (math.isfinite(value) and value >= 1 and value % 1 == 0)
