"""What the training data is: shards, their blocks, and a fingerprint over all of it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mlm_dist.errors import UserError
from mlm_dist.files import write_atomically

FORMAT = "mlm_dist.manifest"
VERSION = 1


@dataclass(frozen=True, eq=False)
class Shard:
    """One archive and its n blocks in ascending order; a block is a run of consecutive members.

    Attributes:
        path: POSIX path relative to the manifest's directory, below it.
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
        if type(self.size) is not int or self.size < 0:
            raise UserError(f"shard {self.path!r}: size is {self.size!r}; it must be a number of bytes")
        if not isinstance(self.sha256, str) or len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise UserError(f"shard {self.path!r}: sha256 is {self.sha256!r}; it must be 64 lower-case hex digits")
        columns = {"offset": self.offsets, "length": self.lengths, "documents": self.documents, "crc32": self.crc32}
        counts = {name: len(column) for name, column in columns.items()}
        if len(set(counts.values())) > 1:
            raise UserError(f"shard {self.path!r}: its lists of blocks differ in length: {counts}")
        self._check_blocks()

    def _check_blocks(self) -> None:
        ends = self.offsets + self.lengths
        before = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        for wrong, what in (
            (self.offsets < 0, "begins before the file"),
            (self.lengths <= 0, "is empty or of negative length"),
            (ends > self.size, f"ends behind the file's {self.size} bytes"),
            (self.offsets < before[: len(ends)], "overlaps the one before it"),
            (self.documents < 0, "has a negative number of documents"),
        ):
            if wrong.any():
                i = int(wrong.argmax())
                raise UserError(
                    f"shard {self.path!r}: block {i} (offset {self.offsets[i]}, length {self.lengths[i]}, "
                    f"documents {self.documents[i]}) {what}"
                )


class Manifest:
    """The shards of one data set, in their order.

    Attributes:
        root: Directory that the shards' paths are relative to.
        shards: The shards.
        info: How the data were made, for people; the fingerprint does not cover it.

    Raises:
        UserError: No shards, no block in any, or a path that is there twice.
    """

    def __init__(self, root: Path, shards: Iterable[Shard], info: dict[str, Any]) -> None:
        self.root = root
        self.shards = tuple(shards)
        self.info = info
        if not self.shards:
            raise UserError("no shards: a manifest needs at least one")
        if not self.num_blocks:
            raise UserError(f"none of the {len(self.shards)} shards has a block")
        seen: set[str] = set()
        for shard in self.shards:
            if shard.path in seen:
                raise UserError(f"the shard {shard.path!r} is there twice")
            seen.add(shard.path)

    @property
    def num_blocks(self) -> int:
        """Blocks of all shards."""
        return sum(len(shard.offsets) for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(int(shard.lengths.sum()) for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents of all blocks."""
        return sum(int(shard.documents.sum()) for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' paths, sizes, checksums and blocks; neither `info` nor `root` enters."""
        digest = hashlib.sha256(f"{FORMAT} {VERSION} {len(self.shards)}\n".encode())
        for shard in self.shards:
            digest.update(json.dumps([shard.path, shard.size, shard.sha256, len(shard.offsets)]).encode() + b"\n")
            for column in (shard.offsets, shard.lengths, shard.documents, shard.crc32):
                digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def text_field(self) -> str | None:
        """The field of JSON members that was counted as text, where ``index`` made the manifest; else None."""
        options = self.info.get("options")
        return options.get("field") if self.info.get("tool") == "mlm-dist index" and isinstance(options, dict) else None

    def shard_path(self, i: int) -> Path:
        """Where shard `i` lies."""
        return self.root / self.shards[i].path

    def check_files(self) -> None:
        """Check that every shard is there with its size, without reading it.

        Raises:
            UserError: Names the first shard that is not.
        """
        for i, shard in enumerate(self.shards):
            path = self.shard_path(i)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(f"shard {path} of the manifest cannot be read: {error.strerror}") from error
            if size != shard.size:
                raise UserError(f"shard {path} has {size} bytes; the manifest says {shard.size}")

    @classmethod
    def read(cls, path: str | Path) -> "Manifest":
        """Read and check a manifest file.

        Raises:
            UserError: A missing or unreadable file, one that is no manifest, any field that is wrong, or a fingerprint
                that does not belong to the shards.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"manifest {path}: {error.strerror}; make one by `mlm-dist prepare` or `index`") from error
        except ValueError as error:
            raise UserError(f"manifest {path} is not JSON: {error}") from error
        try:
            return cls._from_json(path.parent, content)
        except UserError as error:
            raise UserError(f"manifest {path}: {error}") from error

    @classmethod
    def _from_json(cls, root: Path, content: Any) -> "Manifest":
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise UserError(f"format is {found!r}; it must be {FORMAT!r}")
        if content.get("version") != VERSION:
            raise UserError(f"version is {content.get('version')!r}; this program reads version {VERSION}")
        shards = _field(content, "shards", list)
        info = _field(content, "info", dict)
        manifest = cls(root, [_shard_from_json(i, shard) for i, shard in enumerate(shards)], info)
        stated = _field(content, "fingerprint", str)
        if stated != manifest.fingerprint:
            raise UserError(
                f"fingerprint is {stated}, but the shards listed give {manifest.fingerprint}: the file was changed by "
                "hand or damaged; make it again"
            )
        return manifest

    def write(self, path: str | Path) -> None:
        """Write the file whole or not at all: a temporary file beside it, fsync, rename."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "info": self.info,
            "shards": [
                {
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
                for shard in self.shards
            ],
        }
        write_atomically(Path(path), json.dumps(content, separators=(",", ":")).encode() + b"\n")


def _field(content: dict[str, Any], name: str, kind: type) -> Any:
    value = content.get(name)
    if type(value) is not kind:
        raise UserError(f"{name} is {value!r:.80}; it must be a JSON {_JSON_NAMES[kind]}")
    return value


_JSON_NAMES = {dict: "object", list: "array", str: "string", int: "whole number"}


def _shard_from_json(i: int, content: Any) -> Shard:
    if not isinstance(content, dict):
        raise UserError(f"shards[{i}] is {content!r:.80}; it must be a JSON object")
    try:
        blocks = _field(content, "blocks", dict)
        return Shard(
            path=_field(content, "path", str),
            size=_field(content, "size", int),
            sha256=_field(content, "sha256", str),
            offsets=_column(blocks, "offset", np.int64),
            lengths=_column(blocks, "length", np.int64),
            documents=_column(blocks, "documents", np.int64),
            crc32=_column(blocks, "crc32", np.uint32),
        )
    except UserError as error:
        raise UserError(f"shards[{i}]: {error}") from error


def _column(blocks: dict[str, Any], name: str, dtype: type) -> np.ndarray:
    values = _field(blocks, name, list)
    limits = np.iinfo(dtype)
    for i, value in enumerate(values):
        if type(value) is not int or not limits.min <= value <= limits.max:
            raise UserError(f"blocks.{name}[{i}] is {value!r:.80}; it must be a whole number that fits {limits.dtype}")
    return np.array(values, dtype=dtype)


def _check_path(path: str) -> None:
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise UserError(
            f"the shard path {path!r} is wrong: it must be relative to the manifest's directory and below it"
        )
