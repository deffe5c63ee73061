"""What the section `model` may say, and the message for what it may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

from mlm_dist.errors import UserError
from mlm_dist.model.bert import ModelConfig, check_fit, check_vocabulary, flops_per_token, load_config
from mlm_dist.model.head import MaskedLM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}


def load(cfg: ModelConfig, vocab_size: int | None = 211) -> BertConfig:
    return load_config(cfg, vocab_size=vocab_size, pad_token_id=0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory that passes for a checkpoint as long as no weight is read."""
    directory = tmp_path / "bert"
    BertConfig(**SIZES, vocab_size=211).save_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"not weights")
    return directory


def edit(directory: Path, **values: Any) -> ModelConfig:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return ModelConfig(init="pretrained", name_or_path=str(directory))


def test_sizes_reach_the_config() -> None:
    config = load_config(ModelConfig(config=SIZES, attention_dropout=0.0), vocab_size=211, pad_token_id=3)
    assert {key: getattr(config, key) for key in SIZES} == SIZES
    assert (config.vocab_size, config.pad_token_id) == (211, 3)
    assert (config.attention_probs_dropout_prob, config.hidden_dropout_prob) == (0.0, 0.1)


def test_vocabulary_in_the_config_wins_and_the_section_is_left_alone() -> None:
    cfg = ModelConfig(config={**SIZES, "vocab_size": 256})
    assert load(cfg).vocab_size == 256
    assert load(ModelConfig(config=SIZES), vocab_size=None).vocab_size == BertConfig().vocab_size
    assert cfg.config == {**SIZES, "vocab_size": 256}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (ModelConfig(init="confg", config=SIZES), r"model\.init: 'confg'.*config, pretrained or run"),
        (ModelConfig(config=SIZES, attention="flash"), r"model\.attention: 'flash'.*auto, varlen, sdpa, eager"),
        (ModelConfig(), r"model\.config is missing"),
        (ModelConfig(config={}), r"model\.config is missing"),
        (ModelConfig(config=SIZES, name_or_path="x"), r"model\.name_or_path x.*pretrained"),
        (ModelConfig(init="pretrained"), r"model\.name_or_path is missing"),
        (ModelConfig(init="pretrained", name_or_path="x", config=SIZES), r"model\.config .*leave one out"),
        (ModelConfig(config=SIZES, hidden_dropout=1.0), r"model\.hidden_dropout: 1\.0.*below 1"),
        (ModelConfig(config=SIZES, attention_dropout=-0.1), r"model\.attention_dropout: -0\.1.*at least 0"),
        (ModelConfig(config={"hiden_size": 32}), r"config\.hiden_size \(value 32\) .*did you mean hidden_size\?"),
        (ModelConfig(config={"layers": 2}), r"model\.config\.layers .*did you mean num_hidden_layers"),
        (ModelConfig(config={"zzz": 2}), r"model\.config\.zzz .*known keys are .*hidden_size"),
        (ModelConfig(config={"hidden_dropout_prob": 0.2}), r"hidden_dropout_prob is set by model\.hidden_dropout"),
        (ModelConfig(config={"hidden_size": 0}), r"model\.config: hidden_size 0 .*at least 1"),
        (ModelConfig(config={"hidden_size": "32"}), r"model\.config: hidden_size '32'.*whole number"),
        (ModelConfig(config={"num_hidden_layers": True}), r"model\.config: num_hidden_layers True.*whole number"),
        (ModelConfig(config={"layer_norm_eps": "1e-12"}), r"model\.config: layer_norm_eps '1e-12'.*a number"),
        (ModelConfig(config={"hidden_act": "gelo"}), r"model\.config: hidden_act 'gelo'.*gelu"),
        (ModelConfig(config={"hidden_act": ["gelu"]}), r"model\.config: hidden_act \['gelu'\]"),
        (ModelConfig(config={**SIZES, "num_attention_heads": 5}), r"heads 5 .*hidden_size 32; the nearest .* is 4"),
    ],
)  # fmt: skip
def test_wrong_sections_are_named(cfg: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(cfg)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "t5"}, r"type 't5', which cannot be trained here: it is an encoder with a decoder"),
        ({"model_type": None}, r"must be one of bert, roberta"),
        ({"is_decoder": True}, r"is_decoder True"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings False"),
        ({"position_embedding_type": "relative_key"}, r"position_embedding_type 'relative_key'"),
        ({"hidden_size": "big"}, r"hidden_size 'big' is not a size"),
        ({"num_attention_heads": 0}, r"num_attention_heads 0 is not a size"),
        ({"use_cache": "maybe"}, r"BertConfig refuses.*use_cache"),
        ({"num_attention_heads": 5}, r"num_attention_heads 5"),
    ],
)
def test_checkpoints_that_are_no_bert_encoder_are_refused(
    checkpoint: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(edit(checkpoint, **values))


def test_pretrained_config_is_read_without_weights(checkpoint: Path) -> None:
    cfg = edit(checkpoint, gradient_checkpointing=True, dtype="float16")
    cfg.hidden_dropout = 0.3
    config = load(cfg, vocab_size=999)
    assert (config.hidden_size, config.vocab_size) == (32, 211)  # check_fit tells of the tokenizer, not this
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.1)
    assert config.dtype is None and not getattr(config, "gradient_checkpointing", False)


