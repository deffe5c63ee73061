"""Blocks of remote shards kept on the node's disk, shared by all its processes."""

import errno
import fcntl
import hashlib
import os
import re
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlm_dist.errors import UserError
from mlm_dist.storage.readers import warn_once

PROBE_BYTES = 1 << 20
# A shard of which no block was read for so long may make room for others.
OLD_SECONDS = 3600.0
# How often a full cache is counted again, and how old the mark of a file's last use may get.
RECOUNT_SECONDS = 60.0
LOCK_SECONDS = 1.0
_PAGE = 4096
_USAGE = "usage"
_FILE = re.compile(r"[0-9a-f]{40}\.blocks")


def place_of(directory: str | Path) -> Path:
    """The directory that ``data.cache_dir`` means on this node: ``~`` and ``$NAME`` expanded, absolute. Raises UserError for a variable that is not set."""
    place = Path(os.path.expandvars(directory)).expanduser().absolute()
    if "$" in str(place):
        raise UserError(f"data.cache_dir: {str(directory)!r} names a variable that is not set here.")
    return place


class Cache:
    """A size-bounded cache of blocks in a directory of the node.

    Each shard has one sparse file, named by a hash of where the shard lies, with its blocks at their own offsets. What a
    read finds is believed only if it has the block's checksum; a hole, a half-written block, another block of that place or
    a damaged disk is a miss, and the block is fetched and written again. So two processes that write the same block harm
    nothing, and a crash at any moment leaves nothing that could be taken for data.

    The size is kept by all processes together in the file ``usage``, under a lock that is held while a block is written; a
    process that opens the cache, and one that finds it full, counts again what the files take on the disk. When the cache
    is full, shards that were not read for an hour are removed, the oldest first. If there are none, a new block is not
    added: every epoch reads each block once, in a new order, so throwing out the least recently used blocks would throw
    out those that come next, while a full cache that stays as it is serves its share of every epoch.

    A disk that becomes full or read-only turns writing off for the process, with one warning; reading goes on.

    Args:
        directory: Made if it is missing. Each user needs one of their own. ``~`` and ``$NAME`` are expanded here, on the node.
        size: Most bytes that the blocks take on the disk.

    Raises:
        UserError: A size or variable that makes no sense, or the directory cannot be written or locked, or its disk is full (unless by blocks of this cache).
    """

    def __init__(self, directory: str | Path, size: int) -> None:
        self.size = size
        self._counted_by = self._off_in = 0
        if size < 1:
            raise UserError(f"data.cache_size: {size} must be a positive number of bytes.")
        self.directory = place_of(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
            with tempfile.TemporaryFile(dir=self.directory) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full and self.directory.is_dir() and any(self._files()):
                return  # filled by an earlier attempt: what is there can still be read
            raise UserError(
                f"data.cache_dir: {str(self.directory)!r} cannot be written ({error.strerror}); give a directory of your own on a "
                "disk of the node that has room, or null for no cache."
            ) from error

    def get(self, shard: str, offset: int, length: int, crc32: int) -> bytes | None:
        """The block [offset, offset + length) of a shard if it is here, whole and right."""
        try:
            fd = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            parts = []
            while length > 0 and (part := os.pread(fd, length, offset)):
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
            data = b"".join(parts)
            if length or zlib.crc32(data) != crc32:
                return None
            if time.time() - os.fstat(fd).st_mtime > RECOUNT_SECONDS:
                with suppress(OSError):  # a read-only disk, another user's file: it is right all the same
                    os.utime(fd)
            return data
        except OSError:
            return None
        finally:
            os.close(fd)

    def put(self, shard: str, offset: int, data: bytes) -> None:
        """Keep a block, if there is room for it."""
        if self._off_in == os.getpid():
            return
        try:
            with self._locked() as usage:
                if usage is not None and self._reserve(usage, _pages(offset, len(data))):
                    self._write(self._path(shard), offset, data)
        except OSError as error:
            self._off_in = os.getpid()
            warn_once(
                f"cache {self.directory}",
                f"data.cache_dir {str(self.directory)!r} cannot be written ({error.strerror}): no more blocks are added to it by "
                "this process; reading goes on",
            )

    def _path(self, shard: str) -> Path:
        return self.directory / f"{hashlib.sha256(shard.encode()).hexdigest()[:40]}.blocks"

    def _files(self) -> Iterator[tuple[os.stat_result, str]]:
        """The files of the cache; nothing else in its directory is counted or removed."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if _FILE.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        yield entry.stat(follow_symlinks=False), entry.path

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """Hold the lock of the cache. Gives the descriptor of ``usage``, or None if others held the lock for too long."""
        # Opened each time: the lock belongs to the open file, which neither threads nor forked processes may share.
        fd = os.open(self.directory / _USAGE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            give_up = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up:
                        yield None
                        return
                    time.sleep(0.001)
            yield fd
        finally:
            os.close(fd)

    def _reserve(self, usage: int, need: int) -> bool:
        """Take ``need`` bytes of the cache's size, under its lock; if they are not there, make room or say no."""
        if need > self.size:
            return False
        used, counted = _parse(os.pread(usage, 64, 0))
        now = time.time()
        if counted is None or self._counted_by != os.getpid():
            used, counted = self._count(), now
            self._counted_by = os.getpid()
        if used + need > self.size and not 0 <= now - counted < RECOUNT_SECONDS:
            used, counted = self._count(), now
        if used + need > self.size and counted == now:
            used = self._make_room(used, need, now)
        fits = used + need <= self.size
        if fits or counted == now:
            os.pwrite(usage, b"%20d %30.6f\n" % (used + need * fits, counted), 0)
        return fits

    def _count(self) -> int:
        return sum(status.st_blocks * 512 for status, _ in self._files())

    def _make_room(self, used: int, need: int, now: float) -> int:
        """Remove shards that were not read for long, until a tenth of the size is free. Returns what is used then."""
        for status, path in sorted(self._files(), key=lambda file: file[0].st_mtime):
            if now - status.st_mtime < OLD_SECONDS or used + need <= self.size - self.size // 10:
                break
            Path(path).unlink(missing_ok=True)
            used -= status.st_blocks * 512
        return used

    @staticmethod
    def _write(path: Path, offset: int, data: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            view = memoryview(data)
            while view:
                count = os.pwrite(fd, view, offset)
                view, offset = view[count:], offset + count
        finally:
            os.close(fd)


def _pages(offset: int, length: int) -> int:
    """Most bytes of disk that a block can take, in whole pages."""
    return -(-(offset + length) // _PAGE) * _PAGE - offset // _PAGE * _PAGE


def _parse(text: bytes) -> tuple[int, float | None]:
    """(bytes used, when that was counted) of ``usage``; (0, None) if it says nothing that makes sense."""
    found = re.fullmatch(rb"\s*(\d+)\s+(\d+\.\d+)\n", text)
    return (int(found[1]), float(found[2])) if found else (0, None)
