"""Files that a crash leaves whole, and readers that take what a crash or a hand left."""

import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What the error of a write says where there is no room left, of the disk or of the user's share of it.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a start after a crash, sees the old one or the new one: a temporary file beside it, fsync, rename, fsync."""
    # Not tempfile, whose 0600 would shut out the other people of a cluster: who may read is for the umask to say.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def overwrite(path: Path, content: bytes) -> None:
    """Write over a file in its place, which most file systems can when they are full. A reader, or a crash, may meet it torn."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the renames in a directory last."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's JSON object, or None when it is missing, torn or no object."""
    try:
        return parse_object(path.read_bytes())
    except OSError:
        return None


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that holds one a line; a line that is none, torn by a crash perhaps, is passed over."""
    # Cut at line feeds alone: a string may hold other characters that str.splitlines() takes for line ends.
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        record = parse_object(line)
        if record is not None:
            yield record


def parse_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object that ``data`` is, or None."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's YAML mapping; empty when it is missing, broken or no mapping."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def to_null(fd: int) -> None:
    """Let a file descriptor be /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != fd:
        os.dup2(null, fd)
        os.close(null)
