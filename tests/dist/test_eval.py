"""``mlm-dist eval`` on the checkpoints of a real run: the numbers of its own validation, on any number of ranks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mlm_dist import checkpoint, cli
from mlm_dist.eval_command import main
from mlm_dist.files import read_yaml
from mlm_dist.records import read_metrics
from tests.e2e.program import Program, save_config
from tests.ranks import ROOT, free_port

TIMEOUT_S = 120
# Parts of a few blocks, so that each of three ranks has some, and not equally many.
MANY_PARTS = ("--checkpoints", "all", "--pseudo-perplexity", "5", "--batch", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint and a validation after steps 3, 6 and 9, whose learning rate grows until it does harm."""
    folder = tmp_path_factory.mktemp("eval")
    config = save_config(
        folder,
        eval={"every": 3, "seed": 77},
        checkpoint={"keep": 9},
        train={"steps": 9},
        data={"packing": "best_fit", "seq_len": 28},
        optim={"lr": 0.5, "warmup": 9},
    )
    Program(config).start().finish()
    return folder / "runs/run"


def start(world: int, out: Path, *words: str) -> tuple[int, str]:
    """The program on ``world`` ranks: rank 0's exit code, which every rank must have, and its stderr."""
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "mlm_dist.eval_command", *words, "--json", str(out), "--device", "cpu"]
    ranks = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert len({rank.returncode for rank in ranks}) == 1, said
    assert all(stdout == "" for stdout, _ in said[1:])
    return ranks[0].returncode, said[0][1]


def here(out: Path, *words: str) -> dict[str, Any]:
    """What one process, this one, writes, with as many threads as a rank of `start`: sums are divided among them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*words, "--json", str(out), "--device", "cpu"]) == 0
    finally:
        torch.set_num_threads(threads)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def alone(run: Path) -> dict[str, Any]:
    """What one process writes of all checkpoints."""
    return here(run.parent / "alone.json", str(run), *MANY_PARTS)


def test_the_numbers_of_the_runs_own_validation(run: Path, alone: dict[str, Any]) -> None:
    recorded = {r["step"]: r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "val"}
    measured = {m["step"]: m for m in alone["models"]}
    assert list(measured) == [3, 6, 9] == list(recorded)
    for step, result in measured.items():
        for key in ("accuracy", "selected", "unigram_entropy", "lost_documents"):
            assert result[key] == recorded[step][key]
        # Other sums of fp32 numbers: the run's are of packed rows.
        assert result["loss"] == pytest.approx(recorded[step]["loss"], rel=1e-6)
        assert result["perplexity"] == pytest.approx(recorded[step]["perplexity"], rel=1e-5)


def test_the_same_to_the_bit_on_any_number_of_ranks(run: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    code, stderr = start(3, tmp_path / "3.json", str(run), *MANY_PARTS)
    assert code == 0, stderr
    assert json.loads((tmp_path / "3.json").read_text()) == alone


def test_which_checkpoints(run: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    losses = {m["step"]: m["loss"] for m in alone["models"]}
    best = min(losses, key=lambda step: losses[step])
    assert best != 9  # so that it is not the newest
    one = run / "checkpoints" / checkpoint.name(6)
    for words, steps in (
        ([str(run)], [9]),
        ([str(run), "--steps", "6,3"], [6, 3]),
        ([str(run), "--best"], [best]),
        ([str(one)], [6]),
    ):
        found = here(out, *words, "--batch", "2")["models"]
        assert [(m["step"], m["loss"]) for m in found] == [(step, losses[step]) for step in steps]


def test_a_checkpoint_by_another_name(run: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / checkpoint.name(6)).rename(copy / "checkpoints/kept")
    (found,) = here(tmp_path / "out.json", str(copy / "checkpoints/kept"), "--batch", "2")["models"]
    assert (found["step"], found["loss"]) == (6, alone["models"][1]["loss"])


def test_the_last_of_all_checkpoints_is_damaged(
    run: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    next((copy / "checkpoints" / checkpoint.name(9)).glob("part-*")).write_bytes(b"damaged")
    code, stderr = start(2, tmp_path / "out.json", str(copy), *MANY_PARTS)
    assert code == 2 and checkpoint.name(9) in stderr
    found = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [(m["step"], m["loss"]) for m in found] == [(m["step"], m["loss"]) for m in alone["models"][:2]]


def test_a_validation_set_that_is_elsewhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    config = read_yaml(copy / "config.yaml")
    for path, where in (("corpus/val.json", "start in the directory that the run was started in, or "), ("/none", "")):
        config["data"]["val_manifest"] = path
        (copy / "config.yaml").write_text(yaml.safe_dump(config))
        assert main([str(copy)]) == 2
        said = f"--data: missing, and there is no {path}, the data.val_manifest of {copy}; {where}give --data"
        assert said in capsys.readouterr().err


def test_a_probe_of_a_run_is_one_of_its_export(run: Path, tmp_path: Path) -> None:
    rows = [{"text": words, "label": i} for i, words in enumerate(("the of and", "has been when")) for _ in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--train", str(path), "--dev", str(path), "--text-column", "text", "--label-column", "label"]
    assert cli.main(["export", str(run), "--output", str(tmp_path / "export")]) == 0
    found = []
    for model in (run, tmp_path / "export"):
        words = ["probe", str(model), *argv, "--frozen", "--epochs", "3", "--device", "cpu"]
        assert cli.main([*words, "--json", str(tmp_path / "out.json")]) == 0
        found.append(json.loads((tmp_path / "out.json").read_text())["models"][0])
    assert [model["step"] for model in found] == [9, None] and found[0]["seeds"] == found[1]["seeds"]
    assert found[0]["max_length"] == 32  # of a model with 32 places


def test_a_mistake_ends_every_rank(run: Path, tmp_path: Path) -> None:
    code, stderr = start(2, tmp_path / "out.json", str(run), "--steps", "4")
    assert code == 2 and "has no checkpoint of that step; it has 3, 6, 9" in stderr


def test_runs_with_other_masks_do_not_compare_in_silence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("checkpoints", "model", "tokenizer"):
        (other / name).symlink_to(run / name)
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 77", "seed: 78"))
    assert main([str(run), str(other)]) == 2
    assert f"--seed: the runs differ in eval.seed ({run} 77, {other} 78)" in capsys.readouterr().err
    one, two = here(tmp_path / "out.json", str(run), str(other), "--seed", "5")["models"]
    assert one["loss"] == two["loss"]