def test_damaged_directories_are_named(checkpoint: Path) -> None:
    cfg = ModelConfig(init="pretrained", name_or_path=str(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights.*model\.safetensors"):
        load(cfg)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        load(cfg)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json holds a list"):
        load(cfg)
    (checkpoint / "config.json").write_text('{"model_type": "bert"}')
    (checkpoint / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"lacks vocab_size, hidden_size"):
        load(cfg)
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load(cfg)


@pytest.mark.parametrize("name", ["{tmp}/none", "./none", "~/no-such-directory-of-models", "a/b/c", "none/"])
def test_missing_directories_are_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(BertConfig, "get_config_dict", lambda *_args, **_kwargs: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"model\.name_or_path: .* does not exist"):
        load(ModelConfig(init="pretrained", name_or_path=name.format(tmp=tmp_path)))


def test_hub_names_that_cannot_be_had_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"nobody/no-bert is neither a directory here nor a model that the Hugging Face hub gives"
    ):
        load(ModelConfig(init="pretrained", name_or_path="nobody/no-bert"))


@pytest.mark.parametrize("size", [30522, 30528, 30592])
def test_a_padded_vocabulary_fits(size: int) -> None:
    check_fit(BertConfig(**SIZES, vocab_size=size), vocab_size=30522, seq_len=48)


@pytest.mark.parametrize("size", [30521, 30523, 28996, 30656])
def test_another_vocabulary_does_not_fit(size: int) -> None:
    with pytest.raises(
        UserError, match=rf"{size:,} tokens does not fit the tokenizer's 30,522: .*leave model\.config\.vocab_size out"
    ):
        check_fit(BertConfig(**SIZES, vocab_size=size), vocab_size=30522, seq_len=48)


def test_rows_longer_than_the_position_table_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"data\.seq_len 49 .*at most .* 48"):
        check_fit(BertConfig(**SIZES, vocab_size=211), vocab_size=211, seq_len=49)


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
def test_vocabulary_beside_the_weights_must_be_the_tokenizers(checkpoint: Path, form: str) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]
    cfg = ModelConfig(init="pretrained", name_or_path=str(checkpoint))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    check_vocabulary(cfg, {"anything": 0})  # nothing to compare with
    if form == "vocab.txt":
        (checkpoint / form).write_text("\n".join(tokens) + "\n", encoding="utf-8")
    else:
        (checkpoint / form).write_text(
            json.dumps({"model": {"vocab": vocabulary}, "added_tokens": [{"id": 0, "content": "[PAD]"}]})
        )
    check_vocabulary(cfg, vocabulary)
    check_vocabulary(ModelConfig(config=SIZES), {"anything": 0})
    with pytest.raises(UserError, match=r"token 5 is 'c' in the first and 'a' in the second"):
        check_vocabulary(cfg, {**{t: i for t, i in vocabulary.items() if t != "a"}, "c": 5})
    with pytest.raises(UserError, match=r"token 7 is 'more' in the first and None"):
        check_vocabulary(cfg, vocabulary | {"more": 7})


def test_flops_are_those_of_the_products_that_run() -> None:
    """Against torch's own counter over forward and backward: one segment a row, a share of the positions selected."""
    config = BertConfig(**SIZES, vocab_size=211)
    rows, length, selected = 3, 16, 12
    ids = torch.ones(rows, length, dtype=torch.int64)
    module = MaskedLM(BertForMaskedLM(config), "eager")
    chosen = torch.arange(selected)
    with FlopCounterMode(display=False) as counter:
        loss, _ = module(ids, torch.arange(length).expand(rows, -1), chosen, chosen, ids)
        loss.backward()
    tokens = rows * length
    expected = counter.get_total_flops() / tokens
    assert flops_per_token(config, attended=length, selected=selected / tokens) == pytest.approx(expected, rel=1e-6)


def test_the_section_can_be_read_without_torch() -> None:
    code = "import sys, mlm_dist.model.bert; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
