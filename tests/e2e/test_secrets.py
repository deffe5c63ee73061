"""Keys in the environment stay there: none is in any file or output of a run."""

from pathlib import Path

import pytest

from tests.e2e.program import Program, save_config

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanaryCana",
    "AWS_SECRET_ACCESS_KEY": "CanaryOfAmazon/CanaryOfAmazon/CanaryOfAm",
}


@pytest.mark.timeout(300)
def test_keys_reach_no_file_and_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config = save_config(tmp_path, train={"steps": 3}, track={"every": 1, "wandb": "offline"})
    Program(config, 2).start().finish()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"env.json", "rank-0.log", "events.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    found = [(path, name) for path in files for name, value in SECRETS.items() if value.encode() in path.read_bytes()]
    assert not found


def test_a_traceback_is_shown_without_what_is_secret_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    fault = """
import os
from mlm_dist.engine import Engine
def step(*_, **__):
    raise ValueError("told " + os.environ["HF_TOKEN"])
Engine.step = step
"""
    program = Program(save_config(tmp_path), before=fault).start()
    assert program.wait() == [1]
    assert "ValueError: told ***" in program.output() and "Traceback" in program.output()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRETS["HF_TOKEN"].encode() in path.read_bytes()]
