"""A run directory and its life: lock, attempts, status, and the one way in which a run is asked to stop."""

import contextlib
import fcntl
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from mlm_dist.errors import UserError
from mlm_dist.files import DISK_FULL, overwrite, read_json, write_atomically

EXIT_FINISHED, EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED, EXIT_HUNG, EXIT_INTERRUPTED = 0, 1, 2, 75, 76, 130
HEARTBEAT_S, STALE_AFTER_S = 5.0, 60.0
LOOK_S = 3 * HEARTBEAT_S
State = Literal["running", "preempted", "cancelled", "finished", "failed"]


@dataclass
class RunConfig:
    """Which run this is.

    Attributes:
        dir: directory that holds runs.
        name: the run's directory in it; null: the config file's name.
        seed: keys the order of data, masks, dropout and new weights.
        branch_from: begin from the newest checkpoint of this run directory, or from this checkpoint directory, with all that is in it (weights, moments,
            place in the data, step); afterwards that run is not needed any more.
    """

    dir: str = "runs"
    name: str | None = None
    seed: int = 0
    branch_from: str | None = None

    def check(self) -> None:
        """Raises UserError for a name that is no single directory name, or a seed that is none."""
        if not 0 <= self.seed < 2**63:
            raise UserError(f"run.seed: {self.seed} must be a whole number from 0 to 2**63 - 1.")
        if self.name is not None and (not self.name or self.name in (".", "..") or "/" in self.name):
            raise UserError(f"run.name: {self.name!r} must be one directory name; the place goes into run.dir.")

    def path(self) -> Path:
        """The run directory."""
        assert self.name is not None
        return Path(self.dir) / self.name


class RunDirGone(Exception):
    """The run directory is not there any more: there is nowhere to go on."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, whole."""
    write_atomically(path, json.dumps(content, indent=1).encode())


