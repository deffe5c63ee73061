"""Compiled encoder layers: one graph for all of them and for every batch, or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from mlm_dist.model.compiled import compile_layers, plain_layers
from mlm_dist.model.head import MaskedLM
from tests.unit.test_attention import PAD, make_rows, stock

# Rows with other numbers of segments and of selected positions each time, in one shape.
BATCHES = [[[9, 13, 2], [24], [5, 5, 5, 5]], [[24], [7]], [[3], [4], [2, 2, 2]], [[2]]]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def micro_batches(flat: bool) -> list[dict[str, Any]]:
    return [make_rows(rows, seed=i).collate(PAD, flat=flat, shape=(3, 28)) for i, rows in enumerate(BATCHES)]


def losses(module: MaskedLM, flat: bool) -> list[float]:
    """Of each batch, after its backward, so that gradients add up; torch is seeded before each."""
    out = []
    for seed, micro_batch in enumerate(micro_batches(flat)):
        torch.manual_seed(seed)
        loss, _ = module(**micro_batch)
        loss.backward()
        out.append(loss.item())
    return out


def assert_same_gradients(one: MaskedLM, other: MaskedLM) -> None:
    largest = max(float(p.grad.abs().max()) for p in other.parameters())
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(("flat", "checkpointing"), [(False, False), (True, True)], ids=["padded", "flat, recomputed"])
def test_one_graph_for_all_layers_and_batches(flat: bool, checkpointing: bool) -> None:
    plain = MaskedLM(stock(torch.float32), "varlen" if flat else "sdpa")
    module = copy.deepcopy(plain)
    if checkpointing:
        module.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert compile_layers(module, micro_batches(flat)[-1], autocast=None, backend="aot_eager") is None
    assert losses(module, flat) == pytest.approx(losses(plain, flat), rel=1e-6)
    assert_same_gradients(module, plain)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    plain_layers(module)
    assert not any("forward" in vars(layer) for layer in module.modules())


def test_what_cannot_be_one_graph_is_not_compiled() -> None:
    module = MaskedLM(stock(torch.float32), "sdpa")
    expected = losses(module, flat=False)
    module.zero_grad()
    module.model.bert.encoder.layer[0].output.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    reason = compile_layers(module, micro_batches(False)[0], autocast=None, backend="aot_eager")
    assert reason is not None and "\n" not in reason
    assert all(parameter.grad is None for parameter in module.parameters())
    assert losses(module, flat=False) == expected


def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    module = MaskedLM(stock(torch.float32), "sdpa")
    expected = losses(module, flat=False)
    with config.patch({"cpp.cxx": (None, "/nonexistent/g++"), "fx_graph_cache": False}):
        reason = compile_layers(module, micro_batches(False)[0], autocast=None)
    assert reason is not None and "compiler" in reason
    assert losses(module, flat=False) == expected


def test_running_out_of_memory_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    module = MaskedLM(stock(torch.float32), "sdpa")
    monkeypatch.setattr(module, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        compile_layers(module, micro_batches(False)[0], autocast=None, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_gives_the_plain_losses_and_the_same_dropout_from_the_same_seed() -> None:
    plain = MaskedLM(stock(torch.float32), "sdpa")
    module = copy.deepcopy(plain)
    assert compile_layers(module, micro_batches(False)[0], autocast=None) is None
    assert losses(module, flat=False) == pytest.approx(losses(plain, flat=False), rel=1e-5)
    assert_same_gradients(module, plain)
    assert counters["stats"]["unique_graphs"] == 1

    plain_layers(module)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1
    assert compile_layers(module, micro_batches(False)[0], autocast=None) is None
    first = losses(module, flat=False)
    assert first == losses(module, flat=False)
    assert first != pytest.approx(losses(plain, flat=False), rel=1e-3)
