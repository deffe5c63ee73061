"""The verdict on what ranks say of themselves."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_dist.clock import COMMUNICATION
from mlm_dist.lifecycle import EXIT_HUNG
from mlm_dist.watchdog import Post, blame, collective_timeout, judge

LIMIT = 10.0


def post(rank: int, phase: str = COMMUNICATION, *, step: int = 5, count: int = 80, idle: float = 12.0) -> Post:
    return Post(rank, f"host{rank}", beat=7, step=step, phase=phase, count=count, idle=idle, limit=LIMIT)


def later(posts: list[Post], silent: tuple[int, ...] = ()) -> list[Post]:
    return [p if p.rank in silent else replace(p, beat=p.beat + 3) for p in posts]


def test_the_rank_that_does_not_wait_for_others_is_behind() -> None:
    posts = [post(0), post(1, "forward"), post(2)]
    verdict = judge(posts, later(posts))
    assert verdict is not None and verdict.code == EXIT_HUNG
    assert [p["rank"] for p in verdict.behind] == [1]
    assert "rank 1 on host1 is in step 5, forward; the others wait in step 5, communication" in verdict.reason


def test_a_rank_that_is_not_heard_of_comes_before_all_and_does_not_speak() -> None:
    posts = [post(0, idle=0.3), post(1, "forward"), post(2)]
    verdict = judge(posts, later(posts, silent=(0,)))
    assert verdict is not None and [p["rank"] for p in verdict.behind] == verdict.silent == [0]
    assert verdict.rank == 1


def test_of_ranks_that_all_wait_those_that_have_done_least_are_behind() -> None:
    posts = [post(0), post(1, count=79), post(2)]
    assert [p.rank for p in blame(posts, [])] == [1]
    posts = [post(0), post(1), post(2, step=4, count=99)]
    assert [p.rank for p in blame(posts, [])] == [2]
    verdict = judge(posts := [post(0), post(1)], later(posts))
    assert verdict is not None and "all 2 ranks are in step 5, communication" in verdict.reason


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6), st.data())
def test_no_verdict_while_any_rank_that_is_heard_of_moves(idles: list[float], data: st.DataObject) -> None:
    silent = tuple(data.draw(st.sets(st.integers(0, len(idles) - 1))))
    posts = [post(rank, idle=idle) for rank, idle in enumerate(idles)]
    heard = [p.idle for p in posts if p.rank not in silent]
    verdict = judge(posts, later(posts, silent))
    assert (verdict is None) == (not heard or min(heard) < LIMIT)


def test_a_rank_in_a_slow_phase_gets_the_patience_of_that_phase() -> None:
    posts = [post(0), replace(post(1, "checkpoint"), limit=1800.0)]
    assert judge(posts, later(posts)) is None


def test_a_rank_that_was_last_heard_of_in_a_slow_phase_gets_no_patience() -> None:
    posts = [post(0), replace(post(1, "start"), limit=1800.0)]
    verdict = judge(posts, later(posts, silent=(1,)))
    assert verdict is not None and verdict.silent == [1]


def test_the_first_rank_that_is_not_behind_speaks() -> None:
    posts = [post(0, "checkpoint"), post(1), post(2)]
    verdict = judge(posts, later(posts))
    assert verdict is not None and [p["rank"] for p in verdict.behind] == [0] and verdict.rank == 1


def test_many_ranks_behind_make_no_endless_reason() -> None:
    posts = [post(rank, "data") for rank in range(500)] + [post(500)]
    verdict = judge(posts, later(posts))
    assert verdict is not None and len(verdict.behind) == 500
    assert "and 492 more" in verdict.reason and len(verdict.reason) < 1000


@pytest.mark.parametrize("timeout", [1.0, 60.0, 1800.0])
def test_collectives_give_up_after_the_watchdog(timeout: float) -> None:
    # Without rank 0 it takes up to 21 of its periods more.
    assert collective_timeout(timeout) > timeout + 21 * min(1.0, timeout / 10)
