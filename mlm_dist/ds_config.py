"""From a DeepSpeed template (`ds_configs/*.json`) and the run's own settings to the configuration that DeepSpeed gets.

A template owns mechanics: ZeRO stage, buckets, offload, timers. The run config owns what changes the result: batch,
clipping, precision, optimizer, learning rate. Each key has one owner, so a key of the run's in a template is an
error. DeepSpeed ignores unknown top-level keys without a word and has defaults that change results (clipping at 1.0),
so the whole file is checked here, and against what this program was tested with: a setting that would break a promise
(the loss, the skipped step, the portable checkpoint) is refused before anything starts.
"""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

from mlm_dist import combinations
from mlm_dist.combinations import Combination, OptimizerName, Precision
from mlm_dist.errors import UserError


@dataclass
class DeepSpeedSection:
    """Which DeepSpeed template.

    Attributes:
        config: a template's name (zero0, zero1, zero2, zero3, zero2_offload, zero3_offload) or the path of a JSON file.
    """

    config: str = "zero2"


# What a template may hold: the type of a value, or the keys of a section. "count" takes 5e8 for 500000000, as people
# write.
_OFFLOAD = {"device": ("none", "cpu"), "pin_memory": bool}
_ZERO: dict[str, Any] = {
    "stage": (0, 1, 2, 3),
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": "count",
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool,
    "allgather_bucket_size": "count",
    "overlap_comm": bool,
    "offload_optimizer": _OFFLOAD,
    "sub_group_size": "count",
    "stage3_prefetch_bucket_size": "count",
    "stage3_param_persistence_threshold": "count",
    "stage3_model_persistence_threshold": "count",
    "stage3_max_live_parameters": "count",
    "stage3_max_reuse_distance": "count",
}
_SCHEMA: dict[str, Any] = {
    "zero_optimization": _ZERO,
    "zero_force_ds_cpu_optimizer": (False,),
    "communication_data_type": ("fp32", "bf16"),
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "prof_ops": list, "debug": bool},
    "flops_profiler": {
        "enabled": bool,
        "profile_step": "count",
        "module_depth": int,
        "top_modules": "count",
        "detailed": bool,
        "output_file": str,
    },
}

# Keys of DeepSpeed's whose owner is the run config.
_OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "managed_gradient_accumulation": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.clip",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim.warmup and optim.schedule",
    "activation_checkpointing": "model.checkpoint_activations",
    "checkpoint": "checkpoint",
    "wandb": "track.wandb",
    "tensorboard": "track",
    "csv_monitor": "track",
    "comet": "track",
    "steps_per_print": "track.every",
}

# Keys that DeepSpeed knows and this program refuses, and why.
_REFUSED = {
    "offload_param": "restoring a checkpoint into parameters kept on the host is not tested; offload_optimizer is",
    "compute_grad_norm": "the norm decides whether a step is skipped",
    "gradient_allreduce_op": "the loss is scaled for gradients averaged over ranks",
    "prescale_gradients": "the loss is scaled for gradients averaged over ranks",
    "gradient_predivide_factor": "the loss is scaled for gradients averaged over ranks",
    "round_robin_gradients": "DeepSpeed then mixes up which state belongs to which parameter",
    "stage3_module_granularity_threshold": "gathering whole modules fails on the bias that BERT's head ties",
    "zero_hpz_partition_size": "restoring a checkpoint into a secondary partition is not tested",
    "zero_quantized_weights": "quantized weights change the result",
    "zero_quantized_nontrainable_weights": "quantized weights change the result",
    "zero_quantized_gradients": "quantized gradients change the result",
    "zenflow": "it delays updates, and restoring its state is not tested",
    "zero_allow_untested_optimizer": "optim.name knows which optimizers go with which stage",
    "sparse_gradients": "BERT's embedding is tied to its decoder, so its gradient is dense",
}


def template_names() -> list[str]:
    """The names of the templates that come with the program."""
    return sorted(path.name.removesuffix(".json") for path in _templates().iterdir() if path.name.endswith(".json"))


def load_template(name_or_path: str) -> dict[str, Any]:
    """Reads and checks a template, by the name of one that comes with the program or by path (which has a `.json` or
    a slash).

    Raises UserError for a missing file, broken JSON, an unknown key anywhere (naming the nearest right one), a key
    that the run config owns, a value of the wrong type, and a combination that this program does not support.
    """
    if name_or_path.endswith(".json") or "/" in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise UserError(f"deepspeed.config: there is no file {name_or_path!r}")
        data = path.read_bytes()
    else:
        names = template_names()
        if name_or_path not in names:
            raise UserError(
                f"deepspeed.config: there is no template {name_or_path!r}{_nearest(name_or_path, names)}; "
                f"there are {', '.join(names)}, or give the path of a .json file"
            )
        data = (_templates() / f"{name_or_path}.json").read_bytes()
    try:
        template = json.loads(data, object_pairs_hook=_no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"deepspeed.config: {name_or_path!r} is not JSON: {error}") from None
    return check_template(template)


