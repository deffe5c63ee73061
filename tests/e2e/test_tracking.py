"""What W&B and TensorBoard hold of a run of several ranks that was killed and went on, judged by the files that they wrote themselves."""

from pathlib import Path
from typing import Any

import pytest

from mlm_dist.cli import main
from mlm_dist.files import read_json, read_json_lines
from mlm_dist.records import read_metrics, read_predictions
from tests import wandb_files
from tests.e2e.program import Program, save_config
from tests.unit.test_tensorboard import scalars

pytestmark = pytest.mark.timeout(300)
STEPS, EVERY = 24, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under ZeRO-3, where a forward of one rank alone would wait for ever."""
    folder = tmp_path_factory.mktemp("tracked")
    config = save_config(
        folder,
        train={"steps": STEPS},
        eval={"every": EVERY},
        checkpoint={"every": EVERY},
        deepspeed={"config": "zero3"},
        track={"every": 1, "wandb": "offline", "predictions": 4, "artifacts": "all", "tensorboard": True},
    )
    run_dir = folder / "runs" / "run"
    killed = Program(config, 2).start()
    killed.wait_for_step(run_dir, EVERY + 3)
    killed.kill()
    Program(config, 2).start().finish()
    return run_dir


def test_wandb_has_one_run_with_each_step_once(run: Path) -> None:
    rows = wandb_files.history(run / "wandb")
    metrics = read_metrics(run / "metrics.jsonl")
    trained = {r["step"]: r["loss"] for r in metrics if r["kind"] == "train"}
    assert sorted(trained) == list(range(1, STEPS + 1))
    assert {r["global_step"]: r["train/loss"] for r in rows if "train/loss" in r} == trained
    assert len(rows) == len(metrics) and sorted(r["_step"] for r in rows) == list(range(len(rows)))
    runs = wandb_files.records("run", run / "wandb")
    assert len(runs) == 2 and len({r.run_id for r in runs}) == 1
    groups = {key.split("/")[0] for row in rows for key in row if "/" in key}
    assert groups == {"train", "val", "perf", "data", "system"}
    assert {"data/data_wait", "data/lost_documents", "system/memory_gib", "perf/tokens_per_s"} <= rows[0].keys()


def test_its_configuration_tells_code_data_and_hardware(run: Path) -> None:
    config = wandb_files.values(wandb_files.records("run", run / "wandb")[1].config.update)
    assert config["train"]["steps"] == STEPS and config == config | (read_json(run / "wandb" / "config.json") or {})
    environment = read_json(run / "env.json") or {}
    assert config["git_commit"] == environment["commit"]
    assert (environment["device"], environment["devices"]) == (config["hardware"]["device"], 2)
    assert set(config["data_fingerprint"]) == {"data", "tokenizer"} and all(config["data_fingerprint"].values())
    assert config["hardware"]["ranks"] == 2 and len(config["hardware"]["hosts"]) == 1
    assert {"torch", "deepspeed", "transformers", "python"} <= config["software"].keys()
    stats = {item.key for record in wandb_files.records("stats", run / "wandb") for item in record.item}
    assert {"proc.memory.rssMB", "memory_percent"} <= stats  # wandb's own


def test_predictions_are_kept_at_each_validation(run: Path) -> None:
    kept = read_predictions(run)
    assert list(kept) == list(range(EVERY, STEPS + 1, EVERY))
    texts = [[(row["text"], row["truth"]) for row in rows] for rows in kept.values()]
    assert all(len(t) == 4 and t == texts[0] for t in texts), "the same places each time"
    for rows in kept.values():
        for row in rows:
            shares = [p for _, p in row["predictions"]]
            assert "«" in row["text"] and 0 < row["truth_probability"] < 1 and shares == sorted(shares, reverse=True)
    tables = [r for r in wandb_files.history(run / "wandb") if "val/predictions" in r]
    assert [r["global_step"] for r in tables] == list(kept)
    cells = wandb_files.table(run / "wandb", tables[-1], "val/predictions")
    assert [(row[0], row[1]) for row in cells] == texts[-1]


def test_checkpoints_are_reference_artifacts(run: Path) -> None:
    found = [a for a in wandb_files.records("artifact", run / "wandb") if a.type == "model"]
    aliases = [set(a.aliases) - {"latest"} for a in found]
    told = [e for e in read_json_lines(run / "events.jsonl") if e["kind"] == "artifact"]
    assert [set(e["aliases"]) for e in told][-len(aliases) :] == aliases
    assert {"step_00000024", "best"} <= set().union(*aliases)
    before, final = told[:-1], told[-1]
    assert len({e["step"] for e in before}) == len(before) and final["step"] == STEPS and "final" in final["aliases"]
    newest = next(a for a in found if "final" in a.aliases)
    files = {p.name: p.stat().st_size for p in (run / "checkpoints" / "step_00000024").iterdir()}
    assert {c.path: c.size for c in newest.manifest.contents} == files
    assert all(c.ref.startswith("file://") and not c.local_path for c in newest.manifest.contents)


def test_tensorboard_has_each_step_once(run: Path) -> None:
    metrics = read_metrics(run / "metrics.jsonl")
    for kind in ("train", "val"):
        expected: list[Any] = [(r["step"], pytest.approx(r["loss"])) for r in metrics if r["kind"] == kind]
        assert scalars(run, f"{kind}/loss") == expected


def test_sync_and_watch_take_the_directory(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(run), "--offline"]) == 0
    held = wandb_files.history(run / "wandb", "sync")
    assert len(held) == len(read_metrics(run / "metrics.jsonl"))
    assert [a.type for a in wandb_files.records("artifact", run / "wandb", "sync")].count("model") >= 2
    capsys.readouterr()
    assert main(["watch", str(run), "--once"]) == 0
    numbers, state = capsys.readouterr().out.splitlines()
    assert f"step {STEPS}/{STEPS}" in numbers and "done 100%" in numbers and state == f"finished at step {STEPS}"
