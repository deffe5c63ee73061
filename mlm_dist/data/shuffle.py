"""The two passes of `mlm-dist prepare`: a shuffle that needs no common state, in bounded memory.

Every document gets a key, a hash of (seed, number of its source, place in it), and lies where its key says. So neither
the number of processes nor the order of anything enters.

1. read: documents go to spill files, one for each range of keys ("bucket") and process;
2. write: a shard is a run of buckets; each bucket is sorted by key and written.
"""

import hashlib
import itertools
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import zstandard

from mlm_dist.data.index import MAX_CAUSES, auto_block_size, index_tar
from mlm_dist.data.manifest import Shard
from mlm_dist.data.members import LostDocument
from mlm_dist.data.sources import Part, Source, SplitBy, find_parts, read_part
from mlm_dist.data.workers import WorkerPool
from mlm_dist.errors import UserError

Side = Literal["train", "val"]

_RECORD = struct.Struct("<16sI")  # key, length of the JSON line that follows
_BUCKETS_A_SHARD = 16  # so that shards, which are whole buckets, differ in size by a few per cent
_MAX_BUCKETS = 4096
_SPILL_BUFFER = 32 << 20
_TASK_BYTES = 4 << 20
_TASK_PARTS = 256
_ZST_RATIO = 3  # of text, about; only block sizes are derived from it
_MEMBER_HEADROOM = 1024  # a member's header and padding


@dataclass(frozen=True)
class PrepareOptions:
    """What the output depends on besides the text. The command's help says what each means.

    Raises:
        UserError: A value out of its range.
    """

    split_by: SplitBy = "auto"
    field: str = "text"
    documents_per_member: int = 64
    shard_size: int = 256 << 20
    block_size: int | None = None
    val_fraction: float = 0.05
    seed: int = 0
    compress: Literal["none", "zst"] = "none"

    def __post_init__(self) -> None:
        if self.documents_per_member < 1:
            raise UserError(f"--documents-per-member is {self.documents_per_member}; it must be at least 1")
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"--val-fraction is {self.val_fraction}; it must be at least 0 (no held-out part) and below 1"
            )
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed is {self.seed}; it must be from 0 to 2^64 - 1")


@dataclass(frozen=True)
class _ReadTask:
    parts: tuple[Part, ...]
    directory: Path
    buckets: int
    options: PrepareOptions


@dataclass
class _ReadResult:
    documents: dict[Side, int]
    line_bytes: dict[Side, np.ndarray]  # int64 [buckets]
    lost: int = 0
    causes: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, buckets: int) -> "_ReadResult":
        none = np.zeros(buckets, np.int64)
        return cls({"train": 0, "val": 0}, {"train": none, "val": none.copy()})


@dataclass(frozen=True)
class _WriteTask:
    side: Side
    number: int
    buckets: range
    directory: Path
    block_size: int
    options: PrepareOptions

    @property
    def name(self) -> str:
        return f"{self.side}-{self.number:05d}.tar"


@dataclass(frozen=True)
class Shuffled:
    """What `shuffle` wrote.

    Attributes:
        shards: Of each side that has documents, in their order; their files lie in the directory that was given.
        block_size: Bytes that blocks of a side have at most, if their members allow.
        documents: Of each side.
        lost: Documents that could not be read.
        causes: Of the first 20 of them, with their places.
    """

    shards: dict[Side, list[Shard]]
    block_size: dict[Side, int]
    documents: dict[Side, int]
    lost: int
    causes: list[str]


def shuffle(sources: Sequence[Source], directory: Path, options: PrepareOptions, pool: WorkerPool) -> Shuffled:
    """Write the sources' documents to shards `train-00000.tar`, ..., `val-00000.tar`, ... in an empty directory.

    Raises:
        UserError: An input that cannot be read, or no document on a side of the split.
    """
    read = _read_all(sources, directory, options, pool)
    tasks = _plan_shards(read, directory, options)
    weights = [int(read.line_bytes[task.side][task.buckets.start : task.buckets.stop].sum()) for task in tasks]
    shards: dict[Side, list[Shard]] = {}
    for task, shard in zip(tasks, pool.map(_write_shard, tasks, weights, "Writing"), strict=True):
        shards.setdefault(task.side, []).append(shard)
    for side, found in shards.items():
        written = sum(int(shard.documents.sum()) for shard in found)
        assert written == read.documents[side], f"{read.documents[side]} documents became {written}"
    block_size = {task.side: task.block_size for task in tasks}
    return Shuffled(shards, block_size, read.documents, read.lost, read.causes)


