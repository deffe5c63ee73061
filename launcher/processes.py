"""A process tree that cannot leave anything behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def become_reaper() -> bool:
    """From now on this process is the parent of every descendant that loses its own. False where there is no such thing
    (not Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return True


def descendants() -> list[int]:
    """The living processes that this one started, and those that these started (Linux; elsewhere none)."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state ppid ...", where the name may hold anything.
            state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if state != b"Z":
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found


def kill_descendants(timeout: float = 10.0) -> None:
    """SIGKILLs them until none is left, or for `timeout` seconds (a process stuck in the kernel)."""
    deadline = time.monotonic() + timeout
    while (pids := descendants()) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


class ProcessTree:
    """A command in a session of its own, with all that it starts.

    On Linux this process becomes the parent of every descendant that loses its own, so that those which the command
    orphaned, or which left its session, are seen and can be killed. Elsewhere the process group is all that is known.
    One at a time, in a process that has no other children.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: str | None = None) -> None:
        self._linux = become_reaper()
        # In its own session a Ctrl-C at the terminal reaches this process alone.
        self._top = subprocess.Popen(list(command), env=dict(env), cwd=cwd, start_new_session=True)
        self.code: int | None = None  # of the command itself: its exit code, or -n for signal n

    def reap(self) -> None:
        """Collects what has ended; sets `code` when the command itself has."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._top.pid:
                self.code = self._top.returncode = os.waitstatus_to_exitcode(status)

    def alive(self) -> bool:
        """Whether the command or anything it started still runs."""
        self.reap()
        return self.code is None or (bool(descendants()) if self._linux else self._signal_group(0))

    def holds(self, pid: int) -> bool:
        """Whether `pid` is the command or was started by it (Linux; elsewhere always true)."""
        return not self._linux or pid in descendants()

    def kill(self, timeout: float = 10.0) -> None:
        """SIGKILLs all of it; returns when it is gone, or after `timeout` seconds (a process stuck in the kernel)."""
        if self._linux:
            kill_descendants(timeout)
        deadline = time.monotonic() + timeout
        while self.alive() and not self._linux and time.monotonic() < deadline:
            self._signal_group(signal.SIGKILL)
            time.sleep(0.02)

    def _signal_group(self, number: int) -> bool:
        try:
            os.killpg(self._top.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True
