"""Going back: where a run returns to when step after step goes wrong, and which batches it leaves out from there.

As in PaLM's training (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1): a checkpoint of before the trouble, and not
only the batches in which it showed are left out but those before them too. Weights from which every batch goes wrong
were made by earlier ones.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlm_dist import checkpoint
from mlm_dist.ledger import Ledger, Skip


@dataclass(frozen=True)
class Plan:
    """What all ranks do.

    Attributes:
        to: the checkpoint to go on from, or None for the beginning of the run.
        step: its step.
        skip: the first and the last batch to leave out, numbered from 0.
    """

    to: Path | None
    step: int
    skip: Skip


def verdict(seen: Sequence[str | None]) -> tuple[str, list[int], str]:
    """What made a step go wrong: (cause, the ranks that saw it, in words).

    Args:
        seen: of each rank, its ``StepResult.seen``.
    """
    if "spike" in seen:
        return "spike", [], "the loss is far above that of recent steps"
    for cause in ("loss", "gradient"):
        ranks = [rank for rank, what in enumerate(seen) if what == cause]
        if ranks:
            of = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:16]))}{', ...' * (len(ranks) > 16)}"
            return cause, ranks, f"the {cause} is not finite on {of}"
    return "norm", [], "the norm of the gradient is not finite, though every rank's own gradient is"


def plan(run_dir: Path, ledger: Ledger, bad: Sequence[int], warn: Callable[[str], None]) -> Plan:
    """Where to go back to because of the batches ``bad``, which went wrong one after the other.

    As many batches before them as they are themselves are left out too, after one roll-back twice as many, and so on.
    """
    wanted = max(0, bad[0] - len(bad) * 2**ledger.rollbacks)
    readers = checkpoint.readers(run_dir)
    good = [r for r in readers if r.step <= bad[0] and not r.trainer.get("bad_steps") and not void(r, ledger)]
    # Best is the newest that is old enough, else what goes back as far as possible.
    for reader in sorted(good, key=lambda r: (r.step > wanted, -r.step if r.step <= wanted else r.step)):
        try:
            reader.verify()
        except checkpoint.CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
            continue
        return Plan(reader.path, reader.step, (max(wanted, reader.step), bad[-1]))
    return Plan(None, 0, (wanted, bad[-1]))


def void(reader: checkpoint.Reader, ledger: Ledger) -> bool:
    """Whether a checkpoint is of the steps that a roll-back took back."""
    return ledger.made_before(reader.step, reader.trainer.get("skips", ()))


def discard(paths: Iterable[Path]) -> None:
    """Remove void checkpoints; one that is left by a crash is known as void by its ledger."""
    for path in paths:
        doomed = path.rename(path.parent / f".tmp_void_{path.name}_{time.time_ns()}")
        shutil.rmtree(doomed, ignore_errors=True)


def void_checkpoints(run_dir: Path, ledger: Ledger) -> list[Path]:
    """All void ones of a run."""
    if not ledger.skips:  # most runs, which need not read their checkpoints for it
        return []
    return [reader.path for reader in checkpoint.readers(run_dir) if void(reader, ledger)]
