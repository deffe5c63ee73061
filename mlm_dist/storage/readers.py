"""One attempt at reading bytes of a shard, and the reader of local files; `http`, `objects` and `pipes` have the others."""

import logging
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Protocol

MAX_OPEN_FILES = 16
PIECE = 1 << 20
# The deadline of an attempt is for each of these many bytes, so that a whole shard that is one block has its time.
SPAN = 16 << 20

log = logging.getLogger(__name__)
_warned: set[tuple[int, str]] = set()


class Failed(Exception):
    """One attempt did not give the bytes.

    Attributes:
        again: Whether another attempt may fare better.
        wait: Seconds that the server asks to be left alone.
    """

    def __init__(self, cause: str, *, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(cause)
        self.again, self.wait = again, wait


def warn_once(subject: str, message: str) -> None:
    """Log a warning, once per process for each subject."""
    if (os.getpid(), subject) not in _warned:
        _warned.add((os.getpid(), subject))
        log.warning("%s", message)


def one_line(error: BaseException) -> str:
    """What an error says, without what an URL in it may hold of secrets."""
    # Errors of packages that are OSErrors, too, say more as a whole.
    strerror = error.strerror if isinstance(error, OSError) and type(error).__module__ == "builtins" else None
    text = re.sub(r"(\w+://)[^/\s@]*@", r"\1", " ".join((strerror or str(error) or type(error).__name__).split()))
    return re.sub(r"(\w+://[^\s?]*)\?[^\s'\"]*", r"\1", text)[:200]


class Reader(Protocol):
    """Where bytes come from. A method is one attempt: it ends by a deadline, if what it asks can hang, and raises `Failed`."""

    concurrent: bool  # whether several threads may read at once

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Exactly the bytes [offset, offset + length)."""

    def pieces(self, path: str, offset: int, end: int) -> Generator[bytes, None, None]:
        """The bytes [offset, end) in pieces of at most `PIECE` or a little more."""

    def stat(self, path: str) -> tuple[int, str]:
        """(bytes, a text that changes with the content)."""

    def forget(self, path: str) -> None:
        """What was read of `path` was wrong: keep no handle of it."""


def too_early(missing: int) -> Failed:
    """What to raise for a shard that ends ``missing`` bytes before the block does."""
    return Failed(f"the shard ends {missing} bytes too early")


class _File:
    """A file descriptor that is closed when the last who reads from it lets go of it, in whatever thread."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class LocalReader:
    """Files below a directory; keeps the last few open."""

    concurrent = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: dict[str, _File] = {}

    def read(self, path: str, offset: int, length: int) -> bytes:
        parts = []
        try:
            file = self._open(path)
            while length > 0 and (part := os.pread(file.fd, min(length, SPAN), offset)):
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
        except OSError as error:
            raise _unreadable(error) from error
        if length:
            raise too_early(length)
        return b"".join(parts)

    def pieces(self, path: str, offset: int, end: int) -> Generator[bytes, None, None]:
        for start in range(offset, end, PIECE):
            yield self.read(path, start, min(PIECE, end - start))

    def stat(self, path: str) -> tuple[int, str]:
        try:
            found = os.stat(self.root / path)
        except OSError as error:
            raise _unreadable(error) from error
        return found.st_size, f"{found.st_mtime_ns} {found.st_ino}"

    def forget(self, path: str) -> None:
        self._files.pop(path, None)

    def _open(self, path: str) -> _File:
        file = self._files.get(path)
        if file is None:
            for oldest in list(self._files)[: len(self._files) - MAX_OPEN_FILES + 1]:
                self._files.pop(oldest, None)
            file = self._files[path] = _File(self.root / path)
        return file


def _unreadable(error: OSError) -> Failed:
    return Failed(f"cannot be read: {error.strerror}")
