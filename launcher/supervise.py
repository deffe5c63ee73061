"""Runs a job on this machine to its end: passes on requests to stop, tells how it ended, leaves nothing running."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launcher.command import LOG_DIR, REPORT_DIR
from launcher.exec import STOPPED, Report, log_path, read_reports
from launcher.processes import ProcessTree
from launcher.run_dir import RunDir
from mlm_dist.errors import UserError

POLL_S = 0.1
LINGER_S = 10.0  # for helpers of ranks that have all ended, such as an upload; after a failure the tenth of it
TAIL_LINES = 200


@dataclass(frozen=True)
class Ending:
    """What is known when nothing runs any more."""

    reports: Sequence[Report]  # the earliest first; a killed watcher of a rank leaves none
    ranks: int
    launcher_code: int | None  # the deepspeed launcher's own
    state: str | None  # status.json, if this attempt wrote it
    killed_by: int | None  # we killed what was left, because of this signal

    @property
    def first_failure(self) -> Report | None:
        """The rank that failed first; the others' failures usually follow from it."""
        return next((r for r in self.reports if r.code not in (0, STOPPED)), None)


def exit_code(end: Ending) -> int:
    """0 finished, 75 stopped with a checkpoint, else the code of the rank that failed first (128 + n for signal n).

    The run's own last word comes before any process's code, and the ranks' codes before the launcher's, which is 0 when
    its own child dies of a signal.
    """
    if end.state in ("preempted", "cancelled"):
        return STOPPED
    if end.state == "finished":
        return 0
    if end.first_failure:
        return end.first_failure.code
    if end.killed_by is not None:
        return 128 + end.killed_by
    if len(end.reports) < end.ranks:  # not every rank was there to tell
        code = end.launcher_code or 0
        if code < 0:
            return 128 - code
        if code > 192:  # 256 - n: what the deepspeed launcher makes of a child that died of signal n
            return 128 + 256 - code
        return code or 1
    if any(r.code == STOPPED for r in end.reports):
        return STOPPED
    return 1 if end.state in ("running", "failed") else 0


def say(message: str) -> None:
    """Prints on stderr for the user; a terminal that is gone is no reason to leave a job alone."""
    with contextlib.suppress(OSError):
        print(f"mlm-launch: {message}", file=sys.stderr, flush=True)


