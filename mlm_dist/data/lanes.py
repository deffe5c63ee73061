"""Lanes: a rank's endless sequences of rows, each with its cursor, and the messages in which loader workers hand them over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mlm_dist.data.batches import BatchSchedule
from mlm_dist.data.block import BlockError, BlockMaker, DataFault
from mlm_dist.data.order import Order
from mlm_dist.data.rows import Rows, ranges

# Tokens that one message from a worker holds, about: enough to make the hand-over cheap, few enough for an early first batch.
MESSAGE_TOKENS = 1 << 16

# (source, epoch, block) of blocks lost whole.
Lost = frozenset[tuple[int, int, int]]


class OpenBlock:
    """A block's rows while a lane gives them.

    Attributes:
        rows: R rows.
        tokens, segments, labels: R + 1 numbers, where each row begins in the flat arrays of ``rows`` and where the last ends.
        size: bytes of the block.
    """

    __slots__ = ("labels", "rows", "segments", "size", "tokens")

    def __init__(self, rows: Rows, size: int):
        self.rows, self.size = rows, size
        # Lists: they are read one number at a time.
        self.tokens, self.segments, self.labels = (
            [0, *np.cumsum(counts, dtype=np.int64).tolist()] for counts in (rows.lengths, rows.segments, rows.selected)
        )


class Run(NamedTuple):
    """Consecutive rows of one block, or the one harmless row of a lane without text.

    Attributes:
        block: the block, or None.
        start, stop: its rows.
        number: of the first of them in the run.
        epoch, position: the lane's, while they were taken.
        pending: bytes of blocks without rows passed on the way to the first.
        after: the lane's cursor behind them.
    """

    block: OpenBlock | None
    start: int
    stop: int
    number: int
    epoch: int
    position: int
    pending: int
    after: tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """What all lanes of a stream have in common.

    Attributes:
        makers: one for each corpus.
        order: over all of them.
        epochs: after which lanes end, or None.
        schedule: which batch a row belongs to.
        lost: (source, epoch, block) of the ledger: not read, whatever they hold now.
    """

    makers: Sequence[BlockMaker]
    order: Order
    epochs: int | None
    schedule: BatchSchedule
    lost: Lost

    def empty_rows(self, n: int) -> Rows:
        """n harmless rows."""
        tok = self.makers[0].tokenizer
        return Rows.empty(n, tok.cls_id, tok.sep_id, tok.dtype)

    @cached_property
    def empty_block(self) -> OpenBlock:
        """One harmless row as a block of no bytes."""
        return OpenBlock(self.empty_rows(1), 0)


class LaneReader:
    """Gives one lane's rows from a cursor on."""

    def __init__(self, plan: Plan, lane: int, cursor: Sequence[int]):
        self.plan, self.lane = plan, lane
        self.epoch, self.position, self.row = (int(c) for c in cursor)
        self._block: OpenBlock | None = None
        self._pending = 0

    def take(self, number: int, count: int) -> tuple[list[Run], list[tuple[int, DataFault]]]:
        """The lane's next ``count`` rows, of which the first has ``number`` in the run, and what was lost on the way to which."""
        runs: list[Run] = []
        faults: list[tuple[int, DataFault]] = []
        while count:
            if self._block is None:
                faults += [(number, fault) for fault in self._open(number)]
            block, start, epoch, position = self._block, self.row, self.epoch, self.position
            if block is None:
                # One empty row, then another look: how far a lane without text goes on must not depend on how many rows were asked for.
                taken = 1
            else:
                total = len(block.rows)
                taken = min(count, total - start)
                self.row += taken
                if self.row == total:
                    self._next_block()
            after = self.epoch, self.position, self.row
            runs.append(Run(block, start, start + taken, number, epoch, position, self._pending, after))
            self._pending = 0
            number, count = number + taken * self.plan.order.lanes, count - taken
        return runs, faults

    def _open(self, number: int) -> list[DataFault]:
        """Move to the next block that has rows, unless one is open; its next row has ``number`` in the run.

        Leaves ``_block`` None at the lane's end, or when a whole epoch of it holds no text.
        """
        plan = self.plan
        faults: list[DataFault] = []
        once_around = self.epoch + 1, self.position

        def steps(rows: int) -> np.ndarray:
            return plan.schedule.batch_of(number + (np.arange(rows) - self.row) * plan.order.lanes)

        while self._block is None and (plan.epochs is None or self.epoch < plan.epochs):
            if (self.epoch, self.position) >= once_around:
                break
            blocks = plan.order.blocks(self.epoch, self.lane)
            if self.position >= len(blocks):
                self.epoch, self.position, self.row = self.epoch + 1, 0, 0
                continue
            place = plan.order.place(self.epoch, int(blocks[self.position]))
            maker = plan.makers[place.source]
            size = plan.order.size(place)
            if (place.source, place.epoch, place.block) in plan.lost:
                rows = None
            else:
                rows, found = maker.rows(place.block, place.epoch, steps)
                if self.row and any(fault.whole for fault in found):
                    raise BlockError(
                        f"block {place.block} at byte {found[0].offset} of {found[0].shard}, of which {self.row} rows are in the run already, "
                        f"can no longer be read ({found[0].cause}). Bring the shard back."
                    )
                faults += found
            if rows is not None and len(rows):
                self._block = OpenBlock(rows, size)
                if self.position + 1 < len(blocks):
                    after = plan.order.place(self.epoch, int(blocks[self.position + 1]))
                    plan.makers[after.source].ahead(after.block)
            else:
                self._pending += size
                self._next_block()
        return faults

    def _next_block(self) -> None:
        self._block, self.row, self.position = None, 0, self.position + 1
        if self.position == len(self.plan.order.blocks(self.epoch, self.lane)):
            self.epoch, self.position = self.epoch + 1, 0


