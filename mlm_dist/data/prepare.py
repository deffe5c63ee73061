"""`mlm-dist prepare`: text to shuffled WebDataset shards, their manifests and a held-out part.

The output is a function of the documents, their places in the sorted list of inputs, and the options. Every document gets a
key, a hash of (seed, number of its source, place in it), and lies where its key says: the shuffle needs no common state, so
neither the number of processes nor the order of anything enters. Two passes, both parallel and in bounded memory:

1. read: documents go to spill files, one a range of keys ("bucket") and process;
2. write: a shard is a run of buckets; each bucket is sorted by key and written.

Shards are made in a hidden directory and renamed when all are whole; manifests come last.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zstandard

from mlm_dist import __version__
from mlm_dist.data.index import MAX_CAUSES, IndexedShard, auto_block_size, index_tar, parse_size
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.members import LostDocument
from mlm_dist.data.sources import BUILTINS, SPLITS, Part, Source, SplitBy, digest, find_parts, find_sources, read_part
from mlm_dist.data.workers import WorkerPool, default_workers
from mlm_dist.errors import UserError

MANIFESTS = {"train": "manifest.json", "val": "val.json"}
Side = Literal["train", "val"]

_TEMPORARY = ".prepare-tmp"
_RECORD = struct.Struct("<16sI")  # key, length of the JSON line that follows
_BUCKETS_A_SHARD = 16  # so that shards, which are whole buckets, differ in size by a few per cent
_MAX_BUCKETS = 4096
_SPILL_BUFFER = 32 << 20
_TASK_BYTES = 4 << 20
_ZST_RATIO = 3  # of text, about; only block sizes are derived from it
_MEMBER_HEADROOM = 1024  # a member's header and padding


@dataclass(frozen=True)
class PrepareOptions:
    """What the output depends on besides the text. The command's help says what each means.

    Raises:
        UserError: A value out of its range.
    """

    split_by: SplitBy = "auto"
    field: str = "text"
    documents_per_member: int = 64
    shard_size: int = 256 << 20
    block_size: int | None = None
    val_fraction: float = 0.05
    seed: int = 0
    compress: Literal["none", "zst"] = "none"

    def __post_init__(self) -> None:
        if self.documents_per_member < 1:
            raise UserError(f"--documents-per-member is {self.documents_per_member}; it must be at least 1")
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"--val-fraction is {self.val_fraction}; it must be at least 0 (no held-out part) and below 1"
            )
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed is {self.seed}; it must be from 0 to 2^64 - 1")


@dataclass(frozen=True)
class _ReadTask:
    parts: tuple[Part, ...]
    directory: Path
    buckets: int
    options: PrepareOptions


@dataclass
class _ReadResult:
    documents: dict[Side, int]
    line_bytes: dict[Side, np.ndarray]  # int64 [buckets]
    lost: int = 0
    causes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _WriteTask:
    side: Side
    number: int
    buckets: range
    directory: Path
    block_size: int
    options: PrepareOptions

    @property
    def name(self) -> str:
        return f"{self.side}-{self.number:05d}.tar"


def prepare(
    inputs: Sequence[str],
    output: Path,
    options: PrepareOptions,
    *,
    builtins: Sequence[str] = (),
    workers: int = 1,
    overwrite: bool = False,
) -> tuple[dict[Side, Manifest], bool]:
    """Write shards and manifests to a directory; what an interrupted run left there is thrown away.

    Args:
        inputs: Text files, directories, globs.
        output: The directory.
        options: What to make of them.
        builtins: Texts that come with Python, names from `sources.BUILTINS`.
        workers: Processes.
        overwrite: Whether to replace what another run of this command made there.

    Returns:
        The manifests, and whether anything was written: False when a run with the same inputs and options had finished.

    Raises:
        UserError: Wrong inputs or options, no document on a side of the split, a directory that holds other data or that
            another process is working on.
    """
    sources = find_sources(inputs, builtins, options.split_by)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            recipe = _recipe(sources, options)
            if not overwrite and (done := _finished(output, recipe, sources)):
                shutil.rmtree(output / _TEMPORARY, ignore_errors=True)
                return done, False
            return _make(sources, output, options, recipe, workers), True
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    directory = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output {output}: another `mlm-dist prepare` is at work there") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(directory)


def _recipe(sources: Sequence[Source], options: PrepareOptions) -> dict[str, Any]:
    return {
        "options": dict(vars(options)),
        "sources": {
            "files": sum(source.kind != "builtin" for source in sources),
            "builtin": [source.label for source in sources if source.kind == "builtin"],
            "bytes": sum(source.size for source in sources),
            "digest": digest(sources),
        },
    }


def _finished(output: Path, recipe: dict[str, Any], sources: Sequence[Source]) -> dict[Side, Manifest] | None:
    """The manifests of a finished run of the same recipe, or None when nothing is there.

    Raises:
        UserError: Something else is there.
    """
    again = "give another directory, or --overwrite to replace it"
    main = output / MANIFESTS["train"]
    if not main.exists():
        strangers = [path.name for path in output.iterdir() if _is_ours(path.name)]
        if strangers and not (output / _TEMPORARY).exists():  # else they are ours: a run was cut while it renamed them
            raise UserError(f"--output {output} holds {min(strangers)} without a manifest; {again}")
        return None
    try:
        manifests = {side: Manifest.read(output / name) for side, name in _manifests_of(recipe)}
        for manifest in manifests.values():
            manifest.check_files()
    except UserError as error:
        raise UserError(f"--output {output} holds something that is not whole ({error}); {again}") from error
    for key, wanted in recipe.items():
        found = manifests["train"].info.get(key)
        if found != wanted:
            raise UserError(f"--output {output} was made with other {key}: {_difference(found, wanted)}; {again}")
    made = main.stat().st_mtime_ns
    for source in sources:
        if source.kind != "builtin" and os.stat(source.name).st_mtime_ns > made:
            raise UserError(f"--output {output} is older than the input {source.name}; {again}")
    return manifests


def _manifests_of(recipe: dict[str, Any]) -> list[tuple[Side, str]]:
    sides: list[Side] = ["train", "val"] if recipe["options"]["val_fraction"] else ["train"]
    return [(side, MANIFESTS[side]) for side in sides]


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "none recorded"
    return ", ".join(
        f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]
    )


def _is_ours(name: str) -> bool:
    return re.fullmatch(r"(train|val)-\d{5,}\.tar", name) is not None


def _make(
    sources: Sequence[Source], output: Path, options: PrepareOptions, recipe: dict[str, Any], workers: int
) -> dict[Side, Manifest]:
    # Processes of a run that was killed may live for a moment and write to where they know: a directory of an own name.
    shutil.rmtree(output / _TEMPORARY, ignore_errors=True)
    directory = output / _TEMPORARY / uuid.uuid4().hex
    directory.mkdir(parents=True)
    with WorkerPool(workers) as pool:
        read = _read_all(sources, directory, options, pool)
        tasks = _plan_shards(read, directory, options)
        weights = [int(read.line_bytes[task.side][task.buckets.start : task.buckets.stop].sum()) for task in tasks]
        written = pool.map(_write_shard, tasks, weights, "Writing")
    manifests: dict[Side, Manifest] = {}
    for side, _ in _manifests_of(recipe):
        mine = [(task, shard) for task, shard in zip(tasks, written, strict=True) if task.side == side]
        info = {
            "tool": "mlm-dist prepare",
            "version": __version__,
            "side": side,
            **recipe,
            "block_size": mine[0][0].block_size,
            "documents": dict(read.documents),
            "lost_documents": read.lost,
            "lost": read.causes,
        }
        manifests[side] = Manifest(output, [shard.shard for _, shard in mine], info)
        assert manifests[side].num_documents == read.documents[side], "documents were lost or doubled on the way"
    _publish(manifests, output, directory)
    return manifests


def _publish(manifests: dict[Side, Manifest], output: Path, directory: Path) -> None:
    """Put the shards and then the manifests in place. A manifest is never there beside shards of another run."""
    for name in MANIFESTS.values():
        (output / name).unlink(missing_ok=True)
    for path in list(output.iterdir()):
        if _is_ours(path.name):
            path.unlink()
    for manifest in manifests.values():
        for shard in manifest.shards:
            os.replace(directory / shard.path, output / shard.path)
    for side in reversed(manifests):  # the main one last: it says that the run has finished
        manifests[side].write(output / MANIFESTS[side])
    shutil.rmtree(output / _TEMPORARY)


def _read_all(sources: Sequence[Source], directory: Path, options: PrepareOptions, pool: WorkerPool) -> _ReadResult:
    total = sum(source.text_size for source in sources)
    buckets = min(max(_BUCKETS_A_SHARD * -(-total // options.shard_size), _BUCKETS_A_SHARD), _MAX_BUCKETS)
    tasks = [_ReadTask(parts, directory, buckets, options) for parts in _group(find_parts(sources))]
    weights = [sum(part.size for part in task.parts) for task in tasks]
    result = _ReadResult(
        {"train": 0, "val": 0}, {"train": np.zeros(buckets, np.int64), "val": np.zeros(buckets, np.int64)}
    )
    for one in pool.map(_read_task, tasks, weights, "Reading"):
        for side, count in one.documents.items():
            result.documents[side] += count
            result.line_bytes[side] += one.line_bytes[side]
        result.lost += one.lost
        result.causes = (result.causes + one.causes)[:MAX_CAUSES]
    if not sum(result.documents.values()):
        causes = "".join(f"\n  {cause}" for cause in result.causes[:3])
        raise UserError(f"the {len(sources)} inputs hold no document that can be read{causes}")
    for side, count in result.documents.items():
        if not count and (side == "train" or options.val_fraction):
            raise UserError(
                f"--val-fraction {options.val_fraction} puts none of {sum(result.documents.values())} documents on the "
                f"{side} side: choose {'more' if side == 'val' else 'less'}, or split the text into more documents "
                "(--split-by paragraph)"
            )
    return result


def _group(parts: Sequence[Part]) -> Iterator[tuple[Part, ...]]:
    """Tasks of some MiB, so that thousands of small files are not thousands of tasks."""
    group: list[Part] = []
    for part in parts:
        group.append(part)
        if sum(p.size for p in group) >= _TASK_BYTES:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _read_task(task: _ReadTask) -> _ReadResult:
    """Pass 1: documents of some parts to spill files."""
    options = task.options
    threshold = int(options.val_fraction * 2.0**64)
    result = _ReadResult(
        {"train": 0, "val": 0}, {"train": np.zeros(task.buckets, np.int64), "val": np.zeros(task.buckets, np.int64)}
    )
    spill = _Spill(task.directory)
    for part in task.parts:
        for place, document in read_part(part, options.field):
            if isinstance(document, LostDocument):
                result.lost += 1
                if len(result.causes) < MAX_CAUSES:
                    result.causes.append(f"{part.source.label} at {place}: {document.cause}")
                continue
            # By content, so that equal documents stay on one side.
            content = hashlib.sha256(document.encode()).digest()
            side: Side = "val" if int.from_bytes(content[:8], "big") < threshold else "train"
            # By place, so that equal documents are spread.
            seeded = struct.pack("<QQQ", options.seed, part.number, place)
            key = hashlib.blake2b(seeded, digest_size=16, person=b"mlm_dist order").digest()
            bucket = int.from_bytes(key[:8], "big") * task.buckets >> 64
            line = json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n"
            spill.add(f"{side}-{bucket:04d}", _RECORD.pack(key, len(line)) + line)
            result.documents[side] += 1
            result.line_bytes[side][bucket] += len(line)
    spill.flush()
    return result


class _Spill:
    """Appends records to files, through a buffer of bounded size; each process has files of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._records: dict[str, list[bytes]] = {}
        self._size = 0

    def add(self, name: str, record: bytes) -> None:
        self._records.setdefault(name, []).append(record)
        self._size += len(record)
        if self._size > _SPILL_BUFFER:
            self.flush()

    def flush(self) -> None:
        for name, records in self._records.items():
            with open(self._directory / f"{name}.{os.getpid()}", "ab") as file:
                file.writelines(records)
        self._records.clear()
        self._size = 0


