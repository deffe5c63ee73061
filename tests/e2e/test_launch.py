"""Every way to start it gives the same run, and a failure is shown once."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlm_dist.data.manifest import Manifest
from mlm_dist.files import read_json
from tests.e2e.program import Program, losses, save_config
from tests.ranks import ROOT, free_port

pytestmark = pytest.mark.timeout(300)


def start(command: Sequence[str], timeout: float = 150.0) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def test_launchers_give_the_same_run(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"steps": 3})
    runs = tmp_path / "runs"
    Program(config, 2, ["--run.name", "plain"]).start().finish()
    commands = {
        "mlm-launch": ["-m", "launcher.cli", "local", "-n", "2"],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--module", "mlm_dist.train"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT", "-m", "mlm_dist.train"],
    }  # fmt: skip
    for name, command in commands.items():
        command = [str(free_port()) if word == "PORT" else word for word in command]
        done = start([sys.executable, *command, "--config", str(config), "--run.name", name])
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        assert losses(runs / name) == losses(runs / "plain"), name
        assert read_json(runs / name / "status.json")["state"] == "finished"


def test_too_many_lost_documents_end_the_job_with_the_list_shown_once(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"steps": 100})
    manifest = Manifest.read(tmp_path / "corpus" / "manifest.json")
    for i, shard in enumerate(manifest.shards):
        with manifest.shard_path(i).open("r+b") as file:
            for offset in shard.offsets[::3].tolist():
                file.seek(offset + 600)
                file.write(b"\0\xff")
    done = start([sys.executable, "-m", "launcher.cli", "local", "-n", "2", "--config", str(config)])
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert output.count("Traceback (most recent call last)") == 1, output
    assert "data.max_bad_fraction" in output and manifest.shards[0].path in output
    status = read_json(tmp_path / "runs" / "run" / "status.json")
    assert status["state"] == "failed" and "DataLoss" in status["reason"]
    assert not (tmp_path / "runs" / "run" / "lock").exists()
    # Starting again does not creep past the limit.
    again = Program(config, 1)
    assert again.start().wait() == [2]
    assert "data.max_bad_fraction" in again.output() and "Traceback" not in again.output()
