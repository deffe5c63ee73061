"""Killed and started again, the run is the run that nothing happened to."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from mlm_dist import checkpoint
from mlm_dist.files import read_json
from mlm_dist.records import read_metrics
from tests.e2e.program import Program, losses, save_config

pytestmark = pytest.mark.timeout(400)
# Long enough that a run still runs when the test has seen the step that it waits for.
STEPS = 30
DRAW = random.Random(2026)
# ZeRO stage, loader workers, the step after which the run is killed and the rank that dies first: random, the same for all who run the test.
KILLS = [
    (stage, workers, DRAW.randint(2, STEPS // 2), DRAW.randint(0, 1))
    for stage, workers in ((0, 0), (1, 2), (2, 0), (3, 2))
]


@pytest.mark.parametrize(("stage", "workers", "step", "first"), KILLS)
def test_killed_run_equals_uninterrupted_to_the_bit(
    tmp_path: Path, stage: int, workers: int, step: int, first: int
) -> None:
    config = save_config(tmp_path, train={"steps": STEPS}, deepspeed={"config": f"zero{stage}"})
    runs = tmp_path / "runs"
    flags = ["--data.workers", str(workers)]
    Program(config, 2, ["--run.name", "whole", *flags]).start().finish()
    killed = Program(config, 2, flags).start()
    killed.wait_for_step(runs / "run", step)
    killed.kill([first])
    killed.kill()
    before = losses(runs / "run")
    assert max(before) < STEPS
    Program(config, 2, flags).start().finish()
    whole = losses(runs / "whole")
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert losses(runs / "run") == whole
    assert before == {step: whole[step] for step in before}
    assert losses(runs / "run", "val") == losses(runs / "whole", "val")
    first, second = (
        checkpoint.Reader(runs / name / "checkpoints" / checkpoint.name(STEPS)) for name in ("whole", "run")
    )
    assert all((first.parameter(n) == second.parameter(n)).all() for n in first.names())
    assert read_json(runs / "run" / "status.json")["state"] == "finished"


def test_resume_on_other_ranks_and_stages(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"steps": STEPS}, model={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    runs = tmp_path / "runs"
    Program(config, 2, ["--run.name", "whole"]).start().finish()
    killed = Program(config, 2).start()
    killed.wait_for_step(runs / "run", 7)
    killed.kill()
    whole = losses(runs / "whole")
    for world, stage in ((1, 0), (3, 3), (1, 2)):
        name = f"on-{world}-zero{stage}"
        shutil.copytree(runs / "run", runs / name)
        (runs / name / "lock").unlink()
        Program(config, world, ["--run.name", name, "--deepspeed.config", f"zero{stage}"]).start().finish()
        got = losses(runs / name)
        assert sorted(got) == sorted(whole)
        assert max(abs(got[s] - whole[s]) for s in whole) < 1e-5
        assert got != whole or world == 2  # another order of summation: it did run on another number of ranks


def test_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"steps": STEPS})
    run = tmp_path / "runs" / "run"
    Program(config, 1, ["--run.name", "whole"]).start().finish()
    killed = Program(config, 1).start()
    killed.wait_for_step(run, 9)
    killed.kill()
    newest = checkpoint.newest(run)
    assert newest is not None
    part = next(newest.glob("*.safetensors"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    again = Program(config, 1).start().finish()
    assert "passed over" in again.output()
    assert losses(run) == losses(tmp_path / "runs" / "whole")
    for path in run.glob("checkpoints/step_*/*.safetensors"):
        path.write_bytes(b"")
    longer = Program(config, 1, ["--train.steps", "34", "--allow_change", "train.steps"])
    assert longer.start().wait() == [2]  # rather than from the start, over the old run
    assert "checkpoints is whole" in longer.output()


def test_a_second_start_while_the_first_lives_exits_2(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"steps": 100000})
    run = tmp_path / "runs" / "run"
    first = Program(config, 1).start()
    try:
        first.wait_for_step(run, 1)
        second = Program(config, 1)
        second.log = lambda rank: tmp_path / f"second-{rank}.log"  # type: ignore[method-assign]
        assert second.start().wait() == [2]
        assert "is running already: attempt 1" in second.output()
        first.wait_for_step(run, max(losses(run)) + 2)  # and the first goes on
        # As SLURM does when it preempts or cancels: to all processes, of which loader workers still have work to do.
        os.killpg(first.ranks[0].pid, signal.SIGTERM)
        assert first.wait() == [75]
    finally:
        first.kill()
    status = read_json(run / "status.json")
    assert (status["state"], status["requeue"]) == ("cancelled", False)
    assert checkpoint.Reader(checkpoint.newest(run) or "").step == status["step"] == max(losses(run))
    assert not (run / "lock").exists()


def test_stop_request_reaches_all_ranks_and_is_resumed(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"steps": 5000})
    run = tmp_path / "runs" / "run"
    first = Program(config, 2).start()
    first.wait_for_step(run, 2)
    first.ranks[1].send_signal(signal.SIGUSR1)  # any rank's wish counts
    assert first.wait() == [75, 75]
    status = read_json(run / "status.json")
    assert (status["state"], status["requeue"]) == ("preempted", True)
    again = Program(config, 2).start()
    again.wait_for_step(run, status["step"] + 1)
    (run / "stop_request").write_text('{"reason": "test", "requeue": false}')
    assert again.wait() == [75, 75]
    assert read_json(run / "status.json")["state"] == "cancelled"


def test_finished_run_says_so(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"steps": 2})
    Program(config, 1).start().finish()
    again = Program(config, 1).start().finish()
    assert "is finished; nothing to do" in again.output()
    longer = Program(config, 1, ["--train.steps", "4", "--allow_change", "train.steps"]).start().finish()
    assert sorted(losses(tmp_path / "runs" / "run")) == [1, 2, 3, 4], longer.output()


def test_a_run_of_epochs_ends_alike_on_any_ranks_and_after_a_kill(tmp_path: Path) -> None:
    config = save_config(
        tmp_path,
        model={"hidden_dropout": 0.0, "attention_dropout": 0.0},
        train={"steps": None, "epochs": 1, "global_batch": 40, "micro_batch": 20},
    )
    runs = tmp_path / "runs"
    Program(config, 1, ["--run.name", "whole"]).start().finish()
    killed = Program(config, 3).start()
    killed.wait_for_step(runs / "run", 4)
    killed.kill()
    Program(config, 2).start().finish()
    whole, got = losses(runs / "whole"), losses(runs / "run")
    assert len(whole) > 8 and sorted(got) == sorted(whole)
    assert max(abs(got[s] - whole[s]) for s in whole) < 1e-5
    last = read_metrics(runs / "run" / "metrics.jsonl")[-1]
    assert last["kind"] == "val" and last["step"] == max(whole)
    assert read_json(runs / "run" / "status.json")["state"] == "finished"


@pytest.mark.parametrize("length", [{"steps": 6}, {"steps": None, "epochs": 1}], ids=["steps", "epochs"])
def test_the_last_checkpoint_knows_its_validation(tmp_path: Path, length: dict[str, int | None]) -> None:
    config = save_config(tmp_path, train=length, checkpoint={"every": 1 if "epochs" in length else 3, "keep": 9})
    Program(config).start().finish()
    run = tmp_path / "runs" / "run"
    found = checkpoint.best(run)
    assert found == checkpoint.newest(run) and found is not None
    (step, loss), *more = losses(run, "val").items()
    assert not more
    assert checkpoint.Reader(found).trainer["validation"] == {"step": step, "loss": loss}
