"""The store's contract: the right bytes or one line that says why not, from files, HTTP and commands, whatever goes wrong on the way."""

import contextlib
import importlib
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mlm_dist.errors import UserError
from mlm_dist.storage import ahead, objects, pipes, readers
from mlm_dist.storage.cache import Cache
from mlm_dist.storage.store import OUTAGE, UNKNOWN_SIZE, Store, StoreError, list_objects, read_object
from tests.http_server import Server

pytestmark = pytest.mark.timeout(60)

DATA = bytes(range(256)) * 1200  # 300 KiB, so that a body comes in several parts
BLOCK = (1000, 70_000)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "data/sub").mkdir(parents=True)
    for name in ("a.tar", "b.tar", "sub/c d#?ü%.tar"):
        (tmp_path / "data" / name).write_bytes(DATA)
    (tmp_path / "data/empty.tar").write_bytes(b"")
    return tmp_path / "data"


@pytest.fixture
def server(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    readers._warned.clear()
    with Server(directory) as running:
        yield running


def open_store(root: Any, **options: Any) -> Store:
    return Store(root.url if isinstance(root, Server) else root, **{"wait": 0.001, "timeout": 20.0, **options})


def read(store: Store, path: str = "a.tar", offset: int = BLOCK[0], length: int = BLOCK[1]) -> bytes:
    return store.read(path, offset, length, zlib.crc32(DATA[offset : offset + length]))


WANTED = DATA[BLOCK[0] : sum(BLOCK)]


# Local files


def test_local_reads_what_lies_there(directory: Path) -> None:
    store = open_store(directory)
    assert not store.remote and store.root == directory
    assert read(store) == WANTED
    assert read(store, "sub/c d#?ü%.tar", 0, len(DATA)) == DATA
    assert store.sizes(["a.tar", "gone.tar", "empty.tar"]) == [
        len(DATA),
        "cannot be read: No such file or directory",
        0,
    ]
    assert b"".join(store.fetch("a.tar")) == DATA
    assert list(store.fetch("empty.tar")) == []
    assert read_object(str(directory / "a.tar")) == read_object(f"file://{directory}/a.tar") == DATA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file or directory"),
        (lambda path: path.write_bytes(DATA[:50_000]), "the shard ends 21000 bytes too early"),
        (lambda path: path.write_bytes(DATA[::-1]), "the block's bytes differ from the manifest's checksum"),
    ],
)
def test_local_fault_is_one_line(directory: Path, change: Callable[[Path], object], message: str) -> None:
    change(directory / "a.tar")
    with pytest.raises(StoreError) as error:
        read(open_store(directory))
    assert str(error.value) == message


def test_local_file_is_opened_anew_once(directory: Path) -> None:
    """A handle to a file that was replaced, as a stale one of a network file system, gives other bytes; a new one the right ones."""
    (directory / "a.tar").write_bytes(DATA[::-1])
    store = open_store(directory)
    with pytest.raises(StoreError, match="checksum"):
        read(store)
    store.read("a.tar", 0, 10, zlib.crc32(DATA[::-1][:10]))  # the handle is open
    os.replace(directory / "b.tar", directory / "a.tar")
    assert read(store) == WANTED


