"""Validation: the whole held-out set with fixed masks, the same whatever the number of ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mlm_dist.data.stream import Stream
from mlm_dist.errors import UserError


@dataclass
class EvalConfig:
    """When and how to validate.

    Attributes:
        every: optimizer steps between validations; null validates at the end only.
        seed: keys the masks, apart from the run's seed so that runs compare.
        batch: rows of one validation batch over all ranks; changes memory, not the result.
    """

    every: int | None = None
    seed: int = 1234
    batch: int = 64

    def check(self) -> None:
        """Raises UserError for values that no validation can have."""
        if self.every is not None and self.every < 1:
            raise UserError(f"eval.every: {self.every} must be at least 1 step, or null.")
        if self.batch < 1:
            raise UserError(f"eval.batch: {self.batch} must be at least 1.")


def validate(
    stream: Stream,
    forward: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]],
    total: Callable[[list[int]], list[int]],
    total_float: Callable[[float], float],
) -> dict[str, float]:
    """Loss (nats per selected token), perplexity and accuracy over ``stream``, one epoch. Collective: every rank calls it.

    Args:
        forward: micro-batch -> (sum of cross-entropies, number right), called equally often on all ranks.
        total: sums integers over the ranks, exactly.
        total_float: sums one float64 over the ranks.
    """
    loss, right, selected = 0.0, 0, 0
    for batch in stream.batches():
        if not total([int(batch.live.any())])[0]:
            break
        for micro in stream.collate(batch):
            part_loss, part_right = forward(micro)
            loss, right = loss + float(part_loss.double()), right + int(part_right)
        selected += batch.selected
    right, selected = total([right, selected])
    mean = total_float(loss) / max(1, selected)
    return {"loss": mean, "perplexity": math.exp(min(mean, 80.0)), "accuracy": right / max(1, selected), "selected": selected}


