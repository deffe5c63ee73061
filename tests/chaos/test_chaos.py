"""A run that everything happens to is, step by step, the run that nothing happens to; `make chaos` plays a longer one."""

from pathlib import Path

import pytest

from tests.chaos.chaos import Chaos
from tests.chaos.schedule import KINDS, MOST_NANS, schedule


def test_schedules_are_of_all_kinds_and_a_function_of_their_seed() -> None:
    for seed in range(50):
        events = schedule(seed, 24)
        assert events == schedule(seed, 24)
        assert {event.kind for event in events[: len(KINDS)]} == set(KINDS)
        assert sum(event.kind == "nan" for event in events) <= MOST_NANS
    assert schedule(0, 24) != schedule(1, 24)


@pytest.mark.timeout(900)
def test_each_trouble_once(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, schedule(seed=6, count=len(KINDS)), print)
    chaos.play()
    print(chaos.compare())
