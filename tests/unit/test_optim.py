"""Parameter groups and the learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForMaskedLM, get_linear_schedule_with_warmup

from mlm_dist.errors import UserError
from mlm_dist.optim import OptimConfig, Schedule, build_adamw, build_optimizer, lr_factor, param_groups


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


State = dict[str, torch.Tensor]
Update = Callable[[torch.Tensor, torch.Tensor, State, int, float, OptimConfig], torch.Tensor]


def lamb(
    weight: torch.Tensor, grad: torch.Tensor, state: State, step: int, decay: float, o: OptimConfig
) -> torch.Tensor:
    """You et al. 2020, algorithm 2, without Adam's correction; biases and norms as in Adam, as in the authors' code."""
    beta1, beta2 = o.betas
    state["m"] = beta1 * state["m"] + (1 - beta1) * grad
    state["v"] = beta2 * state["v"] + (1 - beta2) * grad**2
    update = state["m"] / (state["v"].sqrt() + o.eps) + decay * weight
    ratio = weight.norm() / update.norm() if decay else 1.0
    return weight - o.lr * ratio * update


def stable_adamw(
    weight: torch.Tensor, grad: torch.Tensor, state: State, step: int, decay: float, o: OptimConfig
) -> torch.Tensor:
    """Wortsman et al. 2023, algorithm 2."""
    beta1, beta2 = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in o.betas)
    state["m"] = beta1 * state["m"] + (1 - beta1) * grad
    state["v"] = beta2 * state["v"] + (1 - beta2) * grad**2
    rms = (grad**2 / state["v"].clamp(min=o.eps**2)).mean().sqrt()
    lr = o.lr / max(1.0, float(rms))
    return weight - lr * decay * weight - lr * state["m"] / (state["v"].sqrt() + o.eps)


@pytest.mark.parametrize(("name", "update"), [("lamb", lamb), ("stable_adamw", stable_adamw)])
def test_the_librarys_optimizers_step_as_their_papers_say(name: Any, update: Update) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(30, 40), nn.LayerNorm(40)).double()
    with torch.no_grad():
        module[0].weight.mul_(20)  # of norm above 10
    config = OptimConfig(name=name, lr=0.02, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(module, config)
    expected = {n: p.detach().clone() for n, p in module.named_parameters()}
    states = {n: {"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for n, p in expected.items()}
    for step in range(1, 8):
        for n, parameter in module.named_parameters():
            # One step of far larger gradients, which StableAdamW is for.
            parameter.grad = torch.randn_like(parameter) * (50.0 if step == 5 else 0.1)
            decay = config.weight_decay if n == "0.weight" else 0.0
            expected[n] = update(expected[n], parameter.grad, states[n], step, decay, config)
        optimizer.step()
        for n, parameter in module.named_parameters():
            # The library adds eps to the norm that LAMB divides by.
            torch.testing.assert_close(parameter.detach(), expected[n], rtol=1e-6, atol=1e-7)
            state = optimizer.state[parameter]
            torch.testing.assert_close(state["exp_avg"], states[n]["m"])
            torch.testing.assert_close(state["exp_avg_sq"], states[n]["v"])


def test_an_optimizer_that_is_not_there_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("lamb", "stable_adamw"):
        with pytest.raises(UserError, match=f"optim.name: {name} .*pip install 'mlm-dist\\[optim\\]'"):
            OptimConfig(name=name).check()  # type: ignore[arg-type]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"optim.name: cpu_adam .*'no-such-compiler'.*adamw"):
        OptimConfig(name="cpu_adam").check()
    OptimConfig(name="adamw").check()


@given(steps=st.integers(1, 300), warmup=st.integers(1, 300))
def test_linear_in_steps_is_the_schedule_of_transformers(steps: int, warmup: int) -> None:
    warmup = min(warmup, steps)
    reference = get_linear_schedule_with_warmup(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), warmup, steps)
    (expected,) = reference.lr_lambdas
    for step in range(steps):
        got = lr_factor(step, step / steps, warmup=float(warmup), schedule="linear")
        # 1.0 is a fraction of nothing, so one step of warm-up stays in steps.
        assert got == pytest.approx(expected(step), abs=1e-9)


@given(
    step=st.integers(0, 10_000),
    progress=st.floats(0, 1),
    warmup=st.one_of(st.floats(0, 0.999), st.integers(1, 20_000).map(float)),
    schedule=st.sampled_from(["linear", "constant"]),
)
def test_the_factor_is_always_between_0_and_1(step: int, progress: float, warmup: float, schedule: Schedule) -> None:
    assert 0.0 <= lr_factor(step, progress, warmup=warmup, schedule=schedule) <= 1.0


def test_a_fraction_warms_up_over_that_part_of_the_run() -> None:
    points = (0.0, 0.05, 0.1, 0.55, 1.0)
    linear = [lr_factor(0, p, warmup=0.1, schedule="linear") for p in points]
    assert linear == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])
    constant = [lr_factor(0, p, warmup=0.1, schedule="constant") for p in points]
    assert constant == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    assert lr_factor(0, 0.0, warmup=0.0, schedule="linear") == 1.0


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
