"""One rank: runs a program as a child, keeps its output apart and writes down how it ended.

    python -m launcher.exec PROGRAM [ARGS...]      # RANK and the like come from the environment
    srun python -m launcher.exec PROGRAM [ARGS...] # or from the SLURM_* variables of the task
    python -m launcher.exec --packed WORD          # what launcher.command packed for a rank on another host

The deepspeed launcher returns the code of whichever failed rank it looks at first, or 0 when its own child dies of a
signal. So each rank's end is written into LAUNCHER_REPORT_DIR, where the watcher finds who failed first. With
LAUNCHER_LOG_DIR the output of every rank but 0 goes there. With LAUNCHER_LEASE the watcher is on another host, and this
process ends the program when the lease in LAUNCHER_REPORT_DIR does. Without any of them the program runs just as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from launcher.command import GPUS, LEASE, LOG_DIR, PACKED, REPORT_DIR, Call
from launcher.lease import BEAT_S, Tie
from launcher.processes import become_reaper, descendants, kill_descendants
from launcher.topology import interface_towards, slurm_rank, threads_per_rank

STOPPED = 75  # EX_TEMPFAIL: ended on request, with a checkpoint
PR_SET_PDEATHSIG = 1
LINGER_S = 10.0  # for helpers of ranks that have ended, such as an upload; after a failure the tenth of it


@dataclass(frozen=True)
class Report:
    """How a rank ended: its exit code (128 + n for signal n) and when, by its host's monotonic clock in ns."""

    rank: int
    code: int
    time: int
    host: str = ""
    lag: int = 0  # ns from its end to this report, in which what it left running was ended


def write_report(directory: Path, report: Report) -> None:
    """Writes `report` into `directory` in one step."""
    part = directory / f".rank-{report.rank}"
    part.write_text(json.dumps(asdict(report)))
    part.replace(directory / f"rank-{report.rank}.json")


def read_reports(directory: Path) -> list[Report]:
    """All reports in `directory`, of the rank that ended first first: by the clock of their host, or by the file server's
    stamps when they come from several hosts, whose clocks have nothing in common."""
    found = []
    for path in directory.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):  # a shared file system may show the name before the content
            report = Report(**json.loads(path.read_text()))
            found.append((path.stat().st_mtime_ns - report.lag, report))
    one_host = len({report.host for _, report in found}) <= 1
    return [r for _, r in sorted(found, key=lambda f: f[1].time if one_host else f[0])]


def log_path(directory: Path, rank: int) -> Path:
    """Where the output of `rank` goes."""
    return directory / f"rank-{rank:05d}.log"


def _die_with_parent() -> Callable[[], None] | None:
    """For `preexec_fn`: the kernel kills the child when this process dies, however it dies (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # looked up before the fork: between fork and exec as little as possible is done
    parent = os.getpid()

    def set_it() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return set_it


def _open_log(rank: int) -> IO[bytes] | None:
    directory = os.environ.get(LOG_DIR)
    if directory is None or rank == 0:
        return None
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        return log_path(Path(directory), rank).open("ab")
    except OSError:
        return None  # the program itself will say, once, that the run directory cannot be written


def _environment() -> dict[str, str]:
    """The program's: this process's without what is meant for the launcher alone, and with its GPUs or none."""
    env = {k: v for k, v in os.environ.items() if k not in (REPORT_DIR, LOG_DIR, LEASE, GPUS)}
    if env.get("DS_ACCELERATOR") == "cpu":
        # The deepspeed launcher numbers CPU ranks in it, which would show GPUs meant to stay hidden.
        env["CUDA_VISIBLE_DEVICES"] = ""
    elif GPUS in os.environ:
        gpus = os.environ[GPUS].split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[int(slot)] for slot in env["CUDA_VISIBLE_DEVICES"].split(","))
    return env


def _choose_interface() -> None:
    """Sets GLOO_SOCKET_IFNAME, if it is not set, to what leads to the first host.

    Left alone, gloo takes the address that the host's own name stands for, which on many systems is 127.0.1.1.
    """
    meet = os.environ.get("MASTER_ADDR", "localhost")
    if "GLOO_SOCKET_IFNAME" in os.environ or meet in ("localhost", "127.0.0.1"):
        return
    # The first host's name may stand for its loopback there; then the way out of it is the best guess (RFC 5737: nobody's address).
    if interface := interface_towards(meet) or interface_towards("192.0.2.1"):
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def _unpack(word: str) -> list[str]:
    """Takes over directory and environment of the call packed in `word`; its words."""
    call = Call.unpack(word)
    os.environ.update(call.env)
    os.chdir(call.cwd)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads_per_rank(int(os.environ.get("LOCAL_SIZE", "1")), {}))
    return list(call.words)


def _wait(child: subprocess.Popen[bytes], tie: Tie | None) -> int:
    """The program's exit code, 128 + n for signal n; kills it when `tie` no longer holds."""
    if tie is None:
        code = child.wait()
    else:
        tie.begin(child.pid)
        while True:
            try:
                code = child.wait(BEAT_S)
                break
            except subprocess.TimeoutExpired:
                if not tie.holds():
                    child.kill()
    return 128 - code if code < 0 else code


