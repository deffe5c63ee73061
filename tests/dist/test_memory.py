"""The planner against a counting allocator, in real steps of real ranks; and the 2 GiB job on a GPU. All settings: `python -m benchmarks.memory`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import BASE, FLAT, PARTS, TWO_GIB
from benchmarks.memory_cases import Setting, module, peaks
from mlm_dist.autobatch import trial
from mlm_dist.choice import CUDA_RESERVE
from mlm_dist.plan import bare, predict
from tests.ranks import run_ranks

CASES = "benchmarks.memory_cases"
GIB = 1 << 30


@pytest.mark.parametrize(
    "setting",
    [
        Setting(checkpoint=True, micro_batch=8, micro_batches=1, selected=1.0, head_chunk=256, vocab=2048),
        Setting(template="zero2", zero=FLAT, world=2, precision="bf16"),
        Setting(template="zero3_offload", zero=PARTS, world=2, micro_batches=1, attention_dropout=0.1),
    ],
    ids=["zero0 checkpointing, head in chunks", "zero2 bf16", "zero3 offload, eager"],
)
def test_predicted_peak_is_within_a_tenth_of_the_measured(setting: Setting) -> None:
    ranks = run_ranks(f"{CASES}:measure", setting.world, {"setting": setting}, env={"DS_ACCELERATOR": "cpu"}, timeout=250)
    prediction = predict(setting.job())
    # On a CPU the host's tensors and the device's are one sum.
    most = max(found["peak"] for found in ranks)
    assert prediction.total + prediction.total_host == pytest.approx(most, rel=0.1)
    assert prediction.total_host == pytest.approx(ranks[0]["host"], rel=0.1)


@pytest.mark.parametrize(
    ("template", "precision", "checkpoint"),
    [("zero0", "fp32", True), ("zero2", "bf16", True), ("zero2", "bf16_pure", False)],
)
def test_a_trial_takes_what_it_is_held_to_take(template: str, precision: str, checkpoint: bool) -> None:
    setting = Setting(
        template=template, precision=precision, checkpoint=checkpoint, world=2, vocab=4096, micro_batches=1
    )
    job, done = setting.job(), []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        done.append(trial(lambda: module(setting), job, 0, torch.device("cpu")))
    assert done == [True]
    assert bare(job) == pytest.approx(peaks(profiler)["peak"], rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_2_gib_job_fits_where_the_tutorials_loop_does_not() -> None:
    (fitted,) = run_ranks(f"{CASES}:notebook_cuda", 1, {"sizes": {}, "seq_len": BASE["seq_len"], "cap": 2 * GIB})
    assert not fitted
    # Tensors have what the context leaves.
    (peak,) = run_ranks(f"{CASES}:measure_cuda", 1, {"setting": TWO_GIB, "cap": 2 * GIB - CUDA_RESERVE})
    assert peak == pytest.approx(predict(replace(TWO_GIB.job(), device="cuda", attention="sdpa")).total, rel=0.1)
