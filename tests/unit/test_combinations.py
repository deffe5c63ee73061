"""The table of what goes together, and who enforces it."""

from __future__ import annotations

from typing import Any

import pytest

from mlm_dist.combinations import Combination, every, refusal, supported
from mlm_dist.ds_config import load_template, merge
from mlm_dist.errors import UserError


def merged(combination: Combination) -> dict[str, Any]:
    template = load_template("zero2_offload" if combination.offload else "zero2")
    template["zero_optimization"]["stage"] = combination.stage
    settings: dict[str, Any] = {"precision": combination.precision, "optimizer": combination.optimizer}
    return merge(template, clip=1.0, micro_batch=1, **settings)


@pytest.mark.parametrize("combination", every(), ids=str)
def test_what_is_refused_is_refused_before_deepspeed_sees_it(combination: Combination) -> None:
    reason = refusal(combination)
    if reason is None:
        assert merged(combination)["zero_optimization"]["stage"] == combination.stage
        return
    # It names a field and what to set instead.
    assert reason.startswith(("deepspeed.config: ", "train.precision: ", "optim.name: "))
    with pytest.raises(UserError, match="zero"):
        merged(combination)


def test_what_is_promised_is_not_refused() -> None:
    good = set(supported())
    for stage in range(4):
        assert {(stage, False, p, "adamw") for p in ("fp32", "bf16", "fp16")} <= good
        if stage:
            assert {(stage, o, "bf16_pure", "adamw") for o in (False, True)} <= good
            assert (stage, True, "bf16", "cpu_adam") in good
    assert {(0, False, "bf16", name) for name in ("lamb", "stable_adamw")} <= good
