"""Where a run goes back to, and which checkpoints that makes void."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlm_dist import checkpoint, rollback
from mlm_dist.checkpoint import CheckpointConfig, Writer
from mlm_dist.ledger import Ledger
from mlm_dist.train import Run


def save(run: Path, *steps: int, **trainer: Any) -> None:
    for step in steps:
        writer = Writer(run, CheckpointConfig(keep=99), 0, 1, 1)
        state = {"step": step, "skips": [], "bad_steps": [], **trainer}
        writer.save(step, {"param/w": torch.zeros(2)}, {"param/w": 0}, {}, state)
        writer.wait()


def plan(run: Path, bad: list[int], skips: list[tuple[int, int]] = []) -> tuple[int, tuple[int, int]]:  # noqa: B006
    ledger = Ledger()
    for skip in skips:
        ledger.rolled_back(skip)
    found = rollback.plan(run, ledger, bad, lambda _message: None)
    assert found.to == (run / "checkpoints" / checkpoint.name(found.step) if found.step else None)
    return found.step, found.skip


def test_the_newest_checkpoint_from_before_as_many_steps_as_went_wrong(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, 40)
    assert plan(tmp_path, [36, 37, 38]) == (30, (33, 38))
    assert plan(tmp_path, [32, 33, 34]) == (20, (29, 34))
    assert plan(tmp_path, [30, 31, 32]) == (20, (27, 32))
    save(tmp_path, 10, 20, 30, skips=[(3, 4), (5, 6)])
    assert plan(tmp_path, [36, 37, 38], [(5, 6)]) == (30, (30, 38))  # the second time twice as many
    assert plan(tmp_path, [36, 37, 38], [(3, 4), (5, 6)]) == (20, (24, 38))


def test_the_oldest_that_there_is_else_the_beginning(tmp_path: Path) -> None:
    save(tmp_path, 30, 33)
    assert plan(tmp_path, [34, 35, 36, 37, 38]) == (30, (30, 38))
    assert plan(tmp_path, [20, 21]) == (0, (18, 21))
    assert plan(tmp_path / "none", [0, 1]) == (0, (0, 1))


def test_not_one_that_was_written_amid_bad_steps_nor_a_damaged_or_void_one(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    save(tmp_path, 30, bad_steps=[28, 29])
    assert plan(tmp_path, [40, 41]) == (20, (38, 41))
    part = next((tmp_path / "checkpoints" / checkpoint.name(20)).glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert plan(tmp_path, [40, 41]) == (10, (38, 41))
    # Of before a roll-back to 8 that left out 8 to 12.
    assert plan(tmp_path, [40, 41], [(8, 12)]) == (0, (36, 41))


@pytest.mark.parametrize(
    ("first", "voided"), [(0, [10, 20, 30]), (9, [10, 20, 30]), (10, [20, 30]), (25, [30]), (30, [])]
)
def test_a_roll_back_makes_void_what_was_trained_on_the_batches_that_it_leaves_out(
    tmp_path: Path, first: int, voided: list[int]
) -> None:
    save(tmp_path, 10, 20, 30)
    ledger = Ledger(skips=[(first, 34)])
    void = rollback.void_checkpoints(tmp_path, ledger)
    assert [int(path.name[5:]) for path in void] == voided
    rollback.discard(void)
    left = {int(path.name[5:]) for path in checkpoint.committed(tmp_path)}
    assert left == {10, 20, 30} - set(voided)
    # One that was written afterwards knows of it.
    save(tmp_path, 40, skips=[[first, 34]])
    assert not rollback.void_checkpoints(tmp_path, ledger)


def test_the_ledger_of_skips_is_in_the_events(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    lines = [{"kind": "rollback", "skip": [3, 7]}, {"kind": "attempt"}, {"kind": "rollback", "skip": [3, 7]}]
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger = Ledger.read(events)
    ledger.add_skips([[9, 9], [3, 7]])  # of the run that it branched from
    assert ledger.skips == [(3, 7), (9, 9)]
    assert ledger.rollbacks == 2


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([None, "gradient", "loss", "gradient"], ("loss", [2])),
        ([None, "gradient", None, "gradient"], ("gradient", [1, 3])),
        ([None, None], ("norm", [])),
        (["spike", "spike"], ("spike", [])),
    ],
)
def test_the_first_cause_is_the_verdict(seen: list[str | None], expected: tuple[str, list[int]]) -> None:
    assert rollback.verdict(seen)[:2] == expected


@pytest.mark.parametrize(("keep", "keep_best"), [(1, 0), (2, 1)])
def test_retention_keeps_one_to_go_back_to(tmp_path: Path, keep: int, keep_best: int) -> None:
    """Though checkpoints are closer than train.max_skipped."""
    writer = Writer(tmp_path, CheckpointConfig(keep=keep, keep_best=keep_best), 0, 1, 1)
    bad = list(range(98, 108))
    for step in range(80, 109, 4):
        state = {"step": step, "skips": [], "bad_steps": [b for b in bad if b < step]}
        writer.save(step, {"param/w": torch.zeros(2)}, {"param/w": 0}, {}, state)
        writer.wait()
    assert plan(tmp_path, bad) == (96, (96, 107))


@pytest.mark.parametrize(
    ("began", "init", "rollbacks", "reason"),
    [
        ({}, "config", 0, None),
        ({}, "config", 2, "after 2 roll-back(s) (train.max_rollbacks)"),
        ({"branched_from": {}}, "config", 0, "the run began from another training's"),
        ({}, "run", 0, "the weights that the run began with are gone"),
    ],
)
def test_a_run_that_cannot_go_back_says_why_and_loses_nothing(
    tmp_path: Path, began: dict[str, Any], init: str, rollbacks: int, reason: str | None
) -> None:
    save(tmp_path, 40)  # after the bad ones
    ledger, events = Ledger(), []
    for _ in range(rollbacks):
        ledger.rolled_back((1, 1))
    run: Any = SimpleNamespace(
        tracker=SimpleNamespace(event=lambda record, **_: events.append(record)),
        console=SimpleNamespace(say=lambda _line: None),
        dir=SimpleNamespace(path=tmp_path),
        config=SimpleNamespace(train=SimpleNamespace(max_rollbacks=2), model=SimpleNamespace(init=init)),
        ledger=ledger,
        bad_steps=[20, 21],
        step=22,
        began=began,
        source=str(tmp_path / "gone"),
    )
    decided = Run._plan_roll_back(run)
    if reason is None:
        assert decided == rollback.Plan(None, 0, (18, 21))
        assert [e["skip"] for e in events] == [(18, 21)] and not checkpoint.committed(tmp_path)
    else:
        assert isinstance(decided, str) and reason in decided
        assert not events and len(checkpoint.committed(tmp_path)) == 1
