"""A run on two ranks whose checkpoints cannot be written: it goes on while it may, loses nothing, and says the same on every rank."""

import json
import math
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mlm_dist import checkpoint
from mlm_dist.files import read_json, read_json_lines
from tests.disks import fill, mounted, remount
from tests.e2e.program import Program, save_config

pytestmark = pytest.mark.timeout(300)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_json_lines(run / "events.jsonl") if e["kind"] == kind]


def wait_for(program: Program, what: str, check: Any, timeout: float = 60.0) -> Any:
    """What ``check`` gives once it is true."""
    deadline = time.monotonic() + timeout
    while not (found := check()):
        assert time.monotonic() < deadline, f"no {what}:\n{program.output()}"
        assert all(rank.poll() is None for rank in program.ranks), f"ended before {what}:\n{program.output()}"
        time.sleep(0.02)
    return found


def newest_step(run: Path) -> int:
    found = checkpoint.committed(run)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def loss_of(path: Path) -> float:
    loss = checkpoint.validation_loss(checkpoint.Reader(path))
    return math.inf if loss is None else loss


def stop(program: Program) -> list[int]:
    for rank in program.ranks:
        rank.send_signal(signal.SIGTERM)
    return program.wait()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a run that ends when it is told to, and whose directory the test may mount something over."""
    return save_config(
        tmp_path,
        train={"steps": 100_000},
        checkpoint={"every": 5, "max_failures": 100_000},
        eval={"every": 5},
    )


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(tmp_path: Path, config: Path) -> None:
    run = tmp_path / "runs" / "run"
    with mounted(run.parent, "-t", "tmpfs", "-o", "size=32m", "tmpfs"):
        program = Program(config, 2).start()
        try:
            program.wait_for_step(run, 11)
            ballast = fill(run)
            wait_for(program, "failure", lambda: "could not be written" in program.log(0).read_text())
            before = newest_step(run)
            checkpoint.Reader(checkpoint.newest(run) or "").verify()
            assert "No space left on device" in program.log(0).read_text()
            ballast.unlink()
            wait_for(program, "checkpoint", lambda: newest_step(run) > before + 5)
            assert stop(program) == [75, 75], program.output()
        finally:
            program.kill()
        failed = events(run, "checkpoint_failed")
        assert failed and all(e["step"] % 5 == 0 and "No space left" in e["reason"] for e in failed)
        assert [e["in_a_row"] for e in failed] == list(range(1, len(failed) + 1))
        done = read_json(run / "status.json")
        assert (done["state"], done["step"]) == ("cancelled", newest_step(run))
        # The lines that had no room are there too, in order and whole.
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [m["step"] for m in metrics if m["kind"] == "train"] == list(range(1, done["step"] + 1))
        assert not list(run.glob("checkpoints/.tmp_*"))
        # A checkpoint knows the validation at its step, by which the best is kept.
        measured = {m["step"]: m["loss"] for m in metrics if m["kind"] == "val"}
        known = [v for p in checkpoint.committed(run) if (v := checkpoint.Reader(p).trainer["validation"])]
        assert known and all(measured[v["step"]] == v["loss"] for v in known)
        best = checkpoint.best(run)
        assert best is not None and best == min(checkpoint.committed(run), key=loss_of)


def test_a_disk_that_stays_full_ends_the_run_with_the_reason(tmp_path: Path, config: Path) -> None:
    run = tmp_path / "runs" / "run"
    with mounted(run.parent, "-t", "tmpfs", "-o", "size=32m", "tmpfs"):
        program = Program(config, 2, ["--checkpoint.max_failures", "2"]).start()
        try:
            program.wait_for_step(run, 11)
            ballast = fill(run)
            assert program.wait() == [1, 1], program.output()
        finally:
            program.kill()
        whole = checkpoint.newest(run)
        assert whole is not None and whole.name == checkpoint.name(newest_step(run))
        status = read_json(run / "status.json")
        assert status["state"] == "failed" and "as 2 in a row" in status["reason"]
        assert f"The newest whole checkpoint is {whole}" in status["reason"] and "Free space" in status["reason"]
        assert not (run / "lock").exists()
        # With room it goes on from there. A stop that finds none again does not claim a checkpoint.
        ballast.unlink()
        again = Program(config, 2).start()
        try:
            wait_for(again, "checkpoint", lambda: newest_step(run) > int(whole.name[5:]) + 5)
            fill(run)
            assert stop(again) == [1, 1], again.output()
        finally:
            again.kill()
        status = read_json(run / "status.json")
        assert status["state"] == "failed" and "and it was the last" in status["reason"]
        assert f"The newest whole checkpoint is {checkpoint.newest(run)}" in status["reason"]


def test_one_rank_that_cannot_write_and_a_directory_that_turns_read_only(tmp_path: Path, config: Path) -> None:
    run = tmp_path / "runs" / "run"
    place = run / "checkpoints"
    with mounted(place, "--bind", str(place)):
        program = Program(config, 2).start()
        try:
            program.wait_for_step(run, 11)
            unlimited = resource.prlimit(program.ranks[1].pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            failed = wait_for(program, "failure", lambda: events(run, "checkpoint_failed"))
            assert (failed[0]["ranks"], failed[0]["in_a_row"]) == ([1], 1)
            assert "File too large" in failed[0]["reason"] and "ulimit -f" in failed[0]["remedy"]
            before = failed[0]["step"]
            assert newest_step(run) < before
            resource.prlimit(program.ranks[1].pid, resource.RLIMIT_FSIZE, unlimited)
            wait_for(program, "checkpoint", lambda: newest_step(run) > before)
            remount(place, "ro")
            failed = wait_for(
                program,
                "failure",
                lambda: [e for e in events(run, "checkpoint_failed") if "Read-only file system" in e["reason"]],
            )
            assert "mounted read-only" in failed[0]["remedy"]
            remount(place, "rw")
            wait_for(program, "checkpoint", lambda: newest_step(run) > failed[0]["step"])
            assert stop(program) == [75, 75], program.output()
        finally:
            program.kill()
        assert read_json(run / "status.json")["step"] == newest_step(run)
        checkpoint.Reader(checkpoint.newest(run) or "").verify()
