"""Ends a run that no longer moves, and says which rank it waits for, where that rank is and why.

Each rank posts where it stands to the job's c10d store, over a connection of its own. A rank that has not moved for
``train.timeout`` reads what all have posted; when none of them moves, the first to see it leaves a verdict in the store,
by which every rank writes down its stacks and ends with code 76. The same place takes the reason of a rank that fails, so
that the others end too where no collective would tell them (NCCL).

Nothing compares the clocks of two hosts: a post says for how long its rank has not moved, by that rank's own clock.

Two threads, since a call of the store can block for ever: one talks to it, the other only looks at what came of that, and
ends the process. Neither can run while C code holds the GIL, or while the process is stopped. For that there are a timer of
faulthandler, which then writes the stacks, and one of the kernel, which then ends the process (SIGALRM); the threads put off
both each time that they run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch.distributed as dist

from mlm_dist.clock import COMMUNICATION, Position
from mlm_dist.json_lines import JsonLines
from mlm_dist.lifecycle import EXIT_FAILED, EXIT_HUNG, RunDir

# Building, compiling, the first step and a checkpoint may take this long even where train.timeout is less.
PATIENCE_S = 1800.0
PATIENT = ("start", "checkpoint")
# A rank whose peer failed, or whose store is gone, has this long to find out by itself what its own error is.
FAILURE_GRACE_S = 10.0
MOST_NAMED = 8
# Periods without a turn of its threads after which the process must have been stopped, and its time begins anew.
STOPPED = 10


def collective_timeout(timeout_s: float) -> float:
    """Seconds after which a collective may end by itself: the watchdog comes first, since it knows more."""
    return 1.25 * timeout_s + 30.0


@dataclass(frozen=True)
class Post:
    """What a rank says of itself.

    Attributes:
        beat: counts posts; one that does not grow is of a rank that cannot run, or is cut off.
        step: the step that it is in, from 1.
        phase, count: see ``clock.Position``.
        idle: seconds since it moved.
        limit: seconds that it may be idle here.
    """

    rank: int
    host: str
    beat: int
    step: int
    phase: str
    count: int
    idle: float
    limit: float


@dataclass(frozen=True)
class Verdict:
    """Why the job ends; the first one that reaches the store is everybody's.

    Attributes:
        rank: who tells of it: of a hang the first rank that can and is not behind, of a failure the one that failed.
        behind: the posts of the ranks that are waited for; ``silent``: those of them that no longer post.
    """

    kind: Literal["hang", "failure"]
    code: int
    reason: str
    rank: int
    behind: list[dict[str, Any]]
    silent: list[int]


def judge(before: Sequence[Post], now: Sequence[Post]) -> Verdict | None:
    """The verdict on all ranks' posts, read twice, many posts apart; None while any of them moves."""
    silent = [p.rank for p, earlier in zip(now, before, strict=True) if p.beat == earlier.beat]
    heard = [p for p in now if p.rank not in silent]
    limit = max((p.limit for p in heard), default=0.0)  # what a silent one last said may be of a phase that is over
    if not heard or any(p.idle < limit for p in heard):
        return None
    behind = blame(now, silent)
    idle = min(p.idle for p in heard)
    # What holds a rank that is behind, a disk perhaps, may hold its word too.
    speaker = next((p for p in heard if p not in behind), heard[0])
    return Verdict(
        "hang", EXIT_HUNG, _reason(now, behind, silent, idle), speaker.rank, [asdict(p) for p in behind], silent
    )


def blame(posts: Sequence[Post], silent: Sequence[int]) -> list[Post]:
    """Whom the job waits for: ranks that are not heard of, else those that do not wait for others, else those that have
    come least far. All, where nothing tells them apart."""
    if silent:
        return [p for p in posts if p.rank in silent]
    if working := [p for p in posts if p.phase != COMMUNICATION]:
        return working
    least = min((p.step, p.count) for p in posts)
    return [p for p in posts if (p.step, p.count) == least]