def check_template(template: Any) -> dict[str, Any]:
    """The template with whole floats made integers; raises UserError as load_template() does."""
    if not isinstance(template, dict):
        raise UserError(f"deepspeed.config: a template is a JSON object, got {type(template).__name__}")
    for key in template:
        if key in _OWNED:
            raise UserError(f"deepspeed.config: {key!r} belongs to the run config; take it out and set {_OWNED[key]}")
    checked: dict[str, Any] = _check_section(template, _SCHEMA, "")
    zero = checked.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    if zero.get("offload_optimizer", {}).get("device", "none") == "none":
        zero.pop("offload_optimizer", None)
    elif zero["stage"] == 0:
        combinations.check(Combination(0, True, "fp32", "adamw"))
    elif checked.get("zero_force_ds_cpu_optimizer") is not False:
        raise UserError(
            "deepspeed.config: zero_optimization.offload_optimizer needs "
            '"zero_force_ds_cpu_optimizer": false at the top level '
            "(DeepSpeed would insist on its own CPU Adam, which needs a compiler; the optimizer is optim.name's)"
        )
    return checked


def merge(
    template: dict[str, Any],
    *,
    precision: Precision,
    clip: float,
    micro_batch: int,
    optimizer: OptimizerName = "adamw",
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        template: from load_template().
        precision: `bf16` and `fp16` run matrix products in that type under torch.autocast, weights, gradients and
            optimizer state staying fp32; the engine scales the losses of fp16. `bf16_pure` is DeepSpeed's `bf16` block:
            weights, activations and each micro-batch's gradients in bfloat16, the sum of gradients and the weights
            that are stepped in fp32 (measured 30 times farther from fp32 than `bf16`).
        clip: global L2 norm to clip gradients at; 0 is off. Always written, as DeepSpeed's default is 1.0.
        micro_batch: rows of a micro-batch on a rank. DeepSpeed uses it in its timers only.
        optimizer: which one the engine will hand to DeepSpeed.

    `gradient_accumulation_steps` is 1 whatever the run accumulates: the engine tells DeepSpeed at each micro-batch
    whether it is a step's last and scales the loss itself, so the number may differ from step to step and DeepSpeed
    must divide by nothing.

    Raises UserError for a setting that is not possible, and for settings that do not go together.
    """
    config = check_template(copy.deepcopy(template))
    zero = config["zero_optimization"]
    if not clip >= 0:
        raise UserError(f"train.clip: {clip!r} is not possible; it must be a norm above 0, or 0 for no clipping")
    if micro_batch < 1:
        raise UserError(f"train.micro_batch: {micro_batch!r} is not possible; it must be at least 1")
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise UserError(f"train.precision: {precision!r} is not possible; it must be one of {known}")
    combinations.check(Combination(zero["stage"], "offload_optimizer" in zero, precision, optimizer))
    config.update(
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=1,
        gradient_clipping=float(clip),
        steps_per_print=2**62,
    )
    config.update(_precision_sections(precision, config.pop("communication_data_type", "fp32")))
    return config


def _precision_sections(precision: Precision, reduce_in: str) -> dict[str, Any]:
    """DeepSpeed's keys for a precision; gradients are reduced over ranks in `reduce_in`, the template's to choose."""
    if reduce_in == "bf16" and precision == "fp16":
        raise UserError(
            'deepspeed.config: communication_data_type "bf16" cannot be had with train.precision fp16; take it out'
        )
    if precision == "fp32":
        return {"communication_data_type": reduce_in}
    if precision == "bf16_pure":
        return {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": reduce_in,
        }
    autocast: dict[str, Any] = {"enabled": True, "dtype": "bfloat16" if precision == "bf16" else "float16"}
    # The modules named here (by default every Linear) have their gradients reduced, and at stage 3 their weights
    # gathered, in the lower precision: half the traffic, but the sum over ranks is rounded at each addition.
    if reduce_in == "fp32":
        autocast["lower_precision_safe_modules"] = []
    return {"torch_autocast": autocast}


def _templates() -> Traversable:
    return files("mlm_dist") / "ds_configs"


def _check_section(section: dict[str, Any], schema: dict[str, Any], prefix: str) -> dict[str, Any]:
    checked = {}
    for key, value in section.items():
        if key in _REFUSED:
            raise UserError(f"deepspeed.config: {prefix}{key} is not supported: {_REFUSED[key]}")
        if key not in schema:
            raise UserError(
                f"deepspeed.config: unknown key {prefix + key!r}{_nearest(key, [*schema, *(() if prefix else _OWNED)])}"
            )
        checked[key] = _check_value(value, schema[key], f"{prefix}{key}")
    return checked


def _check_value(value: Any, kind: Any, name: str) -> Any:
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise UserError(f"deepspeed.config: {name} must be a section {{...}}, got {value!r}")
        return _check_section(value, kind, f"{name}.")
    if isinstance(kind, tuple):
        if not any(value == right and type(value) is type(right) for right in kind):
            raise UserError(
                f"deepspeed.config: {name} must be {' or '.join(json.dumps(k) for k in kind)}, got {value!r}"
            )
        return value
    if kind == "count":
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value % 1 == 0
        if not whole:
            raise UserError(f"deepspeed.config: {name} must be a whole number, at least 0, got {value!r}")
        return int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"deepspeed.config: {name} must be {_TYPE_NAMES[kind]}, got {value!r}")
    return value


_TYPE_NAMES = {bool: "true or false", int: "an integer", str: "a text", list: "a list"}


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise UserError(f"deepspeed.config: {', '.join(sorted(twice))} is given twice in one section")
    return dict(pairs)
