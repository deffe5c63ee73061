"""Words of a corpus added to a real BERT: extended, trained, killed, resumed, exported and asked."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from mlm_dist import checkpoint
from mlm_dist.cli import main
from mlm_dist.config import load
from mlm_dist.errors import UserError
from mlm_dist.inputs import Inputs
from tests.corpora import save_corpus
from tests.e2e.program import Program, losses
from tests.e2e.test_pretrained import real_bert

pytestmark = pytest.mark.timeout(300)

SIZE = 30522
NEW = ["frobnicator", "quuxlet", "blorptastic"]  # in the order of their frequency
RECIPE = """
run: {{dir: {folder}/runs, name: run}}
data: {{manifest: {folder}/data/manifest.json, tokenizer: {folder}/extended, seq_len: 32}}
model: {{init: pretrained, name_or_path: {folder}/base, hidden_dropout: 0.0, attention_dropout: 0.0}}
train: {{steps: 4, global_batch: 8, micro_batch: 4, precision: fp32}}
optim: {{lr: 3.0e-3, warmup: 0.0}}
deepspeed: {{config: zero3}}
checkpoint: {{every: 2}}
track: {{every: 1, wandb: disabled}}
"""


def texts() -> list[str]:
    rng = random.Random(0)
    words = ["the", "of", "a", "and", *NEW]
    return [" ".join(rng.choices(words, weights=[4, 2, 2, 2, 12, 3, 1], k=30)) for _ in range(120)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model whose weights can be taken away, a corpus, the extended tokenizer and a run config."""
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / "base" / name).symlink_to(real_bert() / name)
    save_corpus(tmp_path / "data", texts())
    options = ["--base", tmp_path / "base", "--manifest", tmp_path / "data" / "manifest.json", "--count", 9]
    assert main(["tokenizer", "extend", *map(str, options), "--output", str(tmp_path / "extended")]) == 0
    (tmp_path / "run.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def test_train_resume_export_and_ask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = folder / "run.yaml", folder / "runs" / "run"
    first = Program(config, 2).start()
    first.wait_for_step(run, 3)
    first.kill()
    assert "3 words more than" in first.output()
    # What the checkpoint holds is not read from the base again.
    (folder / "base" / "model.safetensors").unlink()
    (folder / "base" / "model.safetensors").touch()
    Program(config, 2, ["--deepspeed.config", "zero1"]).start().finish(200)
    history = losses(run)
    assert sorted(history) == [1, 2, 3, 4] and history[4] < history[1]
    assert json.loads((run / "model" / "config.json").read_text())["vocab_size"] == SIZE + len(NEW)

    newest = checkpoint.newest(run)
    assert newest is not None
    table = checkpoint.Reader(newest).parameter("bert.embeddings.word_embeddings.weight")
    assert len(table) == SIZE + len(NEW)
    old = load_file(real_bert() / "model.safetensors")["embeddings.word_embeddings.weight"]
    pieces = list(json.loads((folder / "extended" / "extension.json").read_text())["words"].values())
    starts = torch.stack([old[ids].mean(0) for ids in pieces])
    # Adam moves each weight by at most about lr a step: the rows have begun where they should, and learned.
    moved = (table[SIZE:] - starts).abs()
    assert moved[0].max() > 1e-4 and moved.max() < 4 * 3e-3 * 1.5

    assert main(["export", str(run), "--output", str(folder / "out")]) == 0
    model, tokenizer = (kind.from_pretrained(folder / "out") for kind in (AutoModelForMaskedLM, AutoTokenizer))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert len(tokenizer) == tokenizer.vocab_size == model.config.vocab_size == SIZE + len(NEW)
    assert tokenizer.encode("Quuxlet frobnicators") == [101, SIZE + 1, SIZE, 2015, 102]  # quuxlet frobnicator ##s
    text = "the [MASK] of a frobnicator"
    answers = pipeline("fill-mask", model=model, tokenizer=tokenizer)(text)
    assert answers[0]["token_str"] == NEW[0] and answers[0]["token"] == SIZE
    capsys.readouterr()
    assert main(["fill-mask", str(folder / "out"), text]) == 0
    assert NEW[0] in capsys.readouterr().out
    # A run that continues from the export finds all its tokens there.
    again = Inputs(load(["--config", str(config), "--model.name_or_path", str(folder / "out")]).config, 1)
    assert again.new_tokens is None and again.bert_config.vocab_size == SIZE + len(NEW)


def test_what_does_not_fit_is_refused_as_before(folder: Path) -> None:
    def inputs(*flags: str) -> Inputs:
        return Inputs(load(["--config", str(folder / "run.yaml"), *flags]).config, 1)

    fits = inputs()
    assert fits.new_tokens is not None and fits.bert_config.vocab_size == SIZE + len(NEW)
    record = folder / "extended" / "extension.json"
    text = record.read_text()
    record.unlink()  # a longer vocabulary, and nothing that says where it is from
    with pytest.raises(
        UserError, match=r"data\.tokenizer is not the one of model\.name_or_path .*: token 30522 is 'frob"
    ):
        inputs()
    record.write_text(text.replace(f"{SIZE},", f"{SIZE - 1},"))
    with pytest.raises(UserError, match=r"data\.tokenizer: .*extension\.json does not belong to the tokenizer"):
        inputs()
    record.write_text(text)
    # An extension of another vocabulary of the same size.
    vocabulary = (real_bert() / "vocab.txt").read_text(encoding="utf-8").replace("\nthe\n", "\nthx\n")
    (folder / "base" / "tokenizer.json").unlink()
    (folder / "base" / "vocab.txt").unlink()
    (folder / "base" / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.tokenizer is not the one .*: token 1996 is 'the' .* and 'thx'"):
        inputs()
