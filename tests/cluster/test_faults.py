"""Hosts and ranks that fail: the run goes on elsewhere from its last checkpoint, or ends, and leaves nothing running."""

import json
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, attempt_steps, status
from tests.cluster.test_stops import assert_same_run, job_log, wait_for_restart

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(500)]


def test_a_run_outlives_its_hosts(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    run = config.parent / "runs" / "moved"
    job = cluster.submit(config, "--nodes", 2, "--run.name", "moved")
    cluster.wait_for_attempt(run, 1)
    assert cluster.job(job)["NodeList"] == "node[1-2]"

    # The host of the batch script and of rank 0 loses its power: the run goes on with the node that was free.
    cluster.power_off(1)
    wait_for_restart(cluster, job, 1)
    cluster.wait_for_attempt(run, 2, timeout=150)
    assert cluster.job(job)["NodeList"] == "node[2-3]"

    # The cable of the other one's is cut: the network says nothing, and what runs there has to notice by itself.
    cluster.boot(1)
    cluster.cut(3)
    wait_for_restart(cluster, job, 2)
    cluster.wait_for("what ran behind the cut cable ends", lambda: not cluster.ranks(3))
    cluster.wait_for_attempt(run, 3)
    assert cluster.job(job)["NodeList"] == "node[1-2]"

    # The power of a node fails while no other is free: the run waits until it is back.
    cluster.power_off(2)
    wait_for_restart(cluster, job, 3)
    cluster.wait_for("the job waits", lambda: cluster.job(job)["JobState"] == "PENDING")
    cluster.boot(2)

    assert cluster.wait_for_end(job) == "COMPLETED"
    assert sorted(attempt_steps(run)) == [1, 2, 3, 4]
    assert_same_run(run, undisturbed)
    cluster.heal(3)


def test_a_crash_loop_ends_with_the_reason(cluster: Cluster, config: Path) -> None:
    run = config.parent / "runs" / "loop"
    job = cluster.submit(config, "--nodes", 2, "--run.name", "loop", "--program", "tests.cluster.crashes")
    assert cluster.wait_for_end(job) == "FAILED"
    assert cluster.job(job)["Restarts"] == "2"
    assert "crashed 3 times in a row before its first checkpoint" in job_log(run, job)
    assert json.loads(cluster.launch("status", run, "--json"))["state"] == "failed"
    assert not (run / "status.json").exists() or status(run)["state"] == "failed"
