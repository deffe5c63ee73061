"""How many rows each global batch has: the same all along, or growing over the first tokens of a run."""

from dataclasses import dataclass

import numpy as np

from mlm_dist.errors import UserError


@dataclass(frozen=True)
class BatchWarmup:
    """How batches grow.

    Attributes:
        start: rows of the first batch; divides those of the largest.
        tokens: token places (rows x longest row) over which they grow.
    """

    start: int
    tokens: int

    @staticmethod
    def of(start: int | None, tokens: int | None, largest: int) -> "BatchWarmup | None":
        """What ``train.batch_start``, ``train.batch_warmup_tokens`` and ``train.global_batch`` mean.

        Raises:
            UserError: only one of the first two is given, or batches cannot grow from the first to the last.
        """
        if (start is None) != (tokens is None):
            raise UserError(
                f"train.batch_start: {start}, train.batch_warmup_tokens: {tokens}; for batches that grow give both, else neither."
            )
        if start is None or tokens is None:
            return None
        if largest % start or start == largest:
            smaller = [n for n in range(1, largest // 2 + 1) if largest % n == 0]
            near = min(smaller, key=lambda n: abs(n - start), default=None)
            raise UserError(
                f"train.batch_start: {start} rows must divide train.global_batch {largest} and be fewer"
                + (f"; the nearest number that does is {near}." if near else ".")
            )
        return BatchWarmup(start, tokens)


@dataclass(frozen=True)
class BatchSchedule:
    """The rows of every batch: batch k is rows [first(k), first(k + 1)) of the run.

    A run has few stages, of batches of one size each, so that whatever is asked of batch a million is found at once.

    Attributes:
        steps: int64 [stages], the batch with which a stage begins; rises, but for stages that no batch falls into.
        rows: int64 [stages], the row with which it begins.
        sizes: int64 [stages], rows of its batches; rises.
    """

    steps: np.ndarray
    rows: np.ndarray
    sizes: np.ndarray

    @staticmethod
    def constant(size: int) -> "BatchSchedule":
        """Every batch has ``size`` rows."""
        return BatchSchedule(np.zeros(1, np.int64), np.zeros(1, np.int64), np.asarray([size], np.int64))

    @staticmethod
    def growing(warmup: BatchWarmup, size: int, seq_len: int) -> "BatchSchedule":
        """Linearly from ``warmup.start`` rows to ``size`` over the first ``warmup.tokens`` token places, ``seq_len`` a row.

        Sizes are multiples of the first: every size below the last rules for an equal share of the tokens, and a batch has the size that rules at its
        first row.
        """
        start, tokens, stages = warmup.start, warmup.tokens, size // warmup.start
        assert 0 < start < size and size % start == 0
        steps, rows = np.zeros(stages, np.int64), np.zeros(stages, np.int64)
        for i in range(1, stages):
            end = -(-i * tokens // ((stages - 1) * seq_len))  # the first row at which stage i rules
            batches = max(0, -(-(end - int(rows[i - 1])) // (i * start)))
            steps[i], rows[i] = steps[i - 1] + batches, rows[i - 1] + batches * i * start
        return BatchSchedule(steps, rows, start * np.arange(1, stages + 1))

    @property
    def smallest(self) -> int:
        """Rows of the smallest batch, the first."""
        return int(self.sizes[0])

    @property
    def largest(self) -> int:
        """Rows of the batches after all growth."""
        return int(self.sizes[-1])

    @property
    def full_from(self) -> int:
        """The first batch of the largest size."""
        return int(self.steps[-1])

    def size(self, step: int) -> int:
        """Rows of batch ``step``."""
        return int(self.sizes[self._stage(step)])

    def first(self, step: int) -> int:
        """The first row of batch ``step``: the number of rows before it."""
        stage = self._stage(step)
        return int(self.rows[stage] + (step - self.steps[stage]) * self.sizes[stage])

    def batch_of(self, rows: np.ndarray) -> np.ndarray:
        """The batch that each of ``rows`` (int64 [n], numbers in the run) belongs to, int64 [n]."""
        stages = np.searchsorted(self.rows, rows, side="right") - 1
        return self.steps[stages] + (rows - self.rows[stages]) // self.sizes[stages]

    def _stage(self, step: int) -> int:
        return int(np.searchsorted(self.steps, step, side="right")) - 1
