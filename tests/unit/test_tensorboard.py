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