@dataclass
class Chunk:
    """Consecutive rows of some lanes with what belongs to each row.

    Attributes:
        rows: R rows.
        index: int64 [R], the row's number g in the run.
        cursors: int64 [R, 3], its lane's (epoch, index in the lane's list, row in the block) after it.
        bytes: int64 [R], corpus bytes that it accounts for.
        live: bool [R], False for the rows of a lane at its end.
        faults: (g, fault) found on the way to row g.
    """

    rows: Rows
    index: np.ndarray
    cursors: np.ndarray
    bytes: np.ndarray
    live: np.ndarray
    faults: list[tuple[int, DataFault]]

    @staticmethod
    def of(runs: Sequence[Run], faults: list[tuple[int, DataFault]], plan: Plan) -> "Chunk":
        """The rows of the runs, by their number."""
        if not runs:
            none = np.zeros(0, np.int64)
            return Chunk(plan.empty_rows(0), none, np.zeros((0, 3), np.int64), none, none.astype(bool), faults)
        empty = plan.empty_block
        blocks = [run.block or empty for run in runs]
        spans = [
            (block, run.start, run.stop) if run.block else (block, 0, 1)
            for block, run in zip(blocks, runs, strict=True)
        ]
        tokens = [slice(b.tokens[i], b.tokens[j]) for b, i, j in spans]
        segments = [slice(b.segments[i], b.segments[j]) for b, i, j in spans]
        labels = [slice(b.labels[i], b.labels[j]) for b, i, j in spans]
        rows = [slice(i, j) for _, i, j in spans]
        flat = Rows(
            ids=np.concatenate([b.rows.ids[s] for b, s in zip(blocks, tokens, strict=True)]),
            lengths=np.concatenate([b.rows.lengths[s] for b, s in zip(blocks, rows, strict=True)]),
            segment_lengths=np.concatenate([b.rows.segment_lengths[s] for b, s in zip(blocks, segments, strict=True)]),
            segments=np.concatenate([b.rows.segments[s] for b, s in zip(blocks, rows, strict=True)]),
            positions=np.concatenate([b.rows.positions[s] for b, s in zip(blocks, labels, strict=True)]),
            labels=np.concatenate([b.rows.labels[s] for b, s in zip(blocks, labels, strict=True)]),
            selected=np.concatenate([b.rows.selected[s] for b, s in zip(blocks, rows, strict=True)]),
        )
        facts = np.asarray(
            [
                (r.start, r.stop - r.start, r.number, r.epoch, r.position, r.pending, b.size, len(b.rows))
                for r, b in zip(runs, blocks, strict=True)
            ],
            np.int64,
        )
        counts = facts[:, 1]
        start, _, number, epoch, position, _, size, total = np.repeat(facts, counts, axis=0).T
        row = ranges(facts[:, 0], counts)
        ends = np.cumsum(counts)
        cursors = np.stack([epoch, position, row + 1], axis=1)
        cursors[ends - 1] = [run.after for run in runs]
        # A row accounts for the bytes between two marks, so that a block's rows sum to the block.
        spent = size * (row + 1) // total - size * row // total
        spent[ends - counts] += facts[:, 5]
        live = np.repeat([run.block is not None for run in runs], counts)
        return Chunk(flat, number + (row - start) * plan.order.lanes, cursors, spent, live, faults).sorted()

    @staticmethod
    def merge(parts: Sequence["Chunk"]) -> "Chunk":
        """All rows of the parts (at least one), by their number."""
        if len(parts) == 1:
            return parts[0]
        return Chunk(
            rows=Rows.concat([p.rows for p in parts]),
            index=np.concatenate([p.index for p in parts]),
            cursors=np.concatenate([p.cursors for p in parts]),
            bytes=np.concatenate([p.bytes for p in parts]),
            live=np.concatenate([p.live for p in parts]),
            faults=[f for p in parts for f in p.faults],
        ).sorted()

    def sorted(self) -> "Chunk":
        """The same rows by their number."""
        faults = sorted(self.faults, key=lambda f: (f[0], f[1].source, f[1].block))
        if (np.diff(self.index) > 0).all():
            return replace(self, faults=faults)
        order = np.argsort(self.index)
        return Chunk(
            rows=self.rows.take(order),
            index=self.index[order],
            cursors=self.cursors[order],
            bytes=self.bytes[order],
            live=self.live[order],
            faults=faults,
        )

    def slice(self, start: int, stop: int) -> "Chunk":
        """Rows start:stop, with the faults on their way."""
        index = self.index[start:stop]
        wanted = set(index.tolist()) if self.faults else set()
        return Chunk(
            rows=self.rows.slice(start, stop),
            index=index,
            cursors=self.cursors[start:stop],
            bytes=self.bytes[start:stop],
            live=self.live[start:stop],
            faults=[f for f in self.faults if f[0] in wanted],
        )


def rounds_in_message(plan: Plan, lanes: int) -> int:
    """Rows of each lane in one chunk of so many lanes. All workers of a rank take the same, that of the one with most lanes."""
    return max(1, MESSAGE_TOKENS // plan.makers[0].seq_len // lanes)


def read_lanes(plan: Plan, lanes: Sequence[int], first_row: int, cursors: np.ndarray, rounds: int) -> Iterator[Chunk]:
    """Endless chunks of some lanes from row ``first_row`` of the run on, ``rounds`` rows of each lane.

    Args:
        cursors: int64 [all lanes, 3], where each lane is before that row.
    """
    readers = [LaneReader(plan, lane, cursors[lane]) for lane in lanes]
    total = plan.order.lanes
    start = first_row // total
    while True:
        runs: list[Run] = []
        faults: list[tuple[int, DataFault]] = []
        for reader in readers:
            # Rows before the first belong to batches that are done.
            skip = int(start * total + reader.lane < first_row)
            taken, lost = reader.take((start + skip) * total + reader.lane, rounds - skip)
            runs += taken
            faults += lost
        yield Chunk.of(runs, faults, plan)
        start += rounds
