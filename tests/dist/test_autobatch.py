"""`train.micro_batch: auto` on two real ranks: what one has no room for, neither does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlm_dist.checkpoint import Reader, newest
from tests.e2e.program import losses, save_config
from tests.ranks import RanksFailed, run_ranks

CASE = "tests.dist.auto_cases:run"


def start(config: Path, *flags: str, **case: Any) -> list[Any]:
    return run_ranks(CASE, world=2, args={"argv": ["--config", str(config), *flags], **case}, timeout=120)


def test_an_oom_on_one_rank_halves_it_for_all_and_changes_no_loss_and_a_resume_takes_the_same(tmp_path: Path) -> None:
    config = save_config(tmp_path, data={"lanes": 2}, train={"micro_batch": "auto", "steps": 4}, checkpoint={"every": 4})
    flags = ["--run.name", "auto", "--train.steps", "4"]
    ends = start(config, *flags, fails_above=4)
    assert [code for code, _ in ends] == [0, 0]
    # 6 rows of each step fall on a rank; the trial of rank 0 went well, that of rank 1 did not.
    assert [rows[:2] for _, rows in ends] == [[6, 3], [6, 3]]
    assert {max(rows[2:]) for _, rows in ends} == {3}
    start(config, "--run.name", "fixed", "--train.micro_batch", "3")
    expected = losses(tmp_path / "runs" / "fixed")
    assert losses(tmp_path / "runs" / "auto") == expected
    path = newest(tmp_path / "runs" / "auto", print)
    assert path is not None
    assert Reader(path).trainer["micro_batch"]["rows"] == 3

    ends = start(config, "--run.name", "auto", "--train.steps", "6", "--allow_change", "train.steps", trials=False)
    assert [code for code, _ in ends] == [0, 0]
    assert {max(rows) for _, rows in ends} == {3}


def test_a_rank_whose_address_space_is_small_holds_up_nobody(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    config = save_config(
        tmp_path,
        data={"seq_len": 256, "lanes": 4},
        model={"config": {**sizes, "max_position_embeddings": 256}},
        train={"micro_batch": "auto", "steps": 1, "global_batch": 256},
        deepspeed={"config": "zero0"},
    )
    ends = start(config, address_space=500 << 20)
    assert [code for code, _ in ends] == [0, 0]
    path = newest(tmp_path / "runs" / "run", print)
    assert path is not None
    settled = Reader(path).trainer["micro_batch"]["rows"]
    assert 1 < settled < 128
    # Halved together, although rank 0 had room for all.
    assert all(rows[0] == 128 and rows.index(settled) == (128 // settled).bit_length() - 1 for _, rows in ends)


def test_a_step_that_runs_out_of_memory_names_the_key_and_what_to_set(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"micro_batch": 4, "global_batch": 8})
    said = r"exited with 2[\s\S]*train\.micro_batch: a step with micro-batches of 4 rows ran out of memory\. Set train\.micro_batch 2"
    with pytest.raises(RanksFailed, match=said):
        run_ranks(CASE, world=1, args={"argv": ["--config", str(config)], "fails_above": 2}, timeout=120)
