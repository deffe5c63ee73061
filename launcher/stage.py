"""Copies the shards that a run reads to a disk of the node, before the run starts.

    python -m launcher.stage copy DIR -- ARGS      once a node; ARGS are the program's
    python -m launcher.stage flags DIR -- ARGS     prints the flags that make the program read them there, quoted for a shell

A manifest and its shards are copied with their relative paths, so the data is the same to the bit: which paths they lie under
enters nothing. What is there already with the right size stays.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.run_dir import program_config, read_keys, split_program
from launcher.supervise import say
from mlm_dist.errors import UserError

KEYS = ("data.manifest", "data.val_manifest")


@dataclass(frozen=True)
class Staged:
    """A manifest, and the place on the node's disk that it goes to."""

    key: str
    source: Path
    target: Path


def staged(config: Path, overrides: Sequence[str], environ: Mapping[str, str], directory: Path) -> list[Staged]:
    """The manifests that the run reads. Raises UserError for a run that takes its data from elsewhere."""
    keys = read_keys(config, overrides, environ, {**dict.fromkeys(KEYS), "data.sources": None})
    if keys["data.sources"]:
        raise UserError(
            "--stage: copies data.manifest and data.val_manifest; this run has data.sources. Copy them by hand, or use data.cache_dir"
        )
    found = []
    for key in KEYS:
        if keys[key] is None:
            continue
        source = Path(str(keys[key])).absolute()
        if "://" in str(keys[key]) or not source.is_file():
            raise UserError(f"--stage: {key} {str(keys[key])!r} is no file; for data on servers use data.cache_dir")
        # By content: a corpus that is prepared anew at the same path has new shards, often of the same sizes.
        place = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
        found.append(Staged(key, source, directory / place / source.name))
    return found


def copy(item: Staged) -> tuple[int, int]:
    """Copies a manifest and its shards; returns (files, bytes) that had to be copied.

    Raises:
        UserError: the manifest is none, names shards outside of its directory, or the disk has no room.
    """
    try:
        shards = {s["path"]: int(s["size"]) for s in json.loads(item.source.read_text())["shards"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--stage: {str(item.source)!r} is no manifest ({error!r})") from None
    for path in shards:
        if "://" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise UserError(f"--stage: {str(item.source)!r} names {path!r}, which is not within its directory")
    base = item.target.parent
    base.mkdir(parents=True, exist_ok=True)
    with (base / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another job on this node may be copying the same
        return _copy_absent(item, base, shards)


def _copy_absent(item: Staged, base: Path, shards: Mapping[str, int]) -> tuple[int, int]:
    absent = {path: size for path, size in shards.items() if _size(base / path) != size}
    free = shutil.disk_usage(base).free
    if sum(absent.values()) > free:
        raise UserError(
            f"--stage: {str(base)!r} on {socket.gethostname()} has {free / 2**30:.1f} GiB free, "
            f"the shards need {sum(absent.values()) / 2**30:.1f}"
        )
    for path in absent:
        _copy(item.source.parent / path, base / path)
    _copy(item.source, item.target)
    return len(absent), sum(absent.values())


def _copy(source: Path, target: Path) -> None:
    """Under another name first: what has the right name is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"--stage: {str(source)!r} to {str(target)!r} on {socket.gethostname()}: {error.strerror}"
        ) from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def main(argv: Sequence[str] | None = None) -> int:
    """See the module; returns the exit code."""
    words, program = split_program(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m launcher.stage", allow_abbrev=False)
    parser.add_argument("action", choices=("copy", "flags"))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args(words)
    try:
        config, overrides = program_config(program)
        items = staged(config, overrides, os.environ, args.directory)
        if args.action == "flags":
            print(shlex.join(f"--{i.key}={i.target}" for i in items))
            return 0
        for item in items:
            start = time.monotonic()
            files, size = copy(item)
            seconds = time.monotonic() - start
            print(
                f"{socket.gethostname()}: staged {item.key}: {files} shards, {size / 2**20:.0f} MiB in {seconds:.1f} s",
                file=sys.stderr,
            )
    except UserError as error:
        say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
