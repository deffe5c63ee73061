"""What the host does to a run: kills its processes, takes its directory, its output or its memory. The real program, on real ranks."""

import contextlib
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlm_dist import checkpoint
from mlm_dist.files import read_json, read_json_lines
from tests.e2e.program import Program, losses, save_config
from tests.ranks import ROOT

pytestmark = pytest.mark.timeout(300)
STEPS = 40
# Else the first message of a loader worker would hold all rows of such a small run.
SHORT_MESSAGES = "from mlm_dist.data import lanes; lanes.MESSAGE_TOKENS = 256"


def children(pid: int) -> list[int]:
    """The living children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state not in b"ZX":
            found.append(int(path.parent.name))
    return sorted(found)


def wait_until(what: str, condition: object, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def read_all(fd: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(fd, 1 << 16):
            pass


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in read_json_lines(run / "events.jsonl") if event["kind"] == kind]


def assert_same_run(run: Path, whole: Path) -> None:
    """Every loss and every weight at the end, to the bit."""
    assert losses(run) == losses(whole) and sorted(losses(run)) == list(range(1, STEPS + 1))
    first, second = (checkpoint.Reader(at / "checkpoints" / checkpoint.name(STEPS)) for at in (run, whole))
    assert all((first.parameter(n) == second.parameter(n)).all() for n in first.names())


# Processes that are killed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose run ``whole``, which nothing happened to, is there."""
    train = {"steps": STEPS, "global_batch": 96, "micro_batch": 24}  # what lies in the workers' pipes is soon read
    folder = tmp_path_factory.mktemp("host")
    path = save_config(folder, data={"workers": 2, "lanes": 8}, train=train, checkpoint={"every": 5})
    Program(path, 2, ["--run.name", "whole"]).start().finish()
    return path


def test_killed_loader_workers_are_started_again_where_they_were(config: Path) -> None:
    runs = config.parent / "runs"
    program = Program(config, 2, before=SHORT_MESSAGES).start()
    try:
        for step, rank, number in ((1, 0, signal.SIGKILL), (1, 1, signal.SIGKILL), (14, 1, signal.SIGSEGV)):
            program.wait_for_step(runs / "run", step)
            os.kill(children(program.ranks[rank].pid)[-1], number)
        program.finish()
    finally:
        program.kill()
    assert_same_run(runs / "run", runs / "whole")
    restarted = events(runs / "run", "worker_restarted")
    assert sorted(event["rank"] for event in restarted) == [0, 1, 1]
    assert ["SIGSEGV" in event["what"] for event in restarted] == [False, False, True]
    assert program.log(0).read_text().count("was started again") == 3


def test_a_loader_worker_that_dies_again_and_again_ends_the_run_and_says_why(tmp_path: Path) -> None:
    config = save_config(tmp_path, data={"workers": 1}, train={"steps": 100_000})
    run = tmp_path / "runs" / "run"
    program = Program(config, 2, before=SHORT_MESSAGES).start()
    try:
        program.wait_for_step(run, 3)
        killed = 0
        while killed < 4 and program.ranks[1].poll() is None:
            (worker,) = children(program.ranks[1].pid) or [0]
            if worker:
                os.kill(worker, signal.SIGKILL)
                killed += 1
                wait_until("the worker is gone", lambda worker=worker: worker not in children(program.ranks[1].pid))
        assert program.wait() == [1, 1]
    finally:
        program.kill()
    status = read_json(run / "status.json")
    assert status["state"] == "failed" and "4th time" in status["reason"] and "SIGKILL" in status["reason"]
    assert status["reason"].startswith("rank 1: ")


