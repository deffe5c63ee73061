"""The examples of ``mlm-dist probe``: from TSV, CSV or JSONL files, or from Hugging Face's `datasets`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlm_dist.errors import UserError

SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Columns:
    """Where an example's parts are: names, or numbers from 1 in a file without a header.

    Attributes:
        pair: of the second text, or None for tasks about one.
    """

    text: str
    label: str
    pair: str | None = None

    def names(self) -> list[str]:
        """All of them."""
        return [name for name in (self.text, self.pair, self.label) if name is not None]

    @property
    def numbered(self) -> bool:
        """Whether the file has no header."""
        return all(name.isdecimal() for name in self.names())


@dataclass(frozen=True)
class Task:
    """A task of GLUE (Wang et al. 2019).

    Attributes:
        files: columns of its TSV files.
        hub: columns of the data set ``glue`` on the hub.
        metric: the one that it is reported by.
        dev: name of the file with the examples to test on.
        incomplete: whether lines of the public files lack columns, so that everybody leaves such lines out.
    """

    files: Columns
    hub: Columns
    metric: str
    dev: str = "dev.tsv"
    incomplete: bool = False


_SENTENCES = Columns("sentence1", "label", "sentence2")
TASKS = {
    "cola": Task(Columns("4", "2"), Columns("sentence", "label"), "matthews"),
    "mnli": Task(
        Columns("sentence1", "gold_label", "sentence2"),
        Columns("premise", "label", "hypothesis"),
        "accuracy",
        "dev_matched.tsv",
    ),
    "mrpc": Task(Columns("#1 String", "Quality", "#2 String"), _SENTENCES, "f1"),
    "qnli": Task(Columns("question", "label", "sentence"), Columns("question", "label", "sentence"), "accuracy"),
    "qqp": Task(
        Columns("question1", "is_duplicate", "question2"),
        Columns("question1", "label", "question2"),
        "f1",
        incomplete=True,
    ),
    "rte": Task(_SENTENCES, _SENTENCES, "accuracy"),
    "sst2": Task(Columns("sentence", "label"), Columns("sentence", "label"), "accuracy"),
    "stsb": Task(Columns("sentence1", "score", "sentence2"), _SENTENCES, "pearson_spearman"),
}


@dataclass(frozen=True)
class Examples:
    """Texts and labels of a file, in its order.

    Attributes:
        source: the file, for messages.
        lines: where each example ends in it, from 1.
        pairs: second texts, or None.
        labels: as they are written, numbers in their shortest form.
        left_out: lines that lack columns.
    """

    source: str
    lines: list[int]
    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def numbers(self, column: str) -> list[float]:
        """The labels as finite numbers.

        Raises:
            UserError: one is none.
        """
        values = []
        for line, label in zip(self.lines, self.labels, strict=True):
            number = as_number(label)
            if number is None:
                raise UserError(f"{self.source}, line {line}, column {column!r}: {label!r:.80} is no number")
            values.append(number)
        return values


def as_number(label: str) -> float | None:
    """The finite number that a label is, or None."""
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read(path: Path, columns: Columns, *, incomplete: bool = False) -> Examples:
    """The examples of a file: ``.tsv`` (tabs, quotes mean nothing, as in GLUE), ``.csv`` or ``.jsonl``; with ``incomplete``
    without the lines that have fewer columns than the first.

    Raises:
        UserError: it cannot be read, or one of its lines cannot; names file, line and column.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: its name must end in {', '.join(SUFFIXES)}, which says how to read it")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file") from error
    if suffix in (".jsonl", ".ndjson"):
        return _examples(str(path), _jsonl(path, text), columns)
    lines = _tsv(text) if suffix == ".tsv" else _csv(path, text)
    short: list[int] = []
    found = _examples(str(path), _table(path, lines, columns, short if incomplete else None), columns)
    return replace(found, left_out=len(short))


def from_dataset(name: str, split: str, columns: Columns) -> Examples:
    """A split of ``NAME`` or ``NAME:CONFIG``, a data set on the Hugging Face hub or a directory, through `datasets`.

    Raises:
        UserError: `datasets` is not installed, or the split cannot be loaded or lacks a column.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("--dataset: needs the package datasets: pip install 'mlm-dist[hf]'") from error
    path, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # network, script, JSON and Arrow errors share no base
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--dataset {name}: its split {split!r} cannot be loaded ({first}); give --train and --dev for files"
        ) from error
    return _examples(f"{name} ({split})", enumerate(loaded, 1), columns)


Record = tuple[int, dict[str, Any]]


def _tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # not splitlines: a text may hold other characters that end lines
        if line.removesuffix("\r"):
            yield number, line.removesuffix("\r").split("\t")


def _csv(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _jsonl(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: a {type(record).__name__}, not an object with fields")
        yield number, record


def _table(
    path: Path, lines: Iterator[tuple[int, list[str]]], columns: Columns, short: list[int] | None
) -> Iterator[Record]:
    """Fields by name; of a file without a header by number, from 1. Lines with too few go to ``short``; without it they are an error."""
    header: list[str] | None = None
    for number, fields in lines:
        if header is None:
            header = [str(i) for i in range(1, len(fields) + 1)] if columns.numbered else fields
            missing = [name for name in columns.names() if name not in header]
            if missing:
                shown = ", ".join(map(repr, header))
                raise UserError(f"{path}, line {number}: no column {missing[0]!r}; it has {shown:.300}")
            if not columns.numbered:
                continue
        if short is not None and len(fields) < len(header):
            short.append(number)
            continue
        if len(fields) != len(header):
            at = f"column {min(len(fields), len(header)) + 1}"
            raise UserError(
                f"{path}, line {number}, {at}: {len(fields)} columns, where the first line has {len(header)}"
            )
        yield number, dict(zip(header, fields, strict=True))


def _examples(source: str, records: Iterator[Record] | enumerate[Any], columns: Columns) -> Examples:
    made = Examples(source, [], [], None if columns.pair is None else [], [])
    for number, record in records:
        where = f"{source}, line {number}"
        for name in columns.names():
            if name not in record:
                raise UserError(f"{where}: no column {name!r}; it has {', '.join(map(repr, record)):.300}")
        made.lines.append(number)
        made.texts.append(_text(where, columns.text, record))
        if made.pairs is not None and columns.pair is not None:
            made.pairs.append(_text(where, columns.pair, record))
        made.labels.append(_label(where, columns.label, record))
    if not made.labels:
        raise UserError(f"{source}: holds no example")
    return made


def _text(where: str, column: str, record: dict[str, Any]) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise UserError(f"{where}, column {column!r}: {value!r:.80} is no text")
    return value


def _label(where: str, column: str, record: dict[str, Any]) -> str:
    value = record[column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    label = str(value).strip() if isinstance(value, str | int | float) else ""
    if not label:
        raise UserError(f"{where}, column {column!r}: {value!r:.80} is no label; give text or a number")
    return label