def _plan_shards(read: _ReadResult, directory: Path, options: PrepareOptions) -> list[_WriteTask]:
    """Runs of buckets with about equal bytes of text."""
    tasks = []
    for side, line_bytes in read.line_bytes.items():
        total = int(line_bytes.sum())
        if not total:
            continue
        shards = -(-total // options.shard_size)
        shard_of = (line_bytes.cumsum() - line_bytes) * shards // total  # int64 [buckets], never falls
        block_size = options.block_size or auto_block_size(total // (_ZST_RATIO if options.compress == "zst" else 1))
        number = 0
        for _, run in itertools.groupby(range(len(line_bytes)), key=lambda bucket: int(shard_of[bucket])):
            buckets = list(run)
            span = range(buckets[0], buckets[-1] + 1)
            if line_bytes[span.start : span.stop].any():
                tasks.append(_WriteTask(side, number, span, directory, block_size, options))
                number += 1
    return tasks


def _write_shard(task: _WriteTask) -> IndexedShard:
    """Pass 2: one shard. It is read back by the same code that indexes foreign archives, which checks it as well."""
    from webdataset.writer import TarWriter

    options = task.options
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    path = task.directory / task.name
    with path.open("wb") as file:
        # Times and owners are fixed: the bytes depend on the documents alone.
        with TarWriter(file, user="root", group="root", mtime=0, encoder=False) as tar:
            for i, member in enumerate(_members(task)):
                key = f"{task.side}-{task.number:05d}-{i:07d}"
                if options.compress == "zst":
                    tar.write({"__key__": key, "jsonl.zst": compressor.compress(member)})
                else:
                    tar.write({"__key__": key, "jsonl": member})
        file.flush()
        os.fsync(file.fileno())
    return index_tar(path, task.name, "text", task.block_size)


def _members(task: _WriteTask) -> Iterator[bytes]:
    """Lines of JSON, gathered into members that fit a block where the documents allow it."""
    limit = max(task.block_size - _MEMBER_HEADROOM, 1)
    lines: list[memoryview] = []
    size = 0
    for line in itertools.chain.from_iterable(_sorted_bucket(task, bucket) for bucket in task.buckets):
        if lines and (size + len(line) > limit or len(lines) == task.options.documents_per_member):
            yield b"".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield b"".join(lines)


def _sorted_bucket(task: _WriteTask, bucket: int) -> Iterator[memoryview]:
    spill = memoryview(b"".join(path.read_bytes() for path in task.directory.glob(f"{task.side}-{bucket:04d}.*")))
    records = []
    position = 0
    while position < len(spill):
        key, length = _RECORD.unpack_from(spill, position)
        position += _RECORD.size
        records.append((key, position, length))
        position += length
    records.sort()
    for _, position, length in records:
        yield spill[position : position + length]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    default = PrepareOptions()
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="text files (.txt .md .rst .jsonl, also .gz .zst), directories, globs",
    )
    add("--output", type=Path, required=True, help="directory for shards, manifest.json and val.json")
    add("--builtin", action="append", default=[], choices=BUILTINS, help="text that every Python carries; no download")
    add(
        "--split-by",
        choices=SPLITS,
        default=default.split_by,
        help="what one document is (default: a file; .jsonl always has one document a line)",
    )
    add("--field", default=default.field, help="field of .jsonl records that is the text (default: %(default)s)")
    add("--documents-per-member", type=int, default=default.documents_per_member, help="at most (default: %(default)s)")
    add(
        "--shard-size",
        type=parse_size,
        default=default.shard_size,
        metavar="SIZE",
        help="text of a shard, before compression, about (default: 256MiB)",
    )
    add("--block-size", type=parse_size, metavar="SIZE", help="bytes read at once (default: by corpus, 4KiB to 1MiB)")
    add(
        "--val-fraction",
        type=float,
        default=default.val_fraction,
        help="documents to hold out, chosen by hash of their text; 0 for none (default: %(default)s)",
    )
    add("--seed", type=int, default=default.seed, help="of the shuffle (default: %(default)s)")
    add("--compress", choices=("none", "zst"), default=default.compress, help="members (default: %(default)s)")
    add("--workers", type=int, default=default_workers(), help="processes; changes nothing else (default: cores)")
    add("--overwrite", action="store_true", help="replace what this command made in the directory before")


def run(args: argparse.Namespace) -> int:
    """Run the command; give its exit code."""
    options = PrepareOptions(**{name: getattr(args, name) for name in PrepareOptions.__dataclass_fields__})
    manifests, written = prepare(
        args.inputs,
        args.output,
        options,
        builtins=args.builtin,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    if not written:
        print(f"{args.output} is already prepared with these inputs and options; nothing to do")
    for side, manifest in manifests.items():
        print(
            f"{args.output / MANIFESTS[side]}: {manifest.num_documents} documents, {len(manifest.shards)} shards, "
            f"{manifest.num_blocks} blocks, {manifest.num_bytes} bytes, fingerprint {manifest.fingerprint[:12]}"
        )
    info = manifests["train"].info
    if info["lost_documents"]:
        causes = "".join(f"\n  {cause}" for cause in info["lost"])
        print(f"{info['lost_documents']} documents could not be read and were left out, first of all:{causes}")
    return 0
