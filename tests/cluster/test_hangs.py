"""The network between two hosts is cut: on both sides the run ends by itself, and says between whom."""

import sys
from pathlib import Path

import pytest

from mlm_dist.files import read_json_lines
from mlm_dist.lifecycle import EXIT_HUNG
from tests.cluster.cluster import Cluster, status, tails
from tests.cluster.test_hosts import wait

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_a_cut_network_ends_the_run_on_both_sides(cluster: Cluster, folder: Path, config: Path) -> None:
    run = folder / "runs" / "cut"
    hostfile = folder / "hosts"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    command = [sys.executable, "-m", "launcher.cli", "hosts", "--hostfile", hostfile, "--config", config]
    parts, logs = [], [folder / f"cut-{rank}.log" for rank in range(2)]
    for rank, log in enumerate(logs):
        words = [*command, "--train.steps", 100000, "--run.name", "cut", "--no-ssh", "--node-rank", rank]
        parts.append(cluster.start_on(rank + 1, *words, log=log))
    cluster.wait_for_step(run, 5)
    cluster.cut(2)
    assert [wait(part, log) for part, log in zip(parts, logs, strict=True)] == [EXIT_HUNG] * 2, tails(logs)
    (event,) = (e for e in read_json_lines(run / "events.jsonl") if e["kind"] == "hang")
    assert status(run)["state"] == "failed" and status(run)["reason"] == event["reason"]
    # Rank 0's side hears no more of rank 1, the other no more of the store.
    assert [p["rank"] for p in event["behind"]] == [1] and "rank 1 on node2 does not answer" in event["reason"]
    assert "has not answered rank 1 on node2" in (run / "logs" / "rank-00001.log").read_text()
    assert all((run / "logs" / f"attempt_1_rank_{rank}.stacks").stat().st_size for rank in range(2))
    cluster.heal(2)
