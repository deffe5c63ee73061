"""Every combination of stage, offload, precision and optimizer that is not refused: trained, saved, restored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from torch.utils.cpp_extension import get_default_build_root

from mlm_dist.combinations import Combination, supported
from tests.dist.test_engine import CASES
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)
STEPS = 2
# Largest difference of a step's loss from plain PyTorch in fp32, along a training that goes through all of them.
NEAR = 2e-2


def walk(combinations: list[Combination]) -> list[list[dict[str, Any]]]:
    jobs = [("walk", {"combinations": combinations, "steps": STEPS})]
    return [results[0] for results in run_ranks(f"{CASES}:run", 2, {"jobs": jobs}, timeout=580)]


def check(by_rank: list[list[dict[str, Any]]]) -> None:
    for result in (result for rank in by_rank for result in rank):
        # From another combination to the bit, from this one to the bit, and on from there to the bit.
        assert (result["received"], result["same"], result["again"]) == (True, True, True), result["case"]
        assert result["got"]["losses"] == pytest.approx(result["plain"], abs=NEAR), result["case"]


def cpu_adam_is_built() -> bool:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return any(Path(root).rglob("cpu_adam.so"))


def test_every_combination_is_trained_saved_and_restored() -> None:
    by_optimizer = sorted((c for c in supported() if c.optimizer != "cpu_adam"), key=lambda c: c.optimizer)
    by_rank = walk(by_optimizer)
    assert [result["case"] for result in by_rank[0]] == by_optimizer
    check(by_rank)


@pytest.mark.skipif(not cpu_adam_is_built(), reason="DeepSpeed's CPU Adam is not compiled here; `make cpu-adam` does")
def test_every_combination_with_cpu_adam_too() -> None:
    # From torch's AdamW, whose state it takes over, and back.
    adamw = [c for c in supported() if c == (2, False, "fp32", "adamw")]
    check(walk([*adamw, *(c for c in supported() if c.optimizer == "cpu_adam"), *adamw]))
