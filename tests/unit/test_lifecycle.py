"""The run directory: one living attempt at a time, held to what it was made with, and asked to stop in one way."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlm_dist import lifecycle
from mlm_dist.errors import UserError
from mlm_dist.lifecycle import RunConfig, RunDir, StopFlag, Watcher, environment, read_json, stop_signals, write_json

IDENTITY = {"run.seed": 0, "data.lanes": None, "mask.split": [0.8, 0.1, 0.1], "data.manifest": "aa"}
GUARDED = {"train.steps": 10, "optim.lr": 1e-3}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "runs" / "r")
    made.prepare()
    return made


def lock_of(run: RunDir, **content: Any) -> Path:
    """A lock as another start has left it."""
    path = run.path / "lock"
    mine = {"attempt": 4, "host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    path.write_text(json.dumps({**mine, **content}))
    return path


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# ---- lock and attempts ----


def test_attempts_are_counted(run: RunDir) -> None:
    for attempt in (1, 2, 3):
        again = RunDir(run.path)
        again.acquire()
        assert (again.attempt, again.died) == (attempt, None)
        assert read_json(run.path / "lock")["pid"] == os.getpid()
        again.status("running", step=attempt)
        again.release()
        assert not (run.path / "lock").exists()
    assert again.last_status is not None and again.last_status["attempt"] == 2


def test_a_living_attempt_keeps_others_out(run: RunDir) -> None:
    run.acquire()
    second = RunDir(run.path)
    with pytest.raises(UserError, match=f"running already: attempt 1 as process {os.getpid()} on {socket.gethostname()}"):
        second.acquire()
    second.release()  # gives nothing back that it has not
    assert (run.path / "lock").exists()


def test_a_dead_process_is_taken_over(run: RunDir) -> None:
    lock_of(run, pid=dead_pid())
    run.acquire()
    assert run.attempt == 5
    assert run.died is not None and run.died["attempt"] == 4
    assert read_json(run.path / "lock")["attempt"] == 5
    assert [p.name for p in run.path.iterdir() if "died" in p.name] == []


def test_a_process_that_only_has_the_same_number_is_taken_over(run: RunDir) -> None:
    lock_of(run, started=psutil.Process().create_time() - 1000)
    run.acquire()
    assert run.attempt == 5


def test_a_zombie_is_dead(run: RunDir) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        lock_of(run, pid=child.pid, started=psutil.Process(child.pid).create_time())
        with pytest.raises(UserError, match="running already"):
            RunDir(run.path).acquire()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has fetched its exit code
        run.acquire()
        assert run.attempt == 5
    finally:
        child.kill()
        child.wait()


def test_a_lock_of_another_host_lives_by_its_heartbeat(run: RunDir) -> None:
    path = lock_of(run, host="elsewhere", pid=1)
    with pytest.raises(UserError, match="on elsewhere"):
        run.acquire()
    old = time.time() - lifecycle.STALE_AFTER_S - 1
    os.utime(path, (old, old))
    run.acquire()
    assert (run.attempt, (run.died or {})["host"]) == (5, "elsewhere")


def test_heartbeat_keeps_a_lock_fresh(run: RunDir) -> None:
    run.acquire()
    path = run.path / "lock"
    os.utime(path, (0, 0))
    run.heartbeat()
    assert time.time() - path.stat().st_mtime < 10


def test_a_torn_lock_waits_until_it_is_stale(run: RunDir) -> None:
    path = run.path / "lock"
    path.write_text('{"attempt": 3, "ho')
    with pytest.raises(UserError, match="running already"):
        run.acquire()
    os.utime(path, (0, 0))
    run.acquire()
    assert run.attempt == 1


def test_of_two_starts_that_take_over_at_once_one_wins(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    lock_of(run, pid=dead_pid())
    fast = RunDir(run.path)
    alive = lifecycle._alive

    def overtaken(*args: Any) -> bool:
        """The slower start has just found the lock dead when the faster one takes it."""
        monkeypatch.setattr(lifecycle, "_alive", alive)
        fast.acquire()
        return False

    monkeypatch.setattr(lifecycle, "_alive", overtaken)
    with pytest.raises(UserError, match="at the same moment"):
        run.acquire()
    assert read_json(run.path / "lock")["attempt"] == fast.attempt == 5
    run.release()
    assert (run.path / "lock").exists()
    fast.release()
    assert [p.name for p in run.path.iterdir() if "lock" in p.name] == []


def test_many_starts_at_once_give_one_attempt(run: RunDir) -> None:
    lock_of(run, pid=dead_pid())
    starts = [RunDir(run.path) for _ in range(8)]
    gate = threading.Barrier(len(starts))
    refused: list[UserError] = []

    def start(one: RunDir) -> None:
        gate.wait()
        try:
            one.acquire()
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=start, args=(s,)) for s in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == len(starts) - 1
    assert (run.path / "lock").exists()


def test_release_leaves_a_lock_that_another_has_taken_over(run: RunDir) -> None:
    run.acquire()
    lock_of(run, host="elsewhere", attempt=2)  # it was silent for so long that it was thought dead
    run.release()
    assert read_json(run.path / "lock")["host"] == "elsewhere"


def test_a_stop_request_for_the_attempt_before_is_forgotten(run: RunDir) -> None:
    (run.path / "stop_request").write_text("{}")
    run.acquire()
    assert not (run.path / "stop_request").exists()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"run\.dir: .*file/r' cannot be written"):
        RunDir(file / "r").prepare()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_a_name_is_one_directory(name: str) -> None:
    with pytest.raises(UserError, match=r"run\.name"):
        RunConfig(name=name).check()


# ---- identity ----


def test_the_first_attempt_records_and_the_next_agree(run: RunDir) -> None:
    assert run.check_identity(IDENTITY, GUARDED, []) == {}
    assert RunDir(run.path).check_identity(IDENTITY, GUARDED, []) == {}


def test_a_different_config_is_shown_old_and_new(run: RunDir) -> None:
    run.check_identity(IDENTITY, GUARDED, [])
    before = (run.path / "identity.json").read_bytes()
    other = {**IDENTITY, "run.seed": 5, "data.lanes": 3}
    with pytest.raises(UserError) as caught:
        run.check_identity(other, GUARDED, ["train.steps"])
    message = str(caught.value)
    assert "run.seed: the run has 0, this start has 5" in message
    assert "data.lanes: the run has null, this start has 3" in message
    assert "mask.split" not in message and "--run.name" in message
    assert (run.path / "identity.json").read_bytes() == before


def test_guarded_keys_change_when_allowed_and_are_kept(run: RunDir) -> None:
    run.check_identity(IDENTITY, GUARDED, [])
    longer = {**GUARDED, "train.steps": 20, "optim.lr": 1e-4}
    with pytest.raises(UserError) as caught:
        run.check_identity(IDENTITY, longer, ["train.steps"])
    assert "optim.lr: the run has 0.001, this start has 0.0001" in str(caught.value)
    assert "--allow_change optim.lr" in str(caught.value) and "train.steps" not in str(caught.value)
    assert run.check_identity(IDENTITY, longer, ["train.steps", "optim.lr"]) == {
        "train.steps": [10, 20],
        "optim.lr": [1e-3, 1e-4],
    }
    assert run.check_identity(IDENTITY, longer, []) == {}
    with pytest.raises(UserError, match="the run has 20, this start has 10"):
        run.check_identity(IDENTITY, GUARDED, ["optim.lr"])


# ---- status ----


def test_status_says_all(run: RunDir) -> None:
    run.acquire()
    run.status("preempted", 7, "signal SIGUSR1", requeue=True)
    status = read_json(run.path / "status.json")
    assert abs(status.pop("time") - time.time()) < 10
    assert status == {"state": "preempted", "requeue": True, "step": 7, "reason": "signal SIGUSR1", "attempt": 1}


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    contents = [{"n": n, "text": str(n) * 50_000} for n in range(2)]
    write_json(path, contents[0])
    done = threading.Event()

    def write() -> None:
        for i in range(200):
            write_json(path, contents[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set():
        assert json.loads(path.read_text()) in contents
        reads += 1
    writer.join()
    assert reads > 10
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"state": "running"})
    with pytest.raises(TypeError):
        write_json(path, {"state": object()})
    assert read_json(path) == {"state": "running"}


def test_read_json_of_nothing_and_of_half(tmp_path: Path) -> None:
    assert read_json(tmp_path / "absent.json") is None
    (tmp_path / "half.json").write_text('{"a": ')
    assert read_json(tmp_path / "half.json") is None
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    assert read_json(tmp_path / "bytes.json") is None


def test_one_rank_claims_the_failure(run: RunDir) -> None:
    run.attempt = 3
    ranks = [RunDir(run.path) for _ in range(3)]
    for rank in ranks:
        rank.attempt = 3
    assert [r.claim_failure() for r in [run, *ranks]] == [True, False, False, False]
    ranks[0].attempt = 4
    assert ranks[0].claim_failure()


# ---- stopping ----


def test_the_first_reason_stays_and_any_may_ask_for_a_requeue() -> None:
    flag = StopFlag()
    assert (flag.wanted, flag.requeue) == (False, False)
    flag.ask("first", False)
    flag.ask("second", True)
    flag.ask("third", False)
    assert (flag.wanted, flag.requeue, flag.reason) == (True, True, "first")


@pytest.mark.parametrize(
    ("number", "requeue"), [(signal.SIGUSR1, True), (signal.SIGTERM, False), (signal.SIGINT, False)]
)
def test_signals_set_the_flag_and_go_back_to_what_they_were(number: signal.Signals, requeue: bool) -> None:
    flag, before = StopFlag(), signal.getsignal(number)
    with stop_signals(flag):
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while not flag.wanted and time.monotonic() < deadline:
            time.sleep(0.01)
    assert (flag.wanted, flag.requeue, flag.reason) == (True, requeue, f"signal {number.name}")
    assert signal.getsignal(number) is before


def test_watcher_sees_a_stop_request_and_beats(run: RunDir) -> None:
    run.acquire()
    os.utime(run.path / "lock", (0, 0))
    flag = StopFlag()
    watcher = Watcher(run, flag)
    watcher.start()
    try:
        (run.path / "stop_request").write_text('{"reason": "time lim')  # being written
        time.sleep(1.5)
        assert not flag.wanted
        write_json(run.path / "stop_request", {"reason": "time limit", "requeue": True})
        deadline = time.monotonic() + 15
        while not flag.wanted and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        watcher.stop()
    assert (flag.wanted, flag.requeue, flag.reason) == (True, True, "time limit")
    assert (run.path / "lock").stat().st_mtime > time.time() - 60
    assert not watcher.is_alive()


@pytest.mark.parametrize("request_text", ["", "[]", '"stop"', "{}", "null"])
def test_watcher_outlives_a_stop_request_of_any_form(run: RunDir, request_text: str) -> None:
    """People touch the file by hand."""
    run.acquire()
    flag = StopFlag()
    watcher = Watcher(run, flag)
    (run.path / "stop_request").write_text(request_text)
    watcher.start()
    time.sleep(1.3)
    assert watcher.is_alive()
    write_json(run.path / "stop_request", {"reason": "please"})
    deadline = time.monotonic() + 15
    while not flag.wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    watcher.stop()
    assert flag.wanted


def test_environment_tells_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"WANDB_API_KEY": "wandb-5ecret", "HF_TOKEN": "hf_5ecret", "AWS_SECRET_ACCESS_KEY": "aws-5ecret"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    facts = environment()
    text = json.dumps(facts)
    assert "5ecret" not in text and not any(name in text for name in secrets)
    assert facts["packages"]["torch"].split("+")[0].count(".") == 2
    assert {"python", "platform", "host", "commit"} <= facts.keys()
