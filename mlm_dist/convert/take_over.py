"""``mlm-dist checkpoint convert --from deepspeed``: a training from elsewhere becomes a run directory that ``mlm-dist train`` goes on in."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_dist import checkpoint
from mlm_dist.config import Config
from mlm_dist.convert import deepspeed_files, deepspeed_state
from mlm_dist.convert.deepspeed_state import State
from mlm_dist.errors import UserError
from mlm_dist.inputs import Inputs
from mlm_dist.lifecycle import RunDir, StopFlag
from mlm_dist.optim import CLASSES, STATE_KEYS, group_meta
from mlm_dist.start import write_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 20


def match_names(theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """For each of our parameters the name of theirs: the same, or one that ends in the other where the model was wrapped.

    Args:
        theirs, ours: shape by name.

    Raises:
        UserError: a name of either side has no partner, or more than one; lists them. Or a shape differs.
    """

    def ends(name: str, end: str) -> bool:
        return name == end or name.endswith("." + end)

    partners = {name: [their for their in theirs if ends(their, name) or ends(name, their)] for name in ours}
    unmatched = [name for name, found in partners.items() if len(found) != 1]
    taken = [found[0] for found in partners.values() if len(found) == 1]
    extra = [their for their in theirs if taken.count(their) != 1]
    if unmatched or extra:
        raise UserError(
            "the parameters' names do not match one to one.\n"
            + _listing("this program's without a partner, or with several", unmatched)
            + _listing("the checkpoint's without a partner, or with several", extra)
            + "The model must be the config's in transformers, as it is or as a part of another module."
        )
    pairs = {name: found[0] for name, found in partners.items()}
    for name, their in pairs.items():
        if ours[name] != theirs[their]:
            raise UserError(
                f"model: {name} is {ours[name]} in this config, {their} is {theirs[their]} in the checkpoint; give the config its sizes and vocabulary"
            )
    return pairs


def _listing(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = [f"  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "\n".join([f"{title}:", *(f"  {name}" for name in names[:_SHOWN]), *more, ""])


def _skeleton(inputs: Inputs) -> PreTrainedModel:
    """The run's model without weights."""
    from mlm_dist.model import families

    return families.new(inputs.bert_config, meta=True)


def take_over(
    source: Path, config: Config, *, tag: str | None, step: int | None, trust_pickle: bool
) -> tuple[Path, list[str]]:
    """Make the config's run directory one that stands where DeepSpeed's checkpoint ``source`` does.

    Weights, moments and Adam's step are the checkpoint's. The data begins at the start of the config's stream; counters, ledger and W&B run begin anew.

    Args:
        step: the run's step, which the schedules go by; by default the checkpoint's.

    Returns:
        The new checkpoint, and what the user should know.

    Raises:
        UserError: the checkpoint cannot be read or is of another model than the config's, or the run directory is a run's already.
    """
    run_dir = config.run.path()
    if any(run_dir.glob("checkpoints/step_*")) or (run_dir / "metrics.jsonl").exists():
        raise UserError(f"run.dir: {run_dir} is a run already; give a new --run.name or --run.dir")
    if CLASSES[config.optim.name] != "AdamW":
        raise UserError(f"optim.name: {config.optim.name} cannot go on from Adam's moments; set it to adamw")
    inputs = Inputs(config, world_size=1)
    state = deepspeed_state.read(deepspeed_files.load(deepspeed_files.find(source, tag), trust_pickle))
    at = state.step if step is None else step
    steps = config.train.steps
    if steps is not None and at >= steps:
        raise UserError(f"train.steps: {steps} are over at step {at}; raise train.steps, or give --step")
    model = _skeleton(inputs)
    theirs = {name: shape for name, shape in state.shapes.items() if name not in state.aliases}
    names = match_names(theirs, {name: tuple(p.shape) for name, p in model.named_parameters()})
    tensors = {}
    for name, their in names.items():
        tensors[f"param/{name}"] = state.tensor("param", their)
        for key in STATE_KEYS:
            tensors[f"state/{key}/{name}"] = state.tensor(key, their)
    groups = group_meta(model, config.optim)
    optimizer = {"class": "AdamW", "step": state.adam_step, "groups": groups, "scaler": None}
    trainer = {
        "step": at,
        "tokens": 0,
        "bytes": 0,
        "skipped": 0,
        "progress": 0.0 if steps is None else at / steps,
        "cursors": inputs.stream(0, 1).start_cursors().tolist(),
        "ledger": [],
        "wandb_id": None,
        "micro_batch": None,
        "attempt": 0,
        "time": time.time(),
        "taken_over": {"from": str(source.resolve()), "step": state.step, "adam_step": state.adam_step},
    }
    _write(run_dir, config, inputs, tensors, optimizer, trainer)
    return run_dir / "checkpoints" / checkpoint.name(at), notes(state, groups, names, config, at)


def _write(run_dir: Path, config: Config, inputs: Inputs, tensors: dict, optimizer: dict, trainer: dict) -> None:
    directory = RunDir(run_dir)
    directory.prepare()
    directory.acquire(StopFlag())
    try:
        identity = config.identity(inputs.fingerprints(), inputs.tokenizer.fingerprint)
        directory.record_identity(json.loads(json.dumps(identity)), config.guarded())
        write_config(config, run_dir / "config.yaml")
        inputs.bert_config.save_pretrained(run_dir / "model")
        inputs.pretrained_tokenizer.save_pretrained(run_dir / "tokenizer")
        writer = checkpoint.Writer(run_dir, config.checkpoint, rank=0, world_size=1, attempt=0)
        writer.save(trainer["step"], tensors, dict.fromkeys(tensors, 0), optimizer, trainer)
        writer.wait()
    except checkpoint.CheckpointError as error:
        raise UserError(f"run.dir: {run_dir}: {error}") from error
    finally:
        directory.release()


def notes(state: State, groups: list[dict[str, Any]], names: dict[str, str], config: Config, step: int) -> list[str]:
    """What is the checkpoint's, what the config's, and what begins anew."""
    told = [
        f"taken over: {len(names)} weights with Adam's moments, of ZeRO stage {state.stage}"
        + (f" on {state.ranks} ranks" if state.stage else "")
        + f"; Adam has applied {state.adam_step} steps",
        f"the run stands at step {step}"
        + (f" (the checkpoint at {state.step})" if step != state.step else "")
        + "; schedules go by it",
        "begins anew: the data, at the start of the config's stream; counters of tokens and bytes; the ledger; the W&B run; dropout's seeds",
    ]
    for (key, old, new), count in _other_values(state, groups, names).items():
        told.append(f"note: {key} of {count} parameters is {old} in the checkpoint; the config's {new} counts")
    if config.train.precision == "fp16":
        told.append("note: the loss scale of fp16 is found anew")
    if config.train.steps is None:
        told.append("note: train.epochs counts bytes of data, so its schedules begin anew")
    return told


def _other_values(state: State, groups: list[dict[str, Any]], names: dict[str, str]) -> Counter[tuple[str, str, str]]:
    """(hyperparameter, the checkpoint's value, the config's) where they differ, with how many parameters have it."""
    theirs = {name: group for group in state.groups for name in group["names"]}
    differ: Counter[tuple[str, str, str]] = Counter()
    for group in groups:
        for name, key in product(group["names"], deepspeed_state.HYPER):
            old, new = theirs[names[name]].get(key, group[key]), group[key]
            if (list(old) if isinstance(old, tuple) else old) != new:
                differ[key, str(old), str(new)] += 1
    return differ
