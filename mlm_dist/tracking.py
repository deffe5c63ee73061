"""What a run leaves behind while it trains: ``metrics.jsonl`` (the source), ``predictions.jsonl``, ``events.jsonl``, and
their mirrors in W&B and TensorBoard.
"""

import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mlm_dist.artifacts import Choice, due, kept
from mlm_dist.errors import UserError
from mlm_dist.files import read_json, read_json_lines, write_atomically
from mlm_dist.json_lines import JsonLines, plain
from mlm_dist.records import Record, read_predictions, rows, with_predictions
from mlm_dist.redact import redact
from mlm_dist.tensorboard_mirror import TensorBoard, check_installed
from mlm_dist.wandb_mirror import Mirror, Mode, resolve_mode

log = logging.getLogger(__name__)

# Kinds of events that a person should hear of: what happened, and how bad it is.
_ALERTS: dict[str, tuple[str, Literal["WARN", "ERROR"]]] = {
    "skipped_step": ("numbers went wrong", "WARN"),
    "rollback": ("rolled back", "ERROR"),
    "checkpoint_failed": ("a checkpoint could not be written", "ERROR"),
    "hang": ("the run hangs", "ERROR"),
    "crash_loop": ("the run crashes again and again", "ERROR"),
}
# Attempts in a row that begin at the same step, without a stop that was asked for, which are a crash loop.
CRASH_LOOP = 3


@dataclass
class TrackConfig:
    """Tracking of the run.

    Attributes:
        wandb: auto is online where a login is found (WANDB_MODE wins), else offline.
        every: steps between two logged training steps.
        project: the W&B project; WANDB_PROJECT wins.
        peak_tflops: dense peak of one device in TFLOP/s, which MFU is a share of; null takes it from a table of common
            GPUs (mlm_dist/hardware.py), and where that has none, MFU is left out.
        predictions: rows of the validation set of which, at each validation, what the model puts in place of a mask is kept
            (predictions.jsonl, a table in W&B); null: none.
        artifacts: which checkpoints become artifacts of the W&B run, as references to where they lie.
        tensorboard: mirror the metrics in RUN/tensorboard too.
    """

    wandb: Literal["auto", "offline", "online", "disabled"] = "auto"
    every: int = 10
    project: str = "mlm_dist"
    peak_tflops: float | None = None
    predictions: int | None = 16
    artifacts: Choice = "none"
    tensorboard: bool = False

    def check(self) -> None:
        """Raises UserError for values that no run can have."""
        if self.every < 1:
            raise UserError(f"track.every: {self.every} must be at least 1 step.")
        if not self.project:
            raise UserError("track.project: '' must name a W&B project, such as mlm_dist.")
        if self.predictions is not None and self.predictions < 1:
            raise UserError(f"track.predictions: {self.predictions} must be at least 1 row, or null for none.")
        if self.tensorboard:
            check_installed()
        if self.peak_tflops is not None and not (math.isfinite(self.peak_tflops) and self.peak_tflops > 0):
            raise UserError(
                f"track.peak_tflops: {self.peak_tflops} must be the device's dense peak in TFLOP/s, such as 989 for an H100, or null."
            )