def _reason(posts: Sequence[Post], behind: Sequence[Post], silent: Sequence[int], idle: float) -> str:
    named = [
        f"rank {p.rank} on {p.host} "
        + ("does not answer and was last heard of" if p.rank in silent else "is")
        + f" in step {p.step}, {p.phase}"
        for p in behind[:MOST_NAMED]
    ]
    if len(behind) > MOST_NAMED:
        named.append(f"and {len(behind) - MOST_NAMED} more")
    others = [p for p in posts if p not in behind]
    waiting = ""
    if others:
        waiting = f"; the other{'s wait' if len(others) > 1 else ' waits'} in step {others[0].step}, {others[0].phase}"
    elif len(posts) > 1:
        named = [f"all {len(posts)} ranks are in step {posts[0].step}, {posts[0].phase}"]
    return f"the run hangs: nothing has moved for {idle:.0f} s (train.timeout): {', '.join(named)}{waiting}"


class Watchdog:
    """Watches one rank of an attempt from ``start`` to ``stop``.

    Args:
        position: where the rank is, as its loop says.
        timeout: seconds without a move of any rank after which the run ends.
        run: its directory, for status, events and stacks.
        end: leaves the process with a code, without tidying; called from a thread of the watchdog.
    """

    def __init__(self, position: Position, timeout: float, *, run: RunDir, end: Callable[[int], None]) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._position, self._timeout, self._run, self._end = position, timeout, run, end
        self._period = min(1.0, timeout / 10)
        self._host = socket.gethostname()
        store: Any = dist.distributed_c10d._get_default_store()
        self._theirs = store
        self._connect()
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        self._where = f"{getattr(store, 'host', '')}:{getattr(store, 'port', '')}"
        self._beat = 0
        self._moved: tuple[Any, float] = (None, time.monotonic())  # where it was, since when
        self._turn = time.monotonic()  # when the thread that looks last did
        self._answered = time.monotonic()  # when the store last did
        self._lost: tuple[str, float] | None = None  # the connection's error, and since when
        self._before: tuple[float, list[Post]] | None = None  # all posts, when this rank first had a suspicion
        self._mine: Verdict | None = None  # of this rank, to be left in the store
        self._verdict: Verdict | None = None
        self._settled = threading.Event()  # self._mine is there, or something else was before it
        self._wake, self._done = threading.Event(), threading.Event()
        self._failing = False
        self._path = run.path / "logs" / f"attempt_{run.attempt}_rank_{self.rank}.stacks"
        self._threads = [
            threading.Thread(target=self._talk, name="watchdog-store", daemon=True),
            threading.Thread(target=self._watch, name="watchdog", daemon=True),
        ]

    def start(self) -> None:
        """Begin. The first post is in the store on return; a hang before every rank came so far is one of the collectives'."""
        self._file = self._path.open("w")
        self._post()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """The rank has done its part. A second call does nothing."""
        if self._done.is_set():
            return
        self._done.set()
        self._wake.set()
        self._threads[1].join()
        signal.alarm(0)
        self._drop_stacks()

    def _drop_stacks(self) -> None:
        """Take away the file for stacks, unless there are some."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        with contextlib.suppress(OSError):
            if self._path.stat().st_size == 0:
                self._path.unlink()

    def failing(self, reason: str, code: int) -> Verdict | None:
        """Tell the other ranks that this one is about to end with ``code``. Does not return when they were hanging before:
        then its error comes of their end, and so does its own.

        Returns:
            The failure that came first, of this rank or of another; None where the store does not say.
        """
        if not self._threads[1].is_alive():  # not started, or done
            return None
        self._failing = True
        self._mine = Verdict("failure", code, reason, self.rank, [], [])
        self._wake.set()
        self._settled.wait(FAILURE_GRACE_S / 2)
        if self._verdict is not None and self._verdict.kind == "hang":
            self._threads[1].join()
        self.stop()
        return self._verdict

    def let_others_read(self) -> None:
        """The store ends with rank 0's process: its last wait, when all else is done."""
        if self.rank == 0 and self.world_size > 1 and self._failing:
            time.sleep(1.5 * self._period)

    # ---- the thread that talks to the store ----

    def _talk(self) -> None:
        while not self._done.is_set() and self._verdict is None:
            try:
                self._exchange()
                self._answered, self._lost = time.monotonic(), None
            except RuntimeError as error:  # torch's DistStoreError and DistNetworkError
                self._lost = self._lost or (str(error).partition("\n")[0], time.monotonic())
                self._settled.set()  # for nothing more is heard, unless it comes back
                self._reconnect()
            self._wake.wait(self._period)
            self._wake.clear()
        self._settled.set()

    def _exchange(self) -> None:
        self._post()
        if self._store.check(["end"]):
            self._learn(self._store.get("end"))
        elif mine := self._mine or self._judge():
            self._learn(self._store.compare_set("end", "", json.dumps(asdict(mine))))

    def _connect(self) -> None:
        """A connection to the store, not that of the process groups: one that waits for a rank keeps the others' calls waiting."""
        self._store = dist.PrefixStore(f"watchdog/{self._run.attempt}", self._theirs.clone())

    def _reconnect(self) -> None:
        """Another connection in place of one that broke, where the store is still there. Retried at the next turn."""
        host, _, port = self._where.rpartition(":")
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            # torch would try for as long as a collective may take.
            socket.create_connection((host, int(port)), timeout=self._period).close()
            self._connect()
            self._settled.clear()

    def _learn(self, found: bytes) -> None:
        self._verdict = Verdict(**json.loads(found))
        self._settled.set()

    def _post(self) -> None:
        self._beat += 1
        p, idle = self._position, time.monotonic() - self._moved[1]
        post = Post(self.rank, self._host, self._beat, p.step + 1, p.phase, p.count, round(idle, 3), self._limit())
        self._store.set(str(self.rank), json.dumps(asdict(post)))

    def _judge(self) -> Verdict | None:
        """The verdict, where it is time for one. Everybody's posts are read when this rank has been idle for half of its limit, and
        from the end of it on: who has not posted in between is silent."""
        now, limit = time.monotonic(), self._limit()
        if now - self._turn > STOPPED * self._period:  # nor could this process move
            self._before = None
            return None
        # The first rank judges, unless it is the one that hangs.
        idle = now - self._moved[1] - (0 if self.rank == 0 else 5 + min(self.rank, 8)) * self._period
        if idle < limit / 2:
            self._before = None
        if idle < limit / 2 or (self._before is not None and idle < limit):
            return None
        posts = self._posts(limit)
        if self._before is None or now - self._before[0] > limit:
            self._before = now, posts
        return judge(self._before[1], posts) if now - self._before[0] > 0.4 * limit else None

    def _posts(self, limit: float) -> list[Post]:
        """What every rank last said; a rank that has not said anything yet is one that does not get any further."""
        keys = [str(rank) for rank in range(self.world_size)]
        there = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
        said = dict(zip(there, self._store.multi_get(there), strict=True))
        return [
            Post(**json.loads(said[key])) if key in said else Post(rank, "a host unknown", 0, 0, "start", 0, 0.0, limit)
            for rank, key in enumerate(keys)
        ]

    # ---- the thread that ends the process ----

    def _limit(self) -> float:
        p = self._position
        return max(self._timeout, PATIENCE_S) if not p.settled or p.phase in PATIENT else self._timeout

    def _watch(self) -> None:
        while not self._done.wait(self._period / 2):
            now, at = time.monotonic(), (self._position.step, self._position.phase, self._position.count)
            was_stopped = now - self._turn > STOPPED * self._period
            if at != self._moved[0] or was_stopped:
                self._moved = at, now
            if was_stopped:
                self._answered = now
            self._turn = now
            self._put_off()
            idle = now - self._moved[1]
            verdict = self._verdict
            if verdict is not None and verdict.kind == "hang":
                self._hang(verdict, speaks=self.rank == verdict.rank)
            elif verdict is not None and not self._failing:
                if not self._done.wait(FAILURE_GRACE_S) and not self._failing:
                    self._follow(verdict)
            elif self._lost and idle > FAILURE_GRACE_S and now - self._lost[1] > FAILURE_GRACE_S and not self._failing:
                why = f"the job's store at {self._where}, in rank 0's process, is gone or cut off ({self._lost[0]})"
                self._follow(Verdict("failure", EXIT_FAILED, why, self.rank, [], []))
            elif min(idle, now - self._answered) > self._limit() + 20 * self._period:
                self._cut_off(idle)

    def _put_off(self) -> None:
        """The two timers that need no GIL. Other ranks judge a silent one before they fire, and end after its stacks are written."""
        limit = self._limit()
        signal.alarm(math.ceil(limit + 40 * self._period + FAILURE_GRACE_S))
        with contextlib.suppress(RuntimeError):  # no thread more is allowed here; the alarm needs none
            faulthandler.dump_traceback_later(limit + 3 * self._period, file=self._file)

    def _cut_off(self, idle: float) -> None:
        p = self._position
        reason = (
            f"the run hangs: the job's store at {self._where} (rank 0's host) has not answered rank {self.rank} on {self._host} for {idle:.0f} s "
            f"(train.timeout): rank 0 is stopped, or the network between them is cut; rank {self.rank} is in step {p.step + 1}, {p.phase}"
        )
        behind = [{"rank": 0, "host": self._where.rpartition(":")[0]}]
        self._hang(Verdict("hang", EXIT_HUNG, reason, self.rank, behind, [0]), speaks=True)

    def _hang(self, verdict: Verdict, *, speaks: bool) -> None:
        """Leave every trace and end. Where even that hangs, on a file system that is gone, the alarm ends the process."""
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(math.ceil(20 * self._period + 2 * FAILURE_GRACE_S))
        is_behind = any(p["rank"] == self.rank for p in verdict.behind)
        line = f"error: {verdict.reason}" if speaks or is_behind else f"rank {self.rank} ends: the run hangs"
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            print(line, file=sys.stderr, flush=True)
            if is_behind:
                faulthandler.dump_traceback(sys.stderr)
        if speaks:
            self._record(verdict)
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(self._file)
        # Until all have read the verdict, and a rank that is not heard of has had time to write its stacks.
        # Rank 0 is the last to end, and the store with it.
        time.sleep(((5 if verdict.silent else 3) + 2 * (self.rank == 0)) * self._period)
        self._end(verdict.code)

    def _record(self, verdict: Verdict) -> None:
        step = self._position.step
        with contextlib.suppress(OSError):
            if not self._run.claim_failure(verdict.reason):
                return  # of ranks that are cut off from each other, each finds the same
            self._run.failed(step, verdict.reason)
            event = {"kind": "hang", "step": step, "reason": verdict.reason, "behind": verdict.behind}
            events = JsonLines(self._run.path / "events.jsonl")
            events.append({"time": time.time(), "attempt": self._run.attempt, **event}, sync=True)

    def _follow(self, verdict: Verdict) -> None:
        """End after another rank's failure that no collective tells of."""
        signal.alarm(math.ceil(2 * FAILURE_GRACE_S))
        with contextlib.suppress(OSError, ValueError):
            print(f"rank {self.rank} ends after another rank's failure ({verdict.reason})", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self._run.claim_failure(verdict.reason)
            self._run.failed(self._position.step, verdict.reason)
        self._drop_stacks()
        self._end(verdict.code)
