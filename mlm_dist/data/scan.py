"""A whole archive to the blocks of its shard: what `index` and `prepare` do with each."""

import hashlib
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlm_dist.data.archive import PIPE, block_members, codec_of_shard
from mlm_dist.data.members import (
    MAX_MEMBER_BYTES,
    LostDocument,
    MemberError,
    TokenIds,
    holds_documents,
    is_ids_member,
    label,
    parse,
    unpack,
)
from mlm_dist.data.shard import Shard
from mlm_dist.data.tar import Member, TarError
from mlm_dist.errors import UserError

MAX_BLOCK = 1 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ScanOptions:
    """How archives are read.

    Attributes:
        field: Field of JSON members that is the text.
        block_size: Bytes of a block, at most if its members allow.
        ids: What the numbers of `.npy` members mean, or None if it is not known.
        ignore_npy: Pass over `.npy` members instead of asking for `ids`.
        skip_damaged: Leave out what cannot be read of an archive instead of refusing it.
        max_bytes: Most bytes that a compressed archive or member, or all compressed members of a block, may give.
    """

    field: str = "text"
    block_size: int = MAX_BLOCK
    ids: TokenIds | None = None
    ignore_npy: bool = False
    skip_damaged: bool = False
    max_bytes: int = MAX_MEMBER_BYTES


@dataclass(frozen=True)
class ScannedShard:
    """What was found in an archive.

    Attributes:
        shard: The shard with its blocks.
        losses: Blocks with documents that cannot be read (bad JSON, field, UTF-8 or ids): {shard, offset, documents,
            cause}.
        damaged: Parts that were left out: {shard, offset, bytes, cause}.
        pretokenized: Whether it has token ids.
    """

    shard: Shard
    losses: list[dict[str, Any]]
    damaged: list[dict[str, Any]]
    pretokenized: bool


@dataclass
class _Block:
    """A block in the making: bytes `start` to `end`, of which `unpacked` more came out of compressed members."""

    start: int
    end: int
    documents: int = 0
    lost: int = 0
    cause: str = ""
    unpacked: int = 0

    def add(self, other: "_Block") -> None:
        self.end = other.end
        self.documents += other.documents
        self.lost += other.lost
        self.cause = self.cause or other.cause
        self.unpacked += other.unpacked


class _Reader:
    """Reads one archive to blocks. After an error it holds what came before: `end` is where the last good member ends."""

    def __init__(self, name: str, options: ScanOptions, single: bool) -> None:
        self.name, self.options, self.single = name, options, single
        self.blocks: list[_Block] = []
        self.damaged: list[dict[str, Any]] = []
        self.pretokenized = False
        self.end = 0

    def read(self, view: memoryview) -> None:
        """Raises TarError, MemberError, UserError."""
        joins = False  # whether the next member may lie in the last block: nothing was left out between them
        for member in block_members(view, self.name, whole=True, max_bytes=self.options.max_bytes):
            if is_ids_member(member.name) and self.options.ids is None and not self.options.ignore_npy:
                raise UserError(
                    f"{label(member.name)!r} may hold token ids: give --tokenizer DIR, the tokenizer that made them, or --ignore-npy "
                    "if .npy members are something else"
                )
            if holds_documents(member.name, self.options.ids):
                try:
                    self._add(self._read_member(member), joins)
                    joins = True
                except MemberError as error:
                    cause = f"member '{label(member.name)}': {error}"
                    if self.single or not self.options.skip_damaged:
                        raise (MemberError(cause) if self.single else TarError(member.start, cause)) from error
                    joins = False
                    self.leave_out(member.start, member.end, cause)
            self.end = member.end

    def leave_out(self, start: int, end: int, cause: str) -> None:
        """Note a part of the archive that cannot be read."""
        self.damaged.append({"shard": self.name, "offset": start, "bytes": end - start, "cause": cause})

    def _read_member(self, member: Member) -> _Block:
        found = _Block(member.start, member.end)
        content = unpack(member.name, member.data, self.options.max_bytes)
        if content is not member.data:
            found.unpacked = len(content)
        for document in parse(member.name, content, self.options.field, self.options.ids):
            if isinstance(document, LostDocument):
                found.lost += 1
                found.cause = found.cause or f"{label(member.name)}: {document.cause}"
            else:
                found.documents += 1
        self.pretokenized |= is_ids_member(member.name)
        return found

    def _add(self, found: _Block, joins: bool) -> None:
        last = self.blocks[-1] if self.blocks else None
        if last is None or not (joins or self.single):
            self.blocks.append(found)
            return
        # A reader of the block gives all its members together no more memory than it may give one.
        fits = last.unpacked + found.unpacked <= self.options.max_bytes
        if self.single and not fits:
            raise MemberError(
                f"with those before it more than {self.options.max_bytes} bytes when decompressed; split it"
            )
        if self.single or (fits and found.end - last.start <= self.options.block_size):
            last.add(found)
        else:
            self.blocks.append(found)


def scan_archive(view: memoryview, name: str, options: ScanOptions, *, single: bool = False) -> ScannedShard:
    """Read a whole archive: every member's place, every document, the checksums.

    A block ends before the member that would make it longer than the block size; a longer member is a block alone.
    Members that hold no documents are in no block, or in one because others lie around them.

    Args:
        view: Its bytes.
        name: Its path in the manifest.
        options: How to read it.
        single: Whether the archive must be one block, since no part of it can be fetched alone. Compressed archives and
            the output of commands always are.

    Raises:
        UserError: The archive cannot be read whole (and damage is not to be skipped), or it holds `.npy` members and it
            is not known whose ids these are. Says where and why, but not of which archive.
    """
    single = single or name.startswith(PIPE) or bool(codec_of_shard(name, view))
    reader = _Reader(name, options, single)
    try:
        reader.read(view)
    except (TarError, MemberError) as error:
        if not options.skip_damaged:
            place = "" if isinstance(error, TarError) else "at byte 0: "
            raise UserError(f"is damaged {place}{error} (--skip-damaged leaves out what cannot be read)") from error
        if single:
            reader.blocks = []
        reader.leave_out(0 if single else reader.end, len(view), str(error))
    blocks = reader.blocks
    if single:  # a shard of one block is fetched and checked whole
        blocks = [replace(block, start=0, end=len(view)) for block in blocks]
    digest = hashlib.sha256()
    for start in range(0, len(view), _CHUNK):
        digest.update(view[start : start + _CHUNK])
    shard = Shard(
        path=name,
        size=len(view),
        sha256=digest.hexdigest(),
        offsets=np.array([block.start for block in blocks], np.int64),
        lengths=np.array([block.end - block.start for block in blocks], np.int64),
        documents=np.array([block.documents for block in blocks], np.int64),
        crc32=np.array([zlib.crc32(view[block.start : block.end]) for block in blocks], np.uint32),
    )
    losses = [
        {"shard": name, "offset": block.start, "documents": block.lost, "cause": block.cause}
        for block in blocks
        if block.lost
    ]
    return ScannedShard(shard, losses, reader.damaged, reader.pretokenized)
