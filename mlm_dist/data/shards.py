"""The last pass of `mlm-dist prepare`: buckets of spilled documents to shards."""

import io
import itertools
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from mlm_dist.data.dedup import keys_of_bucket
from mlm_dist.data.index import auto_block_size
from mlm_dist.data.members import TokenIds
from mlm_dist.data.prepare_options import SIDES, PrepareOptions, Side
from mlm_dist.data.scan import ScanOptions, scan_archive
from mlm_dist.data.spill import read_segment, sorted_records
from mlm_dist.data.tar import map_archive

_ZST_RATIO = 3  # of text, about; only block sizes are derived from it
_MEMBER_HEADROOM = 1024  # a member's header and padding


def unit_name(i: int) -> str:
    """The name of task `i` of reading, and of its spill file."""
    return f"unit-{i:05d}"


@dataclass(frozen=True)
class Spilled:
    """What the passes before have left.

    Attributes:
        directory: Of the job: where spill files are and shards go.
        units: Number of spill files.
        buckets: Segments of each side in them: those of train, then those of val.
        token_ids: What the documents' token ids mean; None if they are lines of JSON.
        removed: `.npy` file of the keys that do not stay, or None.
    """

    directory: Path
    units: int
    buckets: int
    token_ids: TokenIds | None
    removed: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """The spill files."""
        return [self.directory / f"{unit_name(i)}.spill" for i in range(self.units)]


@dataclass(frozen=True)
class WriteTask:
    """One shard to write, out of a run of buckets."""

    side: Side
    number: int
    buckets: range
    spilled: Spilled
    block_size: int
    options: PrepareOptions

    @property
    def name(self) -> str:
        """Its file."""
        return f"{self.side}-{self.number:05d}.tar"


def plan_shards(sizes: Mapping[Side, np.ndarray], spilled: Spilled, options: PrepareOptions) -> list[WriteTask]:
    """Runs of buckets with about equal bytes.

    Args:
        sizes: int64 [buckets] of each side, bytes.
        spilled: What to write them from.
        options: What to make of it.
    """
    tasks = []
    for side, in_bucket in sizes.items():
        total = int(in_bucket.sum())
        if not total:
            continue
        shards = -(-total // options.shard_size)
        shard_of = (in_bucket.cumsum() - in_bucket) * shards // total  # int64 [buckets], never falls
        block_size = options.block_size or auto_block_size(total // (_ZST_RATIO if options.compress == "zst" else 1))
        number = 0
        for _, run in itertools.groupby(range(len(in_bucket)), key=lambda bucket: int(shard_of[bucket])):
            buckets = list(run)
            span = range(buckets[0], buckets[-1] + 1)
            if in_bucket[span.start : span.stop].any():
                tasks.append(WriteTask(side, number, span, spilled, block_size, options))
                number += 1
    return tasks


def write_shard(task: WriteTask) -> dict[str, Any]:
    """Write one shard. It is read back by the same code that indexes foreign archives, which checks it as well.

    Returns:
        The shard as in a manifest's JSON.
    """
    from webdataset.writer import TarWriter

    compressor = zstandard.ZstdCompressor(write_checksum=True)
    ids = task.spilled.token_ids
    kind = "jsonl" if ids is None else "npy"
    # A process that was thought dead may still be writing: an own name until all is there.
    path = task.spilled.directory / f".{task.name}.{uuid.uuid4().hex}"
    with path.open("wb") as file:
        # Times and owners are fixed: the bytes depend on the documents alone.
        with TarWriter(file, user="root", group="root", mtime=0, encoder=False) as tar:
            for i, content in enumerate(_members(task)):
                member = content if ids is None else _array_file(content, ids)
                key = f"{task.side}-{task.number:05d}-{i:07d}"
                if task.options.compress == "zst":
                    tar.write({"__key__": key, f"{kind}.zst": compressor.compress(member)})
                else:
                    tar.write({"__key__": key, kind: member})
        file.flush()
        os.fsync(file.fileno())
    scanned = scan_archive(map_archive(path), task.name, ScanOptions(block_size=task.block_size, ids=ids))
    assert not scanned.losses, f"what was written cannot be read: {scanned.losses[:3]}"
    os.replace(path, task.spilled.directory / task.name)
    shard = scanned.shard
    return {
        "path": shard.path,
        "size": shard.size,
        "sha256": shard.sha256,
        "blocks": {
            "offset": shard.offsets.tolist(),
            "length": shard.lengths.tolist(),
            "documents": shard.documents.tolist(),
            "crc32": shard.crc32.tolist(),
        },
    }


def _members(task: WriteTask) -> Iterator[bytes]:
    """Documents, gathered into members that fit a block where their sizes allow it."""
    limit = max(task.block_size - _MEMBER_HEADROOM, 1)
    documents: list[memoryview] = []
    size = 0
    for document in itertools.chain.from_iterable(_sorted_bucket(task, bucket) for bucket in task.buckets):
        if documents and (size + len(document) > limit or len(documents) == task.options.documents_per_member):
            yield b"".join(documents)
            documents, size = [], 0
        documents.append(document)
        size += len(document)
    if documents:
        yield b"".join(documents)


def _sorted_bucket(task: WriteTask, bucket: int) -> Iterator[memoryview]:
    spilled = task.spilled
    removed = keys_of_bucket(spilled.removed, bucket, spilled.buckets) if spilled.removed else frozenset()
    data = read_segment(spilled.paths, SIDES.index(task.side) * spilled.buckets + bucket)
    return (payload for key, payload in sorted_records(data) if key not in removed)


def _array_file(content: bytes, ids: TokenIds) -> bytes:
    """A `.npy` file of ids."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.frombuffer(content, ids.dtype.newbyteorder("<")), version=(1, 0))
    return file.getvalue()
