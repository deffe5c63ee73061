"""Flat micro-batches, the head in chunks and compiled layers under every ZeRO stage, on real processes over gloo."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.test_engine import SMALL_FLAT, SMALL_PARTS, assert_near
from tests.ranks import run_ranks

STAGES: list[Any] = ["zero0", ("zero1", SMALL_FLAT), ("zero2", SMALL_FLAT), ("zero3", SMALL_PARTS)]
CASES: list[dict[str, Any]] = [
    *({"template": stage, "flat": True} for stage in STAGES[::3]),
    *({"template": stage, "flat": True, "compile": "aot_eager"} for stage in STAGES),
    {"template": "zero3", "flat": False, "compile": "aot_eager"},
    {"template": "zero3", "flat": True, "compile": "aot_eager", "model": {"checkpoint_activations": True}},
]


def test_every_stage_gives_the_plain_loop_and_compiles_once() -> None:
    ranks = run_ranks("tests.dist.step_cases:run", 2, {"cases": CASES, "steps": 5}, timeout=240)
    for results in ranks:
        for result in results:
            case = result["case"]
            assert_near(result["got"], result["plain"], case, loss=1e-5, norm=1e-4)
            assert result["got"]["correct"] == result["plain"]["correct"], case
            measured, expected = result["evaluation"]
            assert measured == pytest.approx(expected, rel=1e-5), case
            assert result["breaks"] == 0, case
            # Two layers and five steps. Stage 3 puts other parameters in place of those that it was tried with, and
            # evaluation is a graph of its own.
            graphs = 0 if "compile" not in case else 2 if "zero3" in case["template"] else 1
            assert result["graphs"] == (graphs, graphs + (graphs > 0)), case
