"""What the report makes of a run with restarts, roll-backs, losses and stalls, and of several runs; held against figures counted by hand."""

import json
import os
import re
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.lifecycle import started_at
from mlm_dist.report import facts
from mlm_dist.report.command import compare, report
from mlm_dist.report.compare import timed
from mlm_dist.report.panels import _late
from mlm_dist.report.run import account, load, spans, stalls
from mlm_dist.report.timeline import marks
from mlm_dist.report.words import KINDS, duration
from tests.ranks import ROOT
from tests.unit.test_report import write_run

T = 1.79e9


class Page(HTMLParser):
    """Rows of a page's tables, and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self._cell = False
        self._open: list[str] = []
        self.feed(path.read_text())
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("img", "meta"):
            self._open.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "background")]
        assert not any(k.startswith("on") or (k == "style" and "url" in (v or "")) for k, v in attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


def records(
    first: int, last: int, begin: float, attempt: int, step_time: float = 2.0, **more: Any
) -> list[dict[str, Any]]:
    """A training record every 10 steps of an attempt that went on after ``first``."""
    return [
        {
            "kind": "train",
            "step": s,
            "attempt": attempt,
            "time": begin + step_time * (s - first),
            "loss": 5.0 - s / 100,
            "tokens": 1000 * s,
            "tokens_per_s": 1000 / step_time,
            "step_time": step_time,
            "data_wait": 0.1,
            "world_size": 2,
        }
        | more
        for s in range(first + 10, last + 1, 10)
    ]


def event(kind: str, attempt: int, at: float, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "time": T + at, **facts}


@pytest.fixture
def troubled(tmp_path: Path) -> Path:
    """Four attempts: one that died at step 50, 20 steps after its checkpoint; one that hung; one that went back from 70 to 60; one at work.

    In seconds after T: 0 to 110, 200 to 250, 300 to 420, 500 to 541.
    """
    logged = [
        *records(0, 50, T + 10, 1),  # logs 10, 20, .. 50 at 30, .. 110
        *records(30, 50, T + 210, 2),  # 40, 50 at 230, 250
        *records(30, 70, T + 310, 3),  # 40 .. 70 at 330 .. 390
        *records(60, 70, T + 400, 3),  # 70 again, at 420
        *records(70, 80, T + 501, 4),  # 80 at 521
        {
            "kind": "val",
            "step": 40,
            "attempt": 3,
            "time": T + 331,
            "loss": 4.5,
            "accuracy": 0.2,
            "unigram_entropy": 6.0,
        },
        {"kind": "val", "step": 80, "attempt": 4, "time": T + 541, "loss": 4.25, "accuracy": 0.3},
    ]
    lost = {"source": 0, "block": 3, "offset": 0, "whole": True, "cause": "checksum"}
    told = [
        event("attempt", 1, 0, step=0, world_size=2, documents=[1000]),
        event("data_loss", 1, 40, step=20, epoch=0, shard="a.tar", documents=7, **lost),
        event("data_loss", 1, 50, step=30, epoch=0, shard="b.tar", documents=4, **lost),
        event("attempt", 2, 200, step=30, world_size=2, documents=[1000]),
        event("hang", 2, 250, step=50, reason="no rank moved"),
        event("attempt", 3, 300, step=30, world_size=4, documents=[1000]),
        event("rollback", 3, 395, step=70, to=60, skip=[65, 69], bad=[65], why="NaN"),
        event("data_loss", 3, 410, step=62, epoch=1, shard="a.tar", documents=2, **lost),
        event("stopped", 3, 420, step=70, reason="signal SIGUSR1", requeue=True),
        event("attempt", 4, 500, step=70, world_size=2, documents=[1000]),
    ]
    return write_run(
        tmp_path / "troubled",
        logged,
        events__jsonl="".join(json.dumps(e) + "\n" for e in told),
        status__json={"state": "running", "step": 80, "attempt": 4},
        lock={"host": socket.gethostname(), "pid": os.getpid(), "started": started_at(os.getpid())},
        config__yaml="data: {max_bad_fraction: 0.02, seq_len: 64}\noptim: {lr: 0.001}\n",
    )


def test_attempts_and_what_each_cost(troubled: Path) -> None:
    run = load(troubled)
    assert [(a.number, a.first, a.last, a.ranks, a.ended, a.repeated) for a in run.attempts] == [
        (1, 0, 50, 2, "died", 20),
        (2, 30, 50, 2, "hung", 20),
        (3, 30, 70, 4, "preempted", 0),
        (4, 70, 80, 2, "running", 0),
    ]
    assert [(a.begin - T, a.end - T) for a in run.attempts] == [(0, 110), (200, 250), (300, 420), (500, 541)]
    # Ten seconds of step time each: 2 s a step, 10 steps a record.
    parts = account(run)
    assert parts["wall"] == 541 and parts["gaps"] == 90 + 50 + 80
    assert parts["repeated"] == 2 * 20 + 2 * 20 + 2 * 10  # lost by 1, lost by 2, rolled back
    assert parts["kept"] == 2 * 80
    assert sum(parts[k] for k in ("kept", "repeated", "gaps", "rest")) == parts["wall"]
    (troubled / "logs").mkdir()
    (troubled / "logs" / "attempt_1.failed").write_text("rank 0: ValueError: no")
    assert (load(troubled).attempts[0].ended, load(troubled).attempts[0].reason) == ("failed", "rank 0: ValueError: no")


def test_the_tables_say_what_the_files_do(troubled: Path) -> None:
    *_, page = report(troubled)
    rows = Page(page).rows
    table = {row[0]: row[1] for row in rows if len(row) == 2}
    assert table["Steps that count"] == "2 min 40 s (29.6%)" and table["Between attempts"] == "3 min 40 s (40.7%)"
    assert table["Best validation loss"] == "4.250 at step 80"
    assert table["Documents lost to faults"] == "13, in 3 places of 2 shards"
    assert table["Most in one epoch"] == "11 of 1,000 documents, 1.10% (epoch 0; 2.00% allowed)"
    assert table["Useful tokens trained on"] == "80,000"
    assert ["a.tar", "checksum", "2", "9", "20 to 62"] in rows and ["b.tar", "checksum", "1", "4", "30"] in rows
    counts = {row[0]: row[2] for row in rows if len(row) == 4 and row[0] in KINDS}
    assert counts == {"attempt": "4", "data_loss": "3", "hang": "1", "rollback": "1", "stopped": "1"}
    attempts = [row for row in rows if len(row) == 8][1:]
    assert [(row[0], row[2], row[5], row[7]) for row in attempts] == [
        ("1", "1 to 50", "", "20 steps taken again"),
        ("2", "31 to 50", "1 min 30 s", "20 steps taken again"),
        ("3", "31 to 70", "50 s", "10 steps rolled back"),
        ("4", "71 to 80", "1 min 20 s", ""),
    ]


def test_the_marks_of_the_time_line_are_the_events(troubled: Path) -> None:
    found = marks(load(troubled))
    assert {name: [t - T for t in times] for name, times in found.items()} == {
        "hang": [250],
        "roll-back": [395],
        "documents lost": [40, 50, 410],
    }


def test_every_kind_of_event_in_the_code_is_shown(tmp_path: Path) -> None:
    """Of those that the code writes, and of one that it does not know yet, a mark or a bar, and a line in both tables."""
    source = "\n".join(p.read_text() for p in (ROOT / "mlm_dist").rglob("*.py") if "report" not in p.parts)
    kinds = set(re.findall(r'"kind": "([a-z_]+)"', source)) | {
        "finished",
        "stopped",
        "wandb",
        "tensorboard",
        "from_the_future",
    }
    kinds -= {"train", "val"}
    assert kinds > set(KINDS) - {"finished", "stopped"}
    told = [event(kind, 1, i, step=1) for i, kind in enumerate(sorted(kinds))]
    run_dir = write_run(
        tmp_path / "run", records(0, 10, T, 1), events__jsonl="".join(json.dumps(e) + "\n" for e in told)
    )
    shown = marks(load(run_dir))
    assert sum(map(len, shown.values())) == len(kinds - {"attempt", "finished", "stopped"})
    rows = Page(report(run_dir)[-1]).rows
    for kind in kinds:
        assert any(row[0] == kind for row in rows if len(row) == 4), kind
        assert any(row[3] == kind for row in rows if len(row) == 5), kind


def test_stalls_are_the_steps_that_waited_or_were_slow(tmp_path: Path) -> None:
    logged = records(0, 100, T, 1, step_time=1.0)
    for i in (3, 4):  # 31 to 50
        logged[i]["data_wait"] = 0.5
    logged[7]["step_time"] = 4.0  # 71 to 80
    logged[0]["step_time"] = 9.0  # the first warms up
    found = stalls(spans(load(write_run(tmp_path / "run", logged))))
    assert [(s.first, s.last, s.cause) for s in found] == [(30, 50, "data"), (70, 80, "slow")]
    assert [s.seconds for s in found] == [pytest.approx(10.0), pytest.approx(30.0)]


def test_damaged_and_odd_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", records(0, 30, T, 1))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('not json\n{"kind": "train"}\n{"kind": "train", "step": "x"}\n[1]\n')
        file.write(
            json.dumps({"kind": "train", "step": 31, "time": "soon", "loss": "low", "lr": True, "attempt": None}) + "\n"
        )
        file.write(json.dumps({"kind": "val", "step": 31, "loss": None, "accuracy": []}) + "\n" + '{"torn": ')
    (run_dir / "events.jsonl").write_text(
        '{"kind": 3}\n{"kind": "data_loss"}\n{"kind": "rollback", "time": 1e30}\n\x00\x00\n'
    )
    (run_dir / "status.json").write_text("{")
    (run_dir / "config.yaml").write_text("a: [")
    run = load(run_dir)
    assert [r["step"] for r in run.train] == [10, 20, 30, 31]
    assert run.damaged == {"metrics.jsonl": 3, "events.jsonl": 1, "status.json": 1, "config.yaml": 1}
    text = report(run_dir)[-1].read_text()
    assert "Not readable, and left out here: 3 lines of metrics.jsonl, 1 line of events.jsonl, 1 part of " in text


def test_a_long_run_with_many_events_gives_a_page_of_bounded_size(tmp_path: Path) -> None:
    logged = [r | {"step": i + 1} for i, r in enumerate(records(0, 10, T, 1) * 100_000)]
    told = [event("worker_restarted", 1, i, step=i, what="x" * 50) for i in range(5000)]
    told.insert(7, event("hang", 1, 7, step=7, reason="the one that matters"))
    run_dir = write_run(tmp_path / "run", logged, events__jsonl="".join(json.dumps(e) + "\n" for e in told))
    *pictures, page = report(run_dir)
    assert page.stat().st_size < 3_000_000 and all(p.stat().st_size < 500_000 for p in pictures)
    rows = Page(page).rows
    assert len([r for r in rows if len(r) == 5 and r[3] == "worker_restarted"]) == facts.MOST_OF_A_KIND
    assert any(len(r) == 5 and r[3] == "hang" and "the one that matters" in r[4] for r in rows)
    assert ["worker_restarted", KINDS["worker_restarted"], "5,000", "0 to 4,999"] in rows


def test_hostile_names_and_texts_stay_text(tmp_path: Path) -> None:
    attack = "<script src=//evil>$x_{</script>\"'&"
    name = "run <img src=x onerror=a> $\\frac$"
    lost = {"source": 0, "epoch": 0, "shard": attack, "cause": attack, "documents": 1}
    told = [event("attempt", 1, 0, step=0), event("data_loss", 1, 1, step=5, **lost), event(attack, 1, 2, why=attack)]
    run_dir = write_run(
        tmp_path / name,
        records(0, 30, T, 1),
        events__jsonl="".join(json.dumps(e) + "\n" for e in told),
        status__json={"state": attack, "reason": attack},
        env__json={"commit": attack, "packages": {attack: attack}, "host": attack, "api_key": "hunter2"},
        config__yaml=json.dumps(
            {"data": {"manifest": attack, "seq_len": attack, "packing": attack}, "optim": {"lr": 1}}
        ),
        jobs__jsonl=json.dumps({"event": attack, "job": attack, "time": T}) + "\n",
        predictions__jsonl=json.dumps(
            {"step": 3, "rows": [{"text": attack, "truth": attack, "predictions": [[attack, 0.5]]}]}
        ),
    )
    other = write_run(tmp_path / "other" / name, records(0, 30, T, 1), config__yaml="optim: {lr: 2}\n")
    for path in (report(run_dir)[-1], compare([run_dir, other], tmp_path / "out")[-1]):
        page, text = Page(path), path.read_text()
        assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
        assert page.references and all(r.startswith("data:image/png;base64,") for r in page.references)
        assert "url(" not in text and "@import" not in text and "hunter2" not in text and "<img src=x" not in text


def test_what_the_run_is_and_what_it_predicted(tmp_path: Path) -> None:
    rows = [
        {"text": "The «[MASK]» sat.", "truth": "cat", "predictions": [["dog", 0.25], ["cat", 0.125]]},
        {"text": "odd"},
    ]
    config = {
        "data": {"manifest": "m.json", "seq_len": 128, "packing": "split"},
        "train": {"global_batch": 256, "micro_batch": 8, "precision": "bf16"},
        "optim": {"name": "adamw", "lr": 1e-4},
    }
    run_dir = write_run(
        tmp_path / "run",
        records(0, 20, T, 1),
        config__yaml=json.dumps(config),
        env__json={"python": "3.11", "gpus": ["A", "B"], "packages": {"torch": "2.13"}, "commit": None},
        identity__json={"identity": {"data.manifest": "f00d"}},
        predictions__jsonl='{"step": 10, "rows": []}\n' + json.dumps({"step": 20, "rows": rows}) + "\n",
    )
    (run_dir / "model").mkdir()
    sizes = {"model_type": "distilbert", "n_layers": 6, "dim": 768, "n_heads": 12, "vocab_size": 30522}
    (run_dir / "model" / "config.json").write_text(json.dumps(sizes))
    page = Page(report(run_dir)[-1])
    for row in (
        ["Model", "distilbert, 6 layers, hidden 768, 12 heads, vocabulary 30,522"],
        ["Fingerprint of the data", "f00d"],
        ["Rows", "128 tokens, packing split"],
        ["Batch", "256 rows a step, micro-batch 8, bf16"],
        ["Gpus", '["A", "B"]'],
        ["The «[MASK]» sat.", "cat", "dog 25%, cat 12%"],
        ["odd", "", ""],
    ):
        assert row in page.rows, row
    assert not [row for row in page.rows if row[0] in ("Optimizer", "Commit", "DeepSpeed")]  # not recorded in full


def test_several_runs_side_by_side(troubled: Path, tmp_path: Path) -> None:
    config = "data: {max_bad_fraction: 0.02, seq_len: 128}\noptim: {lr: 0.001}\ntrack: {project: x}\n"
    logged = [*records(0, 40, T, 1, step_time=1.0), {"kind": "val", "step": 40, "time": T + 41, "loss": 4.125}]
    calm = write_run(tmp_path / "calm", logged, config__yaml=config, status__json={"state": "finished"})
    png, page = compare([troubled, calm], tmp_path / "out")
    assert (png.name, page.name) == ("compare.png", "compare.html") and png.read_bytes().startswith(b"\x89PNG")
    rows = {row[0]: row[1:] for row in Page(page).rows}
    assert rows[""] == ["troubled", "calm"]
    assert rows["Best validation loss"] == ["4.250 at step 80", "4.125 at step 40"]
    assert rows["Median throughput"] == ["500 useful tokens/s", "1 k useful tokens/s"]
    assert rows["Lost documents"] == ["13", "0"] and rows["Restarts"] == ["2", "0"]
    assert rows["Wall-clock time"] == [duration(541), duration(41 - 10)]  # without an event, from the first record on
    assert facts.differing([load(troubled), load(calm)]) == [
        ["data.seq_len", "64", "128"],
        ["track.project", "not set", "x"],
    ]
    assert rows["data.seq_len"] == ["64", "128"] and "data.max_bad_fraction" not in rows
    twin = write_run(tmp_path / "twin" / "calm", logged)
    header = Page(compare([calm, twin], tmp_path / "out")[-1]).rows[0]
    assert header == ["", str(calm), str(twin)]


def test_a_run_that_began_anew_and_has_logged_nothing_since_is_drawn(tmp_path: Path) -> None:
    """All its steps are to be taken again."""
    told = [event("attempt", 1, 0, step=0), event("attempt", 2, 100, step=0)]
    lines = "".join(json.dumps(e) + "\n" for e in told)
    run_dir = write_run(tmp_path / "run", records(0, 30, T + 1, 1), events__jsonl=lines)
    assert all(s.repeated == s.steps for s in spans(load(run_dir)))
    assert "report_speed.png" in [path.name for path in report(run_dir)]


def test_a_validation_between_logged_steps_has_its_place_by_tokens_and_time(tmp_path: Path) -> None:
    """Logged at 10 to 40, of 2 s and 1000 tokens a step; validated at 5, 25 and 45."""
    vals = [{"kind": "val", "step": s, "attempt": 1, "time": T + 2 * s, "loss": 4.0} for s in (5, 25, 45)]
    start = json.dumps(event("attempt", 1, 0, step=0)) + "\n"
    run = load(write_run(tmp_path / "run", [*records(0, 40, T, 1), *vals], events__jsonl=start))
    placed = [r for r in timed(run) if r["kind"] == "val"]
    assert [r["tokens"] for r in placed] == [5000, 25_000, 40_000]  # past the last logged step nothing is known
    assert [r["minutes"] * 60 for r in placed] == pytest.approx([10, 50, 80])
    assert [r["tokens"] for r in timed(run) if r["kind"] == "train"] == [10_000, 20_000, 30_000, 40_000]
    assert _late(run)["validation"] == ([5000, 25_000, 40_000], [4.0, 4.0, 4.0])
    bare = load(write_run(tmp_path / "bare", [{"kind": "train", "step": 1, "loss": 5.0}, *vals]))
    assert [r["tokens"] for r in timed(bare)] == [r["minutes"] for r in timed(bare)] == [None] * 4


def spoil(run_dir: Path) -> None:
    """Files that parse and hold something else than they should."""
    deep = "[" * 400 + "]" * 400
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 31, "attempt": [1], "time": [2], "loss": 1' + "0" * 400 + "}\n")
        file.write('{"kind": "train", "step": 1' + "0" * 400 + "}\n" + '{"kind": "train", "step": 32, "lr": 1e308}\n')
        file.write('{"kind": "train", "step": 33, "x": ' + deep + "}\n" + '{"a": ' * 100_000 + "\n")
    (run_dir / "events.jsonl").mkdir()
    (run_dir / "config.yaml").write_text("data: [1]\nmask: 3\ntrain: {clip: high}\nmodel:\n  a: " + deep)
    (run_dir / "identity.json").write_text("[1]")
    (run_dir / "status.json").write_text('{"state": [1], "reason": {}}')
    (run_dir / "env.json").write_text('{"packages": 3, "host": [1]}')
    (run_dir / "predictions.jsonl").write_text(
        '{"rows": [{"predictions": 3}, 4, {"text": 5, "predictions": [[1, 2], 3]}]}\n'
    )


def test_files_of_another_shape_are_left_out_and_counted(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", records(0, 30, T, 1))
    spoil(run_dir)
    run = load(run_dir)
    assert [r["step"] for r in run.train] == [10, 20, 30, 31, 32] and run.config == {"train": {"clip": "high"}}
    assert run.damaged == {"metrics.jsonl": 2, "events.jsonl": 1, "config.yaml": 3, "identity.json": 1}
    assert len(report(run_dir)) == 5
    compare([run_dir, run_dir], tmp_path / "out")


def test_a_run_whose_process_is_gone_is_not_called_running(troubled: Path) -> None:
    (troubled / "lock").unlink()
    run = load(troubled)
    assert run.status["state"] == run.attempts[-1].ended == "died" and "no process holds" in run.attempts[-1].reason
    (troubled / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 1}))
    assert load(troubled).attempts[-1].ended == "running"
    os.utime(troubled / "lock", (T, T))
    run = load(troubled)
    assert run.attempts[-1].ended == "hung" and run.attempts[-1].reason.startswith("no heartbeat for")
    (troubled / "lock").unlink()
    (troubled / "logs").mkdir()
    (troubled / "logs" / "attempt_4.failed").write_text("rank 0: killed")
    assert (load(troubled).attempts[-1].ended, load(troubled).attempts[-1].reason) == ("failed", "rank 0: killed")
