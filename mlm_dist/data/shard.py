"""One archive of a data set and where its blocks lie."""

import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np

from mlm_dist.data.archive import PIPE
from mlm_dist.errors import UserError

# Far beyond any block, and small enough that no sum of a manifest's blocks overflows.
_MAX_DOCUMENTS = 1 << 36


@dataclass(frozen=True, eq=False)
class Shard:
    """One archive and its n blocks in ascending order; a block is a run of consecutive members.

    Attributes:
        path: POSIX path relative to the manifest's root, below it; or `pipe:COMMAND`, whose output is the archive. Such
            a shard, and one that is compressed as a whole, is a single block.
        size: Bytes of the file.
        sha256: Of the file, hexadecimal.
        offsets: int64 [n], first byte of each block: the first header of its first member.
        lengths: int64 [n], bytes of each block, up to the end of the padded data of its last member.
        documents: int64 [n], documents that could be read from each block when the manifest was made.
        crc32: uint32 [n], `zlib.crc32` of each block's bytes.

    Raises:
        UserError: A path, size, checksum or block that cannot be.
    """

    path: str
    size: int
    sha256: str
    offsets: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    crc32: np.ndarray

    def __post_init__(self) -> None:
        _check_path(self.path)
        if type(self.size) is not int or not 0 <= self.size < 1 << 63:
            raise UserError(f"shard {self.path!r}: size is {self.size!r}; it must be a number of bytes")
        if not isinstance(self.sha256, str) or len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise UserError(f"shard {self.path!r}: sha256 is {self.sha256!r}; it must be 64 lower-case hex digits")
        columns = {"offset": self.offsets, "length": self.lengths, "documents": self.documents, "crc32": self.crc32}
        counts = {name: len(column) for name, column in columns.items()}
        if len(set(counts.values())) > 1:
            raise UserError(f"shard {self.path!r}: its lists of blocks differ in length: {counts}")
        self._check_blocks()
        if self.path.startswith(PIPE) and (self.offsets.tolist(), self.lengths.tolist()) not in (
            ([0], [self.size]),
            ([], []),
        ):
            raise UserError(f"shard {self.path!r}: the output of a command is one block, from byte 0 to {self.size}")

    def _check_blocks(self) -> None:
        # In this order none of the sums overflows that is looked at.
        before = np.concatenate([np.zeros(1, np.int64), self.offsets + self.lengths])
        for wrong, what in (
            (self.offsets < 0, "begins before the file"),
            (self.lengths <= 0, "is empty or of negative length"),
            (self.lengths > self.size - self.offsets, f"ends behind the file's {self.size} bytes"),
            (self.offsets < before[:-1], "overlaps the one before it"),
            (self.documents < 0, "has a negative number of documents"),
            (self.documents > _MAX_DOCUMENTS, f"has more than {_MAX_DOCUMENTS} documents"),
        ):
            if wrong.any():
                i = int(wrong.argmax())
                raise UserError(
                    f"shard {self.path!r}: block {i} (offset {self.offsets[i]}, length {self.lengths[i]}, "
                    f"documents {self.documents[i]}) {what}"
                )


def is_url(text: str) -> bool:
    """Whether a text is a URL of any scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def json_field(content: dict[str, Any], name: str, kind: type) -> Any:
    """The value of a field that must be of this type.

    Raises:
        UserError: It is missing or of another.
    """
    value = content.get(name)
    if type(value) is not kind:
        raise UserError(f"{name} is {value!r:.80}; it must be a JSON {_JSON_NAMES[kind]}")
    return value


_JSON_NAMES = {dict: "object", list: "array", str: "string", int: "whole number"}


def shard_from_json(i: int, content: Any) -> Shard:
    """Entry `i` of a manifest's list of shards.

    Raises:
        UserError: A field that is missing or wrong; names it.
    """
    if not isinstance(content, dict):
        raise UserError(f"shards[{i}] is {content!r:.80}; it must be a JSON object")
    try:
        blocks = json_field(content, "blocks", dict)
        return Shard(
            path=json_field(content, "path", str),
            size=json_field(content, "size", int),
            sha256=json_field(content, "sha256", str),
            offsets=_column(blocks, "offset", np.int64),
            lengths=_column(blocks, "length", np.int64),
            documents=_column(blocks, "documents", np.int64),
            crc32=_column(blocks, "crc32", np.uint32),
        )
    except UserError as error:
        raise UserError(f"shards[{i}]: {error}") from error


def _column(blocks: dict[str, Any], name: str, dtype: type) -> np.ndarray:
    values = json_field(blocks, name, list)
    try:
        if set(map(type, values)) <= {int}:
            return np.array(values, dtype=dtype)
    except OverflowError:
        pass
    limits = np.iinfo(dtype)
    i = next(i for i, v in enumerate(values) if type(v) is not int or not limits.min <= v <= limits.max)
    raise UserError(f"blocks.{name}[{i}] is {values[i]!r:.80}; it must be a whole number that fits {limits.dtype}")


def _check_path(path: str) -> None:
    wrong = not isinstance(path, str) or not path or "\0" in path
    if not wrong:
        try:
            os.fsencode(path)
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
            wrong = True
    if not wrong and path.startswith(PIPE):
        wrong = not path[len(PIPE) :].strip()
    elif not wrong:
        parts = PurePosixPath(path).parts
        wrong = not parts or path.startswith("/") or is_url(path)
        # Also as a server or a store would read it.
        wrong = wrong or ".." in parts or ".." in PurePosixPath(unquote(path)).parts
    if wrong:
        raise UserError(
            f"the shard path {path!r:.200} is wrong: it must be relative to the manifest's directory and below it, or pipe:COMMAND"
        )
