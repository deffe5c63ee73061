"""The cluster that the other tests run on: any number of nodes, several at a time, nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import CannotRun, Cluster
from tests.ranks import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


def traces() -> dict[str, object]:
    """What a cluster could leave on this machine."""
    mounts = Path("/proc/self/mountinfo").read_text()
    links = sorted(os.listdir("/sys/class/net"))
    processes = subprocess.run(["ps", "-e", "-o", "args="], capture_output=True, text=True, check=True).stdout
    daemons = sorted(line for line in processes.splitlines() if "/mlm-" in line and "minicluster.sh" in line)
    places = {p: os.path.exists(p) for p in ("/scratch", os.path.expanduser("~/.ssh"), "/run/sshd")}
    return {"mounts": mounts, "links": links, "daemons": daemons, "places": places}


@pytest.fixture
def before() -> dict[str, object]:
    return traces()


def test_twelve_nodes_and_two_more_leave_nothing_behind(before: dict[str, object]) -> None:
    try:
        large = Cluster(12)
    except CannotRun as reason:
        pytest.skip(str(reason))
    small = Cluster(2)
    try:
        hosts = large.run("srun", "--nodes=12", "--ntasks-per-node=1", "hostname").split()
        assert sorted(hosts) == sorted(f"node{k}" for k in range(1, 13))
        assert small.run("srun", "--nodes=2", "hostname").split() != hosts
        assert small.on(1, "ssh", "node2", "hostname").strip() == "node2"
        small.power_off(2)
        small.boot(2)
        assert small.run("ssh", "node2", "hostname").strip() == "node2"
        small.cut(2)
        assert "node2" not in small.run("timeout", 2, "ssh", "node2", "hostname", check=False).splitlines()
        small.heal(2)
        assert small.on(2, "ssh", "node1", "hostname").strip() == "node1"
        assert not large.leftovers() and not small.leftovers()
    finally:
        large.down()
        small.down()
    assert traces() == before


def test_the_cluster_ends_with_the_tests(before: dict[str, object], tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        "import os\n"
        "from tests.cluster.cluster import CannotRun, Cluster\n"
        "try:\n"
        "    cluster = Cluster(2)\n"
        "except CannotRun:\n"
        "    os._exit(77)\n"
        "print(cluster.parent, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=env, stdout=subprocess.PIPE, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("no cluster here")
    assert done.returncode == -9
    for _ in range(100):
        if traces() == before:
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert traces() == before
    subprocess.run(["rm", "-r", done.stdout.strip()], check=True)
