"""Joining a job and deciding together, on real processes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from mlm_dist import distributed
from mlm_dist.errors import UserError
from tests.ranks import ROOT, RanksFailed, run_ranks

# No float holds this, nor three times this.
HUGE = 2**61 + 1


def deciding() -> dict[str, Any]:
    """Called on every rank."""
    topology = distributed.init(60)
    control = distributed.ControlGroup(60)
    pending = [control.start([value, HUGE, -topology.rank]) for value in (topology.rank, 10)]
    result = {
        "topology": (topology.rank, topology.local_rank, topology.world_size),
        "sum": control.sum([1, topology.rank]),
        "gather": control.gather({"rank": topology.rank}),
        "broadcast": control.broadcast(f"from {topology.rank}"),
        "pending": [one.wait() for one in pending],
        "ask": [control.ask(values) for values in ([float(topology.rank), 0.5], [])],
    }
    control.barrier()
    distributed.shutdown()
    return result


def failing() -> None:
    """Called on every rank: rank 1 raises, rank 0 would wait for it."""
    topology = distributed.init(60)
    if topology.rank == 1:
        raise RuntimeError("rank 1 has had enough")
    distributed.ControlGroup(60).barrier()


def timeouts() -> list[float]:
    """Called on every rank: seconds after which a collective ends, for every group there is once DeepSpeed has made its
    own."""
    distributed.init(77)
    distributed.ControlGroup(77)
    model = torch.nn.Linear(4, 4)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}
    config["zero_force_ds_cpu_optimizer"] = False
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    groups = torch.distributed.distributed_c10d._world.pg_map
    cpu = torch.device("cpu")
    result = [group._get_backend(cpu).options._timeout.total_seconds() for group in groups]
    distributed.shutdown()
    return result


def test_every_group_has_the_runs_timeout() -> None:
    """A network that is cut gives no error; DeepSpeed would make its group with torch's half an hour."""
    for found in run_ranks("tests.dist.test_distributed:timeouts", world=2, timeout=60):
        assert len(found) >= 3 and set(found) == {77.0}


def test_ranks_agree_exactly() -> None:
    results = run_ranks("tests.dist.test_distributed:deciding", world=3, timeout=60)
    for rank, result in enumerate(results):
        assert result["topology"] == (rank, rank, 3)
        assert result["sum"] == [3, 3]
        assert result["broadcast"] == "from 0"
        assert result["pending"] == [[3, 3 * HUGE, -3], [30, 3 * HUGE, -3]]
    assert results[0]["gather"] == [{"rank": rank} for rank in range(3)]
    (answers, seconds), (empty, _) = results[0]["ask"]
    assert answers == [[float(rank), 0.5] for rank in range(3)] and empty == [[], [], []]
    assert seconds[0] == 0.0 and min(seconds[1:]) > 0.0
    assert results[1]["gather"] is None and results[1]["ask"] == [None, None]


def test_the_harness_shows_a_rank_that_fails_and_does_not_wait_for_the_others() -> None:
    with pytest.raises(RanksFailed, match="rank 1 has had enough"):
        run_ranks("tests.dist.test_distributed:failing", world=2, timeout=60)


def test_a_process_that_nobody_launched_is_a_job_of_one_and_says_nothing() -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")}
    code = "from tests.dist.test_distributed import deciding; r = deciding(); assert r['sum'] == [1, 0], r"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "contradict"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "contradict"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "must be integers"),
    ],
)
def test_an_environment_that_no_launcher_makes_is_refused(
    env: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        distributed.Topology.from_env()


@pytest.mark.parametrize(("host", "port"), [(None, "29500"), ("127.0.0.1", None), ("127.0.0.1", "http"), ("h", "65536")])
def test_a_job_without_a_place_to_meet_is_refused(
    host: str | None, port: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": host, "MASTER_PORT": port}
    for name, value in launched.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_PORT=.*2 rank.s. need a host and a port to meet at"):
        distributed.init()
