"""`mlm-dist index`: a manifest for archives that something else made."""

import argparse
import glob
import hashlib
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mlm_dist import __version__
from mlm_dist.data.manifest import Manifest, Shard
from mlm_dist.data.members import LostDocument, MemberError, is_text_member, read_documents
from mlm_dist.data.tar import TarError, iter_members, map_archive
from mlm_dist.data.workers import WorkerPool, default_workers
from mlm_dist.errors import UserError

MIN_BLOCK = 4 << 10
MAX_BLOCK = 1 << 20
# A run has at most 64 lanes or so before it has hundreds of ranks, and a lane wants 16 blocks to choose an order from.
WANTED_BLOCKS = 16 * 64
MAX_CAUSES = 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class IndexedShard:
    """What `index_tar` found.

    Attributes:
        shard: The shard with its blocks.
        lost: Documents that cannot be read (bad JSON, field or UTF-8).
        causes: Of the first 20 of them, each with its member's name.
    """

    shard: Shard
    lost: int
    causes: list[str]


def index_tar(path: Path, name: str, field: str, block_size: int) -> IndexedShard:
    """Read a whole archive: every member's place, every document, the checksums.

    A block ends before the member that would make it longer than `block_size`; a longer member is a block alone.
    Members that hold no text are in no block, or in one because text members lie around them.

    Args:
        path: The archive.
        name: Its path in the manifest.
        field: Field of JSON members that is the text.
        block_size: Bytes.

    Raises:
        UserError: The archive cannot be read whole; names it, the offset and the cause.
    """
    spans: list[list[int]] = []  # start, end, documents
    lost = 0
    causes: list[str] = []
    try:
        view = map_archive(path)
        for member in iter_members(view, whole=True):
            if not is_text_member(member.name):
                continue
            documents = 0
            try:
                for document in read_documents(member.name, member.data, field):
                    if isinstance(document, LostDocument):
                        lost += 1
                        if len(causes) < MAX_CAUSES:
                            causes.append(f"{name}: {member.name!r}: {document.cause}")
                    else:
                        documents += 1
            except MemberError as error:
                raise TarError(member.start, f"member {member.name!r}: {error}") from error
            if spans and member.end - spans[-1][0] <= block_size:
                spans[-1][1] = member.end
                spans[-1][2] += documents
            else:
                spans.append([member.start, member.end, documents])
    except TarError as error:
        raise UserError(f"shard {path} is damaged {error}") from error
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256()
    for start in range(0, len(view), _CHUNK):
        digest.update(view[start : start + _CHUNK])
    columns = np.array(spans, dtype=np.int64).reshape(-1, 3)
    crc32 = np.array([zlib.crc32(view[start:end]) for start, end, _ in spans], dtype=np.uint32)
    shard = Shard(
        path=name,
        size=len(view),
        sha256=digest.hexdigest(),
        offsets=columns[:, 0].copy(),
        lengths=columns[:, 1] - columns[:, 0],
        documents=columns[:, 2].copy(),
        crc32=crc32,
    )
    return IndexedShard(shard, lost, causes)


