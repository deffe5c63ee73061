"""``mlm-dist checkpoint convert --to deepspeed``: a checkpoint in DeepSpeed's *universal* format, which an engine of ZeRO stage 1, 2 or 3 on any
number of ranks loads with ``"checkpoint": {"load_universal": true}``. Written as DeepSpeed 0.19.8 reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlm_dist import checkpoint
from mlm_dist.checkpoint import CheckpointError, Reader
from mlm_dist.errors import UserError
from mlm_dist.optim import STATE_KEYS

# DeepSpeed pairs groups with the script's by their order and goes on for as many as both have; these say nothing, so that
# the script's own hyperparameters stay, whatever its groups are.
_GROUPS = 64


def write(source: Path, dest: Path, prefix: str) -> tuple[Path, list[str]]:
    """Write the checkpoint that ``source`` stands for (of a run the newest whole one) into the new directory ``dest``.

    Args:
        prefix: put before BertForMaskedLM's parameter names, for a script that wraps the model: ``model.``.

    Returns:
        The directory of the tag, and what the user should know.

    Raises:
        UserError: there is no whole checkpoint, its optimizer is not Adam, or ``dest`` is not empty or cannot be written.
    """
    try:
        reader = Reader(checkpoint.locate(source))
        if reader.optimizer["class"] != "AdamW":
            raise UserError(f"{reader.path}: its optimizer is {reader.optimizer['class']}; only AdamW's state converts")
        if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
            raise UserError(f"{dest}: exists and is not empty; give a new directory")
        directory = dest / f"global_step{reader.step}_universal"
        _write(reader, directory, prefix)
        (dest / "latest_universal").write_text(directory.name)  # last: without it the directory is none
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{dest}: cannot be written ({error.strerror or error})") from error
    return directory, [
        f"{len(reader.names())} weights with Adam's moments after step {reader.step}, from {reader.path}",
        'load it with "checkpoint": {"load_universal": true} at ZeRO stage 1, 2 or 3 on any number of ranks: '
        f"engine.load_checkpoint({str(dest)!r}, load_lr_scheduler_states=False)",
        "learning rate, weight decay, betas and eps are the script's own; data and schedule do not come over",
        'at stage 3 DeepSpeed lets its sub-groups share one count of steps; after loading: for s in engine.basic_optimizer.state.values(): s["step"] = '
        's["step"].clone()',
    ]


def _write(reader: Reader, directory: Path, prefix: str) -> None:
    import deepspeed
    import torch

    adam_step = int(reader.optimizer["step"])
    zero = directory / "zero"
    for name in reader.names():
        folder = zero / (prefix + name)
        folder.mkdir(parents=True)
        torch.save({"param": reader.parameter(name)}, folder / "fp32.pt")
        for key in STATE_KEYS:
            torch.save({"param": reader.state(key, name)}, folder / f"{key}.pt")
        torch.save(torch.tensor(float(adam_step)), folder / "step.pt")
    empty: dict[str, Any] = {"params": []}
    # For stages 1 and 2 the outer keys, for stage 3 the inner.
    inner = {"state": {0: {"step": torch.tensor(float(adam_step))}}, "param_groups": [empty]}
    version = {"ds_version": deepspeed.__version__}
    torch.save(
        {"optimizer_state_dict": inner, "param_groups": [empty] * _GROUPS, **version}, zero / "optimizer_state.pt"
    )
    common = {
        "module": {},
        "lr_scheduler": None,
        "global_steps": reader.step,
        "skipped_steps": reader.trainer.get("skipped", 0),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "mlm_dist": {"step": reader.step, "tokens": reader.trainer.get("tokens")},
        **version,
    }
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # stages 1 and 2; 3
        torch.save(common, directory / file)
