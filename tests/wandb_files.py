"""What wandb itself wrote: the records of its offline files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlm_dist.wandb_mirror import read_wandb_file


def records(kind: str, directory: Path, pattern: str = "attempt_*") -> list[Any]:
    """The records of one kind, such as ``history``, that the runs under ``directory`` (``RUN/wandb``) hold, in the order of the attempts."""
    paths = sorted(p for p in directory.glob(f"{pattern}/wandb/*run-*/run-*.wandb") if not p.parent.is_symlink())
    return [
        getattr(record, kind)
        for path in paths
        for record in read_wandb_file(path)
        if record.WhichOneof("record_type") == kind
    ]


def values(items: Iterable[Any]) -> dict[str, Any]:
    """``GROUP/KEY`` to value; of a table what wandb says of it."""
    out: dict[str, Any] = {}
    for item in items:
        path = [item.key] if item.key else list(item.nested_key)
        place = out
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = json.loads(item.value_json)
    return out


def history(directory: Path, pattern: str = "attempt_*") -> list[dict[str, Any]]:
    """All rows."""
    return [values(row.item) for row in records("history", directory, pattern)]


def table(directory: Path, row: dict[str, Any], key: str, pattern: str = "attempt_*") -> list[list[Any]]:
    """The cells of a table that a row holds."""
    (path,) = directory.glob(f"{pattern}/wandb/*run-*/files/{row[key]['path']}")
    content = json.loads(path.read_text())
    cells: list[list[Any]] = content["data"]
    return cells
