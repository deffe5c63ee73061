"""A training script as DeepSpeed's users write it, without code of this project: what `mlm-dist checkpoint convert` takes over from and carries
off to. Forked by tests.forked, once for each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

KEYS = ("exp_avg", "exp_avg_sq")


class Wrapped(torch.nn.Module):
    """The model as a part of another."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def run(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # else compiled, for a minute
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    results = [train(**job) for job in jobs]
    dist.destroy_process_group()
    return results


def train(
    *,
    data: str,
    stage: int,
    precision: str = "fp32",
    wrap: bool = False,
    save: str | None = None,
    load: str | None = None,
    steps: list[int],
) -> dict[str, Any]:
    """Train on the batches `steps` of the file `data`; with `save` the first half of them before saving.

    Returns the losses of the steps after a save, and the state (weights and moments by name, Adam's step) at that point or after loading.
    """
    import deepspeed
    from transformers import BertConfig, BertForMaskedLM

    content = torch.load(data)
    torch.manual_seed(1)
    bert = BertForMaskedLM(BertConfig(**content["config"]))
    model = Wrapped(bert) if wrap else bert
    decay = [p for n, p in model.named_parameters() if not (n.endswith("bias") or "LayerNorm" in n)]
    rest = [p for n, p in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.01}]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "zero_allow_untested_optimizer": True,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if load:
        config["checkpoint"] = {"load_universal": True}
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=config, dist_init_required=False
    )
    if load:
        path, _ = engine.load_checkpoint(load, load_lr_scheduler_states=False)
        assert path is not None
        # At stage 3 DeepSpeed gives all sub-groups one tensor as their count, which each of them would raise at a step.
        for state in engine.basic_optimizer.state.values():
            state["step"] = state["step"].clone()
    half = len(steps) // 2 if save else 0
    for step in steps[:half]:
        one_step(engine, content["batches"][step])
    if save:
        engine.save_checkpoint(save)
    result: dict[str, Any] = {"state": state_of(engine, stage, precision)}
    result["losses"] = [one_step(engine, content["batches"][step]) for step in steps[half:]]
    engine.destroy()
    return result


def one_step(engine: Any, batch: dict[str, torch.Tensor]) -> float:
    """The mean loss over the batch's labels, of which every rank has some rows."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = {key: value[rank::world] for key, value in batch.items()}
    segments = mine["segment_ids"]
    isolated = segments[:, None, :, None] == segments[:, None, None, :]
    kind = next(engine.module.parameters()).dtype
    mask = torch.where(isolated, 0.0, torch.finfo(kind).min).to(kind)
    logits = engine(mine["input_ids"], attention_mask=mask, position_ids=mine["position_ids"]).logits
    total = F.cross_entropy(logits.float().flatten(0, 1), mine["labels"].flatten(), ignore_index=-100, reduction="sum")
    loss = total * world / (batch["labels"] != -100).sum()
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone() / world
    dist.all_reduce(mean)
    return float(mean)


def state_of(engine: Any, stage: int, precision: str) -> dict[str, Any]:
    """By name: whole fp32 weight and moments; Adam's step. At stage 0 the blocks for low precision keep them where no function reads them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, Any] = {}
    base = engine.basic_optimizer
    if stage == 0 and precision != "fp32":
        return found
    if stage in (1, 2):  # linked after the first group's first step, when the second has no moments yet
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if stage == 0:
            values = [parameter.data, *(base.state[parameter][key] for key in KEYS)]
        else:
            values = [
                safe_get_full_fp32_param(parameter),
                *(safe_get_full_optimizer_state(parameter, key) for key in KEYS),
            ]
        found[name] = [value.detach().clone().float() for value in values]
    found["step"] = [float(state["step"]) for state in base.state.values() if "step" in state]
    return found


def save_batches(path: Path, config: dict[str, Any], batches: dict[int, dict[str, torch.Tensor]]) -> str:
    """What `train` reads: BertConfig's values, and for each step input_ids, position_ids, segment_ids, labels, each [B, S]."""
    torch.save({"config": config, "batches": batches}, path)
    return str(path)
