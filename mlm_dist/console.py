"""What rank 0 shows while a run goes on: a panel on a terminal, plain lines in a log file."""

import contextlib
import io
import logging
import os
import queue
import sys
import threading
import time
from types import TracebackType
from typing import IO, Any, Self, cast

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from mlm_dist.files import to_null
from mlm_dist.records import Record
from mlm_dist.redact import redact
from mlm_dist.view import Cadence, History, View, line, panel


class _Fd(io.FileIO):
    """A file descriptor that nothing is printed to any more once a write has failed."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            to_null(self.fileno())
            return len(data)


def outlive_output() -> None:
    """From here on a reader that goes away, a terminal that hangs up or a full disk under stdout and stderr takes the output, not the program.

    One that was closed already is /dev/null from now on: else the next file that is opened would get its number, and with it what libraries print.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            to_null(fd)
    for old in (sys.stdout, sys.stderr):
        if old is not None:
            with contextlib.suppress(OSError):
                old.flush()
    _renew_output()
    os.register_at_fork(after_in_child=_after_fork)


def _renew_output() -> list[Any]:
    """Make sys.stdout and sys.stderr anew over their file descriptors; returns the old ones."""
    olds = []
    for name, fd in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if old is not None and _number(old) != fd:
            continue  # it goes elsewhere: a test's
        raw = io.BufferedWriter(_Fd(fd, "w", closefd=False))
        new = io.TextIOWrapper(raw, old and old.encoding, errors="backslashreplace", line_buffering=True)
        setattr(sys, name, new)
        olds.append(old)
    return olds


_inherited: list[Any] = []


def _after_fork() -> None:
    """In a forked loader worker: the thread that draws the panel may have held a lock of the streams, and is not here to give it back."""
    _inherited.extend(_renew_output())  # kept, since to close one is to wait for its lock
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            old = getattr(handler, "stream", None)  # of some handlers it is sys.stderr at any time, and cannot be set
            if old not in (sys.stdout, sys.stderr) and _number(old) in (1, 2):
                handler.stream = sys.stdout if _number(old) == 1 else sys.stderr


def _number(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None


class _Terminal(io.TextIOBase):
    """stderr as a terminal that a thread writes to: where nobody reads it (Ctrl-S, a connection that is half dead) output is dropped, and nothing waits."""

    def __init__(self) -> None:
        self._queue: queue.Queue[str] = queue.Queue(100)
        threading.Thread(target=self._main, name="terminal", daemon=True).start()

    def write(self, text: str) -> int:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(text)
        return len(text)

    def isatty(self) -> bool:
        return True

    def drained(self, seconds: float) -> bool:
        """Wait until all is written, but no longer than so; whether it is."""
        until = time.monotonic() + seconds
        while self._queue.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)
        return not self._queue.unfinished_tasks

    def _main(self) -> None:
        while True:
            data = self._queue.get().encode()
            with contextlib.suppress(OSError):  # it hung up
                while data:
                    data = data[os.write(2, data) :]
            self._queue.task_done()


class RunConsole:
    """Progress of one attempt on rank 0; as a context it owns the panel of a terminal, and never waits for it. For a pipe or file it does:
    lines of a log are not to be lost.

    Args:
        name: the run's.
        steps: steps of the whole run, or None when it is counted in epochs.
        checkpoint_every: steps between checkpoints.
        enabled: False on all ranks but 0: shows nothing.
    """

    def __init__(self, name: str, steps: int | None, checkpoint_every: int, enabled: bool):
        self.enabled = enabled
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._name, self._steps, self._every = name, steps, checkpoint_every
        self._history, self._cadence = History(), Cadence()
        self._unsaid = False
        self._live: Live | None = None
        self._terminal: _Terminal | None = None

    def __enter__(self) -> Self:
        # By the stream itself: rich takes a log file for a terminal where FORCE_COLOR is set.
        if self.enabled and sys.stderr.isatty() and not self.console.is_dumb_terminal:
            self._terminal = _Terminal()
            self.console.file = cast(IO[str], self._terminal)
            self._live = Live(console=self.console, get_renderable=self._panel, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live and self._terminal:
            self._live.stop()
            if self._terminal.drained(2.0):
                self.console.file = sys.stderr
        elif self._unsaid:
            self._say_line()

    def say(self, message: str) -> None:
        """One line that stays."""
        if self.enabled:
            self.console.print(redact(message), markup=False)
            sys.stderr.flush()

    def record(self, record: Record) -> None:
        """Show a line of ``metrics.jsonl``."""
        self._history.add(record)
        if record["kind"] != "train" or not self.enabled or self._live:
            return
        self._unsaid = True
        if self._cadence.due() or record.get("progress") == 1:
            self._say_line()

    def event(self, event: Record) -> None:
        """Show a line of ``events.jsonl``, where there is a place for it."""
        self._history.add_event(event)

    def _view(self) -> View | None:
        return self._history.view(steps=self._steps, checkpoint_every=self._every)

    def _say_line(self) -> None:
        self._unsaid = False
        if view := self._view():
            self.say(line(view))

    def _panel(self) -> RenderableType:
        view = self._view()
        return panel(view, self._name) if view else Text("before the first step", style="dim")
