"""A run's small files on a disk that is really full."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlm_dist import json_lines
from mlm_dist.files import read_json
from mlm_dist.json_lines import JsonLines
from mlm_dist.lifecycle import RunDir
from mlm_dist.tracking import TrackConfig, Tracker
from tests.disks import fill, mounted


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as place:
        yield place


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_wait_for_room_and_keep_their_order(disk: Path) -> None:
    lines = JsonLines(disk / "lines")
    lines.append({"step": 0})
    ballast = fill(disk)
    # The first of them still finds room in the last page of the file, and one is torn at its end.
    for step in range(1, 500):
        lines.append({"step": step, "text": "x" * 90}, sync=step % 2 == 0)
    written = (disk / "lines").read_bytes()
    assert len(written) == 4096 and not written.endswith(b"\n")
    ballast.unlink()
    lines.append({"step": 500})
    lines.close()
    assert steps(disk / "lines") == list(range(501))


def test_what_is_required_on_the_disk_is_an_error(disk: Path) -> None:
    lines = JsonLines(disk / "lines")
    fill(disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/lines'"):
        lines.append({"step": 1}, required=True)


def test_too_many_lines_are_an_error(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MOST_UNWRITTEN_BYTES", 10_000)
    lines = JsonLines(disk / "lines")
    fill(disk)
    with pytest.raises(OSError, match="No space left on device"):
        for step in range(1000):
            lines.append({"step": step, "text": "x" * 90})
    assert 80 < step < 95  # lines of 114 or 115 bytes


def test_what_finds_no_room_to_the_end_is_told(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(disk, TrackConfig(wandb="disabled"), {}, attempt=1)
    fill(disk)
    for step in range(20):
        tracker.log({"kind": "train", "step": step, "loss": 1.0, "text": "x" * 1000})
        tracker.event({"kind": "skipped_step", "step": step, "text": "x" * 1000})
    with caplog.at_level(logging.WARNING):
        tracker.finish(1)
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 2 and all("No space left on device" in t for t in told)


def test_events_that_waited_are_written_at_the_end(disk: Path) -> None:
    tracker = Tracker(disk, TrackConfig(wandb="disabled"), {}, attempt=1)
    ballast = fill(disk)
    for step in range(20):
        tracker.event({"kind": "skipped_step", "step": step, "text": "x" * 1000})
    ballast.unlink()
    tracker.finish(1)
    assert steps(disk / "events.jsonl") == list(range(20))


def test_the_status_is_written_over(disk: Path) -> None:
    run = RunDir(disk / "run")
    run.prepare()
    run.status("running", 10, "a reason that is longer than the next one")
    ballast = fill(disk)
    run.status("running", 20)
    run.status("failed", 21, "no room")
    status = read_json(disk / "run" / "status.json")
    assert status is not None
    assert (status["state"], status["step"], status["reason"]) == ("failed", 21, "no room")
    assert [p.name for p in (disk / "run").iterdir() if "status" in p.name] == ["status.json"]
    # One that was never there has no place to be written over: only a run that goes on does without.
    (disk / "run" / "status.json").unlink()
    with ballast.open("ab", buffering=0) as file:
        file.write(b"\0" * 4096)
    run.status("running", 22)
    with pytest.raises(OSError):
        run.status("finished", 23)
