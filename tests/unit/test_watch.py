"""How a run stands: what the console and ``mlm-dist watch`` make of its records."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlm_dist.console import RunConsole
from mlm_dist.lifecycle import started_at
from mlm_dist.report.words import duration
from mlm_dist.view import BLOCKS, Cadence, History, line, panel, sparkline
from mlm_dist.watch_command import Heart, Tail, Watch, standing
from tests.ranks import ROOT


def train(step: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "attempt": 1,
        "time": 1000.0 + 2 * step,
        "loss": 5.0 - step / 100,
        "lr": 1e-4,
        "tokens_per_s": 12345.6,
        "mfu": 0.417,
        "step_time": 2.0,
        "data_wait": 0.5,
        "memory_gib": 61.4,
        "epoch": step / 40,
        "progress": step / 100,
        "slowest_rank": 3,
        "slowest_host": "node7",
        "slowest_excess": 0.012,
    } | more


def history(*records: dict[str, Any], events: tuple[dict[str, Any], ...] = ()) -> History:
    out = History()
    for record in records:
        out.add(record)
    for event in events:
        out.add_event(event)
    return out


def text_of(renderable: Any, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(renderable)
    return console.export_text()


FACTS = ("4.6000", "12,346", "41.7%", "data wait 25", "61.4", "node7", "0.012 s", "2 min 0 s", "40")


def test_a_line_and_a_panel_tell_the_same_facts() -> None:
    view = history(*(train(step) for step in range(10, 41, 10))).view(steps=100, checkpoint_every=50)
    assert view is not None
    plain, shown = line(view), text_of(panel(view, "demo", state="running"))
    for text in (plain, shown):
        assert all(fact in text for fact in FACTS), text
    assert plain.startswith(
        "epoch   1.00  step 40/100  loss 4.6000  lr 1.00e-04  12,346 tokens/s  MFU 41.7%  left 2 min 0 s"
    )
    assert plain.endswith("checkpoint in 10") and "in 10 steps" in shown and "running" in shown
    assert len(plain) < 240 and plain.isascii() and plain.isprintable()
    assert any(block in shown for block in BLOCKS)
    assert all(len(row) <= 60 for row in text_of(panel(view, "demo"), width=60).splitlines())


def test_what_a_run_did_not_record_is_left_out() -> None:
    view = history({"kind": "train", "step": 1, "loss": None, "attempt": 1, "time": 1.0}).view(
        steps=None, checkpoint_every=None
    )
    assert view is not None and view.left is None and view.losses == []
    assert line(view) == "step 1  loss nan  done 0%"
    assert "nan" in text_of(panel(view, "demo"))


def test_steps_that_come_again_take_the_place_of_what_they_were() -> None:
    seen = history(*(train(s) for s in (10, 20, 30)), train(20, loss=1.0, attempt=2), train(30, loss=0.5, attempt=2))
    view = seen.view(steps=100, checkpoint_every=None)
    assert view is not None and list(view.losses) == [4.9, 1.0, 0.5] and view.attempt == 2


def test_time_left_is_of_the_pace_of_this_attempt_alone() -> None:
    night = 1e6
    records = [train(10), train(20), train(30, time=night, attempt=2), train(40, time=night + 30, attempt=2)]
    view = history(*records).view(steps=100, checkpoint_every=None)
    assert view is not None and view.left == pytest.approx(180)
    first = history(train(10)).view(steps=100, checkpoint_every=None)
    assert first is not None and first.left == pytest.approx(180)  # by the time of a step
    done = history(train(100)).view(steps=100, checkpoint_every=50)
    assert done is not None and done.left == 0 and done.checkpoint_in is None


def test_events_are_told_without_control_characters() -> None:
    hostile = {"kind": "data_loss", "step": 7, "documents": 2, "shard": "a\x1b[2J\n.tar", "cause": "bad\r\x07 CRC"}
    view = history(train(10), events=(hostile, {"kind": "attempt", "step": 9})).view(steps=None, checkpoint_every=None)
    assert view is not None and view.event is not None
    assert view.event[0] == 7 and view.event[1].isprintable() and "lost 2 document(s) of a" in view.event[1]
    assert "\x1b" not in text_of(panel(view, "demo"))


def test_sparkline() -> None:
    assert sparkline([]) == "" and sparkline([1.0, 1.0]) == BLOCKS[0] * 2
    assert sparkline([float(i) for i in range(8)]) == BLOCKS
    long = sparkline([float(-i) for i in range(1000)], width=8)
    assert long == BLOCKS[::-1]


def test_durations() -> None:
    found = [duration(seconds) for seconds in (0.07, 7, 754, 11100, 183600)]
    assert found == ["0.07 s", "7 s", "12 min 34 s", "3 h 5 min", "2 d 3 h"]


def test_a_log_gets_fewer_lines_as_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    cadence, lines = Cadence(), []
    for second in range(86_400):
        now = float(second)
        lines += [now] if cadence.due() else []
    assert lines[:3] == [0.0, 1.0, 2.0] and 2500 < len(lines) < 3300


def test_the_console_of_a_log_says_the_last_step_too(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole("demo", 100, 50, enabled=True)
    with console:
        for step in range(10, 60, 10):
            console.record(train(step))
        console.say("a word [in brackets]")
    lines = capsys.readouterr().err.splitlines()
    assert "step 10/100" in lines[0] and any("step 50/100" in text for text in lines[1:])
    assert "a word [in brackets]" in lines
    assert len(lines) == len(set(lines)) and all(text.isprintable() for text in lines)
    silent = RunConsole("demo", 100, 50, enabled=False)
    with silent:
        silent.record(train(10))
    assert capsys.readouterr() == ("", "")


# watch


def test_a_tail_takes_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    tail = Tail(path)
    assert list(tail.new()) == []
    path.write_text('{"a": 1}\n{"a": 2')
    assert list(tail.new()) == [{"a": 1}]
    with path.open("a") as file:
        file.write('}\n\0\0\n{"a": 3}\n{"torn')
    assert list(tail.new()) == [{"a": 2}, {"a": 3}]
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # as the next attempt does
    assert list(tail.new()) == []
    with path.open("a") as file:
        file.write('{"a": 4}\n')
    assert list(tail.new()) == [{"a": 4}]
    path.write_text('{"a": 5}\n')
    assert list(tail.new()) == [{"a": 5}]


def run_dir(path: Path, lock: dict[str, Any] | None = None, **status: Any) -> Path:
    path.mkdir(exist_ok=True)
    records = [train(step) for step in (10, 20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"kind": "tra')
    (path / "config.yaml").write_text("train: {steps: 100}\ncheckpoint: {every: 50}\n")
    (path / "status.json").write_text(json.dumps({"state": "running", "step": 20} | status))
    if lock is not None:
        (path / "lock").write_text(json.dumps(lock))
    return path


def watch(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from mlm_dist.cli import main; code = main(['watch', *sys.argv[1:]]);"
        "assert not {'torch', 'numpy', 'wandb', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(path), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        ({"state": "finished"}, 0, "finished at step 20"),
        ({"state": "preempted", "requeue": True, "reason": "signal SIGUSR1"}, 75, "it will be started again"),
        ({"state": "cancelled", "reason": "mlm-launch cancel"}, 75, "cancelled at step 20: mlm-launch cancel"),
        ({"state": "failed", "reason": "rank 1: ValueError: no"}, 1, "failed at step 20: rank 1: ValueError: no"),
        ({"state": "failed", "reason": "the run hangs: nothing has moved"}, 76, "the run hangs"),
        ({"state": "running"}, 1, "no process holds the run"),
    ],
)
def test_watch_says_how_a_run_ended(tmp_path: Path, status: dict[str, Any], code: int, words: str) -> None:
    """Without torch, so that it answers at once."""
    before = sorted(p.name for p in run_dir(tmp_path / "demo", **status).iterdir())
    done = watch(tmp_path / "demo")
    numbers, state = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (code, "") and words in state
    assert numbers.startswith("epoch   0.50  step 20/100  loss 4.8000") and "checkpoint in 30" in numbers
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == before


def test_watch_goes_on_until_the_run_ends(tmp_path: Path) -> None:
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": started_at(os.getpid())}
    run_dir(tmp_path, lock=me)
    assert watch(tmp_path, "--once").stdout.splitlines()[-1] == "running"
    command = [sys.executable, "-m", "mlm_dist.cli", "watch", str(tmp_path), "--interval", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert "step 20/100" in process.stdout.readline()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('in"}\n' + json.dumps(train(30)) + "\n")
        while "step 30/100" not in (text := process.stdout.readline()):
            assert text, "it ended"
        run_dir(tmp_path, state="finished")
        assert process.wait(30) == 0
        assert "finished at step 20" in process.stdout.read()


def test_what_an_attempt_before_told_is_not_said_of_one_that_starts(tmp_path: Path) -> None:
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": started_at(os.getpid())}
    run_dir(tmp_path, lock=me | {"attempt": 2}, state="preempted", attempt=1, requeue=True)
    now = Watch(tmp_path).look()[1]
    assert (now.state, now.code) == ("starting", None)
    run_dir(tmp_path, lock=me | {"attempt": 2, "started": 1}, state="preempted", attempt=1)
    assert "its process is gone" in Watch(tmp_path).look()[1].state
    run_dir(tmp_path, lock=me | {"attempt": 1}, state="failed", attempt=1)
    assert Watch(tmp_path).look()[1].code == 1


def test_a_run_that_ends_while_it_is_looked_at_is_not_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir(tmp_path)

    def end(_heart: Heart) -> None:
        run_dir(tmp_path, state="finished")

    monkeypatch.setattr(Heart, "silence", end)
    assert Watch(tmp_path).look()[1].code == 0


def test_a_fault_of_the_file_server_is_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": started_at(os.getpid())}
    watch = Watch(run_dir(tmp_path, lock=me))
    before, now, _ = watch.look()

    def stale(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    for name in ("open", "read_bytes", "stat"):
        monkeypatch.setattr(Path, name, stale)
    assert before is not None and watch.look()[1:] == (now, False)


def test_watch_of_no_run_is_a_users_mistake(tmp_path: Path) -> None:
    done = watch(tmp_path)
    assert done.returncode == 2 and "no run directory" in done.stderr


def test_a_lock_of_another_host_is_judged_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by this host's clock at the first look alone: it may be wrong by hours."""
    lock = tmp_path / "lock"
    heart = Heart(lock)
    assert heart.silence() is None
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    os.utime(lock, (time.time() - 3600,) * 2)
    assert heart.silence() == pytest.approx(3600, abs=30)
    os.utime(lock, (time.time() - 3590,) * 2)  # it beats, by a clock that is an hour behind
    assert heart.silence() == pytest.approx(0, abs=30)
    assert standing({"state": "running"}, 1000.0).code == 76 and standing({"state": "running"}, 5.0).code is None
    assert "its process is gone" in standing({"state": "running"}, float("inf")).state
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": 1}))
    assert heart.silence() == float("inf")


