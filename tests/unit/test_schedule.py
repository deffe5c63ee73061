"""The learning rate: transformers' schedules where it has them, and what no schedule may do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mlm_dist.config import load
from mlm_dist.errors import UserError
from mlm_dist.schedule import ScheduleConfig, lr_factor
from tests.ranks import ROOT

# Ours, and transformers' for a run of `steps` with a warm-up of `warmup` and a decay of `decay` steps.
REFERENCES: list[tuple[dict[str, Any], Callable[[Any, int, int, int], Any]]] = [
    (
        {"schedule": "linear"},
        lambda o, warmup, decay, steps: transformers.get_linear_schedule_with_warmup(o, warmup, steps),
    ),
    (
        {"schedule": "linear", "final": 0.25},
        lambda o, warmup, decay, steps: transformers.get_polynomial_decay_schedule_with_warmup(
            o, warmup, steps, lr_end=0.25
        ),
    ),
    (
        {"schedule": "cosine"},
        lambda o, warmup, decay, steps: transformers.get_cosine_schedule_with_warmup(o, warmup, steps),
    ),
    (
        {"schedule": "cosine", "final": 0.1},
        lambda o, warmup, decay, steps: transformers.get_cosine_with_min_lr_schedule_with_warmup(
            o, warmup, steps, min_lr_rate=0.1
        ),
    ),
    (
        {"schedule": "constant"},
        lambda o, warmup, decay, steps: transformers.get_constant_schedule_with_warmup(o, warmup),
    ),
    (
        {"schedule": "inverse_sqrt"},
        lambda o, warmup, decay, steps: transformers.get_inverse_sqrt_schedule(o, warmup),
    ),
    *(
        (
            {"schedule": "wsd", "decay_shape": ours},
            lambda o, warmup, decay, steps, theirs=theirs: transformers.get_wsd_schedule(
                o, warmup, decay, num_training_steps=steps, decay_type=theirs
            ),
        )
        for ours, theirs in (("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt"))
    ),
]


def config(warmup: float = 0.0, decay: float = 0.0, **values: Any) -> ScheduleConfig:
    made = ScheduleConfig(warmup=warmup, decay=decay if values["schedule"] == "wsd" else None, **values)
    made.check_schedule()
    return made


@pytest.mark.parametrize(("ours", "theirs"), REFERENCES)
@given(warmup=st.integers(0, 60), stable=st.integers(1, 60), decay=st.integers(1, 60))
def test_in_steps_it_is_the_schedule_of_transformers(
    ours: dict[str, Any], theirs: Callable[..., Any], warmup: int, stable: int, decay: int
) -> None:
    steps = warmup + stable + decay
    scheduler = theirs(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), warmup, decay, steps)
    (expected,) = scheduler.lr_lambdas
    for step in range(steps):
        got = lr_factor(step, step / steps, config(float(warmup), float(decay), **ours))
        # The root makes 1e-8 of a rounding of 1e-16 where a decay begins.
        assert got == pytest.approx(expected(step), abs=1e-7)


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    schedule = draw(st.sampled_from(["linear", "cosine", "inverse_sqrt", "constant", "wsd"]))
    lengths = st.one_of(st.floats(0.001, 0.5), st.integers(1, 20_000).map(float))
    decay = draw(lengths) if schedule == "wsd" or (schedule == "inverse_sqrt" and draw(st.booleans())) else None
    made = ScheduleConfig(
        warmup=draw(st.just(0.0) | lengths),
        schedule=schedule,
        decay=decay,
        decay_shape=draw(st.sampled_from(["linear", "cosine", "sqrt"])) if decay else "linear",
        final=draw(st.floats(0, 1)) if decay or schedule in ("linear", "cosine") else 0.0,
    )
    made.check_schedule()
    return made


@given(config=schedules(), step=st.integers(0, 10_000), progress=st.floats(0, 1))
def test_the_factor_is_always_between_0_and_1(config: ScheduleConfig, step: int, progress: float) -> None:
    assert 0.0 <= lr_factor(step, progress, config) <= 1.0


@given(config=schedules(), steps=st.integers(1, 3000), data=st.data())
def test_it_rises_then_falls_to_what_is_final(config: ScheduleConfig, steps: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps - 1))
    here, after = (lr_factor(s, s / steps, config) for s in (step, step + 1))
    warming = step < (config.warmup if config.warmup >= 1 else config.warmup * steps)
    assert warming or after <= here + 1e-7
    end = lr_factor(steps, 1.0, config)
    if config.warmup < steps and (config.decay or config.schedule in ("linear", "cosine")):
        assert end <= config.final + 1e-7  # and inverse_sqrt has fallen besides
        assert config.schedule == "inverse_sqrt" or end == pytest.approx(config.final, abs=1e-7)


@given(rate=st.floats(0.5, 2.0), steps=st.integers(100, 2000), schedule=st.sampled_from(["linear", "cosine", "wsd"]))
def test_a_run_of_epochs_has_the_schedule_of_its_steps(rate: float, steps: int, schedule: Any) -> None:
    """However many steps it turns out to be: lengths in steps, while its pace wavers about the mean."""
    made = ScheduleConfig(warmup=10.0, schedule=schedule, decay=20.0 if schedule == "wsd" else None, final=0.1)
    for step in range(steps):
        # Bytes of a step differ, so that progress is not quite the share of the steps.
        share = step / steps
        progress = share * (1 + 0.02 * (rate - 1) * (1 - share))
        assert lr_factor(step, progress, made) == pytest.approx(lr_factor(step, share, made), abs=0.06)
    assert lr_factor(steps, 1.0, made) == pytest.approx(0.1)


def test_fractions_are_of_the_run() -> None:
    points = (0.0, 0.05, 0.1, 0.55, 0.8, 0.9, 1.0)
    got = {s: [lr_factor(0, p, config(0.1, 0.2, schedule=s)) for p in points] for s in ("linear", "constant", "wsd")}
    assert got["linear"] == pytest.approx([0.0, 0.5, 1.0, 0.5, 2 / 9, 1 / 9, 0.0])
    assert got["constant"] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert got["wsd"] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0])
    cooled = ScheduleConfig(warmup=0.25, schedule="inverse_sqrt", decay=0.5)
    assert [lr_factor(0, p, cooled) for p in (0.25, 0.36, 0.5, 0.75)] == pytest.approx(
        [1.0, 5 / 6, 0.5**0.5, 0.5 / 3**0.5]
    )
    assert lr_factor(0, 0.0, config(schedule="linear")) == 1.0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"warmup": -0.1}, "warmup"),
        ({"warmup": 2.5}, "warmup"),
        ({"schedule": "wsd"}, "decay"),
        ({"schedule": "wsd", "decay": 0.0}, "decay"),
        ({"schedule": "wsd", "decay": 1.5}, "decay"),
        ({"schedule": "wsd", "decay": 0.6, "warmup": 0.5}, "decay"),
        ({"schedule": "linear", "decay": 0.1}, "decay"),
        ({"schedule": "cosine", "decay_shape": "sqrt"}, "decay_shape"),
        ({"schedule": "constant", "final": 0.1}, "final"),
        ({"schedule": "linear", "final": 1.5}, "final"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"^optim.{field}: "):
        dataclasses.replace(ScheduleConfig(), **change).check_schedule()
    ScheduleConfig().check_schedule()


@pytest.mark.parametrize(("warmup", "decay"), [(10.0, 90.0), (0.5, 50.0), (10.0, 0.9)])
def test_warmup_and_decay_must_fit_into_the_run(warmup: float, decay: float) -> None:
    made = ScheduleConfig(warmup=warmup, schedule="wsd", decay=decay)
    made.check_steps(100)
    with pytest.raises(UserError, match=r"^optim.decay: .*99 steps; shorten them, or raise train.steps"):
        dataclasses.replace(made, warmup=warmup + (1 if warmup >= 1 else 0.02)).check_steps(99)


def test_the_recipes_of_two_phases_are_one_line_of_a_million_steps() -> None:
    first, second = (load(["--config", str(ROOT / "recipes" / f"bert_base_phase{n}.yaml")]).config for n in (1, 2))
    assert first.train.steps == 900_000 and second.train.steps == 100_000
    one = load(["--config", str(ROOT / "recipes" / "bert_base.yaml")]).config.optim
    for config, begins in ((first, 0), (second, 900_000)):
        for share in (0.02, 0.3, 0.6, 0.9, 0.999):
            step = int(share * config.train.steps)
            wanted = one.lr * lr_factor(begins + step, (begins + step) / 1e6, one)
            got = config.optim.lr * lr_factor(step, step / config.train.steps, config.optim)
            assert got == pytest.approx(wanted, rel=0.02)
