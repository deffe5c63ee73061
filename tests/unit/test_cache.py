"""The cache's contract: what it gives has the right checksum, it never takes more than its size, and it never stops a read."""

import errno
import fcntl
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.errors import UserError
from mlm_dist.storage import cache as module
from mlm_dist.storage import readers
from mlm_dist.storage.cache import Cache
from mlm_dist.storage.store import Store
from tests.http_server import Server

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
BLOCK = 50_000


def content(shard: str, offset: int, length: int = BLOCK) -> bytes:
    """The bytes that a shard has there."""
    return random.Random(f"{shard} {offset}").randbytes(length)


def put(cache: Cache, shard: str, offset: int) -> None:
    cache.put(shard, offset, content(shard, offset))


def get(cache: Cache, shard: str, offset: int) -> bytes | None:
    data = content(shard, offset)
    found = cache.get(shard, offset, len(data), zlib.crc32(data))
    assert found is None or found == data
    return found


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.glob("*.blocks"))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    readers._warned.clear()
    with caplog.at_level(logging.WARNING, "mlm_dist"):
        found: list[str] = []
        yield found
        found += [record.getMessage() for record in caplog.records]


def test_gives_back_what_was_put(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new/cache", MIB)
    blocks = [("s3://b/a.tar", 0), ("s3://b/a.tar", 3 * BLOCK), ("s3://c/a.tar", 0), ("pipe:cat x", 0)]
    for block in blocks:
        assert get(cache, *block) is None
        put(cache, *block)
    for again in (cache, Cache(tmp_path / "new/cache", MIB)):
        for block in blocks:
            assert get(again, *block) is not None
        # A hole, what lies behind the end, and a block cut otherwise.
        assert get(again, "s3://b/a.tar", BLOCK) is None
        assert get(again, "s3://b/a.tar", 9 * BLOCK) is None
        assert again.get("s3://b/a.tar", 0, BLOCK - 1, zlib.crc32(content("s3://b/a.tar", 0))) is None


def test_block_of_zeros(tmp_path: Path) -> None:
    """A hole reads as zeros: for a block of zeros that is right."""
    cache = Cache(tmp_path, MIB)
    put(cache, "a", 10 * BLOCK)
    zeros = bytes(BLOCK)
    assert cache.get("a", 0, BLOCK, zlib.crc32(zeros)) == zeros


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "garbage", "directory"])
def test_damaged_file_is_fetched_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / "data").mkdir()
    data = content("a", 0, 3 * BLOCK)
    (tmp_path / "data/a.tar").write_bytes(data)
    with Server(tmp_path / "data") as server:
        store = Store(server.url, cache=Cache(tmp_path / "cache", MIB))

        def read_all() -> int:
            before = len(server.requests)
            for offset in (0, BLOCK, 2 * BLOCK):
                wanted = data[offset : offset + BLOCK]
                assert store.read("a.tar", offset, BLOCK, zlib.crc32(wanted)) == wanted
            return len(server.requests) - before

        assert (read_all(), read_all()) == (3, 0)
        (file,) = (tmp_path / "cache").glob("*.blocks")
        if damage == "flip":
            with file.open("r+b") as handle:
                handle.seek(BLOCK + 77)
                handle.write(b"\x00\x01\x02")
        elif damage == "truncate":
            os.truncate(file, BLOCK + 77)
        elif damage == "directory":
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(b"" if damage == "empty" else content("garbage", 0, 3 * BLOCK))
        lost = {"flip": 1, "truncate": 2, "empty": 3, "garbage": 3, "directory": 3}[damage]
        assert read_all() == lost
        assert read_all() == (3 if damage == "directory" else 0)


def test_garbled_usage_is_counted_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10 * BLOCK)
    for i in range(4):
        put(cache, "a", i * BLOCK)
    for text in (b"", b"garbage\n", b"-5 3.0\n", b"\xff" * 100):
        (tmp_path / "usage").write_bytes(text)
        put(cache, "a", 4 * BLOCK)
        assert abs(int((tmp_path / "usage").read_bytes()[:64].split()[0]) - on_disk(tmp_path)) <= 2 * BLOCK
        assert get(cache, "a", 4 * BLOCK) is not None


# Full