def on_terminal(code: str, *arguments: str, term: str = "xterm") -> tuple[int, str]:
    """Exit code and output of Python under a terminal of 100 columns."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [sys.executable, "-c", code, *arguments]
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": term}
    with subprocess.Popen(command, stdout=other, stderr=other, cwd=ROOT, env=environ) as process:
        os.close(other)
        output = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(main, 65536):
                output += data
        return process.wait(30), output.decode()


def test_a_terminal_gets_a_panel_with_lines_above_it() -> None:
    code = f"""
from mlm_dist.console import RunConsole
with RunConsole("demo", 100, 50, enabled=True) as console:
    console.record({train(40)!r})
    console.event({{"kind": "skipped_step", "step": 41, "why": "a loss was not finite"}})
    console.say("a line that stays")
"""
    exit_code, output = on_terminal(code)
    last = output[output.rindex("╭") :]
    assert exit_code == 0 and "step 40 / 100" in last and "a loss was not finite" in last
    assert output.index("a line that stays") < output.rindex("╭")
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor is shown again"


def test_a_log_and_a_terminal_without_a_cursor_get_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunConsole("demo", 100, 50, enabled=True) as console:
        console.record(train(40))
    monkeypatch.delenv("FORCE_COLOR")
    log = capsys.readouterr().err
    assert log.startswith("epoch   1.00  step 40/100") and log.strip().isprintable()
    code = f"""
