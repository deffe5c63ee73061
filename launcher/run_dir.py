"""What a launcher reads from and writes into a run directory."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_dist.errors import UserError
from mlm_dist.files import write_atomically
from mlm_dist.lifecycle import STALE_AFTER_S

ENDED = frozenset({"preempted", "cancelled", "finished", "failed"})


@dataclass(frozen=True)
class Status:
    """`status.json`: the truth about how far a run is and how it ended."""

    state: str  # running | preempted | cancelled | finished | failed
    requeue: bool
    step: int
    reason: str


@dataclass(frozen=True)
class RunDir:
    """A run directory, which need not exist yet."""

    path: Path

    @property
    def logs(self) -> Path:
        """The directory of the ranks' output."""
        return self.path / "logs"

    @property
    def stop_request(self) -> Path:
        """The file that asks a run to checkpoint and end."""
        return self.path / "stop_request"

    def status(self) -> Status | None:
        """What `status.json` says; None when there is none.

        Raises:
            UserError: the file is there but cannot be read.
        """
        path = self.path / "status.json"
        try:
            found = json.loads(path.read_text())
            return Status(
                str(found["state"]), bool(found["requeue"]), int(found["step"]), str(found.get("reason") or "")
            )
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise UserError(f"{self.path} is a file, not a run directory") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is not a run's status: {e!r}") from None

    def status_stamp(self) -> tuple[int, int, int] | None:
        """Changes whenever `status.json` is written; None when there is none."""
        try:
            found = os.stat(self.path / "status.json")
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def status_time(self) -> float | None:
        """Unix time at which `status.json` was written; None when there is none."""
        stamp = self.status_stamp()
        return None if stamp is None else stamp[1] / 1e9

    def last_sign_of_life(self) -> float | None:
        """Unix time at which the run last wrote its status, lock or metrics; None when it never did."""
        times = []
        for name in ("status.json", "lock", "metrics.jsonl"):
            try:
                times.append(os.stat(self.path / name).st_mtime)
            except OSError:
                continue
        return max(times, default=None)

    def holder(self) -> tuple[str, int] | None:
        """Host and process that `lock` says hold the run; None when there is no lock."""
        try:
            found = json.loads((self.path / "lock").read_text())
            return str(found.get("host", "")), int(found["pid"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def is_held(self) -> bool:
        """Whether `lock` is there and its holder gave a sign of life of late."""
        try:
            return time.time() - (self.path / "lock").stat().st_mtime < STALE_AFTER_S
        except OSError:
            return False

    def job_reports(self, job: str) -> Path:
        """Where the ranks of a SLURM job report how they ended; there as long as the job is at work on the run."""
        return self.logs / f"job-{job}"

    def is_starting(self, job: str) -> bool:
        """Whether a SLURM job that runs has not taken `lock` yet: none is there, or one from before the job began. By the file server's clock alone."""
        try:
            return (self.path / "lock").stat().st_mtime < self.job_reports(job).stat().st_mtime
        except OSError:
            return True

    def age_lock(self) -> None:
        """Marks the lock as one whose holder is gone."""
        with contextlib.suppress(OSError):
            os.utime(self.path / "lock", (0, 0))

    def request_stop(self, reason: str, *, requeue: bool = False) -> None:
        """Asks the run to checkpoint and end, by a `stop_request` that is never seen half written.

        Raises:
            OSError: the run directory is missing or cannot be written.
        """
        write_atomically(self.stop_request, json.dumps({"reason": reason, "requeue": requeue}).encode())


def find_run(name: str) -> RunDir:
    """The run directory `name`, or `runs/name` when there is no such directory.

    Raises:
        UserError: neither is a directory that a run has written its status into, or that a job was submitted for.
    """
    for path in (Path(name), Path("runs") / name):
        if (path / "status.json").is_file() or (path / "jobs.jsonl").is_file():
            return RunDir(path)
    raise UserError(f"{name}: no run directory (neither {name}/status.json nor runs/{name}/status.json exists)")


def split_program(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """`OWN... -- PROGRAM'S...`: a command's own words and those of the program."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def program_config(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The run config that the program's words name, and the rest of them. Raises UserError when they name none."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--config", type=Path)
    known, rest = parser.parse_known_args(words)
    if known.config is None:
        raise UserError("--config: missing. Give a run config, for example --config recipes/bert_base.yaml.")
    return known.config, rest


def resolve(config: Path, overrides: Sequence[str], environ: Mapping[str, str]) -> RunDir:
    """The run directory that `mlm_dist.train --config config overrides...` will use: run.dir / run.name.

    Raises:
        UserError: the file is missing, unreadable or not a YAML mapping.
    """
    keys = read_keys(config, overrides, environ, {"run.dir": "runs", "run.name": config.stem})
    return RunDir(Path(str(keys["run.dir"])) / str(keys["run.name"]))


def read_keys(
    config: Path, overrides: Sequence[str], environ: Mapping[str, str], defaults: Mapping[str, str | None]
) -> dict[str, Any]:
    """What `mlm_dist.train --config config overrides...` takes for the keys of `defaults`, found without importing it.

    Flags come before the environment (MLM_RUN__DIR), that before the file, that before the default; null counts as not given.

    Raises:
        UserError: the file is missing, unreadable or not a YAML mapping.
    """
    import yaml

    try:
        text = config.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--config {config}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--config {config}: cannot be read ({e})") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"--config {config}: not YAML: {e}") from None
    values: dict[str, Any] = dict(defaults)
    for key in values:
        name, _, field = key.partition(".")
        section = (tree or {}).get(name) if isinstance(tree or {}, dict) else tree
        if section is not None and not isinstance(section, dict):
            what = name if isinstance(tree, dict) else "the file"
            raise UserError(f"--config {config}: {what} must be a mapping of keys to values, not {section!r}")
        if (found := (section or {}).get(field)) is not None:
            values[key] = found
        values[key] = environ.get(f"MLM_{name.upper()}__{field.upper()}", values[key])
    for i, word in enumerate(overrides):
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--")
        if flag.startswith("--") and key in values:
            if not equals and i + 1 == len(overrides):
                raise UserError(f"{flag}: a value must follow")
            values[key] = value if equals else overrides[i + 1]
    return values
