"""Saved on any number of ranks at any stage, resumed on any other at any other.

The pairs that are walked are computed: in fp32 every (ranks, stage) to every (ranks, stage); with offload and the other
precisions a design that covers every two values of the eight that a resume has. `make resize-matrix` walks more: all the
steps in each pair, and every three values.
"""

from __future__ import annotations

import os
from itertools import combinations, product
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest

from mlm_dist.combinations import Precision, refusal
from tests.dist.resize_cases import Origin, Resume, Setup
from tests.forked import run_forked

FULL = os.environ.get("MLM_RESIZE_MATRIX") == "1"
TIMEOUT = 5400 if FULL else 1000
pytestmark = pytest.mark.timeout(TIMEOUT + 20)
WORLDS, STAGES = range(1, 5), range(4)
HALF = 25
# A low precision resumed in another is near the first for some steps only.
STEPS, NEAR = 2, 2e-2


def setups() -> list[Setup]:
    """All that can be written down and is not refused."""
    every = (Setup(*values) for values in product(WORLDS, STAGES, (False, True), get_args(Precision)))
    return [setup for setup in every if refusal(setup.combination) is None]


def covering(strength: int) -> list[tuple[Setup, Setup]]:
    """(saved from, resumed in): few, but so that any `strength` of their values that can occur together do. Greedy."""
    sides = setups()
    everything = [(a, b) for a in sides for b in sides]

    def groups(pair: tuple[Setup, Setup]) -> set[tuple[tuple[int, Any], ...]]:
        return set(combinations(enumerate(pair[0] + pair[1]), strength))

    missing = set().union(*map(groups, everything))
    draw, chosen = Random(6), []
    while missing:
        # One that is still missing is in a candidate at least, so the walk ends.
        wanted = dict(min(missing, key=repr))
        fitting = [pair for pair in everything if all((pair[0] + pair[1])[i] == v for i, v in wanted.items())]
        best = max(draw.sample(fitting, min(60, len(fitting))), key=lambda pair: len(groups(pair) & missing))
        chosen.append(best)
        missing -= groups(best)
    return chosen


def fp32() -> list[Setup]:
    return [Setup(world, stage, False, "fp32") for world, stage in product(WORLDS, STAGES)]


def all_steps(origin: Setup, target: Setup) -> bool:
    """Whether a pair of the fp32 matrix goes on for all the steps: one from each and one to each, other ranks and stage."""
    world = 1 + (origin.world + origin.stage % 3) % 4
    return FULL or (target.world, target.stage) == (world, (origin.stage + 1) % 4)


def plan() -> tuple[list[Origin], list[Resume]]:
    """All states to save, and all resumes of them."""
    undisturbed = Origin(Setup(2, 2, False, "fp32"), HALF, 2 * HALF)
    resumes = [
        Resume(Origin(a, HALF, HALF), b, HALF if all_steps(a, b) else 1, undisturbed) for a, b in product(fp32(), fp32())
    ]
    short = [(Origin(a, 3, 3 + STEPS), b) for a, b in covering(3 if FULL else 2)]
    short += [(Origin(a, 3, 3 + STEPS, dropout=0.1), a) for a in fp32()]
    resumes += [Resume(origin, target, STEPS, origin) for origin, target in short]
    origins = {origin for one in resumes for origin in (one.origin, one.reference)}
    return sorted(origins), sorted(resumes, key=lambda one: (one.target, one.origin))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of each resume, as rank 0 saw it. States are saved by some processes and resumed by others."""
    folder = str(tmp_path_factory.mktemp("states"))
    origins, resumes = plan()
    launches: list[tuple[int, dict[str, Any]]] = [
        *((w, {"folder": folder, "origins": [o for o in origins if o.setup.world == w]}) for w in WORLDS),
        *((w, {"folder": folder, "resumes": [r for r in resumes if r.target.world == w]}) for w in WORLDS),
    ]
    by_launch = run_forked("tests.dist.resize_cases:run", launches, timeout=TIMEOUT)
    got = [result for launch in by_launch[len(WORLDS) :] for result in launch[0]]
    assert [result["resume"] for result in got] == resumes
    report(got)
    return got


def report(got: list[dict[str, Any]]) -> None:
    for name, chosen in (("fp32", is_fp32), ("precision and offload", is_mixed), ("same, dropout", is_dropout)):
        part = [result for result in got if chosen(result["resume"])]
        print(f"{name}: {len(part)} resumes, largest loss difference {max(r['difference'] for r in part):.2e}")


def is_fp32(one: Resume) -> bool:
    return one.origin.at == HALF


def is_dropout(one: Resume) -> bool:
    return one.origin.dropout > 0


def is_mixed(one: Resume) -> bool:
    return not is_fp32(one) and not is_dropout(one)


def test_every_state_is_restored_to_the_bit_with_its_tie_and_groups(results: list[dict[str, Any]]) -> None:
    assert [(r["resume"], r["faults"]) for r in results if r["faults"]] == []


def test_fp32_goes_on_from_any_ranks_and_stage_on_any_others(results: list[dict[str, Any]]) -> None:
    part = [result for result in results if is_fp32(result["resume"])]
    assert {(r["resume"].origin.setup, r["resume"].target) for r in part} == set(product(fp32(), fp32()))
    assert [(r["resume"], r["difference"]) for r in part if r["difference"] > 1e-5] == []


def test_the_same_ranks_and_stage_go_on_to_the_bit_with_dropout(results: list[dict[str, Any]]) -> None:
    part = [result for result in results if is_dropout(result["resume"])]
    assert [r["resume"].target for r in part] == fp32()
    assert [r["resume"] for r in part if not r["to the bit"]] == []


def test_other_precisions_and_offload_go_on_near(results: list[dict[str, Any]]) -> None:
    part = [result for result in results if is_mixed(result["resume"])]
    assert [(r["resume"], r["difference"]) for r in part if r["difference"] > NEAR] == []
