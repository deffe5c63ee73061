"""A branch: a run that begins from a checkpoint of another, with everything that is in it, and from then on needs that run no more."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlm_dist import checkpoint
from mlm_dist.errors import UserError
from mlm_dist.files import read_json
from mlm_dist.lifecycle import differences, listing
from mlm_dist.schedule import ScheduleConfig, lr_factor

# Learning rates of the run and the branch that differ by a larger share than this make a jump.
SAME_RATE = 0.01


class Base:
    """The checkpoint that a branch begins from.

    Args:
        source: a run directory, for its newest whole checkpoint, or one of its checkpoints.
        warn: told of damaged checkpoints that are passed over.

    Raises:
        UserError: there is none, or it does not lie in a run directory.
    """

    def __init__(self, source: str, warn: Callable[[str], None]):
        try:
            self.path = checkpoint.locate(source, warn)
        except checkpoint.CheckpointError as error:
            raise UserError(f"run.branch_from: {error}") from error
        self.reader = checkpoint.Reader(self.path)
        self.step = self.reader.step
        recorded = read_json(self.path.parent.parent / "identity.json") or {}
        if not all(isinstance(recorded.get(part), dict) for part in ("identity", "guarded")):
            raise UserError(
                f"run.branch_from: {source!r} does not lie in a run directory with its identity.json; give a run directory, or RUN/checkpoints/step_N in place."
            )
        self.source, self.identity, self.guarded = source, recorded["identity"], recorded["guarded"]

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Raises UserError where what makes a run what it is differs between the run and its branch; shows old and new."""
        wrong = differences(self.identity, {k: v for k, v in identity.items() if k != "run.branch_from"})
        if wrong:
            raise UserError(
                f"run.branch_from: {self.source!r} belongs to a different config:\n"
                + listing(wrong)
                + "\nGive these values back. A branch goes on with the same data, model and optimizer; length, learning rate and schedule are its own."
            )

    def check_rate(self, progress: float, lr: float, config: ScheduleConfig, allow: Sequence[str]) -> None:
        """See that the learning rate goes on from where the run was.

        Args:
            progress: share of the branch's whole length that is done at the checkpoint.
            lr: the branch's peak rate, which ``config`` moves.
            allow: keys of ``--allow_change``; with ``optim.lr`` it may jump.

        Raises:
            UserError: it would jump, or the branch would be over before its first step.
        """
        if progress >= 1:
            raise UserError(
                f"run.branch_from: {self.source!r} is at step {self.step}, where this branch would be over; raise train.steps or train.epochs."
            )
        before, after = self._rate(), lr * lr_factor(self.step, progress, config)
        if "optim.lr" in allow or abs(after - before) <= SAME_RATE * max(before, after):
            return
        raise UserError(
            f"run.branch_from: at step {self.step} the learning rate would jump from the run's {before:.4g} to {after:.4g}. Give the branch the run's "
            "optim.lr and optim.warmup; to decay from here let optim.decay be the steps that are left, or take a checkpoint from before the run's own decay. "
            "To jump on purpose add --allow_change optim.lr"
        )

    def _rate(self) -> float:
        """The learning rate that the run itself had next."""
        keys = {f.name: f"optim.{f.name}" for f in fields(ScheduleConfig)}
        config = ScheduleConfig(**{name: self.guarded[key] for name, key in keys.items() if key in self.guarded})
        # The checkpoint's own progress may be of another length: that of a run before --allow_change, or of its base.
        steps = self.guarded.get("train.steps")
        progress = min(1.0, self.step / steps) if steps else self.reader.trainer["progress"]
        return float(self.guarded["optim.lr"]) * lr_factor(self.step, progress, config)

    def adopt(self, run_dir: Path) -> Path:
        """Copy the checkpoint into ``run_dir``, as the one that the branch goes on from; it gets a W&B run of its own.

        Raises:
            UserError: it vanished meanwhile; a run keeps its newest only.
            OSError: ``run_dir`` cannot be written.
        """
        facts = {"wandb_id": None, "branched_from": {"checkpoint": str(self.path), "step": self.step}}
        try:
            return checkpoint.adopt(self.reader, run_dir, {**self.reader.trainer, **facts})
        except (checkpoint.CheckpointError, FileNotFoundError) as error:
            raise UserError(
                f"run.branch_from: {self.path} could not be copied ({error}); choose a checkpoint that stays (checkpoint.keep_every), or start again."
            ) from error
