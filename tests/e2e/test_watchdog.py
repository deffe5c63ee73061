"""A rank that hangs is named, every rank's stacks are kept, the run ends with code 76, and the same command goes on."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.files import read_json, read_json_lines
from mlm_dist.lifecycle import EXIT_HUNG
from tests import wandb_files
from tests.e2e.program import Program, losses, save_config

pytestmark = pytest.mark.timeout(400)
STEP = 6  # in which it hangs; checkpoints are of every third


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("hangs"), train={"timeout": 8.0}, checkpoint={"every": 3})


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    Program(config, 2, ["--run.name", "undisturbed"]).start().finish()
    return config.parent / "runs" / "undisturbed"


def _hang(config: Path, name: str, hang: str, monkeypatch: pytest.MonkeyPatch, left: int | None = None) -> list[int]:
    """Codes of two ranks, of which one hangs; rank `left`, which cannot end by itself, is killed once the other has."""
    monkeypatch.setenv("HANG", hang)
    program = Program(config, 2, ["--run.name", name], module="tests.e2e.hangs").start()
    if left is not None:
        try:
            program.ranks[1 - left].wait(180)
            assert program.ranks[left].poll() is None
        finally:
            program.kill([left])
    codes = program.wait()
    deadline = time.monotonic() + 30
    while any(_lives(rank.pid) for rank in program.ranks):  # loader workers look for their parent every few seconds
        assert time.monotonic() < deadline, "something is left running"
        time.sleep(0.1)
    monkeypatch.delenv("HANG")
    return codes


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _hang_event(run: Path) -> dict[str, Any]:
    (event,) = (e for e in read_json_lines(run / "events.jsonl") if e["kind"] == "hang")
    status = read_json(run / "status.json")
    assert status is not None and status["state"] == "failed" and status["reason"] == event["reason"]
    assert event["step"] == STEP - 1
    return event


def _stacks(run: Path, rank: int) -> str:
    return (run / "logs" / f"attempt_1_rank_{rank}.stacks").read_text()


def _assert_goes_on(config: Path, run: Path, undisturbed: Path) -> None:
    program = Program(config, 2, ["--run.name", run.name], module="tests.e2e.hangs").start().finish()
    assert "goes on after step" in program.output()
    assert losses(run) == losses(undisturbed)
    assert not list(run.glob("logs/attempt_2_*.stacks"))  # what did not hang leaves none


def test_a_rank_that_sleeps_in_its_data_path(config: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config.parent / "runs" / "asleep"
    monkeypatch.setenv("MLM_TRACK__WANDB", "offline")
    assert _hang(config, "asleep", f"data:1:{STEP}", monkeypatch) == [EXIT_HUNG, EXIT_HUNG]
    event = _hang_event(run)
    (behind,) = event["behind"]
    assert (behind["rank"], behind["step"], behind["phase"]) == (1, STEP, "data")
    assert f"in step {STEP}, data; the other waits in step {STEP}, communication" in event["reason"]
    rank_0, rank_1 = ((config.parent / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert event["reason"] in rank_0
    (alert,) = wandb_files.records("alert", run / "wandb")
    assert alert.level == "ERROR" and event["reason"] in alert.text
    assert "asleep_in_the_data_path" in _stacks(run, 1) and "asleep_in_the_data_path" in rank_1
    assert "distributed.py" in _stacks(run, 0)  # where it waits
    _assert_goes_on(config, run, undisturbed)


def test_a_rank_that_holds_the_gil(config: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Python runs there any more: its stacks come from a timer, and another rank tells of it."""
    run = config.parent / "runs" / "spinning"
    codes = _hang(config, "spinning", f"spin:0:{STEP}", monkeypatch)
    assert codes == [-signal.SIGALRM, EXIT_HUNG]
    event = _hang_event(run)
    assert [p["rank"] for p in event["behind"]] == [0]
    assert "rank 0" in event["reason"] and "does not answer" in event["reason"]
    assert event["reason"] in (config.parent / "rank-1.log").read_text()
    assert "spinning_with_the_gil" in _stacks(run, 0)
    _assert_goes_on(config, run, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped(config: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """With rank 0 the store of the job stops too."""
    run = config.parent / "runs" / f"stopped-{rank}"
    codes = _hang(config, run.name, f"stop:{rank}:{STEP}", monkeypatch, left=rank)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == EXIT_HUNG
    event = _hang_event(run)
    assert [p["rank"] for p in event["behind"]] == [rank]
    assert ("rank 0 is stopped" if rank == 0 else "rank 1") in event["reason"]
    assert _stacks(run, 1 - rank)


def test_a_failure_is_no_hang(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config.parent / "runs" / "failing"
    assert _hang(config, "failing", f"fail:1:{STEP}", monkeypatch) == [1, 1]
    status = json.loads((run / "status.json").read_text())
    assert status["reason"] == "rank 1: RuntimeError: this rank alone"
    assert not [e for e in read_json_lines(run / "events.jsonl") if e["kind"] == "hang"]
    assert not list(run.glob("logs/*.stacks"))
