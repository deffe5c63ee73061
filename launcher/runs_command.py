"""`mlm-launch status`, `logs` and `cancel`: looks at runs and stops them, wherever they run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

from launcher import jobs
from launcher.exec import log_path
from launcher.jobs import JobState, job_state
from launcher.run_dir import ENDED, RunDir, find_run
from mlm_dist.errors import UserError

FOLLOW_S = 0.5


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or a name under runs/")


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `status`."""
    _run_argument(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def status(args: argparse.Namespace, _: list[str]) -> int:
    """Says how far a run is and how it ended, from its directory and from SLURM."""
    run = find_run(args.run)
    found = run.status()
    job = _job(run)
    state, note = outcome(found.state if found else None, job)
    step, checkpoint = (found.step if found else 0), jobs.newest_step(run.path)
    if args.json:
        facts = asdict(found) if found else {"requeue": False, "step": 0, "reason": ""}
        slurm = {"slurm": asdict(job)} if job else {}
        print(json.dumps({**facts, "state": state, "checkpoint": checkpoint, **slurm}))
        return 0
    reason = note or (found.reason if found else "")
    print(f"{run.path}: {state} at step {step}" + (f" ({reason})" if reason else ""))
    if checkpoint:
        print(f"newest checkpoint: step {checkpoint}")
    if job is not None:
        print(
            f"SLURM job {job.job}: {job.state}"
            + (f" ({job.reason})" if job.reason else "")
            + (f" on {job.nodes}" if job.nodes else "")
        )
    seen = run.last_sign_of_life()
    if state not in ENDED and seen is not None and found is not None:
        print(f"last sign of life {max(0, round(time.time() - seen))} s ago")
    return 0


def outcome(state: str | None, job: JobState | None) -> tuple[str, str]:
    """The state of a run whose own word is `state` (None: it has said nothing yet) and whose job is as SLURM says; and why.

    A job that SLURM ended could not always write its last word, so SLURM has it.
    """
    if job is not None and job.state == "CANCELLED" and state != "finished":
        return "cancelled", f"by SLURM: job {job.job} was cancelled"
    if job is None or state in ("finished", "cancelled", "failed"):
        return state or "unknown", ""
    if job.live:
        waiting = job.state in ("PENDING", "REQUEUED", "CONFIGURING")
        return ("waiting" if waiting else state or "starting"), ""
    if state == "preempted":
        return state, ""
    return "failed", f"SLURM: job {job.job} {job.state}"


def _job(run: RunDir) -> JobState | None:
    job = jobs.newest_job(run.path)
    return None if job is None else job_state(job)


def add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `logs`."""
    _run_argument(parser)
    parser.add_argument(
        "-n", "--lines", type=int, default=50, metavar="N", help="how many of the last lines (default 50)"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="those of one rank other than 0 (default: the job's log)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written, until the run ends")


def logs(args: argparse.Namespace, _: list[str]) -> int:
    """Prints the end of a run's log."""
    if args.lines < 0:
        raise UserError(f"--lines {args.lines}: must be 0 or more")
    run = find_run(args.run)
    path = log_path(run.logs, args.rank) if args.rank else _newest_log(run)
    if path is None or not path.is_file():
        there = sorted(p.name for p in run.logs.glob("*.log")) + sorted(p.name for p in run.logs.glob("*.out"))
        raise UserError(
            f"{run.path}: no such log"
            + (f"; there are {', '.join(there)}" if there else "")
            + ("" if args.rank else "; under mlm-launch local rank 0 writes to the terminal")
        )
    with path.open(errors="replace") as file:
        sys.stdout.writelines(deque(file, args.lines))
        while args.follow:
            ended = _has_ended(run)
            sys.stdout.writelines(file)
            sys.stdout.flush()
            if ended:
                break
            time.sleep(FOLLOW_S)
    return 0


def _newest_log(run: RunDir) -> Path | None:
    return max(run.logs.glob("slurm-*.out"), key=lambda p: p.stat().st_mtime, default=None)


def _has_ended(run: RunDir) -> bool:
    found = run.status()
    return found is not None and found.state in ENDED and not found.requeue


def add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cancel`."""
    _run_argument(parser)
    parser.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait up to S seconds for its end")


def cancel(args: argparse.Namespace, _: list[str]) -> int:
    """Lets a run write a checkpoint and end, and takes its waiting SLURM jobs from the queue."""
    run = find_run(args.run)
    waiting = _cancel_waiting(run)
    for name in waiting:
        print(f"{run.path}: SLURM job {name} taken from the queue")
    found, job = run.status(), _job(run)
    live = job is not None and job.live
    if not live and (waiting or (found is not None and found.state in ENDED)):
        if not waiting:
            print(f"{run.path}: already {found.state if found else 'ended'}; nothing to cancel")
        return 0
    if job is not None and live and run.holder() is None:
        # It has not come so far that it could write a checkpoint, or hear a request.
        subprocess.run(["scancel", job.job], timeout=30)
        print(f"{run.path}: SLURM job {job.job}, which was still starting, is cancelled")
        return 0
    deadline = time.monotonic() + args.wait
    asked = False
    while True:
        # Again if need be: a run that is just starting clears the request that it finds.
        if not run.stop_request.exists():
            try:
                run.request_stop("mlm-launch cancel")
            except OSError as error:
                raise UserError(f"{run.path}: cannot write the request to stop ({error})") from None
        if not asked:
            print(f"{run.path}: asked to write a checkpoint and end")
            asked = True
        if args.wait <= 0:
            return 0
        found = run.status()
        if found is not None and found.state in ENDED:
            run.stop_request.unlink(missing_ok=True)
            print(f"{run.path}: {found.state} at step {found.step}")
            return 0
        if time.monotonic() > deadline:
            print(f"mlm-launch: {run.path}: still running after {args.wait:g} s", file=sys.stderr)
            return 1
        time.sleep(0.2)


def _cancel_waiting(run: RunDir) -> list[str]:
    """Takes the run's pending jobs and array elements from the queue; returns their numbers."""
    found = []
    for lineage in dict.fromkeys(str(r["lineage"]) for r in jobs.records(run.path) if "lineage" in r):
        state = job_state(lineage)
        if state is None or not state.live:
            continue
        command = ["squeue", "--noheader", "--array", "--states=PENDING", "--format=%i", f"--jobs={lineage}"]
        waiting = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
        if waiting and subprocess.run(["scancel", "--state=PENDING", lineage], timeout=30).returncode == 0:
            found += waiting
    return found
