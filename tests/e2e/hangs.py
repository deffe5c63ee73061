"""The program with a fault: `HANG=KIND:RANK:STEP python -m tests.e2e.hangs --config C` hangs that rank in that step of the attempt, the first being 1.

Each fault is a function of its own, by whose name a test finds it in the stacks.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from mlm_dist import train
from mlm_dist.data.stream import Stream
from mlm_dist.distributed import ControlGroup
from mlm_dist.engine import Engine


def asleep_in_the_data_path() -> None:
    time.sleep(1000)


def asleep_in_the_control_plane() -> None:
    time.sleep(1000)


def spinning_with_the_gil() -> None:
    ctypes.PyDLL(None).sleep(1000)


def stopped_by_a_signal() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def failing_alone() -> None:
    raise RuntimeError("this rank alone")


FAULTS: dict[str, tuple[type, str, Callable[[], None]]] = {
    "data": (Stream, "collate", asleep_in_the_data_path),
    "control": (ControlGroup, "start", asleep_in_the_control_plane),
    "spin": (Engine, "step", spinning_with_the_gil),
    "stop": (Engine, "step", stopped_by_a_signal),
    "fail": (Engine, "step", failing_alone),
}


def inject(where: type, name: str, fault: Callable[[], None], call: int) -> None:
    """Runs `fault` before the `call`-th call of a method."""
    plain, calls = getattr(where, name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            fault()
        return plain(*args, **kwargs)

    setattr(where, name, faulty)


if __name__ == "__main__":
    kind, rank, step = os.environ.get("HANG", "none:0:0").split(":")
    if kind in FAULTS and rank == os.environ["RANK"]:
        inject(*FAULTS[kind], int(step))
    sys.exit(train.main())
