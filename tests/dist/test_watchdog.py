"""A failure reaches ranks that no collective tells of it, as over NCCL: here none is in a collective."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from mlm_dist import distributed, watchdog
from mlm_dist.clock import Position
from mlm_dist.files import read_json
from mlm_dist.lifecycle import RunDir
from tests.ranks import run_ranks


def fail_alone(folder: Path, who: int, how: str) -> list[int]:
    """Called on every rank: the codes with which its watchdog would have ended it when rank `who` failed."""
    watchdog.FAILURE_GRACE_S = 1.0
    rank = distributed.init(60).rank
    run, codes = RunDir(folder), []
    run.attempt = 1
    watched = watchdog.Watchdog(Position(), 20.0, run=run, end=codes.append)
    watched.start()
    distributed.ControlGroup(60).barrier()
    if rank == who and how == "says so":
        watched.failing("the reason", 2)
        watched.let_others_read()
    elif rank != who:
        deadline = time.monotonic() + 30
        while not codes and time.monotonic() < deadline:
            time.sleep(0.05)
    return codes[:1]


@pytest.mark.parametrize(
    ("who", "how", "code", "reason"),
    [(1, "says so", 2, "the reason"), (0, "says so", 2, "the reason"), (0, "is gone", 1, "store")],
)
def test_a_failure_reaches_all_ranks(tmp_path: Path, who: int, how: str, code: int, reason: str) -> None:
    """Rank 0 holds the store, which ends with it."""
    (tmp_path / "logs").mkdir()
    codes = run_ranks(
        "tests.dist.test_watchdog:fail_alone", 2, {"folder": tmp_path, "who": who, "how": how}, timeout=120
    )
    assert codes[1 - who] == [code] and codes[who] == []
    status = read_json(tmp_path / "status.json")
    assert status is not None and status["state"] == "failed" and reason in status["reason"]
    assert not (tmp_path / "logs" / f"attempt_1_rank_{1 - who}.stacks").exists()


def lose_a_connection(folder: Path) -> tuple[list[int], list[int]]:
    """Called on every rank, of which the last does nothing: the ranks that rank 0 hears of, and the codes after rank 1, whose connection broke, fails."""
    watchdog.FAILURE_GRACE_S = 2.0
    rank = distributed.init(60).rank
    control = distributed.ControlGroup(60)
    run, codes, heard = RunDir(folder), [], []
    run.attempt = 1
    watched = watchdog.Watchdog(Position(), 20.0, run=run, end=codes.append)
    if rank < 2:
        watched.start()
    control.barrier()
    if rank == 0:
        heard = [post.rank for post in watched._posts(20.0) if post.beat]
    if rank == 1:

        class Broken:
            def set(self, *_: str) -> None:
                raise RuntimeError("Connection reset by peer")

        watched._store = Broken()
        time.sleep(4)
        watched.failing("the reason", 2)
        watched.let_others_read()
    deadline = time.monotonic() + 20
    while rank == 0 and not codes and time.monotonic() < deadline:
        time.sleep(0.05)
    control.barrier()
    return heard, codes[:1]


def test_a_connection_that_breaks_is_made_again_and_a_rank_that_never_posted_is_silent(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    found = run_ranks("tests.dist.test_watchdog:lose_a_connection", 3, {"folder": tmp_path}, timeout=90)
    assert found == [([0, 1], [2]), ([], []), ([], [])]
    status = read_json(tmp_path / "status.json")
    assert status is not None and status["reason"] == "the reason"


def be_stopped(folder: Path) -> list[int]:
    """The codes with which the watchdog would have ended this process, which was stopped for long."""
    distributed.init(60)
    run, codes, position = RunDir(folder), [], Position()
    run.attempt, position.phase, position.settled = 1, "loop", True
    watched = watchdog.Watchdog(position, 1.0, run=run, end=codes.append)
    post, posted = watched._post, time.monotonic()

    def post_late_when_continued() -> None:
        nonlocal posted
        time.sleep(1.0 if time.monotonic() - posted > 3 else 0)
        posted = time.monotonic()
        post()

    watched._post = post_late_when_continued
    watched.start()
    pid = os.getpid()
    subprocess.run(["sh", "-c", f"sleep 0.3; kill -STOP {pid}; sleep 5; kill -CONT {pid}"], check=True)
    for _ in range(8):
        time.sleep(0.2)
        position.count += 1
    watched.stop()
    return codes


def test_the_time_for_which_a_process_was_stopped_is_no_hang(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert run_ranks("tests.dist.test_watchdog:be_stopped", 1, {"folder": tmp_path}, timeout=60) == [[]]
