"""State gathered from one engine and restored into another: any stage, any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.test_engine import CASES, SMALL, VARIANTS, assert_near
from tests.ranks import run_ranks

SPAN = {"at": 3, "stop": 6}
# The stage that a state comes from, for each number of ranks that it was saved on.
ORIGINS = {1: SMALL[0], 2: SMALL[2], 3: SMALL[3]}
# Resumed to the bit on 2 ranks.
SAME = {"fp32": [*SMALL, VARIANTS[0]], "bf16": SMALL[2:4]}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[Any]]]:
    """By number of ranks, by rank: the results of `resume` and, on 2 ranks, of `resume_same` in fp32 and in bf16.

    States are saved by one launch and resumed by another, so nothing but the state comes over.
    """
    folder = tmp_path_factory.mktemp("states")
    paths = {world: str(folder / f"{world}.pt") for world in ORIGINS}
    same = [
        {"path": str(folder / f"{precision}.pt"), "precision": precision, "dropout": 0.1, **SPAN} for precision in SAME
    ]
    for world, template in ORIGINS.items():
        # Without dropout, so that the seeds of other ranks do not matter.
        saves = [("save", {"templates": [template], "path": paths[world], **SPAN})]
        if world == 2:
            saves += [("save", {"templates": t, **args}) for t, args in zip(SAME.values(), same, strict=True)]
        run_ranks(f"{CASES}:run", world, {"jobs": saves}, timeout=200)
    results = {}
    for world in ORIGINS:
        # Each stage on each number of ranks, from an origin that changes with both.
        pairs = [(template, paths[1 + (world + number) % 3]) for number, template in enumerate(SMALL)]
        jobs: list[tuple[str, dict[str, Any]]] = [("resume", {"pairs": pairs, **SPAN})]
        if world == 2:
            jobs += [("resume_same", args) for args in same]
        results[world] = run_ranks(f"{CASES}:run", world, {"jobs": jobs}, timeout=200)
    return results


@pytest.mark.parametrize("world", ORIGINS)
def test_another_stage_or_number_of_ranks_goes_on_with_the_same_losses(
    world: int, resumed: dict[int, list[list[Any]]]
) -> None:
    for got in resumed[world][0][0]:
        where = (got["template"], got["path"], world)
        assert got["restored"], where
        assert_near(got["got"], got["expected"], where, loss=1e-5, norm=1e-4)


def test_the_same_stage_and_ranks_go_on_to_the_bit_with_dropout(resumed: dict[int, list[list[Any]]]) -> None:
    for _, *same in resumed[2]:
        assert [len(results) for results in same] == [len(templates) for templates in SAME.values()]
        for got in (got for results in same for got in results):
            # Going on, the state at the end, and going back to before the first step in a used engine.
            assert (got["rest"], got["end"], got["again"]) == (True, True, True), got["template"]