class RunDir:
    """Rank 0's hold on a run directory."""

    def __init__(self, path: Path):
        self.path = path
        self.attempt = 0
        self.died: dict[str, Any] | None = None
        self.last_status: dict[str, Any] | None = None
        self._watcher: _Watcher | None = None
        self._place: tuple[int, int] | None = None

    def prepare(self) -> None:
        """Make the directory and see that it can be written. Raises UserError."""
        try:
            for part in ("", "checkpoints", "logs"):
                (self.path / part).mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
            self._place = _place(self.path)
        except OSError as error:
            raise UserError(
                f"run.dir: {str(self.path)!r} cannot be written ({error.strerror}). Give a directory that you may write as --run.dir."
            ) from error

    def acquire(self, flag: "StopFlag") -> None:
        """Take the lock; keep its heartbeat and let ``stop_request`` set ``flag``, until ``release``.

        Sets ``attempt``, ``last_status`` to what the attempt before left, and ``died`` to
        the stale lock that was taken over, if one was.

        Raises:
            UserError: another start of this run is alive.
        """
        lock = self.path / "lock"
        with self._one_at_a_time():
            old = read_json(lock)
            if lock.exists():
                if _alive(lock, old):
                    who = old or {}
                    raise UserError(
                        f"run {str(self.path)!r} is running already: attempt {who.get('attempt')} as process {who.get('pid')} on {who.get('host')}. "
                        f"Wait for it, or stop it with: mlm-launch cancel {self.path}"
                    )
                self.died = old or {}
                lock.unlink(missing_ok=True)
            self.last_status = read_json(self.path / "status.json")
            previous = (self.last_status or {}).get("attempt", 0)
            self.attempt = max(previous, (old or {}).get("attempt", 0)) + 1
            content = {
                "attempt": self.attempt,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": started_at(os.getpid()),
            }
            try:
                fd = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError as error:
                raise UserError(f"run {str(self.path)!r} was started by someone else at the same moment.") from error
            with os.fdopen(fd, "w") as file:
                json.dump(content, file)
        for leftover in (self.path / "stop_request", self._failure_file()):
            leftover.unlink(missing_ok=True)
        self._watcher = _Watcher(self, flag)
        self._watcher.start()

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Of starts that find the same dead lock, each looks only when the one before has put its own in place. The kernel gives it back at death."""
        with (self.path / ".lock-guard").open("w") as guard:
            with contextlib.suppress(OSError):  # a file system without flock leaves a narrow race
                fcntl.flock(guard, fcntl.LOCK_EX)
            yield

    def heartbeat(self) -> None:
        """Say that this attempt is alive, for readers on other hosts.

        An attempt that stalled for so long that another start took its lock ends here, at once: two would write over each other.
        """
        lock = read_json(self.path / "lock")
        if isinstance(lock, dict) and lock.get("attempt") != self.attempt:
            print(
                f"attempt {self.attempt} of {self.path} ends: attempt {lock.get('attempt')} has taken the run over",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_FAILED)
        with contextlib.suppress(OSError):
            os.utime(self.path / "lock")

    def release(self) -> None:
        """Give the lock back."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None
            # After a long stall another start may have taken it over.
            if (read_json(self.path / "lock") or {}).get("attempt") == self.attempt:
                (self.path / "lock").unlink(missing_ok=True)

    def is_gone(self) -> bool:
        """Whether the directory was removed or moved, or another is in its place, since ``prepare``."""
        try:
            return self._place is not None and _place(self.path) != self._place
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # a file server that does not answer
            return False

    def status(self, state: State, step: int, reason: str = "", requeue: bool = False) -> None:
        """Write status.json, the truth about how the run stands. On a full disk it is written over; a run that goes on does without, if need be.

        Raises:
            OSError: it cannot be written.
        """
        path = self.path / "status.json"
        content = {
            "state": state,
            "requeue": requeue,
            "step": step,
            "reason": reason,
            "attempt": self.attempt,
            "time": time.time(),
        }
        try:
            write_json(path, content)
        except OSError as full:
            if full.errno not in DISK_FULL:
                raise
            with contextlib.suppress(OSError) if state == "running" else contextlib.nullcontext():
                overwrite(path, json.dumps(content).encode())

    def check_identity(
        self, identity: dict[str, Any], guarded: dict[str, Any], allow: list[str]
    ) -> dict[str, list[Any]]:
        """Hold the run to what ``record_identity`` wrote for it; a run that has nothing to lose yet is held to nothing.

        Returns:
            Allowed changes of guarded keys, {key: [old, new]}.

        Raises:
            UserError: an identity key differs, or a guarded one that is not allowed to; shows old and new.
        """
        recorded = read_json(self.path / "identity.json")
        metrics = self.path / "metrics.jsonl"
        if recorded is None or not (
            any(self.path.glob("checkpoints/step_*")) or (metrics.exists() and metrics.stat().st_size)
        ):
            return {}
        if not all(isinstance(recorded.get(part), dict) for part in ("identity", "guarded")):
            raise UserError(
                f"{self.path / 'identity.json'} is damaged; give it back, or start another run with --run.name."
            )
        wrong = differences(recorded["identity"], identity)
        if wrong:
            raise UserError(
                f"run {str(self.path)!r} belongs to a different config:\n"
                + listing(wrong)
                + "\nGive these values back, or start another run with --run.name."
            )
        # A run may be older than a key, which then was at its default.
        changed = differences(recorded["guarded"], {k: v for k, v in guarded.items() if k in recorded["guarded"]})
        refused = {k: v for k, v in changed.items() if k not in allow}
        if refused:
            raise UserError(
                f"run {str(self.path)!r} was started with other values:\n"
                + listing(refused)
                + "\nTo change them on purpose add "
                + " ".join(f"--allow_change {k}" for k in refused)
            )
        return changed

    def record_identity(self, identity: dict[str, Any], guarded: dict[str, Any]) -> None:
        """Tie the directory to this config."""
        write_json(self.path / "identity.json", {"identity": identity, "guarded": guarded})

    def _failure_file(self) -> Path:
        return self.path / "logs" / f"attempt_{self.attempt}.failed"

    def claim_failure(self, reason: str) -> bool:
        """True for the first rank of this attempt that fails: its reason is the run's, and it shows its traceback; the others only say that they follow."""
        try:
            with self._failure_file().open("x") as file:
                file.write(reason)
        except FileExistsError:
            return False
        except OSError:
            return not self.is_gone()  # then the first rank tells why
        return True

    def failed(self, step: int, reason: str) -> None:
        """Write the status of a failure, with the reason of the rank that failed first, whichever rank comes last to write it.

        Nothing, where a later attempt holds the run: this rank slept through the end of its own.
        """
        if (read_json(self.path / "lock") or {}).get("attempt", self.attempt) != self.attempt:
            return
        with contextlib.suppress(OSError):
            reason = self._failure_file().read_text() or reason
        self.status("failed", step, reason)


