"""One rank: runs a program as a child, keeps its output apart and writes down how it ended.

    python -m launcher.exec PROGRAM [ARGS...]      # RANK and the like come from the environment
    srun python -m launcher.exec PROGRAM [ARGS...] # or from the SLURM_* variables of the task

The deepspeed launcher returns the code of whichever failed rank it looks at first, or 0 when its own child dies of a
signal. So each rank's end is written into LAUNCHER_REPORT_DIR, where the watcher finds who failed first. With
LAUNCHER_LOG_DIR the output of every rank but 0 goes there. Without either the program runs just as it is.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from launcher.command import LOG_DIR, REPORT_DIR
from launcher.topology import slurm_rank

STOPPED = 75  # EX_TEMPFAIL: ended on request, with a checkpoint
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Report:
    """How a rank ended: its exit code (128 + n for signal n) and when, by this host's monotonic clock in ns."""

    rank: int
    code: int
    time: int


def write_report(directory: Path, report: Report) -> None:
    """Writes `report` into `directory` in one step."""
    part = directory / f".rank-{report.rank}"
    part.write_text(json.dumps(asdict(report)))
    part.replace(directory / f"rank-{report.rank}.json")


def read_reports(directory: Path) -> list[Report]:
    """All reports in `directory`, the earliest first."""
    return sorted((Report(**json.loads(p.read_text())) for p in directory.glob("rank-*.json")), key=lambda r: r.time)


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
    directory = os.environ.pop(LOG_DIR, None)
    if directory is None or rank == 0:
        return None
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        return log_path(Path(directory), rank).open("ab")
    except OSError:
        return None  # the program itself will say, once, that the run directory cannot be written


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its code, but 0 for a reported stop: no launcher shall tear down the other ranks."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        print("usage: python -m launcher.exec PROGRAM [ARGS...]", file=sys.stderr)
        return 2
    under_slurm = slurm_rank(os.environ)
    os.environ.update(under_slurm)
    rank = int(os.environ.get("RANK", "0"))
    report_dir = os.environ.pop(REPORT_DIR, None)
    env = dict(os.environ)
    if env.get("DS_ACCELERATOR") == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = (
            ""  # the deepspeed launcher numbers CPU ranks in it, which would show GPUs meant to stay hidden
        )
    log = _open_log(rank)
    env.pop(LOG_DIR, None)
    command = [sys.executable, "-u", "-m", *argv]
    child = subprocess.Popen(command, env=env, stdout=log, stderr=log, preexec_fn=_die_with_parent())
    # SLURM sends TERM to the ranks of a job that it preempts. Of a job that its user cancels too, but there it starts nothing again.
    meaning = {signal.SIGTERM: signal.SIGUSR1} if under_slurm else {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, frame: child.send_signal(meaning.get(received, received)))
    code = child.wait()
    code = 128 - code if code < 0 else code
    if report_dir is None:
        # The first rank to end would have srun kill the others; how the run ended is in its status.
        return 0 if under_slurm and code == STOPPED else code
    try:
        write_report(Path(report_dir), Report(rank, code, time.monotonic_ns()))
    except OSError:
        return code
    return 0 if code == STOPPED else code


if __name__ == "__main__":
    sys.exit(main())
