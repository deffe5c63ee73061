"""From a member of an archive to its documents."""

import io
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import zstandard

if TYPE_CHECKING:
    from mlm_dist.data.tokenizer import TextTokenizer

Codec = Literal["", ".gz", ".zst"]
Document = str | np.ndarray
Content = bytes | bytearray | memoryview

MAX_MEMBER_BYTES = 1 << 30
_SUFFIXES = (".txt", ".json", ".jsonl")
_IDS_SUFFIX = ".npy"
_ID_TYPES = tuple(np.dtype(name) for name in ("uint16", "uint32", "int32", "int64"))
# numpy reads no header of more than 10,000 bytes.
_NPY_HEADER = 1 << 14
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
# zlib copies what it has not used yet at each call: small inputs keep that cheap.
_GZIP_CHUNK = 1 << 14
# A zstd block of 4 bytes can stand for 128 KiB, and the library gives all output of one input at once: small inputs
# bound the output (128 MiB).
_ZSTD_CHUNK = 1 << 12
_MAX_LABEL = 200


class MemberError(Exception):
    """A member or file of which nothing can be read: damaged, larger than allowed, or no token ids. How many documents it holds is not known."""


@dataclass(frozen=True, slots=True)
class LostDocument:
    """Stands in the place of a document that cannot be read; its neighbours can.

    Attributes:
        cause: Why, in words.
    """

    cause: str


@lru_cache(64)  # each member's is asked for several times in a row
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


@dataclass(frozen=True)
class TokenIds:
    """What the numbers in pre-tokenized members (`.npy`) mean.

    Attributes:
        fingerprint: `TextTokenizer.fingerprint` of the tokenizer that made them.
        vocab_size: Every id is below it.
        sep_id: The id that ends a document.
        banned: Ids that no document holds: [CLS], [PAD] and [MASK], which rows are built with.
    """

    fingerprint: str
    vocab_size: int
    sep_id: int
    banned: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: "TextTokenizer") -> "TokenIds":
        """The ids of a tokenizer."""
        banned = sorted({tokenizer.cls_id, tokenizer.pad_id, tokenizer.mask_id} - {tokenizer.sep_id})
        return cls(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.sep_id, tuple(banned))

    @property
    def dtype(self) -> np.dtype:
        """The narrowest of uint16 and uint32 that holds an id, as in `TextTokenizer`."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


def is_text_member(name: str) -> bool:
    """Whether a member of this name holds text."""
    return split_name(name)[0] in _SUFFIXES and not _is_hidden(name)


def is_ids_member(name: str) -> bool:
    """Whether a member of this name is an array, which holds token ids if the data set says so."""
    return split_name(name)[0] == _IDS_SUFFIX and not _is_hidden(name)


def holds_documents(name: str, ids: TokenIds | None) -> bool:
    """Whether `read_documents` reads a member of this name; any other member gives nothing."""
    return is_text_member(name) or (ids is not None and is_ids_member(name))


def _is_hidden(name: str) -> bool:
    # Hidden files are no texts of the user's: macOS's tar adds a ._NAME of attributes to each.
    return name.rpartition("/")[2].startswith(".")


def label(name: str) -> str:
    """A member's name for messages and ledgers, which are lines of UTF-8 on a terminal: a tar may hold any bytes, as many as it likes."""
    shown = repr(name[: _MAX_LABEL + 1])[1:-1]
    return shown if len(shown) <= _MAX_LABEL else shown[:_MAX_LABEL] + "..."


def read_documents(
    name: str,
    data: bytes | memoryview,
    field: str = "text",
    *,
    ids: TokenIds | None = None,
    max_bytes: int = MAX_MEMBER_BYTES,
) -> Iterator[Document | LostDocument]:
    """Yield the documents of one member in their order: `parse` of what `unpack` gives.

    Raises:
        MemberError: As they do. Nothing of the member has been given then.
    """
    if holds_documents(name, ids):
        yield from parse(name, unpack(name, data, max_bytes), field, ids)


def unpack(name: str, data: bytes | memoryview, max_bytes: int = MAX_MEMBER_BYTES) -> Content:
    """A member's content: decompressed if its name ends in `.gz` or `.zst`, else `data` as it is.

    Raises:
        MemberError: Damaged compressed data, or more than `max_bytes` when decompressed.
    """
    codec = split_name(name)[1]
    return decompress_all(data, codec, max_bytes) if codec else data


