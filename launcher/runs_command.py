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
from launcher.jobs import JobState, NoAnswer
from launcher.run_dir import ENDED, RunDir, find_run
from launcher.supervise import say
from mlm_dist.errors import UserError

FOLLOW_S = 0.5
ASK_S = 10.0  # between questions to SLURM's controller, which all users of a cluster share
SKEW_S = 60.0  # between clocks, when the run's last word is held against SLURM's


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or a name under runs/")


def _states(run: RunDir) -> list[JobState]:
    """All that SLURM knows of the run's jobs. Raises NoAnswer when there are some and it cannot be asked."""
    return [state for lineage in jobs.lineages(jobs.records(run.path)) for state in jobs.job_states(lineage)]


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `status`."""
    _run_argument(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def status(args: argparse.Namespace, _: list[str]) -> int:
    """Say how far a run is and how it ended, from its directory and from SLURM."""
    run = find_run(args.run)
    found, silent = run.status(), ""
    try:
        job = jobs.most_telling(_states(run))
    except NoAnswer as error:
        job, silent = None, f"SLURM cannot be asked: {error}"
    state, note = outcome(found.state if found else None, job, said=run.status_time())
    step, checkpoint = (found.step if found else 0), jobs.newest_step(run.path)
    if args.json:
        facts = asdict(found) if found else {"requeue": False, "step": 0, "reason": ""}
        slurm = {"slurm": asdict(job)} if job else {}
        print(
            json.dumps({**facts, "state": state, "reason": note or facts["reason"], "checkpoint": checkpoint, **slurm})
        )
        return 0
    reason = note or (found.reason if found and state == found.state else "")
    print(f"{run.path}: {state} at step {step}" + (f" ({reason})" if reason else ""))
    if checkpoint:
        print(f"newest checkpoint: step {checkpoint}")
    if job is not None:
        print(
            f"SLURM job {job.job}: {job.state}"
            + (f" ({job.reason})" if job.reason else "")
            + (f" on {job.nodes}" if job.nodes else "")
        )
    if silent:
        print(silent)
    seen = run.last_sign_of_life()
    if state not in ENDED and seen is not None and found is not None:
        print(f"last sign of life {max(0, round(time.time() - seen))} s ago")
    return 0


def outcome(state: str | None, job: JobState | None, said: float | None = None) -> tuple[str, str]:
    """The state of a run whose own word is `state` (None: it has said nothing yet), given at the Unix time `said`, and whose job is as SLURM says; and why.

    A job that SLURM ended could not always write its last word, so SLURM has it, unless the run went on elsewhere.
    """
    if job is not None and job.live:
        if job.state in ("PENDING", "REQUEUED", "CONFIGURING"):
            return "waiting", ""
        return ("starting" if state is None or state in ENDED - {"finished"} else state), ""
    elsewhere = job is not None and None not in (job.end, said) and said > job.end + SKEW_S  # type: ignore[operator]
    if job is None or elsewhere or state == "finished":
        return state or "unknown", ""
    if job.state == "CANCELLED":
        return "cancelled", f"by SLURM: job {job.job} was cancelled"
    if state in ENDED:
        return str(state), ""
    return "failed", f"SLURM: job {job.job} {job.state}"


def add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `logs`."""
    _run_argument(parser)
    parser.add_argument(
        "-n", "--lines", type=int, default=50, metavar="N", help="how many of the last lines (default 50)"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="those of one rank other than 0 (default: the job's log)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written, until the run ends")


