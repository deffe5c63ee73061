"""What a branch may change, where its learning rate must begin, and the copy that makes it a run of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_dist import checkpoint
from mlm_dist.branch import Base
from mlm_dist.checkpoint import CheckpointConfig, Reader, Writer
from mlm_dist.errors import UserError
from mlm_dist.lifecycle import RunDir
from mlm_dist.schedule import ScheduleConfig

IDENTITY = {"run.seed": 0, "run.branch_from": None, "model.config": {"hidden_size": 8}}
WSD = ScheduleConfig(warmup=10.0, schedule="wsd", decay=20.0)


def save_run(path: Path, steps: list[int], total: int, schedule: ScheduleConfig = WSD) -> Path:
    """A run of ``total`` steps at a peak of 1e-3 with checkpoints at ``steps``."""
    writer = Writer(path, CheckpointConfig(keep=9), rank=0, world_size=1, attempt=1)
    for step in steps:
        tensors = {"param/w": torch.full((3,), float(step)), "state/exp_avg/w": torch.zeros(3)}
        trainer = {"step": step, "progress": step / total, "wandb_id": "theirs", "bytes": 100 * step}
        writer.save(step, tensors, dict.fromkeys(tensors, 0), {"class": "AdamW"}, trainer)
    writer.wait()
    keys = {f"optim.{key}": value for key, value in vars(schedule).items()}
    RunDir(path).record_identity(IDENTITY, {"optim.lr": 1e-3, "train.steps": total, **keys})
    return path


def no_warning(message: str) -> None:
    raise AssertionError(message)


def test_a_run_stands_for_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = save_run(tmp_path / "base", [20, 40], 100)
    assert Base(str(run), no_warning).step == 40
    assert Base(str(run / "checkpoints" / "step_00000020"), no_warning).step == 20
    part = next((run / "checkpoints" / "step_00000040").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    warnings: list[str] = []
    assert Base(str(run), warnings.append).step == 20 and "wrong size" not in warnings[0]
    for source, why in (
        (run / "checkpoints" / "step_00000040", "SHA-256"),
        (run / "checkpoints" / "step_00000030", "no such directory"),
        (tmp_path, "holds no whole checkpoint"),
    ):
        with pytest.raises(UserError, match=f"run.branch_from: .*{why}"):
            Base(str(source), no_warning)
    shutil.copytree(run / "checkpoints" / "step_00000020", tmp_path / "alone" / "step_00000020")
    with pytest.raises(UserError, match=r"identity\.json"):
        Base(str(tmp_path / "alone" / "step_00000020"), no_warning)


def test_the_copy_is_whole_and_the_branchs_own(tmp_path: Path) -> None:
    base = Base(str(save_run(tmp_path / "base", [20], 100)), no_warning)
    (tmp_path / "branch").mkdir()
    copy = base.adopt(tmp_path / "branch")
    shutil.rmtree(tmp_path / "base")
    assert checkpoint.newest(tmp_path / "branch", no_warning) == copy
    reader = Reader(copy)
    assert reader.step == 20 and torch.equal(reader.parameter("w"), torch.full((3,), 20.0))
    assert reader.trainer["bytes"] == 2000 and reader.trainer["wandb_id"] is None
    assert reader.trainer["branched_from"]["step"] == 20
    with pytest.raises(UserError, match="could not be copied"):
        base.adopt(tmp_path / "branch")


def test_only_what_makes_the_run_what_it_is_must_match(tmp_path: Path) -> None:
    base = Base(str(save_run(tmp_path / "base", [20], 100)), no_warning)
    base.check_identity({**IDENTITY, "run.branch_from": "base"})
    with pytest.raises(UserError, match=r"model.config.hidden_size: the run has 8, this start has 16"):
        base.check_identity({**IDENTITY, "model.config": {"hidden_size": 16}})


@pytest.mark.parametrize(
    ("step", "steps", "values", "jump"),
    [
        (20, 60, {}, None),  # still stable in both
        (40, 60, {}, None),  # the decay begins with the branch
        (40, 1000, {"schedule": "constant", "decay": None}, None),
        (5, 60, {}, None),  # within the warm-up
        (40, 50, {}, "0.001 to 0.0005"),  # half of the decay would be left out
        (90, 200, {}, "0.0005 to 0.001"),  # the run's own decay has begun
        (40, 60, {"lr": 2e-3}, "0.001 to 0.002"),
        (5, 60, {"warmup": 0.0}, "0.0005 to 0.001"),
        (40, 80, {"schedule": "linear", "decay": None}, "0.001 to 0.0005714"),
    ],
)
def test_the_learning_rate_goes_on_or_is_changed_on_purpose(
    tmp_path: Path, step: int, steps: int, values: dict[str, Any], jump: str | None
) -> None:
    base = Base(str(save_run(tmp_path / "base", [step], 100)), no_warning)
    lr = values.pop("lr", 1e-3)
    config = ScheduleConfig(**{**vars(WSD), **values})
    if jump is None:
        base.check_rate(step / steps, lr, config, [])
    else:
        with pytest.raises(UserError, match=f"at step {step} .* from the run's {jump}"):
            base.check_rate(step / steps, lr, config, [])
        base.check_rate(step / steps, lr, config, ["optim.lr"])


def test_a_branch_that_would_be_over_is_refused(tmp_path: Path) -> None:
    base = Base(str(save_run(tmp_path / "base", [20], 100)), no_warning)
    with pytest.raises(UserError, match=r"raise train\.steps"):
        base.check_rate(1.0, 1e-3, WSD, ["optim.lr"])


def test_a_run_that_is_older_than_a_key_is_held_to_the_others(tmp_path: Path) -> None:
    run = RunDir(save_run(tmp_path / "base", [20], 100))
    recorded = json.loads((run.path / "identity.json").read_text())
    del recorded["guarded"]["optim.final"]
    run.record_identity(**recorded)
    now = {**recorded["guarded"], "optim.final": 0.0}
    assert run.check_identity(IDENTITY, now, []) == {}
    with pytest.raises(UserError, match=r"optim.lr: the run has 0.001, this start has 0.5"):
        run.check_identity(IDENTITY, {**now, "optim.lr": 0.5}, [])
