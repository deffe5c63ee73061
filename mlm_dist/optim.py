"""Optimizers: their settings, their parameter groups and the learning rate as a pure function of the run's progress."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mlm_dist.combinations import OptimizerName
from mlm_dist.errors import UserError

# The tensors that each of the optimizers keeps for a parameter, in fp32 and of its shape.
STATE_KEYS = ("exp_avg", "exp_avg_sq")
# What a checkpoint calls the algorithm that its state belongs to.
CLASSES: dict[OptimizerName, str] = {
    "adamw": "AdamW",
    "cpu_adam": "AdamW",
    "lamb": "LAMB",
    "stable_adamw": "StableAdamW",
}

Schedule = Literal["linear", "constant"]


@dataclass
class OptimConfig:
    """The optimizer and its learning rate.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019), torch's own; cpu_adam, the same by DeepSpeed's operator for an
            offloaded optimizer, compiled on a machine's first use (two minutes, a C++ compiler); lamb (You et al. 2020)
            and stable_adamw (Wortsman et al. 2023) at ZeRO stage 0, from pytorch_optimizer.
        lr: peak learning rate, reached after the warm-up.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; biases and LayerNorms never decay.
        warmup: length of the linear warm-up, a fraction of the run when below 1, else a number of steps.
        schedule: after the warm-up, linear falls to 0 at the run's end, constant stays.
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: float = 0.0
    schedule: Schedule = "linear"

    def check(self) -> None:
        """Raises UserError, naming the field, for a value that cannot be meant and for an optimizer that is not installed."""
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
        if self.name in ("lamb", "stable_adamw") and importlib.util.find_spec("pytorch_optimizer") is None:
            raise UserError(
                f"optim.name: {self.name} needs the package pytorch_optimizer: pip install 'mlm-dist[optim]'"
            )
        compiler = os.environ.get("CXX", "c++")
        if self.name == "cpu_adam" and shutil.which(compiler) is None:
            raise UserError(
                f"optim.name: cpu_adam is compiled at its first use, and there is no C++ compiler {compiler!r} here; "
                "install one, or set optim.name to adamw, which is the same algorithm and needs none"
            )


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
    """Two groups, `decay` and `no_decay` (biases and the parameters of LayerNorms), each left out when empty.

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


def build_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that `optim` names, over param_groups()."""
    builders = {"adamw": build_adamw, "cpu_adam": _cpu_adam, "lamb": _lamb, "stable_adamw": _stable_adamw}
    return builders[optim.name](module, optim)


def build_adamw(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW over param_groups(). The fused kernel ships with torch, on CPU too, so nothing is compiled."""
    groups = param_groups(module, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _cpu_adam(module: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    groups = param_groups(module, optim.weight_decay)
    return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, adamw_mode=True)


def _lamb(module: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """LAMB as its authors trained BERT with it (the paper's version 3): without bias correction, for which a warm-up
    stands; the trust ratio ||w|| / ||update|| for the tensors that decay, 1 for biases and LayerNorms."""
    from pytorch_optimizer import Lamb

    groups = param_groups(module, optim.weight_decay)
    for group in groups:
        group["adam"] = group["name"] == "no_decay"
    # By default the library keeps weight decay out of the trust ratio, and divides the step that the ratio has already
    # normalised by Adam's first bias correction, which makes the first steps 10 times as long.
    optimizer = Lamb(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decouple=False, adam_debias=True)
    # The paper's function of the weight's norm is the identity; the library's would cut it at 10, an embedding's is 100.
    optimizer.clamp = math.inf
    return optimizer


def _stable_adamw(module: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    from pytorch_optimizer import StableAdamW

    groups = param_groups(module, optim.weight_decay)
    return StableAdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, kahan_sum=False)
