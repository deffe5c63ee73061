"""Optimizers: their settings and their parameter groups."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlm_dist.combinations import OptimizerName
from mlm_dist.errors import UserError
from mlm_dist.schedule import ScheduleConfig

# The tensors that each of the optimizers keeps for a parameter, in fp32 and of its shape.
STATE_KEYS = ("exp_avg", "exp_avg_sq")
# What a checkpoint calls the algorithm that its state belongs to.
CLASSES: dict[OptimizerName, str] = {
    "adamw": "AdamW",
    "cpu_adam": "AdamW",
    "lamb": "LAMB",
    "stable_adamw": "StableAdamW",
}


@dataclass
class OptimConfig(ScheduleConfig):
    """The optimizer and its learning rate, which ``ScheduleConfig`` moves.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019), torch's own; cpu_adam, the same by DeepSpeed's operator for an
            offloaded optimizer, compiled on a machine's first use (two minutes, a C++ compiler); lamb (You et al. 2020)
            and stable_adamw (Wortsman et al. 2023) at ZeRO stage 0, from pytorch_optimizer.
        lr: peak learning rate, reached after the warm-up.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled; biases and LayerNorms never decay.
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

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
        self.check_schedule()


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


def group_meta(module: nn.Module, optim: OptimConfig, prefix: str = "") -> list[dict[str, Any]]:
    """The parameter groups by name, `prefix` taken off, for JSON."""
    name_of = {id(p): name.removeprefix(prefix) for name, p in module.named_parameters()}
    return [
        {
            "name": group["name"],
            "names": [name_of[id(p)] for p in group["params"]],
            "weight_decay": group["weight_decay"],
            "betas": list(optim.betas),
            "eps": optim.eps,
        }
        for group in param_groups(module, optim.weight_decay)
    ]


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
    """LAMB as in its authors' code for BERT (google-research's lamb_optimizer.py): without bias correction, for which a
    warm-up stands; the trust ratio ||w|| / ||update|| for the tensors that decay, 1 for biases and LayerNorms."""
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
