"""Order: which block comes when. A pure function of (block sizes and weights of each corpus, lanes, seed, epoch)."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mlm_dist.data.rng import Shuffle

MAX_LANES = 960
# Below this many blocks a lane, lanes are evened out by bytes; above, dealing in turn is as even and needs no Python loop over all blocks.
GREEDY_BLOCKS = 1000
# Nor is that loop affordable beyond so many blocks (half a second, in each worker), however few a lane has.
GREEDY_MOST = 500_000
# A lane's bytes over many epochs are counted over as many epochs as hold this many blocks, then scaled: with more, nothing moves but the clock.
COUNTED_BLOCKS = 4_000_000


def default_lanes(smallest_batch: int, num_blocks: int) -> int:
    """min(smallest_batch, blocks // 16, 960), at least 1: a row of every lane in each batch, and enough blocks in every lane that lanes end together."""
    return max(1, min(smallest_batch, num_blocks // 16, MAX_LANES))


@dataclass(frozen=True)
class Place:
    """A block's turn.

    Attributes:
        source: the corpus.
        epoch: which time this corpus gives its blocks; with weights it has epochs of its own.
        block: the block's number in it.
    """

    source: int
    epoch: int
    block: int


class Order:
    """The lanes' block lists, epoch by epoch.

    Without weights an epoch holds each block of each corpus once. With weights w it holds as many bytes as all corpora together, of which corpus s has the
    share w_s / sum(w), to the nearest block: each corpus goes on through epochs of its own, shuffled anew, so none of its blocks comes a second time before all
    have come once.

    Args:
        sizes: one int array [n_s] for each corpus: bytes of each block in manifest order.
        lanes: number of lanes, fixed for the run.
        weights: positive numbers, one for each corpus, or None.
        shuffle: False gives the natural order, dealt in turn (validation).
    """

    def __init__(
        self,
        sizes: Sequence[np.ndarray],
        lanes: int,
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
    ):
        assert shuffle or weights is None
        self.sizes, self.lanes, self.seed, self.weights, self.shuffle = list(sizes), lanes, seed, weights, shuffle
        counts = [len(s) for s in self.sizes]
        self._quotas = [Fraction(n) for n in counts]
        if weights is not None:
            bytes_of = [max(1, int(s.sum(dtype=np.int64))) for s in self.sizes]
            total = sum(bytes_of)
            shares = [Fraction(w) / sum(map(Fraction, weights)) for w in weights]
            self._quotas = [w * total * n / size for w, n, size in zip(shares, counts, bytes_of, strict=True)]
        self._cache: dict[int, list[np.ndarray] | Shuffle] = {}
        self._lists: dict[int, dict[int, np.ndarray]] = {}
        self._inner: dict[tuple[int, int], Shuffle] = {}
        self._turns: dict[int, list[tuple[int, int]]] = {}

    def blocks(self, epoch: int, lane: int) -> np.ndarray:
        """What ``lane`` reads in ``epoch``, int [k]: numbers that ``place`` takes. For one corpus without weights they are its block numbers.

        Over the lanes each number below ``count(epoch)`` is there once. Only what is asked for is made when there are many blocks.
        """
        if epoch not in self._lists:
            # Lanes are at most about an epoch apart: two epochs are enough to keep.
            self._lists = {e: lists for e, lists in self._lists.items() if e >= epoch - 1} | {epoch: {}}
        lists = self._lists[epoch]
        if lane not in lists:
            lists[lane] = self._deal(epoch, lane)
        return lists[lane]

    def count(self, epoch: int) -> int:
        """Blocks of ``epoch`` over all lanes."""
        return sum(stop - start for start, stop in self._spans(epoch))

    def place(self, epoch: int, number: int) -> Place:
        """Which block it is that has ``number`` in ``epoch``."""
        for source, (start, stop) in enumerate(self._spans(epoch)):
            if number < stop - start:
                turn = start + number
                inner, n = turn // len(self.sizes[source]), len(self.sizes[source])
                block = turn % n
                return Place(source, inner, int(self._shuffled(source, inner, np.asarray([block]))[0]))
            number -= stop - start
        raise IndexError(f"epoch {epoch} has no block of this number")

    def size(self, place: Place) -> int:
        """Bytes of the block."""
        return int(self.sizes[place.source][place.block])

    def _spans(self, epoch: int) -> list[tuple[int, int]]:
        """For each corpus the turns [start, stop) that fall into ``epoch``; turn t is block t mod n of its epoch t // n."""
        if epoch not in self._turns:
            self._turns[epoch] = [(int(epoch * q), int((epoch + 1) * q)) for q in self._quotas]
        return self._turns[epoch]

    def _shuffled(self, source: int, epoch: int, index: np.ndarray) -> np.ndarray:
        """Blocks at ``index`` of a corpus' own epoch. Where epochs are whole, the outer shuffle is enough."""
        if self.weights is None:
            return index
        key = source, epoch
        if key not in self._inner:
            for old in [k for k in self._inner if k[0] == source and k[1] < epoch - 1]:
                del self._inner[old]
            self._inner[key] = Shuffle(len(self.sizes[source]), self.seed, epoch, "source", source, "order")
        return self._inner[key](index)

    def _deal(self, epoch: int, lane: int) -> np.ndarray:
        n = self.count(epoch)
        if not self.shuffle:
            return np.arange(lane, n, self.lanes)
        # The first lanes get what is left over: each epoch others are first, or the same lanes would fall behind in every one.
        shift = epoch % self.lanes
        if epoch not in self._cache:
            for old in [e for e in self._cache if e < epoch - 1]:
                del self._cache[old]
            shuffle = Shuffle(n, self.seed, epoch, "epoch", "order")
            greedy = n < min(GREEDY_BLOCKS * self.lanes, GREEDY_MOST)
            self._cache[epoch] = self._greedy(epoch, n, shuffle) if greedy else shuffle
        dealt = self._cache[epoch]
        if isinstance(dealt, Shuffle):
            return dealt(np.arange((lane + shift) % self.lanes, n, self.lanes))
        return dealt[(lane + shift) % self.lanes]

    def _greedy(self, epoch: int, n: int, shuffle: Shuffle) -> list[np.ndarray]:
        """Each block, in shuffled order, to the lane that has the fewest bytes."""
        order = shuffle(np.arange(n)).astype(np.int32)
        loads = [(0, lane) for lane in range(self.lanes)]
        out: list[list[int]] = [[] for _ in range(self.lanes)]
        for block, size in zip(order.tolist(), self._sizes_of(epoch)[order].tolist(), strict=True):
            load, lane = loads[0]
            out[lane].append(block)
            heapq.heapreplace(loads, (load + size, lane))
        return [np.asarray(blocks, np.int32) for blocks in out]

    def _sizes_of(self, epoch: int) -> np.ndarray:
        """Bytes of every number of ``epoch``."""
        parts = []
        for source, (start, stop) in enumerate(self._spans(epoch)):
            n = len(self.sizes[source])
            for inner in range(start // n, -(-stop // n)):
                index = np.arange(max(start, inner * n), min(stop, (inner + 1) * n)) - inner * n
                parts.append(self.sizes[source][self._shuffled(source, inner, index)])
        return np.concatenate(parts)

    def lane_bytes(self, epochs: int) -> np.ndarray:
        """Bytes of every lane over the first ``epochs`` epochs, float64 [lanes]."""
        counted = min(epochs, max(1, COUNTED_BLOCKS // self.count(0)))
        total = np.zeros(self.lanes, np.int64)
        for epoch in range(counted):
            sizes = self._sizes_of(epoch)
            total += [int(sizes[self._deal(epoch, lane)].sum(dtype=np.int64)) for lane in range(self.lanes)]
        return total * (epochs / counted)

    def tail_fill(self, epochs: int) -> float:
        """Share of rows that are live in the last tenth of a run of ``epochs`` epochs, by bytes."""
        total = self.lane_bytes(epochs)
        tenth = total.max() / 10
        return float(np.clip(total - 9 * tenth, 0, tenth).mean() / tenth) if tenth else 0.0