class Supervisor:
    """One job: `command` with `env` on `ranks` ranks into `run`.

    The first INT, TERM or HUP writes `run/stop_request` and waits `grace` seconds for the run to checkpoint and end; a
    second one, or the end of the grace time, kills it. USR1 writes the request with `requeue` and kills nothing.
    """

    def __init__(self, run: RunDir, ranks: int, *, grace: float, show_all_ranks: bool = False) -> None:
        self.run = run
        self.ranks = ranks
        self.grace = grace
        self.show_all_ranks = show_all_ranks
        self._signals: list[int] = []
        self._requeue = False
        self._reason: str | None = None  # of the stop asked for, if one was
        self._requested = False  # whether the request lies in the run directory
        self._killed_by: int | None = None

    def supervise(self, command: Sequence[str], env: Mapping[str, str]) -> int:
        """Runs `command` and returns the exit code for the user's shell."""
        before = self.run.status_stamp()
        logs = [log_path(self.run.logs, r) for r in range(self.ranks)]
        starts = [_size(p) for p in logs]
        absent = [p for p in (*logs, self.run.logs, self.run.path) if not p.exists()]
        reports_dir = Path(tempfile.mkdtemp(prefix="mlm-launch-"))
        env = {**env, REPORT_DIR: str(reports_dir)}
        if not self.show_all_ranks:
            env[LOG_DIR] = str(self.run.logs.absolute())
        try:
            with self._catch_signals():
                tree = ProcessTree(command, env)
                try:
                    self._watch(tree, reports_dir)
                finally:
                    tree.kill()
            reports = read_reports(reports_dir)
        finally:
            shutil.rmtree(reports_dir, ignore_errors=True)
            if self._requested:
                self.run.stop_request.unlink(missing_ok=True)  # else the next start would stop at once
        state = self.run.status() if self.run.status_stamp() != before else None
        end = Ending(reports, self.ranks, tree.code, state.state if state else None, self._killed_by)
        code = exit_code(end)
        output = {
            r.rank: _tail(logs[r.rank], starts[r.rank]) for r in end.reports if r.rank and r.code not in (0, STOPPED)
        }
        self._tell(end, code, output)
        _tidy(absent, refused=code == 2)
        return code

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGUSR1:
                self._requeue = True
            else:
                self._signals.append(number)

        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
        # Under nohup a hang-up stays ignored.
        old = {n: signal.signal(n, note) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _watch(self, tree: ProcessTree, reports_dir: Path) -> None:
        """Returns when all has ended by itself or when what is left is to be killed."""
        stop_deadline = linger_deadline = None
        while True:
            tree.reap()
            if tree.code is not None and not tree.alive():
                return
            now = time.monotonic()
            if (self._signals or self._requeue) and self._reason is None:
                name = "SIGUSR1" if self._requeue else signal.Signals(self._signals[0]).name
                stop_deadline = self._ask_to_stop(tree, f"mlm-launch received {name}", "once more to kill it")
            if len(self._signals) > 1:
                say("killing what is left")
                self._killed_by = self._signals[1]
                return
            if stop_deadline is not None and now > stop_deadline:
                say(f"not ended {self.grace:g} s after it was asked to: killing it")
                self._killed_by = self._signals[0] if self._signals else signal.SIGKILL
                return
            if tree.code is not None and linger_deadline is None:
                over = tree.code > 0 or len(list(reports_dir.glob("rank-*.json"))) == self.ranks
                if over:
                    linger_deadline = now + (LINGER_S / 10 if tree.code else LINGER_S)
                elif self._reason is None:
                    # The ranks do not notice that the launcher above them is gone.
                    stop_deadline = self._ask_to_stop(tree, "the deepspeed launcher died", "the ranks live on for now")
            if linger_deadline is not None and now > linger_deadline:
                return
            self._keep_request(tree)
            time.sleep(POLL_S)

    def _ask_to_stop(self, tree: ProcessTree, reason: str, hint: str) -> float:
        self._reason = reason
        self._keep_request(tree)
        say(f"{reason}: asking the run to write a checkpoint and end ({self.run.stop_request}); {hint}")
        return time.monotonic() + self.grace

    def _keep_request(self, tree: ProcessTree) -> None:
        """Writes the request, again if need be: a run just starting has no directory yet, or clears an old request."""
        if self._reason is None or self.run.stop_request.exists():
            return
        holder = self.run.holder()
        if holder is None or tree.holds(
            holder
        ):  # else the directory is another start's, and ours is about to be refused
            with contextlib.suppress(OSError):
                self.run.request_stop(self._reason, requeue=self._requeue)
                self._requested = True

    def _tell(self, end: Ending, code: int, output: Mapping[int, Sequence[str]]) -> None:
        """Says how it ended; `output` is what failed ranks other than 0 wrote, which the user has not seen."""
        failure = end.first_failure
        if code == STOPPED:
            status = self.run.status() if end.state else None
            at = f" at step {status.step}" if status else ""
            say(f"stopped{at} with a checkpoint; start the same command again to go on")
        elif failure and code == failure.code:
            if code == 2 and any(r.rank == 0 and r.code == 2 for r in end.reports):
                return  # every rank finds the same mistake in what the user gave, and rank 0 has said so
            # The rank that shows the traceback need not be the first to be gone.
            traced = (r.rank for r in end.reports if any(x.startswith("Traceback ") for x in output.get(r.rank, ())))
            for line in output.get(next(traced, failure.rank), ()):
                with contextlib.suppress(OSError):
                    print(line, file=sys.stderr)
            how = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"exit code {code}"
            say(f"rank {failure.rank} failed first ({how}); the run is down")
        elif failure:
            say(f"rank {failure.rank} ended with code {failure.code} after the run itself had ended well")
        elif code:
            say(f"the run ended with code {code}, its state being {end.state or 'unknown'}")


def _tidy(made: Sequence[Path], *, refused: bool) -> None:
    """Of the paths made by this job removes empty logs, or all logs if it was refused, then empty directories."""
    for path in made:
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            elif refused or _size(path) == 0:
                path.unlink()


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _tail(path: Path, start: int) -> list[str]:
    """The last lines that were written to `path` after its first `start` bytes."""
    try:
        with path.open("rb") as f:
            f.seek(max(start, _size(path) - (1 << 20)))
            return f.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError:
        return []


def check_grace(grace: float) -> None:
    """Raises UserError unless `grace` is a number of seconds to wait."""
    if not 0 <= grace < float("inf"):
        raise UserError(f"--grace {grace}: must be 0 or more seconds")
