"""`mlm-dist data verify`: read a whole data set and say what is not as its manifest says."""

import argparse
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mlm_dist.data.archive import PIPE, block_documents, block_members, codec_of_shard, open_shard
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.members import LostDocument, MemberError, TokenIds
from mlm_dist.data.shard import Shard
from mlm_dist.data.tar import TarError
from mlm_dist.data.workers import WorkerPool, default_workers
from mlm_dist.errors import UserError
from mlm_dist.storage.store import Store, StoreError

_CHUNK = 1 << 20
_MAX_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a shard.

    Attributes:
        shard: Its path in the manifest.
        kind: `unreadable` (the shard is gone, or no byte of it can be had), `size`, `sha256`, `structure` (of the tar),
            `block` (one block cannot be read) or `documents` (a block gives another number of them than the manifest says).
        offset: Byte of the shard where it was met; None when it is about the whole shard.
        documents: How many of the manifest's documents it takes away.
        cause: What was found, one line.
    """

    shard: str
    kind: str
    offset: int | None
    documents: int
    cause: str


def verify_shard(shard: Shard, store: Store, field: str, ids: TokenIds | None, damaged: bool) -> list[Problem]:
    """What is wrong with one shard; empty when it is as the manifest says.

    Args:
        shard: The manifest's entry.
        store: Where it is read.
        field: Field of JSON members that is the text.
        ids: What the numbers of `.npy` members mean.
        damaged: Whether the manifest says that a part of the shard was damaged when it was made.
    """
    try:
        with open_shard(store, shard.path) as view:
            return list(_check(view, shard, field, ids, damaged))
    except StoreError as error:
        return [Problem(shard.path, "unreadable", None, int(shard.documents.sum()), str(error))]


def _check(view: memoryview, shard: Shard, field: str, ids: TokenIds | None, damaged: bool) -> Iterator[Problem]:
    same = len(view) == shard.size
    if not same:
        yield Problem(shard.path, "size", None, 0, f"has {len(view)} bytes; the manifest says {shard.size}")
    else:
        digest = hashlib.sha256()
        for start in range(0, len(view), _CHUNK):
            digest.update(view[start : start + _CHUNK])
        same = digest.hexdigest() == shard.sha256
        if not same:
            yield Problem(shard.path, "sha256", None, 0, "its bytes are not those that the manifest was made of")
    for block in zip(
        shard.offsets.tolist(), shard.lengths.tolist(), shard.documents.tolist(), shard.crc32.tolist(), strict=True
    ):
        problem = _check_block(view, shard.path, block, field, ids)
        if problem is not None:
            yield problem
    # The reading of its one block has looked at the structure of a compressed shard.
    if not codec_of_shard(shard.path, view) and not (damaged and same):
        try:
            for _ in block_members(view, shard.path, whole=True):
                pass
        except TarError as error:
            yield Problem(shard.path, "structure", error.offset, 0, error.cause)


def _check_block(
    view: memoryview, path: str, block: tuple[int, int, int, int], field: str, ids: TokenIds | None
) -> Problem | None:
    offset, length, documents, crc32 = block
    if offset + length > len(view):
        return Problem(
            path, "block", offset, documents, f"the shard ends {offset + length - len(view)} bytes too early"
        )
    data = view[offset : offset + length]
    if zlib.crc32(data) != crc32:
        return Problem(path, "block", offset, documents, "the block's bytes differ from the manifest's checksum")
    found = 0
    first = ""
    try:
        for document in block_documents(data, path, field, ids, base=offset):
            if isinstance(document, LostDocument):
                first = first or document.cause
            else:
                found += 1
    except (TarError, MemberError) as error:
        return Problem(path, "block", offset, documents, str(error))
    if found == documents:
        return None
    cause = f"holds {found} documents; the manifest says {documents}" + (f" ({first})" if first else "")
    return Problem(path, "documents", offset, max(documents - found, 0), cause)


def verify(manifest: Manifest, store: Store, *, field: str | None = None, workers: int = 1) -> list[Problem]:
    """Read every shard of a data set.

    Args:
        manifest: Its manifest.
        store: Where the shards are read.
        field: Field of JSON members that is the text; by default the one that the manifest was made with.
        workers: Processes.

    Returns:
        What is wrong, in the order of the shards; empty when all is well.
    """
    damaged = {part["shard"] for part in manifest.losses.damaged}
    check = partial(_task, store=store, field=field or manifest.text_field or "text", ids=manifest.token_ids)
    tasks = [(shard, shard.path in damaged) for shard in manifest.shards]
    with WorkerPool(workers) as pool:
        found = pool.map(check, tasks, [shard.size for shard in manifest.shards], "Verifying")
    return [problem for problems in found for problem in problems]


def _task(task: tuple[Shard, bool], store: Store, field: str, ids: TokenIds | None) -> list[Problem]:
    return verify_shard(task[0], store, field, ids, task[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--manifest", required=True, help="manifest of the data set, a path or URL")
    parser.add_argument("--tokenizer", metavar="DIR", help="check that the data set's token ids are this tokenizer's")
    parser.add_argument("--field", help="field of JSON members that is the text (default: what the manifest says)")
    parser.add_argument("--allow-pipe", action="store_true", help="run the commands that the manifest names as shards")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the command: 0 when the data set is as its manifest says, 1 when not."""
    manifest = Manifest.read(args.manifest)
    if args.tokenizer and manifest.tokenizer:
        from mlm_dist.data.tokenizer import load

        if (given := load(args.tokenizer).fingerprint) != manifest.tokenizer:
            raise UserError(
                f"--tokenizer {args.tokenizer} has the fingerprint {given[:12]}; the token ids of {args.manifest} were made by one with "
                f"{manifest.tokenizer[:12]}"
            )
    if not args.allow_pipe and any(shard.path.startswith(PIPE) for shard in manifest.shards):
        raise UserError(f"{args.manifest} names commands as shards; look at them, then give --allow-pipe to run them")
    store = Store(manifest.root, allow_pipe=args.allow_pipe)
    problems = verify(manifest, store, field=args.field, workers=args.workers)
    lost = sum(problem.documents for problem in problems)
    if args.json:
        print(json.dumps(_summary(manifest, problems, lost)))
        return 1 if problems else 0
    by_shard: dict[str, list[Problem]] = {}
    for problem in problems:
        by_shard.setdefault(problem.shard, []).append(problem)
    documents = {shard.path: int(shard.documents.sum()) for shard in manifest.shards}
    for path, found in by_shard.items():
        print(f"{path}: {sum(problem.documents for problem in found)} of {documents[path]} documents lost")
        for problem in found[:_MAX_SHOWN]:
            print(f"  {_line(problem)}")
        if len(found) > _MAX_SHOWN:
            print(f"  and {len(found) - _MAX_SHOWN} more problems; --json lists them all")
    for line in manifest.losses.describe(3):
        print(f"known since the manifest was made: {line}" if not line.startswith(" ") else line)
    what = f"{len(manifest.shards)} shards, {manifest.num_blocks} blocks, {manifest.num_documents} documents"
    if problems:
        print(f"{args.manifest}: {what}: {len(problems)} problems in {len(by_shard)} shards, {lost} documents lost")
        return 1
    print(f"{args.manifest}: {what}: all as the manifest says")
    return 0


def _line(problem: Problem) -> str:
    place = "" if problem.offset is None else f" at byte {problem.offset}"
    documents = f" ({problem.documents} documents)" if problem.documents else ""
    return f"{problem.kind}{place}: {problem.cause}{documents}"


def _summary(manifest: Manifest, problems: list[Problem], lost: int) -> dict[str, Any]:
    return {
        "root": str(manifest.root).partition("?")[0],  # what follows may be a signature
        "fingerprint": manifest.fingerprint,
        "shards": len(manifest.shards),
        "blocks": manifest.num_blocks,
        "documents": manifest.num_documents,
        "lost": lost,
        "problems": [asdict(problem) for problem in problems],
        "losses": manifest.losses.to_json(),
    }
