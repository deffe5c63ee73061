"""From a member of an archive to its documents."""

import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import zstandard

Codec = Literal["", ".gz", ".zst"]

MAX_MEMBER_BYTES = 1 << 30
_SUFFIXES = (".txt", ".json", ".jsonl")
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
# A zstd block of 4 bytes can stand for 128 KiB, and the library gives all output of one input at once: small inputs
# bound the output (128 MiB).
_ZSTD_CHUNK = 1 << 12


class MemberError(Exception):
    """A compressed member or file that cannot be decompressed whole, or that is larger than allowed."""


@dataclass(frozen=True, slots=True)
class LostDocument:
    """Stands in the place of a document that cannot be read; its neighbours can.

    Attributes:
        cause: Why, in words.
    """

    cause: str


def split_name(name: str) -> tuple[str, Codec]:
    """The suffix of what a file holds and the one of how it is compressed: `a.b.TXT.gz` -> (`.txt`, `.gz`)."""
    base = name.rsplit("/", 1)[-1].lower()
    codec: Codec = ""
    if base.endswith(".gz"):
        codec = ".gz"
    elif base.endswith(".zst"):
        codec = ".zst"
    base = base.removesuffix(codec)
    dot = base.rfind(".")
    return (base[dot:] if dot >= 0 else ""), codec


def is_text_member(name: str) -> bool:
    """Whether `read_documents` reads a member of this name; any other member is no text and gives nothing."""
    # Hidden files are no texts of the user's: macOS's tar adds a ._NAME of attributes to each.
    return split_name(name)[0] in _SUFFIXES and not name.rpartition("/")[2].startswith(".")


def read_documents(
    name: str, data: bytes | memoryview, field: str = "text", *, max_bytes: int = MAX_MEMBER_BYTES
) -> Iterator[str | LostDocument]:
    """Yield the documents of one member in their order.

    `.txt` is one document, `.json` one (the string in `field`), `.jsonl` one for each line that is not blank; each may
    also be compressed (`.gz`, `.zst`). A member of another suffix, or a hidden one, gives nothing.

    Args:
        name: The member's name; its suffixes say how to read it.
        data: The member's bytes.
        field: Which field of a JSON object is the text.
        max_bytes: Largest decompressed size.

    Raises:
        MemberError: A broken or too large compressed member. Nothing of it has been given then.
    """
    if not is_text_member(name):
        return
    suffix, codec = split_name(name)
    content = _decompress_all(data, codec, max_bytes) if codec else data
    if content[:3] == _BOM:
        content = content[3:]
    if suffix == ".txt":
        yield decode(content)
    elif suffix == ".json":
        yield parse_record(content, field)
    else:
        for line in io.BytesIO(content):
            if not line.isspace():
                yield parse_record(line, field)


def decode(data: bytes | memoryview) -> str | LostDocument:
    """UTF-8 bytes as a string, strictly."""
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        return LostDocument(f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}")


def parse_record(line: bytes | memoryview, field: str) -> str | LostDocument:
    """The string in `field` of one JSON object."""
    text = decode(line)
    if isinstance(text, LostDocument):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of more digits than Python converts
        return LostDocument(f"bad JSON: {error}")
    if not isinstance(record, dict):
        return LostDocument(f"a JSON {type(record).__name__} where an object with the field {field!r} should be")
    if field not in record:
        keys = ", ".join(repr(key) for key in list(record)[:8])
        return LostDocument(f"no field {field!r} (there are: {keys})")
    value = record[field]
    if not isinstance(value, str):
        return LostDocument(f"the field {field!r} is a {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON, but no tokenizer takes it
        return LostDocument(f"the field {field!r} has an unpaired surrogate")
    return value


def decompress(chunks: Iterable[bytes | memoryview], codec: Codec) -> Iterator[bytes]:
    """Decompress a stream of one or more gzip members or zstd frames, piece by piece.

    Unlike `zstandard`'s readers, which end a cut stream as if it were whole, this one tells.

    Args:
        chunks: The compressed bytes in pieces. One piece gives at most 1 MiB (gzip) or 128 MiB (zstd) at a time.
        codec: `.gz` or `.zst`; with the empty string the pieces go through as they are.

    Raises:
        MemberError: Damaged or cut data.
    """
    if not codec:
        yield from (bytes(chunk) for chunk in chunks)
        return
    pieces = _gunzip(chunks) if codec == ".gz" else _unzstd(chunks)
    try:
        yield from pieces
    except (zlib.error, zstandard.ZstdError) as error:
        raise MemberError(f"damaged {codec} data: {error}") from error


def _gunzip(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    decoder = None
    for chunk in chunks:
        rest = bytes(chunk)
        while rest:
            if decoder is None:
                rest = rest.lstrip(b"\0")  # padding between and after gzip members, as `gzip` allows
                if not rest:
                    break
                decoder = zlib.decompressobj(wbits=31)
            yield decoder.decompress(rest, _CHUNK)
            rest = decoder.unconsumed_tail or decoder.unused_data
            if decoder.eof:
                decoder = None
    while decoder is not None:  # what the decoder still held back when the input was over
        tail = decoder.decompress(decoder.unconsumed_tail, _CHUNK)
        if not tail:
            raise MemberError("damaged .gz data: cut before its end")
        yield tail
        if decoder.eof:
            decoder = None


def _unzstd(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    decoder = None
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), _ZSTD_CHUNK):
            rest = bytes(view[start : start + _ZSTD_CHUNK])
            while rest:
                if decoder is None:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                yield decoder.decompress(rest)
                rest = decoder.unused_data if decoder.eof else b""
                if decoder.eof:
                    decoder = None
    if decoder is not None:
        raise MemberError("damaged .zst data: cut before its end")


def _decompress_all(data: bytes | memoryview, codec: Codec, max_bytes: int) -> bytes:
    out = bytearray()
    for piece in decompress([data], codec):
        out += piece
        if len(out) > max_bytes:
            raise MemberError(f"more than {max_bytes} bytes when decompressed")
    if not len(data):
        raise MemberError(f"damaged {codec} data: empty")
    return bytes(out)
