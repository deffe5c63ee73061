"""Weights and Adam's moments out of what DeepSpeed saved, by parameter name, whatever the ZeRO stage and the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlm_dist.convert.deepspeed_files import Files
from mlm_dist.errors import UserError
from mlm_dist.optim import STATE_KEYS

if TYPE_CHECKING:
    import torch

# Hyperparameters of a group that the user is told of.
HYPER = ("weight_decay", "betas", "eps")
# Of BERT, RoBERTa and its kin, DistilBERT, ELECTRA and ModernBERT.
TIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
    "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
    "generator_lm_head.weight": "electra.embeddings.word_embeddings.weight",
    "decoder.weight": "model.embeddings.tok_embeddings.weight",
}


@dataclass
class State:
    """What a checkpoint of DeepSpeed's holds of a training.

    Attributes:
        step: optimizer steps of the training, skipped ones among them.
        adam_step: steps that the optimizer has applied.
        readers: by parameter name and then by `param`, `exp_avg` or `exp_avg_sq`: gives the tensor, fp32 and whole.
        shapes: whole shape by parameter name.
        groups: names, weight_decay, betas and eps of each parameter group.
        aliases: names of tied parameters and what they are tied to.
    """

    stage: int
    ranks: int
    step: int
    adam_step: int
    readers: dict[str, dict[str, Callable[[], torch.Tensor]]]
    shapes: dict[str, tuple[int, ...]]
    groups: list[dict[str, Any]]
    aliases: dict[str, str] = field(default_factory=dict)

    def tensor(self, key: str, name: str) -> torch.Tensor:
        """The weight (key `param`) or moment of a parameter, fp32, of its whole shape. Raises UserError where the files do not hold it."""
        try:
            tensor = self.readers[name][key]().detach().contiguous()
        except (KeyError, IndexError, RuntimeError) as error:
            raise UserError(f"the checkpoint does not hold the whole {key} of {name} ({error})") from error
        if tuple(tensor.shape) != self.shapes[name]:
            raise UserError(
                f"the checkpoint's {key} of {name} is {tuple(tensor.shape)}, its weight {self.shapes[name]}"
            )
        return tensor


def read(files: Files) -> State:
    """What the files hold together.

    Raises:
        UserError: it is not whole, another optimizer's than Adam, or laid out in a way that is not known.
    """
    model = files.models[0]
    try:
        if model.get("frozen_param_shapes"):
            raise UserError(f"{files.directory}: {len(model['frozen_param_shapes'])} parameters were frozen")
        if not files.optims:
            return _whole(files)
        states = [optim["optimizer_state_dict"] for optim in files.optims]
        stage = int(states[0].get("zero_stage", 1))
        parts = states[0]["partition_count"]
        parts = max(parts) if isinstance(parts, list) else parts
        if parts != len(states):
            raise UserError(f"{files.directory}: holds the optimizer states of {len(states)} ranks, {parts} saved it")
        return (_partitioned if stage == 3 else _flat)(files, states, stage)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{files.directory}: is not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: {error}); save it again with a newer one"
        ) from error


def _flat(files: Files, states: list[dict[str, Any]], stage: int) -> State:
    """Stages 1 and 2: each rank has a part of every group's flat buffer, and says which fragments of which parameters lie in it."""
    import torch

    shapes = _shapes(files)
    optimizers = [state["base_optimizer_state"] for state in states]
    fragments: dict[str, list[tuple[int, int, int, int]]] = {}
    names: list[list[str]] = [[] for _ in states[0]["single_partition_of_fp32_groups"]]
    for rank, state in enumerate(states):
        for group, mapping in enumerate(state["param_slice_mappings"]):
            for name, address in mapping.items():
                fragments.setdefault(name, []).append((rank, group, address.start, address.numel))
                if name not in names[group]:
                    names[group].append(name)

    def gather(name: str, flat: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        pieces = [flat(rank, group).flatten()[start : start + numel] for rank, group, start, numel in fragments[name]]
        return torch.cat(pieces).float().view(shapes[name])

    def by_key(name: str, key: str) -> Callable[[], torch.Tensor]:
        if key == "param":
            return lambda: gather(name, lambda rank, group: states[rank]["single_partition_of_fp32_groups"][group])
        return lambda: gather(name, lambda rank, group: optimizers[rank]["state"][group][key])

    _hold_sizes(files, shapes, {n: sum(numel for *_, numel in parts) for n, parts in fragments.items()})
    return _state(files, stage, len(states), optimizers[0], names, shapes, by_key)


def _partitioned(files: Files, states: list[dict[str, Any]], stage: int) -> State:
    """Stage 3: each rank has a part of every parameter, as long on each (the last are padded), one behind the other in the sub-groups' flat buffers."""
    import torch

    optimizers = [state["optimizer_state_dict"] for state in states]
    shapes, places, offset = _shapes(files), {}, 0
    for name, shape in shapes.items():
        length = math.ceil(math.prod(shape) / len(states))
        places[name], offset = (offset, length), offset + length
    flat = states[0]["fp32_flat_groups"]
    _hold_sizes(files, {"all parameters": (offset,)}, {"all parameters": sum(group.numel() for group in flat)})

    def cut(groups: list[torch.Tensor], start: int, length: int) -> Iterator[torch.Tensor]:
        for group in groups:
            if length > 0 and start < group.numel():
                piece = group.flatten()[start : start + length]
                yield piece
                length -= piece.numel()
            start = max(0, start - group.numel())

    def gather(name: str, groups: Callable[[int], list[torch.Tensor]]) -> torch.Tensor:
        pieces = [piece for rank in range(len(states)) for piece in cut(groups(rank), *places[name])]
        return torch.cat(pieces).float()[: math.prod(shapes[name])].view(shapes[name])

    def by_key(name: str, key: str) -> Callable[[], torch.Tensor]:
        if key == "param":
            return lambda: gather(name, lambda rank: states[rank]["fp32_flat_groups"])
        return lambda: gather(name, lambda rank: [optimizers[rank]["state"][i][key] for i in range(len(flat))])

    names = [list(group) for group in files.models[0]["param_shapes"]]
    return _state(files, stage, len(states), optimizers[0], names, shapes, by_key)


def _whole(files: Files) -> State:
    """Stage 0: the optimizer's state is by the parameters' place in its groups; their names, not saved, are found by the usual rule."""
    model = files.models[0]
    outer = model["optimizer"]
    if outer is None:
        raise UserError(f"{files.directory}: holds no optimizer state; its weights alone are loaded by model.init")
    inner = outer.get("optimizer_state_dict", outer)  # the `bf16` and `fp16` blocks wrap it
    masters = outer.get("fp32_groups")
    if inner is not outer and masters is None:
        raise UserError(f"{files.directory}: its fp32 weights lie in flat groups; save it with ZeRO stage 1, 2 or 3")
    buffers = set(model.get("buffer_names") or ())
    module: dict[str, torch.Tensor] = {n: v for n, v in model["module"].items() if n not in buffers}
    indices = [list(group["params"]) for group in inner["param_groups"]]
    shapes = [[tuple(inner["state"][i]["exp_avg"].shape) for i in group] for group in indices]
    aliases = _aliases(module)
    own = {name: tuple(value.shape) for name, value in module.items() if name not in aliases}
    names = _names_of_groups(files, own, inner["param_groups"], shapes)
    place = {name: (g, i) for g, group in enumerate(names) for i, name in enumerate(group)}

    def by_key(name: str, key: str) -> Callable[[], torch.Tensor]:
        group, index = place[name]
        if key != "param":
            return lambda: inner["state"][indices[group][index]][key].float()
        return lambda: (module[name] if masters is None else masters[group][index]).float()

    state = _state(files, 0, 1, inner, names, own, by_key)
    state.aliases = aliases
    return state


def _aliases(module: dict[str, torch.Tensor]) -> dict[str, str]:
    """The tied parameters and what they are tied to. Each is saved by itself, so those that differ in a number are not tied."""
    import torch

    found = {}
    for alias, owner in TIES.items():
        for name in (n for n in module if n.endswith(alias)):
            other = name.removesuffix(alias) + owner
            if other in module and torch.equal(module[name], module[other]):
                found[name] = other
    return found


def _names_of_groups(
    files: Files, own: dict[str, tuple[int, ...]], groups: list[dict[str, Any]], shapes: list[list[tuple[int, ...]]]
) -> list[list[str]]:
    """Names of each group's parameters: all in the model's order, or those that decay and those that do not.

    The usual rules spare biases and norms, or biases and what is called LayerNorm, which leaves out the norms of some families.
    """
    if all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups]
    names = list(own)
    guesses = [[names]]
    for is_norm in (lambda n: "LayerNorm" in n, lambda n: "norm" in n.lower()):
        bare = [n for n in names if n.endswith("bias") or is_norm(n)]
        decayed = [n for n in names if n not in bare]
        guesses += [decayed, bare], [bare, decayed]
    for guess in guesses:
        if [[own[n] for n in group] for group in guess] == shapes:
            return guess
    raise UserError(
        f"{files.directory}: was saved at ZeRO stage 0, which does not say what parameters its optimizer's {len(groups)} groups hold, and they are not all in "
        "the model's order nor those that decay and biases and norms; save it with ZeRO stage 1, 2 or 3"
    )


