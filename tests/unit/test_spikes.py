"""Which losses are spikes, and what is remembered of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_dist.spikes import LEAST, LEAST_RISE, SIGMA, WINDOW, SpikeGuard

CPU = torch.device("cpu")


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def guard(losses: list[float], sigmas: float = 6.0) -> SpikeGuard:
    made = SpikeGuard(sigmas, CPU)
    for loss in losses:
        made.accept(scalar(loss))
    return made


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.5, 20), min_size=0, max_size=3 * WINDOW),
    st.floats(0, 100),
    st.floats(1, 20),
)
def test_the_rule_is_the_median_of_the_last_128(losses: list[float], loss: float, sigmas: float) -> None:
    recent = np.asarray(losses[-WINDOW:])
    expected = False
    if len(losses) >= LEAST:
        # torch's median of an even number of values is the lower one.
        median = np.sort(recent)[(len(recent) - 1) // 2]
        deviation = SIGMA * np.sort(np.abs(recent - median))[(len(recent) - 1) // 2]
        expected = bool(loss - median > max(sigmas * deviation, LEAST_RISE * median))
    assert bool(guard(losses, sigmas).is_spike(scalar(loss))) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.5, 20), max_size=3 * WINDOW), st.lists(st.floats(0.5, 20), max_size=WINDOW + 3))
def test_state_carries_on(losses: list[float], more: list[float]) -> None:
    before = guard(losses)
    after = SpikeGuard(6.0, CPU)
    after.accept(scalar(1e6))
    after.load(before.state())
    for loss in more:
        before.accept(scalar(loss))
        after.accept(scalar(loss))
    assert after.state() == before.state() == (losses + more)[-WINDOW:]


def test_what_is_not_finite_is_no_spike() -> None:
    made = guard([3.0 + 0.01 * (i % 7) for i in range(LEAST)])
    assert not made.is_spike(scalar(math.nan))
    assert made.is_spike(scalar(5.0))
    assert not made.is_spike(scalar(math.inf))
    assert not made.is_spike(scalar(3.2))


@pytest.mark.parametrize("spikes", [1, 40])
def test_spikes_in_the_window_do_not_hide_the_next(spikes: int) -> None:
    losses = [3.0 + 0.01 * (i % 7) for i in range(WINDOW)]
    losses[-spikes:] = [50.0] * spikes
    assert guard(losses).is_spike(scalar(6.0))
