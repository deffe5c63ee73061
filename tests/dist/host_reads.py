"""What a rank of the test of host synchronisation runs: the program, with every operation that would wait for a device counted."""

import sys
import threading
from collections import Counter
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlm_dist import distributed, train

aten = torch.ops.aten
# On CUDA these give the host a value, or a shape that depends on values, and so wait for all that was queued before.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}
OWNERS = ("/mlm_dist/", "/deepspeed/", "/transformers/")


def owner() -> str:
    """The package, and within it the function, that the operation is called from."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        for package in OWNERS:
            if package in frame.f_code.co_filename:
                return f"{package.strip('/')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


class HostReads(TorchDispatchMode):
    """Counts them by owner."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING or (func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.counts[owner()] += 1
        return func(*args, **(kwargs or {}))


def count_copies(reads: HostReads) -> None:
    """Count what copies a tensor to the host too. On host memory it dispatches nothing, so the methods are wrapped."""

    def wrap(name: str) -> None:
        method = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # The control reduction's sums are host memory on a GPU, too.
            if threading.current_thread() is threading.main_thread() and (who := owner()) != "mlm_dist.wait":
                reads.counts[who] += 1
            return method(self, *args, **kwargs)

        setattr(torch.Tensor, name, counted)

    for name in ("tolist", "numpy", "cpu"):
        wrap(name)


def count(argv: list[str]) -> list[dict[str, int]]:
    """Run the program; the counts of each of its steps, from one control reduction to the next."""
    marks: list[Counter[str]] = []
    reads = HostReads()
    count_copies(reads)
    start = distributed.ControlGroup.start

    def marked(self: distributed.ControlGroup, values: list[int]) -> distributed.PendingSum:
        if sys._getframe(1).f_code.co_name == "_steps":
            marks.append(reads.counts.copy())
        return start(self, values)

    distributed.ControlGroup.start = marked  # type: ignore[method-assign]
    with reads:
        assert train.main(argv) == 0
    return [dict(after - before) for before, after in zip(marks, marks[1:], strict=False)]
