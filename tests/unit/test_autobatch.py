"""Finding the micro-batch in one process: up, down, not at all, and not twice."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from mlm_dist import autobatch
from mlm_dist.choice import needed
from mlm_dist.errors import UserError
from mlm_dist.model.bert import ModelConfig, build, load_config
from mlm_dist.model.head import MaskedLM
from mlm_dist.plan import predict
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
    have(monkeypatch, need(12) * 0.95)
    passes: list[int] = []
    assert settle(100, passes).rows == 12
    assert passes == [8, 12]
    passes.clear()
    assert settle(8, passes).rows == 8
    assert passes == [8, 12]


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


def test_the_worst_micro_batch_is_full_and_flat_where_attention_wants_it() -> None:
    padded = autobatch.worst_case(job_of(3), CPU)
    assert padded["input_ids"].shape == padded["segment_ids"].shape == (3, 32)
    assert len(padded["selected"]) == len(padded["labels"]) == int(0.3 * 96)
    from dataclasses import replace

    flat = autobatch.worst_case(replace(job_of(3), attention="varlen"), CPU)
    assert flat["input_ids"].shape == flat["position_ids"].shape == (1, 96)
    assert flat["cu_seqlens"].tolist() == [0, 32, 64, 96]
    assert flat["max_length"] == 32
