"""The scripts in slurm/, submitted with plain sbatch as their first lines say."""

import sys
from pathlib import Path

import pytest

from mlm_dist import cli
from tests.cluster.cluster import Cluster, assert_same_losses, status, tails
from tests.cluster.conftest import SHORT
from tests.ranks import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def checkout(folder: Path) -> Path:
    """Where to submit from: what the scripts take from a checkout, and a site file that says which Python."""
    here = folder / "checkout"
    here.mkdir(exist_ok=True)
    for name in ("recipes", "ds_configs"):
        if not (here / name).exists():
            (here / name).symlink_to(ROOT / name)
    (here / "slurm").mkdir(exist_ok=True)
    for path in (ROOT / "slurm").glob("*.*"):
        (here / "slurm" / path.name).write_bytes(path.read_bytes())
    (here / "slurm" / "cluster.env").write_text(f"MLM_PYTHON={sys.executable}\n")
    return here


def submit(cluster: Cluster, checkout: Path, *words: object) -> str:
    return cluster.run("sbatch", "--parsable", *words, cwd=checkout).strip()


def test_train_by_hand(cluster: Cluster, checkout: Path, config: Path, short_one_process: Path) -> None:
    job = submit(cluster, checkout, "-N2", "slurm/train.sbatch", "--config", config, *SHORT, "--run.name", "by-sbatch")
    assert cluster.wait_for_end(job) == "COMPLETED", tails([checkout / f"mlm-train-{job}.out"])
    run = config.parent / "runs" / "by-sbatch"
    assert status(run)["state"] == "finished"
    assert_same_losses(run, short_one_process)
    assert "finished" in cluster.launch("status", run)


def test_smoke(cluster: Cluster, checkout: Path) -> None:
    job = submit(cluster, checkout, "slurm/smoke.sbatch")
    log = checkout / f"mlm-smoke-{job}.out"
    assert cluster.wait_for_end(job) == "COMPLETED", tails([log])
    assert f"runs/smoke-{job}/smoke: finished at step 20" in log.read_text()


def test_prepare_by_an_array_gives_the_shards_of_one_process(cluster: Cluster, checkout: Path) -> None:
    text = checkout / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"Document {i}. " * 20)
    words = [str(text), "--output"]
    job = submit(
        cluster, checkout, "--array=1-2", "--cpus-per-task=1", "slurm/prepare.sbatch", *words, checkout / "parts"
    )
    for element in (1, 2):
        state = cluster.wait_for_end(f"{job}_{element}")
        assert state == "COMPLETED", tails(sorted(checkout.glob("mlm-prepare-*.out")))
    assert cli.main(["prepare", *words, str(checkout / "whole")]) == 0
    made = {p.name: p.read_bytes() for p in (checkout / "whole").iterdir() if p.suffix in (".tar", ".json")}
    assert len(made) >= 3
    assert {name: (checkout / "parts" / name).read_bytes() for name in made} == made