def _place(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """{key: [old, new]} of the keys of ``new`` that differ; of a value that is itself a dict, its keys."""
    out: dict[str, list[Any]] = {}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            inner = differences(before, {k: value.get(k) for k in sorted({*before, *value})})
            out |= {f"{key}.{k}": v for k, v in inner.items()}
        elif before != value:
            out[key] = [before, value]
    return out


def listing(changed: dict[str, list[Any]]) -> str:
    """What ``differences`` found, a line each."""
    return "\n".join(
        f"  {k}: the run has {_short(old)}, this start has {_short(new)}" for k, (old, new) in changed.items()
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _alive(lock: Path, content: dict[str, Any] | None) -> bool:
    """Whether the attempt that holds the lock lives: on this host by its process, on another by its heartbeat.

    Both stamps that tell the lock's age are the file system's own, so the hosts' clocks do not matter. When that clock was set, a living attempt
    can look dead, or a dead one as if it had written in the future; so then the next heartbeat is waited for.
    """
    if content and content.get("host") == socket.gethostname():
        return same_process(content.get("pid"), content.get("started"))
    guard = lock.with_name(".lock-guard")
    try:
        os.utime(guard)
        seen = lock.stat().st_mtime_ns
        if 0 <= guard.stat().st_mtime_ns - seen < STALE_AFTER_S * 1e9:
            return True
        time.sleep(LOOK_S)
        return lock.stat().st_mtime_ns != seen
    except FileNotFoundError:
        return False


def same_process(pid: Any, started: Any) -> bool:
    """Whether the process of this host that had this number and started then still lives."""
    now = started_at(pid)
    return now is not None and now == started


def started_at(pid: Any) -> int | None:
    """When a process of this host started, in clock ticks since boot; None when it is gone, or dead and not yet waited for."""
    try:
        # The command, in parentheses, may hold anything; state is the first field after it, start time the 20th.
        after_command = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_command[0] in "ZX" else int(after_command[19])


def environment() -> dict[str, Any]:
    """Versions and place, for env.json. Never environment variables wholesale: they hold secrets."""
    packages = {}
    for package in ("mlm-dist", "torch", "transformers", "tokenizers", "deepspeed", "webdataset", "wandb", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        commit = git.stdout.strip()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": packages,
        "commit": commit,
    }


@dataclass
class StopFlag:
    """Whether this rank was asked to stop, by a signal or (rank 0) by the file ``stop_request``, or (rank 0) cannot go on: its directory is gone."""

    wanted: bool = False
    requeue: bool = False
    reason: str = ""
    gone: bool = False

    def ask(self, reason: str, requeue: bool) -> None:
        """Ask for a stop at the next step boundary. Of several, the first reason stays; any of them may ask for a requeue."""
        self.requeue = self.requeue or requeue
        if not self.wanted:
            self.reason, self.wanted = reason, True


@contextlib.contextmanager
def stop_signals(flag: StopFlag) -> Iterator[None]:
    """USR1 asks for a stop with requeue, TERM, INT and HUP for one without; under nohup HUP stays ignored.

    Handlers only set the flag; ranks agree on it in the step's control reduction.
    """

    def handler(number: int, _frame: Any) -> None:
        flag.ask(f"signal {signal.Signals(number).name}", requeue=number == signal.SIGUSR1)

    caught = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    previous = {s: signal.signal(s, handler) for s in caught}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class _Watcher(threading.Thread):
    """Thread of the lock's holder: heartbeat, and a look for the directory and ``stop_request`` each second."""

    def __init__(self, run: RunDir, flag: StopFlag):
        super().__init__(name="run-watcher", daemon=True)
        self.run_dir, self.flag, self._done = run, flag, threading.Event()

    def run(self) -> None:
        """Thread body."""
        last = 0.0
        while not self._done.wait(1.0):
            if time.monotonic() - last > HEARTBEAT_S:
                self.run_dir.heartbeat()
                last = time.monotonic()
            self.flag.gone = self.flag.gone or self.run_dir.is_gone()
            request = read_json(self.run_dir.path / "stop_request")
            if request is not None:
                self.flag.ask(str(request.get("reason", "stop_request")), bool(request.get("requeue", False)))

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self.join()