class Shown(Protocol):
    """Where people see a run."""

    def record(self, record: Record) -> None: ...

    def event(self, event: Record) -> None: ...


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
        name: the W&B run's name; by default the run directory's.
        shown: gets each record and event too.
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
        name: str | None = None,
        shown: Shown | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.attempt = attempt
        self._shown = shown
        self._world_size, self._artifacts = world_size, cfg.artifacts
        self.name = name or self.run_dir.resolve().name
        self._differed = False
        self._alerted: set[str] = set()
        self._events = JsonLines(self.run_dir / "events.jsonl")
        self._metrics = JsonLines(self.run_dir / "metrics.jsonl")
        self._predictions = JsonLines(self.run_dir / "predictions.jsonl") if cfg.predictions else None
        for file in filter(None, (self._events, self._metrics, self._predictions)):
            if file.repaired:
                self.event({"kind": "torn_line", "file": file.path.name, "bytes": file.repaired})
        self._rows: dict[tuple[str, int], tuple[int, _Summary | None]] = {}
        history = self._read_back()
        self._wandb_id = self._choose_id(wandb_id)
        mode = resolve_mode(cfg.wandb)
        config = redact(plain(run_config))
        write_atomically(self.run_dir / "wandb" / "config.json", json.dumps(config, indent=1).encode())
        self._mirror: Mirror | None = None
        if mode != "disabled":
            self._mirror = Mirror(
                self.run_dir / "wandb",
                mode=mode,
                run_id=self._wandb_id,
                project=os.environ.get("WANDB_PROJECT") or cfg.project,
                name=self.name,
                config=config,
                attempt=attempt,
                history=history,
                tables=cfg.predictions is not None,
                warn=self._warn_mirror,
            )
        self._board: TensorBoard | None = None
        if cfg.tensorboard:
            standing = [(r, p) for r, p in history if self._rows[r["kind"], r["step"]][1] is not None]
            self._board = TensorBoard(self.run_dir / "tensorboard", standing, self._warn_mirror)

    @property
    def wandb_id(self) -> str:
        """The id of the W&B run, the same for all attempts, also while W&B is disabled."""
        return self._wandb_id

    @property
    def mode(self) -> Mode:
        """What W&B does in this attempt; offline where it was to be online but could not be reached."""
        return self._mirror.mode if self._mirror else "disabled"

    def log(self, record: Record, predictions: Sequence[Record] = ()) -> None:
        """Append a record with at least ``kind`` ("train" or "val") and ``step``; ``attempt``, ``time`` (Unix
        seconds) and ``world_size`` are added where missing. ``predictions`` of a validation: see ``read_predictions``.

        Raises:
            OSError: the file cannot be written, or the disk was full for too long. (What W&B does never raises.)
        """
        line = plain(
            {
                "step": record["step"],
                "attempt": self.attempt,
                "time": time.time(),
                "world_size": self._world_size,
                **record,
            }
        )
        if predictions and self._predictions:  # first: a record says that they are there
            whole = {"step": line["step"], "attempt": line["attempt"], "time": line["time"], "rows": predictions}
            self._predictions.append(whole)
        self._metrics.append(line)
        if self._shown:
            self._shown.record(line)
        key = (line["kind"], line["step"])
        before = self._rows.get(key)
        if before is None:
            row = len(self._rows)
            self._rows[key] = (row, _summary_of(line))
            if self._mirror:
                self._mirror.put(row, line, predictions)
        else:  # a step taken again: W&B has it
            self._compare(key, before[1], line)
        if self._board and (before is None or before[1] is None):  # new, or taken back before
            self._board.put(line, predictions)

    def event(self, record: Mapping[str, Any], *, required: bool = False) -> None:
        """Append to ``events.jsonl``, without secrets, and wait for the disk; ``time`` and ``attempt`` are added where missing.

        Raises:
            OSError: the file cannot be written; where the disk is full, only for what is ``required`` there.
        """
        line = {"time": time.time(), "attempt": self.attempt, **redact(plain(record))}
        self._events.append(line, sync=True, required=required)
        if self._shown:
            self._shown.event(line)
        self._alert_of(line)
        if line["kind"] == "finished":
            self.checkpoints(finished=True)
        if line["kind"] == "rollback":
            self._rows = {key: (row, None if key[1] > line["to"] else was) for key, (row, was) in self._rows.items()}
            if self._board:
                self._board.take_back(line["to"])

    def checkpoints(self, *, finished: bool = False) -> None:
        """Make artifacts of the whole checkpoints that are there now, of those that ``track.artifacts`` says and W&B has not got yet."""
        if self._artifacts == "none" or self._mirror is None:
            return
        told = [e for e in read_json_lines(self.run_dir / "events.jsonl") if e.get("kind") == "artifact"]
        sent = {(e["step"], e["made"]) for e in told}
        try:
            there = kept(self.run_dir)
        except OSError as error:
            self._warn_mirror(f"W&B gets no artifact of the last checkpoint ({error})")
            return
        for checkpoint, aliases in due(self._artifacts, there, sent, finished=finished):
            if self._mirror.checkpoint(checkpoint.path, aliases, checkpoint.facts):
                self.event({"kind": "artifact", **checkpoint.facts, "aliases": aliases})

    def hung(self, timeout: float) -> None:
        """Tell W&B of a hang, as status.json has it, on the way out of a process of which any part may be stuck: takes ``timeout`` seconds at most."""

        def tell() -> None:
            status = read_json(self.run_dir / "status.json") or {}
            self._alert("hang", str(status.get("reason", "")))
            if self._mirror:
                self._mirror.finish(1, timeout / 2)  # then a service that does not answer is killed

        thread = threading.Thread(target=tell, name="last-words", daemon=True)
        thread.start()
        thread.join(timeout)

    def finish(self, exit_code: int = 0, *, timeout: float = 90.0) -> None:
        """Close the files and end the W&B run as ``exit_code`` says, waiting at most ``timeout`` seconds for W&B. A
        second call does nothing.
        """
        mirror, self._mirror = self._mirror, None
        board, self._board = self._board, None
        if board:
            board.finish(min(timeout, 60.0))
        if mirror:
            mirror.finish(exit_code, timeout)
        self._metrics.close()
        if self._predictions:
            self._predictions.close()
        # events.jsonl stays open: it is written through, and a late warning of a mirror's thread must find it.
        self._events.flush()

    def _read_back(self) -> list[tuple[Record, Sequence[Record]]]:
        """The records so far with their predictions, in row order; sets the rows that are logged."""
        events = list(read_json_lines(self.run_dir / "events.jsonl"))
        rollbacks = [e for e in events if e.get("kind") == "rollback"]

        def taken_back(record: Record) -> bool:
            """Whether its step comes again with other batches before it: nothing is to be compared."""
            return any(record["step"] > e["to"] and record.get("time", 0) <= e["time"] for e in rollbacks)

        records, damaged = rows(self.run_dir / "metrics.jsonl")
        if damaged:
            self.event({"kind": "damaged_lines", "file": "metrics.jsonl", "lines": damaged[:100]})
        self._rows = {
            (r["kind"], r["step"]): (row, None if taken_back(r) else _summary_of(r)) for row, r in enumerate(records)
        }
        return with_predictions(records, read_predictions(self.run_dir))

    def _alert_of(self, event: Record) -> None:
        """Alert of what an event tells, where a person should hear of it."""
        kind = event["kind"]
        if kind == "attempt" and self._crash_loop(event["step"]):
            self._alert("crash_loop", f"{CRASH_LOOP} attempts in a row began after step {event['step']}.")
        elif kind == "skipped_step" and "cause" not in event:  # no bad numbers, or fp16 looking for its scale
            return
        elif kind in _ALERTS:
            self._alert(kind, str(event.get("why") or event.get("reason") or ""), event.get("step"))

    def _alert(self, kind: str, text: str, step: int | None = None) -> None:
        """Once a kind and attempt: what happens again is in the events, and a person who is called every minute stops listening."""
        if kind in self._alerted or self._mirror is None:
            return
        self._alerted.add(kind)
        what, level = _ALERTS[kind]
        at = f" at step {step}" if step is not None else ""
        self._mirror.alert(
            f"{self.name}: {what}{at}", f"{text}\n{self.run_dir.resolve()}, attempt {self.attempt}", level
        )

    def _crash_loop(self, step: int) -> bool:
        """Whether as many attempts as make a crash loop began after ``step``, the last ones, and none of them was stopped on purpose."""
        begun = 0
        for event in read_json_lines(self.run_dir / "events.jsonl"):
            if event.get("kind") == "attempt":
                begun = begun + 1 if event["step"] == step else 0
            elif event.get("kind") in ("stopped", "finished"):
                begun = 0
        return begun >= CRASH_LOOP

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

    def _warn_mirror(self, message: str) -> None:
        log.warning("%s", redact(message))
        self.event({"kind": "tensorboard" if message.startswith("TensorBoard") else "wandb", "message": message})


def _summary_of(record: Mapping[str, Any]) -> _Summary:
    return record.get("loss"), record.get("world_size")
