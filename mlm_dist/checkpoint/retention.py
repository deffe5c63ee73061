"""Which checkpoints of a run stay: the newest, every n-th."""

import contextlib
import shutil
from pathlib import Path

from mlm_dist.checkpoint.format import CheckpointConfig, step_of
from mlm_dist.checkpoint.reader import committed


class Retention:
    """Removes checkpoints that need not be kept any more; rank 0 only."""

    def __init__(self, root: Path, config: CheckpointConfig):
        self._root, self._config = root, config

    def apply(self, newest_step: int) -> None:
        """Remove what the checkpoint of ``newest_step``, just written, makes superfluous."""
        # A later one was passed over as damaged, or this one would not be written: it must not count as kept.
        paths = [p for p in committed(self._root.parent) if step_of(p) <= newest_step]
        every = self._config.keep_every
        for path in paths[: -self._config.keep]:
            if every is None or step_of(path) % every:
                # Renamed it no longer counts, and is cleared here or by the next attempt however far the removal comes.
                with contextlib.suppress(OSError):
                    path.rename(self._root / f".tmp_old_{path.name}")
        for path in self._root.glob(".tmp_old_*"):
            shutil.rmtree(path, ignore_errors=True)
