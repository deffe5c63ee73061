"""The first pass of `mlm-dist prepare`: documents of any source to spill files."""

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlm_dist.data import dedup
from mlm_dist.data.documents import read_part
from mlm_dist.data.index import MAX_CAUSES
from mlm_dist.data.job import Job
from mlm_dist.data.members import LostDocument, TokenIds
from mlm_dist.data.prepare_options import SIDES, PrepareOptions, Side
from mlm_dist.data.shards import unit_name
from mlm_dist.data.sources import Part, Source, find_parts
from mlm_dist.data.spill import SpillWriter, pack
from mlm_dist.data.tokenizer import TextTokenizer
from mlm_dist.data.workers import WorkerPool

_BUCKETS_A_SHARD = 16  # so that shards, which are whole buckets, differ in size by a few per cent
_MAX_BUCKETS = 4096
_MIN_UNIT_BYTES = 4 << 20
_MAX_UNIT_BYTES = 1 << 30
_UNITS_A_PART = 64
_MAX_UNITS = 4096
_UNIT_PARTS = 256
_ENCODE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """What is to be prepared.

    Attributes:
        sources: Where the text is.
        options: What to make of it.
        tokenizer: Makes documents token ids; None leaves them text.
        bands: For `--dedup near`.
    """

    sources: Sequence[Source]
    options: PrepareOptions
    tokenizer: TextTokenizer | None = None
    bands: dedup.Bands | None = None

    @property
    def buckets(self) -> int:
        """Into how many the keys are cut."""
        total = sum(source.text_size for source in self.sources)
        return min(max(_BUCKETS_A_SHARD * -(-total // self.options.shard_size), _BUCKETS_A_SHARD), _MAX_BUCKETS)

    @property
    def token_ids(self) -> TokenIds | None:
        """What the output's token ids mean; None for text."""
        return TokenIds.of(self.tokenizer) if self.tokenizer else None


@dataclass(frozen=True)
class Unit:
    """One task of reading.

    Attributes:
        parts: What it reads.
        number: Which unit it is.
        directory: Where its spill file goes.
        corpus: What they are parts of, but for its sources.
        buckets: Segments of each kind.
    """

    parts: tuple[Part, ...]
    number: int
    directory: Path
    corpus: Corpus
    buckets: int

    @property
    def name(self) -> str:
        """The task's name."""
        return unit_name(self.number)

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(part.size for part in self.parts)


@dataclass
class ReadResult:
    """What was read.

    Attributes:
        documents: Of each side of the split.
        sizes: int64 [buckets] of each side: bytes that the documents will be in members.
        lost: Documents that cannot be read.
        causes: Of the first 20 of them, with their places.
    """

    documents: dict[Side, int]
    sizes: dict[Side, np.ndarray]
    lost: int = 0
    causes: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, buckets: int) -> "ReadResult":
        """Nothing."""
        return cls(dict.fromkeys(SIDES, 0), {side: np.zeros(buckets, np.int64) for side in SIDES})

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "sizes": {side: sizes.tolist() for side, sizes in self.sizes.items()}}

    def add(self, other: dict[str, Any]) -> None:
        """Add what another unit has, in the form of `to_json`."""
        for side in SIDES:
            self.documents[side] += other["documents"][side]
            self.sizes[side] += np.array(other["sizes"][side], np.int64)
        self.lost += other["lost"]
        self.causes = (self.causes + other["causes"])[:MAX_CAUSES]


def find_units(corpus: Corpus, job: Job) -> list[Unit]:
    """The tasks of reading, the same in every process."""
    total = sum(source.size for source in corpus.sources)
    size = min(max(total // (_UNITS_A_PART * job.share.count), _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
    groups = _group(find_parts(corpus.sources), max(size, total // _MAX_UNITS))
    bare = replace(corpus, sources=())
    return [Unit(parts, i, job.directory, bare, corpus.buckets) for i, parts in enumerate(groups)]


def _group(parts: Sequence[Part], least: int) -> Iterator[tuple[Part, ...]]:
    """Units of so many bytes, so that thousands of small files are not thousands of tasks."""
    group: list[Part] = []
    size = 0
    for part in parts:
        group.append(part)
        size += part.size
        if size >= least or len(group) == _UNIT_PARTS:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def read_share(units: Sequence[Unit], job: Job, pool: WorkerPool) -> None:
    """Pass 1 of this process' share."""
    tasks = {unit.name: unit for unit in _share_of(units, job)}
    job.run(pool, _read_unit, tasks, [unit.size for unit in tasks.values()], "Reading")


def _share_of(units: Sequence[Unit], job: Job) -> list[Unit]:
    """Shares of about equal bytes: the largest first, each to whom has least."""
    loads = [0] * job.share.count
    mine = []
    for unit in sorted(units, key=lambda unit: -unit.size):
        i = loads.index(min(loads))
        loads[i] += max(unit.size, 1)
        if i == job.share.number - 1:
            mine.append(unit)
    return sorted(mine, key=lambda unit: unit.number)


def _read_unit(unit: Unit) -> dict[str, Any]:
    """Pass 1: documents of some parts to a spill file."""
    corpus = unit.corpus
    options = corpus.options
    threshold = int(options.val_fraction * 2.0**64)
    hashes = dedup.hasher(options, corpus.bands)
    result = ReadResult.empty(unit.buckets)
    spill = SpillWriter(unit.directory / f"{unit.name}.spill", 3 * unit.buckets)
    for part in unit.parts:
        for place, document, payload in _with_payloads(read_part(part, options.field), corpus.tokenizer):
            if isinstance(document, LostDocument):
                result.lost += 1
                if len(result.causes) < MAX_CAUSES:
                    result.causes.append(f"{part.source.label} at {place}: {document.cause}")
                continue
            # By content, so that equal documents stay on one side.
            content = hashlib.sha256(document.encode()).digest()
            side: Side = "val" if int.from_bytes(content[:8], "big") < threshold else "train"
            # By place, so that equal documents are spread.
            seeded = struct.pack("<QQQ", options.seed, part.number, place)
            key = hashlib.blake2b(seeded, digest_size=16, person=b"mlm_dist order").digest()
            bucket = dedup.bucket_of(key, unit.buckets)
            spill.add(segment(side, bucket, unit.buckets), pack(key, payload))
            for one, record in dedup.records(hashes(document), key, len(payload), side == "val"):
                spill.add(segment("hash", dedup.bucket_of(one, unit.buckets), unit.buckets), record)
            result.documents[side] += 1
            result.sizes[side][bucket] += len(payload)
    spill.close()
    return result.to_json()


def _with_payloads(
    documents: Iterator[tuple[int, str | LostDocument]], tokenizer: TextTokenizer | None
) -> Iterator[tuple[int, str | LostDocument, bytes]]:
    """Each document with what a member holds of it. With a tokenizer a document without a token is left out, as an empty one is."""
    if tokenizer is None:
        for place, document in documents:
            line = b"" if isinstance(document, LostDocument) else _line(document)
            yield place, document, line
        return
    waiting: list[tuple[int, str | LostDocument]] = []
    size = 0
    for place, document in documents:
        waiting.append((place, document))
        size += len(document) if isinstance(document, str) else 1
        if size >= _ENCODE_CHARACTERS:
            yield from _encoded(waiting, tokenizer)
            waiting, size = [], 0
    yield from _encoded(waiting, tokenizer)


def _line(document: str) -> bytes:
    return json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n"


def _encoded(
    documents: Sequence[tuple[int, str | LostDocument]], tokenizer: TextTokenizer
) -> Iterator[tuple[int, str | LostDocument, bytes]]:
    texts = [document for _, document in documents if isinstance(document, str)]
    ids, offsets = tokenizer.encode(texts)
    reserved = np.isin(ids, [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id])
    end = np.array([tokenizer.sep_id], tokenizer.dtype)
    i = 0
    for place, document in documents:
        if isinstance(document, LostDocument):
            yield place, document, b""
            continue
        span = slice(offsets[i], offsets[i + 1])
        i += 1
        if reserved[span].any():
            yield place, LostDocument("the tokenizer makes a special token of its text"), b""
        elif span.stop > span.start:
            yield place, document, np.concatenate([ids[span], end]).astype(tokenizer.dtype.newbyteorder("<")).tobytes()


def segment(kind: Side | str, bucket: int, buckets: int) -> int:
    """Where a spill file holds the documents of a side, or the records of hashes."""
    return ("train", "val", "hash").index(kind) * buckets + bucket
