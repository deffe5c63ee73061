"""Parts of a checkpoint: fp32 tensors in the safetensors format, written and read by plain system calls.

The safetensors library maps the file: while it writes it holds the interpreter, which the training step waits for, and copies every tensor once
more; of a mapped file that shrinks, the missing pages kill the process that reads. What is written here it can read, and the reverse.
"""

import json
import math
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mlm_dist.checkpoint.format import CheckpointError, write_file

# Written and hashed at once: small enough to be in the processor's cache for both.
PIECE_BYTES = 1 << 20
# The library refuses longer headers too.
MOST_HEADER_BYTES = 100_000_000


def write_part(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write fp32 tensors, contiguous and on the CPU; returns the file's size and SHA-256."""
    header: dict[str, Any] = {}
    end = 0
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), key
        begin, end = end, end + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_file(path, chain([len(text).to_bytes(8, "little"), text], _pieces(tensors)))


def _pieces(tensors: dict[str, torch.Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        data = _bytes_of(tensor)
        for begin in range(0, len(data), PIECE_BYTES):
            yield data[begin : begin + PIECE_BYTES]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).numpy().data.cast("B") if tensor.numel() else memoryview(b"")


class Part:
    """An open part. Its header is believed in nothing.

    Raises:
        CheckpointError: the header is not that of fp32 tensors that fill the file.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("rb", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._read(0, 8), "little")
        if length > min(MOST_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path}: its header cannot be {length} bytes long")
        self._data = 8 + length
        try:
            header = json.loads(self._read(8, length))
            self._places = _places(header, size - self._data)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a part of a checkpoint ({error})") from error

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor, read into memory of its own."""
        if key not in self._places:
            raise CheckpointError(f"{self._path}: holds no tensor {key!r}")
        shape, begin = self._places[key]
        tensor = torch.empty(shape, dtype=torch.float32)
        self._fill(_bytes_of(tensor), self._data + begin)
        return tensor

    def _read(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        self._fill(memoryview(data), offset)
        return data

    def _fill(self, target: memoryview, offset: int) -> None:
        while target:
            read = os.preadv(self._file.fileno(), [target], offset)
            if not read:
                raise CheckpointError(f"{self._path}: ends too early")
            target, offset = target[read:], offset + read


def _places(header: Any, size: int) -> dict[str, tuple[list[int], int]]:
    """Shape and first byte of each tensor. Raises ValueError unless they fill ``size`` bytes one after the other."""
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    places, spans = {}, []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        match entry:
            case {"dtype": "F32", "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
                if not all(type(n) is int and 0 <= n <= size for n in shape) or 4 * math.prod(shape) != end - begin:
                    raise ValueError(f"{key!r} has shape {shape} in {end - begin} bytes")
                places[key] = shape, begin
                spans.append((begin, end))
            case _:
                raise ValueError(f"{key!r} is no fp32 tensor")
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ValueError(f"a tensor begins at byte {begin}, where {at} is right")
        at = end
    if at != size:
        raise ValueError(f"tensors of {at} bytes in a file that has {size}")
    return places