def test_a_rank_that_is_killed_is_named_and_leaves_no_worker(config: Path) -> None:
    runs, flags = config.parent / "runs", ["--run.name", "killed"]
    program = Program(config, 2, flags).start()
    try:
        program.wait_for_step(runs / "killed", 7)
        workers = children(program.ranks[1].pid)
        pid = program.ranks[1].pid
        os.kill(pid, signal.SIGKILL)  # the process alone, as the kernel does it
        assert program.wait(60) == [1, -signal.SIGKILL]
        wait_until("the workers end with their rank", lambda: not any(map(is_alive, workers)), 30)
    finally:
        program.kill()
    assert len(workers) == 2
    status = read_json(runs / "killed" / "status.json")
    assert status["state"] == "failed"
    assert status["reason"].startswith(f"rank 1 (process {pid}) is gone without a word, as after a SIGKILL")
    assert "Traceback" not in program.output() and f"rank 1 (process {pid}) is gone" in program.output()
    Program(config, 2, flags).start().finish()
    assert_same_run(runs / "killed", runs / "whole")


def test_memory_that_runs_out_on_one_rank_is_the_reason_on_all(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"steps": 100_000})
    fault = """
import os
from mlm_dist.engine import Engine
from tests.e2e.hangs import inject
def fault():
    raise MemoryError
if os.environ["RANK"] == "1":
    inject(Engine, "step", fault, 6)
"""
    program = Program(config, 2, before=fault).start()
    try:
        assert program.wait(60) == [1, 2]
    finally:
        program.kill()
    assert "gone without a word" not in program.output() and "Traceback" not in program.output()
    remedy = "Set train.micro_batch 1, or auto"
    assert remedy in program.log(1).read_text()
    status = read_json(tmp_path / "runs" / "run" / "status.json")
    assert status["reason"].startswith("rank 1: UserError: ") and remedy in status["reason"]


def test_rank_0_killed_under_mlm_launch_is_named_with_exit_code_137(tmp_path: Path) -> None:
    config = save_config(tmp_path, data={"workers": 1}, train={"steps": 100_000})
    run = tmp_path / "runs" / "run"
    command = [sys.executable, "-m", "launcher.cli", "local", "-n", "2", "--config", str(config)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("wb") as log:
        launch = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until("the run trains", lambda: max(losses(run), default=0) >= 3, 90)
        os.kill(read_json(run / "lock")["pid"], signal.SIGKILL)
        assert launch.wait(60) == 137
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launch.pid, signal.SIGKILL)
    assert "rank 0 failed first (SIGKILL)" in (tmp_path / "log").read_text()
    status = read_json(run / "status.json")
    assert status["state"] == "failed" and status["reason"].startswith("rank 0 (process ")


# The run directory


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_a_run_directory_that_is_gone_ends_the_run_and_does_not_come_back(tmp_path: Path, how: str) -> None:
    config = save_config(tmp_path, train={"steps": 100_000}, checkpoint={"every": 5})
    run, elsewhere = tmp_path / "runs" / "run", tmp_path / "runs" / "renamed"
    program = Program(config, 2).start()
    try:
        program.wait_for_step(run, 7)
        if how == "moved":
            run.rename(elsewhere)
        else:
            run.rename(tmp_path / "condemned")  # in one step: rm would race with what is written
            shutil.rmtree(tmp_path / "condemned")
        assert program.wait(60) == [1, 1]
    finally:
        program.kill()
    assert "was removed or moved" in program.log(0).read_text()
    assert "Traceback" not in program.output() and "gone without a word" not in program.output()
    assert not run.exists()
    if how == "moved":
        done = max(losses(elsewhere))
        again = Program(
            config, 1, ["--run.name", "renamed", "--train.steps", str(done + 2), "--allow_change", "train.steps"]
        )
        again.start().finish()
        assert sorted(losses(elsewhere)) == list(range(1, done + 3))


# The clock


def test_clock_that_jumps_by_hours_changes_nothing(config: Path) -> None:
    runs = config.parent / "runs"
    jumps = """
import itertools, time
real, jumps = time.time, itertools.cycle([0, 7200, -7200, 86400])
time.time = lambda: real() + next(jumps)
"""
    Program(config, 2, ["--run.name", "jumped"], before=jumps).start().finish()
    assert_same_run(runs / "jumped", runs / "whole")
    assert read_json(runs / "jumped" / "status.json")["state"] == "finished"


