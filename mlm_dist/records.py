"""Reads what a run has written of itself: ``metrics.jsonl`` and ``predictions.jsonl``."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlm_dist.errors import UserError
from mlm_dist.files import parse_object, read_json_lines

Record = Mapping[str, Any]


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


def rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of ``read_metrics`` in the order in which W&B has them, which is that of the first line of each (kind, step); and the numbers of
    damaged lines, which are passed over."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    damaged = []
    for number, record in _metric_lines(path):
        if record is None:
            damaged.append(number)
        else:
            records[record["kind"], record["step"]] = record  # a dict keeps the place of the first
    return list(records.values()), damaged


def read_predictions(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """What ``predictions.jsonl`` holds, by step: of each row its ``text`` with the place in «», the ``truth`` there, the ``truth_probability``, and
    ``predictions``: the likeliest tokens with their probabilities, the best first. The last line of a step
    counts; one without its step or rows is passed over."""
    lines = read_json_lines(run_dir / "predictions.jsonl")
    return {x["step"]: x["rows"] for x in lines if isinstance(x.get("step"), int) and isinstance(x.get("rows"), list)}


def with_predictions(
    records: Sequence[Record], predictions: Mapping[int, Sequence[Record]]
) -> list[tuple[Record, Sequence[Record]]]:
    """Each record with what was predicted at that validation."""
    return [(r, predictions.get(r["step"], ()) if r["kind"] == "val" else ()) for r in records]
