"""Rows for new tokens: what they are, what they change before any training, and when a checkpoint needs them."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from mlm_dist.errors import UserError
from mlm_dist.model.bert import ModelConfig, build, find_new_tokens, load_config
from mlm_dist.model.new_tokens import NewTokens, add_tokens
from tests.corpora import save_tokenizer

SIZE = 211
PIECES = ((7, 9), (210, 3, 3, 150, 11), (1, 2, 8))
NEW = NewTokens(SIZE, PIECES)


def model_of(rows: int, seed: int = 3) -> BertForMaskedLM:
    """A tiny BERT in which no bias is 0."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save(directory: Path, rows: int) -> ModelConfig:
    model_of(rows).save_pretrained(directory)
    return ModelConfig(init="pretrained", name_or_path=str(directory), hidden_dropout=0.0, attention_dropout=0.0)


def extended(cfg: ModelConfig, new: NewTokens = NEW, seed: int = 0) -> BertForMaskedLM:
    config = load_config(cfg, vocab_size=None, pad_token_id=0)
    config.vocab_size = new.rows(config.vocab_size)
    return build(cfg, config, seed=seed, new_tokens=new)


def mean(values: Tensor, pieces: tuple[int, ...]) -> Tensor:
    return torch.stack([values[piece] for piece in pieces]).mean(0)


@pytest.mark.parametrize("stored", [SIZE, 256])
def test_rows_are_the_means_of_their_pieces_to_the_bit(tmp_path: Path, stored: int) -> None:
    cfg = save(tmp_path, stored)
    before, after = build(cfg, load_config(cfg, vocab_size=None, pad_token_id=0), seed=0), extended(cfg)
    old, new = before.state_dict(), after.state_dict()
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        assert torch.equal(new[name][:SIZE], old[name][:SIZE])
        for row, pieces in enumerate(PIECES, SIZE):
            assert torch.equal(new[name][row], mean(old[name], pieces)), (name, row)
        assert torch.equal(new[name][SIZE + len(PIECES) :], old[name][SIZE + len(PIECES) :])  # padding stays in place
    tied = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert new.keys() == old.keys()
    assert all(torch.equal(new[k], old[k]) for k in old if k not in {*tied, *tied.values()})
    parameters = dict(after.named_parameters(remove_duplicate=False))
    for name, owner in tied.items():
        assert parameters[name] is parameters[owner] and parameters[name].requires_grad
    assert after.config.vocab_size == len(parameters["cls.predictions.bias"]) == (214 if stored == SIZE else 256)
    assert (
        after.get_input_embeddings().num_embeddings
        == after.get_output_embeddings().out_features
        == len(parameters["cls.predictions.bias"])
    )
    assert after.training and after.get_input_embeddings().padding_idx == 0


@pytest.mark.parametrize(("size", "stored", "rows"), [(211, 256, 384), (150, 192, 320)])
def test_a_padded_table_stays_padded_to_its_multiple(size: int, stored: int, rows: int) -> None:
    new = NewTokens(size, ((5, 6),) * 110)
    assert new.rows(stored) == rows
    model = model_of(stored)
    table = model.get_input_embeddings().weight.detach().clone()
    bias = model.cls.predictions.bias.detach().clone()
    add_tokens(model, new)
    assert len(model.cls.predictions.bias) == rows
    for index in range(new.vocab_size, rows):
        like = size + (index - size) % (stored - size)  # a row that padded the old table, the same where there was one
        assert torch.equal(model.get_input_embeddings().weight[index], table[like])
        assert torch.equal(model.cls.predictions.bias[index], bias[like])


def test_before_training_old_logits_stay_and_new_ones_are_means(tmp_path: Path) -> None:
    """So the loss on an old token grows by exactly log(1 + what the new ones add to the softmax's sum)."""
    cfg = save(tmp_path, SIZE)
    before = build(cfg, load_config(cfg, vocab_size=None, pad_token_id=0), seed=0)
    after = extended(cfg)
    ids = torch.randint(1, SIZE, (4, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(1, SIZE, (4, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(before.bert(ids).last_hidden_state, after.bert(ids).last_hidden_state)
        old, new = before(ids).logits.double(), after(ids).logits.double()
    torch.testing.assert_close(new[..., :SIZE], old, atol=1e-6, rtol=1e-6)
    for row, pieces in enumerate(PIECES, SIZE):
        torch.testing.assert_close(new[..., row], old[..., list(pieces)].mean(-1), atol=1e-5, rtol=1e-5)
        assert (new[..., row] <= old[..., list(pieces)].amax(-1) + 1e-5).all()
    losses = [F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none") for x in (old, new)]
    more = torch.log1p(new[..., SIZE:].exp().sum(-1) / old.exp().sum(-1)).flatten()
    torch.testing.assert_close(losses[1], losses[0] + more, atol=1e-5, rtol=1e-5)
    assert 0 < more.max() < math.log(2)


def test_the_same_whatever_the_seed_and_the_global_generator(tmp_path: Path) -> None:
    cfg = save(tmp_path, SIZE)
    torch.manual_seed(1)
    first = extended(cfg, seed=4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = extended(cfg, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_checkpoint_needs_them_if_its_vocabulary_lacks_them(tmp_path: Path) -> None:
    size = len(AutoTokenizer.from_pretrained(save_tokenizer(tmp_path)))
    cfg = ModelConfig(init="pretrained", name_or_path=str(tmp_path))
    assert find_new_tokens(cfg, size, size, PIECES) == NewTokens(size, PIECES)
    assert find_new_tokens(cfg, 128, size, PIECES) == NewTokens(size, PIECES)  # its table may be padded
    assert find_new_tokens(cfg, size, size - len(PIECES), PIECES) is None  # trained with the extended one
    assert find_new_tokens(cfg, size, size + 1, PIECES) is None  # another base: check_vocabulary says so
    assert find_new_tokens(ModelConfig(), size, size, PIECES) is None


def test_without_a_vocabulary_the_size_decides(tmp_path: Path) -> None:
    cfg = ModelConfig(init="pretrained", name_or_path=str(tmp_path))
    assert find_new_tokens(cfg, SIZE, SIZE, PIECES) == NEW
    assert find_new_tokens(cfg, SIZE + len(PIECES), SIZE, PIECES) is None
    assert find_new_tokens(cfg, 320, SIZE, PIECES) is None
    message = re.escape(f"the 256 embeddings of {tmp_path} may be those of 211 tokens or of 214; give a directory")
    with pytest.raises(UserError, match=message):
        find_new_tokens(cfg, 256, SIZE, PIECES)
