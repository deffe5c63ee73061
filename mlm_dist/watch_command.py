"""``mlm-dist watch RUN``: how a run elsewhere stands, from the files of its directory, which is only read."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_dist.errors import UserError
from mlm_dist.files import parse_object, read_json, read_yaml
from mlm_dist.lifecycle import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_HUNG,
    EXIT_STOPPED,
    STALE_AFTER_S,
    same_process,
)
from mlm_dist.view import Cadence, History, View, line, panel, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist watch``."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, also of a run on another host")
    parser.add_argument("--once", action="store_true", help="say how it stands now, and end")
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")


class Tail:
    """The JSON objects that a file of them has got since the last look. A line that is not whole yet is left for the next; one that is none is passed over."""

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._file = path, 0, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """What is new. A file that is shorter than it was, or another, is read from its beginning: a torn end was cut off."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._file or found.st_size < self._place:
                    self._file, self._place = found.st_ino, 0
                file.seek(self._place)
                data = file.read()
        except OSError:  # there is none yet, or its file server has a fault: nothing new
            return
        end = data.rfind(b"\n") + 1
        self._place += end
        for text in data[:end].splitlines():
            if (record := parse_object(text)) is not None:
                yield record


@dataclass(frozen=True)
class Standing:
    """How a run stands beyond its numbers.

    Attributes:
        state: in words for people.
        code: that ``mlm-dist watch`` ends with; None while the run goes on.
    """

    state: str
    code: int | None


class Heart:
    """Tells whether the holder of a run's lock lives: by its process on this host, by its heartbeat elsewhere.

    A heartbeat is judged by how long this process has seen none, so that hosts' clocks need not agree; at the first look
    alone there is only the clock.
    """

    def __init__(self, lock: Path) -> None:
        self._lock = lock
        self._beat: tuple[float, float] | None = (
            None  # the last one's stamp, and when it was seen, by the monotonic clock
        )

    def silence(self) -> float | None:
        """Seconds without a sign of life; infinite for a process that is gone, None where there is no lock."""
        content = read_json(self._lock) or {}
        try:
            stamp = self._lock.stat().st_mtime
        except FileNotFoundError:
            return None
        except OSError:  # a fault of the file server tells nothing new
            return time.monotonic() - self._beat[1] if self._beat else 0.0
        if content.get("host") == socket.gethostname():
            return 0.0 if same_process(content.get("pid"), content.get("started")) else float("inf")
        if self._beat is None:
            self._beat = stamp, time.monotonic() - max(0.0, time.time() - stamp)
        elif self._beat[0] != stamp:
            self._beat = stamp, time.monotonic()
        return time.monotonic() - self._beat[1]


def standing(status: dict[str, Any], silence: float | None) -> Standing:
    """How a run stands, by its status.json and the silence of its lock's holder."""
    state, reason, step = status.get("state"), status.get("reason") or "", status.get("step", 0)
    why = f": {printable(reason)}" if reason else ""
    match state:
        case "finished":
            return Standing(f"finished at step {step}", EXIT_FINISHED)
        case "preempted" | "cancelled":
            more = "; it will be started again" if status.get("requeue") else "; the same command goes on"
            return Standing(f"{state} at step {step}{why}{more}", EXIT_STOPPED)
        case "failed":
            return Standing(
                f"failed at step {step}{why}", EXIT_HUNG if reason.startswith("the run hangs") else EXIT_FAILED
            )
    if silence is None:
        return Standing("no process holds the run: it died, or has not begun", EXIT_FAILED)
    if silence == float("inf"):
        return Standing("died without a word: its process is gone", EXIT_FAILED)
    if silence > STALE_AFTER_S:
        return Standing(f"no heartbeat for {silence:.0f} s: hung, dead, or cut off", EXIT_HUNG)
    return Standing("starting" if state == "starting" else "running", None)


class Watch:
    """A run directory, looked at again and again."""

    def __init__(self, run: Path) -> None:
        self.run = run
        config = read_yaml(run / "config.yaml")
        self._steps = (config.get("train") or {}).get("steps")
        self._every = (config.get("checkpoint") or {}).get("every")
        self._metrics, self._events = Tail(run / "metrics.jsonl"), Tail(run / "events.jsonl")
        self._heart = Heart(run / "lock")
        self._history = History()

    def look(self) -> tuple[View | None, Standing, bool]:
        """(its numbers, how it stands, whether there are new ones)."""
        before = self._history.train[-1:]
        now = self._standing()  # first: of a run that ends in between, the numbers may be newer than it, but not older
        for record in self._metrics.new():
            if isinstance(record.get("kind"), str) and isinstance(record.get("step"), int):
                self._history.add(record)
        for event in self._events.new():
            self._history.add_event(event)
        view = self._history.view(steps=self._steps, checkpoint_every=self._every)
        return view, now, self._history.train[-1:] != before

    def _standing(self) -> Standing:
        holder = read_json(self.run / "lock") or {}
        status = read_json(self.run / "status.json") or {}
        silence = self._heart.silence()
        if silence is None or silence == float("inf"):  # it may have ended since its status was read
            status = read_json(self.run / "status.json") or status
        attempt, told = holder.get("attempt"), status.get("attempt")
        if silence is not None and isinstance(attempt, int) and isinstance(told, int) and attempt > told:
            status = {"state": "starting"}  # what is told is of an attempt before
        return standing(status, silence)


def run(args: argparse.Namespace) -> int:
    """Run ``mlm-dist watch``. Exit codes, when the run has ended or with --once: 0 finished or running, 75 stopped, 76 hung or without heartbeat, 1 failed."""
    if not (args.run / "status.json").exists():
        raise UserError(f"{args.run}: no run directory (there is no status.json); give one, such as runs/demo")
    if not args.interval > 0:
        raise UserError(f"--interval: {args.interval} must be a positive number of seconds.")
    watch = Watch(args.run)
    if sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown"):
        return _on_terminal(watch, args.run.resolve().name, args.once, args.interval)
    return _in_lines(watch, args.once, args.interval)


def _on_terminal(watch: Watch, name: str, once: bool, interval: float) -> int:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

    def shown(view: View | None, now: Standing) -> RenderableType:
        trouble = now.code in (EXIT_FAILED, EXIT_HUNG)
        if view is None:
            return Text(f"{name}: {now.state}; no step is logged yet")
        return panel(view, name, state=now.state, trouble=trouble)

    console = Console()
    view, now, _ = watch.look()
    if once:
        console.print(shown(view, now))
        return now.code or 0
    with Live(shown(view, now), console=console, auto_refresh=False) as live:
        while now.code is None:
            time.sleep(interval)
            view, now, _ = watch.look()
            live.update(shown(view, now), refresh=True)
    return now.code


def _in_lines(watch: Watch, once: bool, interval: float) -> int:
    cadence, said = Cadence(), None
    while True:
        view, now, new = watch.look()
        ended = now.code is not None or once
        if view is not None and (ended or (new and cadence.due())) and (text := line(view)) != said:
            print(text, flush=True)
            said = text
        if ended:
            print(now.state, flush=True)
            return now.code or 0
        time.sleep(interval)