def _relay(pipe: IO[bytes], target: int) -> threading.Thread:
    """Copies what comes from `pipe` to the file `target`, and reads on when ssh is gone: a program that prints goes on."""

    def copy() -> None:
        while data := os.read(pipe.fileno(), 1 << 16):
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(target, data) :]

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _end_helpers(tie: Tie, seconds: float) -> None:
    """Lets what the program left running, such as an upload, go on for `seconds`, then kills it."""
    deadline = time.monotonic() + seconds
    while descendants() and tie.holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    kill_descendants()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its code, but 0 for a reported stop: no launcher shall tear down the other ranks."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        print("usage: python -m launcher.exec PROGRAM [ARGS...]", file=sys.stderr)
        return 2
    host = socket.gethostname()
    try:
        words = _unpack(argv[1]) if argv[0] == PACKED else argv
    except OSError as e:
        print(f"{host}: {e.strerror}: {e.filename}: the hosts must share this directory", file=sys.stderr)
        return 2
    under_slurm = slurm_rank(os.environ)
    os.environ.update(under_slurm)
    _choose_interface()
    rank = int(os.environ.get("RANK", "0"))
    report_dir = os.environ.get(REPORT_DIR)
    tie = None
    if report_dir and LEASE in os.environ:
        become_reaper()  # no watcher is here to find what the program leaves behind
        tie = Tie(Path(report_dir), rank, float(os.environ[LEASE]))
    env = _environment()
    log = _open_log(rank)
    output = subprocess.PIPE if tie and log is None else log
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", *words], env=env, stdout=output, stderr=output, preexec_fn=_die_with_parent()
    )
    relays = [_relay(pipe, fd) for pipe, fd in ((child.stdout, 1), (child.stderr, 2)) if pipe]
    # SLURM sends TERM to the ranks of a job that it preempts. Of a job that its user cancels too, but there it starts nothing again.
    meaning: dict[int, int] = {signal.SIGTERM: signal.SIGUSR1} if under_slurm else {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, frame: child.send_signal(meaning.get(received, received)))
    try:
        code = _wait(child, tie)
    except OSError as e:
        child.kill()
        print(f"{host}: {e.strerror}: {report_dir}: the hosts must share the run's directory", file=sys.stderr)
        return 2
    ended = time.monotonic_ns()
    if tie:
        _end_helpers(tie, LINGER_S if code in (0, STOPPED) else LINGER_S / 10)
    for relay in relays:
        relay.join(timeout=1.0)
    if report_dir is None:
        # The first rank to end would have srun kill the others; how the run ended is in its status.
        return 0 if under_slurm and code == STOPPED else code
    try:
        write_report(Path(report_dir), Report(rank, code, ended, host, time.monotonic_ns() - ended))
    except OSError:
        return code
    return 0 if code == STOPPED else code


if __name__ == "__main__":
    sys.exit(main())
