"""``mlm-dist checkpoint list`` and ``verify``: what checkpoints a run has, and whether they are as they were written."""

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mlm_dist.checkpoint import CheckpointError, Reader
from mlm_dist.checkpoint import reader as reading
from mlm_dist.checkpoint.format import step_of
from mlm_dist.errors import UserError
from mlm_dist.files import read_json
from mlm_dist.records import read_metrics


@dataclass(frozen=True)
class Entry:
    """What is known of one checkpoint directory.

    Attributes:
        size: bytes of all its files.
        time: seconds since the epoch when it was taken.
        ranks: how many ranks wrote it.
        validation_loss: in nats per masked token, the one that retention goes by, or of the same step; None where none was measured.
        problem: why no run would go on from it; None where every file is there in its size. Bytes are not read.
    """

    path: str
    step: int
    size: int
    files: int
    time: float | None
    attempt: int | None
    ranks: int | None
    validation_loss: float | None
    problem: str | None


def directories(source: Path) -> list[Path]:
    """The checkpoint directories, whole or not, of a run directory, oldest first; or the one checkpoint that ``source`` is.

    Raises:
        UserError: there is none.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such directory; give a run directory or one of its checkpoints")
    if source.resolve().parent.name == "checkpoints" or (source / "index.json").exists():
        return [source]
    found = reading.directories(source)
    if not found:
        raise UserError(f"{source}: has no checkpoint; give a run directory in which checkpoints/ has one")
    return found


def damages(path: Path, *, read: bool) -> Iterator[str]:
    """What is wrong with a checkpoint, one message for each file. With ``read`` every byte is compared, else sizes are."""
    try:
        reader = Reader(path)
    except CheckpointError as error:
        yield str(error)
        return
    if _is_named(path) and reader.step != step_of(path.resolve()):
        yield f"{path}: is the checkpoint of step {reader.step}"
    for name, facts in reader.index["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != facts["size"]:
                yield f"{file}: has {size:,} bytes, {facts['size']:,} were written"
            elif read and reading.sha256(file) != facts["sha256"]:
                yield f"{file}: its SHA-256 differs from the one that was written"
        except FileNotFoundError:
            yield f"{file}: missing"
        except OSError as error:
            yield f"{file}: cannot be read ({error.strerror})"


def _is_named(path: Path) -> bool:
    """Whether a directory has a checkpoint's name, as others than copies made by hand have."""
    return re.fullmatch(r"step_\d{8,}", path.resolve().name) is not None


def entry(path: Path, validation: dict[int, float]) -> Entry:
    """What is known of the checkpoint directory ``path``, whole or not.

    Args:
        validation: of its run, loss by step.
    """
    files = [file for file in path.iterdir() if file.is_file()]
    trainer = read_json(path / "trainer.json") or {}
    measured = trainer.get("validation")  # the one that counts for it, as retention sees it
    step = (
        step_of(path.resolve()) if _is_named(path) else _whole((read_json(path / "index.json") or {}).get("step")) or 0
    )
    parts = [m[1] for file in files if (m := re.fullmatch(r"part-\d+-of-(\d+)\.safetensors", file.name))]
    return Entry(
        path=str(path),
        step=step,
        size=sum(file.stat().st_size for file in files),
        files=len(files),
        time=_number(trainer.get("time")),
        attempt=_whole(trainer.get("attempt")),
        ranks=int(parts[0]) if parts else None,
        validation_loss=_number(measured.get("loss")) if isinstance(measured, dict) else validation.get(step),
        problem=next(damages(path, read=False), None),
    )


def _number(value: Any) -> float | None:
    """What a checkpoint from elsewhere has where this program's have a number."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def entries(source: Path) -> list[Entry]:
    """All checkpoints of a run, oldest first. Raises UserError as ``directories``."""
    paths = directories(source)
    metrics = paths[0].resolve().parent.parent / "metrics.jsonl"
    try:
        records = read_metrics(metrics) if metrics.is_file() else []
    except UserError:  # damaged; the checkpoints need not be
        records = []
    validation = {
        r["step"]: loss for r in records if r["kind"] == "val" and (loss := _number(r.get("loss"))) is not None
    }
    return [entry(path, validation) for path in paths]


def show(found: list[Entry]) -> None:
    """A table, and below it why the incomplete ones are so."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console = Console(highlight=False, no_color=True, width=160)
    table = Table()
    for column in ("step", "size", "files", "written", "attempt", "ranks", "validation loss", "state"):
        table.add_column(column, justify="left" if column in ("written", "state") else "right", no_wrap=True)
    for one in found:
        when = "" if one.time is None else datetime.fromtimestamp(one.time).strftime("%Y-%m-%d %H:%M:%S")
        loss = "" if one.validation_loss is None else f"{one.validation_loss:.4f}"
        state = "complete" if one.problem is None else "[bold red]not usable[/]"
        table.add_row(
            str(one.step), _size(one.size), str(one.files), when, _text(one.attempt), _text(one.ranks), loss, state
        )
    console.print(table)
    for one in found:
        if one.problem is not None:
            console.print(one.problem, markup=False, soft_wrap=True)


def _text(value: int | None) -> str:
    return "" if value is None else str(value)


def _size(size: int) -> str:
    """`14.2 MiB`: a size for people."""
    power = min(4, int(math.log(max(1, size), 1024)))
    return f"{size} B" if power == 0 else f"{size / 1024**power:.1f} {' KMGT'[power]}iB"


def run_list(source: Path, as_json: bool) -> int:
    """``mlm-dist checkpoint list``."""
    found = entries(source)
    if as_json:
        document: list[dict[str, Any]] = [asdict(one) for one in found]
        print(json.dumps(document, indent=1))
    else:
        show(found)
    return 0


def run_verify(source: Path) -> int:
    """``mlm-dist checkpoint verify``: every byte of every checkpoint; 1 where one is damaged."""
    bad = 0
    for path in directories(source):
        found = list(damages(path, read=True))
        bad += bool(found)
        print(f"{path}: {'damaged' if found else 'whole'}")
        for damage in found:
            print(f"  {damage}")
    return int(bad > 0)
