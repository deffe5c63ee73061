"""The program with numbers that go wrong in given batches, whatever attempt or world size trains on them.

MLM_TEST_FAULTS is JSON, a list of {kind, batches, rank}: kind is loss (NaN), gradient (inf, under a finite loss) or
spike (a finite loss, 100 times too large); rank is null for every rank.
"""

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from mlm_dist import train
from mlm_dist.model.head import MaskedLM

FAULTS = "MLM_TEST_FAULTS"


def fault(kind: str, *batches: int, rank: int | None = None) -> dict[str, Any]:
    """One of the list."""
    return {"kind": kind, "batches": batches, "rank": rank}


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.full_like(gradients[0], float("inf"))


def main() -> int:
    faults = json.loads(os.environ.get(FAULTS, "[]"))
    rank, now = int(os.environ["RANK"]), -1
    keyed_seed, forward = train.keyed_seed, MaskedLM.forward

    def seed(run_seed: int, purpose: str, step: int, *rest: int) -> int:
        nonlocal now
        now = step
        return keyed_seed(run_seed, purpose, step, *rest)

    def faulty(self: MaskedLM, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        loss, correct = forward(self, *args, **kwargs)
        for entry in faults if self.training else ():
            if now in entry["batches"] and entry["rank"] in (None, rank):
                if entry["kind"] == "loss":
                    loss = loss * float("nan")
                elif entry["kind"] == "gradient":
                    loss = _BadGradient.apply(loss)
                else:
                    loss = loss * 100
        return loss, correct

    train.keyed_seed, MaskedLM.forward = seed, faulty  # type: ignore[assignment, method-assign]
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
