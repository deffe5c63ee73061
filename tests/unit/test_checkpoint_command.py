"""``mlm-dist checkpoint list`` and ``verify`` on a run's directory."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mlm_dist import checkpoint
from mlm_dist.cli import main

FACTS = {"step": 0, "attempt": 3, "time": 1.7e9}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two checkpoints, of one rank, with a validation at the second."""
    writer = checkpoint.Writer(tmp_path, checkpoint.CheckpointConfig(), rank=0, world_size=1, attempt=3)
    for step in (10, 20):
        tensors = {"param/a": torch.full((4, 5), float(step)), "state/exp_avg/a": torch.zeros(4, 5)}
        writer.save(step, tensors, dict.fromkeys(tensors, 0), {"class": "AdamW"}, {**FACTS, "step": step})
        writer.wait()
    record = {"kind": "val", "step": 20, "attempt": 3, "loss": 2.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def part(run: Path, step: int) -> Path:
    return next((run / "checkpoints" / checkpoint.name(step)).glob("*.safetensors"))


def test_list_tells_step_size_ranks_validation_and_what_is_not_whole(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with part(run, 10).open("ab") as file:
        file.write(b"x")
    (run / "checkpoints" / "step_00000030").mkdir()
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    first, second, third = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in (first, second, third)] == [10, 20, 30]
    files = [f for f in (run / "checkpoints" / checkpoint.name(20)).iterdir()]
    assert (second["files"], second["size"]) == (len(files), sum(f.stat().st_size for f in files))
    assert [second[k] for k in ("attempt", "time", "ranks", "validation_loss", "problem")] == [3, 1.7e9, 1, 2.5, None]
    assert first["validation_loss"] is None
    assert str(part(run, 10)) in first["problem"] and "not a whole checkpoint" in third["problem"]
    assert main(["checkpoint", "list", str(run)]) == 0
    out = capsys.readouterr().out
    assert "complete" in out and out.count("not usable") == 2 and str(part(run, 10)) in out


def test_verify_names_each_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole") == 2
    data = bytearray(part(run, 20).read_bytes())
    data[-1] ^= 1
    part(run, 20).write_bytes(data)
    (part(run, 20).parent / "trainer.json").unlink()
    assert main(["checkpoint", "list", str(run), "--json"]) == 0  # sizes alone do not tell the flipped bit
    assert "trainer.json" in json.loads(capsys.readouterr().out)[1]["problem"]
    assert main(["checkpoint", "verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert out.count(": whole") == out.count(": damaged") == 1
    assert f"{part(run, 20)}: its SHA-256" in out and "trainer.json: missing" in out
    assert main(["checkpoint", "verify", str(part(run, 10).parent)]) == 0
    shutil.rmtree(run / "checkpoints")
    assert main(["checkpoint", "verify", str(run)]) == 2
    assert "has no checkpoint" in capsys.readouterr().err