def test_full_cache_adds_nothing_and_throws_out_nothing(tmp_path: Path) -> None:
    size = 10 * BLOCK
    cache = Cache(tmp_path, size)
    for i in range(30):
        put(cache, f"shard {i % 3}", i * 2 * BLOCK)
        assert on_disk(tmp_path) <= size
    kept = [i for i in range(30) if get(cache, f"shard {i % 3}", i * 2 * BLOCK) is not None]
    assert kept == list(range(len(kept))) and len(kept) >= 8
    # Where a block is that was kept already, writing it again and again takes no more.
    for _ in range(100):
        put(cache, "shard 0", 0)
    assert [i for i in range(30) if get(cache, f"shard {i % 3}", i * 2 * BLOCK) is not None] == kept


def test_shards_not_used_for_an_hour_make_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10 * BLOCK)
    (tmp_path / "mine.txt").write_bytes(bytes(5 * BLOCK))
    for i in range(8):
        put(cache, f"shard {i}", 0)
    now = time.time()
    for i in range(8):  # 0 is the oldest; 4 and later were used within the hour
        os.utime(cache._path(f"shard {i}"), (0, now - 7200 + i * 1000))
    os.utime(tmp_path / "mine.txt", (0, 0))
    assert get(cache, "shard 1", 0) is not None  # used: young again
    for i in range(8, 10):
        put(cache, f"shard {i}", 0)
        (tmp_path / "usage").write_bytes(b"%d %f\n" % (on_disk(tmp_path), now - 3600))  # counted long ago
        assert on_disk(tmp_path) <= 10 * BLOCK
    kept = [i for i in range(10) if get(cache, f"shard {i}", 0) is not None]
    assert 0 not in kept and {1, 4, 5, 6, 7, 8, 9} <= set(kept)
    assert (tmp_path / "mine.txt").exists()


def test_block_larger_than_the_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 2 * BLOCK)
    put(cache, "a", 0)
    os.utime(cache._path("a"), (0, 0))
    cache.put("b", 0, bytes(3 * BLOCK))
    assert get(cache, "a", 0) is not None and on_disk(tmp_path) <= 2 * BLOCK


def test_files_removed_by_hand_give_their_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 4 * BLOCK)
    for i in range(6):
        put(cache, f"{i}", 0)
    for path in tmp_path.glob("*.blocks"):
        path.unlink()
    monkeypatch.setattr(module, "RECOUNT_SECONDS", 0.0)
    put(cache, "9", 0)
    assert get(cache, "9", 0) is not None


# Disks that fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_failed_write_turns_writing_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], caplog: pytest.LogCaptureFixture, code: int
) -> None:
    cache = Cache(tmp_path, MIB)
    put(cache, "a", 0)
    real, calls = os.pwrite, []

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if len(data) < 100:  # usage
            return real(fd, data, offset)
        calls.append(offset)
        real(fd, data[:1000], offset)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", pwrite)
    for i in range(1, 4):
        put(cache, "a", i * BLOCK)
    assert len(calls) == 1
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "data.cache_dir" in messages[0] and os.strerror(code) in messages[0]
    assert get(cache, "a", 0) is not None and get(cache, "a", BLOCK) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", path], capture_output=True)
    if mount.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_disk_that_becomes_full(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "PROBE_BYTES", 100_000)
    readers._warned.clear()
    data = content("a", 0, 30 * BLOCK)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.tar").write_bytes(data)
    with Server(tmp_path / "data") as server:
        store = Store(server.url, cache=Cache(small_disk, MIB))
        for _ in range(2):
            for offset in range(0, len(data), BLOCK):
                wanted = data[offset : offset + BLOCK]
                assert store.read("a.tar", offset, BLOCK, zlib.crc32(wanted)) == wanted
        assert 30 < len(server.requests) < 60
    assert ["No space left" in record.getMessage() for record in caplog.records if "mlm_dist" in record.name] == [True]
    # The next attempt finds a disk that is full of good blocks, and uses them.
    again = Cache(small_disk, MIB)
    assert again.get(f"{server.url}/a.tar", 0, BLOCK, zlib.crc32(data[:BLOCK])) == data[:BLOCK]


def test_full_disk_at_the_start(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "other").write_bytes(bytes(MIB))
    with pytest.raises(UserError, match=r"data\.cache_dir: .*No space left"):
        Cache(small_disk / "cache", MIB)


