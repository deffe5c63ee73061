"""Finds the rank that the others wait for in every step, and names the cause.

All ranks of a synchronous step take equally long, so what tells is each rank's own time, without its waiting for others:

- data: how long it waited for its batch;
- compute: forward, backward, optimizer, and what its host does between them;
- communication: how long a message of it takes. The time that a rank spends in collectives says nothing, since in a slow one
  all ranks wait alike; so rank 0 sends each rank a question while all wait for one, and measures when the answer is back.
  That shows a link or a host that delays messages; not one of little bandwidth (``mlm-dist doctor`` measures that), and not
  the link of rank 0, which delays all answers.

On CUDA, waiting that is hidden in overlapped communication counts as compute of the rank that waits.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from mlm_dist.clock import COMMUNICATION, PHASES

CAUSES = ("data", "compute", "communication")
WINDOW = 10  # steps between two looks
LOOKS = 2  # in a row that must agree that a rank is slow, or that it no longer is
QUESTIONS = 2  # of a look, of which the fastest answer counts
SHARE, LEAST_S, DEVIATIONS = 0.1, 0.005, 4.0


@dataclass(frozen=True)
class Straggler:
    """A rank that is slow for one cause.

    Attributes:
        seconds: of the rank, and of the median rank: per step; for communication per message and its answer.
    """

    rank: int
    cause: str
    seconds: float
    median: float


def find(times: np.ndarray) -> list[Straggler]:
    """The slow ranks, by rank.

    A time is slow that exceeds the median of the ranks by a tenth of the step, by 5 ms and by 4 standard deviations (estimated from
    the median absolute deviation, which a few slow ranks do not move). Of an even number of ranks the lower median is taken,
    so that of two ranks one can be slow.

    Args:
        times: [ranks, causes] in seconds, as ``CAUSES``.
    """
    step = float(times[:, :2].sum(1).max())
    found = []
    for column, cause in enumerate(CAUSES):
        mine = times[:, column]
        middle = _median(mine)
        spread = 1.4826 * _median(np.abs(mine - middle))
        limit = max(SHARE * step, LEAST_S, DEVIATIONS * spread)
        found += [
            Straggler(int(r), cause, float(mine[r]), middle) for r in np.flatnonzero(mine - middle > limit).tolist()
        ]
    return sorted(found, key=lambda s: s.rank)


def _median(values: np.ndarray) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


class Control(Protocol):
    """The part of ``distributed.ControlGroup`` that is used here."""

    rank: int
    world_size: int

    def gather(self, obj: Any) -> list[Any] | None: ...

    def ask(self, values: Sequence[float]) -> tuple[list[list[float]], list[float]] | None: ...


class StragglerWatch:
    """Looks at all ranks every ``WINDOW`` steps. Making it is collective.

    Args:
        so_far: seconds since the beginning by phase, of "data" and of "span", the whole; see ``Meter.so_far``.
        say: gets a line for the console, and an event, of each straggler that appears or is gone; on rank 0 only.

    Attributes:
        slowest: for the metrics: whose own time per step, of data and compute, was the longest in the last window, and by
            how much it exceeds the median; empty before the first look, and on other ranks than 0.
    """

    def __init__(
        self, control: Control, so_far: Callable[[], dict[str, float]], say: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._control, self._so_far, self._say = control, so_far, say
        self._hosts = control.gather(socket.gethostname())
        self._last = so_far()
        self._steps = 0
        self._named: set[tuple[int, str]] = set()
        self._changing: dict[tuple[int, str], int] = {}  # looks that found otherwise than is named
        self.slowest: dict[str, Any] = {}

    def step(self) -> None:
        """A step is done. Collective at every ``WINDOW``-th call."""
        self._steps += 1
        if self._steps % WINDOW or self._control.world_size == 1:
            return
        now = self._so_far()
        mine = {k: v - self._last.get(k, 0.0) for k, v in now.items()}
        phases = {p: mine.get(p, 0.0) for p in PHASES}
        between = max(0.0, mine["span"] - mine["data"] - sum(phases.values()))
        compute = sum(phases.values()) - phases[COMMUNICATION] + between
        answers = self._control.ask([mine["data"] / WINDOW, compute / WINDOW])
        trips = [self._control.ask([]) for _ in range(QUESTIONS)]  # all ranks wait for them by now
        self._last = now
        if answers is None:
            return
        times = np.empty((self._control.world_size, len(CAUSES)))
        times[:, :2] = answers[0]
        times[:, 2] = np.min([trip[1] for trip in trips if trip is not None], axis=0)
        times[0, 2] = _median(times[1:, 2])  # it does not ask itself
        self._look(times)

    def _look(self, times: np.ndarray) -> None:
        assert self._hosts is not None
        own = times[:, :2].sum(1)
        rank = int(own.argmax())
        self.slowest = {
            "slowest_rank": rank,
            "slowest_host": self._hosts[rank],
            "slowest_excess": float(own[rank]) - _median(own),
        }
        found = {(s.rank, s.cause): s for s in find(times)}
        for key in sorted({*found, *self._named, *self._changing}):
            if (key in found) == (key in self._named):
                self._changing.pop(key, None)
                continue
            self._changing[key] = self._changing.get(key, 0) + 1
            if self._changing[key] == LOOKS:
                del self._changing[key]
                self._tell(key, found.get(key))

    def _tell(self, key: tuple[int, str], straggler: Straggler | None) -> None:
        assert self._hosts is not None
        rank, cause = key
        who = f"rank {rank} on {self._hosts[rank]}"
        event = {"rank": rank, "host": self._hosts[rank], "cause": cause}
        if straggler is None:
            self._named.discard(key)
            self._say(f"{who} is no longer slow in {cause}", {"kind": "straggler_gone", **event})
            return
        self._named.add(key)
        per = "message" if cause == COMMUNICATION else "step"
        line = f"{who} is slow in {cause}: {straggler.seconds:.3f} s a {per}, the median rank {straggler.median:.3f} s"
        self._say(line, {"kind": "straggler", **asdict(straggler), **event})
