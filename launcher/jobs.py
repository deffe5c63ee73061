"""What a run directory records of the SLURM jobs that worked on it (`jobs.jsonl`), and what SLURM says of them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_dist.files import read_json_lines

CRASHES = 3  # in a row, without a checkpoint further on
CLEAN = frozenset({"finished", "preempted", "cancelled"})
LIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "STOPPED", "RESIZING"})


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of `jobs.jsonl`, the oldest first: {event: submitted | began | ended, job, lineage, time, ...}."""
    return list(read_json_lines(run / "jobs.jsonl"))


def record(run: Path, event: str, **facts: Any) -> None:
    """Appends a line to `jobs.jsonl`, making the directory if need be. Raises OSError."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")


def newest_job(run: Path) -> str | None:
    """The job that was submitted or began last; of an array, the element that began last."""
    return next((str(r["job"]) for r in reversed(records(run)) if "job" in r), None)


def newest_step(run: Path) -> int:
    """The step of the newest committed checkpoint; 0 without one."""
    commits = (run / "checkpoints").glob("step_*/COMMIT")
    return max((int(m[1]) for c in commits if (m := re.fullmatch(r"step_(\d+)", c.parent.name))), default=0)


def crash_loop(lines: Sequence[dict[str, Any]], lineage: str) -> int | None:
    """The checkpoint step at which the job crashed CRASHES times in a row or more; None when it did not.

    Each start counts as a crash until its clean end is recorded: a start whose node died leaves no end. Other jobs do not count:
    whoever submits again has, one hopes, mended something.
    """
    steps: list[int] = []
    for line in lines:
        if line.get("lineage") != lineage:
            continue
        if line["event"] == "began":
            steps.append(line["step"])
        elif line["event"] == "ended" and line["state"] in CLEAN:
            steps.clear()
    last = steps[-CRASHES:]
    return last[0] if len(last) == CRASHES and len(set(last)) == 1 else None


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job: its state (`PENDING`, `RUNNING`, `CANCELLED`, ...), the reason it waits for, its nodes."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def live(self) -> bool:
        """Whether it runs, or will."""
        return self.state in LIVE


def job_state(job: str) -> JobState | None:
    """Asks the controller, then the accounting database, which remembers longer; None when neither knows the job or is here."""
    found = [parse_scontrol(line) for line in _output(["scontrol", "show", "job", "-o", job]).splitlines()]
    states = [state for state in found if state is not None]
    if states:
        # Of an array all elements are listed: one that runs says more than those that wait, and the others are over.
        rank = {"RUNNING": 2}
        return max(states, key=lambda s: (rank.get(s.state, int(s.live)), s.job == job))
    for line in _output(["sacct", "-X", "-n", "-P", "-j", job, "-o", "State,Reason,NodeList"]).splitlines():
        state, reason, nodes = [*line.split("|"), "", ""][:3]
        return JobState(job, state.split()[0], reason, nodes)
    return None


def parse_scontrol(line: str) -> JobState | None:
    """A line of `scontrol show job -o`; None when it is none."""
    fields = dict(re.findall(r"(\w+)=(\S*)", line))
    if "JobState" not in fields:
        return None
    blank = {"None", "(null)", ""}
    reason, nodes = fields.get("Reason", ""), fields.get("NodeList", "")
    return JobState(
        fields["JobId"], fields["JobState"], "" if reason in blank else reason, "" if nodes in blank else nodes
    )


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
