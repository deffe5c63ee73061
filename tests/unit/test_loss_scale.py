"""The loss scale of fp16 against torch's own scaler."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_dist.loss_scale import LossScaler


class Quick(LossScaler):
    GROWTH_INTERVAL = 4


@settings(deadline=None)
@given(overflows=st.lists(st.booleans(), max_size=15))
def test_the_scale_moves_as_that_of_torch(overflows: list[bool]) -> None:
    ours, theirs = Quick(), torch.amp.GradScaler("cpu", growth_interval=Quick.GROWTH_INTERVAL)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs.scale(torch.zeros(()))  # its scale is made at the first use
    for overflow in overflows:
        if overflow:
            assert ours.overflowed()
        else:
            ours.applied()
        weight.grad = torch.full((1,), torch.inf if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        assert (ours.scale, ours.good_steps) == (theirs.get_scale(), theirs.state_dict()["_growth_tracker"])


def test_it_begins_and_grows_as_that_of_torch() -> None:
    theirs = torch.amp.GradScaler("cpu")
    theirs.scale(torch.zeros(()))
    assert (LossScaler().scale, LossScaler.GROWTH_INTERVAL) == (theirs.get_scale(), theirs.get_growth_interval())


def test_at_the_smallest_scale_an_overflow_is_not_its_fault() -> None:
    scaler = LossScaler(scale=2.0)
    assert scaler.overflowed()
    assert scaler.scale == LossScaler.SMALLEST
    assert not scaler.overflowed()
    assert scaler.scale == LossScaler.SMALLEST


def test_its_state_comes_back_and_none_begins_anew() -> None:
    scaler, other = LossScaler(), LossScaler()
    scaler.overflowed()
    scaler.applied()
    other.load(scaler.state())
    assert other == scaler != LossScaler()
    other.load(None)
    assert other == LossScaler()
