"""One attempt at reading an object over HTTP."""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Generator
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from mlm_dist.storage.readers import PIECE, SPAN, Failed, one_line, too_early, warn_once

# What a server may ask for in Retry-After and get.
MAX_WAIT = 30.0

T = TypeVar("T")


class HttpReader:
    """An HTTP server, by ranges if it has them.

    fsspec gives the session with what the user configured (``FSSPEC_HTTP``, proxies and .netrc of the environment). The
    requests are made here: fsspec checks neither that the server kept to the range nor that the length is right, and reads
    a whole shard into memory where the server has no ranges.

    Args:
        root: URL; its query goes to every request.
        timeout: Seconds for the answer and each `SPAN` of body.

    Attributes:
        ranges: Whether the server has ranges; None until it was asked.
    """

    concurrent = True

    def __init__(self, root: str, timeout: float) -> None:
        import fsspec

        self.root, self.timeout = root, timeout
        self.ranges: bool | None = None
        self._fs = fsspec.filesystem("http", skip_instance_cache=True)
        # A shard that a server calls Content-Encoding: gzip is a .tar.gz, and its bytes are what the manifest means.
        options = {"trust_env": _environment_counts(root), **self._fs.client_kwargs, "auto_decompress": False}
        self._fs.client_kwargs = options

    def read(self, path: str, offset: int, length: int) -> bytes:
        async def collect() -> bytes:
            async with contextlib.aclosing(self._body(path, offset, offset + length)) as body:
                return b"".join([chunk async for chunk in body])

        return self._run(collect())

    def pieces(self, path: str, offset: int, end: int) -> Generator[bytes, None, None]:
        body = self._body(path, offset, end)

        async def piece() -> tuple[list[bytes], BaseException | None]:
            parts: list[bytes] = []
            try:
                while sum(map(len, parts)) < PIECE and (chunk := await anext(body, None)):
                    parts.append(chunk)
            except Failed as error:
                return parts, error  # what has come is good, and the next attempt goes on behind it
            return parts, None

        try:
            while True:
                parts, error = self._run(piece())
                if parts:
                    yield b"".join(parts)
                if error:
                    raise error
                if not parts:
                    return
        finally:
            self._run(body.aclose())

    def stat(self, path: str) -> tuple[int, str]:
        """Asks for one byte rather than by HEAD, which some servers and signed URLs refuse."""
        return self._run(self._stat(path))

    def forget(self, path: str) -> None:
        pass

    def url(self, path: str) -> str:
        """Where an object is. In ``path`` a %XX stays as it is; other characters that a URL cannot hold become one."""
        parts = urlsplit(self.root)
        where = _quote(parts.path.rstrip("/"), "/:@!$&'()*+,;=~") + "/" + _quote(path, "/")
        return urlunsplit((parts.scheme, parts.netloc, where, parts.query, ""))

    def _run(self, work: Awaitable[T]) -> T:
        from fsspec.asyn import sync

        async def run() -> T:
            return await work

        return sync(self._fs.loop, run)

    @contextlib.asynccontextmanager
    async def _get(self, path: str, requested: str, clock: "_Clock") -> AsyncGenerator[Any, None]:
        """The response to a GET of a range, its status checked to be 200, 206 or 416."""
        import aiohttp
        import yarl

        options = {**self._fs.kwargs, "timeout": aiohttp.ClientTimeout(total=None)}
        options["headers"] = {**options.get("headers", {}), "Range": requested, "Accept-Encoding": "identity"}
        session = await self._fs.set_session()
        try:
            response = await clock.wait(session.get(yarl.URL(self.url(path), encoded=True), **options))
        except TimeoutError:
            raise Failed(f"cannot be read: no answer in {self.timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            hopeless = isinstance(error, aiohttp.ClientConnectorCertificateError | ValueError)
            raise Failed(f"cannot be read: {one_line(error)}", again=not hopeless) from error
        # Leaving it closes the connection, or gives it back if the body was read to its end.
        async with response:
            if response.status not in (200, 206, 416):
                raise _bad_status(response)
            yield response

    async def _stat(self, path: str) -> tuple[int, str]:
        clock = _Clock(self.timeout)
        async with self._get(path, "bytes=0-0", clock) as response:
            self.ranges = response.status != 200
            size = response.content_length if response.status == 200 else _content_range(response)[2]
            if size is None:
                raise Failed("cannot be read: the server does not tell its size", again=False)
            if response.status == 206 and response.content_length == 1:
                with contextlib.suppress(Exception):  # read to its end, the connection serves again
                    await clock.wait(response.read())
            # Servers behind one name can make different ETags of one file.
            return size, response.headers.get("Last-Modified") or response.headers.get("ETag") or ""

    async def _body(self, path: str, offset: int, end: int) -> AsyncGenerator[bytes, None]:
        """The bytes [offset, end) as they come, and no other."""
        import aiohttp

        clock = _Clock(self.timeout)
        async with self._get(path, f"bytes={offset}-{end - 1}", clock) as response:
            start = at = self._first_byte(response, offset, end)
            while at < end:
                try:
                    chunk = await clock.wait(response.content.readany())
                except TimeoutError:
                    raise Failed(f"cannot be read: only {at - start} bytes came in {self.timeout:g} s") from None
                except (aiohttp.ClientError, OSError) as error:
                    raise Failed(f"cannot be read: the connection broke after {at - start} bytes") from error
                if not chunk:
                    raise too_early(end - max(at, offset))
                clock.came(at - start, len(chunk))
                if part := chunk[max(0, offset - at) : end - at]:
                    yield part
                at += len(chunk)

    def _first_byte(self, response: Any, offset: int, end: int) -> int:
        """Check what part of the object a response holds. Returns where in the object its body begins: ``offset``, or 0 if it is all."""
        if response.status == 200:
            self.ranges = False
            if offset or response.content_length != end:
                warn_once(
                    "ranges",
                    f"{urlsplit(self.root).hostname} ignores ranges: each block costs the transfer of its shard up to there. "
                    "data.cache_dir keeps blocks on the node; a server with ranges is better.",
                )
            return 0
        first, last, size = _content_range(response)
        if size is not None and size < end:
            raise too_early(end - max(size, offset))
        if (first, last) != (offset, end - 1):
            raise Failed(f"cannot be read: asked for bytes {offset} to {end - 1}, the server sent {first} to {last}")
        if response.content_length not in (None, end - offset):
            raise Failed(f"cannot be read: the server sent {response.content_length} bytes for {end - offset}")
        self.ranges = True
        return offset


class _Clock:
    """The deadline of an attempt: counts what is spent waiting, not what the reader does with the bytes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = self.left = seconds

    async def wait(self, work: Awaitable[T]) -> T:
        """The result of ``work``, which is cancelled at the deadline. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        try:
            return await asyncio.wait_for(work, max(self.left, 0.0))
        finally:
            self.left -= loop.time() - before

    def came(self, before: int, count: int) -> None:
        """After ``before`` bytes ``count`` more have come."""
        if (before + count) // SPAN > before // SPAN:
            self.left = self.seconds


def _environment_counts(url: str) -> bool:
    """Whether the environment has a proxy or a .netrc for a server. To let aiohttp look costs half a millisecond a request."""
    parts = urlsplit(url)
    proxied = parts.scheme in getproxies() and not proxy_bypass(parts.netloc.rpartition("@")[2])
    return proxied or os.path.exists(os.path.expanduser(os.environ.get("NETRC", "~/.netrc")))


def _quote(path: str, safe: str) -> str:
    """Percent-encode all but ``safe`` and what is encoded already."""
    return re.sub(r"%25(?=[0-9A-Fa-f]{2})", "%", quote(path, safe=safe))


def _content_range(response: Any) -> tuple[int, int, int | None]:
    """(first byte, last byte, size of the object or None) of a response with status 206 or 416."""
    text = response.headers.get("Content-Range", "")
    if found := re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", text.strip()):
        return int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])
    if found := re.fullmatch(r"bytes \*/(\d{1,19})", text.strip()):
        return 0, -1, int(found[1])
    raise Failed(f"cannot be read: HTTP {response.status} with Content-Range {text[:60]!r}")


def _bad_status(response: Any) -> Failed:
    again = response.status in (408, 425, 429) or response.status >= 500
    asked = response.headers.get("Retry-After", "")
    wait = min(float(asked), MAX_WAIT) if asked.isdecimal() else 0.0
    return Failed(
        f"cannot be read: HTTP {response.status} {response.reason or ''}".rstrip()[:200], again=again, wait=wait
    )