def _read_all(sources: Sequence[Source], directory: Path, options: PrepareOptions, pool: WorkerPool) -> _ReadResult:
    total = sum(source.text_size for source in sources)
    buckets = min(max(_BUCKETS_A_SHARD * -(-total // options.shard_size), _BUCKETS_A_SHARD), _MAX_BUCKETS)
    tasks = [_ReadTask(parts, directory, buckets, options) for parts in _group(find_parts(sources))]
    weights = [sum(part.size for part in task.parts) for task in tasks]
    result = _ReadResult.empty(buckets)
    for one in pool.map(_read_task, tasks, weights, "Reading"):
        for side, count in one.documents.items():
            result.documents[side] += count
            result.line_bytes[side] += one.line_bytes[side]
        result.lost += one.lost
        result.causes = (result.causes + one.causes)[:MAX_CAUSES]
    if not sum(result.documents.values()):
        causes = "".join(f"\n  {cause}" for cause in result.causes[:3])
        raise UserError(f"the {len(sources)} inputs hold no document that can be read{causes}")
    for side, count in result.documents.items():
        if not count and (side == "train" or options.val_fraction):
            raise UserError(
                f"--val-fraction {options.val_fraction} puts none of {sum(result.documents.values())} documents on the "
                f"{side} side: choose {'more' if side == 'val' else 'less'}, or split the text into more documents "
                "(--split-by paragraph)"
            )
    return result


def _group(parts: Sequence[Part]) -> Iterator[tuple[Part, ...]]:
    """Tasks of some MiB, so that thousands of small files are not thousands of tasks."""
    group: list[Part] = []
    size = 0
    for part in parts:
        group.append(part)
        size += part.size
        if size >= _TASK_BYTES or len(group) == _TASK_PARTS:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def _read_task(task: _ReadTask) -> _ReadResult:
    """Pass 1: documents of some parts to spill files."""
    options = task.options
    threshold = int(options.val_fraction * 2.0**64)
    result = _ReadResult.empty(task.buckets)
    spill = _Spill(task.directory)
    for part in task.parts:
        for place, document in read_part(part, options.field):
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
            bucket = int.from_bytes(key[:8], "big") * task.buckets >> 64
            line = json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n"
            spill.add(f"{side}-{bucket:04d}", _RECORD.pack(key, len(line)) + line)
            result.documents[side] += 1
            result.line_bytes[side][bucket] += len(line)
    spill.flush()
    return result


class _Spill:
    """Appends records to files, through a buffer of bounded size; each process has files of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._records: dict[str, list[bytes]] = {}
        self._size = 0

    def add(self, name: str, record: bytes) -> None:
        self._records.setdefault(name, []).append(record)
        self._size += len(record)
        if self._size > _SPILL_BUFFER:
            self.flush()

    def flush(self) -> None:
        for name, records in self._records.items():
            with open(self._directory / f"{name}.{os.getpid()}", "ab") as file:
                file.writelines(records)
        self._records.clear()
        self._size = 0


def _plan_shards(read: _ReadResult, directory: Path, options: PrepareOptions) -> list[_WriteTask]:
    """Runs of buckets with about equal bytes of text."""
    tasks = []
    for side, line_bytes in read.line_bytes.items():
        total = int(line_bytes.sum())
        if not total:
            continue
        shards = -(-total // options.shard_size)
        shard_of = (line_bytes.cumsum() - line_bytes) * shards // total  # int64 [buckets], never falls
        block_size = options.block_size or auto_block_size(total // (_ZST_RATIO if options.compress == "zst" else 1))
        number = 0
        for _, run in itertools.groupby(range(len(line_bytes)), key=lambda bucket: int(shard_of[bucket])):
            buckets = list(run)
            span = range(buckets[0], buckets[-1] + 1)
            if line_bytes[span.start : span.stop].any():
                tasks.append(_WriteTask(side, number, span, directory, block_size, options))
                number += 1
    return tasks


def _write_shard(task: _WriteTask) -> Shard:
    """Pass 2: one shard. It is read back by the same code that indexes foreign archives, which checks it as well."""
    from webdataset.writer import TarWriter

    options = task.options
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    path = task.directory / task.name
    with path.open("wb") as file:
        # Times and owners are fixed: the bytes depend on the documents alone.
        with TarWriter(file, user="root", group="root", mtime=0, encoder=False) as tar:
            for i, member in enumerate(_members(task)):
                key = f"{task.side}-{task.number:05d}-{i:07d}"
                if options.compress == "zst":
                    tar.write({"__key__": key, "jsonl.zst": compressor.compress(member)})
                else:
                    tar.write({"__key__": key, "jsonl": member})
        file.flush()
        os.fsync(file.fileno())
    return index_tar(path, task.name, "text", task.block_size).shard


def _members(task: _WriteTask) -> Iterator[bytes]:
    """Lines of JSON, gathered into members that fit a block where the documents allow it."""
    limit = max(task.block_size - _MEMBER_HEADROOM, 1)
    lines: list[memoryview] = []
    size = 0
    for line in itertools.chain.from_iterable(_sorted_bucket(task, bucket) for bucket in task.buckets):
        if lines and (size + len(line) > limit or len(lines) == task.options.documents_per_member):
            yield b"".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield b"".join(lines)


def _sorted_bucket(task: _WriteTask, bucket: int) -> Iterator[memoryview]:
    spill = memoryview(b"".join(path.read_bytes() for path in task.directory.glob(f"{task.side}-{bucket:04d}.*")))
    records = []
    position = 0
    while position < len(spill):
        key, length = _RECORD.unpack_from(spill, position)
        position += _RECORD.size
        records.append((key, position, length))
        position += length
    records.sort()
    for _, position, length in records:
        yield spill[position : position + length]
