"""AdamW: its settings, its parameter groups and the learning rate as a pure function of the run's progress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mlm_dist.errors import UserError

# The tensors that AdamW keeps for each parameter.
STATE_KEYS = ("exp_avg", "exp_avg_sq")

Schedule = Literal["linear", "constant"]


@dataclass
class OptimConfig:
    """The optimizer and its learning rate.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019), torch's own.
        lr: peak learning rate, reached after the warm-up.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; biases and LayerNorms never decay.
        warmup: length of the linear warm-up, a fraction of the run when below 1, else a number of steps.
        schedule: after the warm-up, linear falls to 0 at the run's end, constant stays.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: float = 0.0
    schedule: Schedule = "linear"

    def check(self) -> None:
        """Raises UserError, naming the field, for a value that cannot be meant."""
        beta1, beta2 = self.betas
        checks = (
            ("lr", self.lr, math.isfinite(self.lr) and self.lr >= 0, "a finite number, at least 0"),
            ("betas", self.betas, 0 <= beta1 < 1 and 0 <= beta2 < 1, "two numbers in [0, 1), such as [0.9, 0.999]"),
            ("eps", self.eps, math.isfinite(self.eps) and self.eps > 0, "a small positive number, such as 1e-8"),
            (
                "weight_decay",
                self.weight_decay,
                math.isfinite(self.weight_decay) and self.weight_decay >= 0,
                "a finite number, at least 0",
            ),
            (
                "warmup",
                self.warmup,
                0 <= self.warmup < 1 or (math.isfinite(self.warmup) and self.warmup >= 1 and self.warmup % 1 == 0),
                "a fraction of the run in [0, 1) or a whole number of steps",
            ),
        )
        for field, value, good, right in checks:
            if not good:
                raise UserError(f"optim.{field}: {value!r} is not possible; it must be {right}")


def lr_factor(step: int, progress: float, *, warmup: float, schedule: Schedule) -> float:
    """What the peak learning rate is multiplied by at a step; in [0, 1].

    Args:
        step: steps taken before this one, so 0 for the first.
        progress: the fraction of the run that was done before this step, in [0, 1].
        warmup: see OptimConfig.warmup.
        schedule: see OptimConfig.schedule.

    For a run counted in steps (progress = step / steps) `linear` is transformers' `get_linear_schedule_with_warmup`.
    For a run counted in epochs, with a warm-up in steps, the progress at which the warm-up ended is taken from the
    run's pace so far.
    """
    progress = min(max(progress, 0.0), 1.0)
    if warmup < 1:
        warm, warmed_at = (progress / warmup if warmup > 0 else 1.0), warmup
    else:
        warm, warmed_at = step / warmup, (progress * warmup / step if step > 0 else 0.0)
    if warm < 1:
        return warm
    if schedule == "constant":
        return 1.0
    # Rounding may put the warm-up's end a bit past the progress that it was taken from.
    return min(1.0, (1.0 - progress) / (1.0 - warmed_at)) if warmed_at < 1 else 0.0


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW, `decay` and `no_decay` (biases and the parameters of LayerNorms), each left out when empty.

    A tied parameter comes once. Frozen parameters are left out. Each group also holds `name`.
    """
    norm = {id(p) for m in module.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            bare = id(parameter) in norm or name.rpartition(".")[2] == "bias"
            (no_decay if bare else decay).append(parameter)
    groups = (
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def build_adamw(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW over param_groups(). The fused kernel ships with torch, on CPU too, so nothing is compiled."""
    groups = param_groups(module, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
