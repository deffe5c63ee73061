"""A run that Slurm or its user stops: one checkpoint, nothing lost, and it goes on only where it should."""

import json
from pathlib import Path

import pytest

from mlm_dist import checkpoint
from tests.cluster.cluster import Cluster, attempt_steps, status
from tests.cluster.conftest import STEPS
from tests.e2e.program import losses

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def assert_same_run(run: Path, reference: Path) -> None:
    """To the bit, whatever happened to it on the way."""
    assert status(run)["state"] == "finished"
    assert losses(run) == losses(reference)
    got, want = (checkpoint.Reader(r / "checkpoints" / checkpoint.name(STEPS)) for r in (run, reference))
    assert all((got.parameter(n) == want.parameter(n)).all() for n in want.names())


def job_log(run: Path, job: str) -> str:
    return (run / "logs" / f"slurm-{job}.out").read_text()


def wait_for_restart(cluster: Cluster, job: str, restarts: int) -> None:
    cluster.wait_for(f"restart {restarts}", lambda: int(cluster.job(job)["Restarts"]) == restarts)


def test_signal_lost_rank_and_preemption(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    """The whole story on one job; each part would need starts of its own."""
    run = config.parent / "runs" / "disturbed"
    nodes = ["--nodes", 2, "--sbatch=--nodelist=node[1-2]"]
    job = cluster.submit(config, *nodes, "--run.name", "disturbed", "--track.wandb", "offline")

    # Just before the time limit the batch script gets USR1.
    cluster.wait_for_attempt(run, 1)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_restart(cluster, job, 1)
    stopped = status(run)
    assert (stopped["state"], stopped["requeue"]) == ("preempted", True)
    newest = checkpoint.newest(run)
    assert newest is not None and checkpoint.Reader(newest).step == stopped["step"]
    wandb_id = checkpoint.Reader(newest).trainer["wandb_id"]

    # A rank dies.
    cluster.wait_for_attempt(run, 2)
    assert attempt_steps(run)[2][0] == stopped["step"] + 1  # no step was made twice
    (rank,) = cluster.ranks(2)
    cluster.on(2, "kill", "-KILL", rank)
    wait_for_restart(cluster, job, 2)
    newest = checkpoint.newest(run)
    assert newest is not None
    saved = checkpoint.Reader(newest).step

    # A job that matters more takes the nodes.
    cluster.wait_for_attempt(run, 3)
    assert attempt_steps(run)[3][0] == saved + 1
    more = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--wrap=true", cwd="/tmp"
    )
    wait_for_restart(cluster, job, 3)
    preempted = status(run)
    assert (preempted["state"], preempted["requeue"]) == ("preempted", True)
    assert cluster.wait_for_end(more.strip()) == "COMPLETED"

    assert cluster.wait_for_end(job) == "COMPLETED"
    steps = attempt_steps(run)
    assert steps[min(steps.keys() - {1, 2, 3})][0] == preempted["step"] + 1
    assert_same_run(run, undisturbed)
    log = job_log(run, job)
    assert all(f"restarted {n} times" in log for n in range(4)), log
    last = checkpoint.newest(run)
    assert last is not None and checkpoint.Reader(last).trainer["wandb_id"] == wandb_id


def test_a_chain_of_jobs_each_stopped_by_its_time_limit(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    run = config.parent / "runs" / "chain"
    job = cluster.submit(config, "--nodes", 2, "--chain", 3, "--run.name", "chain")
    for element in (1, 2):
        cluster.wait_for_attempt(run, element)
        # To an element of an array scancel delivers the signal and fails all the same (22.05.8).
        cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_{element}", check=False)
        assert cluster.wait_for_end(f"{job}_{element}") == "COMPLETED"
        assert status(run)["state"] == "preempted"
    assert cluster.wait_for_end(f"{job}_3") == "COMPLETED"
    assert sorted(attempt_steps(run)) == [1, 2, 3]
    assert_same_run(run, undisturbed)


def test_cancel_lets_the_run_save_and_it_stays_down(cluster: Cluster, config: Path) -> None:
    run = config.parent / "runs" / "cancelled"
    job = cluster.submit(config, "--nodes", 2, "--run.name", "cancelled", "--train.steps", 100000)
    cluster.wait_for_step(run, 2)
    assert "cancelled at step" in cluster.launch("cancel", run, "--wait", 60)
    assert cluster.wait_for_end(job) == "FAILED"  # with 75, so that a job that depends on its success does not start
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert cluster.job(job)["Restarts"] == "0"
    newest = checkpoint.newest(run)
    assert newest is not None and checkpoint.Reader(newest).step == status(run)["step"] == max(losses(run))
    said = json.loads(cluster.launch("status", run, "--json"))
    assert (said["state"], said["checkpoint"]) == ("cancelled", status(run)["step"])


def test_cancel_of_a_job_that_waits(cluster: Cluster, config: Path) -> None:
    run = config.parent / "runs" / "waiting"
    job = cluster.submit(config, "--nodes", 2, "--run.name", "waiting", "--sbatch=--hold")
    assert "waiting" in cluster.launch("status", run)
    cluster.launch("cancel", run)
    assert cluster.wait_for_end(job, timeout=10) == "CANCELLED"
    assert "cancelled" in cluster.launch("status", run)


def test_raw_scancel_leaves_nothing_running(cluster: Cluster, config: Path) -> None:
    run = config.parent / "runs" / "scancelled"
    job = cluster.submit(config, "--nodes", 2, "--run.name", "scancelled", "--train.steps", 100000)
    cluster.wait_for_step(run, 2)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    cluster.wait_until_quiet()
    assert cluster.job(job)["Restarts"] == "0"
    assert cluster.job(job)["JobState"] == "CANCELLED"
    said = json.loads(cluster.launch("status", run, "--json"))
    assert said["state"] == "cancelled" and "SLURM" in cluster.launch("status", run)
