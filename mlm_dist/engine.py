"""The training step under DeepSpeed ZeRO 0 to 3: the right loss, the right norm, a skipped step, and state by
parameter name.

What DeepSpeed does by itself, and what is done here because of it (0.19.8):

- It divides each loss by a fixed number of accumulation steps and averages gradients over ranks, which is right only
  when every micro-batch on every rank weighs the same. Here a micro-batch gives a *sum* of cross-entropies, scaled by
  W / N (W ranks, N selected tokens in the global batch) so that the average over ranks is the gradient of the mean
  over all selected tokens; DeepSpeed divides by nothing.
- Which micro-batch is the last of a step is told to it each time, so their number may change from step to step.
- It skips a step with a non-finite norm at stages 1 to 3, and at stage 0 in fp32 or under autocast neither checks nor
  reports a norm: done here.
- Under autocast in fp16 its scaler is of no use at stages 1 to 3: it clips the gradients before they are unscaled, and
  never lowers the scale after an overflow, as it then returns first. So there is one scaler, here, at every stage.
- Its `bf16` block makes the fp32 weights that are stepped from weights already rounded: the unrounded are put there.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlm_dist.clock import StepClock
from mlm_dist.errors import UserError
from mlm_dist.loss_scale import LossScaler
from mlm_dist.micro_batch import MicroBatch, on_device
from mlm_dist.optim import CLASSES, STATE_KEYS, OptimConfig, build_optimizer, group_meta
from mlm_dist.snapshot import Snapshot, Span
from mlm_dist.spikes import SpikeGuard


@dataclass(frozen=True)
class StepResult:
    """What one step gave on this rank: nothing is reduced over ranks, and the tensors have not been waited for."""

    loss_sum: Tensor
    """Sum of cross-entropies over this rank's selected tokens; fp64 scalar on the engine's device."""
    correct: Tensor
    """How many of them were predicted right; int64 scalar on the engine's device."""
    grad_norm: float | Tensor
    """Global L2 norm of the gradient before clipping, the same on every rank; not finite when the step was skipped."""
    skipped: bool
    """A loss or gradient was not finite on some rank, or the loss a spike: weights, moments and Adam's step are as before, on every rank."""
    overflow: bool
    """Skipped because gradients overflowed under fp16's loss scale, which is halved now: no fault of data or weights."""
    seen: Literal["loss", "gradient", "spike", None] = None
    """Of a skipped step: the first thing that was not finite on this rank; "spike" on every rank if it was that."""


