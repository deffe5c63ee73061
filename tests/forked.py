"""Launches of several ranks, one after the other, each rank forked from one process that has imported torch and
DeepSpeed: a launch then costs a tenth of a second in place of ten seconds a rank.

    results = run_forked("tests.dist.cases:run", [(2, {"jobs": jobs}), (3, {"jobs": others})], timeout=120)

As `tests.ranks.run_ranks` for each (world, args); every rank is a new process, so nothing but files goes from one launch
to the next.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.ranks import ROOT, RanksFailed, free_port

# Packages whose parts are imported where they are used, which is after the fork; those have no threads of their own.
LATE = ("deepspeed", "transformers", "torch")


def run_forked(target: str, launches: Sequence[tuple[int, dict[str, Any]]], timeout: float = 120.0) -> list[list[Any]]:
    """For each launch what its ranks returned, in rank order. `timeout` in seconds, for all launches together."""
    with tempfile.TemporaryDirectory(prefix="forked-") as name:
        folder = Path(name)
        (folder / "args.pickle").write_bytes(pickle.dumps((target, list(launches))))
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", name],
                env=env,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"not done after {timeout:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code != 0:
            raise RanksFailed(f"{target}: {code}\n{(folder / 'log').read_text(errors='replace')[-12000:]}")
        return [
            [pickle.loads((folder / f"result-{number}-{rank}").read_bytes()) for rank in range(world)]
            for number, (world, _) in enumerate(launches)
        ]


def _main(folder: Path) -> None:
    target, launches = pickle.loads((folder / "args.pickle").read_bytes())
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    for number, (world, args) in enumerate(launches):
        os.environ.update(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        for rank in range(world):
            if os.fork() == 0:
                _rank(function, args, rank, folder / f"result-{number}-{rank}")
        for _ in range(world):
            _, status = os.wait()
            if status:
                sys.exit(f"launch {number}: a rank ended with {os.waitstatus_to_exitcode(status)}")
        if number == 0:  # what its ranks imported, so that those of the other launches need not
            for part in pickle.loads((folder / "modules").read_bytes()):
                if part.partition(".")[0] in LATE:
                    with contextlib.suppress(Exception):
                        importlib.import_module(part)


def _rank(function: Any, args: dict[str, Any], rank: int, result: Path) -> None:
    """What a forked rank does; never returns."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    code = 1
    try:
        result.write_bytes(pickle.dumps(function(**args)))
        if rank == 0:
            (result.parent / "modules").write_bytes(pickle.dumps(sorted(sys.modules)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
