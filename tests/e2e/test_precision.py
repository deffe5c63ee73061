"""A run in fp16: its loss scale in the checkpoint, overflows that end nothing, and on in another precision and stage."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mlm_dist.records import read_metrics
from tests.e2e.program import Program, losses, save_config

SCALE = 2.0**36


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def set_scale(checkpoint: Path, scale: float) -> None:
    """Another loss scale in a checkpoint, with the checksums that belong to it."""
    optimizer = read(checkpoint / "optimizer.json")
    optimizer["scaler"]["scale"] = scale
    data = json.dumps(optimizer).encode()
    (checkpoint / "optimizer.json").write_bytes(data)
    index = read(checkpoint / "index.json")
    index["files"]["optimizer.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "index.json").write_text(json.dumps(index))
    digest = hashlib.sha256((checkpoint / "index.json").read_bytes()).hexdigest()
    (checkpoint / "COMMIT").write_text(digest)


def test_fp16_overflows_end_no_run_and_another_precision_takes_over(tmp_path: Path) -> None:
    config = save_config(tmp_path, train={"steps": 3, "max_skipped": 1}, checkpoint={"every": 100, "keep": 9})
    run = tmp_path / "runs" / "run"
    fp16 = ["--train.precision", "fp16", "--deepspeed.config", "zero2"]
    Program(config, 1, fp16).start().finish()
    checkpoint = run / "checkpoints" / "step_00000003"
    # Of three steps none overflowed, or the scale would be lower.
    assert read(checkpoint / "optimizer.json")["scaler"] == {"scale": 2.0**16, "good_steps": 3}

    set_scale(checkpoint, SCALE)
    more = ["--allow_change", "train.steps", "--train.steps"]
    Program(config, 2, [*fp16, *more, "30"]).start().finish()
    skips = [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["kind"] == "skipped_step"]
    assert len(skips) > 3 and all("overflowed" in e["why"] for e in skips)
    last = read(run / "checkpoints" / "step_00000030" / "optimizer.json")
    assert last["scaler"]["scale"] == SCALE / 2 ** len(skips)
    assert last["step"] == 30 - len(skips)
    scales = {m["step"]: m["loss_scale"] for m in read_metrics(run / "metrics.jsonl") if "loss_scale" in m}
    assert scales[30] == last["scaler"]["scale"]

    # Gradients are summed in fp32 and weights are kept in it, so nothing else is needed to go on.
    Program(config, 1, ["--train.precision", "bf16_pure", "--deepspeed.config", "zero1", *more, "33"]).start().finish()
    got = losses(run)
    assert sorted(got) == list(range(1, 34))
    assert read(run / "checkpoints" / "step_00000033" / "optimizer.json")["scaler"] is None
    assert abs(got[31] - got[30]) < 0.3
