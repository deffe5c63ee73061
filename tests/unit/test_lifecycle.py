"""The run directory: one living attempt at a time, held to what it was made with, and asked to stop in one way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlm_dist import lifecycle
from mlm_dist.errors import UserError
from mlm_dist.files import read_json
from mlm_dist.lifecycle import RunConfig, RunDir, StopFlag, environment, stop_signals, write_json
from tests.ranks import ROOT

IDENTITY = {"run.seed": 0, "data.lanes": None, "mask.split": [0.8, 0.1, 0.1], "data.manifest": "aa"}
GUARDED = {"train.steps": 10, "optim.lr": 1e-3}


@pytest.fixture(autouse=True)
def _short_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "LOOK_S", 0.3)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    made = RunDir(tmp_path / "runs" / "r")
    made.prepare()
    yield made
    made.release()


def acquire(run: RunDir) -> StopFlag:
    flag = StopFlag()
    run.acquire(flag)
    return flag


def other_start(run: RunDir) -> "subprocess.Popen[str]":
    """Another process that holds the lock."""
    code = f"""
import time
from pathlib import Path
from mlm_dist.lifecycle import RunDir, StopFlag
run = RunDir(Path({str(run.path)!r}))
run.acquire(StopFlag())
run.status("running", 1)
print("held", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def killed_start(run: RunDir) -> None:
    """Leave the lock of a start that was killed."""
    process = other_start(run)
    process.kill()
    process.communicate()


def edit_lock(run: RunDir, **content: Any) -> None:
    path = run.path / "lock"
    path.write_text(json.dumps({**read_json(path), **content}))


# ---- lock and attempts ----


def test_attempts_are_counted(run: RunDir) -> None:
    for attempt in (1, 2, 3):
        again = RunDir(run.path)
        acquire(again)
        assert (again.attempt, again.died) == (attempt, None)
        assert read_json(run.path / "lock")["pid"] == os.getpid()
        again.status("running", step=attempt)
        again.release()
        assert not (run.path / "lock").exists()
    assert again.last_status is not None and again.last_status["attempt"] == 2


def test_a_living_attempt_keeps_others_out(run: RunDir) -> None:
    acquire(run)
    second = RunDir(run.path)
    with pytest.raises(
        UserError, match=f"running already: attempt 1 as process {os.getpid()} on {socket.gethostname()}"
    ):
        acquire(second)
    second.release()  # gives nothing back that it has not
    assert (run.path / "lock").exists()


def test_a_killed_start_is_taken_over_whether_or_not_its_parent_has_noticed(run: RunDir) -> None:
    process = other_start(run)
    try:
        with pytest.raises(UserError, match=f"attempt 1 as process {process.pid}"):
            acquire(RunDir(run.path))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: nobody has fetched its exit code
        zombie_taken = RunDir(run.path)
        acquire(zombie_taken)
        assert (zombie_taken.attempt, (zombie_taken.died or {})["attempt"]) == (2, 1)
        zombie_taken.release()
    finally:
        process.kill()
        process.communicate()
    killed_start(run)
    acquire(run)
    assert (run.attempt, (run.died or {})["attempt"]) == (3, 2)
    assert read_json(run.path / "lock")["attempt"] == 3


def test_a_process_that_only_has_the_same_number_is_taken_over(run: RunDir) -> None:
    process = other_start(run)
    try:
        edit_lock(run, started=read_json(run.path / "lock")["started"] - 1)
        acquire(run)
        assert run.attempt == 2
    finally:
        process.kill()
        process.communicate()


def test_a_lock_of_another_host_lives_by_its_heartbeat(run: RunDir) -> None:
    killed_start(run)
    edit_lock(run, host="elsewhere", attempt=4)
    with pytest.raises(UserError, match=r"attempt 4 .* on elsewhere"):
        acquire(run)
    old = time.time() - lifecycle.STALE_AFTER_S - 1
    os.utime(run.path / "lock", (old, old))
    acquire(run)
    assert (run.attempt, (run.died or {})["host"]) == (5, "elsewhere")


def test_a_clock_that_was_set_makes_no_living_attempt_dead(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """An age of hours may be the clock's doing: the next heartbeat tells."""
    monkeypatch.setattr(lifecycle, "LOOK_S", 2.0)
    killed_start(run)
    edit_lock(run, host="elsewhere", attempt=4)
    os.utime(run.path / "lock", (0, 0))
    beat = threading.Timer(0.3, os.utime, [run.path / "lock"])
    beat.start()
    with pytest.raises(UserError, match=r"attempt 4 .* on elsewhere"):
        acquire(run)
    beat.join()


def test_a_clock_that_was_set_keeps_no_dead_attempt_alive(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_start(run)
    edit_lock(run, host="elsewhere", attempt=4)
    tomorrow = time.time() + 86400
    os.utime(run.path / "lock", (tomorrow, tomorrow))
    acquire(run)
    assert run.attempt == 5


@pytest.mark.parametrize("skew", [-86400.0, 86400.0])
def test_the_clock_of_this_host_has_no_say(run: RunDir, monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    killed_start(run)
    edit_lock(run, host="elsewhere", attempt=4)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + skew)
    with pytest.raises(UserError, match=r"attempt 4 .* on elsewhere"):
        acquire(run)


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_directory_that_is_gone_is_seen(run: RunDir, how: str) -> None:
    run.prepare()
    assert not run.is_gone()
    run.path.rename(run.path.with_name("elsewhere"))
    if how == "removed":
        shutil.rmtree(run.path.with_name("elsewhere"))
    if how == "replaced":
        RunDir(run.path).prepare()
    assert run.is_gone()


def test_heartbeat_keeps_a_lock_fresh(run: RunDir) -> None:
    acquire(run)
    path = run.path / "lock"
    os.utime(path, (0, 0))
    run.heartbeat()
    assert time.time() - path.stat().st_mtime < 10


def test_a_torn_lock_waits_until_it_is_stale(run: RunDir) -> None:
    path = run.path / "lock"
    path.write_text('{"attempt": 3, "ho')
    with pytest.raises(UserError, match="running already"):
        acquire(run)
    os.utime(path, (0, 0))
    acquire(run)
    assert run.attempt == 1


def test_of_many_starts_at_once_one_wins(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_start(run)
    alive = lifecycle._alive

    def slowly(*args: Any) -> bool:
        """Time for others to come in between the look and the deed."""
        answer = alive(*args)
        time.sleep(0.05)
        return answer

    monkeypatch.setattr(lifecycle, "_alive", slowly)
    starts = [RunDir(run.path) for _ in range(8)]
    gate = threading.Barrier(len(starts))
    refused: list[UserError] = []

    def start(one: RunDir) -> None:
        gate.wait()
        try:
            acquire(one)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=start, args=(s,)) for s in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == len(starts) - 1
    (holder,) = [s for s in starts if read_json(run.path / "lock")["attempt"] == s.attempt]
    holder.release()
    assert not (run.path / "lock").exists()


def test_release_leaves_a_lock_that_another_has_taken_over(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "HEARTBEAT_S", 1e12)  # it stalls
    acquire(run)
    edit_lock(run, host="elsewhere", attempt=2)
    run.release()
    assert read_json(run.path / "lock")["host"] == "elsewhere"


def test_an_attempt_that_was_taken_over_ends_at_its_next_heartbeat(run: RunDir) -> None:
    process = other_start(run)
    try:
        edit_lock(run, host="elsewhere", attempt=2)
        assert process.wait(30) == lifecycle.EXIT_FAILED
    finally:
        process.kill()
        process.communicate()
    assert read_json(run.path / "lock")["attempt"] == 2


def test_a_stop_request_for_the_attempt_before_is_forgotten(run: RunDir) -> None:
    (run.path / "stop_request").write_text("{}")
    acquire(run)
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


def begun(run: RunDir, identity: dict[str, Any] = IDENTITY) -> RunDir:
    """The run has taken a step, so that there is something to lose."""
    run.record_identity(identity, GUARDED)
    (run.path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    return run


def test_a_new_run_takes_any_config_and_a_begun_one_its_own(run: RunDir) -> None:
    other = {**IDENTITY, "run.seed": 5}
    assert run.check_identity(IDENTITY, GUARDED, []) == {}
    run.record_identity(IDENTITY, GUARDED)
    assert run.check_identity(other, GUARDED, []) == {}  # it failed before its first step: nothing is lost
    begun(run)
    assert run.check_identity(IDENTITY, GUARDED, []) == {}
    with pytest.raises(UserError):
        run.check_identity(other, GUARDED, [])


def test_a_checkpoint_ties_the_run_too(run: RunDir) -> None:
    run.record_identity(IDENTITY, GUARDED)
    (run.path / "checkpoints" / "step_00000001").mkdir()
    with pytest.raises(UserError, match=r"run\.seed"):
        run.check_identity({**IDENTITY, "run.seed": 5}, GUARDED, [])


def test_a_different_config_is_shown_old_and_new(run: RunDir) -> None:
    begun(run)
    before = (run.path / "identity.json").read_bytes()
    other = {**IDENTITY, "run.seed": 5, "data.lanes": 3}
    with pytest.raises(UserError) as caught:
        run.check_identity(other, GUARDED, ["train.steps"])
    message = str(caught.value)
    assert "run.seed: the run has 0, this start has 5" in message
    assert "data.lanes: the run has null, this start has 3" in message
    assert "mask.split" not in message and "--run.name" in message
    assert (run.path / "identity.json").read_bytes() == before


def test_of_a_dict_the_keys_that_differ_are_shown(run: RunDir) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 32, "num_attention_heads": 2}
    begun(run, {"model.config": {**sizes, "z": 1}})
    with pytest.raises(UserError) as caught:
        run.check_identity({"model.config": {**sizes, "y": 2}}, GUARDED, [])
    lines = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert lines == [
        "model.config.y: the run has null, this start has 2",
        "model.config.z: the run has 1, this start has null",
    ]
    with pytest.raises(UserError, match=r"model\.config: the run has {.*, this start has null"):
        run.check_identity({"model.config": None}, GUARDED, [])


def test_guarded_keys_change_when_allowed_and_are_kept(run: RunDir) -> None:
    begun(run)
    longer = {**GUARDED, "train.steps": 20, "optim.lr": 1e-4}
    with pytest.raises(UserError) as caught:
        run.check_identity(IDENTITY, longer, ["train.steps"])
    assert "optim.lr: the run has 0.001, this start has 0.0001" in str(caught.value)
    assert "--allow_change optim.lr" in str(caught.value) and "train.steps" not in str(caught.value)
    assert run.check_identity(IDENTITY, longer, ["train.steps", "optim.lr"]) == {
        "train.steps": [10, 20],
        "optim.lr": [1e-3, 1e-4],
    }
    run.record_identity(IDENTITY, longer)
    assert run.check_identity(IDENTITY, longer, []) == {}
    with pytest.raises(UserError, match="the run has 20, this start has 10"):
        run.check_identity(IDENTITY, GUARDED, ["optim.lr"])


# ---- status ----


def test_status_says_all(run: RunDir) -> None:
    acquire(run)
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


def test_the_first_rank_that_fails_gives_the_reason(run: RunDir) -> None:
    ranks = [RunDir(run.path) for _ in range(4)]
    for rank in ranks:
        rank.attempt = 3
    assert [rank.claim_failure(f"rank {r}: its cause") for r, rank in enumerate(ranks)] == [True, False, False, False]
    ranks[2].failed(7, "connection closed by peer")
    status = read_json(run.path / "status.json")
    assert (status["state"], status["step"], status["reason"]) == ("failed", 7, "rank 0: its cause")
    ranks[0].attempt = 4
    assert ranks[0].claim_failure("another attempt, another first")


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


def wait_for(flag: StopFlag) -> None:
    deadline = time.monotonic() + 30
    while not flag.wanted and time.monotonic() < deadline:
        time.sleep(0.02)


def test_the_holder_sees_a_stop_request_and_beats(run: RunDir) -> None:
    flag = acquire(run)
    os.utime(run.path / "lock", (0, 0))
    (run.path / "stop_request").write_text('{"reason": "time lim')  # being written
    time.sleep(1.5)
    assert not flag.wanted
    write_json(run.path / "stop_request", {"reason": "time limit", "requeue": True})
    wait_for(flag)
    assert (flag.wanted, flag.requeue, flag.reason) == (True, True, "time limit")
    assert (run.path / "lock").stat().st_mtime > time.time() - 60


def test_a_stop_request_that_is_none_does_no_harm(run: RunDir) -> None:
    """People write the file by hand."""
    flag = acquire(run)
    for text in ("", '["stop"]'):
        (run.path / "stop_request").write_text(text)
        time.sleep(1.2)
        assert not flag.wanted
    write_json(run.path / "stop_request", {"reason": "please"})
    wait_for(flag)
    assert (flag.wanted, flag.requeue, flag.reason) == (True, False, "please")


def test_environment_tells_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"WANDB_API_KEY": "wandb-5ecret", "HF_TOKEN": "hf_5ecret", "AWS_SECRET_ACCESS_KEY": "aws-5ecret"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    facts = environment()
    text = json.dumps(facts)
    assert "5ecret" not in text and not any(name in text for name in secrets)
    assert facts["packages"]["torch"].split("+")[0].count(".") == 2
    assert {"python", "platform", "host", "commit"} <= facts.keys()
