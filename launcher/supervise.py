"""Runs a job to its end: passes on requests to stop, tells how it ended, leaves nothing running, here or elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launcher.command import LEASE, LOG_DIR, REPORT_DIR
from launcher.exec import LINGER_S, STOPPED, Report, log_path, read_reports
from launcher.lease import BEAT_S, Lease
from launcher.processes import ProcessTree
from launcher.run_dir import ENDED, RunDir
from mlm_dist.errors import UserError
from mlm_dist.lifecycle import EXIT_HUNG

POLL_S = 0.1
SETTLE_S = 5.0  # in which the reports of other hosts become visible here, and in which their ranks end when told to
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
        """The rank that failed first; the others' failures usually follow from it. Of a run that hung, the first that its watchdog ended."""
        failed = [r for r in self.reports if r.code not in (0, STOPPED)]
        return next((r for r in failed if r.code == EXIT_HUNG), failed[0] if failed else None)


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


# From what the ranks are told of their watcher (environment variables) to the command, its environment and directory.
Job = Callable[[Mapping[str, str]], tuple[Sequence[str], Mapping[str, str], str | None]]


class Supervisor:
    """One job on `ranks` into `run`.

    With `lease` (seconds) the ranks are on other hosts, which share the run's directory; with `part` they are those of
    this host, and the others have launchers of their own.

    The first INT, TERM or HUP writes `run/stop_request` and waits `grace` seconds for the run to checkpoint and end; a
    second one, or the end of the grace time, kills it. USR1, and with `term_requeues` TERM, writes the request with
    `requeue` and kills nothing.
    """

    def __init__(
        self,
        run: RunDir,
        ranks: Sequence[int],
        *,
        grace: float,
        lease: float | None = None,
        part: bool = False,
        show_all_ranks: bool = False,
        term_requeues: bool = False,
    ) -> None:
        self.run = run
        self.ranks = ranks
        self.grace = grace
        self.show_all_ranks = show_all_ranks
        self._lease_s = lease
        self._part = part
        self._lease: Lease | None = None
        self._reports: dict[int, Report] = {}  # by rank, in the order of their ends
        self._holder = run.holder()  # of the run directory before this job began
        self._signals: list[int] = []
        self._requeue_on = {signal.SIGUSR1, *([signal.SIGTERM] if term_requeues else [])}
        self._requeue: int | None = None  # the signal that asked for it
        self._reason: str | None = None  # of the stop asked for, if one was
        self._requested = False  # whether the request lies in the run directory
        self._killed_by: int | None = None

    def supervise(self, job: Job) -> int:
        """Runs `job` and returns the exit code for the user's shell."""
        before = self.run.status_stamp()
        logs = {r: log_path(self.run.logs, r) for r in self.ranks}
        starts = {r: _size(p) for r, p in logs.items()}
        absent = [p for p in (*logs.values(), self.run.logs, self.run.path) if not p.exists()]
        reports_dir = self._make_reports_dir()
        watch = {REPORT_DIR: str(reports_dir)}
        if self._lease_s is not None:
            self._lease = Lease(reports_dir, self.ranks, self._lease_s)
            self._lease.renew()
            watch[LEASE] = str(self._lease_s)
        if not self.show_all_ranks:
            watch[LOG_DIR] = str(self.run.logs.absolute())
        try:
            with self._catch_signals():
                tree = ProcessTree(*job(watch))
                try:
                    self._watch(tree, reports_dir)
                finally:
                    launcher_code = tree.code
                    if self._lease:
                        self._look(self._lease, reports_dir)  # later reports tell of our killing
                        self._end_elsewhere(tree, self._lease, reports_dir)
                    tree.kill()
            if self._lease is None:
                self._reports = {r.rank: r for r in read_reports(reports_dir)}
        finally:
            shutil.rmtree(reports_dir, ignore_errors=True)
            if self._requested:
                self.run.stop_request.unlink(missing_ok=True)  # else the next start would stop at once
        end = Ending(list(self._reports.values()), len(self.ranks), launcher_code, self._state(before), self._killed_by)
        code = exit_code(end)
        output = {
            r.rank: tail(logs[r.rank], starts[r.rank]) for r in end.reports if r.rank and r.code not in (0, STOPPED)
        }
        self._tell(end, code, output)
        _tidy(absent, refused=code == 2)
        return code

    def _make_reports_dir(self) -> Path:
        if self._lease_s is None:
            return Path(tempfile.mkdtemp(prefix="mlm-launch-"))
        try:
            self.run.logs.mkdir(parents=True, exist_ok=True)
            path = Path(tempfile.mkdtemp(prefix=f"launch-{socket.gethostname()}-", dir=self.run.logs.absolute()))
        except OSError as e:
            raise UserError(f"{self.run.path}: cannot make the run's directory ({e})") from None
        return path

    def _state(self, before: tuple[int, int, int] | None) -> str | None:
        """What this attempt wrote into `status.json`."""
        found = self.run.status() if self.run.status_stamp() != before else None
        if found is None or (0 not in self.ranks and found.state not in ENDED):
            return None  # rank 0, which writes it, may end after the ranks here
        return found.state

    def _end_elsewhere(self, tree: ProcessTree, lease: Lease, reports_dir: Path) -> None:
        """Ends what runs on other hosts; says which of them did not confirm it."""
        lease.end()
        deadline = time.monotonic() + LINGER_S
        while running := lease.began.keys() - {r.rank for r in read_reports(reports_dir)}:
            if time.monotonic() > deadline:
                where = ", ".join(sorted({lease.began[r][0] for r in running}))
                say(
                    f"no word of the end of ranks {sorted(running)} on {where}: cut off, they end in {lease.seconds:g} s"
                )
                return
            time.sleep(BEAT_S / 2)
        # The last of its processes there follow within a second, and ssh with them.
        deadline = time.monotonic() + SETTLE_S
        while tree.alive() and time.monotonic() < deadline:
            time.sleep(POLL_S)

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            if number in self._requeue_on:
                self._requeue = number
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
        settled = look = 0.0
        while True:
            tree.reap()
            now = time.monotonic()
            if self._lease and now >= look:
                self._look(self._lease, reports_dir)
                look = now + BEAT_S
                if self._vanished(self._lease):
                    return
            if tree.code is None:
                settled = now + (SETTLE_S if self._lease else 0.0)
            elif not tree.alive() and not self._live_elsewhere():
                return
            if (self._signals or self._requeue) and self._reason is None:
                name = signal.Signals(self._requeue or self._signals[0]).name
                stop_deadline = self._ask_to_stop(tree, f"mlm-launch received {name}", "once more to kill it")
            if len(self._signals) > 1:
                say("killing what is left")
                self._killed_by = self._signals[1]
                return
            if stop_deadline is not None and now > stop_deadline:
                say(f"not ended {self.grace:g} s after it was asked to: killing it")
                self._killed_by = self._signals[0] if self._signals else signal.SIGKILL
                return
            if linger_deadline is None:
                if self._over(tree, reports_dir):
                    # In it the others write down why the run failed; the reports of other hosts come late.
                    failed = LINGER_S / 4 + (2 * BEAT_S if self._lease else 0.0)
                    linger_deadline = now + (failed if tree.code or self._failed() else LINGER_S)
                elif tree.code is not None and now >= settled and self._reason is None:
                    # The ranks do not notice that the launcher above them is gone.
                    stop_deadline = self._ask_to_stop(tree, "the deepspeed launcher died", "the ranks live on for now")
            if linger_deadline is not None and now > linger_deadline:
                return
            self._keep_request(tree)
            time.sleep(POLL_S)

    def _look(self, lease: Lease, reports_dir: Path) -> None:
        """Renews the lease and notes what the ranks on other hosts have written."""
        lease.renew()
        # Of ranks that end together the one whose workers were left running reports last, though it may have ended first.
        self._reports = {r.rank: r for r in read_reports(reports_dir)} or self._reports

    def _failed(self) -> bool:
        return any(r.code not in (0, STOPPED) for r in self._reports.values())

    def _live_elsewhere(self) -> bool:
        """Whether all ranks had begun on other hosts and some still run, though the command that started them is gone."""
        lease = self._lease
        return lease is not None and len(lease.began) == len(self.ranks) > len(self._reports) and not self._failed()

    def _over(self, tree: ProcessTree, reports_dir: Path) -> bool:
        """Whether the ranks have ended or are about to."""
        if self._lease:
            never = tree.code is not None and len(self._lease.began) < len(self.ranks)
            return never or self._failed() or len(self._reports) == len(self.ranks)
        reported = len(list(reports_dir.glob("rank-*.json")))
        return tree.code is not None and (tree.code > 0 or reported == len(self.ranks))

    def _vanished(self, lease: Lease) -> bool:
        """Whether ranks on other hosts are gone without a word; says so."""
        ranks = [r for r in lease.silent() if r not in self._reports]
        for rank in ranks:
            if rank in lease.began:
                say(
                    f"no sign of life from rank {rank} on {lease.began[rank][0]} for {lease.seconds:g} s: ending the run"
                )
            else:
                say(f"rank {rank} has not begun {lease.seconds:g} s after the first: ending the run")
        return bool(ranks)

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
        if holder is None or self._is_ours(tree, *holder):  # else another start's, and ours is about to be refused
            with contextlib.suppress(OSError):
                self.run.request_stop(self._reason, requeue=self._requeue is not None)
                self._requested = True

    def _is_ours(self, tree: ProcessTree, host: str, pid: int) -> bool:
        if self._lease:
            return self._lease.began.get(0) == (host, pid)
        return tree.holds(pid) if 0 in self.ranks else (host, pid) != self._holder  # taken when all ranks had begun

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
            if code == EXIT_HUNG:
                status = self.run.status()
                say(
                    f"{(status and status.reason) or 'the run hangs'}; the run is down, its ranks' stacks are in {self.run.logs}"
                )
                return
            how = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"exit code {code}"
            where = f" on {failure.host}" if self._lease else " of this host's" if self._part else ""
            say(f"rank {failure.rank}{where} failed first ({how}); the run is down")
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


def tail(path: Path, start: int = 0, lines: int = TAIL_LINES) -> list[str]:
    """The last `lines` that were written to `path` after its first `start` bytes; none where it cannot be read."""
    try:
        with path.open("rb") as f:
            f.seek(max(start, _size(path) - (1 << 20)))
            return f.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def check_grace(grace: float) -> None:
    """Raises UserError unless `grace` is a number of seconds to wait."""
    if not 0 <= grace < float("inf"):
        raise UserError(f"--grace {grace}: must be 0 or more seconds")
