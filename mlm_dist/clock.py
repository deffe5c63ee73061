"""Where a rank is, and where the time of a step goes: forward, backward, optimizer, communication, without waiting for the device but when it is read."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

COMMUNICATION = "communication"
PHASES = ("forward", "backward", "optimizer", COMMUNICATION)
# Of deepspeed.comm's back end: what moves data between ranks.
_COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "broadcast",
    "inference_all_reduce",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


class Position:
    """Where a rank is: written by its loop at the price of some attributes, read by its watchdog's thread.

    Attributes:
        step: steps done.
        phase: "start", "data", one of PHASES, "validation", "checkpoint", "closing", or "loop" between them.
        count: phases entered and left; two ranks that did the same have the same.
        settled: a step of this attempt is done, so that the next ones should take no longer.
    """

    def __init__(self) -> None:
        self.step, self.phase, self.count, self.settled = 0, "start", 0, False

    def enter(self, phase: str) -> str:
        """Go over to another phase; returns the one before."""
        before, self.phase = self.phase, phase
        self.count += 1
        return before

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """What happens inside is ``phase``."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)


class StepClock:
    """Adds up time by phase. A phase inside another is taken out of the outer one.

    On CPU it is the host's time. On CUDA events mark the stream, so nothing is waited for until ``read``; what runs on
    another stream than the outer phase's goes on beside it, and is counted but not taken out.
    """

    def __init__(self, device: torch.device, position: Position | None = None) -> None:
        self.position = position or Position()
        self._cuda = device.type == "cuda"
        self._device = device
        self._open: list[tuple[str, Any]] = []  # (phase, its stream)
        self._since: Any = None
        self._paused = False
        self._spans: list[tuple[str, Any, Any]] = []
        self._totals: dict[str, float] = defaultdict(float)
        self._read: dict[str, float] = {}  # the totals at the last read
        self._pool: list[torch.cuda.Event] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside counts as ``name``, and is where the rank is."""
        before = self.position.enter(name)
        try:
            with self._timed(name):
                yield
        finally:
            self.position.enter(before)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if self._paused:
            yield
            return
        stream = torch.cuda.current_stream(self._device) if self._cuda else None
        if self._open and self._open[-1][1] != stream:
            begun = self._now()
            try:
                yield
            finally:
                self._spans.append((name, begun, self._now()))
            return
        self._end_span()
        self._open.append((name, stream))
        self._since = self._now()
        try:
            yield
        finally:
            self._end_span()
            self._open.pop()
            self._since = self._now() if self._open else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        assert not self._open
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last call, in which no phase may be open. Waits for the device."""
        assert not self._open
        if self._cuda:
            torch.cuda.synchronize(self._device)
        before, self._read = self._read, self.so_far()
        self._since = None
        changed = {name: total - before.get(name, 0.0) for name, total in self._read.items()}
        return {name: seconds for name, seconds in changed.items() if seconds}

    def so_far(self) -> dict[str, float]:
        """Seconds by phase since the beginning, of what the device has done by now; waits for nothing."""
        left = []
        for span in self._spans:
            name, begun, ended = span
            if self._cuda and not ended.query():
                left.append(span)
                continue
            self._totals[name] += begun.elapsed_time(ended) / 1e3 if self._cuda else ended - begun
            if self._cuda:
                self._pool += [begun, ended]
        self._spans = left
        return dict(self._totals)

    def _end_span(self) -> None:
        # An event ends one span and another begins the next: each goes back to the pool once.
        if self._open:
            self._spans.append((self._open[-1][0], self._since, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class _Work:
    """An asynchronous collective whose wait counts as communication."""

    def __init__(self, work: Any, clock: StepClock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.phase(COMMUNICATION):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class _TimedBackend:
    """deepspeed.comm's back end with its collectives timed."""

    def __init__(self, backend: Any, clock: StepClock) -> None:
        self.backend, self._clock = backend, clock

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.backend, name)
        if name not in _COLLECTIVES:
            return value

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._clock.phase(COMMUNICATION):
                work = value(*args, **kwargs)
            return _Work(work, self._clock) if hasattr(work, "wait") else work

        return timed


@contextmanager
def timed_collectives(clock: StepClock) -> Iterator[None]:
    """Inside, what DeepSpeed sends between ranks counts as communication. It has no hook for that which does not also wait for the device."""
    from deepspeed.comm import comm

    plain = comm.cdb
    comm.cdb = _TimedBackend(plain, clock)
    try:
        yield
    finally:
        comm.cdb = plain
