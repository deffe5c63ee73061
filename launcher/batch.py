"""What the batch script `slurm/train.sbatch` asks for, on the first node of a SLURM job.

    python -m launcher.batch begin   -- ARGS          before the ranks start; prints the run directory
    python -m launcher.batch stop    -- ARGS          on SLURM's signal; asks the run to write a checkpoint and end
    python -m launcher.batch verdict --code C -- ARGS after the ranks have ended with code C

ARGS are the program's. How the run ended is read from the run directory; no exit code of a launcher tells it (the deepspeed
launcher returns 0 when its child dies of a signal).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import jobs
from launcher.exec import STOPPED, Report, log_path, read_reports
from launcher.run_dir import RunDir, program_config, resolve, split_program
from launcher.supervise import say, tail
from launcher.topology import SlurmJob, slurm_job
from mlm_dist.errors import UserError
from mlm_dist.lifecycle import HEARTBEAT_S, STALE_AFTER_S

# Codes for the batch script alone; neither a program's nor 128 + a signal.
DONE, REQUEUE = 84, 85  # nothing is left to do; the job is to be put back into the queue
USER_ERROR = 2
REASON = "SLURM's signal: the time limit is near, or the job is preempted"
TAIL_LINES = 40


def begin(run: RunDir, job: SlurmJob) -> int:
    """Records that the job begins and prints the run directory. Or says why there is nothing to begin: DONE when an earlier element of the
    array finished the run, 75 when it was cancelled, 2 when SLURM has restarted it into a crash loop."""
    every = jobs.records(run.path)
    lines = [line for line in every if line["lineage"] == job.lineage]
    if jobs.is_cancelled(lines, job.lineage):
        say("cancelled: this job does not begin")
        return STOPPED
    if not job.is_first:
        if any(line["event"] == "ended" and line.get("state") == "finished" for line in lines):
            say(f"run {run.path} is finished; nothing to do")
            return DONE
        if loop := jobs.crash_loop(lines, job.lineage):
            say(_looping(loop))
            return USER_ERROR
        _outwait_lock(run, job, every)
    for line in lines:  # what a job that was cancelled or lost left behind
        shutil.rmtree(run.job_reports(str(line.get("job"))), ignore_errors=True)
    try:
        run.job_reports(job.job_id).mkdir(parents=True, exist_ok=True)
        jobs.record(
            run.path,
            "began",
            job=job.job_id,
            lineage=job.lineage,
            restarts=job.restarts,
            host=socket.gethostname(),
            step=jobs.newest_step(run.path),
            status=run.status_stamp(),
        )
    except OSError as error:
        raise UserError(
            f"run.dir: {str(run.path)!r} cannot be written ({error.strerror}). Give a directory that every node may write as --run.dir."
        ) from None
    print(run.path)
    return 0


def _outwait_lock(run: RunDir, job: SlurmJob, lines: Sequence[dict[str, Any]], poll_s: float = 1.0) -> None:
    """Lets the lock of an earlier start that SLURM ended be taken over.

    On the nodes of this job nothing of an earlier start is left. A rank 0 on another node may be cut off rather than dead, so its
    lock has to grow old, which a rank 0 that lives does not let it.
    """
    before = next((line["lineage"] for line in reversed(lines) if line["event"] == "began"), None)
    nodes = {_short(name) for name in job.nodes}
    deadline = time.monotonic() + STALE_AFTER_S + HEARTBEAT_S
    while (holder := run.holder()) and holder[0] != socket.gethostname() and time.monotonic() < deadline:
        if before == job.lineage and _short(holder[0]) in nodes:
            run.age_lock()
        if not run.is_held():
            return
        time.sleep(poll_s)


def _short(host: str) -> str:
    """SLURM's name of a node is often that of its host without the domain."""
    return host.split(".")[0]


def stop(run: RunDir, job: SlurmJob, poll_s: float = 1.0) -> int:
    """Writes `stop_request`, until the verdict: a run that is just starting clears the request that it finds."""
    while run.job_reports(job.job_id).exists():
        if not run.stop_request.exists():
            with contextlib.suppress(OSError):
                run.request_stop(REASON, requeue=True)
        time.sleep(poll_s)
    return 0