def logs(args: argparse.Namespace, _: list[str]) -> int:
    """Print the end of a run's log."""
    if args.lines < 0:
        raise UserError(f"--lines {args.lines}: must be 0 or more")
    run = find_run(args.run)
    path = log_path(run.logs, args.rank) if args.rank else _newest_log(run)
    if path is None or not path.is_file():
        there = sorted(p.name for p in run.logs.glob("*.log")) + sorted(p.name for p in run.logs.glob("*.out"))
        raise UserError(
            f"{run.path}: no such log"
            + (f"; there are {', '.join(there)}" if there else "")
            + (
                ""
                if args.rank
                else "; rank 0's output is in a file only of jobs that `mlm-launch slurm` submitted and that have begun"
            )
        )
    with path.open(errors="replace") as file:
        sys.stdout.writelines(deque(file, args.lines))
        while args.follow:
            found = run.status()
            said = found is not None and found.state in ENDED
            over = said and not _goes_on(run)
            sys.stdout.writelines(file)
            sys.stdout.flush()
            if over:
                break
            time.sleep(ASK_S if said else FOLLOW_S)
    return 0


def _newest_log(run: RunDir) -> Path | None:
    return max(run.logs.glob("slurm-*.out"), key=lambda p: p.stat().st_mtime, default=None)


def _goes_on(run: RunDir) -> bool:
    """Whether SLURM will go on with a run that says that it has ended."""
    try:
        return any(state.live for state in _states(run))
    except NoAnswer:
        found = run.status()
        return found is not None and found.requeue


def add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cancel`."""
    _run_argument(parser)
    parser.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait up to S seconds for its end")


def cancel(args: argparse.Namespace, _: list[str]) -> int:
    """Let a run write a checkpoint and end, and take its waiting SLURM jobs from the queue."""
    run = find_run(args.run)
    running, taken = _cancel_jobs(run)
    found, before = run.status(), run.status_stamp()
    if not running and (taken or (found is not None and found.state in ENDED and not run.is_held())):
        if not taken:
            print(f"{run.path}: already {found.state if found else 'ended'}; nothing to cancel")
        return 0
    for job in running:
        if run.is_starting(job):
            # It has not come so far that it could write a checkpoint, or hear a request.
            _scancel(job)
            print(f"{run.path}: SLURM job {job}, which was still starting, is cancelled")
            return 0
    _request(run)
    print(f"{run.path}: asked to write a checkpoint and end")
    deadline = time.monotonic() + args.wait
    while args.wait > 0:
        found = run.status()
        if found is not None and found.state in ENDED and run.status_stamp() != before:
            print(f"{run.path}: {found.state} at step {found.step}")
            return 0
        if time.monotonic() > deadline:
            say(f"{run.path}: still running after {args.wait:g} s")
            return 1
        if not run.stop_request.exists() and run.is_held():
            _request(run)  # a start that had just begun has cleared it
        time.sleep(0.2)
    return 0


def _request(run: RunDir) -> None:
    """Over a request that is there: that of a time limit would have the job requeued."""
    try:
        run.request_stop("mlm-launch cancel")
    except OSError as e:
        raise UserError(f"{run.path}: cannot write the request to stop ({e})") from None


def _cancel_jobs(run: RunDir) -> tuple[list[str], bool]:
    """Takes the run's waiting jobs from the queue, and has none of its jobs begin or be requeued any more; those that run, and whether any waited."""
    running, taken = [], False
    for lineage in jobs.lineages(jobs.records(run.path)):
        try:
            states = [state for state in jobs.job_states(lineage) if state.live]
        except NoAnswer as error:
            raise UserError(
                f"{run.path}: SLURM job {lineage} may wait or run, and SLURM cannot be asked: {error}"
            ) from None
        if not states:
            continue
        try:
            jobs.record(run.path, "cancel", lineage=lineage)
        except OSError as error:
            raise UserError(f"{run.path}: cannot be written ({error.strerror})") from None
        running += [state.job for state in states if state.state not in ("PENDING", "REQUEUED", "COMPLETING")]
        if any(state.state == "PENDING" for state in states):
            taken = True
            _scancel("--state=PENDING", lineage)
            print(f"{run.path}: SLURM job {lineage}: what waited is taken from the queue")
    return running, taken


def _scancel(*words: str) -> None:
    try:
        done = subprocess.run(["scancel", *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"scancel {' '.join(words)}: {error}") from None
    if done.returncode:
        raise UserError(f"scancel {' '.join(words)}: {done.stderr.strip()}")
