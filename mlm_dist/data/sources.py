"""Text as people have it (files, directories, globs, text that comes with Python) and its documents."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlm_dist.data import builtin
from mlm_dist.data.members import Codec, LostDocument, MemberError, decode, decompress, parse_record, split_name
from mlm_dist.errors import UserError

SplitBy = Literal["auto", "file", "line", "paragraph", "record"]
SPLITS: tuple[SplitBy, ...] = ("auto", "file", "line", "paragraph", "record")
BUILTINS = builtin.NAMES

_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_RECORD_SUFFIXES = (".jsonl",)
_KNOWN = ", ".join((*_TEXT_SUFFIXES, *_RECORD_SUFFIXES)) + ", each also .gz or .zst"
_BUILTIN = "builtin:"
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_PART_BYTES = 64 << 20
_TEXT_PER_COMPRESSED_BYTE = 4


@dataclass(frozen=True)
class Source:
    """One file, or one text that comes with Python.

    Attributes:
        name: Path, or `builtin:NAME`.
        size: Bytes as they lie; of decompressed text, an estimate is `text_size`.
        kind: How it splits into documents.
        codec: How it is compressed.
    """

    name: str
    size: int
    kind: Literal["builtin", "file", "line", "paragraph", "record"]
    codec: Codec

    @property
    def text_size(self) -> int:
        """Bytes of text in it, about."""
        return self.size * _TEXT_PER_COMPRESSED_BYTE if self.codec else self.size

    @property
    def label(self) -> str:
        """The last part of the name: what a manifest may tell of the machine that made it."""
        return self.name.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Part:
    """What one task reads: the documents of a source that begin in bytes [start, end).

    Attributes:
        number: The source's place in the list of sources.
        source: The source.
        start, end: Bytes; all of it for sources that cannot be entered in the middle.
    """

    number: int
    source: Source
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes to read."""
        return self.end - self.start


def find_sources(inputs: Sequence[str], builtins: Sequence[str] = (), split_by: SplitBy = "auto") -> list[Source]:
    """The sources that paths, directories (at any depth, hidden files left out) and globs name: each once, sorted.

    Args:
        inputs: Paths, directories, globs.
        builtins: Names from `BUILTINS`.
        split_by: How text files split into documents; `auto` takes one document a file. Records always split by line.

    Raises:
        UserError: Nothing named, an input that names nothing readable, a suffix that is not known.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            matches = _files_below(path)
            if not matches:
                raise UserError(f"the directory {text!r} holds no text file ({_KNOWN})")
        else:
            matches = [path] if path.exists() else [Path(match) for match in glob.glob(text, recursive=True)]
            matches = [match for match in matches if match.is_file()]
            if not matches:
                raise UserError(f"the input {text!r} names no file: give text files, directories or globs ({_KNOWN})")
        for match in matches:
            found[match.resolve()] = None
    sources = [_file_source(path, split_by) for path in sorted(found)]
    sources += [_builtin_source(name) for name in sorted(set(builtins))]
    if not sources:
        raise UserError(f"no inputs: give text files, directories or globs ({_KNOWN}), or --builtin {BUILTINS[0]}")
    return sources


def _files_below(directory: Path) -> list[Path]:
    files = []
    for at, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        files += [Path(at, name) for name in names if not name.startswith(".") and _is_text(name)]
    return [path for path in files if path.is_file()]


def _is_text(name: str) -> bool:
    return split_name(name)[0] in (*_TEXT_SUFFIXES, *_RECORD_SUFFIXES)


def _file_source(path: Path, split_by: SplitBy) -> Source:
    suffix, codec = split_name(path.name)
    if not _is_text(path.name):
        raise UserError(f"the input {str(path)!r} has the suffix {path.suffix!r}; known are {_KNOWN}")
    if suffix in _RECORD_SUFFIXES:
        kind: SplitBy = "record"
    elif split_by == "record":
        raise UserError(f"--split-by record needs .jsonl inputs; {str(path)!r} is text: use file, line or paragraph")
    else:
        kind = "file" if split_by == "auto" else split_by
    assert kind != "auto"
    return Source(str(path), path.stat().st_size, kind, codec)


def _builtin_source(name: str) -> Source:
    if name not in BUILTINS:
        raise UserError(f"--builtin {name!r} is not known; there is {', '.join(BUILTINS)}")
    return Source(_BUILTIN + name, sum(map(len, builtin.texts(name))), "builtin", "")


def digest(sources: Sequence[Source]) -> str:
    """SHA-256 over the sources' labels and sizes; the same wherever the files lie."""
    return hashlib.sha256(json.dumps([[source.label, source.size] for source in sources]).encode()).hexdigest()


def find_parts(sources: Sequence[Source]) -> list[Part]:
    """Cut sources into parts of 64 MiB where they can be entered in the middle: plain files of lines or paragraphs."""
    parts = []
    for number, source in enumerate(sources):
        step = max(source.size, 1) if source.codec or source.kind in ("builtin", "file") else _PART_BYTES
        for start in range(0, max(source.size, 1), step):
            parts.append(Part(number, source, start, min(start + step, source.size)))
    return parts


def read_part(part: Part, field: str) -> Iterator[tuple[int, str | LostDocument]]:
    """Yield the part's documents, white space around them removed, with their places in the source.

    Documents that are empty are left out. A place is the document's first byte (of decompressed text) or its number.

    Args:
        part: What to read.
        field: Field of JSON records that is the text.

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
        yield from enumerate(builtin.texts(source.name.removeprefix(_BUILTIN)))
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
