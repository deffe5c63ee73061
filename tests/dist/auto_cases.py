"""What the ranks of the tests of `train.micro_batch: auto` run: the program itself, with ranks on which there is less room."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch

from mlm_dist import autobatch, train
from mlm_dist.distributed import Topology
from mlm_dist.model.head import MaskedLM


def run(
    argv: list[str], fails_above: int | None = None, address_space: int | None = None, trials: bool = True
) -> tuple[int, list[int]]:
    """The program's exit code, and the rows of every forward pass of this rank.

    Args:
        fails_above: rows above which the model of the last rank runs out of memory.
        address_space: bytes that the last rank's may grow by when the trials begin; the planner is told that there is plenty.
        trials: whether there may be any.
    """
    rows: list[int] = []
    topology = Topology.from_env()
    last = topology.rank == topology.world_size - 1
    forward, settle = MaskedLM.forward, autobatch.settle

    def limited(self: MaskedLM, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(input_ids))
        if last and fails_above is not None and len(input_ids) > fails_above:
            raise torch.OutOfMemoryError("no room")
        return forward(self, input_ids, *args, **kwargs)

    def bounded(*args: Any, **kwargs: Any) -> Any:
        if not last or address_space is None:
            return settle(*args, **kwargs)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, ((int(status["VmSize"].split()[0]) << 10) + address_space, hard))
        try:
            # Without oneDNN: where a page for the code that it generates is refused once, it creates nothing in that process again
            # ("could not create a primitive" at one row too, with 150 MB free), and whether it is depends on the layout of the moment.
            with torch.backends.mkldnn.flags(enabled=False):
                return settle(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    MaskedLM.forward = limited  # type: ignore[method-assign]
    autobatch.settle = bounded
    autobatch.memory = lambda device: (1 << 50, 1 << 50)
    if not trials:
        autobatch.trial = None  # type: ignore[assignment]
    return train.main(argv), rows
