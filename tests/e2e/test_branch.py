"""A decay that branches off a run is the decay that the run itself would have had, and needs that run no more."""

import json
from pathlib import Path

import pytest

from mlm_dist import checkpoint
from mlm_dist.files import read_json, read_json_lines
from tests.e2e.program import SIZES, Program, losses, save_config

pytestmark = pytest.mark.timeout(400)
STEPS, BEGIN = 40, 12
DECAY = ["--optim.schedule", "wsd", "--optim.decay", "20", "--train.steps", str(STEPS)]


def test_a_branch_equals_the_run_that_decays_itself_to_the_bit(tmp_path: Path) -> None:
    # Batches grow meanwhile: 4 rows to step 10, 8 to step 15, then 12.
    train = {"steps": BEGIN, "batch_start": 4, "batch_warmup_tokens": 80 * 32}
    config = save_config(tmp_path, optim={"warmup": 5, "schedule": "constant"}, train=train)
    runs = tmp_path / "runs"
    Program(config, 2, ["--run.name", "whole", *DECAY]).start().finish()
    Program(config, 2, ["--run.name", "base"]).start().finish()
    flags = ["--run.name", "branch", "--run.branch_from", str(runs / "base"), *DECAY]
    sizes = json.dumps({**SIZES, "hidden_size": 16})
    wrong = Program(config, 1, [*flags, "--model.config", sizes])
    assert wrong.start().wait() == [2]
    assert "model.config.hidden_size: the run has 32, this start has 16" in wrong.output()
    branch = Program(config, 2, flags).start()  # to which the refused start leaves the directory
    branch.wait_for_step(runs / "branch", BEGIN + 2)
    branch.kill()
    (runs / "base").rename(tmp_path / "gone")
    Program(config, 2, flags).start().finish()

    whole = losses(runs / "whole")
    assert losses(runs / "branch") == {step: whole[step] for step in range(BEGIN + 1, STEPS + 1)}
    assert losses(runs / "branch", "val") == losses(runs / "whole", "val")
    ends = [checkpoint.Reader(runs / name / "checkpoints" / checkpoint.name(STEPS)) for name in ("whole", "branch")]
    assert all((ends[0].parameter(n) == ends[1].parameter(n)).all() for n in ends[0].names())
    assert ends[0].trainer["tokens"] == ends[1].trainer["tokens"]
    assert read_json(runs / "branch" / "status.json")["state"] == "finished"
    attempts = [e for e in read_json_lines(runs / "branch" / "events.jsonl") if e["kind"] == "attempt"]
    assert attempts[0]["step"] == BEGIN and attempts[0]["branch_from"] == str(runs / "base")
    ids = {(path / "wandb" / "run_id").read_text().strip() for path in (tmp_path / "gone", runs / "branch")}
    assert len(ids) == 2 and ends[1].trainer["wandb_id"] in ids