from mlm_dist.console import RunConsole
with RunConsole("demo", 100, 50, enabled=True) as console:
    console.record({train(40)!r})
"""
    assert on_terminal(code, term="dumb")[1].startswith("epoch   1.00  step 40/100")
    watched = "import sys; from mlm_dist.cli import main; sys.exit(main(['watch', *sys.argv[1:]]))"
    run_dir(tmp_path, state="finished")
    assert on_terminal(watched, str(tmp_path), term="dumb")[1].startswith("epoch   0.50  step 20/100")


def test_a_terminal_that_nobody_reads_holds_up_nothing() -> None:
    code = f"""
import os
from mlm_dist.console import RunConsole
with RunConsole("demo", 100, 50, enabled=True) as console:
    console.record({train(40)!r})
    for number in range(2000):
        console.say("line " * 20)
console.say("finished")
os._exit(7)
"""
    main, other = pty.openpty()
    try:
        environ = os.environ | {"TERM": "xterm"}
        with subprocess.Popen([sys.executable, "-c", code], stderr=other, cwd=ROOT, env=environ) as process:
            try:
                assert process.wait(60) == 7
            finally:
                process.kill()
    finally:
        os.close(main)
        os.close(other)


def test_a_worker_forked_while_the_panel_is_drawn_can_write() -> None:
    code = """
import logging, os, signal, sys, threading
from mlm_dist.console import RunConsole, outlive_output
outlive_output()
console = RunConsole("demo", 100, 50, enabled=True)
with console:
    logging.getLogger("a.library").addHandler(logging.StreamHandler())
    drawing, drawn = threading.Event(), threading.Event()
    def draw():
        with console._live._lock, console.console._lock:
            drawing.set()
            drawn.wait()
    threading.Thread(target=draw).start()
    drawing.wait()
    worker = os.fork()
    if not worker:
        signal.alarm(20)
        print("printed by the worker", file=sys.stderr)
        logging.getLogger("a.library").warning("logged by the worker")
        os._exit(0)
    status = os.waitpid(worker, 0)[1]
    drawn.set()
sys.exit(os.waitstatus_to_exitcode(status) and 3)
"""
    exit_code, output = on_terminal(code)
    assert exit_code == 0 and "printed by the worker" in output and "logged by the worker" in output


def test_watch_on_a_terminal_ends_with_the_run(tmp_path: Path) -> None:
    run_dir(tmp_path / "demo", state="failed", reason="the run hangs: rank 1 on node2 is in step 21")
    code = "import sys; from mlm_dist.cli import main; sys.exit(main(['watch', *sys.argv[1:]]))"
    for flags in ((), ("--once",)):
        exit_code, output = on_terminal(code, str(tmp_path / "demo"), *flags)
        last = output[output.rindex("╭") :]
        assert exit_code == 76 and "step 20 / 100" in last and "rank 1 on node2" in last and "demo" in last
