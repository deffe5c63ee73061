"""A run directory and its life: lock, attempts, status, and the one way in which a run is asked to stop."""

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil

from mlm_dist.errors import UserError

EXIT_FINISHED, EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED = 0, 1, 2, 75
HEARTBEAT_S, STALE_AFTER_S = 5.0, 60.0
State = Literal["running", "preempted", "cancelled", "finished", "failed"]


@dataclass
class RunConfig:
    """Which run this is.

    Attributes:
        dir: directory that holds runs.
        name: the run's directory in it; null: the config file's name.
        seed: keys the order of data, masks, dropout and new weights.
    """

    dir: str = "runs"
    name: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for a name that is no single directory name."""
        if self.name is not None and (not self.name or self.name in (".", "..") or "/" in self.name):
            raise UserError(f"run.name: {self.name!r} must be one directory name; the place goes into run.dir.")

    def path(self) -> Path:
        """The run directory."""
        assert self.name is not None
        return Path(self.dir) / self.name


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The file's JSON, or None when it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


class RunDir:
    """Rank 0's hold on a run directory."""

    def __init__(self, path: Path):
        self.path = path
        self.attempt = 0
        self.died: dict[str, Any] | None = None
        self.last_status: dict[str, Any] | None = None
        self._held = False

    def prepare(self) -> None:
        """Make the directory and see that it can be written. Raises UserError."""
        try:
            for part in ("", "checkpoints", "logs"):
                (self.path / part).mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"run.dir: {str(self.path)!r} cannot be written ({error.strerror}). Give a directory that you may write as --run.dir."
            ) from error

    def acquire(self) -> None:
        """Take the lock; sets ``attempt``, ``last_status`` to what the attempt before left, and ``died`` to the stale lock that was taken over, if one was.

        Raises:
            UserError: another start of this run is alive.
        """
        lock = self.path / "lock"
        old = read_json(lock)
        if lock.exists():
            if _alive(lock, old):
                who = old or {}
                raise UserError(
                    f"run {str(self.path)!r} is running already: attempt {who.get('attempt')} as process {who.get('pid')} on {who.get('host')}. "
                    f"Wait for it, or stop it with: mlm-launch cancel {self.path}"
                )
            self.died = old or {}
            self._remove_dead(lock, old)
        self.last_status = read_json(self.path / "status.json")
        previous = (self.last_status or {}).get("attempt", 0)
        self.attempt = max(previous, (old or {}).get("attempt", 0)) + 1
        content = {
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "job": os.environ.get("MLM_JOB_ID"),
        }
        try:
            fd = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError as error:
            raise self._raced() from error
        with os.fdopen(fd, "w") as file:
            json.dump(content, file)
        self._held = True
        (self.path / "stop_request").unlink(missing_ok=True)

    def _raced(self) -> UserError:
        return UserError(f"run {str(self.path)!r} was started by someone else at the same moment.")

    def _remove_dead(self, lock: Path, old: dict[str, Any] | None) -> None:
        """Remove the lock that was found dead. Of two starts that do so at once the slower may have moved the other's new lock: it gives it back."""
        aside = self.path / f".lock-died-{socket.gethostname()}-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            lock.rename(aside)
            if read_json(aside) != old:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, lock)
                aside.unlink()
                raise self._raced()
            aside.unlink()

    def heartbeat(self) -> None:
        """Say that this attempt is alive, for readers on other hosts."""
        with contextlib.suppress(OSError):
            os.utime(self.path / "lock")

    def release(self) -> None:
        """Give the lock back."""
        if self._held:
            # After a long stall another start may have taken it over.
            if (read_json(self.path / "lock") or {}).get("attempt") == self.attempt:
                (self.path / "lock").unlink(missing_ok=True)
            self._held = False

    def status(self, state: State, step: int, reason: str = "", requeue: bool = False) -> None:
        """Write status.json, the truth about how the run stands."""
        write_json(
            self.path / "status.json",
            {
                "state": state,
                "requeue": requeue,
                "step": step,
                "reason": reason,
                "attempt": self.attempt,
                "time": time.time(),
            },
        )

    def check_identity(
        self, identity: dict[str, Any], guarded: dict[str, Any], allow: list[str]
    ) -> dict[str, list[Any]]:
        """Hold the run to what its directory was made with; the first attempt records it.

        Returns:
            Allowed changes of guarded keys, {key: [old, new]}.

        Raises:
            UserError: an identity key differs, or a guarded one that is not allowed to; shows old and new.
        """
        path = self.path / "identity.json"
        recorded = read_json(path)
        if recorded is None:
            write_json(path, {"identity": identity, "guarded": guarded})
            return {}
        wrong = {k: [recorded["identity"].get(k), v] for k, v in identity.items() if recorded["identity"].get(k) != v}
        if wrong:
            raise UserError(
                f"run {str(self.path)!r} belongs to a different config:\n"
                + "\n".join(
                    f"  {k}: the run has {_short(old)}, this start has {_short(new)}" for k, (old, new) in wrong.items()
                )
                + "\nGive these values back, or start another run with --run.name."
            )
        changed = {k: [recorded["guarded"].get(k), v] for k, v in guarded.items() if recorded["guarded"].get(k) != v}
        refused = {k: v for k, v in changed.items() if k not in allow}
        if refused:
            raise UserError(
                f"run {str(self.path)!r} was started with other values:\n"
                + "\n".join(
                    f"  {k}: the run has {_short(old)}, this start has {_short(new)}"
                    for k, (old, new) in refused.items()
                )
                + "\nTo change them on purpose add "
                + " ".join(f"--allow_change {k}" for k in refused)
            )
        if changed:
            write_json(path, {"identity": identity, "guarded": guarded})
        return changed

    def claim_failure(self) -> bool:
        """True for the first rank of this attempt that fails: it shows its traceback, the others only say that they follow."""
        try:
            os.close(
                os.open(
                    self.path / "logs" / f"attempt_{self.attempt}.failed", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644
                )
            )
        except FileExistsError:
            return False
        except OSError:
            return True
        return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _alive(lock: Path, content: dict[str, Any] | None) -> bool:
    if content and content.get("host") == socket.gethostname():
        try:
            process = psutil.Process(content["pid"])
            # A zombie is dead; nobody has asked for its exit code yet.
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - content["started"]) < 1.0
        except psutil.NoSuchProcess:
            return False
    try:
        return time.time() - lock.stat().st_mtime < STALE_AFTER_S
    except FileNotFoundError:
        return False


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
    """Whether this rank was asked to stop, by a signal or (rank 0) by the file ``stop_request``."""

    wanted: bool = False
    requeue: bool = False
    reason: str = ""

    def ask(self, reason: str, requeue: bool) -> None:
        """Ask for a stop at the next step boundary. Of several, the first reason stays; any of them may ask for a requeue."""
        self.requeue = self.requeue or requeue
        if not self.wanted:
            self.reason, self.wanted = reason, True


@contextlib.contextmanager
def stop_signals(flag: StopFlag) -> Iterator[None]:
    """USR1 asks for a stop with requeue, TERM and INT for one without. Handlers only set the flag; ranks agree on it in the step's control reduction."""

    def handler(number: int, _frame: Any) -> None:
        flag.ask(f"signal {signal.Signals(number).name}", requeue=number == signal.SIGUSR1)

    previous = {s: signal.signal(s, handler) for s in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class Watcher(threading.Thread):
    """Rank 0's thread: heartbeat, and a look for ``stop_request`` each second."""

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
            path = self.run_dir.path / "stop_request"
            if path.exists():
                request = read_json(path)
                if request is not None:
                    self.flag.ask(str(request.get("reason", "stop_request")), bool(request.get("requeue", False)))

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self.join()
