"""`mlm-dist prepare`: text to shuffled WebDataset shards, their manifests and a held-out part.

The output is a function of the documents, their places in the sorted list of inputs, and the options. Shards are made
in a hidden directory and renamed when all are whole; the manifests come last.
"""

import argparse
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlm_dist import __version__
from mlm_dist.data.index import parse_size
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.shuffle import PrepareOptions, Side, shuffle
from mlm_dist.data.sources import BUILTINS, SPLITS, Source, digest, find_sources
from mlm_dist.data.workers import WorkerPool, default_workers
from mlm_dist.errors import UserError

MANIFESTS: dict[Side, str] = {"train": "manifest.json", "val": "val.json"}

_TEMPORARY = ".prepare-tmp"


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
        UserError: Wrong inputs or options, no document on a side of the split, a directory that holds other data or
            that another process is working on.
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
    try:
        with WorkerPool(workers) as pool:
            made = shuffle(sources, directory, options, pool)
    except BaseException:
        shutil.rmtree(output / _TEMPORARY, ignore_errors=True)
        raise
    manifests: dict[Side, Manifest] = {}
    for side, shards in made.shards.items():
        info = {
            "tool": "mlm-dist prepare",
            "version": __version__,
            "side": side,
            **recipe,
            "block_size": made.block_size[side],
            "documents": made.documents,
            "lost_documents": made.lost,
            "lost": made.causes,
        }
        manifests[side] = Manifest(output, shards, info)
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
