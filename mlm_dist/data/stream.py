"""The stream: blocks to global batches, the same whatever the number of ranks and workers, resumable at any batch.

Row g of the run comes from lane g mod lanes; batch k is rows [k * B, (k + 1) * B). Rank r of W serves the lanes c with c mod W == r;
its loader worker j owns every n-th of them.
"""

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mlm_dist.data.block import BlockError, BlockMaker, DataFault
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.order import Order, default_lanes
from mlm_dist.data.packing import LongDocuments, Packing
from mlm_dist.data.rows import Rows
from mlm_dist.data.tokenizer import TextTokenizer
from mlm_dist.errors import UserError

# Rows that one message from a worker holds, about: enough to make the hand-over cheap, few enough for an early first batch.
MESSAGE_ROWS = 64
PREFETCH = 2


@dataclass
class DataConfig:
    """Where the text is and how it becomes rows.

    Attributes:
        manifest: manifest of the training shards (``mlm-dist prepare`` or ``mlm-dist index`` writes it).
        val_manifest: manifest of the validation shards, or null for none.
        tokenizer: directory or hub name of a fast BERT tokenizer.
        seq_len: longest row in tokens, [CLS] and [SEP] included.
        packing: ``none`` (one piece a row), ``split`` (documents cut so that rows are full) or ``best_fit`` (pieces whole).
        long_documents: ``chunk`` (pieces of at most seq_len - 2 tokens) or ``truncate``.
        text_field: field of JSON members that holds the text.
        lanes: number of lanes, fixed for the life of a run; null: min(global_batch, blocks // 16, 960), at least 1.
        workers: loader processes of each rank; 0 reads in the rank itself.
        max_bad_fraction: share of an epoch's documents that may be lost to faults before the run stops.
    """

    manifest: str = ""
    val_manifest: str | None = None
    tokenizer: str = ""
    seq_len: int = 128
    packing: Packing = "split"
    long_documents: LongDocuments = "chunk"
    text_field: str = "text"
    lanes: int | None = None
    workers: int = 1
    max_bad_fraction: float = 0.01

    def check(self) -> None:
        """Raises UserError for values that no stream can have."""
        for key in ("manifest", "tokenizer"):
            if not getattr(self, key):
                raise UserError(f"data.{key}: missing. Give it in the config file or as --data.{key} VALUE.")
        if self.seq_len < 8:
            raise UserError(f"data.seq_len: {self.seq_len} is too short; use at least 8 (128 and 512 are usual).")
        if self.workers < 0:
            raise UserError(
                f"data.workers: {self.workers} is negative; use 0 to read in the training process, or the number of loader processes of a rank."
            )
        if self.lanes is not None and self.lanes < 1:
            raise UserError(f"data.lanes: {self.lanes} must be at least 1, or null for the default.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction: {self.max_bad_fraction} is not a share between 0 and 1.")


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
    def merge(parts: Sequence["Chunk"]) -> "Chunk":
        """All rows of the parts (at least one), by their number."""
        index = np.concatenate([p.index for p in parts])
        order = np.argsort(index, kind="stable")
        return Chunk(
            rows=Rows.concat([p.rows for p in parts]).take(order),
            index=index[order],
            cursors=np.concatenate([p.cursors for p in parts])[order],
            bytes=np.concatenate([p.bytes for p in parts])[order],
            live=np.concatenate([p.live for p in parts])[order],
            faults=sorted((f for p in parts for f in p.faults), key=lambda f: (f[0], f[1].block)),
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


class LaneReader:
    """Gives one lane's rows from a cursor on."""

    def __init__(
        self,
        maker: BlockMaker,
        order: Order,
        lane: int,
        epochs: int | None,
        cursor: Sequence[int],
        lost: frozenset[tuple[int, int]],
    ):
        self.maker, self.order, self.lane, self.epochs, self.lost = maker, order, lane, epochs, lost
        self.epoch, self.position, self.row = (int(c) for c in cursor)
        self._rows: Rows | None = None
        self._size = self._pending_bytes = 0
        self._sizes = order.sizes

    def take(self, index: np.ndarray) -> Chunk:
        """The lane's next rows, numbered ``index`` (int64 [n])."""
        parts: list[Rows] = []
        cursors, sizes = np.zeros((len(index), 3), np.int64), np.zeros(len(index), np.int64)
        live = np.ones(len(index), bool)
        faults: list[tuple[int, DataFault]] = []
        tok = self.maker.tokenizer
        done = 0
        while done < len(index):
            faults += [(int(index[done]), fault) for fault in self._open()]
            if self._rows is None:
                # One empty row, then another look: how far a lane without text goes on must not depend on how many rows were asked for.
                parts.append(Rows.empty(1, tok.cls_id, tok.sep_id, tok.dtype))
                cursors[done] = self.epoch, self.position, self.row
                sizes[done], self._pending_bytes = self._pending_bytes, 0
                live[done], done = False, done + 1
                continue
            total = len(self._rows)
            n = min(len(index) - done, total - self.row)
            parts.append(self._rows.slice(self.row, self.row + n))
            steps = np.arange(self.row, self.row + n + 1)
            sizes[done : done + n] = np.diff(self._size * steps // total)
            sizes[done] += self._pending_bytes
            cursors[done : done + n] = np.stack([np.full(n, self.epoch), np.full(n, self.position), steps[1:]], axis=1)
            self._pending_bytes = 0
            self.row, done = self.row + n, done + n
            if self.row == total:
                self._next_block()
                cursors[done - 1] = self.epoch, self.position, self.row
        return Chunk(Rows.concat(parts or [self.maker.no_rows()]), index, cursors, sizes, live, faults)

    def _open(self) -> list[DataFault]:
        """Move to the next block that has rows, unless one is open. Leaves ``_rows`` None at the lane's end, or when a whole epoch of it holds no text."""
        faults: list[DataFault] = []
        once_around = self.epoch + 1, self.position
        while self._rows is None and (self.epochs is None or self.epoch < self.epochs):
            if (self.epoch, self.position) >= once_around:
                break
            blocks = self.order.epoch(self.epoch)[self.lane]
            if self.position >= len(blocks):
                self.epoch, self.position, self.row = self.epoch + 1, 0, 0
                continue
            block = int(blocks[self.position])
            self._size = int(self._sizes[block])
            if (self.epoch, block) in self.lost:
                rows = None
            else:
                rows, found = self.maker.rows(block, self.epoch)
                if self.row and any(fault.whole for fault in found):
                    raise BlockError(
                        f"block {block} at byte {found[0].offset} of {found[0].shard}, of which {self.row} rows are in the run already, "
                        f"can no longer be read ({found[0].cause}). Bring the shard back."
                    )
                faults += found
            if rows is not None and len(rows):
                self._rows = rows
            else:
                self._pending_bytes += self._size
                self._next_block()
        return faults

    def _next_block(self) -> None:
        self._rows, self.row, self.position = None, 0, self.position + 1
        if self.position == len(self.order.epoch(self.epoch)[self.lane]):
            self.epoch, self.position = self.epoch + 1, 0


class LaneDataset(IterableDataset):
    """What a loader worker runs: endless chunks of the lanes that it owns, ``rounds`` rows of each."""

    def __init__(
        self,
        maker: BlockMaker,
        order: Order,
        lanes: Sequence[int],
        epochs: int | None,
        first_row: int,
        cursors: np.ndarray,
        lost: frozenset[tuple[int, int]],
    ):
        self.maker, self.order, self.lanes, self.epochs, self.first_row, self.cursors, self.lost = (
            maker,
            order,
            list(lanes),
            epochs,
            first_row,
            cursors,
            lost,
        )

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        lanes = self.lanes[info.id :: info.num_workers] if info else self.lanes
        # All workers of a rank must send the same rounds in a message, so the count comes from the largest of them.
        largest = -(-len(self.lanes) // (info.num_workers if info else 1))
        rounds = max(1, MESSAGE_ROWS // largest)
        readers = [
            LaneReader(self.maker, self.order, lane, self.epochs, self.cursors[lane], self.lost) for lane in lanes
        ]
        start = self.first_row // self.order.lanes
        while True:
            index = [np.arange(start, start + rounds) * self.order.lanes + lane for lane in lanes]
            yield Chunk.merge([reader.take(g[g >= self.first_row]) for reader, g in zip(readers, index, strict=True)])
            start += rounds


def _worker_signals(_worker: int) -> None:
    # The rank's handlers only set a flag of the rank; a worker must die when it is told to, and leave Ctrl-C to the rank.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@dataclass
class Batch:
    """One rank's part of global batch ``step``.

    Attributes:
        rows: its rows, those of ended lanes included.
        index: int64 [R], the rows' numbers in the run.
        live: bool [R].
        selected, tokens, bytes: of its live rows: labels, real tokens, corpus bytes.
        cursors: int64 [lanes, 3] after this batch; only the rank's own lanes move.
        faults: what was lost on the way here.
        micro_batches: how many micro-batches every rank takes in this step.
    """

    step: int
    rows: Rows
    index: np.ndarray
    live: np.ndarray
    selected: int
    tokens: int
    bytes: int
    cursors: np.ndarray
    faults: list[DataFault]
    micro_batches: int


@dataclass
class Stream:
    """The global batches of one run as rank ``rank`` of ``world_size`` sees them.

    Attributes:
        global_batch: rows of a batch, B.
        micro_batch: most rows of a micro-batch.
        epochs: after which lanes end, or None for an endless stream.
        workers: loader processes; changes nothing in the data.
    """

    maker: BlockMaker
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    epochs: int | None = None
    lanes: int | None = None
    order: Order = field(init=False, repr=False)
    _counts: dict[int, np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        sizes = self.maker.sizes()
        self.lanes = self.lanes or default_lanes(self.global_batch, len(sizes))
        self.order = Order(sizes, self.lanes, self.maker.seed, self.maker.shuffle)

    def start_cursors(self) -> np.ndarray:
        """Where every lane begins, int64 [lanes, 3]."""
        return np.zeros((self.order.lanes, 3), np.int64)

    def rank_counts(self, step: int) -> np.ndarray:
        """Rows of every rank in batch ``step``, int64 [world_size]."""
        first = step * self.global_batch % self.order.lanes
        if first not in self._counts:
            lanes = np.arange(first, first + self.global_batch) % self.order.lanes
            self._counts[first] = np.bincount(lanes % self.world_size, minlength=self.world_size)
        return self._counts[first]

    def micro_batches(self, step: int) -> int:
        """Micro-batches of every rank in batch ``step``: enough for the rank with most rows."""
        return -(-int(self.rank_counts(step).max()) // self.micro_batch)

    def fill(self) -> float:
        """Share of a batch's micro-batch places that hold a row, over the ranks, averaged over batches."""
        steps = self.order.lanes // int(np.gcd(self.global_batch, self.order.lanes))
        places = sum(self.micro_batches(k) for k in range(steps)) * self.micro_batch * self.world_size
        return steps * self.global_batch / places

    def batches(
        self, start: int = 0, cursors: np.ndarray | None = None, lost: frozenset[tuple[int, int]] = frozenset()
    ) -> Generator[Batch, None, None]:
        """Batches ``start``, ``start + 1``, ... without end; after the lanes' end their rows are not live.

        Args:
            cursors: int64 [lanes, 3] as a batch carried them before ``start``.
            lost: (epoch, block) of the ledger: not read, whatever they hold now.
        """
        cursors = (self.start_cursors() if cursors is None else cursors).copy()
        if len(cursors) != self.order.lanes:
            raise UserError(
                f"data.lanes: the checkpoint has {len(cursors)} lanes, this run {self.order.lanes}; lanes are fixed for the life of a run."
            )
        lanes = list(range(self.rank, self.order.lanes, self.world_size))
        chunks = self._chunks(lanes, start * self.global_batch, cursors, lost)
        buffer: Chunk | None = None
        step = start
        while True:
            need = int(self.rank_counts(step)[self.rank])
            parts = [buffer] if buffer is not None else []
            while sum(len(p.rows) for p in parts) < need:
                parts.append(next(chunks))
            whole = Chunk.merge(parts) if len(parts) > 1 else (parts[0] if parts else self._no_rows())
            mine, buffer = whole.slice(0, need), whole.slice(need, len(whole.rows))
            assert not len(mine.index) or mine.index[-1] < (step + 1) * self.global_batch
            # Rows are in order, so a lane's last cursor is the one that stays.
            cursors = cursors.copy()
            cursors[mine.index % self.order.lanes] = mine.cursors
            live_lengths, live_selected = mine.rows.lengths[mine.live], mine.rows.selected[mine.live]
            yield Batch(
                step=step,
                rows=mine.rows,
                index=mine.index,
                live=mine.live,
                selected=int(live_selected.sum()),
                tokens=int(live_lengths.sum()),
                bytes=int(mine.bytes.sum()),
                cursors=cursors,
                faults=[fault for _, fault in mine.faults],
                micro_batches=self.micro_batches(step),
            )
            step += 1

    def _no_rows(self) -> Chunk:
        none = np.zeros(0, np.int64)
        return Chunk(self.maker.no_rows(), none, np.zeros((0, 3), np.int64), none, none.astype(bool), [])

    def _chunks(
        self, lanes: list[int], first_row: int, cursors: np.ndarray, lost: frozenset[tuple[int, int]]
    ) -> Iterator[Chunk]:
        if not lanes:
            return
        dataset = LaneDataset(self.maker, self.order, lanes, self.epochs, first_row, cursors, lost)
        workers = min(self.workers, len(lanes))
        if not workers:
            yield from dataset
            return
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH,
            worker_init_fn=_worker_signals,
            collate_fn=_as_is,
        )
        messages = iter(loader)
        while True:
            # In order, the loader gives one message of each worker in turn.
            yield Chunk.merge([next(messages) for _ in range(workers)])

    def collate(self, batch: Batch) -> list[dict[str, torch.Tensor]]:
        """The batch as micro-batches of tensors (see ``Rows.collate``); a place without a row holds [CLS] [SEP] and no label."""
        tok = self.maker.tokenizer
        rows, out = batch.rows, []
        for i in range(batch.micro_batches):
            part = rows.slice(i * self.micro_batch, (i + 1) * self.micro_batch)
            out.append((part if len(part) else Rows.empty(1, tok.cls_id, tok.sep_id, tok.dtype)).collate(tok.pad_id))
        return out


def _as_is(chunk: Any) -> Any:
    return chunk


def open_stream(
    data: DataConfig,
    mask: MaskConfig,
    manifest: Manifest,
    tokenizer: TextTokenizer,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    epochs: int | None,
    validation: bool = False,
) -> Stream:
    """The stream of one manifest under the ``data`` and ``mask`` sections; for ``validation`` in natural order, with lanes of its own."""
    maker = BlockMaker(
        manifest=manifest,
        tokenizer=tokenizer,
        seq_len=data.seq_len,
        packing=data.packing,
        long_documents=data.long_documents,
        mask=mask,
        seed=seed,
        shuffle=not validation,
        text_field=data.text_field,
    )
    return Stream(
        maker,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        workers=data.workers,
        epochs=epochs,
        lanes=None if validation else data.lanes,
    )
