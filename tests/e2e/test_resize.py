"""A run that is stopped in the middle of steps and goes on on other ranks at other stages is the run that was left alone."""

from pathlib import Path
from typing import Any

import pytest

from mlm_dist import checkpoint
from mlm_dist.data.rng import keyed_seed
from mlm_dist.files import read_json, read_json_lines
from mlm_dist.records import read_metrics
from tests.e2e.program import losses, save_config
from tests.forked import run_forked

pytestmark = pytest.mark.timeout(600)
STEPS = 18
# Ranks, ZeRO stage, micro-batch; the step within which the stop comes and the rank that it comes to.
ATTEMPTS: list[tuple[int, int, int, int | None, int]] = [
    (1, 0, 2, 3, 0),
    (3, 3, 1, 7, 2),
    (2, 1, 4, 11, 1),
    (4, 2, 3, None, 0),
]


def launch(config: Path, name: str, attempt: tuple[int, int, int, int | None, int], first: int, *flags: str) -> Any:
    world, stage, micro_batch, stop_at, stop_rank = attempt
    words = ["--run.name", name, "--deepspeed.config", f"zero{stage}", "--train.micro_batch", str(micro_batch), *flags]
    return world, {"config": str(config), "flags": words, "first": first, "stop_at": stop_at, "stop_rank": stop_rank}


def test_stopped_within_steps_on_1_3_2_and_4_ranks(tmp_path: Path) -> None:
    # Batches grow meanwhile, from 4 rows to 12, and the learning rate warms up and falls.
    config = save_config(
        tmp_path,
        model={"hidden_dropout": 0.0, "attention_dropout": 0.0},
        train={"steps": STEPS, "batch_start": 4, "batch_warmup_tokens": 80 * 32},
        checkpoint={"every": 5, "keep": 100},
        optim={"warmup": 0.4},
    )
    whole, run = (tmp_path / "runs" / name for name in ("whole", "run"))
    # A stop that is asked for within step k is agreed on with the next batch, which is still trained on.
    firsts = [0, *(attempt[3] + 2 for attempt in ATTEMPTS if attempt[3] is not None)]
    launches = [launch(config, "whole", (2, 2, 3, None, 0), 0)]
    launches += [
        launch(config, "run", attempt, first, "--track.wandb", "offline")
        for attempt, first in zip(ATTEMPTS, firsts, strict=True)
    ]
    undisturbed, *attempts = run_forked("tests.e2e.resize_program:run", launches, timeout=500)
    assert [{rank["code"] for rank in ranks} for ranks in (undisturbed, *attempts)] == [{0}, {75}, {75}, {75}, {0}]

    # Every step once, each with the rows that it has in the run that was left alone, on whatever rank; none of a step that was cut short.
    expected = by_step(undisturbed)
    got = [item for ranks in attempts for item in by_step(ranks).items()]
    assert [step for step, _ in got] == list(range(STEPS)) and dict(got) == expected
    for (_, _, _, stop_at, rank), ranks in zip(ATTEMPTS, attempts, strict=True):
        assert stop_at is None or ranks[rank]["steps"][stop_at]["micro_batches"] > 1
        for rank, result in enumerate(ranks):
            for step, facts in result["steps"].items():
                assert facts["seeds"] == [
                    keyed_seed(0, "dropout", step, i, rank) for i in range(facts["micro_batches"])
                ]

    a, b = (
        {r["step"]: r for r in read_metrics(path / "metrics.jsonl") if r["kind"] == "train"} for path in (whole, run)
    )
    assert list(a) == list(b) == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5, rel=0)
    for key in ("lr", "tokens", "selected", "epoch", "progress", "skipped"):
        assert [r[key] for r in a.values()] == [r[key] for r in b.values()], key
    ends = [checkpoint.Reader(path / "checkpoints" / checkpoint.name(STEPS)) for path in (whole, run)]
    for key in ("step", "tokens", "bytes", "skipped", "progress", "cursors", "ledger"):
        assert ends[0].trainer[key] == ends[1].trainer[key], key
    assert ends[0].optimizer == ends[1].optimizer

    events = [event for event in read_json_lines(run / "events.jsonl") if event["kind"] == "attempt"]
    assert [(e["step"], e["world_size"], e["stage"]) for e in events] == [
        (first, *attempt[:2]) for first, attempt in zip(firsts, ATTEMPTS, strict=True)
    ]
    identity = (run / "wandb" / "run_id").read_text().strip()
    kept = {path: checkpoint.Reader(path).trainer["wandb_id"] for path in checkpoint.committed(run)}
    assert len(kept) >= len(ATTEMPTS) and set(kept.values()) == {identity}
    offline = [path.name.rpartition("-")[2] for path in run.glob("wandb/**/offline-run-*") if path.is_dir()]
    assert offline == [identity] * len(ATTEMPTS)
    assert (read_json(run / "status.json") or {})["state"] == "finished"


def by_step(ranks: list[dict[str, Any]]) -> dict[int, list[Any]]:
    """The rows of every step, of all ranks, in an order of their own."""
    return {step: sorted(row for rank in ranks for row in rank["steps"][step]["rows"]) for step in ranks[0]["steps"]}
