"""Validation: the whole held-out set with fixed masks, the same whatever the number of ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
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


class Control(Protocol):
    """The part of ``distributed.ControlGroup`` that is used here."""

    def sum(self, values: list[int]) -> list[int]: ...

    def gather(self, obj: Any) -> list[Any] | None: ...


def validate(
    stream: Stream, forward: Callable[[dict[str, Any]], tuple[torch.Tensor, torch.Tensor]], control: Control
) -> dict[str, float]:
    """Measure one epoch of ``stream``. Collective: every rank calls it; rank 0 gets the numbers, the others an empty dict.

    Args:
        forward: micro-batch -> (sum of cross-entropies, number right), called equally often on all ranks.

    Returns:
        loss in nats per selected token, perplexity, accuracy, number of selected tokens, and unigram_entropy: the entropy in nats of the
        distribution of all ordinary tokens in the set (a predictor that ignores the context cannot have a lower loss, whatever it was trained
        on); lost_documents: how many of the set could not be read, and so count in none of the others.
    """
    tokenizer = stream.tokenizer
    loss, right, selected, lost = 0.0, 0, 0, 0
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for batch in stream.batches():
        lost += sum(fault.documents for fault in batch.faults)
        if not control.sum([int(batch.live.sum())])[0]:
            break
        for micro in stream.collate(batch):
            part_loss, part_right = forward(micro)
            loss, right = loss + float(part_loss.double()), right + int(part_right)
        selected += batch.selected
        counts += np.bincount(batch.rows.original_ids(), minlength=len(counts))
    right, selected, lost = control.sum([right, selected, lost])
    counts = np.asarray(control.sum(counts.tolist()))
    losses = control.gather(loss)
    if losses is None:
        return {}
    mean = math.fsum(losses) / max(1, selected)
    return {
        "loss": mean,
        "perplexity": perplexity(mean),
        "accuracy": right / max(1, selected),
        "selected": selected,
        "unigram_entropy": unigram_entropy(counts, tokenizer.special),
        "lost_documents": lost,
    }


def perplexity(nats: float) -> float:
    """Of a mean in nats a token; what would overflow is cut off at e^80."""
    return math.exp(min(nats, 80.0))


def unigram_entropy(counts: np.ndarray, special: np.ndarray) -> float:
    """Entropy in nats of the distribution of all ids but the ``special`` ones, by how often each is there (int64 [vocab_size])."""
    ordinary = np.delete(counts, special)
    shares = ordinary[ordinary > 0] / max(1, ordinary.sum())
    return float(-(shares * np.log(shares)).sum())
