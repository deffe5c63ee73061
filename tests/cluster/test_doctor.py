"""`mlm-dist doctor` over an allocation, by srun."""

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_doctor_names_the_node_that_lacks_the_data(cluster: Cluster, config: Path, folder: Path) -> None:
    """The corpus is copied to the first node's own disk, and is therefore on no other."""
    cluster.on(1, "cp", "-r", folder / "corpus", "/dev/shm/corpus")
    doctor = [sys.executable, "-m", "launcher.exec", "mlm_dist.doctor", "--config", config, "--quick", "--json"]
    data = ["--data.manifest", "/dev/shm/corpus/manifest.json", "--data.val_manifest", "/dev/shm/corpus/val.json"]
    printed = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *doctor, *data, check=False, timeout=200)
    content = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    assert content["level"] == "red"
    assert list(content["hosts"]) == ["node1", "node2"]
    red = [finding for finding in content["findings"] if finding["level"] == "red"]
    assert red and {finding["check"] for finding in red} <= {"shards", "start"}, red
    assert all(finding["message"].startswith("node2") and finding["remedy"] for finding in red)
    groups = {row["group"] for row in content["collectives"]}
    assert {"all ranks"} <= groups, groups
