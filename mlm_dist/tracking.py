"""What a run leaves behind while it trains: ``metrics.jsonl`` (the source), ``events.jsonl``, and their mirror in
W&B.
"""

import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlm_dist.errors import UserError
from mlm_dist.files import DISK_FULL, parse_object, read_json_lines, write_atomically
from mlm_dist.redact import redact
from mlm_dist.wandb_mirror import Mirror, Mode, resolve_mode

log = logging.getLogger(__name__)

# Lines kept while the disk is full: about two thousand.
MOST_UNWRITTEN_BYTES = 1 << 20


@dataclass
class TrackConfig:
    """Tracking of the run.

    Attributes:
        wandb: auto is online where a login is found (WANDB_MODE wins), else offline.
        every: steps between two logged training steps.
        project: the W&B project; WANDB_PROJECT wins.
        peak_tflops: dense peak of one device in TFLOP/s, which MFU is a share of; null takes it from a table of common
            GPUs (mlm_dist/hardware.py), and where that has none, MFU is left out.
    """

    wandb: Literal["auto", "offline", "online", "disabled"] = "auto"
    every: int = 10
    project: str = "mlm_dist"
    peak_tflops: float | None = None

    def check(self) -> None:
        """Raises UserError for values that no run can have."""
        if self.every < 1:
            raise UserError(f"track.every: {self.every} must be at least 1 step.")
        if not self.project:
            raise UserError("track.project: '' must name a W&B project, such as mlm_dist.")
        if self.peak_tflops is not None and not (math.isfinite(self.peak_tflops) and self.peak_tflops > 0):
            raise UserError(
                f"track.peak_tflops: {self.peak_tflops} must be the device's dense peak in TFLOP/s, such as 989 for an H100, or null."
            )


class JsonLines:
    """An append-only file of JSON objects, one a line, with one writer.

    Opening repairs the end: a last line without its newline is completed if it is whole JSON, else cut off. A line is
    one ``write``, so a killed process leaves at most one torn line. While the disk is full lines are kept in memory and
    written with a later one. Non-finite floats are written as null, since JSON has none; 0-d arrays and tensors as their
    numbers.

    Attributes:
        repaired: bytes cut off at opening.
    """

    def __init__(self, path: Path) -> None:
        self.repaired = _repair(path)
        self._path = path
        self._lock = threading.Lock()
        self._unwritten = bytearray()
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, record: Mapping[str, Any], *, sync: bool = False, required: bool = False) -> None:
        """Write one object; with ``sync`` it is on the disk on return, unless that is full.

        Raises:
            OSError: the file cannot be written, or the disk is full and the object is ``required`` on it, or so are
            MOST_UNWRITTEN_BYTES of lines.
        """
        data = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        with self._lock:
            if self._fd is None:
                raise ValueError("the file is closed")
            self._unwritten += data
            try:
                self._write(self._fd, sync)
            except OSError as error:
                if required or error.errno not in DISK_FULL or len(self._unwritten) > MOST_UNWRITTEN_BYTES:
                    raise OSError(error.errno, error.strerror, str(self._path)) from error

    def _write(self, fd: int, sync: bool) -> None:
        while self._unwritten:  # a signal or a full disk can make a write short
            del self._unwritten[: os.write(fd, self._unwritten)]
        if sync:
            os.fsync(fd)

    def flush(self) -> None:
        """Try once more to write what a full disk left over."""
        with self._lock:
            if self._fd is not None:
                try:
                    self._write(self._fd, sync=False)
                except OSError as error:
                    log.warning("%s: %d bytes are not written: %s", self._path, len(self._unwritten), error.strerror)

    def close(self) -> None:
        self.flush()
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
            self._fd = None


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):  # numpy.float64 too, hence the conversion
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"{type(value).__name__} has no place in a line of JSON")


