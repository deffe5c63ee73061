"""Templates and their merging with the run's settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.ds_config import load_template, merge, template_names
from mlm_dist.errors import UserError


def write(path: Path, content: Any) -> str:
    file = path / "template.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_the_templates_are_those_that_the_manual_names() -> None:
    names = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert template_names() == names
    assert [load_template(name)["zero_optimization"]["stage"] for name in names] == [0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", template_names())
def test_deepspeed_itself_accepts_every_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    merged = merge(load_template(name), precision="fp32", clip=1.0, micro_batch=4)
    stage = merged["zero_optimization"]["stage"]
    assert DeepSpeedZeroConfig(**merged["zero_optimization"]).stage == stage


def test_the_runs_settings_are_always_written() -> None:
    template = load_template("zero2")
    before = json.dumps(template)
    merged = merge(template, precision="fp32", clip=0.0, micro_batch=8)
    # DeepSpeed's default would clip at 1.0.
    assert merged["gradient_clipping"] == 0.0
    assert (merged["train_micro_batch_size_per_gpu"], merged["gradient_accumulation_steps"]) == (8, 1)
    assert "torch_autocast" not in merged
    assert json.dumps(template) == before
    assert json.loads(json.dumps(merged)) == merged


def test_bf16_reduces_in_fp32_unless_the_template_asks() -> None:
    exact = merge(load_template("zero1"), precision="bf16", clip=1.0, micro_batch=1)["torch_autocast"]
    assert exact == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    asked = load_template("zero1") | {"communication_data_type": "bf16"}
    merged = merge(asked, precision="bf16", clip=1.0, micro_batch=1)
    assert merged["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


def test_pure_bf16_sums_gradients_in_fp32() -> None:
    merged = merge(load_template("zero1"), precision="bf16_pure", clip=1.0, micro_batch=1)
    assert merged["bf16"] == {"enabled": True}
    assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
    assert merged["communication_data_type"] == "fp32"
    assert "torch_autocast" not in merged


def test_fp16_is_autocast_and_cannot_be_reduced_in_bf16() -> None:
    merged = merge(load_template("zero3"), precision="fp16", clip=1.0, micro_batch=1)
    assert merged["torch_autocast"] == {"enabled": True, "dtype": "float16", "lower_precision_safe_modules": []}
    with pytest.raises(UserError, match=r"communication_data_type .*fp16"):
        merge(load_template("zero1") | {"communication_data_type": "bf16"}, precision="fp16", clip=1.0, micro_batch=1)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"zero_optimisation": {"stage": 1}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stge": 1}}, "'zero_optimization.stge'; did you mean 'stage'"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "offload_optimizer.devise'; did you mean 'dev",
        ),
        ({"gradient_clippin": 1.0}, "did you mean 'gradient_clipping'"),
        ({"qqq": 1}, "unknown key 'qqq'$"),
        ({"gradient_clipping": 1.0}, "'gradient_clipping' belongs to the run config; take it out and set train.clip"),
        ({"bf16": {"enabled": True}}, "set train.precision"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "set train.micro_batch"),
        ({"optimizer": {"type": "AdamW"}}, "set optim"),
        ({"zero_optimization": {"stage": 4}}, "stage must be 0 or 1 or 2 or 3, got 4"),
        ({"zero_optimization": {"stage": True}}, "stage must be"),
        ({"zero_optimization": {"stage": "2"}}, "stage must be"),
        ({"zero_optimization": 2}, "zero_optimization must be a section"),
        ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "reduce_bucket_size must be a whole number.*got 1.5"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "must be a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "must be a whole number"),
        ({"zero_optimization": {"overlap_comm": 1}}, "overlap_comm must be true or false, got 1"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients is not supported: "),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param is not supported"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, 'must be "none" or "cpu"'),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs .*stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "zero_force_ds_cpu_optimizer"),
        ("{nonsense", "is not JSON"),
        ("[1, 2]", "a template is a JSON object, got list"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage is given twice"),
    ],
)
def test_a_mistake_is_named(template: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_template(write(tmp_path, template))


def test_a_template_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no template 'zero22'; did you mean 'zero2'"):
        load_template("zero22")
    missing = str(tmp_path / "none.json")
    with pytest.raises(UserError, match=re.escape(missing)):
        load_template(missing)


def test_numbers_as_people_write_them_become_integers(tmp_path: Path) -> None:
    text = '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}'
    size = load_template(write(tmp_path, text))["zero_optimization"]["reduce_bucket_size"]
    assert (size, type(size)) == (500_000_000, int)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clip": -1.0}, "train.clip"),
        ({"clip": float("nan")}, "train.clip"),
        ({"micro_batch": 0}, "train.micro_batch"),
        ({"precision": "fp8"}, "train.precision: 'fp8' .*fp32, bf16, bf16_pure, fp16"),
    ],
)
def test_a_setting_of_the_runs_that_is_not_possible_is_named(change: dict[str, Any], said: str) -> None:
    settings: dict[str, Any] = {"precision": "fp32", "clip": 1.0, "micro_batch": 1} | change
    with pytest.raises(UserError, match=said):
        merge(load_template("zero0"), **settings)
