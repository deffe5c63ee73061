"""Off logging steps the host waits for no value of the device, but for the one that says whether the step was good."""

from pathlib import Path

import pytest

from tests.e2e.program import save_config
from tests.ranks import run_ranks


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_step_reads_from_the_device_but_its_norm(tmp_path: Path, stage: int) -> None:
    config = save_config(
        tmp_path,
        data={"workers": 1},
        train={"steps": 9, "precision": "bf16"},
        checkpoint={"every": 1000},
        track={"every": 5},
        deepspeed={"config": f"zero{stage}"},
    )
    for steps in run_ranks("tests.dist.host_reads:count", 2, {"argv": ["--config", str(config)]}):
        assert len(steps) == 8
        ours = [{k: n for k, n in step.items() if not k.startswith("deepspeed.")} for step in steps]
        # Stage 0 has no check of its own in DeepSpeed, so the norm is read by ours.
        expected = {"mlm_dist._apply": 1} if stage == 0 else {}
        quiet = [n for n in range(1, 9) if n not in (1, 5)]
        assert [ours[n - 1] for n in quiet] == [expected] * len(quiet)
        # It does count what a logging step reads.
        assert ours[4].get("mlm_dist._log", 0) >= 2
