"""Where text is (files, directories, globs, datasets, text that comes with Python) and how it is cut into parts."""

import argparse
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlm_dist.data import builtin
from mlm_dist.data.members import Codec, split_name
from mlm_dist.data.tables import (
    check_column,
    is_saved_dataset,
    load_named,
    load_saved,
    row_groups,
    text_bytes,
)
from mlm_dist.errors import UserError

SplitBy = Literal["auto", "file", "line", "paragraph", "record"]
SPLITS: tuple[SplitBy, ...] = ("auto", "file", "line", "paragraph", "record")
BUILTINS = builtin.NAMES

_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_RECORD_SUFFIXES = (".jsonl",)
_TABLE_SUFFIX = ".parquet"
_KNOWN = ", ".join((*_TEXT_SUFFIXES, *_RECORD_SUFFIXES)) + f", each also .gz or .zst; {_TABLE_SUFFIX}"
INPUTS_HELP = "text files (.txt .md .rst .jsonl, also .gz .zst), .parquet, saved datasets, directories, globs"
BUILTIN_PREFIX = "builtin:"
_DATASET = "dataset:"
_PART_BYTES = 64 << 20
_TEXT_PER_COMPRESSED_BYTE = 4


@dataclass(frozen=True)
class Source:
    """One file, one dataset, or one text that comes with Python.

    Attributes:
        name: Path, `builtin:NAME` or `dataset:NAME`.
        label: What a manifest may tell of the name without telling of the machine.
        size: Bytes as they lie.
        text_size: Bytes of text in it, about.
        kind: How it splits into documents.
        codec: How it is compressed.
        modified: When it was written last, in ns, where that tells of its content; else 0.
        groups: Of a parquet file: bytes of text in each row group, about.
        dataset: A `datasets.Dataset`, memory-mapped; it pickles as the paths of its files.
    """

    name: str
    label: str
    size: int
    text_size: int
    kind: Literal["builtin", "file", "line", "paragraph", "record", "parquet", "dataset"]
    codec: Codec = ""
    modified: int = 0
    groups: tuple[int, ...] = ()
    dataset: Any = None


@dataclass(frozen=True)
class Part:
    """What one task reads of a source.

    Attributes:
        number: The source's place in the list of sources.
        source: The source.
        start, end: The documents that begin in bytes [start, end); of parquet files row groups, of datasets rows. All
            of it for sources that cannot be entered in the middle.
        size: Bytes to read, about.
    """

    number: int
    source: Source
    start: int
    end: int
    size: int