def _repair(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        tail = data[end:]
        if not tail:
            return 0
        if parse_object(tail) is not None:
            file.write(b"\n")
            return 0
        file.truncate(end)
        return len(tail)


def _metric_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(line number from 1, the record or None where the line is no record) for each whole line."""
    data = path.read_bytes() if path.exists() else b""
    lines = data.split(b"\n")
    if parse_object(lines[-1]) is None:
        lines.pop()  # empty after the last newline, or torn
    for number, line in enumerate(lines, 1):
        record = parse_object(line)
        valid = record is not None and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
        yield number, record if valid else None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, ordered by step: the last line of each (kind, step), since a restart
    replays steps. A torn last line is left out.

    Raises:
        UserError: the file is missing, or a line before the last is not a record.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run writes it at its first logged step")
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    for number, record in _metric_lines(path):
        if record is None:
            raise UserError(f"{path}, line {number}: not a JSON object with a kind and a step; remove the line")
        kept[record["kind"], record["step"]] = record
    return sorted(kept.values(), key=lambda r: (r["step"], r["kind"]))


# Of a record: its loss, and the number of ranks that it was taken on.
_Summary = tuple[Any, Any]


class Tracker:
    """Writes a run's metrics and events; rank 0 only, one at a time for a run directory.

    Args:
        run_dir: exists.
        run_config: the run's configuration as plain dicts; W&B gets it without secrets.
        attempt: from 1, larger at each restart.
        wandb_id: the id that a checkpoint kept; else the one in ``RUN/wandb/run_id``, else WANDB_RUN_ID, else a new
            one.
        world_size: written to each record; a step replayed by as many ranks should give the same loss.
        facts: numbers and strings for the summary of the W&B run, such as the unigram entropy.
        name: the W&B run's name; by default the run directory's.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        cfg: TrackConfig,
        run_config: Mapping[str, Any],
        *,
        attempt: int,
        wandb_id: str | None = None,
        world_size: int = 1,
        facts: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.attempt = attempt
        self._world_size = world_size
        self._differed = False
        self._events = JsonLines(self.run_dir / "events.jsonl")
        self._metrics = JsonLines(self.run_dir / "metrics.jsonl")
        for file, name_ in ((self._events, "events.jsonl"), (self._metrics, "metrics.jsonl")):
            if file.repaired:
                self.event({"kind": "torn_line", "file": name_, "bytes": file.repaired})
        self._rows, history = self._read_back()
        self._wandb_id = self._choose_id(wandb_id)
        mode = resolve_mode(cfg.wandb)
        self._mirror: Mirror | None = None
        if mode != "disabled":
            self._mirror = Mirror(
                self.run_dir / "wandb",
                mode=mode,
                run_id=self._wandb_id,
                project=os.environ.get("WANDB_PROJECT") or cfg.project,
                name=name or self.run_dir.resolve().name,
                config=redact(_plain(run_config)),
                facts=redact(_plain(facts or {})),
                attempt=attempt,
                history=history,
                warn=self._warn_wandb,
            )

    @property
    def wandb_id(self) -> str:
        """The id of the W&B run, the same for all attempts, also while W&B is disabled."""
        return self._wandb_id

    @property
    def mode(self) -> Mode:
        """What W&B does in this attempt; offline where it was to be online but could not be reached."""
        return self._mirror.mode if self._mirror else "disabled"

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record with at least ``kind`` ("train" or "val") and ``step``; ``attempt``, ``time`` (Unix
        seconds) and ``world_size`` are added where missing.

        Raises:
            OSError: the file cannot be written, or the disk was full for too long. (What W&B does never raises.)
        """
        line = _plain(
            {
                "step": record["step"],
                "attempt": self.attempt,
                "time": time.time(),
                "world_size": self._world_size,
                **record,
            }
        )
        self._metrics.append(line)
        key = (line["kind"], line["step"])
        before = self._rows.get(key)
        if before is not None:  # a step replayed after a restart: W&B has it
            self._compare(key, before[1], line)
            return
        row = len(self._rows)
        self._rows[key] = (row, _summary_of(line))
        if self._mirror:
            self._mirror.put(row, line)

    def event(self, record: Mapping[str, Any], *, required: bool = False) -> None:
        """Append to ``events.jsonl``, without secrets, and wait for the disk; ``time`` and ``attempt`` are added where missing.

        Raises:
            OSError: the file cannot be written; where the disk is full, only for what is ``required`` there.
        """
        line = {"time": time.time(), "attempt": self.attempt, **redact(_plain(record))}
        self._events.append(line, sync=True, required=required)
        if line["kind"] == "rollback":
            self._rows = {key: (row, None if key[1] > line["to"] else was) for key, (row, was) in self._rows.items()}

    def finish(self, exit_code: int = 0, *, timeout: float = 90.0) -> None:
        """Close the files and end the W&B run as ``exit_code`` says, waiting at most ``timeout`` seconds for W&B. A
        second call does nothing.
        """
        mirror, self._mirror = self._mirror, None
        if mirror:
            mirror.finish(exit_code, timeout)
        self._metrics.close()
        # events.jsonl stays open: it is written through, and a late warning of the W&B thread must find it.
        self._events.flush()

    def _read_back(self) -> tuple[dict[tuple[str, int], tuple[int, _Summary | None]], list[dict[str, Any]]]:
        """Row numbers of the (kind, step)s logged so far, and their last records in row order."""
        rollbacks = [e for e in read_json_lines(self.run_dir / "events.jsonl") if e.get("kind") == "rollback"]

        def taken_back(record: dict[str, Any]) -> bool:
            """Whether its step comes again with other batches before it: nothing is to be compared."""
            return any(record["step"] > e["to"] and record.get("time", 0) <= e["time"] for e in rollbacks)

        records: dict[tuple[str, int], dict[str, Any]] = {}
        damaged = []
        for number, record in _metric_lines(self.run_dir / "metrics.jsonl"):
            if record is None:
                damaged.append(number)
            else:
                records[record["kind"], record["step"]] = record  # a dict keeps the place of the first
        if damaged:
            self.event({"kind": "damaged_lines", "file": "metrics.jsonl", "lines": damaged[:100]})
        rows = {k: (row, None if taken_back(r) else _summary_of(r)) for row, (k, r) in enumerate(records.items())}
        return rows, list(records.values())

    def _choose_id(self, given: str | None) -> str:
        directory = self.run_dir / "wandb"
        directory.mkdir(exist_ok=True)
        path = directory / "run_id"
        known = path.read_text().strip() if path.exists() else ""
        chosen = given or known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        if chosen != known:
            write_atomically(path, f"{chosen}\n".encode())
        return chosen

    def _compare(self, key: tuple[str, int], before: _Summary | None, line: Mapping[str, Any]) -> None:
        if self._differed or before is None or before == _summary_of(line) or before[1] != line["world_size"]:
            return
        if line.get("loss") is None:  # left out this time: there is an event of it
            return
        self._differed = True  # once an attempt: the steps after it differ too
        self.event(
            {
                "kind": "replay_differs",
                "metric": key[0],
                "step": key[1],
                "loss_before": before[0],
                "loss_now": line.get("loss"),
            }
        )
        log.warning(
            "step %d was replayed with another %s loss: %s before, %s now", key[1], key[0], before[0], line.get("loss")
        )

    def _warn_wandb(self, message: str) -> None:
        log.warning("%s", redact(message))
        self.event({"kind": "wandb", "message": message})


def _summary_of(record: Mapping[str, Any]) -> _Summary:
    return record.get("loss"), record.get("world_size")
