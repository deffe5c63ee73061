"""Tracking, judged by what lies on the disk: our files, and the transaction logs that wandb itself wrote."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.artifacts import Kept, due
from mlm_dist.errors import UserError
from mlm_dist.json_lines import JsonLines
from mlm_dist.records import read_metrics, read_predictions
from mlm_dist.redact import redact
from mlm_dist.tracking import TrackConfig, Tracker
from mlm_dist.wandb_mirror import Mirror, read_wandb_file, resolve_mode
from tests import wandb_files

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    os.environ.pop("WANDB_DATA_DIR", None)


def train(step: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "loss": 5.0 / (step + 1),
        "lr": 1e-4,
        "tokens_per_s": 10.0,
        "skipped": False,
    } | more


def wandb_rows(run_dir: Path) -> list[dict[str, Any]]:
    """All history rows of all attempts, in the order of the attempts."""
    return wandb_files.history(run_dir / "wandb")


def wandb_runs(run_dir: Path) -> list[Any]:
    return wandb_files.records("run", run_dir / "wandb")


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def attempt_in_process(run_dir: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run ``body`` with a ``tracker(attempt)`` helper in a process of its own."""
    head = f"""
        import os, signal
        from mlm_dist.tracking import TrackConfig, Tracker
        def tracker(attempt, **kw):
            return Tracker({str(run_dir)!r}, TrackConfig(wandb="offline"), {{}}, attempt=attempt, **kw)
        def train(step):
            return {{"kind": "train", "step": step, "loss": 5.0 / (step + 1)}}
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


# The files


def test_metrics_round_trip_to_the_bit(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=3, world_size=2)
    loss = 0.1 + 0.2
    tracker.log({"kind": "train", "step": 1, "loss": loss, "grad_norm": None, "perplexity": float("inf")})
    tracker.log({"kind": "val", "step": 1, "loss": 1 / 3})
    tracker.finish()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["kind"], first["step"], first["attempt"], first["world_size"]) == ("train", 1, 3, 2)
    assert first["loss"] == loss and second["loss"] == 1 / 3
    assert first["grad_norm"] is None and first["perplexity"] is None
    assert abs(first["time"] - time.time()) < 60
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_tensors_and_arrays_are_written_as_numbers(tmp_path: Path) -> None:
    import numpy as np
    import torch

    lines = JsonLines(tmp_path / "x.jsonl")
    lines.append(
        {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": np.int64(7), "d": [np.float64("nan")], "p": Path("q")}
    )
    with pytest.raises(TypeError, match="object"):
        lines.append({"a": object()})
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"a": 0.5, "b": 0.25, "c": 7, "d": [None], "p": "q"}


def test_readers_keep_the_last_line_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [train(1), train(2), {"kind": "val", "step": 2, "loss": 9}, train(3), train(2, loss=0.5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = read_metrics(path)
    assert [(r["step"], r["kind"]) for r in records] == [(1, "train"), (2, "train"), (2, "val"), (3, "train")]
    assert records[1]["loss"] == 0.5


@pytest.mark.parametrize("cut", [1, 5, 20, 40])
def test_a_torn_last_line_is_passed_over_and_repaired(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    whole, torn = json.dumps(train(1)) + "\n", json.dumps(train(2))
    path.write_text(whole + torn[:cut])
    assert [r["step"] for r in read_metrics(path)] == [1]
    tracker = Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=2)
    tracker.log(train(2))
    tracker.finish()
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    assert [(e["kind"], e["bytes"], e["attempt"]) for e in events(tmp_path)] == [("torn_line", cut, 2)]


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train(1)))
    assert [r["step"] for r in read_metrics(path)] == [1]
    tracker = Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=2)
    tracker.log(train(2))
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_damage_within_the_file_stops_a_reader_but_not_a_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train(1)) + "\n\0\0\0\n" + json.dumps(train(2)) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2"):
        read_metrics(path)
    Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=2).finish()
    assert events(tmp_path)[0]["lines"] == [2]
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "none.jsonl")


def test_a_replayed_step_with_another_loss_is_an_event_at_the_same_world_size_only(tmp_path: Path) -> None:
    def attempt(number: int, world: int, loss: float) -> None:
        tracker = Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=number, world_size=world)
        tracker.log(train(1, loss=loss))
        tracker.finish()

    attempt(1, 2, 0.5)
    attempt(2, 2, 0.5)
    attempt(3, 3, 0.6)
    assert not events(tmp_path)
    attempt(4, 3, 0.7)
    (event,) = events(tmp_path)
    assert (event["kind"], event["step"], event["loss_before"], event["loss_now"]) == ("replay_differs", 1, 0.6, 0.7)


@pytest.mark.parametrize("restart", [False, True])
def test_steps_that_a_roll_back_took_back_are_not_compared(tmp_path: Path, restart: bool) -> None:
    def attempt(number: int) -> Tracker:
        return Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=number)

    tracker = attempt(1)
    for step in (90, 100):
        tracker.log(train(step, loss=0.5))
    tracker.event({"kind": "rollback", "to": 90, "skip": [90, 99], "step": 100})
    if restart:
        tracker.finish()
        tracker = attempt(2)
    tracker.log(train(100, loss=0.7))
    assert [e["kind"] for e in events(tmp_path)] == ["rollback"]
    tracker.log(train(90, loss=0.7))  # this one was not
    tracker.finish()
    assert [e["kind"] for e in events(tmp_path)] == ["rollback", "replay_differs"]


# The mode


@pytest.mark.parametrize(
    ("setting", "environ", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("auto", {"WANDB_MODE": "nonsense"}, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "disabled"),
        ("offline", {"WANDB_API_KEY": KEY}, "offline"),
        ("online", {}, "online"),
    ],
)
def test_mode(setting: str, environ: dict[str, str], mode: str, tmp_path: Path) -> None:
    assert resolve_mode(setting, {"HOME": str(tmp_path)} | environ) == mode


def test_a_netrc_entry_for_the_server_in_use_is_a_login(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n login user\n password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    home = {"HOME": str(tmp_path)}
    assert resolve_mode("auto", home) == "online"
    assert resolve_mode("auto", home | {"WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"
    (tmp_path / ".netrc").write_text("machine broken !! \n")
    assert resolve_mode("auto", home) == "offline"


# W&B


def test_wandb_holds_what_was_logged_with_our_axis(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackConfig(wandb="offline"), {"optim": {"lr": 0.1}}, attempt=1)
    assert tracker.mode == "offline"
    for step in (10, 20):
        tracker.log(train(step, data_wait=0.5, time_forward=0.25, memory_gib=1.5))
    tracker.log({"kind": "val", "step": 20, "loss": 2.0})
    tracker.finish(0)
    rows = wandb_rows(tmp_path)
    assert [(r["global_step"], r.get("train/loss"), r.get("val/loss")) for r in rows] == [
        (10, 5 / 11, None),
        (20, 5 / 21, None),
        (20, None, 2.0),
    ]
    groups = {"train/lr": 1e-4, "train/skipped": 0, "perf/tokens_per_s": 10.0, "perf/time_forward": 0.25}
    groups |= {"data/data_wait": 0.5, "system/memory_gib": 1.5, "system/attempt": 1, "system/world_size": 1}
    assert {key: rows[0][key] for key in groups} == groups
    assert not any(key.startswith(("train/", "perf/", "data/", "system/")) for key in rows[2])
    (path,) = tmp_path.glob("wandb/attempt_0001/wandb/offline-run-*/run-*.wandb")
    records = list(read_wandb_file(path))
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert {axes[f"{group}/*"] for group in ("train", "val", "perf", "data", "system")} == {"global_step"}
    (run,) = wandb_runs(tmp_path)
    assert run.run_id == tracker.wandb_id and run.project == "mlm_dist" and run.display_name == tmp_path.name
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert config["optim"] == {"lr": 0.1}
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [0]


def test_killed_attempts_make_one_run_with_each_step_once(tmp_path: Path) -> None:
    """SIGKILL loses rows of W&B's buffer; the next attempt replays some steps and sends what was lost."""
    killed = """
        t = tracker({attempt})
        for step in range({first}, {last}):
            t.log(train(step))
            if step % 10 == 9:
                t.log({{"kind": "val", "step": step, "loss": 1.0}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert attempt_in_process(tmp_path, killed.format(attempt=1, first=0, last=30)).returncode == -signal.SIGKILL
    assert len(wandb_rows(tmp_path)) < 33, "nothing was lost, so this test shows nothing"
    assert attempt_in_process(tmp_path, killed.format(attempt=2, first=20, last=45)).returncode == -signal.SIGKILL
    body = killed.format(attempt=3, first=40, last=60).replace("os.kill(os.getpid(), signal.SIGKILL)", "t.finish(0)")
    done = attempt_in_process(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""  # wandb is silent
    rows = wandb_rows(tmp_path)
    assert sorted(r["global_step"] for r in rows if "train/loss" in r) == list(range(60))
    assert [r["global_step"] for r in rows if "val/loss" in r] == [9, 19, 29, 39, 49, 59]
    assert sorted(r["_step"] for r in rows) == list(range(66))
    assert all(r["train/loss"] == 5.0 / (r["global_step"] + 1) for r in rows if "train/loss" in r)
    assert len({run.run_id for run in wandb_runs(tmp_path)}) == 1
    assert len(list((tmp_path / "wandb").glob("attempt_*"))) == 3


def test_the_run_id_is_kept_and_a_given_one_wins(tmp_path: Path) -> None:
    first = Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=1)
    second = Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=2)
    assert first.wandb_id == second.wandb_id
    assert Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=3, wandb_id="abcd1234").wandb_id == "abcd1234"


def test_rows_of_a_run_that_began_without_wandb_are_sent_later(tmp_path: Path) -> None:
    first = Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=1)
    first.log(train(1, time=1234.5))
    first.finish(1)
    assert not wandb_rows(tmp_path)
    second = Tracker(tmp_path, TrackConfig(wandb="offline"), {}, attempt=2)
    second.log(train(2))
    second.finish(0)
    rows = wandb_rows(tmp_path)
    assert [r["global_step"] for r in rows] == [1, 2] and rows[0]["_timestamp"] == 1234.5


def test_an_unreachable_server_means_offline_and_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    body = f"""
        from mlm_dist import wandb_mirror
        wandb_mirror._INIT_TIMEOUT = 3.0
        t = Tracker({str(tmp_path)!r}, TrackConfig(), {{}}, attempt=1)
        t.log(train(1))
        t.finish(0)
    """
    done = attempt_in_process(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert [r["global_step"] for r in wandb_rows(tmp_path)] == [1]
    (event,) = events(tmp_path)
    assert event["kind"] == "wandb" and "cannot be reached" in event["message"]
    assert KEY not in (tmp_path / "events.jsonl").read_text()
    assert (
        len(done.stderr.splitlines()) == 1 and "cannot be reached" in done.stderr
    )  # our warning, and no word of wandb


class _Wandb(http.server.BaseHTTPRequestHandler):
    """A W&B server that is no help."""

    kind = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.kind == "hangs":
            time.sleep(60)
        self.send_response({"500": 500, "wrong key": 401}.get(self.kind, 503))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("kind", ["500", "hangs", "wrong key"])
def test_a_server_that_fails_hangs_or_refuses_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Wandb,), {"kind": kind}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    body = f"""
        from mlm_dist import wandb_mirror
        wandb_mirror._INIT_TIMEOUT = 3.0
        t = Tracker({str(tmp_path)!r}, TrackConfig(), {{}}, attempt=1)
        for step in range(50):
            t.log(train(step))
        t.finish(0)
    """
    try:
        done = attempt_in_process(tmp_path, body)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 50
    assert [r["global_step"] for r in wandb_rows(tmp_path)] == list(range(50))  # all that a later `wandb sync` sends
    (event,) = events(tmp_path)
    assert event["kind"] == "wandb" and "cannot be reached" in event["message"]
    assert KEY not in (tmp_path / "events.jsonl").read_text() + done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_frozen_service_costs_one_warning(tmp_path: Path, number: int) -> None:
    body = f"""
        t = tracker(1)
        t.log(train(0))
        import wandb
        os.kill(wandb.setup()._connection._proc._process.pid, {int(number)})
        for step in range(1, 50):
            t.log(train(step))
        t.finish(0, timeout=2)
        print("done")
    """
    start = time.monotonic()
    done = attempt_in_process(tmp_path, body)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert time.monotonic() - start < 30
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 50
    assert [e["kind"] for e in events(tmp_path)] == ["wandb"]
    assert "Traceback" not in done.stderr
    later = attempt_in_process(tmp_path, "tracker(2).finish(0)")
    assert later.returncode == 0, later.stderr
    assert sorted(r["global_step"] for r in wandb_rows(tmp_path)) == list(range(50))


def test_an_unwritable_wandb_directory_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "attempt_0001").write_text("in the way")
    tracker = Tracker(tmp_path, TrackConfig(wandb="offline"), {}, attempt=1)
    tracker.log(train(1))
    tracker.finish(0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    assert [e["kind"] for e in events(tmp_path)] == ["wandb"]


def test_a_torn_wandb_file_is_read_up_to_the_tear(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackConfig(wandb="offline"), {}, attempt=1)
    for step in range(600):  # more than one 32 KiB block
        tracker.log(train(step))
    tracker.finish(0)
    (path,) = tmp_path.glob("wandb/attempt_0001/wandb/offline-run-*/run-*.wandb")
    whole = path.read_bytes()
    assert len(whole) > 3 * 32768
    assert len(wandb_rows(tmp_path)) == 600
    path.write_bytes(whole[: len(whole) // 2])
    rows = wandb_rows(tmp_path)
    assert 0 < len(rows) < 600 and [r["global_step"] for r in rows] == list(range(len(rows)))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    assert 0 < len(wandb_rows(tmp_path)) < 600


# Alerts and artifacts


def alerts(run_dir: Path) -> list[tuple[str, str]]:
    return [
        (a.title.removeprefix(f"{run_dir.name}: "), a.level) for a in wandb_files.records("alert", run_dir / "wandb")
    ]


def test_what_a_person_should_hear_of_is_an_alert_once_an_attempt(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackConfig(wandb="offline"), {}, attempt=1)
    tracker.event({"kind": "attempt", "step": 0})
    tracker.event({"kind": "skipped_step", "step": 3, "why": "no token was selected"})  # nothing bad
    for step in (4, 5):
        tracker.event({"kind": "skipped_step", "step": step, "cause": "loss", "why": "a loss was not finite"})
    tracker.event({"kind": "rollback", "step": 6, "to": 2, "skip": [3, 5], "why": "2 steps in a row went wrong"})
    tracker.event({"kind": "checkpoint_failed", "step": 6, "reason": "disk full"})
    tracker.event({"kind": "data_loss", "step": 6})
    tracker.finish(0)
    assert alerts(tmp_path) == [
        ("numbers went wrong at step 4", "WARN"),
        ("rolled back at step 6", "ERROR"),
        ("a checkpoint could not be written at step 6", "ERROR"),
    ]
    assert "2 steps in a row went wrong" in wandb_files.records("alert", tmp_path / "wandb")[1].text


def test_attempts_that_all_begin_at_one_step_are_a_crash_loop(tmp_path: Path) -> None:
    def attempt(number: int, step: int, ending: str | None = None, wandb: Any = "disabled") -> None:
        tracker = Tracker(tmp_path, TrackConfig(wandb=wandb), {}, attempt=number)
        tracker.event({"kind": "attempt", "step": step})
        if ending:
            tracker.event({"kind": ending, "step": step})
        tracker.finish(1)

    attempt(1, 0)
    attempt(2, 0, "stopped")  # somebody wanted that
    attempt(3, 0)
    attempt(4, 0, wandb="offline")
    assert alerts(tmp_path) == []
    attempt(5, 0, wandb="offline")
    assert alerts(tmp_path) == [("the run crashes again and again", "ERROR")]
    attempt(6, 8, wandb="offline")
    assert len(alerts(tmp_path)) == 1


@pytest.mark.parametrize("service", ["well", "frozen"])
def test_a_hang_is_told_on_the_way_out_in_bounded_time(tmp_path: Path, service: str) -> None:
    """The process ends without tidying, as the watchdog ends it."""
    (tmp_path / "status.json").write_text(json.dumps({"reason": "the run hangs: rank 1"}))
    freeze = "os.kill(wandb.setup()._connection._proc._process.pid, signal.SIGSTOP)" if service == "frozen" else ""
    body = f"""
        import time, wandb
        t = tracker(1)
        t.log(train(1))
        {freeze}
        before = time.monotonic()
        t.hung(5.0)
        print(time.monotonic() - before < 8, flush=True)
        os._exit(76)
    """
    done = attempt_in_process(tmp_path, body)
    assert (done.returncode, done.stdout) == (76, "True\n"), done.stderr
    if service == "well":
        assert alerts(tmp_path) == [("the run hangs", "ERROR")]
        assert "the run hangs: rank 1" in wandb_files.records("alert", tmp_path / "wandb")[0].text


def test_checkpoints_become_artifacts_that_refer_to_them(tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    for step in (10, 20):
        path = run_dir / "checkpoints" / f"step_{step}"
        path.mkdir(parents=True)
        (path / "part.safetensors").write_bytes(bytes(1000 + step))
    mirror = Mirror(
        run_dir / "wandb",
        mode="offline",
        run_id="abcd",
        project="p",
        name="n",
        config={},
        attempt=1,
        history=[],
        tables=False,
        warn=print,
    )
    mirror.checkpoint(run_dir / "checkpoints" / "step_10", ["step_10", "best"], {"step": 10})
    mirror.checkpoint(run_dir / "checkpoints" / "step_15", ["step_15"], {"step": 15})  # retention was faster
    mirror.checkpoint(run_dir / "checkpoints" / "step_20", ["step_20"], {"step": 20})
    mirror.finish(0, 60)
    found = wandb_files.records("artifact", run_dir / "wandb")
    assert [(a.name, a.type, set(a.aliases) - {"latest"}) for a in found] == [
        ("checkpoint-abcd", "model", {"step_10", "best"}),
        ("checkpoint-abcd", "model", {"step_20"}),
    ]
    (content,) = found[1].manifest.contents
    there = run_dir / "checkpoints" / "step_20" / "part.safetensors"
    assert (content.path, content.ref, content.size) == (there.name, f"file://{there}", 1020)
    assert not content.local_path  # no copy is on its way
    assert json.loads(found[0].metadata) == {"step": 10}


def test_which_checkpoints_are_due() -> None:
    def names(choice: Any, sent: Any = (), finished: bool = False) -> list[list[str]]:
        return [aliases for _, aliases in due(choice, there, sent, finished=finished)]

    there = [Kept(Path(f"step_{s}"), s, 1.0, loss) for s, loss in ((10, 3.0), (20, 2.0), (30, None))]
    assert names("none", finished=True) == [] and names("final") == []
    assert names("final", finished=True) == [["step_30", "final"]]
    assert names("best") == [["step_20", "best"]] and names("best", {(20, 1.0)}) == []
    assert names("best", {(20, 0.5)}) == [["step_20", "best"]]  # made again, after a roll-back
    assert names("all", {(10, 1.0)}, finished=True) == [["step_20", "best"], ["step_30", "final"]]
    everything = {(k.step, k.made) for k in there}
    assert names("all", everything) == [] and names("all", everything, True) == [["step_30", "final"]]
    del there[2]
    assert names("best", everything, True) == [["step_20", "best", "final"]]


def test_a_checkpoint_that_wandb_will_not_get_is_not_told_as_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlm_dist.tracking.kept", lambda _run_dir: [Kept(tmp_path, 10, 1.0, 3.0)])
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "attempt_0001").write_text("in the way")
    broken = Tracker(tmp_path, TrackConfig(wandb="offline", artifacts="all"), {}, attempt=1)
    broken.checkpoints()
    broken.finish(1)
    assert [e["kind"] for e in events(tmp_path)] == ["wandb"]
    whole = Tracker(tmp_path, TrackConfig(wandb="offline", artifacts="all"), {}, attempt=2)
    whole.checkpoints()
    whole.finish(0)
    assert [e["kind"] for e in events(tmp_path)] == ["wandb", "artifact"]


# Predictions

PREDICTIONS = [
    {
        "text": "a «[MASK]» b",
        "truth": "c",
        "truth_probability": 0.25,
        "predictions": [["d", 0.5], ["c", 0.25], ["e", 0.1]],
    }
]


def test_predictions_are_in_the_row_of_their_validation(tmp_path: Path) -> None:
    """Also in that of an attempt whose rows W&B lost."""
    first = Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=1)
    first.log(train(1))
    first.log({"kind": "val", "step": 1, "loss": 2.0}, PREDICTIONS)
    first.finish(1)
    second = Tracker(tmp_path, TrackConfig(wandb="offline"), {}, attempt=2)
    second.log({"kind": "val", "step": 2, "loss": 1.0}, PREDICTIONS)
    second.finish(0)
    rows = wandb_rows(tmp_path)
    assert [(r["global_step"], "val/predictions" in r) for r in rows] == [(1, False), (1, True), (2, True)]
    for row in rows[1:]:
        cells = wandb_files.table(tmp_path / "wandb", row, "val/predictions")
        assert cells == [["a «[MASK]» b", "c", 0.25, "d", 0.5, "c 0.250, e 0.100"]]
    assert read_predictions(tmp_path) == {1: PREDICTIONS, 2: PREDICTIONS}
    assert not list(tmp_path.glob(".local")), "tables wait in the run directory, not at home"


def test_a_torn_line_of_predictions_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"step": 1, "rows": []}\n{"rows": []}\n{"step": 3}\n{"step": 2, "ro')
    Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=2).finish()
    assert read_predictions(tmp_path) == {1: []}
    assert [(e["kind"], e["file"]) for e in events(tmp_path)] == [("torn_line", "predictions.jsonl")]


# Secrets


def test_redact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    config = {
        "data": {"manifest": "https://me:pw@host/m.json?X-Amz-Signature=abc&part=1", "tokenizer": "bert-base-uncased"},
        "cloud": {"api_key": "k", "password": "p", "hf_token": "t", "secret": None, "args": ["--x=hunter2hunter2"]},
        "train": {"tokens": 12, "mask_token": "[MASK]"},
    }
    assert redact(config) == {
        "data": {"manifest": "https://***@host/m.json?X-Amz-Signature=***&part=1", "tokenizer": "bert-base-uncased"},
        "cloud": {"api_key": "***", "password": "***", "hf_token": "***", "secret": None, "args": ["--x=***"]},
        "train": {"tokens": 12, "mask_token": "[MASK]"},
    }


def test_redact_knows_variables_by_their_names_and_leaves_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"GITLAB_TOKEN": "glpat-canary", "S3_SECRET": "can/ary+can/ary", "DB_PASSWORD": "/work/runs"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    said = "glpat-canary can/ary+can/ary /work/runs/a (http://h/d?password=canary&n=1) ['http://h/d?secret=canary']"
    assert redact(said) == "*** *** /work/runs/a (http://h/d?password=***&n=1) ['http://h/d?secret=***']"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "pipe:curl -sf -H 'Authorization: Bearer canary' https://h/a.tar",
            "pipe:curl -sf -H 'Authorization: ***' https://h/a.tar",
        ),
        ('curl -H "X-Auth-Token: canary" -L https://h/a', 'curl -H "X-Auth-Token: ***" -L https://h/a'),
        ("curl -H 'PRIVATE-TOKEN: canary' u", "curl -H 'PRIVATE-TOKEN: ***' u"),
        ("get --verbose --token=canary a.tar", "get --verbose --token=*** a.tar"),
        ("get --password 'ca nary' --quiet a.tar", "get --password *** --quiet a.tar"),
        ("get --api-key canary --oauth2-bearer canary a", "get --api-key *** --oauth2-bearer *** a"),
        ("curl -u me:canary https://h/a", "curl -u *** https://h/a"),
        ("curl --user 'me:canary' https://h/a", "curl --user '***' https://h/a"),
        ("AWS_SECRET_ACCESS_KEY=canary/x aws s3 cp a -", "AWS_SECRET_ACCESS_KEY=*** aws s3 cp a -"),
        ("'https://me:can/ary@can@h/a.tar' and b@c", "'https://***@h/a.tar' and b@c"),
        ("https://canary@h/a@v1", "https://***@h/a@v1"),
    ],
)
def test_redact_knows_secrets_of_commands_and_urls(text: str, left: str) -> None:
    assert redact(text) == left and redact(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "--data.tokenizer tok --train.tokens 500 --mask_token [MASK] -u x",
        "python -u -m mlm_dist --run.name=a s3://bucket/a@v1 https://h/a@v1 http://h:80/a",
        "the mask token of the tokenizer is wrong: it must be [MASK]; key: a",
        "pipe:ssh me@host cat /a.tar",
    ],
)
def test_redact_leaves_what_is_not_secret(text: str) -> None:
    assert redact(text) == text


def test_no_secret_reaches_what_wandb_writes(tmp_path: Path) -> None:
    secret = "s3cr3t-value-zz"
    code = f"""
        import sys
        from mlm_dist.tracking import TrackConfig, Tracker
        t = Tracker({str(tmp_path)!r}, TrackConfig(wandb="offline"), {{"url": "https://u:{secret}@h/"}}, attempt=1)
        t.log({{"kind": "train", "step": 1, "loss": 1.0}})
        t.finish(0)
    """
    env = os.environ | {"HF_TOKEN": secret}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), f"--token={secret}"], env=env, check=True, timeout=120
    )
    assert done.returncode == 0
    files = [p for p in (tmp_path / "wandb").rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert not [p for p in files if secret.encode() in p.read_bytes()]