def test_few_local_files_stay_open(directory: Path) -> None:
    for i in range(40):
        (directory / f"{i}.tar").write_bytes(DATA)
    store = open_store(directory)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for i in range(40):
            assert read(store, f"{i}.tar") == WANTED
    assert len(os.listdir("/proc/self/fd")) - before <= readers.MAX_OPEN_FILES
    threads = [threading.Thread(target=lambda: [read(store, f"{i}.tar") for i in range(40)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir("/proc/self/fd")) - before <= readers.MAX_OPEN_FILES + len(threads)


def test_object_that_changes_while_it_is_read(directory: Path) -> None:
    (directory / "a.tar").write_bytes(DATA * 8)
    with pytest.raises(StoreError, match="changed while it was read"):
        for _ in open_store(directory).fetch("a.tar"):
            os.utime(directory / "a.tar", ns=(1, 1))


# HTTP


def test_http_reads_ranges(server: Server) -> None:
    store = open_store(server)
    assert store.remote
    assert read(store) == WANTED
    assert server.requests == [("GET", "a.tar", "bytes=1000-70999")]
    assert server.bytes_sent == BLOCK[1]
    assert read(store, "sub/c d#?ü%.tar", len(DATA) - 10, 10) == DATA[-10:]
    assert read(store, "a.tar", 0, len(DATA)) == DATA
    assert server.connections == 1


def test_http_whole_objects(server: Server) -> None:
    (server.directory / "big.tar").write_bytes(DATA * 20)
    store = open_store(server)
    pieces = list(store.fetch("big.tar"))
    assert b"".join(pieces) == DATA * 20
    assert max(map(len, pieces)) < 3 * readers.PIECE and len(pieces) > 3
    assert list(store.fetch("empty.tar")) == []
    assert read_object(f"{server.url}/sub/c%20d%23%3F%C3%BC%25.tar") == DATA
    assert store.sizes(["a.tar", "gone.tar", "empty.tar", "big.tar"]) == [
        len(DATA),
        "cannot be read: HTTP 404 Not Found",
        0,
        20 * len(DATA),
    ]
    assert store.has_ranges("a.tar")


def test_headers_of_the_user(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"client_kwargs": {"headers": {"Authorization": "Bearer token"}}}
    monkeypatch.setitem(importlib.import_module("fsspec.config").conf, "http", options)
    assert read(open_store(server)) == WANTED
    assert server.headers["Authorization"] == "Bearer token"
    assert (server.headers["Range"], server.headers["Accept-Encoding"]) == ("bytes=1000-70999", "identity")
    assert options == {"client_kwargs": {"headers": {"Authorization": "Bearer token"}}}


def test_query_of_the_root_goes_along(server: Server) -> None:
    seen: list[str] = []
    server.note = lambda request, headers: seen.append(request[1])
    store = Store(f"{server.url}/sub/?sig=a%2Fb")
    from mlm_dist.storage.http import HttpReader

    assert HttpReader(store.root, 1.0).url("c d.tar") == f"{server.url}/sub/c%20d.tar?sig=a%2Fb"
    assert store.sizes(["c d#?ü%.tar"]) == [len(DATA)]
    assert read_object(f"{server.url}/a.tar?sig=secret") == DATA
    with pytest.raises(StoreError) as error:
        read_object(f"{server.url}/gone?sig=secret")
    assert "secret" not in str(error.value)


FAULTS = {
    "503": ("status", {}, "cannot be read: HTTP 503 Service Unavailable"),
    "429": ("status", {"status": 429, "headers": {"Retry-After": "1"}}, "cannot be read: HTTP 429 Too Many Requests"),
    "408": ("status", {"status": 408}, "cannot be read: HTTP 408 Request Timeout"),
    "reset": ("reset", {}, "cannot be read: the connection broke after "),
    "reset at once": ("reset", {"after": 0}, "cannot be read: "),
    "short body": ("short", {}, "cannot be read: the connection broke after "),
    "long body": ("long", {}, "cannot be read: asked for bytes 1000 to 70999, the server sent 1000 to 71009"),
    "other range": ("other_range", {}, "cannot be read: asked for bytes 1000 to 70999, the server sent 1001 to 71000"),
    "wrong bytes": ("wrong", {}, "the block's bytes differ from the manifest's checksum"),
    "trickle": ("trickle", {}, "cannot be read: only "),
    "hang": ("hang", {}, "cannot be read: no answer in 1 s"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_http_fault_within_and_past_the_retries(server: Server, name: str) -> None:
    kind, options, message = FAULTS[name]
    slow = kind in ("trickle", "hang")
    retries = 1 if slow else 3
    store = open_store(server, retries=retries, timeout=1.0 if slow else 20.0)
    server.fail("a.tar", kind, retries, **options)
    assert read(store) == WANTED
    assert server.count("a.tar") == retries + 1

    server.fail("b.tar", kind, **options)
    with pytest.raises(StoreError) as error:
        read(store, "b.tar")
    assert str(error.value).startswith(message) and str(error.value).endswith(f" ({retries + 1} tries)")
    assert "\n" not in str(error.value)
    assert server.count("b.tar") == retries + 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_http_status_that_stays_is_not_retried(server: Server, status: int) -> None:
    server.fail("a.tar", "status", status=status)
    with pytest.raises(StoreError, match=f"^cannot be read: HTTP {status} [^()]*$"):
        read(open_store(server))
    assert server.count("a.tar") == 1


def test_http_shard_that_became_shorter(server: Server) -> None:
    (server.directory / "a.tar").write_bytes(DATA[:50_000])
    (server.directory / "b.tar").write_bytes(DATA[:500])
    store = open_store(server, retries=1)
    for path, missing in (("a.tar", 21_000), ("b.tar", 70_000)):
        with pytest.raises(StoreError, match=f"^the shard ends {missing} bytes too early"):
            read(store, path)


def test_nobody_listens(server: Server) -> None:
    url = server.url
    with Server(server.directory) as other:
        url = other.url
    store = open_store(url, retries=2)
    with pytest.raises(StoreError, match=r"^cannot be read: .*connect.* \(3 tries\)$"):
        read(store)


def test_proxy_of_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "direct.invalid")
    assert read(open_store("http://corpus.invalid")) == WANTED
    with pytest.raises(StoreError, match=r"^cannot be read: .*direct\.invalid"):
        read(open_store("http://direct.invalid", retries=0))
    assert server.count("a.tar") == 1


@pytest.mark.parametrize("kind", ["no_ranges", "no_length"])
def test_server_without_ranges(server: Server, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    big = DATA * 100
    (server.directory / "big.tar").write_bytes(big)
    server.fail("big.tar", kind)
    store = open_store(server)
    with caplog.at_level(logging.WARNING, "mlm_dist"):
        for _ in range(2):
            assert store.read("big.tar", 5000, 100_000, zlib.crc32(big[5000:105_000])) == big[5000:105_000]
    warnings = [r.getMessage() for r in caplog.records if "ignores ranges" in r.getMessage()]
    assert len(warnings) == 1 and "data.cache_dir" in warnings[0]
    if kind == "no_ranges":
        # Reading stopped behind the slice; what was on its way in the sockets may have been sent.
        assert server.bytes_sent < len(big)
        assert b"".join(store.fetch("big.tar")) == big
        assert not store.has_ranges("big.tar")
    else:
        assert store.sizes(["big.tar"]) == ["cannot be read: the server does not tell its size"]


@pytest.mark.parametrize("kind", ["reset", "short", "status", "hang"])
def test_fetch_goes_on_where_it_broke(server: Server, kind: Any) -> None:
    big = DATA * 20
    (server.directory / "big.tar").write_bytes(big)
    store = open_store(server, timeout=1.0 if kind == "hang" else 20.0)
    pieces = store.fetch("big.tar")
    first = next(pieces)
    server.fail("big.tar", kind, 2)
    store2 = open_store(server, timeout=store.timeout)
    assert b"".join(store2.fetch("big.tar")) == big  # the first requests of this one fail
    assert first + b"".join(pieces) == big
    if kind == "short":  # a reset may throw away what was sent
        begins = [int(asked.split("=")[1].split("-")[0]) for _, _, asked in server.requests if asked]
        assert max(begins) > 0


def test_fetch_breaks_again_and_again(server: Server) -> None:
    """More breaks than there are retries, each behind some progress: the whole object all the same."""
    big = DATA * 20
    (server.directory / "big.tar").write_bytes(big)
    server.fail("big.tar", "status", 1, status=500)
    server.fail("big.tar", "short", 12, after=400_000)
    assert b"".join(open_store(server, retries=2).fetch("big.tar")) == big
    server.fail("big.tar", "reset", after=0)
    with pytest.raises(StoreError, match=r"\(3 tries\)"):
        list(open_store(server, retries=2).fetch("big.tar"))


def test_backoff_doubles_up_to_its_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    server.fail("a.tar", "status", status=500)
    with pytest.raises(StoreError):
        read(Store(server.url, retries=7))
    for delay, most in zip(slept, [0.5, 1, 2, 4, 8, 8, 8], strict=True):
        assert 0.75 * most <= delay <= most
    server.fail("b.tar", "status", headers={"Retry-After": "20"})
    slept.clear()
    with pytest.raises(StoreError):
        read(Store(server.url, retries=1), "b.tar")
    assert slept == [20.0]


def test_sizes_at_once_and_without_a_storm(server: Server) -> None:
    for i in range(200):
        (server.directory / f"{i}.tar").write_bytes(bytes(i))
    names = [f"{i}.tar" for i in range(200)]
    store = open_store(server, retries=2)
    assert store.sizes(names) == list(range(200))
    assert server.connections <= 20
    for name in names[:3]:
        server.fail(name, "status", 2)
    assert store.sizes(names) == list(range(200))
    assert store.sizes([]) == []

    server.fail("*", "status")
    server.requests.clear()
    found = store.sizes(names)
    assert all(isinstance(cause, str) and "HTTP 503" in cause and "\n" not in cause for cause in found)
    assert len(server.requests) <= 3 * (2 * OUTAGE)
    assert sum("not asked for" in str(cause) for cause in found) >= 200 - 2 * OUTAGE


def test_missing_files_are_no_outage(server: Server, directory: Path) -> None:
    names = [f"none{i}.tar" for i in range(100)]
    assert open_store(server).sizes(names) == ["cannot be read: HTTP 404 Not Found"] * 100
    assert open_store(directory).sizes(names) == ["cannot be read: No such file or directory"] * 100


# Read-ahead


def test_ahead_fetches_once(server: Server) -> None:
    store = open_store(server)
    crc = zlib.crc32(WANTED)
    for _ in range(3):
        store.ahead("a.tar", *BLOCK, crc)
    assert store.read("a.tar", *BLOCK, crc) == WANTED
    assert server.count("a.tar") == 1
    assert store.read("a.tar", *BLOCK, crc) == WANTED
    assert server.count("a.tar") == 2


def test_ahead_that_fails_changes_nothing(server: Server) -> None:
    store = open_store(server, retries=0)
    server.fail("a.tar", "status", 1)
    store.ahead("a.tar", *BLOCK, zlib.crc32(WANTED))
    assert read(store) == WANTED
    store.ahead("gone.tar", *BLOCK, zlib.crc32(WANTED))
    with pytest.raises(StoreError, match="404"):
        read(store, "gone.tar")


def test_ahead_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_BLOCKS", 10)
    monkeypatch.setattr(ahead, "MAX_AGE", 40)
    store = open_store(server)
    blocks = [
        (path, i * 100, 100, zlib.crc32(DATA[i * 100 : i * 100 + 100]))
        for path in ("a.tar", "b.tar")
        for i in range(50)
    ]
    for block in blocks:
        store.ahead(*block)
    for block in blocks:
        assert store.read(*block) == DATA[block[1] : block[1] + 100]
    assert len(server.requests) == 100
    # Blocks that nobody ever takes make room after a while.
    for block in blocks[:10]:
        store.ahead(*block)
    for block in blocks[10:]:
        store.read(*block)
    server.requests.clear()
    for block in blocks[10:20]:
        store.ahead(*block)
    for block in blocks[10:20]:
        store.read(*block)
    assert len(server.requests) == 10
    here = store._here().ahead
    assert len(here._ordered) == here._bytes == 0

    monkeypatch.setattr(ahead, "MAX_BYTES", 150)
    store.ahead(*blocks[0])
    store.ahead(*blocks[1])
    assert list(here._ordered) == [blocks[0]]


def test_ahead_ends_with_the_process(server: Server) -> None:
    """A fetch that hangs does not keep the interpreter."""
    server.fail("a.tar", "hang")
    code = (
        "import sys; from mlm_dist.storage.store import Store\n"
        "store = Store(sys.argv[1], timeout=3600)\n"
        "for i in range(20): store.ahead('a.tar', i * 10, 10, 0)\n"
        "print('done')"
    )
    ended = subprocess.run([sys.executable, "-c", code, server.url], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_reading_leaves_nothing_behind(server: Server) -> None:
    """A process that read, and a worker forked from it, end at once and in silence."""
    code = (
        "import multiprocessing, sys; from mlm_dist.storage.store import Store\n"
        "store = Store(sys.argv[1], timeout=3600)\n"
        "def read():\n"
        "    store.ahead('a.tar', 0, 9, 0); pieces = store.fetch('b.tar'); next(pieces)\n"
        "    print(store.sizes(['a.tar']), flush=True)\n"
        "read()\n"
        "worker = multiprocessing.get_context('fork').Process(target=read); worker.start(); worker.join()\n"
        "read()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, server.url], capture_output=True, text=True, timeout=40
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"[{len(DATA)}]\n" * 3, "")


def test_idle_threads_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "IDLE_SECONDS", 0.01)
    store = open_store(server)
    others = threading.enumerate()
    for _ in range(3):
        store.ahead("a.tar", *BLOCK, zlib.crc32(WANTED))
        assert read(store) == WANTED
        threads = [thread for thread in threading.enumerate() if thread.name == "read-ahead" and thread not in others]
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert store._here().ahead._threads == 0


# Processes


def _child(store: Store, results: Any) -> None:
    try:
        store.ahead("b.tar", *BLOCK, zlib.crc32(WANTED))
        results.put([read(store), read(store, "b.tar"), store.sizes(["a.tar"]), b"".join(store.fetch("a.tar"))])
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize(
    ("kind", "method"), [("http", "fork"), ("local", "fork"), ("memory", "fork"), ("http", "spawn"), ("local", "spawn")]
)
def test_store_in_other_processes(server: Server, directory: Path, kind: str, method: str) -> None:
    """The parent reads, has fetches under way, forks; child and parent read on. Spawned: the store is pickled."""
    memory = fsspec.filesystem("memory")
    for name in ("a.tar", "b.tar"):
        memory.pipe_file(f"/forked/{name}", DATA)
    store = open_store({"http": server, "local": directory, "memory": "memory://forked"}[kind])
    assert read(store) == WANTED
    context = multiprocessing.get_context(method)
    for _ in range(2 if method == "fork" else 1):
        store.ahead("b.tar", *BLOCK, zlib.crc32(WANTED))
        results = context.Queue()
        child = context.Process(target=_child, args=(store, results))
        child.start()
        assert results.get(timeout=40) == [WANTED, WANTED, [len(DATA)], DATA]
        child.join(20)
        assert child.exitcode == 0
        assert read(store, "b.tar") == WANTED
    memory.rm("/forked", recursive=True)


def test_pickled_with_open_files_and_cache(directory: Path, server: Server, tmp_path: Path) -> None:
    store = open_store(server, cache=Cache(tmp_path / "cache", 1 << 24), retries=1)
    assert read(store) == WANTED
    again = pickle.loads(pickle.dumps(store))
    assert read(again) == WANTED
    assert server.count("a.tar") == 1
    assert (again.root, again.retries, again.wait) == (store.root, 1, 0.001)


# Other file systems


def test_file_system_that_is_not_asynchronous() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/store/sub/a.tar", DATA)
    try:
        store = open_store("memory://store/sub", retries=1)
        assert read(store) == WANTED
        assert store.sizes(["a.tar", "gone.tar"]) == [len(DATA), "cannot be read: No such file or directory"]
        assert b"".join(store.fetch("a.tar")) == DATA
        assert list_objects("memory://store/**/*.tar") == ["memory:///store/sub/a.tar"]
        with pytest.raises(StoreError, match=r"^the shard ends 1 bytes too early \(2 tries\)$"):
            store.read("a.tar", len(DATA) - 9, 10, 0)
    finally:
        memory.rm("/store", recursive=True)


class _Stuck(fsspec.AbstractFileSystem):
    protocol = "stuck"
    release = threading.Event()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.release.wait()
        return b""


def test_file_system_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "MAX_HUNG", 3)
    fsspec.register_implementation("stuck", _Stuck, clobber=True)
    store = open_store("stuck://x", retries=1, timeout=0.05)
    with pytest.raises(StoreError, match=r"^cannot be read: no answer in 0.05 s \(2 tries\)$"):
        read(store)
    with pytest.raises(StoreError, match=r"^cannot be read: 3 earlier reads hang"):
        read(store)
    _Stuck.release.set()


@pytest.mark.parametrize(
    ("url", "module", "message"),
    [
        ("s3://bucket/x", "s3fs", r"pip install 'mlm-dist\[s3\]'"),
        ("gs://bucket/x", "gcsfs", r"pip install 'mlm-dist\[gcs\]'"),
        ("https://host/x", "fsspec.implementations.http", r"pip install 'mlm-dist\[http\]'"),
        ("abfs://host/x", "adlfs", "adlfs"),
        ("nonsense://host/x", "", "nothing reads nonsense://"),
        ("simplecache::s3://bucket/x", "", "chain"),
        ("https:///x", "", "names no server"),
        ("https://[host/x", "", "is no URL"),
        ("https://host:port/x", "", "is no URL"),
    ],
)
def test_url_that_cannot_be_read_is_a_users_error(
    monkeypatch: pytest.MonkeyPatch, url: str, module: str, message: str
) -> None:
    if module:
        registered = importlib.import_module("fsspec.registry")._registry
        monkeypatch.delitem(registered, url.partition("://")[0], raising=False)
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        Store(url)


# Commands


def is_gone(group: int) -> bool:
    """Whether no process of a process group runs any more, or will in a moment: they were killed, and die when they are scheduled."""
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:
        states = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, of = path.read_text().rpartition(")")[2].split()[:3]
                states += [state] * (int(of) == group)
        if set(states) <= set("ZX"):
            return True
        time.sleep(0.01)
    return False


def test_pipe_only_when_allowed(directory: Path) -> None:
    marker = directory / "ran"
    command = f"pipe:touch '{marker}'; cat '{directory}/a.tar'"
    store = open_store(directory)
    with pytest.raises(StoreError, match=r"data\.allow_pipe"):
        read(store, command, 0, len(DATA))
    with pytest.raises(StoreError, match=r"data\.allow_pipe"):
        next(store.fetch(command))
    store.ahead(command, 0, len(DATA), zlib.crc32(DATA))
    size = store.sizes([command])[0]
    assert isinstance(size, str) and "data.allow_pipe" in size
    assert not marker.exists()
    allowed = open_store(directory, allow_pipe=True)
    assert allowed.sizes([command]) == [UNKNOWN_SIZE] and not allowed.has_ranges(command)
    assert not marker.exists()
    assert read(allowed, command, 0, len(DATA)) == DATA
    assert marker.exists()
    assert b"".join(allowed.fetch(command)) == DATA
    assert b"".join(allowed.fetch(f"pipe:cat '{directory}/a.tar' | head -c 100000 | tail -c 5")) == DATA[99_995:100_000]


@pytest.mark.parametrize(
    ("command", "length", "message"),
    [
        ("cat a.tar; exit 3", 307_200, "the command ended with exit status 3"),
        ("cat a.tar; kill -9 $$", 307_200, "the command was killed by signal 9"),
        ("head -c 1000 a.tar", 1200, "the shard ends 200 bytes too early"),
        ("cat a.tar", 1000, "the command gives more bytes than the manifest says"),
        ("cat /dev/zero", 1000, "the command gives more bytes than the manifest says"),
        ("tac -s '' a.tar | cat; cat a.tar", 614_400, "the block's bytes differ from the manifest's checksum"),
        ("no-such-command-here 2>&-", 10, "the command ended with exit status 127"),
        ("exit 141", 10, "the command ended with exit status 141"),
    ],
)
def test_pipe_faults(directory: Path, command: str, length: int, message: str) -> None:
    store = open_store(directory, allow_pipe=True, retries=1)
    with pytest.raises(StoreError) as error:
        store.read(f"pipe:cd '{directory}'; {command}", 0, length, 1)
    assert str(error.value) == f"{message} (2 tries)"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sleep 1000 | cat", "the command gave 0 bytes and not the rest in 0.3 s"),
        ("while :; do printf x; sleep 0.01; done", r"the command gave \d+ bytes and not the rest in 0.3 s"),
        ("echo started; exec >&-; sleep 1000", "the command closed its output and did not end in 0.3 s"),
    ],
)
def test_pipe_that_hangs_is_killed_with_what_it_started(tmp_path: Path, command: str, message: str) -> None:
    pid = tmp_path / "pid"
    store = open_store(tmp_path, allow_pipe=True, retries=0, timeout=0.3)
    with pytest.raises(StoreError, match=f"^{message}"):
        store.read(f"pipe:echo $$ > '{pid}'; {command}", 0, 100_000, 0)
    assert is_gone(int(pid.read_text()))


def test_pipe_may_work_the_second_time(directory: Path) -> None:
    command = f"pipe:cd '{directory}'; mkdir tried && exit 1; cat a.tar"
    store = open_store(directory, allow_pipe=True, retries=1)
    assert read(store, command, 0, len(DATA)) == DATA
    (directory / "tried").rmdir()
    assert b"".join(store.fetch(command)) == DATA


def test_pipe_that_breaks_in_a_fetch(directory: Path) -> None:
    store = open_store(directory, allow_pipe=True)
    pieces = store.fetch(f"pipe:cd '{directory}'; echo >> runs; cat a.tar; exit 5")
    with pytest.raises(StoreError, match=r"^the command ended with exit status 5$"):
        list(pieces)
    assert (directory / "runs").read_text() == "\n"
    # Who stops reading early leaves no command behind.
    pieces = store.fetch(f"pipe:echo $$ > '{directory}/pid'; cat /dev/zero")
    assert next(pieces)
    pieces.close()
    assert is_gone(int((directory / "pid").read_text()))


def test_long_pipe_has_time_for_each_span(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline counts anew for each span of output: a command that takes longer in all, and steadily gives, is read."""
    monkeypatch.setattr(pipes, "SPAN", 1000)
    store = open_store(directory, allow_pipe=True, retries=0, timeout=1.0)
    command = f"pipe:cd '{directory}'; for i in 0 1 2 3 4 5 6 7 8 9 a b; do head -c 1000 a.tar; sleep 0.1; done"
    data = DATA[:1000] * 12
    assert store.read(command, 0, 12_000, zlib.crc32(data)) == data
