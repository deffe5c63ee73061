"""What a run directory records of the SLURM jobs that worked on it (`jobs.jsonl`), and what SLURM says of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mlm_dist.files import read_json_lines

CRASHES = 3  # in a row, without a checkpoint further on
STARTS = 10  # the same, where starts ended without a word: nodes that were lost, jobs that SLURM killed
CLEAN = frozenset({"finished", "preempted", "cancelled"})
LIVE = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "STOPPED", "RESIZING"})


class NoAnswer(Exception):
    """SLURM is not here, or does not answer."""


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of `jobs.jsonl`, the oldest first: {event: submitted | began | ended | cancel, job, lineage, time, ...}."""
    return [line for line in read_json_lines(run / "jobs.jsonl") if line.get("event") and line.get("lineage")]


def record(run: Path, event: str, **facts: Any) -> None:
    """Appends a line to `jobs.jsonl`, making the directory if need be. Raises OSError."""
    run.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time": time.time(), **facts}) + "\n"
    with (run / "jobs.jsonl").open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # a crash left half a line
                line = "\n" + line
        file.write(line.encode())


def lineages(lines: Iterable[dict[str, Any]]) -> list[str]:
    """The jobs and arrays that were submitted for a run, the newest last."""
    return list(dict.fromkeys(str(line["lineage"]) for line in lines))


def is_cancelled(lines: Iterable[dict[str, Any]], lineage: str) -> bool:
    """Whether the user has cancelled this job or array: it is not to begin or be requeued any more."""
    return any(line["event"] == "cancel" and line["lineage"] == lineage for line in lines)


def newest_step(run: Path) -> int:
    """The step of the newest committed checkpoint; 0 without one."""
    commits = (run / "checkpoints").glob("step_*/COMMIT")
    return max((int(m[1]) for c in commits if (m := re.fullmatch(r"step_(\d+)", c.parent.name))), default=0)


@dataclass(frozen=True)
class Loop:
    """A job that gets nowhere: how often in a row it began at the checkpoint of `step`, and how many of these starts crashed."""

    step: int
    starts: int
    crashes: int


def crash_loop(lines: Iterable[dict[str, Any]], lineage: str) -> Loop | None:
    """The loop that a job is in, or None: CRASHES crashes, or STARTS starts, in a row from the same checkpoint.

    A start whose node died, or that SLURM killed, leaves no end and is no crash. Other jobs do not count: whoever submits
    again has, one hopes, mended something.
    """
    step = starts = crashes = 0
    for line in lines:
        if line["lineage"] != lineage:
            continue
        if line["event"] == "began":
            if line.get("step", 0) != step:
                starts = crashes = 0
            step, starts = line.get("step", 0), starts + 1
        elif line["event"] == "ended" and line.get("state") in CLEAN:
            starts = crashes = 0
        elif line["event"] == "ended":
            crashes += 1
    return Loop(step, starts, crashes) if crashes >= CRASHES or starts >= STARTS else None


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job.

    Attributes:
        job: its number, of an element of an array the element's own.
        state: `PENDING`, `RUNNING`, `CANCELLED`, ...
        reason: what it waits for.
        nodes: its node list.
        end: when it ended or will end, in Unix time; None where that is not known.
    """

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    end: float | None = None

    @property
    def live(self) -> bool:
        """Whether it runs, or will."""
        return self.state in LIVE


def job_states(lineage: str) -> list[JobState]:
    """The job, or all elements of the array, by the controller or by the accounting database, which remembers longer; empty when neither knows it.

    Raises:
        NoAnswer: SLURM cannot be asked.
    """
    found = [parse_scontrol(line) for line in _ask(["scontrol", "show", "job", "-o", lineage]).splitlines()]
    if states := [state for state in found if state is not None]:
        return states
    try:
        listing = _ask(["sacct", "-X", "-n", "-P", "-j", lineage, "-o", "JobIDRaw,State,Reason,NodeList,End"])
    except NoAnswer:  # there need not be a database
        return []
    rows = (line.split("|") for line in listing.splitlines() if line.count("|") == 4)
    return [
        JobState(job, state.split()[0], _word(reason), _word(nodes), _time(end))
        for job, state, reason, nodes, end in rows
    ]


def most_telling(states: Iterable[JobState]) -> JobState | None:
    """Of a run's jobs, oldest first, the one that matters now: one that runs, else one that will, else the last that began."""
    return max(
        states,
        key=lambda s: (2 if s.state in ("RUNNING", "COMPLETING") else int(s.live), s.nodes != "", int(s.job)),
        default=None,
    )


def parse_scontrol(line: str) -> JobState | None:
    """A line of `scontrol show job -o`; None when it is none."""
    fields = dict(re.findall(r"(\w+)=(\S*)", line))
    if "JobState" not in fields:
        return None
    reason, nodes = _word(fields.get("Reason", "")), _word(fields.get("NodeList", ""))
    return JobState(fields["JobId"], fields["JobState"], reason, nodes, _time(fields.get("EndTime", "")))


def _word(text: str) -> str:
    return "" if text in ("None", "(null)", "None assigned") else text


def _time(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    return None


def _ask(command: Sequence[str]) -> str:
    """What the command prints; nothing when SLURM does not know the job."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoAnswer(f"{command[0]}: {error}") from None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise NoAnswer(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
