"""`mlm-launch local` with real processes under the real deepspeed launcher; a stand-in takes the place of training."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HOSTILE = ["--text", "a b;$(touch boom)`touch boom`", "line\nbreak", "quote'\"", "üñ→漢字", "--empty=", "", "*"]


class Launch:
    """A started `mlm-launch local`."""

    def __init__(self, here: Path, mode: str, *flags: str, extra: list[str] | None = None) -> None:
        self.here = here
        self.run = here / "runs" / "job one"
        config = here / "job one.yaml"
        config.write_text("run: {dir: runs}\n")
        path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "launcher.cli", "local", "-n", "2", "--config", str(config)]
        command += ["--program", "standin", *flags, "--mode", mode, *(extra or [])]
        self.process = subprocess.Popen(command, cwd=here, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pids: list[int] = []

    def wait_for(self, name: str, timeout: float = 90.0) -> None:
        """Waits until both ranks have written `name`."""
        deadline = time.monotonic() + timeout
        while not all((self.here / f"{name}-{rank}.json").exists() for rank in (0, 1)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"no {name}: {self.process.communicate()}")
            time.sleep(0.05)

    def end(self, timeout: float = 90.0) -> tuple[int, str]:
        """Waits for its end, checks that nothing of it runs any more; its code and its stdout and stderr."""
        out, err = self.process.communicate(timeout=timeout)
        left = [p for p in self.rank_pids() if alive(p)]
        assert not left, f"still running: {left}\n{err.decode()}"
        return self.process.returncode, out.decode() + err.decode()

    def rank_pids(self) -> list[int]:
        """The ranks and their helpers."""
        return [pid for path in self.here.glob("pids-*.json") for pid in json.loads(path.read_text())]


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(mode: str, *flags: str, extra: list[str] | None = None) -> Launch:
        started.append(Launch(tmp_path, mode, *flags, extra=extra))
        return started[-1]

    yield start
    for job in started:
        job.process.kill()
        for pid in filter(alive, job.rank_pids()):
            os.kill(pid, signal.SIGKILL)


pytestmark = pytest.mark.timeout(180)


def test_finished_run_gets_its_arguments_untouched_and_returns_0(launch, tmp_path: Path) -> None:
    job = launch("finish", extra=HOSTILE)
    code, output = job.end()
    assert (code, output) == (0, "")  # nothing of the deepspeed launcher's own
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"args-{rank}.json").read_text())
        assert seen["argv"][1:] == ["--config", str(tmp_path / "job one.yaml"), "--mode", "finish", *HOSTILE]
        assert seen["environ"]["CUDA_VISIBLE_DEVICES"] == ""
        assert seen["environ"]["LOCAL_RANK"] == str(rank)
        assert int(seen["environ"]["OMP_NUM_THREADS"]) >= 1
    assert not (tmp_path / "boom").exists()
    assert not (tmp_path / "runs").exists() or not (job.run / "logs").exists()  # silent ranks leave no logs


def test_rank_that_raises_takes_the_job_down_with_its_traceback_shown_once(launch) -> None:
    job = launch("raise")
    code, output = job.end()
    assert code == 1
    assert output.count("RuntimeError: the thing that went wrong") == 1
    assert output.count("Traceback (most recent call last)") == 1
    assert "rank 1 failed first (exit code 1)" in output
    assert "RuntimeError" in (job.run / "logs" / "rank-00001.log").read_text()


def test_rank_that_is_killed_gives_137(launch) -> None:
    code, output = launch("die").end()
    assert code == 137
    assert "rank 1 failed first (SIGKILL)" in output


def test_refused_run_returns_2_says_why_once_and_leaves_nothing_behind(launch, tmp_path: Path) -> None:
    code, output = launch("refuse").end()
    assert code == 2
    assert output.count("no such key: train.stepz") == 1
    assert not (tmp_path / "runs" / "job one").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_first_signal_asks_for_a_checkpoint(launch, tmp_path: Path, number: signal.Signals) -> None:
    job = launch("stop")
    job.wait_for("pids")
    job.process.send_signal(number)
    code, output = job.end()
    assert code == 75, output
    assert json.loads((tmp_path / "request-0.json").read_text()) == {
        "reason": f"mlm-launch received {number.name}",
        "requeue": number == signal.SIGUSR1,
    }
    assert "stopped at step 7 with a checkpoint" in output
    assert "stop_request" in output
    assert not (job.run / "stop_request").exists()  # the next start must not stop at once


def test_second_signal_kills(launch) -> None:
    job = launch("deaf")
    job.wait_for("ready")
    job.process.terminate()
    deadline = time.monotonic() + 30
    while not (job.run / "stop_request").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.process.terminate()
    assert job.end(timeout=30)[0] == 143


def test_run_that_does_not_end_in_the_grace_time_is_killed(launch) -> None:
    job = launch("deaf", "--grace", "1")
    job.wait_for("ready")
    job.process.send_signal(signal.SIGINT)
    code, output = job.end(timeout=30)
    assert code == 130
    assert "not ended 1 s after" in output


@pytest.mark.parametrize("depth", [1, 2])
def test_ranks_that_lose_their_launcher_are_stopped(launch, depth: int) -> None:
    """Depth 1 is the deepspeed command, 2 the process that it starts; neither, killed, takes the ranks along."""
    job = launch("stop")
    job.wait_for("pids")
    pid = job.process.pid
    for _ in range(depth):
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    code, output = job.end()
    assert code == 75, output
    assert "the deepspeed launcher died" in output


def test_signal_to_a_second_start_leaves_the_first_alone(launch, tmp_path: Path) -> None:
    """The run directory is held by a living process that this launch did not start."""
    job = launch("deaf", "--grace", "1")
    job.run.mkdir(parents=True)
    (job.run / "lock").write_text(json.dumps({"pid": os.getpid()}))
    job.wait_for("ready")
    job.process.terminate()
    assert job.end(timeout=30)[0] == 143
    assert {p.name for p in job.run.iterdir()} == {"lock"}
