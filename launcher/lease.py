"""Ties ranks on other hosts to the launcher that watches them, by files on the file system that all of them share.

No signal of the launcher reaches another host, pdsh tells no host when a rank dies on another, and ranks go on when ssh
is gone. So the launcher renews `lease` each second, and ranks end when it says so or is not renewed; each rank keeps
`began-N` fresh, so that the launcher sees a host vanish. Only changes are looked at, timed by the reader's own clock:
those of two hosts may differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from mlm_dist.files import write_atomically

BEAT_S = 1.0
END = "end"


class Lease:
    """The launcher's end: `seconds` is how long either side may be silent before the other takes it for gone."""

    def __init__(self, directory: Path, ranks: Sequence[int], seconds: float) -> None:
        self.directory = directory
        self.ranks = ranks
        self.seconds = seconds
        self.began: dict[int, tuple[str, int]] = {}  # by rank: its host and the process that is the program
        self._beats: dict[int, tuple[int, float]] = {}  # by rank: the last change seen and when
        self._first: float | None = None  # when the first rank was seen
        self._count = 0

    def renew(self) -> None:
        """Renews it and looks at the ranks. A write that fails is tried again at the next call."""
        self._count += 1
        # A new file each time, since a change of ours to the directory makes an NFS client look at it afresh.
        with contextlib.suppress(OSError):
            write_atomically(self.directory / "lease", str(self._count).encode())
        now = time.monotonic()
        for rank in self.ranks:
            path = self.directory / f"began-{rank}"
            try:
                if rank not in self.began:
                    host, pid = json.loads(path.read_text())
                    self.began[rank] = host, pid
                    self._first = self._first or now
                beat = os.stat(path).st_mtime_ns
            except (OSError, ValueError):
                continue
            if self._beats.get(rank, (0, 0.0))[0] != beat:
                self._beats[rank] = beat, now

    def silent(self) -> list[int]:
        """The ranks that gave no sign of life for too long, or have not begun so long after another had."""
        if self._first is None:
            return []
        limit = time.monotonic() - self.seconds
        return [r for r in self.ranks if self._beats.get(r, (0, self._first))[1] < limit]

    def end(self) -> None:
        """Makes every rank kill its program, within about a second."""
        with contextlib.suppress(OSError):
            write_atomically(self.directory / "lease", END.encode())


class Tie:
    """A rank's end of the lease in `directory`."""

    def __init__(self, directory: Path, rank: int, seconds: float) -> None:
        self._directory = directory
        self._began = directory / f"began-{rank}"
        self._seconds = seconds
        self._ended = False
        self._last = ""
        self._renewed = time.monotonic()

    def begin(self, pid: int) -> None:
        """Says that the program runs as process `pid`, and keeps that fresh.

        Raises:
            OSError: the directory is not there, so this host shares no file system with the launcher's.
        """
        write_atomically(self._began, json.dumps([socket.gethostname(), pid]).encode())
        # A thread, since a file server that hangs must not hang the wait for the program, nor hide the lease's end.
        threading.Thread(target=self._watch, daemon=True).start()

    def holds(self) -> bool:
        """Whether the program may go on."""
        return not self._ended and time.monotonic() - self._renewed < self._seconds

    def _watch(self) -> None:
        beat = 0.0
        while not self._ended:
            with contextlib.suppress(OSError):
                content = (self._directory / "lease").read_text()
                self._ended = content == END
                if content != self._last:
                    self._last, self._renewed = content, time.monotonic()
                if time.monotonic() - beat > self._seconds / 8:
                    os.utime(self._began)
                    beat = time.monotonic()
            time.sleep(BEAT_S)
