"""Two-phase pre-training: the recipes, shrunken, from short rows to long ones."""

import json
from pathlib import Path

import pytest

from mlm_dist.files import read_json
from tests.corpora import documents, save_corpus, save_tokenizer
from tests.e2e.program import SIZES, Program, losses
from tests.ranks import ROOT

pytestmark = pytest.mark.timeout(400)


def test_phase_2_goes_on_from_phase_1_and_then_needs_it_no_more(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    manifest = save_corpus(tmp_path / "corpus", documents(300))
    val = save_corpus(tmp_path / "corpus", documents(60, seed=1), shards=1, name="val.json")
    common = [
        *("--run.dir", str(tmp_path / "runs"), "--track.wandb", "disabled", "--track.every", "1"),
        *("--data.manifest", str(manifest), "--data.val_manifest", str(val)),
        *("--data.tokenizer", str(tmp_path / "tokenizer"), "--data.workers", "0", "--train.precision", "fp32"),
        *("--train.global_batch", "64", "--train.micro_batch", "32", "--optim.lr", "3.0e-3", "--optim.warmup", "5"),
    ]
    runs = tmp_path / "runs"
    sizes = json.dumps({**SIZES, "max_position_embeddings": 32})
    first = [*common, "--data.seq_len", "16", "--model.config", sizes, "--train.steps", "60"]
    phase(tmp_path, 1, 1, first).start().finish()
    source = runs / "bert_base_phase1"
    fresh, (learned,) = losses(source)[1], losses(source, "val").values()
    assert learned < fresh - 0.4

    second = [*common, "--data.seq_len", "32", "--model.name_or_path", str(source)]
    phase(tmp_path, 2, 2, [*second, "--train.steps", "4"]).start().finish()
    run = runs / "bert_base_phase2"
    begun = losses(run)[1]  # before any step of its own: the first is at learning rate 0
    assert abs(begun - learned) < (fresh - learned) / 3
    assert read_json(run / "model" / "config.json") == read_json(source / "model" / "config.json")

    source.rename(tmp_path / "gone")
    longer = ["--train.steps", "6", "--allow_change", "train.steps"]
    phase(tmp_path, 2, 2, [*second, *longer]).start().finish()
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]


def phase(folder: Path, number: int, world: int, flags: list[str]) -> Program:
    """The recipe with these flags, its output in ``folder``."""
    program = Program(ROOT / "recipes" / f"bert_base_phase{number}.yaml", world, flags)
    program.log = lambda rank: folder / f"rank-{rank}.log"  # type: ignore[method-assign]
    return program