def find_sources(
    inputs: Sequence[str],
    builtins: Sequence[str] = (),
    split_by: SplitBy = "auto",
    *,
    field: str = "text",
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
) -> list[Source]:
    """The sources that are named, each once: files and saved datasets sorted by path, then builtin texts, then `dataset`.

    Args:
        inputs: Paths, directories (searched at any depth, hidden files left out) and globs. A directory that
            `datasets` saved is one source.
        builtins: Names from `BUILTINS`.
        split_by: How text files split into documents; `auto` takes one document a file. Records always split by line,
            tables by row.
        field: Column of tables that is the text.
        dataset: Name or directory for `datasets.load_dataset`.
        config: Its configuration.
        split: Which split of datasets.

    Raises:
        UserError: Nothing named, an input that names nothing readable, a suffix that is not known, a table without
            the column, a package that is not installed.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        for match in _matches(text):
            found[match.resolve()] = None
    sources = [_path_source(path, split_by, field, split) for path in sorted(found)]
    sources += [_builtin_source(name) for name in sorted(set(builtins))]
    if dataset is not None:
        sources.append(_named_source(dataset, config, split, field))
    if not sources:
        raise UserError(
            f"no inputs: give text files, directories or globs ({_KNOWN}), --dataset NAME or --builtin {BUILTINS[0]}"
        )
    return sources


def _matches(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        matches = _below(path)
        if not matches:
            raise UserError(f"the directory {text!r} holds no text file ({_KNOWN})")
        return matches
    matches = [path] if path.exists() else [Path(match) for match in glob.glob(text, recursive=True)]
    matches = [match for match in matches if match.is_file() or is_saved_dataset(match)]
    if not matches:
        raise UserError(f"the input {text!r} names no file: give text files, directories or globs ({_KNOWN})")
    return matches


def _below(directory: Path) -> list[Path]:
    found = []
    for at, directories, names in os.walk(directory):
        if is_saved_dataset(Path(at)):
            found.append(Path(at))
            directories.clear()
            continue
        directories[:] = [name for name in directories if not name.startswith(".")]
        files = [Path(at, name) for name in names if not name.startswith(".") and _is_known(name)]
        found += [path for path in files if path.is_file()]
    return found


def _is_known(name: str) -> bool:
    suffix, codec = split_name(name)
    return suffix in (*_TEXT_SUFFIXES, *_RECORD_SUFFIXES) or (suffix == _TABLE_SUFFIX and not codec)


def _path_source(path: Path, split_by: SplitBy, field: str, split: str) -> Source:
    if path.is_dir():
        return _saved_source(path, split, field)
    suffix, codec = split_name(path.name)
    if not _is_known(path.name):
        raise UserError(f"the input {str(path)!r} has the suffix {path.suffix!r}; known are {_KNOWN}")
    found = path.stat()
    if suffix == _TABLE_SUFFIX:
        groups = row_groups(path, field)
        return Source(
            str(path), path.name, found.st_size, sum(groups), "parquet", modified=found.st_mtime_ns, groups=groups
        )
    if suffix in _RECORD_SUFFIXES:
        kind: SplitBy = "record"
    elif split_by == "record":
        raise UserError(f"--split-by record needs .jsonl inputs; {str(path)!r} is text: use file, line or paragraph")
    else:
        kind = "file" if split_by == "auto" else split_by
    assert kind != "auto"
    text_size = found.st_size * (_TEXT_PER_COMPRESSED_BYTE if codec else 1)
    return Source(str(path), path.name, found.st_size, text_size, kind, codec, found.st_mtime_ns)


def _saved_source(path: Path, split: str, field: str) -> Source:
    dataset, directory = load_saved(path, split)
    label = directory.relative_to(path.parent).as_posix()
    modified = (directory / "state.json").stat().st_mtime_ns
    return _dataset_source(dataset, str(directory), label, field, modified)


def _named_source(name: str, config: str | None, split: str, field: str) -> Source:
    dataset = load_named(name, config, split)
    local = Path(name).name if Path(name).exists() else name
    label = ":".join([_DATASET + local, *([config] if config else []), split])
    return _dataset_source(dataset, _DATASET + name, label, field, 0)


def _dataset_source(dataset: Any, name: str, label: str, field: str, modified: int) -> Source:
    check_column(name, dataset.column_names, field)
    size = text_bytes(dataset, field)
    return Source(name, label, size, size, "dataset", modified=modified, dataset=dataset)


def _builtin_source(name: str) -> Source:
    if name not in BUILTINS:
        raise UserError(f"--builtin {name!r} is not known; there is {', '.join(BUILTINS)}")
    size = sum(map(len, builtin.texts(name)))
    return Source(BUILTIN_PREFIX + name, BUILTIN_PREFIX + name, size, size, "builtin")


def digest(sources: Sequence[Source]) -> str:
    """SHA-256 over the sources' labels and sizes; the same wherever the files lie."""
    return hashlib.sha256(json.dumps([[source.label, source.size] for source in sources]).encode()).hexdigest()


def find_parts(sources: Sequence[Source]) -> list[Part]:
    """Cut sources into parts of about 64 MiB of text where they can be entered in the middle: plain files of lines or
    paragraphs, row groups of parquet files, rows of datasets."""
    parts = []
    for number, source in enumerate(sources):
        parts += [Part(number, source, start, end, size) for start, end, size in _spans(source)]
    return parts


def _spans(source: Source) -> Iterator[tuple[int, int, int]]:
    """(start, end, bytes) of each part."""
    if source.kind == "parquet":
        start = size = 0
        for i, group in enumerate(source.groups, 1):
            size += group
            if size >= _PART_BYTES or i == len(source.groups):
                yield start, i, size
                start, size = i, 0
        return
    length = len(source.dataset) if source.kind == "dataset" else source.size
    step = max(length, 1)
    if source.kind == "dataset":
        step = max(length * _PART_BYTES // max(source.size, 1), 1)
    elif not source.codec and source.kind not in ("builtin", "file"):
        step = _PART_BYTES
    for start in range(0, max(length, 1), step):
        end = min(start + step, length)
        yield start, end, source.size * (end - start) // max(length, 1)


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that name a dataset."""
    add = parser.add_argument
    add(
        "--dataset",
        metavar="NAME",
        help="a dataset of the Hugging Face hub or cache, or a directory of its files (extra `hf`)",
    )
    add("--dataset-config", metavar="CONFIG", help="its configuration")
    add("--split", default="train", help="split of datasets to read, also of saved ones (default: %(default)s)")


def sources_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments `inputs`, `--builtin` and those of datasets give `find_sources`."""
    return {
        "inputs": args.inputs,
        "builtins": args.builtin,
        "dataset": args.dataset,
        "config": args.dataset_config,
        "split": args.split,
    }
