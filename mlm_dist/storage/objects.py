"""One attempt at reading from an object store, or any other file system of fsspec that can seek."""

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

from mlm_dist.errors import UserError
from mlm_dist.storage.readers import PIECE, SPAN, Failed, one_line, too_early

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
MAX_HUNG = 8
_HOPELESS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ParamValidationError")


def check_driver(url: str) -> None:
    """Check that what reads this kind of URL is installed.

    Raises:
        UserError: A protocol that nobody knows, one without its driver, a chain of them, no URL.
    """
    import fsspec

    protocol = protocol_of(url)
    if "::" in url:
        raise UserError(f"{url!r} is a chain of file systems; give one URL, and data.cache_dir for a cache")
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise UserError(
            f"{url!r}: nothing reads {protocol}:// URLs; http://, https://, s3://, gs:// and local paths can be read"
        ) from error
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        advice = f"pip install 'mlm-dist[{extra}]'" if extra else str(error)
        raise UserError(f"{url!r}: the driver of {protocol}:// is not installed: {advice}") from error
    try:
        parts = urlsplit(url)
        lacks_host = protocol in ("http", "https") and not (parts.hostname and parts.port != 0)
    except ValueError as error:
        raise UserError(f"{url!r} is no URL: {error}") from error
    if lacks_host:
        raise UserError(f"{url!r} names no server; write {protocol}://HOST/PATH")


def protocol_of(url: str) -> str:
    """``s3`` of ``s3://bucket/key``."""
    return url.partition("://")[0].lower()


class ObjectReader:
    """An object store or another file system of fsspec.

    Args:
        root: URL, whose options come from fsspec's configuration (``FSSPEC_S3``) and the driver's own environment.
        timeout: Seconds for each `SPAN`, which is one request.
    """

    def __init__(self, root: str, timeout: float) -> None:
        self.root, self.timeout = root, timeout
        self._hung: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._connect()
        self.concurrent = bool(self._fs.async_impl)

    def read(self, path: str, offset: int, length: int) -> bytes:
        end = offset + length
        parts = [self._span(path, start, min(SPAN, end - start)) for start in range(offset, end, SPAN)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pieces(self, path: str, offset: int, end: int) -> Generator[bytes, None, None]:
        for start in range(offset, end, SPAN):
            data = self._span(path, start, min(SPAN, end - start))
            for at in range(0, len(data), PIECE):
                yield data[at : at + PIECE]

    def stat(self, path: str) -> tuple[int, str]:
        info = self._call("info", self._path(path))
        if info.get("type") == "directory" or not isinstance(info.get("size"), int):
            raise Failed("cannot be read: no object of known size", again=False)
        keys = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "updated", "created")
        return info["size"], " ".join(str(info.get(key, "")) for key in keys)

    def find(self, pattern: str) -> list[str]:
        """Paths, without protocol, that match a glob."""
        return sorted(self._call("glob", pattern, seconds=10 * self.timeout))

    def forget(self, path: str) -> None:
        pass

    def _connect(self) -> None:
        from fsspec.core import url_to_fs

        self._fs, self._base = url_to_fs(self.root, skip_instance_cache=True)
        self._ready = not hasattr(self._fs, "set_session")
        if protocol_of(self.root) in ("s3", "s3a"):
            # One attempt means one: s3fs and botocore would each try several times.
            self._fs.retries = 1
            self._fs.config_kwargs = {"retries": {"max_attempts": 0}, **self._fs.config_kwargs}

    def _path(self, path: str) -> str:
        return f"{self._base.rstrip('/')}/{path}"

    def _span(self, path: str, offset: int, length: int) -> bytes:
        data = self._call("cat_file", self._path(path), start=offset, end=offset + length)
        if len(data) < length:
            raise too_early(length - len(data))
        if len(data) > length:
            raise Failed(f"cannot be read: {len(data)} bytes came for {length}")
        return data

    def _call(self, name: str, *args: Any, seconds: float | None = None, **options: Any) -> Any:
        from fsspec.asyn import sync

        seconds = seconds or self.timeout
        try:
            if not self._fs.async_impl:
                return self._call_in_thread(seconds, getattr(self._fs, name), *args, **options)
            with self._lock:  # two first calls at once would each open a session, and one be lost
                if not self._ready:
                    sync(self._fs.loop, self._fs.set_session, timeout=seconds)
                    self._ready = True
            return sync(self._fs.loop, getattr(self._fs, f"_{name}"), *args, timeout=seconds, **options)
        except Failed:
            raise
        except TimeoutError as error:
            raise Failed(f"cannot be read: no answer in {seconds:g} s") from error
        except Exception as error:
            raise Failed(f"cannot be read: {_in_words(error)}", again=not _is_hopeless(error)) from error

    def _call_in_thread(self, seconds: float, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call what cannot be cancelled. What hangs is left alone, with its connection; the next call has a new one."""
        self._hung = [thread for thread in self._hung if thread.is_alive()]
        if len(self._hung) >= MAX_HUNG:
            raise Failed(f"cannot be read: {MAX_HUNG} earlier reads hang", again=False)
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(*args, **options))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            return future.result(seconds)
        except TimeoutError:
            if not future.done():
                self._hung.append(thread)
                self._connect()
            raise


def _in_words(error: Exception) -> str:
    return "No such file or directory" if isinstance(error, FileNotFoundError) else one_line(error)


def _is_hopeless(error: BaseException) -> bool:
    """Whether the answer would be the same the next time."""
    if isinstance(error, _HOPELESS) or type(error).__name__ in _NO_CREDENTIALS:
        return True
    # botocore's ClientError under the OSError that s3fs makes of it; gcsfs' HttpError
    response = getattr(error.__cause__, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    status = status or getattr(error, "code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