def parse(
    name: str, content: Content, field: str = "text", ids: TokenIds | None = None
) -> Iterator[Document | LostDocument]:
    """Yield the documents that the unpacked content of a member holds, in their order.

    `.txt` is one document, `.json` one (the string in `field`), `.jsonl` one for each line that is not blank. `.npy`
    holds token ids without [CLS] (a one-dimensional array of uint16, uint32, int32 or int64) of any number of
    documents, each ended by [SEP]; the last [SEP] may be left out.

    Args:
        name: The member's name; its suffix says how to read it.
        content: Its bytes.
        field: Which field of a JSON object is the text.
        ids: What the numbers of `.npy` members mean; without it they give nothing.

    Yields:
        A string; or uint16 or uint32 [tokens] content ids; or a `LostDocument`.

    Raises:
        MemberError: An array that cannot be ids. Nothing of it has been given then.
    """
    suffix = split_name(name)[0]
    if suffix == _IDS_SUFFIX:
        if ids is not None:
            yield from _split_ids(_load_array(content), ids)
        return
    if content[:3] == _BOM:
        content = memoryview(content)[3:]
    if suffix == ".txt":
        yield decode(content)
    elif suffix == ".json":
        yield parse_record(content, field)
    else:
        for line in io.BytesIO(content):
            if not line.isspace():
                yield parse_record(line, field)


def _load_array(content: Content) -> np.ndarray:
    """The array of a `.npy` file as a view (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).

    `numpy.load` itself would allocate whatever size a damaged header gives.
    """
    file = io.BytesIO(content[:_NPY_HEADER])
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    except Exception as error:  # the header is a Python literal: a damaged one can raise whatever a parser can
        raise MemberError("a damaged .npy header") from error
    if dtype.newbyteorder("=") not in _ID_TYPES or len(shape) != 1:
        kinds = ", ".join(kind.name for kind in _ID_TYPES)
        raise MemberError(
            f"an array of {len(shape)} dimensions and type {dtype!s:.40} is no list of token ids: one dimension and one of {kinds}"
        )
    body = memoryview(content)[file.tell() :]
    if shape[0] * dtype.itemsize != len(body):
        raise MemberError(
            f"damaged .npy data: {len(body)} bytes of ids where its header says {shape[0] * dtype.itemsize}"
        )
    return np.frombuffer(body, dtype)


def _split_ids(array: np.ndarray, ids: TokenIds) -> Iterator[np.ndarray | LostDocument]:
    ends = np.flatnonzero(array == ids.sep_id)
    causes: dict[int, str] = {}
    if len(array) and (array.min() < 0 or array.max() >= ids.vocab_size or np.isin(array, ids.banned).any()):
        wrong = np.flatnonzero((array < 0) | (array >= ids.vocab_size) | np.isin(array, ids.banned))
        where, first = np.unique(np.searchsorted(ends, wrong), return_index=True)
        for document, place in zip(where.tolist(), wrong[first].tolist(), strict=True):
            what = "a special token" if int(array[place]) in ids.banned else f"outside 0 to {ids.vocab_size - 1}"
            causes[document] = f"token id {array[place]} at place {place} of the array is {what}"
    start = 0
    for i, end in enumerate([*ends.tolist(), len(array)]):
        if i == len(ends) and start == end:
            break  # the last document ended with [SEP], or there is none
        yield LostDocument(causes[i]) if i in causes else array[start:end].astype(ids.dtype)
        start = end + 1


def decode(data: Content) -> str | LostDocument:
    """UTF-8 bytes as a string, strictly."""
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        return LostDocument(f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}")


def parse_record(line: Content, field: str) -> str | LostDocument:
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
        keys = ", ".join(repr(key[:40]) for key in list(record)[:8])
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
    for rest in _cut(chunks, _GZIP_CHUNK):
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
    for rest in _cut(chunks, _ZSTD_CHUNK):
        while rest:
            if decoder is None:
                decoder = zstandard.ZstdDecompressor().decompressobj()
            yield decoder.decompress(rest)
            rest = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder = None
    if decoder is not None:
        raise MemberError("damaged .zst data: cut before its end")


def _cut(chunks: Iterable[bytes | memoryview], size: int) -> Iterator[bytes]:
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), size):
            yield bytes(view[start : start + size])


def decompress_all(data: bytes | memoryview, codec: Codec, max_bytes: int) -> bytearray:
    """What `data` holds, decompressed.

    Raises:
        MemberError: Empty, damaged or cut data, or more than `max_bytes`.
    """
    out = bytearray()
    for piece in decompress([data], codec):
        out += piece
        if len(out) > max_bytes:
            raise MemberError(f"more than {max_bytes} bytes when decompressed; split it")
    if not len(data):
        raise MemberError(f"damaged {codec} data: empty")
    return out
