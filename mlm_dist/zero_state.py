"""Weights and optimizer state of a DeepSpeed engine by parameter, whole, whatever the ZeRO stage and the number of
ranks.

One class for each way that DeepSpeed lays state out: whole on every rank (stage 0), flat buffers cut into equal parts
(stages 1 and 2), every parameter cut into equal parts (stage 3). All reach below DeepSpeed's public interface where
that is missing or wrong; each such place says why. Read against DeepSpeed 0.19.8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import functional as F

from mlm_dist.optim import STATE_KEYS


class ZeroState(ABC):
    """Access to the state of one engine. Reads and writes are collective: all ranks, same order."""

    def __init__(self, engine: Any) -> None:
        self.zero: Any = engine.optimizer
        self.base: torch.optim.Optimizer = engine.basic_optimizer

    @abstractmethod
    def holders(self) -> Iterator[Tensor]:
        """The tensors that the optimizer steps and keys its state by, on this rank."""

    @abstractmethod
    def read(self, parameter: torch.nn.Parameter, key: str | None) -> Tensor:
        """A parameter's whole fp32 weight (key None) or optimizer state, on any device; may be the tensor itself."""

    @abstractmethod
    def local(self, parameter: torch.nn.Parameter, key: str | None) -> tuple[int, Tensor]:
        """What this rank holds of it flattened: first element, values (fp32, on any device). Not collective."""

    @abstractmethod
    def write(self, parameter: torch.nn.Parameter, key: str | None, value: Tensor) -> None:
        """The reverse of read(); `value` is fp32, on CPU, of the parameter's whole shape."""

    def begin_write(self) -> None:  # noqa: B027
        """To be called before the first write of a restore, after set_step()."""

    def finish_write(self) -> None:  # noqa: B027
        """To be called after the last write: brings the copies of the weights that the forward uses up to date."""

    def started(self) -> bool:
        """Whether the optimizer has state, which it makes at its first step."""
        return any(len(self.base.state.get(holder, ())) > 0 for holder in self.holders())

    def step_count(self) -> int:
        """How many steps the optimizer has applied; skipped ones are not among them."""
        states = (self.base.state.get(holder, {}) for holder in self.holders())
        counts = [keeper["step"] for keeper in (*self.base.param_groups, *states) if "step" in keeper]
        return int(counts[0]) if counts else 0

    def set_step(self, step: int) -> None:
        """Sets the optimizer's count of steps, making every holder's state (zeros) first where there is none."""
        # torch's AdamW counts beside each holder, its fused kernel in fp32 as its own _init_group makes it; DeepSpeed's
        # CPU Adam there too, in an int; pytorch_optimizer's in an int of each group.
        by_holder = isinstance(self.base, torch.optim.AdamW | DeepSpeedCPUAdam)
        for holder in self.holders():
            state = self.base.state[holder]
            for key in STATE_KEYS:
                if key not in state:
                    state[key] = torch.zeros_like(holder, requires_grad=False)
            if isinstance(self.base, torch.optim.AdamW):
                state["step"] = torch.tensor(float(step), dtype=torch.float32, device=holder.device)
            elif by_holder:
                state["step"] = step
        if not by_holder:
            for group in self.base.param_groups:
                group["step"] = step


class WholeState(ZeroState):
    """Stage 0: every rank has everything."""

    def holders(self) -> Iterator[Tensor]:
        for group in self.base.param_groups:
            yield from group["params"]

    def read(self, parameter: torch.nn.Parameter, key: str | None) -> Tensor:
        return parameter.data if key is None else self.base.state[parameter][key]

    def local(self, parameter: torch.nn.Parameter, key: str | None) -> tuple[int, Tensor]:
        return 0, self.read(parameter, key).flatten()

    def write(self, parameter: torch.nn.Parameter, key: str | None, value: Tensor) -> None:
        self.read(parameter, key).copy_(value)


class FlatState(ZeroState):
    """Stages 1 and 2: the parameters of a group lie in one flat buffer, of which each rank steps its part."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._linked = False

    def holders(self) -> Iterator[Tensor]:
        for group in self.base.param_groups:
            yield from group["params"]

    def read(self, parameter: torch.nn.Parameter, key: str | None) -> Tensor:
        if key is None:
            return safe_get_full_fp32_param(parameter)
        self._link()
        return safe_get_full_optimizer_state(parameter, key)

    def local(self, parameter: torch.nn.Parameter, key: str | None) -> tuple[int, Tensor]:
        if key is not None:
            self._link()
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # it lies in other ranks' parts
            return 0, next(self.holders()).detach()[:0]
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)

    def write(self, parameter: torch.nn.Parameter, key: str | None, value: Tensor) -> None:
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            self._link()
            safe_set_full_optimizer_state(parameter, value, key)

    def finish_write(self) -> None:
        self.zero.update_lp_params()

    def _link(self) -> None:
        # DeepSpeed links parameters to their optimizer state once, after the first group's first step, when the other
        # groups have none yet: their parameters then say "exp_avg not found". Linked again here, when all groups have
        # theirs.
        if not self._linked:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
            self._linked = True


class PartitionedState(ZeroState):
    """Stage 3: each rank keeps a part of every parameter (the last ranks' are padded) and steps groups of parts."""

    def holders(self) -> Iterator[Tensor]:
        yield from self.zero.fp32_partitioned_groups_flat

    def read(self, parameter: torch.nn.Parameter, key: str | None) -> Tensor:
        return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)

    def local(self, parameter: torch.nn.Parameter, key: str | None) -> tuple[int, Tensor]:
        if key is None:
            part = safe_get_local_fp32_param(parameter)
        else:
            part = safe_get_local_optimizer_state(parameter, key)
        whole: int = parameter.ds_numel  # type: ignore[attr-defined]
        start = min(whole, dist.get_rank() * part.numel())
        return start, part[: whole - start]

    def write(self, parameter: torch.nn.Parameter, key: str | None, value: Tensor) -> None:
        # DeepSpeed's setters of whole values fail where a part is padded, those of a rank's own part do not.
        part: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        rank, world = dist.get_rank(), dist.get_world_size()
        local = F.pad(value.flatten(), (0, part * world - value.numel()))[rank * part : (rank + 1) * part]
        if key is None:
            safe_set_local_fp32_param(parameter, local)
        else:
            safe_set_local_optimizer_state(parameter, local, key)

    def begin_write(self) -> None:
        # A forward may have left parameters gathered; their old values would outlive the restore.
        self.zero._partition_all_parameters()

    def finish_write(self) -> None:
        # As in DeepSpeed's own step(): from the stepped copies to the parts that the forward gathers, then the small
        # parameters that stay whole.
        for index in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)


def zero_state(engine: Any, stage: int) -> ZeroState:
    """The access that fits an engine's ZeRO stage."""
    kinds: dict[int, type[ZeroState]] = {0: WholeState, 1: FlatState, 2: FlatState, 3: PartitionedState}
    return kinds[stage](engine)
