"""Parameter groups and settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from mlm_dist.errors import UserError
from mlm_dist.optim import OptimConfig, build_adamw, param_groups


@pytest.fixture(scope="module")
def bert() -> BertForMaskedLM:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForMaskedLM(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes))


def test_every_parameter_is_in_one_group_and_only_matrices_decay(bert: BertForMaskedLM) -> None:
    groups = {group["name"]: group for group in param_groups(bert, 0.1)}
    assert [group["weight_decay"] for group in groups.values()] == [0.1, 0.0]
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in bert.parameters()})
    # In BERT, biases and LayerNorms are just the vectors.
    assert {p.dim() for p in groups["decay"]["params"]} == {2}
    assert {p.dim() for p in groups["no_decay"]["params"]} == {1}


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    layer = nn.Linear(3, 3)
    layer.bias.requires_grad_(False)
    assert [group["name"] for group in param_groups(layer, 0.1)] == ["decay"]


def test_adamw_gets_the_settings(bert: BertForMaskedLM) -> None:
    optimizer = build_adamw(bert, OptimConfig(lr=3e-4, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)
        assert group["weight_decay"] == decay


@pytest.mark.parametrize(
    "change",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"weight_decay": float("inf")},
        {"warmup": -0.1},
        {"warmup": 2.5},
    ],
)
def test_a_setting_that_is_not_possible_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"optim.{next(iter(change))}"):
        dataclasses.replace(OptimConfig(), **change).check()
    OptimConfig().check()
