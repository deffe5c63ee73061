"""The rows of ``mlm-dist eval``: a whole data set with fixed masks, cut into parts that do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlm_dist.data.block import BlockMaker, DataFault
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.members import TokenIds
from mlm_dist.data.packing import LongDocuments, Packing
from mlm_dist.data.rows import Rows
from mlm_dist.errors import UserError
from mlm_dist.storage.store import Store

if TYPE_CHECKING:
    from mlm_dist.data.manifest import Manifest
    from mlm_dist.data.tokenizer import TextTokenizer

# Batches of text that a part holds, about: enough to put rows of like length together, few enough to deal parts evenly.
_BATCHES = 4
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Settings:
    """What decides the rows and their masks, besides data and tokenizer; the same for all models that are compared.

    Attributes:
        seq_len, packing, long_documents, text_field: as in the section ``data`` of a run's config.
        seed: keys the masks.
        rate: share of the tokens that is masked, by BERT's rule.
    """

    seq_len: int = 128
    packing: Packing = "split"
    long_documents: LongDocuments = "chunk"
    text_field: str = "text"
    seed: int = 1234
    rate: float = 0.15

    def check(self) -> None:
        """Raises UserError for values that no evaluation can have."""
        if self.seq_len < 8:
            raise UserError(f"--seq-len {self.seq_len}: too short; use at least 8 (128 and 512 are usual)")
        if not 0 < self.rate < 1:
            raise UserError(f"--rate {self.rate}: not a probability between 0 and 1; BERT uses 0.15")


@dataclass(frozen=True)
class Part:
    """Some blocks of the data set: the unit of work, and of addition.

    Attributes:
        rows: one segment each; those without a masked token too.
        faults: what of the blocks could not be read.
    """

    rows: Rows
    faults: list[DataFault]


class EvalData:
    """A manifest's documents as one tokenizer cuts them, masked as a run of the same settings masks its validation set."""

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        tokenizer: TextTokenizer,
        settings: Settings,
        batch: int,
        flag: str = "--data",
    ):
        """
        Args:
            batch: most rows of ``seq_len`` tokens that a model takes at once.
            flag: that named the manifest, for messages.

        Raises:
            UserError: the manifest holds token ids of another tokenizer.
        """
        made_with = manifest.token_ids
        if made_with not in (None, TokenIds.of(tokenizer)):
            raise UserError(
                f"{flag}: the manifest holds token ids of a tokenizer with the fingerprint {made_with.fingerprint[:12]}, not of the model's "
                f"({tokenizer.fingerprint[:12]}); give a manifest of text"
            )
        self.settings, self.tokenizer, self.batch = settings, tokenizer, batch
        self.maker = BlockMaker(
            manifest,
            store,
            tokenizer,
            settings.seq_len,
            settings.packing,
            settings.long_documents,
            MaskConfig(rate=settings.rate),
            settings.seed,
            shuffle=False,
            text_field=settings.text_field,
        )
        self._bounds = _cut(self.maker.sizes(), _BATCHES * batch * settings.seq_len * _BYTES_PER_TOKEN)

    @property
    def num_parts(self) -> int:
        """How many parts the data set is cut into."""
        return len(self._bounds) - 1

    def part(self, number: int) -> Part:
        """Part ``number``."""
        blocks = range(int(self._bounds[number]), int(self._bounds[number + 1]))
        made = [self.maker.rows(block, 0, lambda rows: np.zeros(rows, np.int64)) for block in blocks]
        rows = Rows.concat([rows for rows, _ in made])
        return Part(one_segment_each(rows), [fault for _, faults in made for fault in faults])

    def batches(self, rows: Rows) -> Iterator[Rows]:
        """``rows`` in batches for the model, rows of like length together, at most ``batch * seq_len`` places each."""
        order = np.argsort(rows.lengths, kind="stable")
        widths = rows.lengths[order].tolist()
        room, start = self.batch * self.settings.seq_len, 0
        for end in range(1, len(widths) + 1):
            if end == len(widths) or (end + 1 - start) * self.width(widths[end]) > room:
                yield rows.take(order[start:end])
                start = end

    def width(self, length: int) -> int:
        """Places of a row in a batch whose longest has ``length`` tokens."""
        return -(-length // self.multiple) * self.multiple

    @property
    def multiple(self) -> int:
        """What widths are a multiple of: 8, which devices like, unless that could be more than a model has places."""
        return 8 if self.settings.seq_len % 8 == 0 else 1


def one_segment_each(rows: Rows) -> Rows:
    """The same segments, masks and labels with each segment a row of its own: what a model sees that knows nothing of packing."""
    segment_ends = np.cumsum(rows.segment_lengths, dtype=np.int64)
    row_starts = np.cumsum(rows.lengths, dtype=np.int64) - rows.lengths
    place = rows.positions + np.repeat(row_starts, rows.selected)
    segment = np.searchsorted(segment_ends, place, side="right")
    count = len(segment_ends)
    return Rows(
        ids=rows.ids,
        lengths=rows.segment_lengths,
        segment_lengths=rows.segment_lengths,
        segments=np.ones(count, np.int32),
        positions=(place - (segment_ends - rows.segment_lengths)[segment]).astype(np.int32),
        labels=rows.labels,
        selected=np.bincount(segment, minlength=count).astype(np.int32),
    )


def _cut(sizes: np.ndarray, least: int) -> np.ndarray:
    """Bounds of runs of blocks that have ``least`` bytes or one block more, int64 [runs + 1]."""
    ends = np.cumsum(sizes, dtype=np.int64)
    bounds = [0]
    while bounds[-1] < len(sizes):
        before = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(min(int(np.searchsorted(ends, before + least)) + 1, len(sizes)))
    return np.asarray(bounds, np.int64)
