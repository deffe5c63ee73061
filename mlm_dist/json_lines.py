"""Files of JSON objects, one a line, that outlive crashes and full disks."""

import json
import logging
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_dist.files import DISK_FULL, parse_object

log = logging.getLogger(__name__)

# Lines kept while the disk is full: about two thousand.
MOST_UNWRITTEN_BYTES = 1 << 20


class JsonLines:
    """An append-only file of JSON objects, one a line, with one writer.

    Opening repairs the end: a last line without its newline is completed if it is whole JSON, else cut off. A line is
    one ``write``, so a killed process leaves at most one torn line. While the disk is full lines are kept in memory and
    written with a later one. Non-finite floats are written as null, since JSON has none; 0-d arrays and tensors as their
    numbers.

    Attributes:
        path: of the file.
        repaired: bytes cut off at opening.
    """

    def __init__(self, path: Path) -> None:
        self.repaired = _repair(path)
        self.path = path
        self._lock = threading.Lock()
        self._unwritten = bytearray()
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, record: Mapping[str, Any], *, sync: bool = False, required: bool = False) -> None:
        """Write one object; with ``sync`` it is on the disk on return, unless that is full.

        Raises:
            OSError: the file cannot be written, or the disk is full and the object is ``required`` on it, or so are
            MOST_UNWRITTEN_BYTES of lines.
        """
        data = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
        with self._lock:
            if self._fd is None:
                raise ValueError("the file is closed")
            self._unwritten += data
            try:
                self._write(self._fd, sync)
            except OSError as error:
                if required or error.errno not in DISK_FULL or len(self._unwritten) > MOST_UNWRITTEN_BYTES:
                    raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _write(self, fd: int, sync: bool) -> None:
        while self._unwritten:  # a signal or a full disk can make a write short
            del self._unwritten[: os.write(fd, self._unwritten)]
        if sync:
            os.fsync(fd)

    def flush(self) -> None:
        """Try once more to write what a full disk left over."""
        with self._lock:
            if self._fd is not None:
                try:
                    self._write(self._fd, sync=False)
                except OSError as error:
                    log.warning("%s: %d bytes are not written: %s", self.path, len(self._unwritten), error.strerror)

    def close(self) -> None:
        self.flush()
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
            self._fd = None


def plain(value: Any) -> Any:
    """``value`` in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):  # numpy.float64 too, hence the conversion
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} has no place in a line of JSON")


def _repair(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        tail = data[end:]
        if not tail:
            return 0
        if parse_object(tail) is not None:
            file.write(b"\n")
            return 0
        file.truncate(end)
        return len(tail)
