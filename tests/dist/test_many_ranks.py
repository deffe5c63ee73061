"""What grows with the number of ranks, on more of them than other tests start: forked, so that torch is imported once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ranks import ROOT, free_port

RANKS = 24
PROGRAM = """
import os, resource
import torch
from mlm_dist import distributed

torch.set_num_threads(1)
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (48, most))
world = int(os.environ["WORLD_SIZE"])
for rank in range(world):
    if os.fork() == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        distributed.init(60)
        control = distributed.ControlGroup(60)
        right = control.sum([rank]) == [world * (world - 1) // 2]
        control.barrier()
        os._exit(0 if right else 3)
print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(world)])
"""


@pytest.mark.timeout(120)
def test_a_start_may_need_more_open_files_than_the_soft_limit() -> None:
    env = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.split("\n")[-2] == str([0] * RANKS), done.stderr[-3000:]
