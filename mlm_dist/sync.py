"""``mlm-dist sync RUN``: replays ``metrics.jsonl`` into one W&B run, for a run that was offline or whose segments overlap."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_dist.artifacts import due, kept
from mlm_dist.errors import UserError
from mlm_dist.files import read_json, read_json_lines, read_yaml
from mlm_dist.records import Record, read_predictions, rows, with_predictions
from mlm_dist.redact import redact
from mlm_dist.wandb_mirror import init, log_checkpoint, to_row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist sync``."""
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directory")
    parser.add_argument("--project", help="W&B project (default: WANDB_PROJECT, else the run's track.project)")
    parser.add_argument("--entity", help="W&B user or team (default: yours)")
    parser.add_argument("--id", help="id of the W&B run (default: the run's own; one RUN only)")
    parser.add_argument(
        "--offline", action="store_true", help="write RUN/wandb/sync, for `wandb sync`, instead of sending"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what there is to send, and end")


@dataclass(frozen=True)
class Replay:
    """What W&B is to hold of a run.

    Attributes:
        rows: records with their predictions; row i is W&B's step i.
        damaged: lines of metrics.jsonl that are none.
        config: without secrets.
        artifacts: ``track.artifacts``.
    """

    path: Path
    id: str
    project: str
    rows: list[tuple[Record, Sequence[Record]]]
    damaged: list[int]
    config: dict[str, Any]
    events: list[Record]
    artifacts: Any
    finished: bool

    @classmethod
    def of(cls, path: Path, project: str | None, run_id: str | None) -> Replay:
        """Read a run directory.

        Raises:
            UserError: nothing is logged there, or nothing tells the W&B run's id.
        """
        records, damaged = rows(path / "metrics.jsonl")
        if not records:
            raise UserError(f"{path}: no step is logged there; give a run directory, such as runs/demo")
        known = path / "wandb" / "run_id"
        if run_id is None and not known.exists():
            raise UserError(f"{known}: missing, so the id of the W&B run is not known; give one with --id")
        plain = read_yaml(path / "config.yaml")
        track = plain.get("track") or {}
        return cls(
            path=path,
            id=run_id or known.read_text().strip(),
            project=project or os.environ.get("WANDB_PROJECT") or track.get("project") or "mlm_dist",
            rows=with_predictions(records, read_predictions(path)),
            damaged=damaged,
            config=read_json(path / "wandb" / "config.json") or redact(plain),
            events=list(read_json_lines(path / "events.jsonl")),
            artifacts=track.get("artifacts") or "none",
            finished=(read_json(path / "status.json") or {}).get("state") == "finished",
        )

    def __str__(self) -> str:
        steps = [record["step"] for record, _ in self.rows]
        tables = sum(bool(predictions) for _, predictions in self.rows)
        damaged = f", {len(self.damaged)} damaged lines left out" if self.damaged else ""
        return (
            f"{self.path}: {len(self.rows)} rows of steps {min(steps)} to {max(steps)}, {tables} with predictions, {len(self.events)} events{damaged}; "
            f"W&B run {self.id} of project {self.project}"
        )


def send(replay: Replay, directory: Path, *, offline: bool, entity: str | None = None) -> tuple[int, int]:
    """Bring the W&B run up to what the directory of the run holds.

    Args:
        directory: for what wandb writes on the way.
        offline: write a run of all rows there; else send those that the W&B run lacks.

    Returns:
        Rows that were there already, and rows sent.

    Raises:
        UserError: the server refuses or cannot be reached, or the W&B run holds what is not this run's.
    """
    import wandb

    try:
        return _send(wandb, replay, directory, offline, entity)
    finally:
        with contextlib.suppress(SystemExit):  # it exits with the service's code
            wandb.teardown()  # only then is what it writes whole; and a service that stays would hold the run
        if os.environ.get("WANDB_DATA_DIR") == str(directory):  # init's; the next run has its own
            del os.environ["WANDB_DATA_DIR"]


def _send(wandb: Any, replay: Replay, directory: Path, offline: bool, entity: str | None) -> tuple[int, int]:
    start = {"id": replay.id, "project": replay.project, "name": replay.path.resolve().name, "config": replay.config}
    try:
        run = init(wandb, directory, "offline" if offline else "online", entity=entity, **start)
    except Exception as error:
        raise UserError(f"W&B: {error}\nWithout a network: --offline.") from error
    held = 0 if offline else int(run.step)
    if held > len(replay.rows):
        run.finish()
        raise UserError(
            f"W&B: run {replay.id} holds {held} rows, and {replay.path} has {len(replay.rows)}: segments of it overlap there, or it is another's. "
            "Send all into a new one: --id NEW"
        )
    for row in range(held, len(replay.rows)):
        run.log(to_row(*replay.rows[row]), step=row, commit=True)
    # In the summary, so that sending again replaces it. Nobody is alerted of what is long past.
    table = wandb.Table(columns=["time", "attempt", "kind", "step", "event"])
    for event in replay.events:
        rest = {k: v for k, v in event.items() if k not in ("time", "attempt", "kind", "step")}
        table.add_data(event.get("time"), event.get("attempt"), event.get("kind"), event.get("step"), json.dumps(rest))
    run.summary["events"] = table
    for checkpoint, aliases in due(replay.artifacts, kept(replay.path), (), finished=replay.finished):
        log_checkpoint(run, checkpoint.path, aliases, checkpoint.facts)
    run.finish(exit_code=0)
    return held, len(replay.rows) - held


def run(args: argparse.Namespace) -> int:
    """Run ``mlm-dist sync``. Raises UserError."""
    if args.id and len(args.runs) > 1:
        raise UserError(f"--id: {args.id!r} is one W&B run, but {len(args.runs)} run directories are given.")
    offline = args.offline or os.environ.get("WANDB_MODE", "").lower() in ("offline", "dryrun")
    for replay in [Replay.of(path, args.project, args.id) for path in args.runs]:
        print(replay)
        if args.dry_run:
            continue
        directory = replay.path / "wandb" / "sync"
        shutil.rmtree(directory, ignore_errors=True)  # made of nothing but what is read again now
        held, sent = send(replay, directory, offline=offline, entity=args.entity)
        if offline:
            (made,) = (directory / "wandb").glob("offline-run-*")
            print(f"written: {made}; where there is a network: wandb sync {made}")
        else:
            print(f"sent: {sent} rows; {held} were there already")
            if held and any(event.get("kind") == "rollback" for event in replay.events):
                print(
                    "of steps that a roll-back took back W&B keeps the first values: --id NEW gives a run with the last"
                )
    return 0
