"""The documents of a part of a source."""

from collections.abc import Iterator
from pathlib import Path

from mlm_dist.data import builtin
from mlm_dist.data.members import LostDocument, MemberError, decode, decompress, parse_record
from mlm_dist.data.sources import BUILTIN_PREFIX, Part, Source
from mlm_dist.data.tables import read_parquet, read_rows
from mlm_dist.errors import UserError

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20


def read_part(part: Part, field: str) -> Iterator[tuple[int, str | LostDocument]]:
    """Yield the part's documents, white space around them removed, with their places in the source.

    Documents that are empty are left out. A place is the document's first byte (of decompressed text) or its number
    (in tables: the row).

    Args:
        part: What to read.
        field: Field of JSON records, or column of tables, that is the text.

    Raises:
        UserError: The file cannot be read or decompressed.
    """
    try:
        for place, document in _raw_documents(part, field):
            if isinstance(document, str):
                document = document.strip()
                if not document:
                    continue
            yield place, document
    except (OSError, MemberError) as error:
        raise UserError(f"the input {part.source.name} cannot be read: {error}") from error


def _raw_documents(part: Part, field: str) -> Iterator[tuple[int, str | LostDocument]]:
    source = part.source
    if source.kind == "builtin":
        yield from enumerate(builtin.texts(source.name.removeprefix(BUILTIN_PREFIX)))
    elif source.kind == "parquet":
        yield from read_parquet(Path(source.name), part.start, part.end, field)
    elif source.kind == "dataset":
        yield from read_rows(source.dataset, part.start, part.end, field)
    elif source.kind == "file":
        yield 0, decode(b"".join(decompress(_chunks(source, 0), source.codec)).removeprefix(_BOM))
    else:
        lines = _lines(part)
        if source.kind == "paragraph":
            yield from _paragraphs(lines, part)
            return
        for place, line in lines:
            if place >= part.end and not source.codec:
                return
            if line.isspace():
                continue
            yield place, parse_record(line, field) if source.kind == "record" else decode(line)


def _paragraphs(lines: Iterator[tuple[int, bytes]], part: Part) -> Iterator[tuple[int, str | LostDocument]]:
    """Runs of lines that are not blank. A run belongs to the part in which the blank line before it begins."""
    owned = part.start == 0
    first = 0
    run: list[bytes] = []
    for place, line in lines:
        if not line.isspace():
            if owned:
                first = first if run else place
                run.append(line)
            elif place >= part.end:
                return
            continue
        if run:
            yield first, decode(b"".join(run))
            run = []
        if place >= part.end and not part.source.codec:
            return
        owned = True
    if run:
        yield first, decode(b"".join(run))


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """Lines that begin at or behind the part's start, on to the end of the file, with their first bytes' places."""
    # That a line begins at `start` is known by the newline before it, so reading begins one byte earlier and what
    # comes first, the end of a line that belongs to the part before, is dropped.
    place = max(part.start - 1, 0)
    begun: list[bytes] = []
    drop = part.start > 0
    for chunk in decompress(_chunks(part.source, place), part.source.codec):
        *ends, last = chunk.split(b"\n")
        for end in ends:
            line = b"".join([*begun, end, b"\n"])
            begun = []
            if not drop:
                yield place, line.removeprefix(_BOM) if place == 0 else line
            drop = False
            place += len(line)
        begun.append(last)
    line = b"".join(begun)
    if line and not drop:
        yield place, line.removeprefix(_BOM) if place == 0 else line


def _chunks(source: Source, start: int) -> Iterator[bytes]:
    with open(source.name, "rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            yield chunk
