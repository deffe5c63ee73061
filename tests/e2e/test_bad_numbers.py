"""Losses and gradients that go wrong: skipped by all ranks, then gone back from, and the same again on resume."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlm_dist import cli
from mlm_dist.records import read_metrics
from mlm_dist.report import facts
from mlm_dist.report.run import account, load
from tests.e2e.faulty import FAULTS, fault
from tests.e2e.program import Program, losses, save_config

COMBINATIONS = [
    pytest.param(2, "zero0", "bf16", id="2-zero0-bf16"),
    pytest.param(2, "zero1", "fp16", id="2-zero1-fp16"),
    pytest.param(3, "zero2", "bf16_pure", id="3-zero2-bf16_pure"),
    pytest.param(2, "zero3", "fp32", id="2-zero3-fp32"),
]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["kind"] == kind]


def faulty(config: Path, world: int, flags: list[str], *faults: dict[str, Any]) -> Program:
    return Program(config, world, flags, module="tests.e2e.faulty", environ={FAULTS: json.dumps(faults)})


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    parts = sorted((run / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))
    assert parts
    return {key: value for part in parts for key, value in load_file(part).items()}


@pytest.mark.parametrize(("world", "stage", "precision"), COMBINATIONS)
def test_bad_steps_are_skipped_then_gone_back_from(
    tmp_path: Path, world: int, stage: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the run is what its ledger says: one that has it from the start and is not disturbed has the same losses and weights."""
    config = save_config(
        tmp_path,
        train={"steps": 14, "precision": precision, "max_skipped": 2},
        deepspeed={"config": stage},
        checkpoint={"every": 3, "keep": 9},
    )
    run, name = tmp_path / "runs" / "run", ["--run.name"]
    one = fault("loss", 4, rank=world - 1)
    # In fp16 a gradient that is not finite is an overflow, which the loss scale answers.
    kind = "loss" if precision == "fp16" else "gradient"
    two = fault(kind, 8, 9, rank=0)
    program = faulty(config, world, [*name, "run"], one, two).start()
    program.wait_for_step(run, 12)  # the second time: it went back at 10
    program.kill()
    faulty(config, world, [*name, "run"], one, two).start().finish()

    skipped = events(run, "skipped_step")
    first = next(e for e in skipped if e["batch"] == 4)
    assert (first["cause"], first["ranks"], first["step"]) == ("loss", [world - 1], 5)
    bad = [e for e in skipped if e["batch"] in (8, 9) and e.get("cause") == kind]
    assert [(e["batch"], e["ranks"]) for e in bad] == [(8, [0]), (9, [0])]
    (back,) = events(run, "rollback")
    assert (back["step"], back["to"], back["skip"], back["bad"]) == (10, 6, [6, 9], [8, 9])
    assert {e["batch"] for e in skipped if e["why"].startswith("left out")} == {6, 7, 8, 9}

    undisturbed = tmp_path / "runs" / "undisturbed"
    undisturbed.mkdir()
    (undisturbed / "events.jsonl").write_text(json.dumps(back) + "\n")
    faulty(config, world, [*name, "undisturbed"], one).start().finish()
    assert losses(undisturbed) == losses(run)
    ours, theirs = weights(run, 14), weights(undisturbed, 14)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    capsys.readouterr()
    assert cli.main(["data", "show", "--run", str(run), "--step", "8", "--rows", "99"]) == 0
    shown = capsys.readouterr().out
    blocks = {(b["shard"], b["offset"], b["block"]) for b in bad[0]["blocks"]}
    rows = re.findall(r"epoch \d+, (\S+) at byte (\d+), block (\d+)", shown)
    assert {(shard, int(offset), int(block)) for shard, offset, block in rows} == blocks
    assert shown.count("\nstep 8 row") == 12


def test_a_run_without_a_checkpoint_goes_back_to_its_beginning_and_not_for_ever(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"steps": 14, "max_skipped": 2, "max_rollbacks": 1}, checkpoint={"every": 100})
    run = tmp_path / "runs" / "run"
    faults = [fault("loss", 3, 4), fault("gradient", 9, 10, rank=1)]
    program = faulty(config, 2, [], *faults).start()
    assert program.wait() == [1, 1], program.output()
    (back,) = events(run, "rollback")
    assert (back["to"], back["skip"]) == (0, [1, 4])
    reason = json.loads((run / "status.json").read_text())["reason"]
    assert "2 steps in a row up to step 11 went wrong" in reason and "train.max_rollbacks" in reason

    # With leave to go back once more it does, and leaves out twice as many batches before the bad ones.
    faulty(config, 2, ["--train.max_rollbacks", "2"], *faults).start().finish()
    assert events(run, "rollback")[-1]["skip"] == [5, 10]
    undisturbed = tmp_path / "runs" / "undisturbed"
    undisturbed.mkdir()
    (undisturbed / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events(run, "rollback")))
    Program(config, 2, ["--run.name", "undisturbed"]).start().finish()
    got = losses(run)
    assert losses(undisturbed) == got
    left_out = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [step for step, loss in got.items() if loss is None] == left_out
    speeds = {r["step"]: r["tokens_per_s"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"}
    assert [step for step, speed in speeds.items() if speed == 0] == left_out

    reported = load(run)
    assert [(a.ended, a.ranks) for a in reported.attempts] == [("failed", 2), ("finished", 2)]
    assert "train.max_rollbacks" in reported.attempts[0].reason and reported.attempts[1].last == 14
    parts = account(reported)
    assert parts["kept"] > 0 and parts["repeated"] > 0 and parts["rest"] > 0
    assert sum(parts[k] for k in ("kept", "repeated", "gaps", "rest")) == pytest.approx(parts["wall"])
    assert dict(facts.data(reported))["Batches left out since roll-backs"] == "1 to 4, 5 to 10"


def test_a_spike_is_skipped_in_its_step_whatever_the_ranks(tmp_path: Path) -> None:
    config = save_config(
        tmp_path,
        model={"attention_dropout": 0.0, "hidden_dropout": 0.0},
        train={"steps": 56, "spike": 10.0},
        checkpoint={"every": 34},
    )
    runs = {}
    for world in (1, 2):
        run = tmp_path / "runs" / f"world-{world}"
        flags = ["--run.name", run.name]
        spikes = fault("spike", 3, 36, 50)
        if world == 1:
            program = faulty(config, world, flags, spikes).start()
            program.wait_for_step(run, 40)
            program.kill()
        faulty(config, world, flags, spikes).start().finish()
        skipped = events(run, "skipped_step")
        # None of the first 32 steps is judged. After the restart what is recent is what it was.
        assert {(e["batch"], e["cause"]) for e in skipped} == {(36, "spike"), (50, "spike")}
        runs[world] = losses(run)
    assert runs[1][37] > 50 * runs[1][36]
    assert all(abs(runs[1][k] - runs[2][k]) < 1e-3 for k in range(1, 57) if k not in (4, 37, 51))
