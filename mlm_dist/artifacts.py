"""Which checkpoints become artifacts of the W&B run: references to where they lie, not copies."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Choice = Literal["none", "final", "best", "all"]


@dataclass(frozen=True)
class Kept:
    """A whole checkpoint that is there.

    Attributes:
        made: when, in Unix seconds; one that is made again at the same step is another.
        loss: the validation loss that counts for it, in nats per token, or None.
    """

    path: Path
    step: int
    made: float
    loss: float | None

    @property
    def facts(self) -> dict[str, Any]:
        """For the artifact's metadata."""
        return {"step": self.step, "made": self.made, "val_loss": self.loss}


def kept(run_dir: Path) -> list[Kept]:
    """The checkpoints of a run, by step."""
    from mlm_dist import checkpoint
    from mlm_dist.checkpoint.retention import validation_loss

    return [
        Kept(r.path, r.step, float(r.trainer.get("time", 0)), validation_loss(r)) for r in checkpoint.readers(run_dir)
    ]


def due(
    choice: Choice, there: Sequence[Kept], sent: Collection[tuple[int, float]], *, finished: bool
) -> list[tuple[Kept, list[str]]]:
    """What is to be sent now, each with its aliases.

    Args:
        there: by step.
        sent: (step, made) of those that W&B has.
        finished: the run is, and the last of them is its result.
    """
    scored = [k for k in there if k.loss is not None]
    best = min(scored, key=lambda k: (k.loss, -k.step), default=None)
    out = []
    for k in there:
        final = finished and k is there[-1]
        wanted = {"none": False, "all": True, "best": k is best, "final": final}[choice]
        if wanted and (final or (k.step, k.made) not in sent):  # a final one perhaps again, for the name of it
            aliases = [k.path.name, *(["best"] if k is best else []), *(["final"] if final else [])]
            out.append((k, aliases))
    return out
