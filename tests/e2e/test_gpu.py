"""The program on a GPU with everything on at once that a CPU cannot run."""

import json
from pathlib import Path

import pytest
import torch

from tests.e2e.program import Program, losses, save_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("template", ["zero0", "zero2_offload", "zero3_offload"])
def test_flat_compiled_deterministic_and_tried_for_size_it_resumes_to_the_bit(tmp_path: Path, template: str) -> None:
    config = save_config(
        tmp_path,
        data={"packing": "best_fit", "workers": 1},
        model={"attention": "varlen", "attention_dropout": 0.0, "compile": True},
        train={"steps": 20, "precision": "bf16", "micro_batch": "auto", "deterministic": True},
        deepspeed={"config": template},
        eval={"every": 10},
        checkpoint={"every": 5},
    )
    Program(config, 1, ["--run.name", "whole"]).start().finish(600)
    whole = losses(tmp_path / "runs/whole")
    killed = Program(config, 1, ["--run.name", "killed"]).start()
    killed.wait_for_step(tmp_path / "runs/killed", 7, 600)
    killed.kill()
    Program(config, 1, ["--run.name", "killed"]).start().finish(600)
    assert losses(tmp_path / "runs/killed") == whole and sorted(whole) == list(range(1, 21))
    assert losses(tmp_path / "runs/killed", "val") == losses(tmp_path / "runs/whole", "val")
    for line in (tmp_path / "runs/killed/events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "attempt":
            assert (event["attention"], event["compiled"]) == ("varlen", True)
    record = json.loads((tmp_path / "runs/whole/metrics.jsonl").read_text().splitlines()[-2])
    assert record["time_forward"] > 0 and record["time_backward"] > 0 and record["tflops"] > 0
