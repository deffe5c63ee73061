"""Where the bytes of shards come from: local files, HTTP, object stores, commands. Verified, tried again, cached, read ahead."""

import contextlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from mlm_dist.storage.ahead import Block, ReadAhead
from mlm_dist.storage.cache import Cache
from mlm_dist.storage.http import HttpReader
from mlm_dist.storage.objects import ObjectReader, check_driver, protocol_of
from mlm_dist.storage.pipes import PIPE, PipeReader
from mlm_dist.storage.readers import Failed, LocalReader, Reader
from mlm_dist.storage.tries import WAIT, StoreError, Tries, in_threads, try_again

RETRIES = 5
TIMEOUT = 60.0
SIZE_THREADS = 16
# So many shards in a row without an answer, and the server is taken to be down.
OUTAGE = 16
UNKNOWN_SIZE = -1
_NO_PIPES = "a pipe: shard runs a command; set data.allow_pipe: true (--allow-pipe) if you trust who wrote the manifest"

_ENDLESS = 1 << 62


@dataclass
class _Process:
    """What one process has open."""

    reader: Reader
    pipes: PipeReader
    ahead: ReadAhead


class Store:
    """The objects below a root, read by blocks or whole.

    A store can be pickled and used in forked processes: what is open (file descriptors, sessions, threads) is made when a
    process first needs it. Its methods may be called from several threads.

    Args:
        root: A local directory, or a URL: http(s), s3, gs, or any protocol of fsspec that can seek.
        retries: How often a remote read is tried again. A local one is tried again once, with the file opened anew: a
            handle can go stale on a network file system.
        timeout: Seconds that one attempt may take, for each 16 MiB that it reads.
        cache: Keeps blocks of remote shards on the node.
        allow_pipe: Let shards be ``pipe:COMMAND``.
        wait: Seconds before the second attempt; each further wait is twice as long, up to 16 times this.

    Attributes:
        root: The directory as a Path, or the URL.
        remote: Whether the root is not a local directory.

    Raises:
        UserError: A URL that nothing installed can read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        retries: int = RETRIES,
        timeout: float = TIMEOUT,
        cache: Cache | None = None,
        allow_pipe: bool = False,
        wait: float = WAIT,
    ) -> None:
        self.root = _local_or_url(root)
        self.remote = isinstance(self.root, str)
        self.retries, self.timeout, self.cache, self.allow_pipe, self.wait = retries, timeout, cache, allow_pipe, wait
        self._processes: dict[int, _Process] = {}
        if isinstance(self.root, str):
            check_driver(self.root)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_processes": {}}

    def read(self, path: str, offset: int, length: int, crc32: int) -> bytes:
        """The bytes [offset, offset + length) of a shard.

        Args:
            path: POSIX path of the shard below the root, or ``pipe:COMMAND``, whose whole output is one block.
            crc32: `zlib.crc32` that the bytes must have.

        Raises:
            StoreError: They cannot be had.
        """
        block = (path, offset, length, crc32)
        data = self._here().ahead.take(block)
        return self._read(block) if data is None else data

    def ahead(self, path: str, offset: int, length: int, crc32: int) -> None:
        """Begin to fetch a block that `read` will be asked for soon. Changes nothing but how long that takes; for local roots it does nothing."""
        here = self._here()
        if self.remote and not path.startswith(PIPE) and here.reader.concurrent:
            here.ahead.order((path, offset, length, crc32))

    def sizes(self, paths: Sequence[str]) -> list[int | str]:
        """Bytes of each shard or, in one line, why it cannot be read; `UNKNOWN_SIZE` for commands, which are not run.

        Shards are asked for at the same time, a few at once. When many in a row get no answer the rest are not asked.
        """
        silent = 0
        last = ""

        def size(path: str) -> int | str:
            nonlocal silent, last
            if path.startswith(PIPE):
                return UNKNOWN_SIZE if self.allow_pipe else _NO_PIPES
            if silent >= OUTAGE:
                return f"not asked for: {OUTAGE} others in a row gave no answer, the last: {last}"
            try:
                found = self._stat(path)[0]
            except StoreError as error:
                if self.remote and isinstance(error.__cause__, Failed) and error.__cause__.again:
                    silent, last = silent + 1, str(error)
                return str(error)
            silent = 0
            return found

        return in_threads(size, paths, SIZE_THREADS if self._here().reader.concurrent else 1)

    def fetch(self, path: str) -> Iterator[bytes]:
        """A whole object in pieces of about a MiB; a remote one that breaks off is gone on with where it broke.

        Raises:
            StoreError: It cannot be had, or changed while it was read.
        """
        reader, tries = self._route(path)
        if path.startswith(PIPE):
            yield from self._fetch_output(reader, tries, path)
            return
        size, version = self._stat(path)
        done = 0
        while done < size:
            try:
                with contextlib.closing(reader.pieces(path, done, size)) as pieces:
                    for piece in pieces:
                        done, tries.made = done + len(piece), 0
                        yield piece
            except Failed as error:
                reader.forget(path)
                tries.failed(error)
        if self._stat(path) != (size, version):
            raise StoreError("changed while it was read")

    def _fetch_output(self, reader: Reader, tries: Tries, path: str) -> Iterator[bytes]:
        """A command that fails before it gave anything is tried again: none promises the same output twice."""
        done = 0
        while True:
            try:
                with contextlib.closing(reader.pieces(path, 0, _ENDLESS)) as pieces:
                    for piece in pieces:
                        done += len(piece)
                        yield piece
                return
            except Failed as error:
                if done:
                    raise StoreError(str(error)) from error
                tries.failed(error)

    def has_ranges(self, path: str) -> bool:
        """Whether parts of an object can be read without all that lies before them.

        Raises:
            StoreError: A server that has to be asked does not answer.
        """
        reader = self._route(path)[0]
        if isinstance(reader, HttpReader):
            self._stat(path)
            return bool(reader.ranges)
        return not path.startswith(PIPE)

    def _read(self, block: Block) -> bytes:
        path, offset, length, crc32 = block
        reader, tries = self._route(path)
        cached = self.cache if self.remote or path.startswith(PIPE) else None
        name = path if path.startswith(PIPE) else f"{self.root}/{path}"
        if cached and (data := cached.get(name, offset, length, crc32)) is not None:
            return data

        def attempt() -> bytes:
            data = reader.read(path, offset, length)
            if zlib.crc32(data) != crc32:
                raise Failed("the block's bytes differ from the manifest's checksum")
            return data

        data = try_again(attempt, reader, tries)
        if cached:
            cached.put(name, offset, data)
        return data

    def _stat(self, path: str) -> tuple[int, str]:
        reader, tries = self._route(path)
        return try_again(lambda: reader.stat(path), reader, tries)

    def _route(self, path: str) -> tuple[Reader, Tries]:
        """The reader for a path, and the tries that it has."""
        here = self._here()
        if not path.startswith(PIPE):
            return here.reader, Tries(path, *((self.retries, self.wait) if self.remote else (1, 0.0)))
        if not self.allow_pipe:
            raise StoreError(_NO_PIPES)
        return here.pipes, Tries(path, self.retries, self.wait)

    def _here(self) -> _Process:
        # What a parent opened stays in its place: in a forked child it must be neither used nor closed.
        pid = os.getpid()
        here = self._processes.get(pid)
        if here is None:
            made = _Process(self._open(), PipeReader(self.timeout), ReadAhead(self._read))
            here = self._processes.setdefault(pid, made)
        return here

    def _open(self) -> Reader:
        if isinstance(self.root, Path):
            return LocalReader(self.root)
        kind = HttpReader if protocol_of(self.root) in ("http", "https") else ObjectReader
        return kind(self.root, self.timeout)


def _local_or_url(root: str | Path) -> Path | str:
    if isinstance(root, Path) or "://" not in root:
        return Path(root)
    return Path(root[len("file://") :]) if protocol_of(root) == "file" else root


def read_object(url: str, *, retries: int = RETRIES, timeout: float = TIMEOUT) -> bytes:
    """A whole small file: a local path or a URL.

    Raises:
        StoreError: It cannot be read.
        UserError: A URL that nothing installed can read.
    """
    where = _local_or_url(url)
    if isinstance(where, Path):
        root, name = str(where.parent), where.name
    elif protocol_of(where) in ("http", "https"):
        parts = urlsplit(where)
        directory, _, name = parts.path.rpartition("/")
        root, name = urlunsplit((parts.scheme, parts.netloc, directory, parts.query, "")), unquote(name)
    else:
        root, _, name = where.rpartition("/")
    return b"".join(Store(root, retries=retries, timeout=timeout).fetch(name))


def list_objects(pattern: str, *, timeout: float = TIMEOUT) -> list[str]:
    """The URLs that match a glob of an object store, sorted.

    Raises:
        StoreError: It cannot be listed.
        UserError: A URL that nothing installed can read.
    """
    check_driver(pattern)
    protocol = protocol_of(pattern)
    try:
        return [f"{protocol}://{path}" for path in ObjectReader(f"{protocol}://", timeout).find(pattern)]
    except Failed as error:
        raise StoreError(str(error)) from error
