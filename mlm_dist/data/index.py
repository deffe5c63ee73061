"""`mlm-dist index`: a manifest for archives that something else made."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mlm_dist import __version__, sizes
from mlm_dist.data.archive import PIPE, open_shard
from mlm_dist.data.locate import find_archives
from mlm_dist.data.losses import Losses
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.members import TokenIds
from mlm_dist.data.scan import MAX_BLOCK, ScannedShard, ScanOptions, scan_archive
from mlm_dist.data.workers import WorkerPool, default_workers
from mlm_dist.errors import UserError
from mlm_dist.storage.store import Store, StoreError

MIN_BLOCK = 4 << 10
# A run has at most 64 lanes or so before it has hundreds of ranks, and a lane wants 16 blocks to choose an order from.
WANTED_BLOCKS = 16 * 64
MAX_CAUSES = 20


def auto_block_size(total: int) -> int:
    """A block size for a corpus of `total` bytes: the power of two, 4 KiB to 1 MiB, that comes nearest to 1024 blocks
    from above."""
    wanted = max(total // WANTED_BLOCKS, 1)
    return min(max(1 << (wanted.bit_length() - 1), MIN_BLOCK), MAX_BLOCK)


def parse_size(text: str) -> int:
    """`sizes.parse_size` as argparse wants it."""
    try:
        return sizes.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def index(
    inputs: Sequence[str],
    output: Path,
    *,
    field: str = "text",
    block_size: int | None = None,
    workers: int = 1,
    ids: TokenIds | None = None,
    ignore_npy: bool = False,
    skip_damaged: bool = False,
    allow_pipe: bool = False,
) -> Manifest:
    """Index archives and write their manifest.

    Args:
        inputs: What names them, see `find_archives`.
        output: Manifest file; local archives must lie in or below its directory.
        field: Field of JSON members that is the text.
        block_size: Bytes of a block, at most if its members allow; None chooses by the corpus' size.
        workers: Processes.
        ids: What the numbers of `.npy` members mean: needed if there are any.
        ignore_npy: Pass over `.npy` members.
        skip_damaged: Leave out what cannot be read of an archive, which the manifest then names.
        allow_pipe: Let inputs be `pipe:COMMAND`.

    Raises:
        UserError: No archives, a damaged one, one outside the directory, none with a readable document.
    """
    archives = find_archives(inputs, output, allow_pipe=allow_pipe)
    store = Store(archives.root, allow_pipe=allow_pipe)
    sizes = _sizes(store, archives.names)
    block_size = block_size or auto_block_size(sum(sizes))
    options = ScanOptions(field, block_size, ids, ignore_npy, skip_damaged)
    with WorkerPool(workers) as pool:
        found = pool.map(partial(_scan, store=store, options=options), archives.names, sizes, "Indexing")
    losses = Losses.of(
        [loss for shard in found for loss in shard.losses], [part for shard in found for part in shard.damaged]
    )
    if not any(shard.shard.documents.any() for shard in found):
        raise UserError(
            f"no document in {len(found)} archives: members must be .txt, .json, .jsonl or .npy (also .gz, .zst) and JSON "
            f"must have the field {field!r} (--field)" + "".join(f"\n{line}" for line in losses.describe(3))
        )
    info = {
        "tool": "mlm-dist index",
        "version": __version__,
        "options": {"field": field, "block_size": block_size},
    }
    pretokenized = any(shard.pretokenized for shard in found)
    manifest = Manifest(
        archives.root,
        [shard.shard for shard in found],
        info,
        token_ids=ids if pretokenized else None,
        losses=losses,
    )
    manifest.write(output)
    return manifest


def _sizes(store: Store, names: Sequence[str]) -> list[int]:
    """Bytes of each archive; 0 for a command's output, which nobody knows yet."""
    known = [name for name in names if not name.startswith(PIPE)]
    sizes = dict(zip(known, store.sizes(known), strict=True))
    bad = [f"\n  {name}: {size}" for name, size in sizes.items() if isinstance(size, str)]
    if bad:
        raise UserError(f"{len(bad)} of {len(names)} archives cannot be read:" + "".join(bad[:MAX_CAUSES]))
    return [int(sizes.get(name, 0)) for name in names]


def _scan(name: str, store: Store, options: ScanOptions) -> ScannedShard:
    where = name if name.startswith(PIPE) else f"{store.root}/{name}"
    try:
        with open_shard(store, name) as view:
            return scan_archive(view, name, options, single=not store.has_ranges(name))
    except StoreError as error:
        raise UserError(f"shard {where}: {error}") from error
    except UserError as error:
        raise UserError(f"shard {where} {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="archives (.tar, .tar.gz, .tgz, .tar.zst), directories that hold some, globs, URLs (http, s3, gs)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="manifest to write, in or above the archives' directory"
    )
    parser.add_argument("--field", default="text", help="field of JSON members that is the text (default: text)")
    parser.add_argument(
        "--block-size", type=parse_size, help="bytes of a block (default: by corpus size, 4KiB to 1MiB)"
    )
    npy = parser.add_mutually_exclusive_group()
    npy.add_argument("--tokenizer", metavar="DIR", help="the tokenizer that made the token ids in .npy members")
    npy.add_argument("--ignore-npy", action="store_true", help=".npy members are no token ids: pass over them")
    parser.add_argument(
        "--skip-damaged", action="store_true", help="leave out what cannot be read of a damaged archive, and say so"
    )
    parser.add_argument("--allow-pipe", action="store_true", help="run inputs of the form pipe:COMMAND")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: cores)")


def run(args: argparse.Namespace) -> int:
    """Run the command; give its exit code."""
    output: Path = args.output
    if output.is_dir():
        raise UserError(f"--output {output} is a directory; name the file to write, as {output / 'manifest.json'}")
    if output.exists():
        Manifest.read(output)  # only a manifest is replaced
    ids = None
    if args.tokenizer:
        from mlm_dist.data.tokenizer import load

        ids = TokenIds.of(load(args.tokenizer))
    output.parent.mkdir(parents=True, exist_ok=True)
    manifest = index(
        args.inputs,
        output,
        field=args.field,
        block_size=args.block_size,
        workers=args.workers,
        ids=ids,
        ignore_npy=args.ignore_npy,
        skip_damaged=args.skip_damaged,
        allow_pipe=args.allow_pipe,
    )
    print(
        f"{output}: {len(manifest.shards)} shards, {manifest.num_blocks} blocks, {manifest.num_documents} documents, "
        f"{manifest.num_bytes} bytes, fingerprint {manifest.fingerprint[:12]}"
    )
    for line in manifest.losses.describe():
        print(line)
    return 0
