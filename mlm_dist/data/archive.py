"""From the bytes of a block to its members and documents, whatever the layout of its shard."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlm_dist.data.members import (
    MAX_MEMBER_BYTES,
    Codec,
    Document,
    LostDocument,
    MemberError,
    TokenIds,
    decompress_all,
    holds_documents,
    label,
    parse,
    unpack,
)
from mlm_dist.data.tar import Member, TarError, iter_members, map_archive, map_file
from mlm_dist.storage.store import PIPE, Store, StoreError

_SUFFIXES: dict[str, Codec] = {".tar.gz": ".gz", ".tgz": ".gz", ".tar.zst": ".zst"}
_MAGIC: dict[bytes, Codec] = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}

ARCHIVE_SUFFIXES = (".tar", *_SUFFIXES)


def codec_of_shard(path: str, data: bytes | memoryview) -> Codec:
    """How a shard is compressed as a whole: its path's suffix says so, and of the output of a command its first bytes."""
    if path.startswith(PIPE):
        return next((codec for magic, codec in _MAGIC.items() if data[: len(magic)] == magic), "")
    return next((codec for suffix, codec in _SUFFIXES.items() if path.lower().endswith(suffix)), "")


def block_members(
    data: bytes | memoryview, path: str, *, base: int = 0, whole: bool = False, max_bytes: int = MAX_MEMBER_BYTES
) -> Iterator[Member]:
    """Yield the members of a block: a run of them cut out of a plain tar, or the tar that a compressed shard holds.

    Args:
        data: The block's bytes.
        path: The shard's path in its manifest.
        base: Where the block begins in a plain tar; what is added to every offset given.
        whole: Whether the block is a whole plain tar, so that its end mark is asked for.
        max_bytes: Largest decompressed size of a compressed shard.

    Raises:
        TarError: A damaged tar. In a compressed shard the offset counts decompressed bytes.
        MemberError: A compressed shard that cannot be decompressed. Nothing of it has been given then.
    """
    codec = codec_of_shard(path, data)
    try:
        if codec:
            yield from iter_members(decompress_all(data, codec, max_bytes), whole=True)
        else:
            yield from iter_members(data, base=base, whole=whole)
    except TarError as error:
        if codec:
            raise TarError(error.offset, f"in the decompressed archive: {error.cause}") from error
        for magic, other in _MAGIC.items():
            if error.offset == 0 and data[: len(magic)] == magic:
                suffixes = " or ".join(suffix for suffix, known in _SUFFIXES.items() if known == other)
                raise TarError(0, f"the file is compressed, so its name must end in {suffixes}") from error
        raise


def block_documents(
    data: bytes | memoryview,
    path: str,
    field: str = "text",
    ids: TokenIds | None = None,
    *,
    base: int = 0,
    max_bytes: int = MAX_MEMBER_BYTES,
) -> Iterator[Document | LostDocument]:
    """Yield the documents of a block in their order; a lost one's cause begins with its member's name.

    Args:
        data: The block's bytes.
        path: The shard's path in its manifest.
        field: Which field of JSON members is the text.
        ids: What the numbers of `.npy` members mean (`Manifest.token_ids`); without it they give nothing.
        base: Where the block begins in its shard, for messages.
        max_bytes: Most bytes that its compressed members may have together when decompressed; for a shard that is
            compressed as a whole also most bytes of the archive in it.

    Raises:
        TarError: A damaged tar.
        MemberError: A member, or a compressed shard, that cannot be read at all. The block is lost then: nobody knows
            how many documents the member holds.
    """
    left = max_bytes
    for member in block_members(data, path, base=base, max_bytes=max_bytes):
        if not holds_documents(member.name, ids):
            continue
        try:
            content = unpack(member.name, member.data, max_bytes)
            left -= len(content) if content is not member.data else 0
            if left < 0:
                raise MemberError(f"with those before it more than {max_bytes} bytes when decompressed")
            for document in parse(member.name, content, field, ids):
                if isinstance(document, LostDocument):
                    document = LostDocument(f"{label(member.name)}: {document.cause}")
                yield document
        except MemberError as error:
            raise MemberError(f"member '{label(member.name)}': {error}") from error


@contextmanager
def open_shard(store: Store, path: str) -> Iterator[memoryview]:
    """The bytes of a whole shard: a local file is mapped into memory, anything else is copied to a temporary file first.

    Raises:
        StoreError: They cannot be had.
    """
    if isinstance(store.root, Path) and not path.startswith(PIPE):
        try:
            view = map_archive(store.root / path)
        except OSError as error:
            raise StoreError(f"cannot be read: {error.strerror}") from error
        yield view
        return
    with tempfile.TemporaryFile() as file:
        try:
            for piece in store.fetch(path):
                file.write(piece)
            file.flush()
        except OSError as error:
            raise StoreError(
                f"cannot be copied to {tempfile.gettempdir()}: {error.strerror}; TMPDIR names another directory"
            ) from error
        yield map_file(file)
