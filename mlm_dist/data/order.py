"""Order: which block comes when. A pure function of (block sizes, lanes, seed, epoch)."""

import heapq

import numpy as np

from mlm_dist.data.rng import permutation

MAX_LANES = 960
# Below this many blocks a lane, lanes are evened out by bytes; above, dealing in turn is as even and needs no Python loop.
GREEDY_BLOCKS = 1000


def default_lanes(global_batch: int, num_blocks: int) -> int:
    """min(global_batch, blocks // 16, 960), at least 1: enough blocks in every lane that lanes end together."""
    return max(1, min(global_batch, num_blocks // 16, MAX_LANES))


class Order:
    """The lanes' block lists, epoch by epoch.

    Args:
        sizes: int64 [n], bytes of each block in manifest order.
        lanes: number of lanes, fixed for the run.
        shuffle: False gives the natural order, dealt in turn (validation).
    """

    def __init__(self, sizes: np.ndarray, lanes: int, seed: int, shuffle: bool = True):
        self.sizes, self.lanes, self.seed, self.shuffle = np.asarray(sizes, np.int64), lanes, seed, shuffle
        self._cache: dict[int, list[np.ndarray]] = {}

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Block numbers of every lane in ``epoch``: ``lanes`` int32 arrays that hold each block once."""
        if epoch not in self._cache:
            # Lanes are at most about an epoch apart: two epochs are enough to keep.
            for old in [e for e in self._cache if e < epoch - 1]:
                del self._cache[old]
            self._cache[epoch] = self._deal(epoch)
        return self._cache[epoch]

    def _deal(self, epoch: int) -> list[np.ndarray]:
        n = len(self.sizes)
        if not self.shuffle:
            return [np.arange(lane, n, self.lanes, dtype=np.int32) for lane in range(self.lanes)]
        order = permutation(n, self.seed, epoch, "epoch", "order").astype(np.int32)
        # The first lanes get what is left over: each epoch others are first, or the same lanes would fall behind in every one.
        shift = epoch % self.lanes
        if n >= GREEDY_BLOCKS * self.lanes:
            return [order[(lane + shift) % self.lanes :: self.lanes] for lane in range(self.lanes)]
        loads = [(0, lane) for lane in range(self.lanes)]
        out: list[list[int]] = [[] for _ in range(self.lanes)]
        for block in order.tolist():
            load, lane = loads[0]
            out[lane].append(block)
            heapq.heapreplace(loads, (load + int(self.sizes[block]), lane))
        return [np.asarray(blocks, np.int32) for blocks in out[shift:] + out[:shift]]

    def lane_bytes(self, epochs: int) -> np.ndarray:
        """Bytes of every lane over the first ``epochs`` epochs, int64 [lanes]."""
        total = np.zeros(self.lanes, np.int64)
        for epoch in range(epochs):
            total += [int(self.sizes[blocks].sum()) for blocks in self._deal(epoch)]
        return total

    def tail_fill(self, epochs: int) -> float:
        """Share of rows that are live in the last tenth of a run of ``epochs`` epochs, by bytes."""
        total = self.lane_bytes(epochs)
        tenth = total.max() / 10
        return float(np.clip(total - 9 * tenth, 0, tenth).mean() / tenth) if tenth else 0.0
