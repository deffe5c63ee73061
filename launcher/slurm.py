"""Pure functions from a run and what it asks of SLURM to the `sbatch` command that submits it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlm_dist.errors import UserError


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM. What is None or empty is left to the site's defaults.

    Attributes:
        nodes: nodes of the job.
        tasks_per_node: ranks on each.
        gpus_per_node: GPUs on each.
        chain: how many jobs, one after the other.
        signal_s: seconds before the time limit at which the batch script is told.
        time: the time limit as SLURM writes them, such as 12:00:00.
        options: any other option of sbatch, by its long name: {"account": "x"}; None stands for a bare flag.
        words: further words for sbatch as they are.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    chain: int = 1
    signal_s: int = 300
    time: str | None = None
    options: Mapping[str, str | None] | None = None
    words: Sequence[str] = ()

    def check(self) -> None:
        """Raises UserError for what no allocation can be."""
        for flag, value in [
            ("--nodes", self.nodes),
            ("--ntasks-per-node", self.tasks_per_node),
            ("--gpus-per-node", 1 if self.gpus_per_node is None else self.gpus_per_node),
            ("--chain", self.chain),
            ("--signal-time", self.signal_s),
        ]:
            if value < 1:
                raise UserError(f"{flag} {value}: must be at least 1")
        if self.gpus_per_node is not None and self.tasks_per_node > self.gpus_per_node:
            raise UserError(
                f"--ntasks-per-node {self.tasks_per_node}: more ranks than the {self.gpus_per_node} GPU(s) of --gpus-per-node; "
                "one rank drives one GPU"
            )
        if self.signal_s > 65535:
            raise UserError(f"--signal-time {self.signal_s}: SLURM takes at most 65535 seconds")
        for option, word in (self.options or {}).items():
            if word is not None and not word.strip():
                raise UserError(f"--{option}: is empty; leave it out for the site's default")
        limit = None if self.time is None else time_limit_s(self.time)
        if limit is not None and limit <= 2 * self.signal_s:
            raise UserError(
                f"--time {self.time}: must be more than twice --signal-time ({self.signal_s} s), at which the run is stopped before it; "
                "else a job would hardly train between its start and its stop"
            )


def sbatch_command(request: Request, run: Path, name: str, script: Path, args: Sequence[str]) -> list[str]:
    """The argument vector of `sbatch` that submits `script` with `args` for the run directory `run`. No shell reads it.

    Raises:
        UserError: the request is none, or SLURM cannot write a log into `run`.
    """
    request.check()
    if set("\\\n") & set(str(run)):
        raise UserError(f"run.dir: {str(run)!r}: SLURM writes no logs to paths with backslashes or line ends")
    log = str(run / "logs").replace("%", "%%")
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={name}",
        f"--nodes={request.nodes}",
        f"--ntasks-per-node={request.tasks_per_node}",
        f"--output={log}/slurm-{'%A_%a' if request.chain > 1 else '%j'}.out",
        "--open-mode=append",
        f"--signal=B:USR1@{request.signal_s}",
        "--export=ALL",
    ]
    if request.gpus_per_node is not None:
        command.append(f"--gpus-per-node={request.gpus_per_node}")
    if request.time is not None:
        command.append(f"--time={request.time}")
    if request.chain > 1:
        command.append(f"--array=1-{request.chain}%1")  # one at a time, in their order
    for option, value in (request.options or {}).items():
        command.append(f"--{option}" if value is None else f"--{option}={value}")
    return [*command, *request.words, str(script), *args]


def time_limit_s(text: str) -> int | None:
    """Seconds of a time limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; None for no limit.

    Raises:
        UserError: it is none of these.
    """
    if text.upper() in ("INFINITE", "UNLIMITED", "-1", "0"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"--time {text}: must be minutes, HH:MM:SS or D-HH:MM:SS")
    days, *rest = match.groups()
    numbers = [int(n) for n in rest if n is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def sbatch_variables(text: str, where: str) -> dict[str, str]:
    """The `SBATCH_*` lines of a `cluster.env`: options that sbatch takes from its environment.

    The rest of the file is for the batch script's own shell. These are needed before there is one, so they are plain values.

    Raises:
        UserError: a value that only a shell could make out.
    """
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if not equals or not name.startswith("SBATCH_"):
            continue
        try:
            words = shlex.split(value, comments=True)
        except ValueError:
            words = [value, value]
        if len(words) > 1 or any(c in value for c in "$`"):
            raise UserError(
                f"{where}, line {number}: {name}={value} must be one plain value, in quotes if it has spaces"
            )
        found[name] = words[0] if words else ""
    return found
