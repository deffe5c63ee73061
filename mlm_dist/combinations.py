"""Which ZeRO stages, offload, precisions and optimizers go together: the one table.

tests/dist/test_combinations.py walks it. What `supported()` gives is trained, saved and restored there; everything else
is refused here, before anything starts.
"""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple, get_args

from mlm_dist.errors import UserError

Precision = Literal["fp32", "bf16", "bf16_pure", "fp16"]
OptimizerName = Literal["adamw", "cpu_adam", "lamb", "stable_adamw"]

_PER_TENSOR = {
    "lamb": "scales each tensor's update by its norm",
    "stable_adamw": "clips each tensor's update by its RMS",
}


class Combination(NamedTuple):
    """What decides how DeepSpeed keeps weights, gradients and optimizer state."""

    stage: int
    offload: bool
    precision: Precision
    optimizer: OptimizerName


def refusal(combination: Combination) -> str | None:
    """Why a combination is not possible and what would be right, naming the field; None where it is possible."""
    stage, offload, precision, optimizer = combination
    if offload and stage == 0:
        return (
            "deepspeed.config: zero_optimization.offload_optimizer needs zero_optimization.stage 1, 2 or 3, got 0 "
            "(such as the templates zero2_offload and zero3_offload)"
        )
    if precision == "bf16_pure" and stage == 0:
        return (
            "train.precision: bf16_pure needs ZeRO stage 1, 2 or 3, as DeepSpeed keeps fp32 weights and sums gradients in "
            "fp32 only there; set deepspeed.config to zero1 (on one device too), or train.precision to bf16"
        )
    if optimizer in _PER_TENSOR and stage > 0:
        return (
            f"optim.name: {optimizer} {_PER_TENSOR[optimizer]}, but at ZeRO stage {stage} an optimizer sees tensors "
            "joined and cut, so the result would be another and depend on the number of ranks; set deepspeed.config to "
            "zero0, or optim.name to adamw"
        )
    if optimizer == "cpu_adam" and not offload:
        return (
            "optim.name: cpu_adam steps weights on the host, so deepspeed.config must offload the optimizer "
            "(zero2_offload or zero3_offload); without offload set optim.name to adamw, which is the same algorithm"
        )
    return None


def check(combination: Combination) -> None:
    """Raises UserError for a combination that is not possible."""
    if reason := refusal(combination):
        raise UserError(reason)


def every() -> list[Combination]:
    """All that can be written down, possible or not."""
    values = product(range(4), (False, True), get_args(Precision), get_args(OptimizerName))
    return [Combination(*value) for value in values]


def supported() -> list[Combination]:
    """All that are possible."""
    return [combination for combination in every() if refusal(combination) is None]