def test_directory_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/cache", Path("/proc/cache")):
        with pytest.raises(UserError, match=r"data\.cache_dir: .*cannot be written"):
            Cache(path, MIB)
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*NO_SUCH_VARIABLE"):
        Cache("$NO_SUCH_VARIABLE/cache", MIB)
    with pytest.raises(UserError, match=r"data\.cache_size: 0"):
        Cache(tmp_path, 0)
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    assert Cache("$NODE_DISK/cache", MIB).directory == tmp_path / "disk/cache"


def test_directory_that_goes_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    readers._warned.clear()
    cache = Cache(tmp_path / "cache", MIB)
    put(cache, "a", 0)
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    (tmp_path / "cache").rmdir()
    for _ in range(3):
        put(cache, "a", 0)
        assert get(cache, "a", 0) is None
    assert sum("data.cache_dir" in record.getMessage() for record in caplog.records) == 1


def test_lock_that_somebody_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped while it wrote must not stop the others: they go on without adding."""
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.05)
    cache = Cache(tmp_path, MIB)
    put(cache, "a", 0)
    with (tmp_path / "usage").open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        put(cache, "a", BLOCK)
        assert get(cache, "a", 0) is not None and get(cache, "a", BLOCK) is None
    put(cache, "a", BLOCK)
    assert get(cache, "a", BLOCK) is not None


# Many processes


def _fill(directory: str, size: int, seed: int, results: Any) -> None:
    try:
        cache = Cache(directory, size)
        blocks = [(f"shard {i % 4}", i * BLOCK) for i in range(60)]
        random.Random(seed).shuffle(blocks)
        hits = peak = 0
        for block in blocks * 2:
            if get(cache, *block) is None:
                put(cache, *block)
            else:
                hits += 1
            peak = max(peak, on_disk(Path(directory)))
        results.put((hits, peak))
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("size", [60 * 57_344, 20 * BLOCK])
def test_processes_at_once(tmp_path: Path, size: int) -> None:
    """Processes that read and write the same shards at the same time: nothing wrong is given, and the size is kept at every moment."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_fill, args=(str(tmp_path), size, seed, results)) for seed in range(4)]
    for child in children:
        child.start()
    found = [results.get(timeout=40) for _ in children]
    for child in children:
        child.join(20)
    assert all(isinstance(result, tuple) for result in found), found
    assert all(hits > 10 and peak <= size for hits, peak in found), found
    cache = Cache(tmp_path, size)
    kept = sum(get(cache, f"shard {i % 4}", i * BLOCK) is not None for i in range(60))
    assert kept >= (50 if size > 20 * BLOCK else 10)


def test_killed_while_writing(tmp_path: Path) -> None:
    """Whenever a writer dies, what is left is read as whole or not at all, the lock is free and the size is kept."""
    code = (
        "import sys, random\n"
        "from tests.unit.test_cache import Cache, put\n"
        "cache = Cache(sys.argv[1], 1 << 30)\n"
        "print('go', flush=True)\n"
        "while True:\n"
        "    put(cache, f'shard {random.randrange(3)}', random.randrange(40) * 50_000)\n"
    )
    repository = Path(__file__).parents[2]
    for turn in range(4):
        writers = [
            subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, cwd=repository)
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"go\n"
        time.sleep(0.01 * turn)  # another moment each time
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait(20)
        cache = Cache(tmp_path, 1 << 30)
        for shard in range(3):
            for i in range(40):
                get(cache, f"shard {shard}", i * BLOCK)  # checks that a hit is right
        put(cache, "after", 0)
        assert get(cache, "after", 0) is not None
    assert on_disk(tmp_path) > 0


def test_half_written_block_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies inside of a write: simulated at every stage of one, for the kernel's own writes are too quick to hit."""
    real = os.pwrite
    for written in (0, 1, 4096, BLOCK - 1):
        directory = tmp_path / str(written)
        cache = Cache(directory, MIB)
        child = os.fork()
        if not child:

            def pwrite(fd: int, data: Any, offset: int, written: int = written) -> int:
                if len(data) < 100:
                    return real(fd, data, offset)
                real(fd, data[:written], offset)
                os.kill(os.getpid(), signal.SIGKILL)
                return 0

            os.pwrite = pwrite
            put(cache, "a", 0)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert get(cache, "a", 0) is None
        put(cache, "a", 0)
        assert get(cache, "a", 0) is not None
        # What the dead one had reserved is given back when the next process counts; a block written twice counts twice till then.
        assert module._parse((directory / "usage").read_bytes())[0] <= written + 2 * 4096 + 53_248
