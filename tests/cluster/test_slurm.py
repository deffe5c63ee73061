"""`mlm-launch slurm` on a real Slurm: the run is the one-process run, and the command that it prints is what it does."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from mlm_dist import cli
from tests.cluster.cluster import Cluster, assert_same_losses, status
from tests.cluster.conftest import SHORT
from tests.e2e.program import losses

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_one_rank_on_each_of_two_nodes(cluster: Cluster, undisturbed: Path, one_process: Path) -> None:
    assert status(undisturbed)["state"] == "finished"
    assert_same_losses(undisturbed, one_process)
    assert losses(undisturbed) != losses(one_process)  # another order of summation: they were two ranks


def test_two_ranks_on_each_of_two_nodes_by_deepspeed(cluster: Cluster, config: Path, short_one_process: Path) -> None:
    flags = ["--nodes", 2, "--ntasks-per-node", 2, "--via", "deepspeed", *SHORT, "--run.name", "by-deepspeed"]
    job = cluster.submit(config, *flags)
    assert cluster.wait_for_end(job, timeout=180) == "COMPLETED"
    run = config.parent / "runs" / "by-deepspeed"
    assert status(run)["state"] == "finished"
    assert_same_losses(run, short_one_process)


def test_data_is_the_same_on_any_node_for_any_number_of_ranks(
    cluster: Cluster, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "hash", "--config", str(config), "--steps", "0:40"]
    assert cli.main(command) == 0
    here = capsys.readouterr().out.split()[-1]
    on_node = cluster.run("srun", sys.executable, "-m", "mlm_dist.cli", *command, "--world-size", 4).split()[-1]
    assert re.fullmatch("[0-9a-f]{32,}", here) and on_node == here


def test_finished_run_that_is_submitted_again_says_so(cluster: Cluster, config: Path, undisturbed: Path) -> None:
    before = losses(undisturbed)
    job = cluster.submit(config, "--nodes", 2, "--run.name", "undisturbed")
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert cluster.job(job)["ExitCode"] == "0:0"
    assert "is finished; nothing to do" in (undisturbed / "logs" / f"slurm-{job}.out").read_text()
    assert losses(undisturbed) == before
    assert "finished" in cluster.launch("status", undisturbed)


def test_dry_run_prints_what_is_submitted(cluster: Cluster, config: Path) -> None:
    words = ["--config", config, "--nodes", 2, "--ntasks-per-node", 2, "--time", "12", "--cpus-per-task", 1]
    words += ["--gpus-per-node", 2, "--partition", "high", "--sbatch=--hold", "--sbatch=--comment=a 'b' $HOME; c"]
    words += ["--run.name", "dry run; $(x)", "--track.every", 2]
    printed = cluster.launch("slurm", *words, "--dry-run", cwd=config.parent)
    assert not (config.parent / "runs" / "dry run; $(x)").exists()
    said = cluster.launch("slurm", *words, cwd=config.parent)
    by_hand = cluster.run("bash", "-c", printed, cwd=config.parent).strip()
    by_launcher = re.search(r"job (\d+) submitted", said)
    assert by_launcher, said
    shown = []
    for job in (by_launcher[1], by_hand):
        text = cluster.run("scontrol", "show", "job", job)
        varying = r"JobId=\d+|\d{4}-\d\d-\d\dT[\d:]+|Priority=\d+|(?<=slurm-)\d+(?=\.out)|SecsPreSuspend=\S+"
        script = cluster.run("scontrol", "write", "batch_script", job, "-")
        shown.append((re.sub(varying, "*", text), script))
    assert shown[0] == shown[1]
    assert "NumNodes=2" in shown[0][0] and "TimeLimit=00:12:00" in shown[0][0], shown[0][0]
    assert shlex.split(printed)[0] == "env"


def test_what_slurm_cannot_do_is_refused_at_once(cluster: Cluster, config: Path) -> None:
    output = cluster.launch("slurm", "--config", config, "--nodes", 9, "--test-only", check=False, cwd=config.parent)
    assert "not available" in output, output
    assert "to start at" in cluster.launch("slurm", "--config", config, "--nodes", 3, "--test-only", cwd=config.parent)
