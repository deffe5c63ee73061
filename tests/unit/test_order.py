"""Order: every block once an epoch, lanes that end together, the same order for everybody who computes it."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_dist.data.order import Order, default_lanes
from mlm_dist.data.rng import Shuffle

SIZES = np.random.Generator(np.random.PCG64(0)).integers(512, 8192, 300)


def lists(order: Order, epoch: int) -> list[np.ndarray]:
    return [order.blocks(epoch, lane) for lane in range(order.lanes)]


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.lists(st.integers(512, 1 << 20), min_size=1, max_size=150),
    lanes=st.integers(1, 20),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_every_block_once_an_epoch(sizes: list[int], lanes: int, seed: int, epoch: int, shuffle: bool) -> None:
    dealt = lists(Order([np.asarray(sizes)], lanes, seed, shuffle=shuffle), epoch)
    assert len(dealt) == lanes
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(sizes)))


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(512, 1 << 20), min_size=1, max_size=300),
    lanes=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_lanes_differ_by_less_than_a_block(sizes: list[int], lanes: int, seed: int) -> None:
    loads = Order([np.asarray(sizes)], lanes, seed).lane_bytes(1)
    assert loads.sum() == sum(sizes)
    assert loads.max() - loads.min() <= max(sizes)


def test_many_blocks_a_lane_are_even_too() -> None:
    sizes = np.random.Generator(np.random.PCG64(1)).integers(4096, 8192, 12_007)
    order = Order([sizes], 4, seed=3)
    dealt = lists(order, 0)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(sizes)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    loads = order.lane_bytes(1)
    assert loads.max() < 1.02 * loads.min()


def test_two_hundred_thousand_blocks_over_the_most_lanes() -> None:
    sizes = np.random.Generator(np.random.PCG64(2)).integers(1 << 18, 1 << 20, 200_000)
    order = Order([sizes], default_lanes(4096, len(sizes)), seed=1)
    dealt = lists(order, 0)
    assert len(dealt) == 960
    assert (np.bincount(np.concatenate(dealt), minlength=len(sizes)) == 1).all()
    assert order.tail_fill(1) > 0.9


def flat(order: Order, epoch: int) -> list[list[int]]:
    return [lane.tolist() for lane in lists(order, epoch)]


def test_a_pure_function_of_seed_and_epoch() -> None:
    order = Order([SIZES], 5, seed=1)
    epochs = [flat(order, e) for e in range(4)]
    assert len({str(e) for e in epochs}) == 4
    np.random.seed(0)
    fresh = Order([SIZES], 5, seed=1)
    assert [flat(fresh, e) for e in (3, 0, 2, 1)] == [epochs[e] for e in (3, 0, 2, 1)]  # in whatever order asked
    assert flat(Order([SIZES], 5, seed=2), 0) != epochs[0]
    assert flat(Order([SIZES], 6, seed=1), 0) != epochs[0]


def test_the_order_stays_from_release_to_release() -> None:
    """A run that was begun with an older version must go on with the same data."""
    digest = hashlib.sha256(str([flat(Order([SIZES], 5, seed=1), e) for e in range(2)]).encode()).hexdigest()
    assert digest[:16] == "1378550fe224a0f4"


def test_the_shuffle_is_no_shift_of_the_manifest() -> None:
    whole = Order([SIZES], 1, seed=1).blocks(0, 0)
    steps = np.diff(whole.astype(np.int64))
    assert (np.abs(steps) <= 1).mean() < 0.05
    assert abs(np.corrcoef(whole, np.arange(len(whole)))[0, 1]) < 0.25


@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_natural_order_for_validation(lanes: int) -> None:
    order = Order([SIZES], lanes, seed=1, shuffle=False)
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
    assert Order([SIZES], 1, seed=0).tail_fill(3) == pytest.approx(1.0)
    assert Order([np.full(640, 4096)], 8, seed=0).tail_fill(1) == pytest.approx(1.0)
    # One block is as large as all others together: three of four lanes have ended long before.
    giant = np.asarray([4096] * 60 + [4096 * 60])
    assert Order([giant], 4, seed=0).tail_fill(1) == pytest.approx(0.25)
    # Over more epochs the same unevenness is a smaller part of the run.
    few = np.asarray([4096] * 9)
    assert Order([few], 4, seed=0).tail_fill(1) < 0.5 < Order([few], 4, seed=0).tail_fill(20)


def test_more_lanes_than_blocks_leaves_some_empty() -> None:
    order = Order([SIZES[:3]], 5, seed=0)
    assert sorted(len(lane) for lane in lists(order, 0)) == [0, 0, 1, 1, 1]
    assert order.tail_fill(1) < 1


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    lanes=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_a_weighted_corpus_gives_each_block_once_before_any_twice(
    counts: list[int], weights: list[float], lanes: int, seed: int
) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    order = Order([rng.integers(512, 4096, n) for n in counts], lanes, seed, weights[: len(counts)])
    seen = [0] * len(counts)
    for epoch in range(4):
        numbers = sorted(int(b) for lane in lists(order, epoch) for b in lane)
        assert numbers == list(range(order.count(epoch)))
        places = [order.place(epoch, number) for number in numbers]
        for source, n in enumerate(counts):
            mine = [(p.epoch, p.block) for p in places if p.source == source]
            # Turns follow on from the epoch before: its own epochs in order, each block once in each.
            turns = range(seen[source], seen[source] + len(mine))
            assert sorted(e for e, _ in mine) == [t // n for t in turns]
            seen[source] += len(mine)
            assert len(set(mine)) == len(mine)


def test_weights_are_shares_of_the_bytes() -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    sizes = [rng.integers(1000, 9000, 400), rng.integers(30_000, 90_000, 50), rng.integers(500, 2000, 300)]
    order = Order(sizes, 4, 0, [2.0, 1.0, 1.0])
    spent, blocks = np.zeros(3), [[], [], []]
    for epoch in range(6):
        places = [order.place(epoch, int(b)) for lane in lists(order, epoch) for b in lane]
        for place in places:
            spent[place.source] += order.size(place)
            blocks[place.source].append((place.epoch, place.block))
    assert spent.sum() == pytest.approx(6 * sum(s.sum() for s in sizes), rel=0.02)
    assert spent / spent.sum() == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    assert all(len(b) == len({*b}) for b in blocks)


def test_corpora_without_weights_are_whole_once_an_epoch() -> None:
    order = Order([SIZES, SIZES[:40]], 3, seed=1)
    for epoch in range(2):
        places = [order.place(epoch, int(b)) for lane in lists(order, epoch) for b in lane]
        assert {p.epoch for p in places} == {epoch}
        assert sorted((p.source, p.block) for p in places) == [(0, b) for b in range(300)] + [(1, b) for b in range(40)]


@pytest.mark.parametrize("n", [1, 2, 1000, (1 << 20) + 1, 3_000_017])
def test_shuffle_is_a_permutation_that_looks_random(n: int) -> None:
    shuffle = Shuffle(n, 1, "test")
    values = shuffle(np.arange(n))
    assert (np.bincount(values, minlength=n) == 1).all()
    assert shuffle(np.asarray([n - 1, 0])).tolist() == [values[-1], values[0]]
    if n >= 1000:
        assert (values != Shuffle(n, 2, "test")(np.arange(n))).mean() > 0.99
        # Places and values are uncorrelated, and so are neighbours: within 5 sigma of a fair permutation.
        for other in (np.arange(n), np.roll(values, 1)):
            assert abs(np.corrcoef(values, other)[0, 1]) < 5 / n**0.5
        # As many values of each sixteenth in each sixteenth of the places.
        table = np.histogram2d(np.arange(n), values, bins=16)[0]
        assert (np.abs(table - n / 256) < 5 * (n / 256) ** 0.5 + 1).all()


@pytest.mark.parametrize("lanes", [960, 4096 * 8])
def test_ten_million_blocks_are_dealt_lane_by_lane(lanes: int) -> None:
    """A worker makes the lanes that it serves and no others; none of them holds a block of another."""
    n = 10_000_000
    sizes = np.random.Generator(np.random.PCG64(0)).integers(900_000, 1 << 20, n, np.uint32)
    order = Order([sizes], lanes, seed=3)
    tracemalloc.start()
    mine = order.blocks(1, 7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20
    seen = np.zeros(n, bool)
    looked_at = range(0, lanes, max(1, lanes // 2000))
    loads = np.zeros(len(looked_at))
    for i, lane in enumerate(looked_at):
        blocks = order.blocks(1, lane)
        assert abs(len(blocks) - len(mine)) <= 1 and not seen[blocks].any()
        seen[blocks] = True
        loads[i] = sizes[blocks].sum(dtype=np.int64)
    assert seen.all() or lanes > 2000
    assert loads.max() < 1.02 * loads.mean() and loads.min() > 0.98 * loads.mean()