def verdict(run: RunDir, job: SlurmJob, code: int, *, early: bool = False) -> int:
    """Says how the ranks ended and records it; returns the batch script's exit code, or REQUEUE.

    0: finished, or the next element of the job's array goes on; 75: stopped for good; 2: the user's mistake; else `code`.
    A crash is requeued unless the job is in a crash loop, or was cancelled. `early`: SLURM's signal came before there were ranks.
    """
    lines = jobs.records(run.path)
    state = "preempted" if early else _state(run, job, lines, code)
    try:
        jobs.record(run.path, "ended", job=job.job_id, lineage=job.lineage, state=state, code=code)
    except OSError as error:
        say(f"{run.path / 'jobs.jsonl'} cannot be written ({error.strerror})")
    reports = run.job_reports(job.job_id)
    failures = [r for r in read_reports(reports) if r.code not in (0, STOPPED)]
    shutil.rmtree(reports, ignore_errors=True)
    if state == "finished":
        return 0
    status = run.status()
    cancelled = jobs.is_cancelled(lines, job.lineage)
    if state in jobs.CLEAN:
        if status is not None and not early:
            say(f"{state} at step {status.step} with a checkpoint ({status.reason})")
        if cancelled or state == "cancelled":
            return STOPPED
        return REQUEUE if job.is_last else 0
    _show(failures, run.logs)
    if state == "refused":
        return USER_ERROR
    loop = jobs.crash_loop([*lines, {"event": "ended", "lineage": job.lineage, "state": state}], job.lineage)
    if cancelled or loop:
        say(_looping(loop) if loop else "the run crashed after it was cancelled: it is not started again")
        return code or 1
    say(f"the run ended with code {code}; the job asks to be requeued, to go on from the last checkpoint")
    return REQUEUE


def _state(run: RunDir, job: SlurmJob, lines: Sequence[dict[str, Any]], code: int) -> str:
    """finished, preempted, cancelled, refused or crashed: by the run's own word, if it said one since the job began."""
    mine = [line for line in lines if line["event"] == "began" and line.get("job") == job.job_id]
    stamp = mine[-1].get("status") if mine else None
    status, fresh = run.status(), run.status_stamp() != (tuple(stamp) if stamp else None)
    # A finished run that is started again writes nothing.
    if status and status.state in jobs.CLEAN and (fresh or (status.state == "finished" and code == 0)):
        return "cancelled" if status.state == "preempted" and not status.requeue else status.state
    return "refused" if code == USER_ERROR else "crashed"


def _looping(loop: jobs.Loop) -> str:
    crashed = loop.crashes >= jobs.CRASHES
    return (
        (
            f"the run crashed {loop.crashes} times in a row "
            if crashed
            else f"the job began {loop.starts} times in a row "
        )
        + (f"on the way from the checkpoint of step {loop.step}" if loop.step else "before its first checkpoint")
        + ": it is not started again. Look at the messages above, mend what is wrong and submit it once more."
    )


def _show(failures: Sequence[Report], logs: Path) -> None:
    """What failed ranks other than 0 wrote last; rank 0 wrote into the job's own log."""
    for report in failures:
        say(f"rank {report.rank} ended with code {report.code}")
        for line in tail(log_path(logs, report.rank), lines=TAIL_LINES) if report.rank else ():
            print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module; returns the exit code."""
    words, program = split_program(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m launcher.batch", allow_abbrev=False)
    parser.add_argument("action", choices=("begin", "stop", "verdict"))
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--early", action="store_true")
    args = parser.parse_args(words)
    try:
        config, overrides = program_config(program)
        job = slurm_job(os.environ)
        if job is None:
            raise UserError("no SLURM job here (SLURM_JOB_ID is not set); submit slurm/train.sbatch with sbatch")
        run = resolve(config, overrides, os.environ)
        if args.action == "begin":
            return begin(run, job)
        return stop(run, job) if args.action == "stop" else verdict(run, job, args.code, early=args.early)
    except UserError as error:
        say(str(error))
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
