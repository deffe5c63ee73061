"""What rank 0 shows while a run goes on: a bar on a terminal, plain lines in a log file."""

import contextlib
import io
import os
import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mlm_dist.files import to_null
from mlm_dist.redact import redact


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
    for name, fd in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if old is not None and _number(old) != fd:
            continue  # it goes elsewhere: a test's
        if old is not None:
            with contextlib.suppress(OSError):
                old.flush()
        raw = io.BufferedWriter(_Fd(fd, "w", closefd=False))
        new = io.TextIOWrapper(raw, old and old.encoding, errors="backslashreplace", line_buffering=True)
        setattr(sys, name, new)


def _number(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None


class RunConsole:
    """Progress of one attempt; as a context it owns the bar.

    Args:
        steps: steps of the whole run, or None when it is counted in epochs.
        enabled: False on all ranks but 0: shows nothing.
    """

    def __init__(self, steps: int | None, enabled: bool):
        self.steps, self.enabled = steps, enabled
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._started, self._progress_at_start = time.monotonic(), 0.0

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self.enabled and self.console.is_terminal:
            columns = (
                TextColumn("epoch {task.fields[epoch]:.2f}  step {task.fields[step]}"),
                BarColumn(bar_width=None),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} tokens/s  left"),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Progress(*columns, console=self.console, refresh_per_second=4)
            self._bar.start()
            self._task = self._bar.add_task("train", total=1.0, epoch=0.0, step=0, loss=float("nan"), rate=0.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, message: str) -> None:
        """One line that stays."""
        if self.enabled:
            self.console.print(redact(message), markup=False)
            sys.stderr.flush()

    def begin(self, progress: float) -> None:
        """The attempt starts at this share of the run."""
        self._progress_at_start, self._started = progress, time.monotonic()

    def train(
        self, step: int, epoch: float, progress: float, loss: float, rate: float, lr: float, mfu: float | None
    ) -> None:
        """Show a logging step. ``rate`` is useful tokens per second over all ranks, ``mfu`` in [0, 1] where it is known."""
        if self._bar:
            self._bar.update(self._task, completed=progress, epoch=epoch, step=step, loss=loss, rate=rate)
            return
        done = progress - self._progress_at_start
        left = (time.monotonic() - self._started) * (1 - progress) / done if done > 0 else 0.0
        of = f"/{self.steps}" if self.steps else ""
        minutes, seconds = divmod(round(left), 60)
        use = "" if mfu is None else f"  MFU {mfu:.1%}"
        self.say(
            f"epoch {epoch:6.2f}  step {step}{of}  loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} tokens/s{use}  left {minutes}:{seconds:02d}"
        )
