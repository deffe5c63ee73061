"""Finding the micro-batch in one process: up, down, not at all, and not twice."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlm_dist import autobatch
from mlm_dist.choice import needed
from mlm_dist.ds_config import load_template
from mlm_dist.errors import UserError
from mlm_dist.model.bert import ModelConfig, build, load_config
from mlm_dist.model.head import MaskedLM
from mlm_dist.plan import bare, predict
from mlm_dist.plan_job import Job, Model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
SECTION = ModelConfig(config=SIZES, hidden_dropout=0.0, attention_dropout=0.0)
CONFIG = load_config(SECTION, vocab_size=97, pad_token_id=0)
CPU = torch.device("cpu")


class Alone:
    """A control group of one rank."""

    world_size = 1

    def sum(self, values: list[int]) -> list[int]:
        return values

    def gather(self, obj: Any) -> list[Any]:
        return [obj]

    def broadcast(self, obj: Any) -> Any:
        return obj


class Limited(MaskedLM):
    """Runs out of memory above so many rows, and counts the passes."""

    def __init__(self, rows: int, passes: list[int]) -> None:
        super().__init__(build(SECTION, CONFIG, seed=0))
        self.rows, self.passes = rows, passes

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.passes.append(len(input_ids))
        if len(input_ids) > self.rows:
            raise torch.OutOfMemoryError("no room")
        return super().forward(input_ids, *args, **kwargs)


def job_of(rows: int) -> Job:
    return Job(Model.of(CONFIG), {"stage": 0}, 1, rows, 32, 0.3, precision="fp32", accumulate=rows < 12, device="cpu")


def settle(limit: int, passes: list[int], **kwargs: Any) -> autobatch.Settled:
    def module_of() -> nn.Module:
        return Limited(limit, passes)

    return autobatch.settle(job_of, module_of, most=12, device=CPU, control=Alone(), **kwargs)


def have(monkeypatch: pytest.MonkeyPatch, nbytes: float) -> None:
    monkeypatch.setattr(autobatch, "memory", lambda device: (int(nbytes), int(nbytes)))


def need(rows: int) -> int:
    return needed(predict(job_of(rows)), "cpu")


def test_what_the_planner_says_is_taken_when_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, need(4) * 1.12)
    assert need(8) * 0.9 > need(4) * 1.12
    passes: list[int] = []
    assert settle(12, passes).rows == 4
    assert passes == [4]


def test_it_grows_while_there_may_be_room_and_no_further_than_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, need(12) * 1.06)
    passes: list[int] = []
    assert settle(100, passes).rows == 12
    assert passes == [8, 12]
    # Less than the slack would be left.
    have(monkeypatch, need(12) * 1.04)
    passes.clear()
    settle(100, passes)
    assert passes == [8]


def test_what_is_settled_leaves_room_but_for_a_single_row(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 1 << 40)
    beside: list[tuple[int, int]] = []

    def trial(module_of: Any, job: Job, ballast: int, device: torch.device) -> bool:
        beside.append((job.micro_batch, ballast))
        return job.micro_batch == 1

    monkeypatch.setattr(autobatch, "trial", trial)
    assert settle(0, []).rows == 1
    for rows, ballast in beside:
        assert ballast == int(need(rows) * (1 if rows == 1 else 1.05)) - bare(job_of(rows))


def test_the_rows_are_those_that_fill_as_many_micro_batches_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, need(8) * 1.12)
    found = settle(11, [])
    assert (found.rows, found.record["rows"]) == (6, 6)
    assert found.how.endswith("8 by the planner for 0.00 GiB, confirmed; 6 rows make as many micro-batches")


def test_a_rank_with_more_rows_than_its_even_share_accumulates(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 1 << 40)
    tried: list[Job] = []
    assert not job_of(15).accumulate
    monkeypatch.setattr(autobatch, "trial", lambda module_of, job, *_: tried.append(job) or job.micro_batch < 30)
    assert autobatch.settle(job_of, Limited, most=30, device=CPU, control=Alone()).rows == 15  # type: ignore[arg-type]
    assert [(job.micro_batch, job.accumulate) for job in tried] == [(30, False), (15, True)]


def test_where_the_whole_model_takes_more_than_the_run_the_planner_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Model(30522, 1024, 24, 16, 4096, 512, 2)
    zero = load_template("zero3_offload")["zero_optimization"]
    base = Job(large, zero, 8, 1, 512, 0.2, attention="varlen", checkpoint_activations=True)
    assert bare(base) > predict(base).total
    monkeypatch.setattr(autobatch, "trial", None)
    device = torch.device("cuda")

    def at(nbytes: float) -> autobatch.Settled:
        have(monkeypatch, nbytes)
        return autobatch.settle(
            lambda rows: replace(base, micro_batch=rows),
            Limited,  # type: ignore[arg-type]
            most=2,
            device=device,
            control=Alone(),
        )

    two = replace(base, micro_batch=2, accumulate=False)
    assert bare(two) > predict(two).total
    found = at(predict(two).total * 1.11)
    assert found.rows == 2 and "not tried" in found.how
    assert at((predict(base).total + predict(two).total) / 2 * 1.1).rows == 1
    with pytest.raises(UserError, match="not even one row"):
        at(predict(base).total * 0.9)


@pytest.mark.parametrize(("stage", "kept"), [(0, True), (2, False)])
def test_a_trial_keeps_gradients_only_where_the_stage_does(stage: int, kept: bool) -> None:
    modules: list[nn.Module] = []

    def module_of() -> nn.Module:
        modules.append(Limited(8, []))
        return modules[0]

    zero = {"stage": stage, "reduce_bucket_size": 1000}
    assert autobatch.trial(module_of, replace(job_of(4), zero=zero), 0, CPU)
    assert {parameter.grad is not None for parameter in modules[0].parameters()} == {kept}


def test_it_halves_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 1 << 40)
    passes: list[int] = []
    assert settle(1, passes).rows == 1
    assert passes == [12, 6, 3, 1]


def test_when_not_one_row_fits_the_user_hears_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 1 << 40)
    with pytest.raises(UserError, match=r"train\.micro_batch: auto .*checkpoint_activations"):
        settle(0, [])


def test_a_record_of_the_same_place_is_taken_without_a_trial_and_of_another_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have(monkeypatch, 1 << 40)
    record = json.loads(json.dumps(settle(3, []).record))
    passes: list[int] = []
    assert settle(100, passes, recorded=record).rows == 3
    assert not passes
    have(monkeypatch, 1 << 41)
    assert settle(100, passes, recorded=record).rows == 12


def test_an_error_that_is_not_of_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 1 << 40)

    class Broken(nn.Module):
        def forward(self, **_: Any) -> Any:
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        autobatch.settle(job_of, Broken, most=2, device=CPU, control=Alone())


def test_a_failed_allocation_on_the_host_is_one_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert autobatch.out_of_memory(caught.value)
    assert autobatch.out_of_memory(torch.OutOfMemoryError())
    assert not autobatch.out_of_memory(RuntimeError("something else"))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "NCCL error in: x.cpp:1, unhandled cuda error. Last error:\nFailed to CUDA malloc 4194304 bytes",
        "NCCL error. Last error:\nCuda failure 2 'Out of memory'",
    ],
)
def test_so_is_what_libraries_say(text: str) -> None:
    for kind in (RuntimeError, torch.AcceleratorError, torch.distributed.DistBackendError):
        assert autobatch.out_of_memory(kind(text))
    assert not autobatch.out_of_memory(ValueError(text))


def test_what_is_to_be_set_after_it_is_another_than_what_was() -> None:
    assert "Set train.micro_batch 4, or auto; " in str(autobatch.too_large(8, auto=False, saved=True))
    found = str(autobatch.too_large(8, auto=True, saved=False))
    assert "Set train.micro_batch 4 (auto may come to as many again); " in found
    assert "no checkpoint yet" in found and "last checkpoint" not in found
    assert "Set model.checkpoint_activations true, or a deepspeed.config" in str(
        autobatch.too_large(1, auto=True, saved=True)
    )


def test_where_the_host_does_not_tell_its_memory_a_number_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free, total = autobatch.memory(CPU)
    assert 0 < free <= total

    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    with pytest.raises(UserError, match=r"train\.micro_batch: auto reads from /proc .*/proc/meminfo"):
        autobatch.memory(CPU)


def test_the_worst_micro_batch_is_full_and_flat_where_attention_wants_it() -> None:
    padded = autobatch.worst_case(job_of(3), CPU)
    assert padded["input_ids"].shape == padded["segment_ids"].shape == (3, 32)
    assert len(padded["selected"]) == len(padded["labels"]) == int(0.3 * 96)
    flat = autobatch.worst_case(replace(job_of(3), attention="varlen"), CPU)
    assert flat["input_ids"].shape == flat["position_ids"].shape == (1, 96)
    assert flat["cu_seqlens"].tolist() == [0, 32, 64, 96]
    assert flat["max_length"] == 32
