"""Order: every block once an epoch, lanes that end together, the same order for everybody who computes it."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_dist.data.order import Order, default_lanes

SIZES = np.random.Generator(np.random.PCG64(0)).integers(512, 8192, 300)


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.lists(st.integers(512, 1 << 20), min_size=1, max_size=150),
    lanes=st.integers(1, 20),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_every_block_once_an_epoch(sizes: list[int], lanes: int, seed: int, epoch: int, shuffle: bool) -> None:
    dealt = Order(np.asarray(sizes), lanes, seed, shuffle).epoch(epoch)
    assert len(dealt) == lanes
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(sizes)))


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(512, 1 << 20), min_size=1, max_size=300),
    lanes=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_lanes_differ_by_less_than_a_block(sizes: list[int], lanes: int, seed: int) -> None:
    loads = Order(np.asarray(sizes), lanes, seed).lane_bytes(1)
    assert loads.sum() == sum(sizes)
    assert loads.max() - loads.min() <= max(sizes)


def test_many_blocks_a_lane_are_even_too() -> None:
    sizes = np.random.Generator(np.random.PCG64(1)).integers(4096, 8192, 12_007)
    order = Order(sizes, 4, seed=3)
    dealt = order.epoch(0)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(sizes)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    loads = order.lane_bytes(1)
    assert loads.max() < 1.02 * loads.min()


def test_two_hundred_thousand_blocks_over_the_most_lanes() -> None:
    sizes = np.random.Generator(np.random.PCG64(2)).integers(1 << 18, 1 << 20, 200_000)
    order = Order(sizes, default_lanes(4096, len(sizes)), seed=1)
    dealt = order.epoch(0)
    assert len(dealt) == 960
    assert (np.bincount(np.concatenate(dealt), minlength=len(sizes)) == 1).all()
    assert order.tail_fill(1) > 0.9


def flat(order: Order, epoch: int) -> list[list[int]]:
    return [lane.tolist() for lane in order.epoch(epoch)]


def test_a_pure_function_of_seed_and_epoch() -> None:
    order = Order(SIZES, 5, seed=1)
    epochs = [flat(order, e) for e in range(4)]
    assert len({str(e) for e in epochs}) == 4
    np.random.seed(0)
    fresh = Order(SIZES, 5, seed=1)
    assert [flat(fresh, e) for e in (3, 0, 2, 1)] == [epochs[e] for e in (3, 0, 2, 1)]  # in whatever order asked
    assert flat(Order(SIZES, 5, seed=2), 0) != epochs[0]
    assert flat(Order(SIZES, 6, seed=1), 0) != epochs[0]


def test_the_order_stays_from_release_to_release() -> None:
    """A run that was begun with an older version must go on with the same data."""
    digest = hashlib.sha256(str([flat(Order(SIZES, 5, seed=1), e) for e in range(2)]).encode()).hexdigest()
    assert digest[:16] == "1378550fe224a0f4"


def test_the_shuffle_is_no_shift_of_the_manifest() -> None:
    whole = Order(SIZES, 1, seed=1).epoch(0)[0]
    steps = np.diff(whole.astype(np.int64))
    assert (np.abs(steps) <= 1).mean() < 0.05
    assert abs(np.corrcoef(whole, np.arange(len(whole)))[0, 1]) < 0.25


@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_natural_order_for_validation(lanes: int) -> None:
    order = Order(SIZES, lanes, seed=1, shuffle=False)
    dealt = flat(order, 0)
    turn = [dealt[i % lanes][i // lanes] for i in range(len(SIZES))]
    assert turn == list(range(len(SIZES)))
    assert flat(order, 1) == dealt


@pytest.mark.parametrize(
    ("batch", "blocks", "lanes"),
    [(32, 10_000, 32), (256, 1600, 100), (4096, 10**6, 960), (8, 1, 1), (8, 31, 1), (8, 32, 2), (1, 500, 1)],
)
def test_default_lanes(batch: int, blocks: int, lanes: int) -> None:
    assert default_lanes(batch, blocks) == lanes


def test_tail_fill_tells_even_lanes_from_uneven_ones() -> None:
    assert Order(SIZES, 1, seed=0).tail_fill(3) == pytest.approx(1.0)
    assert Order(np.full(640, 4096), 8, seed=0).tail_fill(1) == pytest.approx(1.0)
    # One block is as large as all others together: three of four lanes have ended long before.
    giant = np.asarray([4096] * 60 + [4096 * 60])
    assert Order(giant, 4, seed=0).tail_fill(1) == pytest.approx(0.25)
    # Over more epochs the same unevenness is a smaller part of the run.
    few = np.asarray([4096] * 9)
    assert Order(few, 4, seed=0).tail_fill(1) < 0.5 < Order(few, 4, seed=0).tail_fill(20)


def test_more_lanes_than_blocks_leaves_some_empty() -> None:
    order = Order(SIZES[:3], 5, seed=0)
    assert sorted(len(lane) for lane in order.epoch(0)) == [0, 0, 1, 1, 1]
    assert order.tail_fill(1) < 1
