"""``train.micro_batch: auto``: the largest micro-batch that fits on every rank, by the planner and a trial on the devices.

The planner proposes. Then each rank runs the real model forward and backward on its own device, with full rows and as many selected positions as can be
expected, beside ballast that stands for what DeepSpeed and the optimizer will take, and for slack. There is no collective within a trial, so that a rank
that is out of memory holds up nobody; after it the ranks tell each other how it went.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlm_dist.choice import MARGIN, fits, micro_batches, needed
from mlm_dist.errors import UserError
from mlm_dist.plan import bare, keeps_gradients, predict
from mlm_dist.plan_job import Job

# Share of what is needed that must be free beside it, for what no trial has: NCCL's communicators, pieces that nothing fits into, a batch ahead. Half of the
# planner's margin, so that a right prediction that fits passes its trial.
SLACK = MARGIN / 2
# In the errors that torch, cuBLAS, cuDNN and NCCL have no class of their own for, in lower case.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "status_alloc_failed", "failed to cuda malloc")


class Control(Protocol):
    """The part of `distributed.ControlGroup` that is needed here."""

    @property
    def world_size(self) -> int: ...

    def sum(self, values: list[int]) -> list[int]: ...

    def gather(self, obj: Any) -> list[Any] | None: ...

    def broadcast(self, obj: Any) -> Any: ...


@dataclass(frozen=True)
class Settled:
    """The micro-batch of all ranks.

    Attributes:
        rows: of a micro-batch.
        how: how it was found, in one line.
        record: for the checkpoint: with it, a run on the same number of ranks, template and memory takes the same again.
    """

    rows: int
    how: str
    record: dict[str, Any]


def settle(
    job_of: Callable[[int], Job],
    module_of: Callable[[], nn.Module],
    *,
    most: int,
    device: torch.device,
    control: Control,
    recorded: dict[str, Any] | None = None,
) -> Settled:
    """Find the micro-batch. Collective: every rank calls it, with a device that holds nothing of the run yet, and gets the same.

    Args:
        job_of: the planner's job for a number of rows.
        module_of: makes a model like the run's, in fp32 on the CPU; only called for a trial.
        most: rows of a global batch that fall on the rank that gets most.
        recorded: what the checkpoint that the run goes on from has of an earlier `Settled.record`.

    Raises:
        UserError: not even one row fits on some rank.
    """
    everyone = _everyone(control, (socket.gethostname(), *memory(device)))
    neighbours = Counter(host for host, _, _ in everyone)
    # On a CPU the ranks of a host share its memory; each CUDA rank has a device.
    shared = {host: neighbours[host] if device.type == "cpu" else 1 for host in neighbours}
    free = min(free // shared[host] for host, free, _ in everyone)
    job = asdict(job_of(1)) | {"zero": dict(job_of(1).zero), "micro_batch": None, "selected": None, "accumulate": None}
    settled_for = {"job": job, "most": most, "memory": min(total // shared[host] for host, _, total in everyone)}
    if recorded is not None and recorded["for"] == settled_for:
        return Settled(recorded["rows"], "as the checkpoint has it", recorded)

    def job_at(rows: int) -> Job:
        return replace(job_of(rows), accumulate=rows < most)

    def good(rows: int) -> bool:
        job = job_at(rows)
        prediction = predict(job)
        # Slack or none, one row beats no run.
        need = int(needed(prediction, device.type) * (1 + (SLACK if rows > 1 else 0)))
        if can_be_tried(job):
            fine = trial(module_of, job, need - bare(job), device)
        else:
            fine = fits(prediction, free, device.type)
        return control.sum([int(fine)])[0] == control.world_size

    def may_fit(rows: int) -> bool:
        return needed(predict(job_at(rows)), device.type) * (1 + SLACK) <= free

    # The trials begin where the prediction is surely within the memory, and go up to where it leaves the slack alone.
    planned = rows = max((n for n in micro_batches(most) if fits(predict(job_at(n)), free, device.type)), default=1)
    if good(rows):
        while (more := min(2 * rows, most)) > rows and may_fit(more) and good(more):
            rows = more
    else:
        while rows > 1:
            rows //= 2
            if good(rows):
                break
        else:
            raise UserError(
                f"train.micro_batch: auto found that not even one row of {job_of(1).seq_len} tokens fits in {free / 2**30:.2f} GiB. Set "
                "model.checkpoint_activations true, a deepspeed.config that partitions or offloads more (mlm-dist plan shows what each needs), or a "
                "shorter data.seq_len."
            )
    how = f"{planned} by the planner for {free / 2**30:.2f} GiB"
    if not can_be_tried(job_at(rows)):
        how += ", not tried, as the whole model alone takes more than this run"
    else:
        how += ", confirmed" if rows == planned else f", {rows} by trial"
    even = -(-most // -(-most // rows))
    how += f"; {even} rows make as many micro-batches" if even < rows else ""
    return Settled(even, how, {"rows": even, "for": settled_for})


def can_be_tried(job: Job) -> bool:
    """Whether the whole model on one device takes no more than the run. Where ZeRO 3 holds only parts of it, it can."""
    return bare(job) <= needed(predict(job), job.device)


def _everyone(control: Control, mine: Any) -> list[Any]:
    everyone: list[Any] = control.broadcast(control.gather(mine))
    return everyone


def trial(module_of: Callable[[], nn.Module], job: Job, ballast: int, device: torch.device) -> bool:
    """Whether a forward and backward pass with `ballast` bytes beside it finds room. Frees everything again."""
    try:
        weights = torch.bfloat16 if job.precision == "bf16_pure" else torch.float32
        _forward_and_backward(module_of().to(device, weights), job, ballast, device)
        return True
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _forward_and_backward(module: nn.Module, job: Job, ballast: int, device: torch.device) -> None:
    # Never written to: on a CPU it counts against limits of the address space without taking pages.
    beside = torch.empty(ballast, dtype=torch.uint8, device=device)
    if not keeps_gradients(job):
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    lower = torch.float16 if job.precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, lower) if job.autocast else contextlib.nullcontext():
        loss, _ = module(**worst_case(job, device))
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del beside


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def worst_case(job: Job, device: torch.device) -> dict[str, Any]:
    """A micro-batch of full rows of one segment each, with the most selected positions that the job expects; flat for `varlen`."""
    rows, length = job.micro_batch, job.seq_len
    selected = torch.arange(int(job.selected * job.tokens), device=device)
    positions = torch.arange(length, device=device).repeat(rows, 1)
    tokens = torch.zeros_like(positions)
    batch: dict[str, Any] = {"selected": selected, "labels": torch.zeros_like(selected)}
    if job.attention != "varlen":
        return batch | {"input_ids": tokens, "position_ids": positions, "segment_ids": torch.ones_like(tokens)}
    bounds = torch.arange(0, job.tokens + 1, length, dtype=torch.int32, device=device)
    flat: dict[str, Tensor] = {"input_ids": tokens.view(1, -1), "position_ids": positions.view(1, -1)}
    return batch | flat | {"cu_seqlens": bounds, "max_length": length}


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on the device, by torch's allocator or a library's, or on the host, by torch's or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def too_large(rows: int, *, auto: bool, saved: bool) -> UserError:
    """What to tell the user when a step of the run itself is out of memory.

    Args:
        rows: of a micro-batch.
        auto: `train.micro_batch` found them.
        saved: the run has a checkpoint.
    """
    if rows == 1:
        change = "model.checkpoint_activations true, or a deepspeed.config that partitions or offloads more"
    else:
        change = f"train.micro_batch {rows // 2}" + (" (auto may come to as many again)" if auto else ", or auto")
    then = "goes on from its last checkpoint" if saved else "has no checkpoint yet, so it begins again"
    return UserError(
        f"train.micro_batch: a step with micro-batches of {rows} rows ran out of memory. Set {change}; the global batch, and so the result, stays the "
        f"same. mlm-dist plan shows what each deepspeed.config needs. The run {then}."
    )


# ---- how much memory there is ----


def memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes: of a CUDA device; of a CPU what this process may have within the machine, its control group and its address space.

    Raises:
        UserError: the machine does not tell.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    try:
        return _host_memory()
    except OSError as error:
        raise UserError(
            f"train.micro_batch: auto reads from /proc how much memory there is, and cannot here ({error}); set a number of rows"
        ) from error


def _host_memory() -> tuple[int, int]:
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    pairs = [(_kib(meminfo["MemAvailable"]), _kib(meminfo["MemTotal"])), *_control_groups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        pairs.append((max(0, limit - _kib(status["VmSize"])), limit))
    return min(free for free, _ in pairs), min(total for _, total in pairs)


def _kib(text: str) -> int:
    return int(text.split()[0]) << 10


def _control_groups() -> Iterable[tuple[int, int]]:
    """(free, limit) of the process's control groups, versions 2 and 1, from its own up to the root."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        version_2 = controllers == ""
        if not version_2 and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") if version_2 else Path("/sys/fs/cgroup/memory")
        files = ("memory.max", "memory.current") if version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max", or a group that cannot be seen from here
                limit, used = (int((folder / file).read_text()) for file in files)
                yield max(0, limit - used), limit
            if folder == root:
                break
