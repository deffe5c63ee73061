"""Reading blocks before they are asked for, in a few threads."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

THREADS = 8
MAX_BLOCKS = 64
MAX_BYTES = 64 << 20
# A block that was not asked for in so many takes will not be: its lane has ended or begun elsewhere.
MAX_AGE = 4 * MAX_BLOCKS
IDLE_SECONDS = 10.0

Block = tuple[str, int, int, int]


@dataclass
class _Ordered:
    future: Future[bytes]
    turn: int


class ReadAhead:
    """Fetches of one process that are under way or done and not yet taken: at most `MAX_BLOCKS` and `MAX_BYTES`, else an order is passed over.

    The threads are daemons, so they hold up nothing at exit, and end when there was nothing to do for a while.

    Args:
        fetch: Reads the block (path, offset, length, crc32), within some time.
    """

    def __init__(self, fetch: Callable[[Block], bytes]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._ordered: dict[Block, _Ordered] = {}
        self._queue: queue.SimpleQueue[tuple[Block, Future[bytes]]] = queue.SimpleQueue()
        self._threads = 0
        self._busy = 0
        self._bytes = 0
        self._turn = 0

    def order(self, block: Block) -> None:
        """Begin to fetch a block, unless that was ordered already or too much is."""
        with self._lock:
            if block in self._ordered or not self._has_room(block[2]):
                return
            future: Future[bytes] = Future()
            self._ordered[block] = _Ordered(future, self._turn)
            self._bytes += block[2]
            self._queue.put((block, future))
            self._busy += 1
            if self._threads < min(THREADS, self._busy):
                self._threads += 1
                threading.Thread(target=self._work, daemon=True, name="read-ahead").start()

    def take(self, block: Block) -> bytes | None:
        """The block if it was ordered and has come; waits for one that is on its way. None else: the caller has to read it."""
        with self._lock:
            self._turn += 1
            ordered = self._drop(block)
        if ordered is None or ordered.future.cancel():
            return None
        try:
            return ordered.future.result()
        except Exception:
            return None  # what could not be read then may be readable now, and if not, the caller hears why

    def _has_room(self, length: int) -> bool:
        if len(self._ordered) < MAX_BLOCKS and self._bytes + length <= MAX_BYTES:
            return True
        for block, ordered in list(self._ordered.items()):
            if self._turn - ordered.turn > MAX_AGE and (ordered.future.done() or ordered.future.cancel()):
                self._drop(block)
        return len(self._ordered) < MAX_BLOCKS and self._bytes + length <= MAX_BYTES

    def _drop(self, block: Block) -> _Ordered | None:
        ordered = self._ordered.pop(block, None)
        self._bytes -= block[2] if ordered else 0
        return ordered

    def _work(self) -> None:
        while True:
            try:
                block, future = self._queue.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if self._queue.empty():
                        self._threads -= 1
                        return
                continue
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._fetch(block))
                except BaseException as error:
                    future.set_exception(error)
            with self._lock:
                self._busy -= 1
            del block, future  # not held while waiting for the next
