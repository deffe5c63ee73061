"""Which ranks are slow, and that chance names none."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlm_dist.clock import COMMUNICATION
from mlm_dist.stragglers import CAUSES, LOOKS, QUESTIONS, WINDOW, Straggler, StragglerWatch, find

SEEDS, RANKS = st.integers(0, 2**32 - 1), st.integers(2, 64)


def noisy(ranks: int, seed: int, noise: float = 0.04) -> np.ndarray:
    """A step of 1 s: data 0.02, compute 0.98, messages of 1 ms, each rank's within a share ``noise`` of the step."""
    spread = np.random.default_rng(seed).uniform(-noise, noise, (ranks, 3)) * np.array([0.3, 0.5, 0.3])
    return np.array([0.02, 0.98, 0.001]) + spread


@given(RANKS, SEEDS)
def test_ordinary_noise_names_no_rank(ranks: int, seed: int) -> None:
    assert find(noisy(ranks, seed)) == []


@given(st.integers(2, 500), SEEDS)
def test_noise_of_less_than_5_ms_names_no_rank_however_short_the_step(ranks: int, seed: int) -> None:
    times = np.random.default_rng(seed).uniform(0.0, 0.005, (ranks, 3))
    assert find(times) == []


@given(st.integers(3, 64), SEEDS, st.sampled_from(range(3)), st.floats(0.25, 20.0), st.data())
def test_a_slow_rank_is_named_with_its_cause_and_no_other(
    ranks: int, seed: int, cause: int, delay: float, data: st.DataObject
) -> None:
    times, rank = noisy(ranks, seed), data.draw(st.integers(0, ranks - 1))
    times[rank, cause] += delay * max(1.0, float(times[:, :2].sum(1).max()) / 1.0) * 1.5
    (found,) = find(times)
    assert (found.rank, found.cause, found.seconds) == (rank, CAUSES[cause], times[rank, cause])
    assert found.median < 1.1


@given(RANKS, SEEDS, st.randoms(use_true_random=False))
def test_names_follow_the_ranks(ranks: int, seed: int, random: Any) -> None:
    times = noisy(ranks, seed, noise=2.0)
    order = list(range(ranks))
    random.shuffle(order)
    moved = {(order[s.rank], s.cause) for s in find(times[order])}
    assert moved == {(s.rank, s.cause) for s in find(times)}


def test_of_two_ranks_one_can_be_slow() -> None:
    assert find(np.array([[0.0, 0.2, 0.0], [0.0, 0.1, 0.0]])) == [Straggler(0, "compute", 0.2, 0.1)]


class Ranks:
    """Stands in for the control group of rank 0; gives the answers of all."""

    rank = 0

    def __init__(self, times: np.ndarray) -> None:
        self.times, self.world_size = times, len(times)

    def gather(self, obj: Any) -> list[Any]:
        return [f"node{rank}" for rank in range(self.world_size)]

    def ask(self, values: Sequence[float]) -> tuple[list[list[float]], list[float]]:
        answers = self.times[:, :2].tolist()
        if values:
            answers[0] = list(values)
        return answers, [0.0, *self.times[1:, 2].tolist()]


class Watched:
    """A watch over three ranks of which rank 0 is really measured, by a clock that steps by hand."""

    def __init__(self) -> None:
        self.ranks = Ranks(np.array([[0.0, 0.0, 0.0], [0.01, 0.1, 0.001], [0.01, 0.1, 0.001]]))
        self.clock = {"span": 0.0, "data": 0.0, "forward": 0.0, COMMUNICATION: 0.0}
        self.said: list[tuple[int, dict[str, Any]]] = []
        self.done = 0
        self.watch = StragglerWatch(
            self.ranks, lambda: dict(self.clock), lambda line, event: self.said.append((self.done, event))
        )

    def steps(self, count: int, host: float = 0.0) -> None:
        """Steps in which rank 0 spends so much outside of any phase."""
        for _ in range(count):
            self.done += 1
            spent = {"data": 0.01, "forward": 0.1, COMMUNICATION: 0.5}
            for phase, seconds in {**spent, "span": sum(spent.values()) + host}.items():
                self.clock[phase] += seconds
            self.watch.step()


def test_a_straggler_is_told_of_once_within_50_steps_and_so_is_its_end() -> None:
    watched = Watched()
    watched.steps(5 * WINDOW)
    assert watched.said == []
    watched.ranks.times[2, 1] += 0.2
    watched.steps(10 * WINDOW)
    ((step, event),) = watched.said
    assert step - 5 * WINDOW == LOOKS * WINDOW <= 50
    assert (event["kind"], event["rank"], event["host"], event["cause"]) == ("straggler", 2, "node2", "compute")
    assert abs(event["seconds"] - 0.3) < 1e-9 and abs(event["median"] - 0.1) < 1e-9
    assert (watched.watch.slowest["slowest_rank"], watched.watch.slowest["slowest_host"]) == (2, "node2")
    assert abs(watched.watch.slowest["slowest_excess"] - 0.2) < 1e-9
    watched.ranks.times[2, 1] -= 0.2
    watched.steps(5 * WINDOW)
    assert [e["kind"] for _, e in watched.said] == ["straggler", "straggler_gone"]


def test_another_cause_is_told_of_and_a_single_slow_look_is_not() -> None:
    watched = Watched()
    watched.ranks.times[1, 2] += 0.2
    watched.steps(2 * WINDOW)
    watched.ranks.times[1, 0] += 0.2
    watched.steps(WINDOW)
    watched.ranks.times[1, 0] -= 0.2
    watched.steps(3 * WINDOW)
    assert [(e["rank"], e["cause"]) for _, e in watched.said] == [(1, "communication")]
    assert QUESTIONS >= 2  # one answer that is late by chance is none


def test_what_a_rank_does_outside_of_all_phases_is_its_own_time_and_waiting_for_others_is_not() -> None:
    watched = Watched()
    watched.steps(2 * WINDOW, host=0.2)
    assert [(e["rank"], e["cause"]) for _, e in watched.said] == [(0, "compute")]
    assert abs(watched.said[0][1]["seconds"] - 0.3) < 1e-9