def auto_block_size(total: int) -> int:
    """A block size for a corpus of `total` bytes: the power of two, 4 KiB to 1 MiB, that comes nearest to 1024 blocks
    from above."""
    wanted = max(total // WANTED_BLOCKS, 1)
    return min(max(1 << (wanted.bit_length() - 1), MIN_BLOCK), MAX_BLOCK)


def parse_size(text: str) -> int:
    """`4096`, `64KiB`, `256M`, `1GB`: bytes, all units binary."""
    match = re.fullmatch(r"(\d+)\s*([kmg]?)(?:i?b)?", text.strip().lower())
    if not match or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 4096, 64KiB, 256MiB or 1GiB")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2]]


def index(
    inputs: Sequence[str], output: Path, *, field: str = "text", block_size: int | None = None, workers: int = 1
) -> tuple[Manifest, list[IndexedShard]]:
    """Index archives and write their manifest.

    Args:
        inputs: Archives, directories (searched for `*.tar` at any depth) and globs.
        output: Manifest file; the archives must lie in or below its directory.
        field: Field of JSON members that is the text.
        block_size: Bytes of a block, at most if its members allow; None chooses by the corpus' size.
        workers: Processes.

    Returns:
        The manifest and what was found in each shard, shards in the order of their paths.

    Raises:
        UserError: No archives, a damaged one, one outside the directory, none with a readable document.
    """
    root = output.parent.resolve()
    paths = find_tars(inputs)
    names = [_name_below(path, root) for path in paths]
    order = sorted(range(len(paths)), key=lambda i: names[i])
    sizes = [paths[i].stat().st_size for i in order]
    block_size = block_size or auto_block_size(sum(sizes))
    tasks = [(paths[i], names[i]) for i in order]
    with WorkerPool(workers) as pool:
        found = pool.map(partial(_index_task, field=field, block_size=block_size), tasks, sizes, "Indexing")
    lost = sum(shard.lost for shard in found)
    causes = [cause for shard in found for cause in shard.causes][:MAX_CAUSES]
    if not any(shard.shard.documents.any() for shard in found):
        raise UserError(
            f"no document in {len(paths)} archives: members must be .txt, .json or .jsonl (also .gz, .zst) and JSON "
            f"must have the field {field!r} (--field)" + "".join(f"\n  {cause}" for cause in causes[:3])
        )
    info = {
        "tool": "mlm-dist index",
        "version": __version__,
        "options": {"field": field, "block_size": block_size},
        "lost_documents": lost,
        "lost": causes,
    }
    manifest = Manifest(root, [shard.shard for shard in found], info)
    manifest.write(output)
    return manifest, found


def _index_task(task: tuple[Path, str], field: str, block_size: int) -> IndexedShard:
    return index_tar(*task, field, block_size)


def find_tars(inputs: Sequence[str]) -> list[Path]:
    """The archives that paths, directories and globs name, each once.

    Raises:
        UserError: An input that names nothing, or a compressed archive.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            matches = sorted(path.rglob("*.tar"))
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        if not matches:
            raise UserError(f"{text!r} names no archive: give .tar files, directories that hold some, or globs")
        for match in matches:
            if match.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
                raise UserError(f"{match} is compressed as a whole, so no block of it can be read alone: decompress it")
            if match.is_file():
                found[Path(os.path.abspath(match))] = None
    return list(found)


def _name_below(path: Path, root: Path) -> str:
    # Not resolved: a link in the manifest's directory to an archive elsewhere is a fine way to lay out a corpus.
    for below in (path, path.parent.resolve() / path.name):
        if below.is_relative_to(root):
            return below.relative_to(root).as_posix()
    raise UserError(
        f"the archive {path} lies outside {root}, the manifest's directory: choose an --output in a directory above "
        "all archives, or link them into it"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="archives, directories that hold some, globs")
    parser.add_argument(
        "--output", type=Path, required=True, help="manifest to write, in or above the archives' directory"
    )
    parser.add_argument("--field", default="text", help="field of JSON members that is the text (default: text)")
    parser.add_argument(
        "--block-size", type=parse_size, help="bytes of a block (default: by corpus size, 4KiB to 1MiB)"
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: cores)")


def run(args: argparse.Namespace) -> int:
    """Run the command; give its exit code."""
    output: Path = args.output
    if output.is_dir():
        raise UserError(f"--output {output} is a directory; name the file to write, as {output / 'manifest.json'}")
    if output.exists():
        Manifest.read(output)  # only a manifest is replaced
    output.parent.mkdir(parents=True, exist_ok=True)
    manifest, found = index(args.inputs, output, field=args.field, block_size=args.block_size, workers=args.workers)
    lost = sum(shard.lost for shard in found)
    print(
        f"{output}: {len(found)} shards, {manifest.num_blocks} blocks, {manifest.num_documents} documents, "
        f"{manifest.num_bytes} bytes, fingerprint {manifest.fingerprint[:12]}"
    )
    if lost:
        causes = "".join(f"\n  {cause}" for cause in manifest.info["lost"])
        print(f"{lost} documents cannot be read and will be left out, first of all:{causes}")
    return 0
