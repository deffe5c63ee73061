"""Attempts at one thing until it works or makes no sense, and many things at once."""

import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mlm_dist.storage.readers import Failed, Reader

WAIT = 0.5
MAX_WAIT = 8.0

A = TypeVar("A")
T = TypeVar("T")


class StoreError(Exception):
    """Bytes that cannot be had: one line that says what is wrong, with the tries made if there were several."""


@dataclass
class Tries:
    """The attempts at one thing."""

    path: str
    retries: int
    wait: float
    made: int = 0

    def failed(self, error: Failed) -> None:
        """Wait for the next attempt, or raise StoreError if there is none."""
        self.made += 1
        if not error.again or self.made > self.retries:
            told = f" ({self.made} tries)" if self.made > 1 and self.wait else ""
            raise StoreError(f"{error}{told}") from error
        delay = self.wait * min(2 ** (self.made - 1), MAX_WAIT / WAIT)
        # Up to a quarter less, other for each process and shard: not all of a cluster shall come back at the same moment.
        delay *= 1 - zlib.crc32(f"{os.getpid()} {self.path} {self.made}".encode(errors="surrogateescape")) / 2**34
        time.sleep(max(delay, error.wait * self.wait / WAIT))


def try_again(attempt: Callable[[], T], reader: Reader, tries: Tries) -> T:
    while True:
        try:
            return attempt()
        except Failed as error:
            reader.forget(tries.path)
            tries.failed(error)


def in_threads(function: Callable[[A], T], items: Sequence[A], threads: int) -> list[T]:
    """``function`` of each item, in threads that hold up nobody who interrupts."""
    jobs = iter(enumerate(items))
    lock = threading.Lock()
    done: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            with lock:
                i, item = next(jobs, (-1, None))
            if item is None:
                return
            try:
                done.put((i, function(item), None))
            except BaseException as error:
                done.put((i, None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, Any] = {}
    while len(results) < len(items):
        i, result, error = done.get()
        if error is not None:
            raise error
        results[i] = result
    return [results[i] for i in range(len(items))]
