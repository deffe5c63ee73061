"""A block of a shard to training rows: a pure function of (block bytes, tokenizer, seq_len, packing, mask, seed, epoch)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from mlm_dist.data.archive import block_documents
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig, mask, rates
from mlm_dist.data.members import Document, LostDocument, MemberError
from mlm_dist.data.packing import LongDocuments, Packing, pack
from mlm_dist.data.rng import permutation
from mlm_dist.data.rows import Rows, ranges
from mlm_dist.data.tar import TarError
from mlm_dist.data.tokenizer import TextTokenizer
from mlm_dist.storage.store import Store, StoreError


@dataclass(frozen=True)
class DataFault:
    """Documents that the run goes on without: an entry of the ledger.

    Attributes:
        source: the corpus, by its place in ``data.sources``.
        epoch, block: the corpus' epoch and the block's number in its manifest.
        shard, offset: where the block lies, path relative to the manifest and byte offset.
        whole: True when the block is lost as a whole, False for single documents in it.
        documents: how many are lost.
        cause: what was wrong, one line.
    """

    source: int
    epoch: int
    block: int
    shard: str
    offset: int
    whole: bool
    documents: int
    cause: str


class BlockError(Exception):
    """The block cannot be read whole: nothing of it is given."""


@dataclass
class BlockMaker:
    """Reads blocks of one manifest and makes rows of them.

    Attributes:
        shuffle: documents within a block in an order keyed by (seed, epoch) or, for validation, as they lie.
        source: the corpus' place in ``data.sources``; in every random key, so that equal shards of two corpora differ.
    """

    manifest: Manifest
    store: Store
    tokenizer: TextTokenizer
    seq_len: int
    packing: Packing
    long_documents: LongDocuments
    mask: MaskConfig
    seed: int
    shuffle: bool = True
    text_field: str = "text"
    source: int = 0
    _first_block: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [len(shard.offsets) for shard in self.manifest.shards]
        self._first_block = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def sizes(self) -> np.ndarray:
        """Bytes of every block in manifest order, uint32 or int64 [num_blocks]."""
        lengths = [shard.lengths for shard in self.manifest.shards]
        narrow = max(int(column.max(initial=0)) for column in lengths) < 1 << 32
        return np.concatenate([column.astype(np.uint32 if narrow else np.int64) for column in lengths])

    def locate(self, block: int) -> tuple[int, int]:
        """(shard number, block number within it)."""
        shard = int(np.searchsorted(self._first_block, block, side="right")) - 1
        return shard, int(block - self._first_block[shard])

    def where(self, block: int) -> tuple[str, int, int]:
        """(shard path relative to the manifest, byte offset, bytes)."""
        return self._address(*self.locate(block))[:3]

    def rows(self, block: int, epoch: int, steps: Callable[[int], np.ndarray]) -> tuple[Rows, list[DataFault]]:
        """The block's rows in ``epoch``, and what was lost in making them. A block that cannot be read gives no row and one fault with all its documents.

        Args:
            steps: number of rows -> int64, the global step that each row falls into: a schedule may move the masking rate.
        """
        shard_index, index = self.locate(block)
        shard = self.manifest.shards[shard_index]
        fault = DataFault(self.source, epoch, block, shard.path, int(shard.offsets[index]), False, 1, "")
        try:
            documents, causes = self._documents(shard_index, index)
        except BlockError as error:
            return self.no_rows(), [replace(fault, whole=True, documents=int(shard.documents[index]), cause=str(error))]
        key = (self.seed, epoch, str(self.source), shard.path, index)
        if self.shuffle:
            documents = [documents[i] for i in permutation(len(documents), *key, "order")]
        return self._make(documents, steps, key), [replace(fault, cause=cause) for cause in causes]

    def texts(self, block: int) -> list[str]:
        """The block's texts as they lie; none of a block that cannot be read."""
        try:
            return [document for document in self._documents(*self.locate(block))[0] if isinstance(document, str)]
        except BlockError:
            return []

    def ahead(self, block: int) -> None:
        """Begin to fetch a block that will be asked for soon, where that saves waiting."""
        if self.store.remote:
            self.store.ahead(*self._address(*self.locate(block)))

    def no_rows(self) -> Rows:
        """Zero rows."""
        return Rows.empty(0, self.tokenizer.cls_id, self.tokenizer.sep_id, self.tokenizer.dtype)

    def _address(self, shard_index: int, index: int) -> tuple[str, int, int, int]:
        shard = self.manifest.shards[shard_index]
        return shard.path, int(shard.offsets[index]), int(shard.lengths[index]), int(shard.crc32[index])

    def _documents(self, shard_index: int, index: int) -> tuple[list[Document], list[str]]:
        """The block's documents in the order they lie, and the cause of each that was lost alone."""
        path, offset, _, _ = address = self._address(shard_index, index)
        documents: list[Document] = []
        causes: list[str] = []
        try:
            data = self.store.read(*address)
            for document in block_documents(data, path, self.text_field, self.manifest.token_ids, base=offset):
                if isinstance(document, LostDocument):
                    causes.append(document.cause)
                else:
                    documents.append(document)
        except (StoreError, TarError, MemberError) as error:
            raise BlockError(str(error)) from error
        stated = int(self.manifest.shards[shard_index].documents[index])
        if not len(documents) <= stated <= len(documents) + len(causes):
            raise BlockError(f"it holds {len(documents)} documents, the manifest says {stated}")
        # What the manifest does not count it told of when it was made; only what is missing beyond that is news.
        return documents, causes[: stated - len(documents)]

    def _encode(self, documents: list[Document]) -> tuple[np.ndarray, np.ndarray]:
        """Content ids of texts and of documents that are ids already: (flat ids [T], int64 offsets [len(documents) + 1])."""
        texts = [document for document in documents if isinstance(document, str)]
        ids, offsets = self.tokenizer.encode(texts)
        if len(texts) == len(documents):
            return ids, offsets
        encoded = iter(np.split(ids, offsets[1:-1])) if texts else iter(())
        parts = [next(encoded) if isinstance(d, str) else d.astype(self.tokenizer.dtype) for d in documents]
        return np.concatenate(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64)

    def _make(self, documents: list[Document], steps: Callable[[int], np.ndarray], key: tuple[int | str, ...]) -> Rows:
        tok = self.tokenizer
        content, offsets = self._encode(documents)
        pieces = pack(offsets, self.seq_len, self.packing, self.long_documents, (*key, "packing"))
        num_rows = int(pieces.rows[-1]) + 1 if len(pieces.rows) else 0
        if not num_rows:
            return self.no_rows()
        # Each piece with the token before and behind it, whatever these are (at the ends: itself); then they become [CLS] and [SEP].
        segment_lengths = pieces.lengths + 2
        ends = np.cumsum(segment_lengths)
        ids = content.take(ranges(pieces.starts - 1, segment_lengths), mode="clip")
        ids[ends - segment_lengths], ids[ends - 1] = tok.cls_id, tok.sep_id
        lengths = np.bincount(pieces.rows, segment_lengths, num_rows).astype(np.int32)
        masked, selected = mask(ids, lengths, tok, self.mask, rates(self.mask, steps(num_rows)), (*key, "mask"))
        labelled = np.flatnonzero(selected) if self.mask.labels == "masked" else np.arange(len(ids))
        row_ends = np.cumsum(lengths)
        row = np.searchsorted(row_ends, labelled, side="right")
        rows = Rows(
            ids=masked,
            lengths=lengths,
            segment_lengths=segment_lengths.astype(np.int32),
            segments=np.bincount(pieces.rows, minlength=num_rows).astype(np.int32),
            positions=(labelled - (row_ends - lengths)[row]).astype(np.int32),
            labels=ids[labelled],
            selected=np.bincount(row, minlength=num_rows).astype(np.int32),
        )
        return rows.padded(self.seq_len, tok.pad_id) if self.mask.labels == "all_with_padding" else rows