class Engine:
    """One rank's part of a data-parallel model in training.

    The module takes a micro-batch by keyword and returns (sum of losses: fp32 scalar with a graph, correct: int64
    scalar). step(), evaluate(), gather_*(), snapshot() and restore() are collective: every rank calls them in the same
    order with as many micro-batches.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        ds_config: dict[str, Any],
        optim: OptimConfig,
        device: torch.device,
        prefix: str = "model.",
        clock: StepClock | None = None,
        leaves: Sequence[type[nn.Module]] = (),
        spikes: SpikeGuard | None = None,
    ) -> None:
        """
        Args:
            module: fp32 weights, on any device. Rank 0's are broadcast to the others.
            ds_config: from ds_config.merge().
            optim: the optimizer's settings; the learning rate is given to each step().
            device: where to train, as distributed.Topology.device.
            prefix: taken off the parameters' names.
            clock: gets the time of the phases of each step.
            leaves: classes of modules whose parameters stage 3 gathers together, and whose parts get no hooks: those
                with a compiled forward, which a hook would break.
            spikes: judges the loss of each global batch; a step with a spike is skipped. None: none is.

        Raises:
            UserError: a setting of `optim` is not possible.
        """
        # DeepSpeed chooses its accelerator when it is first imported, so not before distributed.init() has settled
        # that.
        import deepspeed

        from mlm_dist.zero_state import zero_state

        optim.check()
        self.device = device
        self.clock = clock or StepClock(device)
        self.world_size = dist.get_world_size()
        self.stage: int = ds_config["zero_optimization"]["stage"]
        self._module = module.to(device)
        # Names and shapes before DeepSpeed partitions the parameters; named_parameters() gives a tied one once.
        self._parameters = {name.removeprefix(prefix): p for name, p in module.named_parameters() if p.requires_grad}
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        self._bad_gradient = torch.zeros((), dtype=torch.bool, device=device)
        self._watch_gradient()
        self._spikes = spikes
        self._optim_class = CLASSES[optim.name]
        self._optim_meta = group_meta(module, optim, prefix)
        rounds_weights = "bf16" in ds_config
        unrounded = {n: p.detach().to("cpu", copy=True) for n, p in self._parameters.items()} if rounds_weights else {}
        # Stage 3 puts its own in place of this for the whole process, with other roundings, and leaves it there.
        self._linear = nn.functional.linear
        if self.stage == 3 and leaves:
            deepspeed.utils.set_z3_leaf_modules(module, list(leaves))
        self._clip: float = ds_config["gradient_clipping"]
        if self.stage == 0:  # done here, with the norm that is needed anyway
            ds_config = {**ds_config, "gradient_clipping": 0.0}
        # Stage 1 of the `bf16` block prints readings of memory.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=self._module,
                optimizer=build_optimizer(module, optim),
                config=ds_config,
                dist_init_required=False,
            )
        assert self._engine.zero_optimization_stage() == self.stage
        if self.stage == 3:
            # DeepSpeed would register them itself when it meets one that is not gathered, but small ones are so at first,
            # and what comes after it has traced the order of use is an error.
            for part in module.modules():
                for parameter in getattr(part, "external_parameters", list)():
                    deepspeed.zero.register_external_parameter(part, parameter)
        if self.stage == 0 and self.world_size == 1:
            # Alone there is nothing to reduce, and all gradients would still be copied into a bucket and back.
            self._engine.enable_backward_allreduce = False
        self._state = zero_state(self._engine, self.stage)
        self._snapshot: Snapshot | None = None
        self._scaler: LossScaler | None = None
        if ds_config.get("torch_autocast", {}).get("dtype") == "float16":
            self._scaler = LossScaler()
            self._engine.torch_autocast_z0_gradscaler = None
            self._engine.optimizer.torch_autocast_gradscaler = None
        if rounds_weights:
            self._write_weights(unrounded)

    # ---- training ----

    def step(
        self, micro_batches: Sequence[MicroBatch], *, selected_total: int, lr: float, seeds: Sequence[int]
    ) -> StepResult:
        """One optimizer step over the global batch of which `micro_batches` are this rank's part.

        Args:
            micro_batches: at least one, as many on every rank; their number may differ from step to step.
            selected_total: N, the number of selected tokens in the global batch over all ranks; at least 1.
            lr: learning rate of this step.
            seeds: one for each micro-batch; torch's generators are seeded with it, which decides the dropout.

        Raises:
            ValueError: no micro-batch, another number of seeds, or N below 1 (such a batch is no step; skip it on all
            ranks).
        """
        if not micro_batches or len(seeds) != len(micro_batches):
            raise ValueError(f"seeds: a step needs one for each micro-batch, got {len(seeds)} for {len(micro_batches)}")
        if selected_total < 1:
            raise ValueError(f"selected_total: {selected_total} selected tokens have no mean; skip the batch")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if not self._module.training:
            self._module.train()
        scale = self.world_size / selected_total * self._begin_scaling()
        losses: list[Tensor] = []
        corrects: list[Tensor] = []
        self._bad_gradient.zero_()
        total, spike = None, None
        for index, (micro_batch, seed) in enumerate(zip(micro_batches, seeds, strict=True)):
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            torch.manual_seed(seed)
            with self.clock.phase("forward"):
                loss, correct = self._engine(**on_device(micro_batch, self.device))
            # An infinite loss can have finite gradients. Made NaN here, without waiting for the device, they reach
            # every rank's norm.
            weight = torch.where(torch.isfinite(loss.detach()), scale, math.nan)
            losses.append(loss.detach())
            corrects.append(correct)
            if self._spikes is not None and index == len(micro_batches) - 1:
                total = self._global_sum(losses) / selected_total
                spike = self._spikes.is_spike(total)
                weight = torch.where(spike, math.nan, weight)  # skipped by the same way
            with self.clock.phase("backward"):
                self._engine.backward(loss * weight, scale_wrt_gas=False)
        with self.clock.phase("optimizer"):
            grad_norm, skipped = self._apply()
        step_losses = torch.stack(losses)
        if self._spikes is not None and not skipped:
            assert total is not None
            self._spikes.accept(total)
        spiked = skipped and spike is not None and bool(spike)
        overflow = not spiked and self._end_scaling(step_losses, skipped)
        return StepResult(
            loss_sum=step_losses.double().sum(),
            correct=torch.stack(corrects).sum(),
            grad_norm=grad_norm,
            skipped=skipped,
            overflow=overflow,
            seen="spike" if spiked else self._seen(step_losses) if skipped and not overflow else None,
        )

    def evaluate(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Sum of cross-entropies (fp32 scalar) and number right (int64 scalar) of this rank's micro-batch, without
        dropout.

        At stage 3 every rank must call it equally often.
        """
        if self._module.training:
            self._module.eval()
        with torch.no_grad():
            loss, correct = self._engine(**on_device(micro_batch, self.device))
        return loss, correct

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the module and frees its buffers. The engine is not to be used afterwards."""
        from deepspeed.runtime import torch_autocast

        self._engine.destroy()
        nn.functional.linear = self._linear
        # The process's too: a later engine would reduce by autocast's rules.
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False

    def _watch_gradient(self) -> None:
        """Notes a gradient of this rank alone that is not finite: after the reduction every rank's is not.

        What goes wrong anywhere in the backward pass comes down to the first layer, where a vector's gradient is small: to
        the embeddings' norm, which is not every model's first.
        """

        def look(gradient: Tensor) -> None:
            self._bad_gradient.logical_or_(~torch.isfinite(gradient).all())

        vectors = {name: p for name, p in self._parameters.items() if p.ndim == 1}
        vectors[min(vectors, key=lambda name: "embeddings" not in name)].register_hook(look)

    def _global_sum(self, losses: Sequence[Tensor]) -> Tensor:
        """Sum over all ranks, fp64 scalar. In the group in which DeepSpeed reduces, so that the order is one for all."""
        from deepspeed import comm

        total = torch.stack(list(losses)).double().sum()
        if self.world_size > 1:
            comm.all_reduce(total, group=self._engine.data_parallel_group)
        return total

    def _seen(self, losses: Tensor) -> Literal["loss", "gradient", None]:
        if not torch.isfinite(losses).all():
            return "loss"
        return "gradient" if self._bad_gradient else None

    def _apply(self) -> tuple[float | Tensor, bool]:
        """Steps the optimizer unless the gradient is not finite; (norm before clipping, skipped)."""
        if self.stage > 0:
            self._engine.step()
            return self._engine.get_global_grad_norm(), bool(self._engine.optimizer.overflow)
        # Gradients are reduced by now, so all ranks have the same bits and decide alike.
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        if self._scaler is not None:
            torch._foreach_mul_(grads, 1 / self._scaler.scale)
        total = torch.nn.utils.get_total_norm(grads)
        norm = float(total)
        if math.isfinite(norm):
            if 0 < self._clip < norm + 1e-6:  # else torch multiplies all by 1
                torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._clip, total)
            self._engine.step()
            return norm, False
        self._engine.zero_grad()
        return norm, True

    # ---- fp16 ----

    @property
    def loss_scale(self) -> float | None:
        """What the next step's losses are multiplied by in fp16; None in other precisions."""
        return None if self._scaler is None else self._scaler.scale

    def _begin_scaling(self) -> float:
        """The factor that this class puts on a step's losses. At stages 1 to 3 DeepSpeed does, as it unscales there."""
        if self._scaler is None:
            return 1.0
        if self.stage == 0:
            return self._scaler.scale
        self._engine.optimizer.override_loss_scale(self._scaler.scale)
        return 1.0

    def _end_scaling(self, losses: Tensor, skipped: bool) -> bool:
        """Tells the scaler how a step ended; whether it was skipped because of the scale. Collective after a skip."""
        if self._scaler is None:
            return False
        if not skipped:
            self._scaler.applied()
            return False
        # A loss that is not finite itself, on any rank, would not be with another scale.
        bad_losses = (~torch.isfinite(losses)).sum()
        dist.all_reduce(bad_losses)
        return not bad_losses.item() and self._scaler.overflowed()

    # ---- state by name, for a checkpoint that knows neither the stage nor the number of ranks ----

    def names(self) -> list[str]:
        """Names of the trained parameters, tied ones once, in the module's order."""
        return list(self._parameters)

    def shapes(self) -> dict[str, torch.Size]:
        """Whole shape of each parameter by name."""
        return dict(self._shapes)

    def state_keys(self) -> list[str]:
        """Keys of the tensors that the optimizer keeps for each parameter, of the parameter's shape."""
        return list(STATE_KEYS)

    def gather_parameter(self, name: str) -> Tensor:
        """The whole fp32 weight, a copy on CPU, on every rank. Collective."""
        return self._whole(name, None)

    def gather_state(self, key: str, name: str) -> Tensor:
        """The whole fp32 optimizer state `key` of a parameter (zeros before the first step), likewise. Collective."""
        if not self._state.started():
            return torch.zeros(self._shapes[name])
        return self._whole(name, key)

    def snapshot(self, owners: dict[str, int]) -> dict[str, Tensor]:
        """Copies on the CPU of the whole fp32 weights (`param/NAME`) and optimizer states (`state/KEY/NAME`) that
        `owners`, the same at every call, gives to this rank. They are good until the next call. Collective.
        """
        tensors: dict[str, tuple[str, str | None]] = {f"param/{n}": (n, None) for n in self._parameters}
        tensors |= {f"state/{key}/{n}": (n, key) for key in STATE_KEYS for n in self._parameters}
        if self._snapshot is None:
            spans = self._spans()
            self._snapshot = Snapshot(
                {tensor: self._shapes[name] for tensor, (name, _) in tensors.items()},
                owners,
                {tensor: spans[name] for tensor, (name, _) in tensors.items()},
                pinned=self.device.type == "cuda",
            )
        started = self._state.started()

        def local(tensor: str) -> Tensor:
            name, key = tensors[tensor]
            _, values = self._state.local(self._parameters[name], key if started else None)
            return values.float() if started or key is None else torch.zeros_like(values, dtype=torch.float32)

        return self._snapshot.take(local)

    def _spans(self) -> dict[str, list[Span]]:
        """What each rank holds of each parameter and its states, which are cut alike. Collective."""
        pieces = ((name, self._state.local(p, None)) for name, p in self._parameters.items())
        mine = {name: (start, values.numel()) for name, (start, values) in pieces}
        every: list[dict[str, Span]] = [{}] * self.world_size
        dist.all_gather_object(every, mine)
        return {name: [of_rank[name] for of_rank in every] for name in mine}

    def optimizer_meta(self) -> dict[str, Any]:
        """What else the optimizer knows, for JSON: its class, the steps applied, its groups by parameter name, the state
        of fp16's loss scaler (None in other precisions)."""
        return {
            "class": self._optim_class,
            "step": self._state.step_count(),
            "groups": self._optim_meta,
            "scaler": None if self._scaler is None else self._scaler.state(),
        }

    def restore(
        self,
        read_parameter: Callable[[str], Tensor],
        read_state: Callable[[str, str], Tensor],
        meta: dict[str, Any],
    ) -> None:
        """Puts weights, moments, the count of steps and fp16's loss scale back, into any stage, number of ranks and
        precision. Collective.

        Args:
            read_parameter: gives a weight by name, as gather_parameter() gave it.
            read_state: gives a state by key and name, as gather_state() gave it.
            meta: what optimizer_meta() gave.

        Raises:
            UserError: another optimizer, other parameters or another shape than this engine's.
        """
        if meta["class"] != self._optim_class:
            raise UserError(f"checkpoint: its optimizer is {meta['class']!r}, this run's is {self._optim_class!r}")
        stored = {name for group in meta["groups"] for name in group["names"]}
        if stored != self._parameters.keys():
            odd = sorted(stored ^ self._parameters.keys())
            raise UserError(f"checkpoint: it and the model differ in {len(odd)} parameter(s), such as {odd[0]!r}")
        self._state.set_step(int(meta["step"]))
        if self._scaler is not None:
            self._scaler.load(meta.get("scaler"))
        self._state.begin_write()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._state.write(parameter, None, self._checked(name, read_parameter(name)))
                for key in STATE_KEYS:
                    self._state.write(parameter, key, self._checked(name, read_state(key, name)))
            self._state.finish_write()

    def _write_weights(self, weights: dict[str, Tensor]) -> None:
        """Rank 0's `weights` (fp32, on CPU) into the copies that are stepped and those that the forward uses."""
        self._state.begin_write()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                weight = weights[name].to(self.device)
                dist.broadcast(weight, 0)
                self._state.write(parameter, None, weight.cpu())
            self._state.finish_write()

    def _whole(self, name: str, key: str | None) -> Tensor:
        with torch.no_grad():
            value = self._state.read(self._parameters[name], key)
        return value.detach().to("cpu", torch.float32, copy=True).view(self._shapes[name])

    def _checked(self, name: str, value: Tensor) -> Tensor:
        if value.shape != self._shapes[name]:
            raise UserError(
                f"checkpoint: {name} has shape {tuple(value.shape)}, the model's is {tuple(self._shapes[name])}"
            )
        return value.to(torch.float32)
