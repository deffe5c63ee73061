"""The whole program as one rank, watched: what rows and seeds each step got, and a signal in the middle of one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

from mlm_dist import train
from mlm_dist.engine import Engine, MicroBatch, StepResult

Row = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]


def rows(micro_batch: MicroBatch) -> list[Row]:
    """Of each row with text: its tokens without padding, and (place, token to predict)."""
    ids, segments = micro_batch["input_ids"], micro_batch["segment_ids"]
    width = ids.shape[1]
    places = zip(micro_batch["selected"].tolist(), micro_batch["labels"].tolist(), strict=True)
    labels: list[list[tuple[int, int]]] = [[] for _ in ids]
    for place, label in places:
        labels[place // width].append((place % width, label))
    tokens = [tuple(row[segment > 0].tolist()) for row, segment in zip(ids, segments, strict=True)]
    return [(t, tuple(p)) for t, p in zip(tokens, labels, strict=True) if p]


class Interrupted(list[MicroBatch]):
    """A step's micro-batches; after the first comes SIGUSR1, as from a cluster that wants its nodes back."""

    def __iter__(self) -> Iterator[MicroBatch]:
        for index, micro_batch in enumerate(super().__iter__()):
            if index == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield micro_batch


def run(config: str, flags: list[str], first: int, stop_at: int | None, stop_rank: int) -> dict[str, Any]:
    """One attempt, which goes on with step `first` (counted from 0); on the rank `stop_rank` the signal comes within step `stop_at`."""
    steps: dict[int, dict[str, Any]] = {}

    class Watched(Engine):
        def step(self, micro_batches: Any, **how: Any) -> StepResult:
            step = first + len(steps)
            found = [row for micro_batch in micro_batches for row in rows(micro_batch)]
            steps[step] = {"rows": found, "micro_batches": len(micro_batches), "seeds": how["seeds"]}
            if step == stop_at and int(os.environ["RANK"]) == stop_rank:
                micro_batches = Interrupted(micro_batches)
            return super().step(micro_batches, **how)

    train.Engine = Watched  # type: ignore[misc]
    return {"code": train.main(["--config", config, *flags]), "steps": steps}
