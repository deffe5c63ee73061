"""A block of a shard to training rows: a pure function of (block bytes, tokenizer, seq_len, packing, mask, seed, epoch)."""

import os
import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig, mask
from mlm_dist.data.members import LostDocument, MemberError, read_documents
from mlm_dist.data.packing import LongDocuments, Packing, pack
from mlm_dist.data.rng import permutation
from mlm_dist.data.rows import Rows, ranges
from mlm_dist.data.tar import TarError, iter_members
from mlm_dist.data.tokenizer import TextTokenizer

MAX_OPEN_SHARDS = 16


@dataclass(frozen=True)
class DataFault:
    """Documents that the run goes on without: an entry of the ledger.

    Attributes:
        epoch, block: the epoch and the block's number in the manifest.
        shard, offset: where the block lies, path relative to the manifest and byte offset.
        whole: True when the block is lost as a whole, False for single documents in it.
        documents: how many are lost.
        cause: what was wrong, one line.
    """

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
        source: names the corpus in every random key, so that equal shards of two corpora differ.
    """

    manifest: Manifest
    tokenizer: TextTokenizer
    seq_len: int
    packing: Packing
    long_documents: LongDocuments
    mask: MaskConfig
    seed: int
    shuffle: bool = True
    text_field: str = "text"
    source: str = "0"
    _first_block: np.ndarray = field(init=False, repr=False)
    _files: dict[int, int] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        counts = [len(shard.offsets) for shard in self.manifest.shards]
        self._first_block = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for fd in self._files.values():
            os.close(fd)

    def sizes(self) -> np.ndarray:
        """Bytes of every block in manifest order, int64 [num_blocks]."""
        return np.concatenate([shard.lengths for shard in self.manifest.shards]).astype(np.int64)

    def locate(self, block: int) -> tuple[int, int]:
        """(shard number, block number within it)."""
        shard = int(np.searchsorted(self._first_block, block, side="right")) - 1
        return shard, int(block - self._first_block[shard])

    def rows(self, block: int, epoch: int) -> tuple[Rows, list[DataFault]]:
        """The block's rows in ``epoch``, and what was lost in making them. A block that cannot be read gives no row and one fault with all its documents."""
        shard_index, index = self.locate(block)
        shard = self.manifest.shards[shard_index]
        fault = DataFault(epoch, block, shard.path, int(shard.offsets[index]), False, 1, "")
        try:
            documents, causes = self._documents(shard_index, index)
        except BlockError as error:
            return self.no_rows(), [replace(fault, whole=True, documents=int(shard.documents[index]), cause=str(error))]
        if len(documents) >= int(shard.documents[index]):
            causes = []  # the block is as it was when the manifest was made, which counts only what could be read and told of the rest
        key = (self.seed, epoch, self.source, shard.path, index)
        if self.shuffle:
            documents = [documents[i] for i in permutation(len(documents), *key, "order")]
        return self._make(documents, key), [replace(fault, cause=cause) for cause in causes]

    def no_rows(self) -> Rows:
        """Zero rows."""
        return Rows.empty(0, self.tokenizer.cls_id, self.tokenizer.sep_id, self.tokenizer.dtype)

    def _read(self, shard_index: int, index: int) -> bytes:
        """The block's bytes, tried twice: a file handle can go stale on a network file system."""
        try:
            return self._read_once(shard_index, index)
        except BlockError:
            if shard_index in self._files:
                os.close(self._files.pop(shard_index))
            return self._read_once(shard_index, index)

    def _read_once(self, shard_index: int, index: int) -> bytes:
        shard = self.manifest.shards[shard_index]
        offset, length = int(shard.offsets[index]), int(shard.lengths[index])
        try:
            fd = self._files.get(shard_index)
            if fd is None:
                if len(self._files) >= MAX_OPEN_SHARDS:
                    os.close(self._files.pop(next(iter(self._files))))
                fd = self._files[shard_index] = os.open(
                    self.manifest.shard_path(shard_index), os.O_RDONLY | os.O_CLOEXEC
                )
            parts = []
            while length > 0 and (part := os.pread(fd, length, offset)):
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
        except OSError as error:
            raise BlockError(f"cannot be read: {error.strerror}") from error
        if length:
            raise BlockError(f"the shard ends {length} bytes too early")
        data = b"".join(parts)
        if zlib.crc32(data) != int(shard.crc32[index]):
            raise BlockError("the block's bytes differ from the manifest's checksum")
        return data

    def _documents(self, shard_index: int, index: int) -> tuple[list[str], list[str]]:
        """The block's documents in the order they lie, and the cause of each that was lost alone."""
        documents: list[str] = []
        causes: list[str] = []
        try:
            for member in iter_members(self._read(shard_index, index)):
                for document in read_documents(member.name, member.data, self.text_field):
                    if isinstance(document, LostDocument):
                        # A tar may name its members in any bytes; the ledger is UTF-8.
                        member_name = member.name.encode(errors="backslashreplace").decode()
                        causes.append(f"{member_name}: {document.cause}")
                    else:
                        documents.append(document)
        except (TarError, MemberError) as error:
            raise BlockError(str(error)) from error
        return documents, causes

    def _make(self, documents: list[str], key: tuple[int | str, ...]) -> Rows:
        tok = self.tokenizer
        content, offsets = tok.encode(documents)
        pieces = pack(offsets, self.seq_len, self.packing, self.long_documents, (*key, "packing"))
        num_rows = int(pieces.rows[-1]) + 1 if len(pieces.rows) else 0
        if not num_rows:
            return self.no_rows()
        segment_lengths = pieces.lengths + 2
        ends = np.cumsum(segment_lengths)
        ids = np.empty(int(ends[-1]), tok.dtype)
        first = np.zeros(len(ids), bool)
        first[ends - segment_lengths] = True
        last = np.zeros(len(ids), bool)
        last[ends - 1] = True
        ids[first], ids[last] = tok.cls_id, tok.sep_id
        ids[~(first | last)] = content[ranges(pieces.starts, pieces.lengths)]
        lengths = np.bincount(pieces.rows, segment_lengths, num_rows).astype(np.int32)
        masked, selected = mask(ids, tok, self.mask, (*key, "mask"))
        labelled = selected if self.mask.labels == "masked" else np.ones(len(ids), bool)
        row_of_token = np.repeat(np.arange(num_rows), lengths)
        place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Rows(
            ids=masked,
            lengths=lengths,
            segment_lengths=segment_lengths.astype(np.int32),
            segments=np.bincount(pieces.rows, minlength=num_rows).astype(np.int32),
            positions=place[labelled].astype(np.int32),
            labels=ids[labelled],
            selected=np.bincount(row_of_token[labelled], minlength=num_rows).astype(np.int32),
        )
