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
from launcher.run_dir import RunDir, resolve
from launcher.topology import SlurmJob, slurm_job
from mlm_dist.errors import UserError
from mlm_dist.lifecycle import HEARTBEAT_S, STALE_AFTER_S

REQUEUE = 85  # the job is to be put back into the queue (no exit code of a program, nor 128 + a signal)
USER_ERROR = 2
REASON = "SLURM's signal: the time limit is near, or the job is preempted"
TAIL_LINES = 40


def begin(run: RunDir, job: SlurmJob) -> int:
    """Records that the job begins; refuses, with 2, a job that SLURM has restarted into a crash loop."""
    lines = jobs.records(run.path)
    step = jobs.crash_loop(lines, job.lineage)
    if not job.is_first and step is not None:
        _say(_looping(step))
        return USER_ERROR
    if not job.is_first:
        _outwait_lock(run, job, next((r["lineage"] for r in reversed(lines) if r["event"] == "began"), None))
    reports = report_dir(run, job)
    shutil.rmtree(reports, ignore_errors=True)
    try:
        reports.mkdir(parents=True)
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


def stop(run: RunDir, job: SlurmJob, poll_s: float = 1.0) -> int:
    """Writes `stop_request`, until the verdict: a run that is just starting clears the request that it finds."""
    while report_dir(run, job).exists():
        if not run.stop_request.exists() and _is_ours(run, job):
            with contextlib.suppress(OSError):
                run.request_stop(REASON, requeue=True)
        time.sleep(poll_s)
    return 0


def _outwait_lock(run: RunDir, job: SlurmJob, before: str | None, poll_s: float = 1.0) -> None:
    """Lets the lock of an earlier start that SLURM ended be taken over; `before` is the lineage of the job that began last.

    On the nodes of this job nothing of an earlier start is left. A rank 0 on another node may be cut off rather than dead, so its
    lock has to grow old, which a rank 0 that lives does not let it.
    """
    deadline = time.monotonic() + STALE_AFTER_S + HEARTBEAT_S
    while (holder := run.holder()) and holder[0] != socket.gethostname() and time.monotonic() < deadline:
        if before == job.lineage and holder[0] in job.nodes:
            run.age_lock()
        if run.heartbeat_age() > STALE_AFTER_S:
            return
        time.sleep(poll_s)


def _is_ours(run: RunDir, job: SlurmJob) -> bool:
    """Whether no job on other nodes holds the run."""
    holder = run.holder()
    return holder is None or holder[0] in job.nodes


def verdict(run: RunDir, job: SlurmJob, code: int) -> int:
    """Says how the ranks ended and records it; returns the batch script's exit code, or REQUEUE.

    0: finished, or the next element of the job's array goes on; 75: stopped for good; 2: the user's mistake; else `code`.
    A crash is requeued unless it is the third in a row from the same checkpoint.
    """
    began: dict[str, Any] = next(
        (r for r in reversed(jobs.records(run.path)) if r["event"] == "began" and r.get("job") == job.job_id), {}
    )
    status = run.status()
    fresh = run.status_stamp() != (tuple(began["status"]) if began.get("status") else None)
    state = status.state if status is not None and (fresh or status.state == "finished") else None
    if state not in jobs.CLEAN or (state == "finished" and code and not fresh):
        state = "refused" if code == USER_ERROR else "crashed"
    jobs.record(run.path, "ended", job=job.job_id, lineage=job.lineage, state=state, code=code)
    reports = report_dir(run, job)
    failures = [r for r in read_reports(reports) if r.code not in (0, STOPPED)]
    shutil.rmtree(reports, ignore_errors=True)
    if state in jobs.CLEAN:
        assert status is not None
        if state == "finished":
            return 0
        _say(f"{state} at step {status.step} with a checkpoint ({status.reason})")
        if state == "cancelled" or not status.requeue:
            return STOPPED
        return REQUEUE if job.is_last else 0
    _show(failures, run.logs)
    if state == "refused":
        return USER_ERROR
    step = jobs.crash_loop(jobs.records(run.path), job.lineage)
    if step is None:
        _say(f"the run ended with code {code} and will be started again from its last checkpoint")
        return REQUEUE
    _say(_looping(step))
    return code or 1


def report_dir(run: RunDir, job: SlurmJob) -> Path:
    """Where the ranks of a job report how they ended."""
    return run.logs / f"job-{job.job_id}"


def _looping(step: int) -> str:
    return (
        f"the run crashed {jobs.CRASHES} times in a row "
        + (f"on the way from the checkpoint of step {step}" if step else "before its first checkpoint")
        + ": it is not started again. Look at the messages above, mend what is wrong and submit it once more."
    )


def _show(failures: Sequence[Report], logs: Path) -> None:
    """What failed ranks other than 0 wrote last; rank 0 wrote into the job's own log."""
    for report in failures:
        _say(f"rank {report.rank} ended with code {report.code}")
        path = log_path(logs, report.rank)
        if report.rank and path.exists():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - (1 << 16)))
                print("\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]), file=sys.stderr)


def _say(message: str) -> None:
    print(f"mlm-launch: {message}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m launcher.batch", allow_abbrev=False)
    parser.add_argument("action", choices=("begin", "stop", "verdict"))
    parser.add_argument("--code", type=int, default=0)
    args = parser.parse_args(words[:split])
    program = argparse.ArgumentParser(prog="train.sbatch", allow_abbrev=False, add_help=False)
    program.add_argument("--config", type=Path)
    known, overrides = program.parse_known_args(words[split + 1 :])
    try:
        if known.config is None:
            raise UserError("--config: missing. Give a run config, for example --config recipes/bert_base.yaml.")
        job = slurm_job(os.environ)
        if job is None:
            raise UserError("no SLURM job here (SLURM_JOB_ID is not set); submit slurm/train.sbatch with sbatch")
        run = resolve(known.config, overrides, os.environ)
        if args.action == "begin":
            return begin(run, job)
        return stop(run, job) if args.action == "stop" else verdict(run, job, args.code)
    except UserError as error:
        _say(str(error))
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
