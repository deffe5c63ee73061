"""AdamW: its settings and its parameter groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mlm_dist.errors import UserError
from mlm_dist.schedule import ScheduleConfig

# The tensors that AdamW keeps for each parameter.
STATE_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass
class OptimConfig(ScheduleConfig):
    """The optimizer and its learning rate, which ``ScheduleConfig`` moves.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019), torch's own.
        lr: peak learning rate, reached after the warm-up.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; biases and LayerNorms never decay.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

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
        )
        for field, value, good, right in checks:
            if not good:
                raise UserError(f"optim.{field}: {value!r} is not possible; it must be {right}")
        self.check_schedule()


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