# Output


@pytest.mark.parametrize("where", ["a pipe that nobody reads", "/dev/full", "closed"])
def test_output_that_nobody_takes_stops_nothing(tmp_path: Path, where: str) -> None:
    config = save_config(tmp_path, train={"steps": 6})
    run = tmp_path / "runs" / "run"
    command = [sys.executable, "-m", "mlm_dist.cli", "train", "--config", str(config)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    redirected = {"a pipe that nobody reads": "2>&1 | head -n 1", "/dev/full": "> /dev/full 2>&1", "closed": ">&- 2>&-"}
    shell = f"{shlex.join(command)} {redirected[where]}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == (where == "a pipe that nobody reads")
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert read_json(run / "status.json")["state"] == "finished"


@pytest.mark.parametrize("nohup", [False, True])
def test_terminal_that_goes_away(tmp_path: Path, nohup: bool) -> None:
    config = save_config(tmp_path, data={"workers": 1}, train={"steps": 100_000})
    run = tmp_path / "runs" / "run"
    command = [sys.executable, "-m", "mlm_dist.train", "--config", str(config)]
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    program = subprocess.Popen(
        ["nohup", *command] if nohup else command,
        env=env,
        cwd=tmp_path,  # where nohup leaves nohup.out
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup themselves
    )
    os.close(theirs)
    drain = threading.Thread(target=read_all, args=(ours,), daemon=True)
    drain.start()
    try:
        wait_until("the run trains", lambda: max(losses(run), default=0) >= 3)
        os.close(ours)  # whatever is printed from here on fails
        os.killpg(program.pid, signal.SIGHUP)
        if nohup:
            reached = max(losses(run))
            wait_until("the run goes on", lambda: max(losses(run)) > reached + 3)
            os.kill(program.pid, signal.SIGTERM)
        assert program.wait(60) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    status = read_json(run / "status.json")
    assert (status["state"], status["reason"]) == ("cancelled", "signal SIGTERM" if nohup else "signal SIGHUP")


def test_commands_end_in_silence_where_nobody_reads_on(tmp_path: Path) -> None:
    words = f"{sys.executable} -m mlm_dist.cli data show --config {save_config(tmp_path)}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    for shell, code, says in (
        (f"{words} | true", 1, ""),
        (f"PYTHONUNBUFFERED=1 {words} | true", 1, ""),
        (f"{words} >&-", 0, ""),
        (f"{words} > /dev/full", 1, "error: the output cannot be written: No space left on device\n"),
    ):
        done = subprocess.run(
            ["bash", "-c", f"{shell}; exit ${{PIPESTATUS[0]}}"],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (code, says), shell


# /dev/shm


def test_full_dev_shm_does_not_concern_training_and_is_named_by_prepare(tmp_path: Path) -> None:
    """The loader's messages go through pipes. NCCL between GPUs does need /dev/shm."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root and mount namespaces")
    config = save_config(tmp_path, data={"workers": 2, "lanes": 8}, train={"steps": 4})
    fill = "mount -t tmpfs -o size=4096 tmpfs /dev/shm && ! head -c 1000000 /dev/zero > /dev/shm/full 2>/dev/null"
    train = shlex.join([sys.executable, "-m", "mlm_dist.train", "--config", str(config)])
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i}.txt").write_text(f"some words of {i}\n" * 100)
    words = [sys.executable, "-m", "mlm_dist.cli", "prepare", str(tmp_path / "text"), "--output", str(tmp_path / "out")]
    prepare = shlex.join(words)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = f"{fill} && {train} && {{ {prepare} --workers 2; test $? = 2; }} && {prepare} --workers 1"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert sorted(losses(tmp_path / "runs" / "run")) == [1, 2, 3, 4]
    assert "--workers 2: no room for what worker processes share (No space left on device)" in done.stderr
    assert (tmp_path / "out" / "manifest.json").exists()
