"""The stream: blocks to global batches, the same whatever the number of ranks and workers, resumable at any batch.

Row g of the run comes from lane g mod lanes; batch k is rows [S_k, S_k + B_k), where B_k may grow at first (``BatchSchedule``). Rank r of W serves the
lanes c with c mod W == r; its loader worker j owns every n-th of them.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlm_dist.data.batches import BatchSchedule, BatchWarmup
from mlm_dist.data.block import BlockMaker, DataFault
from mlm_dist.data.lanes import Chunk, Lost, Plan, read_lanes, rounds_in_message
from mlm_dist.data.loader import chunks_of_workers
from mlm_dist.data.order import Order, default_lanes
from mlm_dist.data.packing import LongDocuments, Packing
from mlm_dist.data.rows import Rows
from mlm_dist.data.tokenizer import Backend, TextTokenizer
from mlm_dist.errors import UserError
from mlm_dist.sizes import parse_size


@dataclass
class SourceConfig:
    """One corpus of several.

    Attributes:
        manifest: path or URL of its manifest.
        weight: share of the bytes of an epoch that come from it, to the sum of all weights; null for all of them: each corpus whole, once an epoch.
        text_field: field of its JSON members that holds the text; null: data.text_field.
        mask_rate: masking rate of its rows, constant; null: mask.rate and its schedule.
    """

    manifest: str = ""
    weight: float | None = None
    text_field: str | None = None
    mask_rate: float | None = None


@dataclass
class DataConfig:
    """Where the text is and how it becomes rows.

    Attributes:
        manifest: path or URL of the manifest of the training shards (``mlm-dist prepare`` or ``mlm-dist index`` writes it).
        sources: instead of manifest, several corpora: a list of {manifest, weight, text_field, mask_rate}.
        val_manifest: manifest of the validation shards, or null for none.
        tokenizer: directory or hub name of a fast BERT tokenizer.
        tokenizer_backend: ``hf`` (transformers), ``nano`` (nanotoken) or ``auto`` (nanotoken where it is installed); nanotoken only if it gives the same ids.
        seq_len: longest row in tokens, [CLS] and [SEP] included.
        packing: ``none`` (one piece a row), ``split`` (documents cut so that rows are full) or ``best_fit`` (pieces whole).
        long_documents: ``chunk`` (pieces of at most seq_len - 2 tokens) or ``truncate``.
        text_field: field of JSON members that holds the text.
        lanes: number of lanes, fixed for the life of a run; null: min(rows of the first batch, blocks // 16, 960), at least 1.
        workers: loader processes of each rank; 0 reads in the rank itself.
        max_bad_fraction: share of an epoch's documents that may be lost to faults before the run stops.
        allow_pipe: let manifests name shards as ``pipe:COMMAND``, which runs commands of whoever wrote the manifest.
        cache_dir: directory on the node where blocks of remote shards are kept, or null for none.
        cache_size: most bytes that the cache holds (``50GiB``).
        read_retries: how often a failed read of a remote block is tried again.
        read_timeout: seconds that one try may take.
    """

    manifest: str = ""
    sources: list[SourceConfig] | None = None
    val_manifest: str | None = None
    tokenizer: str = ""
    tokenizer_backend: Backend = "auto"
    seq_len: int = 128
    packing: Packing = "split"
    long_documents: LongDocuments = "chunk"
    text_field: str = "text"
    lanes: int | None = None
    workers: int = 1
    max_bad_fraction: float = 0.01
    allow_pipe: bool = False
    cache_dir: str | None = None
    cache_size: str = "50GiB"
    read_retries: int = 5
    read_timeout: float = 60.0

    def corpora(self) -> list[SourceConfig]:
        """``sources``, or the one that ``manifest`` is."""
        return self.sources or [SourceConfig(self.manifest)]

    def weights(self) -> list[float] | None:
        """The weights of the corpora, or None."""
        weights = [source.weight for source in self.corpora() if source.weight is not None]
        return weights or None

    def check(self) -> None:
        """Raises UserError for values that no stream can have."""
        if self.sources is None and not self.manifest:
            raise UserError("data.manifest: missing. Give it in the config file or as --data.manifest VALUE.")
        if self.sources is not None:
            self._check_sources(self.sources)
        if not self.tokenizer:
            raise UserError("data.tokenizer: missing. Give it in the config file or as --data.tokenizer VALUE.")
        if self.read_retries < 0:
            raise UserError(f"data.read_retries: {self.read_retries} is negative; 5 is usual, 0 tries once.")
        if not 0 < self.read_timeout < math.inf:
            raise UserError(f"data.read_timeout: {self.read_timeout} must be a positive number of seconds.")
        try:
            parse_size(self.cache_size)
        except ValueError as error:
            raise UserError(f"data.cache_size: {error}") from error
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

    def _check_sources(self, sources: list[SourceConfig]) -> None:
        if self.manifest:
            raise UserError(
                f"data.sources: data.manifest is {self.manifest!r} too; give one of them (--data.manifest '' unsets the other)."
            )
        if not sources:
            raise UserError("data.sources: the list is empty; give at least one {manifest: ...}.")
        weighted = [source.weight is not None for source in sources]
        if any(weighted) and not all(weighted):
            raise UserError(
                f"data.sources[{weighted.index(False)}].weight: missing; give all sources a weight, or none."
            )
        for i, source in enumerate(sources):
            if not source.manifest:
                raise UserError(f"data.sources[{i}].manifest: missing.")
            if source.weight is not None and not 0 < source.weight < math.inf:
                raise UserError(
                    f"data.sources[{i}].weight: {source.weight} must be positive; leave out the sources that are not wanted."
                )
            if source.mask_rate is not None and not 0 < source.mask_rate < 1:
                raise UserError(
                    f"data.sources[{i}].mask_rate: {source.mask_rate} is not a probability between 0 and 1."
                )


@dataclass
class Batch:
    """One rank's part of global batch ``step``.

    Attributes:
        rows: its rows, those of ended lanes included.
        index: int64 [R], the rows' numbers in the run.
        live: bool [R].
        selected, tokens, bytes: of its live rows: labels, real tokens, corpus bytes.
        attended: (query, key) pairs of real tokens that see each other: the sum of their segments' squared lengths.
        cursors: int64 [lanes, 3] after this batch; only the rank's own lanes move.
        row_cursors: int64 [R, 3], the lane's after each row.
        faults: what was lost on the way here.
        micro_batches: how many micro-batches every rank takes in this step.
        restarts: loader workers that died on the way here and were started again, in words; nothing was lost by it.
    """

    step: int
    rows: Rows
    index: np.ndarray
    live: np.ndarray
    selected: int
    tokens: int
    attended: int
    bytes: int
    cursors: np.ndarray
    row_cursors: np.ndarray
    faults: list[DataFault]
    micro_batches: int
    restarts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Origin:
    """Where rows of a batch come from.

    Attributes:
        source, epoch, block: the corpus, its epoch, the block's number in its manifest.
        shard, offset, length: where the block lies: path relative to the manifest, bytes.
    """

    source: int
    epoch: int
    block: int
    shard: str
    offset: int
    length: int


@dataclass
class Stream:
    """The global batches of one run as rank ``rank`` of ``world_size`` sees them.

    Attributes:
        makers: one for each corpus.
        weights: of the corpora, or None: each whole, once an epoch.
        global_batch: rows of a batch, with ``warmup`` once they have grown.
        micro_batch: most rows of a micro-batch.
        epochs: after which lanes end, or None for an endless stream.
        workers: loader processes; changes nothing in the data.
        flat: micro-batches are flat (see ``Rows.collate``).
        one_shape: every micro-batch is filled up to micro_batch rows of seq_len tokens.
        warmup: how batches grow, or None.
        schedule: the rows of every batch.
    """

    makers: Sequence[BlockMaker]
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    epochs: int | None = None
    lanes: int | None = None
    weights: Sequence[float] | None = None
    flat: bool = False
    one_shape: bool = False
    warmup: BatchWarmup | None = None
    order: Order = field(init=False, repr=False)
    schedule: BatchSchedule = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = [maker.sizes() for maker in self.makers]
        first = self.makers[0]
        blocks = Order(sizes, 1, first.seed, self.weights, first.shuffle).count(0)
        if self.warmup is None:
            self.schedule = BatchSchedule.constant(self.global_batch)
        else:
            self.schedule = BatchSchedule.growing(self.warmup, self.global_batch, first.seq_len)
        self.lanes = self.lanes or default_lanes(self.schedule.smallest, blocks)
        self.order = Order(sizes, self.lanes, first.seed, self.weights, first.shuffle)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of all corpora."""
        return self.makers[0].tokenizer

    def start_cursors(self) -> np.ndarray:
        """Where every lane begins, int64 [lanes, 3]."""
        return np.zeros((self.order.lanes, 3), np.int64)

    def rank_counts(self, step: int) -> np.ndarray:
        """Rows of every rank in batch ``step``, int64 [world_size]."""
        lanes = self.order.lanes
        rounds, rest = divmod(self.schedule.size(step), lanes)
        of_rank = np.bincount(np.arange(lanes) % self.world_size, minlength=self.world_size)
        over = (self.schedule.first(step) + np.arange(rest)) % lanes
        return rounds * of_rank + np.bincount(over % self.world_size, minlength=self.world_size)

    def micro_batches(self, step: int) -> int:
        """Micro-batches of every rank in batch ``step``: enough for the rank with most rows."""
        return -(-int(self.rank_counts(step).max()) // self.micro_batch)

    def most_rows(self) -> int:
        """Most rows that any rank has in a batch of ``global_batch`` rows."""
        return max(int(self.rank_counts(k).max()) for k in self._full_cycle())

    def _full_cycle(self) -> range:
        """Steps of ``global_batch`` rows, as many as give every way in which rows fall on ranks."""
        first = self.schedule.full_from
        return range(first, first + self.order.lanes // int(np.gcd(self.global_batch, self.order.lanes)))

    def fill(self) -> float:
        """Share of a batch's micro-batch places that hold a row, over the ranks, averaged over batches of ``global_batch`` rows."""
        steps = self._full_cycle()
        places = sum(self.micro_batches(k) for k in steps) * self.micro_batch * self.world_size
        return len(steps) * self.global_batch / places

    def batches(
        self, start: int = 0, cursors: np.ndarray | None = None, lost: Lost = frozenset()
    ) -> Generator[Batch, None, None]:
        """Batches ``start``, ``start + 1``, ... without end; after the lanes' end their rows are not live.

        Args:
            cursors: int64 [lanes, 3] as a batch carried them before ``start``.
            lost: (source, epoch, block) of the ledger: not read, whatever they hold now.
        """
        cursors = (self.start_cursors() if cursors is None else cursors).copy()
        if len(cursors) != self.order.lanes:
            raise UserError(
                f"data.lanes: the checkpoint has {len(cursors)} lanes, this run {self.order.lanes}; lanes are fixed for the life of a run."
            )
        lanes = list(range(self.rank, self.order.lanes, self.world_size))
        restarts: list[str] = []
        chunks = self._chunks(lanes, self.schedule.first(start), cursors, lost, restarts.append)
        buffer: Chunk | None = None
        step = start
        while True:
            need = int(self.rank_counts(step)[self.rank])
            parts = [buffer] if buffer is not None else []
            while sum(len(p.rows) for p in parts) < need:
                parts.append(next(chunks))
            whole = Chunk.merge(parts) if len(parts) > 1 else (parts[0] if parts else self._no_rows())
            mine, buffer = whole.slice(0, need), whole.slice(need, len(whole.rows))
            assert not len(mine.index) or mine.index[-1] < self.schedule.first(step + 1)
            # Rows are in order, so a lane's last cursor is the one that stays.
            cursors = cursors.copy()
            cursors[mine.index % self.order.lanes] = mine.cursors
            # Rows that are not live are one segment of two tokens without a label.
            real, dead = mine.rows.real_lengths(self.tokenizer.pad_id), int(np.count_nonzero(~mine.live))
            yield Batch(
                step=step,
                rows=mine.rows,
                index=mine.index,
                live=mine.live,
                selected=int(mine.rows.selected.sum()),
                tokens=int(real.sum()) - 2 * dead,
                attended=int((real**2).sum()) - 4 * dead,
                bytes=int(mine.bytes.sum()),
                cursors=cursors,
                row_cursors=mine.cursors,
                faults=[fault for _, fault in mine.faults],
                micro_batches=self.micro_batches(step),
                restarts=restarts[:],
            )
            restarts.clear()
            step += 1

    def origins(self, batch: Batch) -> list[Origin]:
        """The block of each live row of ``batch``, in their order."""
        found = []
        for index, (epoch, position, row) in zip(
            batch.index[batch.live].tolist(), batch.row_cursors[batch.live].tolist(), strict=True
        ):
            lane = index % self.order.lanes
            if not row:  # behind a block's last row the cursor is at what comes next
                epoch, position = (
                    (epoch, position) if position else (epoch - 1, len(self.order.blocks(epoch - 1, lane)))
                )
                position -= 1
            place = self.order.place(epoch, int(self.order.blocks(epoch, lane)[position]))
            found.append(Origin(place.source, place.epoch, place.block, *self.makers[place.source].where(place.block)))
        return found

    def _no_rows(self) -> Chunk:
        return Chunk.of([], [], self._plan(frozenset()))

    def _plan(self, lost: Lost) -> Plan:
        return Plan(self.makers, self.order, self.epochs, self.schedule, lost)

    def _chunks(
        self, lanes: list[int], first_row: int, cursors: np.ndarray, lost: Lost, died: Callable[[str], None]
    ) -> Iterator[Chunk]:
        if not lanes:
            return iter(())
        plan, workers = self._plan(lost), min(self.workers, len(lanes))
        if not workers:
            return read_lanes(plan, lanes, first_row, cursors, rounds_in_message(plan, len(lanes)))
        return chunks_of_workers(plan, lanes, first_row, cursors, workers, died)

    def collate(self, batch: Batch) -> list[dict[str, Any]]:
        """The batch as micro-batches (see ``Rows.collate``); a place without a row holds [CLS] [SEP] and no label."""
        size = self.micro_batch
        return [self._collate(batch.rows.slice(i * size, (i + 1) * size)) for i in range(batch.micro_batches)]

    def empty_micro_batch(self) -> dict[str, Any]:
        """A micro-batch of one row without text or label."""
        return self._collate(self._no_rows().rows)

    def _collate(self, rows: Rows) -> dict[str, Any]:
        tok = self.tokenizer
        if not len(rows):
            rows = Rows.empty(1, tok.cls_id, tok.sep_id, tok.dtype)
        shape = (self.micro_batch, self.makers[0].seq_len) if self.one_shape else None
        return rows.collate(tok.pad_id, flat=self.flat, shape=shape)


def open_stream(
    data: DataConfig,
    makers: Sequence[BlockMaker],
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    epochs: int | None,
    warmup: BatchWarmup | None = None,
    validation: bool = False,
) -> Stream:
    """The stream of the makers' corpora under the ``data`` section; for ``validation`` in natural order, with lanes of its own."""
    return Stream(
        makers,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        workers=data.workers,
        epochs=epochs,
        lanes=None if validation else data.lanes,
        weights=None if validation else data.weights(),
        warmup=warmup,
    )
