"""Records on disk, sorted into segments: what the first pass of `prepare` hands to the others.

A task writes one file. When its buffer is full it appends a *run*, all records so far in the order of their segments; an
index beside the file says where each segment of each run begins. So thousands of segments need no thousands of files,
which network file systems would not bear.
"""

import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_HEADER = struct.Struct("<16sQ")  # key, bytes that follow
_BUFFER_BYTES = 64 << 20


def pack(key: bytes, payload: bytes) -> bytes:
    """A keyed record (16 bytes of key)."""
    return _HEADER.pack(key, len(payload)) + payload


def sorted_records(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(key, payload) of keyed records that lie one behind the other, by ascending key."""
    view = memoryview(data)
    records = []
    position = 0
    while position < len(view):
        key, length = _HEADER.unpack_from(view, position)
        position += _HEADER.size
        records.append((key, position, length))
        position += length
    records.sort()
    for key, position, length in records:
        yield key, view[position : position + length]


class SpillWriter:
    """Writes the records of one task; they are there, whole, after `close`.

    Args:
        path: The file; its index is `path` with `.index.npy`.
        segments: How many there are.
    """

    def __init__(self, path: Path, segments: int) -> None:
        self._path = path
        # A task that was thought dead may still be writing: an own name until all is there.
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        self._file = self._temporary.open("wb")
        self._records: list[list[bytes]] = [[] for _ in range(segments)]
        self._size = 0
        self._starts: list[np.ndarray] = []  # of each run: int64 [segments + 1]
        self._end = 0

    def add(self, segment: int, record: bytes) -> None:
        """Add a record to a segment."""
        self._records[segment].append(record)
        self._size += len(record)
        if self._size > _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        sizes = np.array([sum(map(len, records)) for records in self._records], np.int64)
        self._starts.append(self._end + np.concatenate([np.zeros(1, np.int64), sizes.cumsum()]))
        self._end += self._size
        for records in self._records:
            self._file.writelines(records)
            records.clear()
        self._size = 0

    def close(self) -> None:
        """Write what is left and the index, and put both in place."""
        self._flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = self._temporary.with_suffix(".index")
        with index.open("wb") as file:
            np.save(file, np.ascontiguousarray(np.stack(self._starts, axis=1)))  # int64 [segments + 1, runs]
            file.flush()
            os.fsync(file.fileno())
        os.replace(index, _index_path(self._path))
        os.replace(self._temporary, self._path)


def _index_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.npy")


def read_segment(paths: list[Path], segment: int) -> bytes:
    """The records of one segment, of all runs of all files."""
    pieces = []
    for path in paths:
        index = np.load(_index_path(path), mmap_mode="r")
        starts, ends = np.array(index[segment]), np.array(index[segment + 1])
        with path.open("rb", buffering=0) as file:
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                if end > start:
                    pieces.append(_read_at(file.fileno(), start, end - start))
    return b"".join(pieces)


def _read_at(file: int, offset: int, length: int) -> bytes:
    pieces = []
    while length:
        piece = os.pread(file, min(length, 1 << 30), offset)
        assert piece, "a spill file is shorter than its index says"
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
