"""`mlm-launch hosts` over real ssh and pdsh, and on each host by hand."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import SECRETS, Cluster, assert_same_losses, status, tails
from tests.cluster.conftest import SHORT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def command(cluster: Cluster, folder: Path, config: Path) -> list[object]:
    """`mlm-launch hosts` for a rank on each of two hosts."""
    hostfile = folder / "hosts"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    return [sys.executable, "-m", "launcher.cli", "hosts", "--hostfile", hostfile, "--config", config]


def needs_pdsh(cluster: Cluster) -> None:
    if not (shutil.which("pdsh") and (cluster.dir / "ssh").exists()):
        pytest.skip("no ssh, sshd or pdsh here")


def wait(process: "subprocess.Popen[bytes]", log: Path) -> int:
    try:
        return process.wait(120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(tails([log])) from None


def test_by_ssh(cluster: Cluster, command: list[object], folder: Path, short_one_process: Path) -> None:
    needs_pdsh(cluster)
    output = cluster.on(1, *command, *SHORT, "--run.name", "by-ssh", cwd=folder, timeout=150)
    run = folder / "runs" / "by-ssh"
    assert status(run)["state"] == "finished", output
    assert_same_losses(run, short_one_process)


def test_on_each_host_by_hand(cluster: Cluster, command: list[object], folder: Path, short_one_process: Path) -> None:
    parts, logs = [], [folder / f"by-hand-{rank}.log" for rank in range(2)]
    for rank, log in enumerate(logs):
        words = [*command, *SHORT, "--run.name", "by-hand", "--no-ssh", "--node-rank", rank]
        parts.append(cluster.start_on(rank + 1, *words, log=log))
    assert [wait(part, log) for part, log in zip(parts, logs, strict=True)] == [0, 0], tails(logs)
    run = folder / "runs" / "by-hand"
    assert status(run)["state"] == "finished"
    assert_same_losses(run, short_one_process)


def test_a_rank_that_dies_takes_those_on_other_hosts_along(
    cluster: Cluster, command: list[object], folder: Path
) -> None:
    needs_pdsh(cluster)
    log, run = folder / "killed.log", folder / "runs" / "killed"
    job = cluster.start_on(1, *command, "--train.steps", 100000, "--run.name", "killed", log=log)
    cluster.wait_for_step(run, 2)
    lines = [line for node in cluster.leftovers().values() for line in node.values()]
    assert not [line for line in lines if any(secret in line for secret in SECRETS.values())]
    (rank,) = cluster.ranks(2)
    cluster.on(2, "kill", "-KILL", rank)
    assert wait(job, log) == 137, tails([log])
    assert "node2" in log.read_text()
