"""What DeepSpeed 0.19.8 keeps of weights, gradients and optimizer state at each ZeRO stage, and when, as its ZeRO optimizers were read and measured.

The notation is that of `mlm_dist.plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlm_dist.plan_job import Job

# DeepSpeed's where a template is silent, in elements; stage 0 reduces by `reduce_bucket_size` too.
_DEFAULT_BUCKET = 500_000_000
_PREFETCH = 50_000_000
_MAX_LIVE = 1_000_000_000
_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Zero:
    """What a stage keeps, and when, in bytes.

    Attributes:
        device, host: there all the time, by term.
        keeps: gradients stay with their parameters until the last one is there; else they are given away one by one.
        before: gradients of a step's micro-batches before the last.
        bucket: buffers that gradients are reduced in, from the first gradient on.
        bucket_stays: they are there in the forward pass of a later micro-batch.
        reduce: taken while a bucket is reduced.
        partition: where reduced gradients go, from the first full bucket on.
        bucket_elements: gradients that fill a bucket.
        gathered: parameters gathered from all ranks for the forward and backward pass.
        gathering: buffer that they arrive in.
        at_step: gradients that the optimizer finds.
        step, host_step: taken by the optimizer's step.
    """

    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    keeps: bool = False
    before: int = 0
    bucket: int = 0
    bucket_stays: bool = False
    reduce: int = 0
    partition: int = 0
    bucket_elements: int = _DEFAULT_BUCKET
    gathered: int = 0
    gathering: int = 0
    at_step: int = 0
    step: int = 0
    host_step: int = 0

    @classmethod
    def of(cls, job: Job) -> Zero:
        """By stage."""
        return {0: _stage_0, 1: _stage_1_2, 2: _stage_1_2, 3: _stage_3}[job.zero["stage"]](job)


def _stage_0(job: Job) -> Zero:
    p = job.model.parameters
    # DeepSpeedEngine.allreduce_bucket() flattens the gradients, by buckets, into a copy; our engine has one rank reduce nothing.
    flat = 4 * min(p, job.zero.get("reduce_bucket_size", _DEFAULT_BUCKET)) if job.world_size > 1 else 0
    return Zero(
        {"parameters": job.weight * p, "optimizer": 8 * p},
        keeps=True,
        before=4 * p if job.accumulate else 0,
        reduce=flat,
        at_step=4 * p,
    )


def _stage_1_2(job: Job) -> Zero:
    """DeepSpeedZeroOptimizer (stage_1_and_2.py)."""
    model, zero, w, second = job.model, job.zero, job.weight, job.zero["stage"] == 2
    p, part = model.parameters, -(-model.parameters // job.world_size)
    # grads_in_partition holds the parameters of this rank whole, the one that is cut too.
    owned = model.in_partition(job.world_size)
    # Weights in bf16 have their gradients summed in fp32: stage 1 beside each parameter, stage 2 in one buffer of the partition, which all micro-batches share.
    pure = job.precision == "bf16_pure"
    sums = 4 * (part if pure else owned)
    elements = zero.get("reduce_bucket_size", _DEFAULT_BUCKET)
    # setup_buckets(): whole buckets, however small the model, in the gradients' precision; two when they take turns.
    buckets = 2 if zero.get("overlap_comm", False) else 1
    bucket = (w if second else 4) * elements * buckets if _contiguous(job) else 0
    filled = min(elements, p)
    # allreduce_bucket() flattens what it reduces; stage 1 reduces in place. The norm of a parameter is taken in fp64, for offload when it is reduced.
    largest = max(filled, model.words) if model.words > elements else filled
    reduce = (4 + (w if pure else 0)) * largest if second else 0
    if job.offload:
        return Zero(
            # temp_grad_buffer_for_gpu_offload is as large as the largest parameter.
            {"parameters": w * p, "buffers": w * model.largest},
            # The weights in fp32, a buffer that they come back through, the gradient's partition, moments; temp_grad_buffer_for_cpu_offload.
            {
                "optimizer": (4 + w + 8) * part,
                "gradients": 4 * part + (w * owned if job.accumulate and not pure else 0),
                "buffers": w * model.largest,
            },
            bucket=bucket,
            reduce=max(reduce, 8 * min(model.largest, owned)),
            bucket_elements=elements,
        )
    return Zero(
        {"parameters": w * p, "optimizer": (4 + 8) * part},
        keeps=not second,
        before=(sums if second else 4 * p) if job.accumulate else 0,
        bucket=bucket,
        bucket_stays=not second and job.accumulate,
        reduce=reduce,
        partition=0 if pure and job.accumulate and second else sums,
        bucket_elements=elements,
        at_step=sums,
        # First the norms, in fp64, parameter by parameter; then each group's gradients are flattened.
        step=max(8 * min(model.largest, owned), 4 * part),
    )


def _contiguous(job: Job) -> bool:
    return bool(job.zero.get("contiguous_gradients", True)) or job.offload


def _stage_3(job: Job) -> Zero:
    """DeepSpeedZeroOptimizer_Stage3 (stage3.py) and the gathering of partition_parameters.py."""
    model, zero, w, ranks = job.model, job.zero, job.weight, job.world_size
    p, part = model.parameters, -(-model.parameters // job.world_size)
    elements = zero.get("reduce_bucket_size", _DEFAULT_BUCKET)
    several = ranks > 1
    # A parameter is let go when its next use lies further away than max_reuse_distance: BERTs are smaller.
    live = min(p, zero.get("stage3_max_live_parameters", _MAX_LIVE)) if several else 0
    prefetch = min(p, zero.get("stage3_prefetch_bucket_size", _PREFETCH)) if several else 0
    filled = min(elements, p)
    norm = 8 * min(-(-model.largest // ranks), 250_000_000)
    flattened = 4 * min(part, zero.get("sub_group_size", _SUB_GROUP))
    common: dict[str, Any] = {
        # The full gradients of a bucket are laid out by rank, and each rank's part comes back into a buffer of its own.
        "reduce": 4 * (filled + -(-filled // ranks)) if several else 0,
        "bucket_elements": elements,
        "gathered": w * live,
        "gathering": w * prefetch,
    }
    # In the precision that gradients are reduced in, fp32 whatever the weights are.
    bucket = 4 * elements if zero.get("contiguous_gradients", True) else 0
    if job.offload:
        host = {"optimizer": (4 + 8) * part, "gradients": 2 * 4 * part}
        return Zero({"parameters": w * part, "buffers": bucket}, host, step=norm, host_step=flattened, **common)
    device = {"parameters": w * part, "optimizer": (4 + 8) * part, "gradients": 4 * part, "buffers": bucket}
    return Zero(device, step=max(norm, flattened), **common)
