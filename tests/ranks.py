"""Runs a function on several real processes, one for each rank, as a launcher would.

    results = run_ranks("tests.dist.cases:parity", world=2, args={"stage": 3}, timeout=120)

The target is `module:function`; it is called with `**args` after the RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* of its
process are set, and what it returns (anything that pickles) comes back, in rank order. A rank that fails or a timeout
kills all and fails with what the ranks wrote to stderr.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class RanksFailed(AssertionError):
    """A rank exited with an error, or the time was up."""


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    target: str,
    world: int,
    args: dict[str, Any] | None = None,
    timeout: float = 120.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """See the module. `timeout` in seconds, for all ranks together; `env` is added to the environment of each."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "args.pickle").write_bytes(pickle.dumps((target, args or {})))
        common = {
            **os.environ,
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **(env or {}),
        }
        logs = [folder / f"stderr-{rank}" for rank in range(world)]
        processes = []
        for rank in range(world):
            with logs[rank].open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.ranks", name],
                        env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        cwd=ROOT,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        try:
            cause = _wait(processes, timeout)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if cause:
            tails = (f"--- rank {rank}\n{log.read_text(errors='replace')[-6000:]}" for rank, log in enumerate(logs))
            raise RanksFailed("\n".join([f"{target} on {world} ranks: {cause}", *tails]))
        return [pickle.loads((folder / f"result-{rank}.pickle").read_bytes()) for rank in range(world)]


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> str | None:
    """None when every process ended well, else what went wrong first."""
    end = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # The others fail in the next moment because of it; what they say may help.
            time.sleep(0.5)
            return f"rank {failed[0]} exited with {codes[failed[0]]}"
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > end:
            return f"not done after {timeout:.0f} s"
        time.sleep(0.02)


def _main(folder: Path) -> None:
    target, args = pickle.loads((folder / "args.pickle").read_bytes())
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(**args)
    partial = folder / f"partial-{os.environ['RANK']}.pickle"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(folder / f"result-{os.environ['RANK']}.pickle")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
    # Without the interpreter's tidying: a thread of gloo that meets it on its way out aborts the process now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
