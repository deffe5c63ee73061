"""``RUN/tensorboard``, judged by TensorBoard's own reader."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.errors import UserError
from mlm_dist.tracking import TrackConfig, Tracker
from tests.unit.test_tracking import PREDICTIONS, attempt_in_process, events, train

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
CONFIG = TrackConfig(wandb="disabled", tensorboard=True)


def read(run_dir: Path) -> Any:
    found = accumulators.EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(run_dir).Scalars(tag)]


def test_a_killed_attempt_and_its_successor_give_each_step_once(tmp_path: Path) -> None:
    """The killed one's last rows may be lost to it, and some of its steps are replayed, with other values."""
    body = f"""
        t = Tracker({str(tmp_path)!r}, TrackConfig(wandb="disabled", tensorboard=True), {{}}, attempt=1)
        for step in range(30):
            t.log(train(step))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert attempt_in_process(tmp_path, body).returncode == -signal.SIGKILL
    tracker = Tracker(tmp_path, CONFIG, {}, attempt=2)
    for step in range(20, 40):
        tracker.log(train(step))
    tracker.log({"kind": "val", "step": 39, "loss": 2.0}, PREDICTIONS)
    tracker.finish(0)
    assert scalars(tmp_path, "train/loss") == [(s, pytest.approx(5.0 / (s + 1))) for s in range(40)]
    assert scalars(tmp_path, "val/loss") == [(39, 2.0)]
    found = read(tmp_path)
    assert {"perf/tokens_per_s", "system/attempt", "train/lr"} <= set(found.Tags()["scalars"])
    (text,) = found.Tensors("val/predictions")
    assert text.step == 39 and "| a «[MASK]» b | c | d | 0.500 |" in text.tensor_proto.string_val[0].decode()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("restart", [False, True])
def test_steps_that_were_taken_back_have_their_new_values_alone(tmp_path: Path, restart: bool) -> None:
    tracker = Tracker(tmp_path, CONFIG, {}, attempt=1)
    for step in range(1, 10):
        tracker.log(train(step, loss=1.0))
    tracker.log({"kind": "val", "step": 9, "loss": 1.0}, PREDICTIONS)
    tracker.event({"kind": "rollback", "step": 9, "to": 3, "skip": [3, 8]})
    if restart:
        tracker.finish(1)
        tracker = Tracker(tmp_path, CONFIG, {}, attempt=2)
    for step in range(4, 8):
        tracker.log(train(step, loss=2.0))
    tracker.finish(0)
    assert scalars(tmp_path, "train/loss") == [(s, 1.0 if s <= 3 else 2.0) for s in range(1, 8)]
    assert not restart or "val/loss" not in read(tmp_path).Tags()["scalars"]
    assert restart or scalars(tmp_path, "val/loss") == []


def test_a_table_of_predictions_holds_whatever_text(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, CONFIG, {}, attempt=1)
    row = PREDICTIONS[0] | {"text": "a|\n«[MASK]»\u2028b", "predictions": [["\n", 0.5]]}
    tracker.log({"kind": "val", "step": 1, "loss": 2.0}, [row, *PREDICTIONS])
    tracker.finish(0)
    (text,) = read(tmp_path).Tensors("val/predictions")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {5} and "a&#124; «[MASK]» b" in lines[2]


def test_it_can_begin_in_a_later_attempt(tmp_path: Path) -> None:
    first = Tracker(tmp_path, TrackConfig(wandb="disabled"), {}, attempt=1)
    first.log(train(1, time=1234.5))
    first.finish(1)
    assert not (tmp_path / "tensorboard").exists()
    Tracker(tmp_path, CONFIG, {}, attempt=2).finish(0)
    (event,) = read(tmp_path).Scalars("train/loss")
    assert (event.step, event.wall_time) == (1, 1234.5)


def test_a_directory_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    tracker = Tracker(tmp_path, CONFIG, {}, attempt=1)
    tracker.log(train(1))
    tracker.finish(0)
    (event,) = events(tmp_path)
    assert event["kind"] == "tensorboard" and os.path.getsize(tmp_path / "metrics.jsonl")


def test_a_missing_package_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if not k.startswith("tensorboard")})
    with pytest.raises(UserError, match=r"track.tensorboard: .*pip install 'mlm-dist\[tensorboard\]'"):
        CONFIG.check()
