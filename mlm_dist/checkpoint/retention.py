"""Which checkpoints of a run stay: the newest, every n-th, the best by validation, and one to go back to."""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from mlm_dist.checkpoint.format import CheckpointConfig, CheckpointError, step_of
from mlm_dist.checkpoint.reader import Reader, committed, readers, silent


def validation_loss(reader: Reader) -> float | None:
    """The validation loss that counts for a checkpoint, in nats per token; None where there is none.

    It was measured at the checkpoint's step or, where validation and checkpoints do not coincide, last before it and after the checkpoint before.
    """
    match reader.trainer.get("validation"):
        case {"loss": int() | float() as loss} if math.isfinite(loss):
            return float(loss)
    return None


def by_loss(paths: Iterable[Path], loss_of: Callable[[Path], float | None]) -> list[Path]:
    """Those that have a validation loss, the best first; of equal ones the later."""
    losses = {path: loss for path in paths if (loss := loss_of(path)) is not None}
    return sorted(losses, key=lambda path: (losses[path], -step_of(path)))


def best(run_dir: str | Path, warn: Callable[[str], None] = silent) -> Path | None:
    """The checkpoint of a run with the lowest validation loss, every byte of it checked; damaged ones are passed over and ``warn`` is told why."""
    found = {reader.path: reader for reader in readers(run_dir, warn)}
    for path in by_loss(found, lambda path: validation_loss(found[path])):
        try:
            found[path].verify()
            return path
        except CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
    return None


class _Facts(NamedTuple):
    """What retention goes by: the validation loss, and whether no steps were going wrong one after the other."""

    loss: float | None
    good: bool


class Retention:
    """Removes checkpoints that need not be kept any more; rank 0 only."""

    def __init__(self, root: Path, config: CheckpointConfig):
        self._root, self._config = root, config
        self._seen: dict[Path, _Facts] = {}

    def apply(self, newest_step: int) -> None:
        """Remove what the checkpoint of ``newest_step``, just written, makes superfluous.

        What stays is a function of the checkpoints that are there, so a restart changes nothing.
        """
        # A later one was passed over as damaged, or this one would not be written: it must not count as kept.
        paths = [p for p in committed(self._root.parent) if step_of(p) <= newest_step]
        self._seen.pop(paths[-1], None)  # its step may have come a second time
        every = self._config.keep_every
        kept = {p for p in paths if every is not None and step_of(p) % every == 0}
        kept.update(paths[-self._config.keep :])
        if self._config.keep_best:
            kept.update(by_loss(paths, lambda path: self._facts(path).loss)[: self._config.keep_best])
        # Where every other one is amid steps that go wrong, the run can go back to this.
        kept.update([path for path in paths if self._facts(path).good][-1:])
        for path in paths:
            if path not in kept:
                # Renamed it no longer counts, and is cleared here or by the next attempt however far the removal comes.
                with contextlib.suppress(OSError):
                    path.rename(self._root / f".tmp_old_{path.name}")
        for path in self._root.glob(".tmp_old_*"):
            shutil.rmtree(path, ignore_errors=True)

    def _facts(self, path: Path) -> _Facts:
        if path not in self._seen:
            try:
                reader = Reader(path)
                self._seen[path] = _Facts(validation_loss(reader), not reader.trainer.get("bad_steps"))
            except CheckpointError:
                self._seen[path] = _Facts(None, False)
        return self._seen[path]
