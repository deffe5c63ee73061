"""The program with a slow rank: `SLOW=CAUSE:RANK,... python -m tests.e2e.slow --config C` delays these ranks by 200 ms, each for its cause."""

import os
import sys
import time
from typing import Any

import torch.distributed as dist

from mlm_dist import train
from mlm_dist.feed import Feeder
from mlm_dist.model.head import MaskedLM

DELAY_S = 0.2
PLACES: dict[str, list[tuple[Any, str]]] = {
    "data": [(Feeder, "__next__")],
    "compute": [(MaskedLM, "forward")],
    "communication": [(dist, "gather"), (dist, "send")],  # what it sends leaves late
}


def slow(where: Any, name: str) -> None:
    plain = getattr(where, name)

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(DELAY_S)
        return plain(*args, **kwargs)

    setattr(where, name, late)


if __name__ == "__main__":
    for part in os.environ["SLOW"].split(","):
        cause, rank = part.split(":")
        if rank == os.environ["RANK"]:
            for place in PLACES[cause]:
                slow(*place)
    sys.exit(train.main())
