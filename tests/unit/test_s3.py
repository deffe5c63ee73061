"""The store over a real S3 server: ranges, whole objects, listings, faults and credentials, configured as a user would."""

import multiprocessing
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.storage.cache import Cache
from mlm_dist.storage.objects import ObjectReader
from mlm_dist.storage.store import Store, StoreError, list_objects, read_object

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

pytestmark = pytest.mark.timeout(120)

DATA = bytes(range(256)) * 1200
NAMES = ("a.tar", "b.tar", "sub/c d#?ü%.tar", "other/none.txt")


class FaultyS3:
    """moto's S3 server on a port of its own; what ``faults`` holds for a path answers in its place, one after the other.

    Attributes:
        requests: (method, path, Range) of each.
        faults: What to do for each path: a status, or a function of the true body that gives another.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: dict[str, list[int | Callable[[bytes], bytes]]] = {}
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"].encode("latin-1").decode()
        self.requests.append((environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE")))
        fault = (self.faults.get(path) or [None]).pop(0)
        if isinstance(fault, int):
            code = {503: "SlowDown", 500: "InternalError", 403: "AccessDenied"}[fault]
            body = f"<Error><Code>{code}</Code><Message>Please wait</Message></Error>".encode()
            start_response(f"{fault} Fault", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            return [body]
        if fault is None:
            return self._moto(environ, start_response)
        # The true answer's head, with another body under it.
        body = b"".join(self._moto(environ, start_response))
        return [fault(body)]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[FaultyS3]:
    server = FaultyS3()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FaultyS3:
    """The server with a bucket, and the environment by which a user points at it."""
    import boto3

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3_server.faults.clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpus")
    for name in NAMES:
        client.put_object(Bucket="corpus", Key=f"v1/{name}", Body=DATA)
    s3_server.requests.clear()
    return s3_server


def open_store(**options: Any) -> Store:
    return Store("s3://corpus/v1", **{"wait": 0.001, "timeout": 20.0, **options})


def read(store: Store, path: str = "a.tar", offset: int = 1000, length: int = 70_000) -> bytes:
    return store.read(path, offset, length, zlib.crc32(DATA[offset : offset + length]))


WANTED = DATA[1000:71_000]


def test_reads_ranges_and_whole_objects(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store()
    assert store.remote and store.has_ranges("a.tar")
    assert read(store) == WANTED
    assert s3.requests == [("GET", "/corpus/v1/a.tar", "bytes=1000-70999")]
    assert read(store, NAMES[2], 0, len(DATA)) == DATA
    assert b"".join(store.fetch("b.tar")) == DATA
    assert read_object("s3://corpus/v1/a.tar") == DATA
    assert store.sizes([*NAMES, "gone.tar"]) == [len(DATA)] * 4 + ["cannot be read: No such file or directory"]
    monkeypatch.setattr("mlm_dist.storage.objects.SPAN", 50_000)
    s3.requests.clear()
    assert read(store, length=120_000) == DATA[1000:121_000]
    assert [asked for _, _, asked in s3.requests] == ["bytes=1000-50999", "bytes=51000-100999", "bytes=101000-120999"]
    assert b"".join(store.fetch("b.tar")) == DATA


def test_listing(s3: FaultyS3) -> None:
    assert list_objects("s3://corpus/v1/**/*.tar") == [f"s3://corpus/v1/{name}" for name in sorted(NAMES[:3])]
    assert list_objects("s3://corpus/nothing/*") == []
    with pytest.raises(StoreError, match=r"^cannot be read: "):
        list_objects("s3://no-such-bucket/**")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (503, "cannot be read: Please wait"),
        (500, "cannot be read: Please wait"),
        (lambda body: body[:-1000], "cannot be read: "),
        (lambda body: b"", "cannot be read: "),
        (lambda body: body[::-1], "the block's bytes differ from the manifest's checksum"),
    ],
    ids=["503", "500", "short", "empty", "wrong"],
)
def test_fault_within_and_past_the_retries(s3: FaultyS3, fault: Any, message: str) -> None:
    store = open_store(retries=2)
    s3.faults["/corpus/v1/a.tar"] = [fault] * 2
    assert read(store) == WANTED
    assert len(s3.requests) == 3
    s3.requests.clear()
    s3.faults["/corpus/v1/b.tar"] = [fault] * 100
    with pytest.raises(StoreError) as error:
        read(store, "b.tar")
    assert str(error.value).startswith(message) and str(error.value).endswith("(3 tries)")
    assert "\n" not in str(error.value)
    # One attempt is one request: neither s3fs nor botocore tries again by itself.
    assert len(s3.requests) == 3


def test_what_stays_is_not_retried(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store()
    with pytest.raises(StoreError, match=r"^cannot be read: No such file or directory$"):
        read(store, "gone.tar")
    s3.faults["/corpus/v1/a.tar"] = [403] * 100
    with pytest.raises(StoreError, match=r"^cannot be read: Please wait$"):
        read(store)
    assert [path for _, path, _ in s3.requests] == ["/corpus/v1/gone.tar", "/corpus/v1/a.tar"]
    s3.requests.clear()
    with pytest.raises(StoreError, match=r"^cannot be read: .*range.*"):
        store.read("b.tar", len(DATA) + 5, 10, 0)
    assert len(s3.requests) == 1
    with pytest.raises(StoreError, match=r"^the shard ends 1 bytes too early \(6 tries\)"):
        store.read("b.tar", len(DATA) - 9, 10, 0)


def test_no_credentials(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match=r"^cannot be read: .*credentials[^()]*$"):
        read(open_store())


def test_endpoint_from_the_configuration_of_fsspec(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSSPEC_S3 is read when fsspec is imported; its options reach s3fs, and ours do not take their place."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setitem(
        __import__("fsspec.config").config.conf,
        "s3",
        {"endpoint_url": s3.url, "config_kwargs": {"retries": {"max_attempts": 1}, "s3": {"addressing_style": "path"}}},
    )
    assert ObjectReader("s3://corpus/v1", 1.0)._fs.config_kwargs["retries"] == {"max_attempts": 1}
    assert read(open_store()) == WANTED


def test_stall_ends_at_the_deadline(s3: FaultyS3) -> None:
    stop = threading.Event()

    def stall(body: bytes) -> bytes:
        stop.wait()
        return body

    s3.faults["/corpus/v1/a.tar"] = [stall]
    store = open_store(timeout=1.0)
    assert read(store) == WANTED
    assert len(s3.requests) == 2
    s3.faults["/corpus/v1/b.tar"] = [stall] * 2
    with pytest.raises(StoreError, match=r"^cannot be read: no answer in 1 s \(2 tries\)$"):
        read(open_store(timeout=1.0, retries=1), "b.tar")
    stop.set()


def test_fetch_goes_on_where_it_broke(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlm_dist.storage.objects.SPAN", 100_000)
    store = open_store(retries=1)
    pieces = store.fetch("a.tar")
    first = next(pieces)
    s3.faults["/corpus/v1/a.tar"] = [503]
    assert first + b"".join(pieces) == DATA
    assert [asked for method, _, asked in s3.requests if method == "GET"] == [
        "bytes=0-99999",
        "bytes=100000-199999",
        "bytes=100000-199999",
        "bytes=200000-299999",
        "bytes=300000-307199",
    ]


def test_ahead_and_cache(s3: FaultyS3, tmp_path: Path) -> None:
    blocks = [("a.tar", i * 10_000, 10_000, zlib.crc32(DATA[i * 10_000 : i * 10_000 + 10_000])) for i in range(30)]
    store = open_store(cache=Cache(tmp_path / "cache", 1 << 24))
    for _ in range(2):
        for block in blocks:
            store.ahead(*block)
        for block in blocks:
            assert store.read(*block) == DATA[block[1] : block[1] + 10_000]
    assert len(s3.requests) == len(blocks)


def _child(store: Store, results: Any) -> None:
    try:
        results.put([read(store), read(store, "b.tar"), store.sizes(["a.tar"])])
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_store_in_other_processes(s3: FaultyS3, method: str) -> None:
    store = open_store()
    assert read(store) == WANTED
    context = multiprocessing.get_context(method)
    store.ahead("b.tar", 1000, 70_000, zlib.crc32(WANTED))
    results = context.Queue()
    child = context.Process(target=_child, args=(store, results))
    child.start()
    assert results.get(timeout=60) == [WANTED, WANTED, [len(DATA)]]
    child.join(20)
    assert child.exitcode == 0
    assert read(store, "b.tar") == WANTED
