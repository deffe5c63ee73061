"""model.init: run. Another run's model, to the bit, or a clear refusal."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from mlm_dist.checkpoint import CheckpointConfig, Writer
from mlm_dist.config import Config
from mlm_dist.errors import UserError
from mlm_dist.inputs import Inputs
from mlm_dist.model import bert
from mlm_dist.model.bert import ModelConfig
from mlm_dist.plan_command import sizes
from tests.corpora import documents, save_corpus, save_tokenizer

SIZES = {
    "vocab_size": 80,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 40,
}


def save_run(path: Path, steps: list[int]) -> dict[int, BertForMaskedLM]:
    """A run with a model and checkpoints; the model at each step."""
    save_tokenizer(path / "tokenizer")
    models = {step: BertForMaskedLM(BertConfig(**SIZES)) for step in steps}
    writer = Writer(path, CheckpointConfig(keep=9), rank=0, world_size=1, attempt=1)
    for step, model in models.items():
        model.config.save_pretrained(path / "model")
        tensors = {f"param/{name}": p.detach().clone() for name, p in model.named_parameters()}
        writer.save(step, tensors, dict.fromkeys(tensors, 0), {}, {"step": step})
    writer.wait()
    return models


def built(section: ModelConfig) -> BertForMaskedLM:
    return bert.build(section, bert.load_config(section, vocab_size=80, pad_token_id=0), seed=0)


def assert_same(one: BertForMaskedLM, other: BertForMaskedLM) -> None:
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_the_newest_whole_checkpoint_or_the_one_that_is_named(tmp_path: Path) -> None:
    models = save_run(tmp_path, [3, 6])
    section = ModelConfig(init="run", name_or_path=str(tmp_path), hidden_dropout=0.25)
    model = built(section)
    assert_same(model, models[6])
    assert (model.config.hidden_dropout_prob, model.config.max_position_embeddings) == (0.25, 40)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight and model.training
    named = str(tmp_path / "checkpoints" / "step_00000003")
    assert_same(built(replace(section, name_or_path=named)), models[3])
    part = next((tmp_path / "checkpoints" / "step_00000006").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    assert_same(built(section), models[3])
    with pytest.raises(UserError, match=r"model.name_or_path: .*SHA-256"):
        built(replace(section, name_or_path=str(part.parent)))


def test_what_is_no_run_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    section = ModelConfig(init="run", name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"model.name_or_path: .*nowhere is no run"):
        bert.load_config(section, vocab_size=80, pad_token_id=0)
    BertConfig(**SIZES).save_pretrained(tmp_path / "model")
    section = replace(section, name_or_path=str(tmp_path))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        bert.load_config(section, vocab_size=80, pad_token_id=0)
    for wrong, message in (
        (replace(section, name_or_path=None), "model.name_or_path is missing"),
        (replace(section, config=SIZES), "has no use with model.init run"),
    ):
        with pytest.raises(UserError, match=message):
            bert.load_config(wrong, vocab_size=80, pad_token_id=0)


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    save_run(tmp_path, [3])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for changes, message in (
        ({"num_hidden_layers": 2}, r"holds no bert.encoder.layer.1"),
        ({"intermediate_size": 16}, r"is \(12, 8\), the model of its run has \(16, 8\)"),
    ):
        BertConfig(**{**config, **changes}).save_pretrained(tmp_path / "model")
        with pytest.raises(UserError, match=message):
            built(ModelConfig(init="run", name_or_path=str(tmp_path)))


def test_the_tokenizer_must_be_the_runs(tmp_path: Path) -> None:
    save_run(tmp_path, [3])
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab()
    section = ModelConfig(init="run", name_or_path=str(tmp_path / "checkpoints" / "step_00000003"))
    bert.check_vocabulary(section, vocabulary)
    swapped = {**vocabulary, "the": vocabulary["of"], "of": vocabulary["the"]}
    with pytest.raises(UserError, match=r"set data\.tokenizer to .*tokenizer"):
        bert.check_vocabulary(section, swapped)


def test_the_source_is_needed_until_the_run_or_its_base_has_a_checkpoint(tmp_path: Path) -> None:
    manifest = save_corpus(tmp_path / "corpus", documents(20))
    save_tokenizer(tmp_path / "tokenizer")

    def config(branch_from: str | None = None) -> Config:
        made = Config()
        made.run.dir, made.run.name, made.run.branch_from = str(tmp_path), "mine", branch_from
        made.data.manifest, made.data.tokenizer, made.data.seq_len = str(manifest), str(tmp_path / "tokenizer"), 32
        made.model.init, made.model.name_or_path = "run", str(tmp_path / "source")
        made.train.steps = 3
        made.check()
        return made

    save_run(tmp_path / "source", [3])
    (tmp_path / "mine").mkdir()  # begun, but killed before its first checkpoint
    assert Inputs(config(), 1).bert_config.max_position_embeddings == 40
    (tmp_path / "source").rename(tmp_path / "base")
    with pytest.raises(UserError, match="source is no run"):
        Inputs(config(), 1)
    for base in ("base", "base/checkpoints/step_00000003"):
        assert Inputs(config(str(tmp_path / base)), 1).bert_config.max_position_embeddings == 40
    (tmp_path / "mine").rmdir()
    (tmp_path / "base").rename(tmp_path / "mine")
    assert Inputs(config(), 1).bert_config.max_position_embeddings == 40


def test_the_planner_takes_the_sizes_from_the_run_and_needs_no_tokenizer(tmp_path: Path) -> None:
    save_run(tmp_path, [3])
    config = Config(model=ModelConfig(init="run", name_or_path=str(tmp_path)))
    config.data.tokenizer = str(tmp_path / "none")
    assert {name: getattr(sizes(config), name) for name in SIZES} == SIZES
    config.model.name_or_path = str(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"elsewhere is no run.*The planner takes .* from that run.*--model\.init config"
    ):
        sizes(config)
