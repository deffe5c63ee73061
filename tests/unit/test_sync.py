"""``mlm-dist sync``, judged by what wandb itself wrote. (Nothing here speaks to a server.)"""

import json
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.cli import main
from mlm_dist.records import read_metrics
from mlm_dist.tracking import TrackConfig, Tracker
from tests import wandb_files
from tests.unit.test_tracking import PREDICTIONS, _no_wandb_environment, train

_ = _no_wandb_environment


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two attempts that overlap; the second logs other steps than the first, and one line is torn, one damaged."""
    path = tmp_path / "run"
    path.mkdir()
    for attempt, steps in ((1, range(0, 30, 3)), (2, range(20, 40, 2))):
        tracker = Tracker(path, TrackConfig(wandb="disabled"), {"optim": {"lr": 0.5}}, attempt=attempt)
        tracker.event({"kind": "attempt", "step": steps[0]})
        for step in steps:
            tracker.log(train(step, loss=attempt + step / 100))
        tracker.log({"kind": "val", "step": steps[-1], "loss": 2.0}, PREDICTIONS)
        tracker.event({"kind": "rollback", "step": 9, "to": 3, "skip": [1, 2]})
        tracker.finish(1)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    (path / "checkpoints").mkdir()
    return path


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return wandb_files.history(run_dir / "wandb", "sync")


def test_the_offline_run_holds_exactly_the_metrics(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = [(r["step"], r["kind"], r["loss"], r["attempt"]) for r in read_metrics(run_dir / "metrics.jsonl")]
    for _again in range(2):
        assert main(["sync", str(run_dir), "--offline"]) == 0
        found = rows(run_dir)
        assert [r["_step"] for r in found] == list(range(len(found)))
        held = [
            (r["global_step"], "val", r["val/loss"], None)
            if "val/loss" in r
            else (r["global_step"], "train", r["train/loss"], r["system/attempt"])
            for r in found
        ]
        assert sorted((s, k, loss) for s, k, loss, _ in held) == sorted((s, k, loss) for s, k, loss, _ in expected)
        assert {h for h in held if h[1] == "train"} == {e for e in expected if e[1] == "train"}
    (run,) = wandb_files.records("run", run_dir / "wandb", "sync")
    assert (run.run_id, run.project, run.display_name) == (
        (run_dir / "wandb" / "run_id").read_text().strip(),
        "mlm_dist",
        "run",
    )
    assert wandb_files.values(run.config.update)["optim"] == {"lr": 0.5}
    predicted = [r for r in found if "val/predictions" in r]
    assert len(predicted) == 2
    assert wandb_files.table(run_dir / "wandb", predicted[0], "val/predictions", "sync")[0][1] == "c"
    assert not wandb_files.records("alert", run_dir / "wandb", "sync"), "nobody is alerted of what is long past"
    summary: dict[str, Any] = {}
    for record in wandb_files.records("summary", run_dir / "wandb", "sync"):
        summary |= wandb_files.values(record.update)
    events = wandb_files.table(run_dir / "wandb", summary, "events", "sync")
    assert [cells[2] for cells in events] == ["attempt", "rollback"] * 2
    assert "wandb sync" in capsys.readouterr().out


def test_a_damaged_line_is_left_out_and_said(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "\0\0", *lines[1:]]))
    before = sorted(run_dir.rglob("*"))
    assert main(["sync", str(run_dir), "--dry-run", "--project", "p", "--id", "abcd"]) == 0
    said = capsys.readouterr().out
    assert "1 damaged lines left out" in said and "W&B run abcd of project p" in said and "22 rows" not in said
    count = len({(r["kind"], r["step"]) for r in map(json.loads, [lines[0], *lines[1:-1]])})
    assert f"{count} rows of steps 0 to 38, 2 with predictions, 4 events" in said
    assert sorted(run_dir.rglob("*")) == before


def test_wandb_mode_and_a_server_that_is_not_there(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["sync", str(run_dir), "--id", "efgh"]) == 0
    assert [run.run_id for run in wandb_files.records("run", run_dir / "wandb", "sync")] == ["efgh"]
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("mlm_dist.wandb_mirror._INIT_TIMEOUT", 3.0)
    assert main(["sync", str(run_dir)]) == 2
    assert "--offline" in capsys.readouterr().err


def test_mistakes(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(run_dir), str(run_dir), "--id", "a"]) == 2
    assert main(["sync", str(tmp_path)]) == 2
    (run_dir / "wandb" / "run_id").unlink()
    assert main(["sync", str(run_dir), "--offline"]) == 2
    error = capsys.readouterr().err
    assert "--id: 'a'" in error and "no step is logged" in error and "give one with --id" in error