def _shapes(files: Files) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for group in files.models[0]["param_shapes"] for name, shape in group.items()}


def _hold_sizes(files: Files, shapes: dict[str, tuple[int, ...]], sizes: dict[str, int]) -> None:
    wrong = [name for name, shape in shapes.items() if sizes.get(name) != math.prod(shape)]
    if wrong:
        raise UserError(
            f"{files.directory}: holds {sizes.get(wrong[0], 0)} of the {math.prod(shapes[wrong[0]])} numbers of {wrong[0]}"
        )


def _state(
    files: Files,
    stage: int,
    ranks: int,
    optimizer: dict[str, Any],
    names: list[list[str]],
    shapes: dict[str, tuple[int, ...]],
    by_key: Callable[[str, str], Callable[[], torch.Tensor]],
) -> State:
    model = files.models[0]
    states = list(optimizer["state"].values())
    odd = {key for state in states for key in state} - {*STATE_KEYS, "step"}
    kind = str((model.get("ds_config") or {}).get("optimizer", {}).get("type", "adamw")).lower()
    if odd or any(key not in state for state in states for key in STATE_KEYS) or "adam" not in kind or "onebit" in kind:
        what = ", ".join(sorted(odd)) or (kind if "adam" not in kind or "onebit" in kind else "no moments")
        raise UserError(f"{files.directory}: its optimizer is not Adam ({what}); only Adam's moments can be taken over")
    groups = optimizer["param_groups"]
    counts = [float(one["step"]) for one in (*states, *groups) if "step" in one]
    return State(
        stage=stage,
        ranks=ranks,
        step=int(model["global_steps"]),
        adam_step=int(max(counts, default=0)),
        readers={n: {key: by_key(n, key) for key in ("param", *STATE_KEYS)} for g in names for n in g},
        shapes=shapes,
        groups=[
            {"names": group_names, **{key: group[key] for key in HYPER if key in group}}
            for group_names, group in zip(names, groups, strict=False)
        ],
        aliases=dict(model.get("shared_params") or {}),
    )
