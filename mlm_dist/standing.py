"""Where a run stood in its data at some step, by what its directory holds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlm_dist import checkpoint
from mlm_dist.data.lanes import Lost
from mlm_dist.ledger import Ledger


@dataclass(frozen=True)
class Standing:
    """A step and what its batch is a function of, beside the config.

    Attributes:
        step: of the checkpoint, or 0.
        cursors: int64 [lanes, 3] at it; None at the beginning.
        ledger: of the whole run.
    """

    step: int
    cursors: np.ndarray | None
    ledger: Ledger

    @property
    def lost(self) -> Lost:
        """Blocks that are not read."""
        return self.ledger.lost_blocks()

    @classmethod
    def before(cls, run: Path, step: int) -> "Standing":
        """At the last checkpoint of ``run`` at or before ``step``: what comes before it in the lanes need not be read again."""
        ledger = Ledger.read(run / "events.jsonl")
        for reader in reversed(checkpoint.readers(run)):
            trainer = reader.trainer
            ledger.add(trainer["ledger"])
            ledger.add_skips(trainer.get("skips", ()))
            if reader.step <= step:
                return cls(reader.step, np.asarray(trainer["cursors"], np.int64), ledger)
        return cls(0, None, ledger)
