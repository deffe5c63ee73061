"""The masked-LM head in chunks: the same numbers as at once, in memory that does not grow with the positions."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM

from mlm_dist.errors import UserError
from mlm_dist.model.bert import ModelConfig, load_config
from mlm_dist.model.head import Head, check_head

HIDDEN, VOCABULARY = 16, 4001


def stock(dtype: torch.dtype = torch.float32) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertForMaskedLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2, generator=generator)
    return model.to(dtype)


def make_head(chunk: int) -> Head:
    return Head(stock(), chunk=chunk)


def inputs(count: int, tokens: int = 300, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    selected = torch.randperm(tokens, generator=generator)[:count].sort().values
    return hidden, selected, torch.randint(VOCABULARY, (count,), generator=generator)


def run(head: Head, hidden: Tensor, *where: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, number right, gradients: of the hidden states, then of the weights by name."""
    loss, correct = head(hidden, *where)
    loss.backward()
    grads = [hidden.grad, *(p.grad for p in head.external_parameters())]
    assert all(grad is not None for grad in grads)
    return loss, correct, grads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 50, 99, 100, 2048])
def test_chunks_give_what_the_whole_gives(dtype: torch.dtype, chunk: int) -> None:
    theirs, (hidden, selected, labels) = stock(dtype), inputs(100, dtype=dtype)
    logits = theirs.cls(hidden)[selected]
    labels[::3] = logits.argmax(-1)[::3]  # some are right
    expected = F.cross_entropy(logits, labels, reduction="sum")
    expected.backward()
    want = [hidden.grad, *(p.grad for p in Head(theirs).external_parameters())]

    loss, correct, got = run(Head(stock(dtype), chunk=chunk), *inputs(100, dtype=dtype)[:2], labels)
    near = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss.dtype == dtype and correct.dtype == torch.int64
    assert 33 < correct.item() < 100 and correct.item() == (logits.argmax(-1) == labels).sum().item()
    torch.testing.assert_close(loss, expected, rtol=near, atol=0)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=near * float(other.abs().max()))


@pytest.mark.parametrize("chunk", [1, 2048])
def test_nothing_selected_gives_zeros(chunk: int) -> None:
    loss, correct, grads = run(make_head(chunk), *inputs(0))
    assert loss.item() == 0.0 and correct.item() == 0
    assert all(grad.count_nonzero() == 0 for grad in grads)


def test_evaluation_in_chunks_gives_the_numbers_without_a_graph() -> None:
    where = inputs(100)
    with torch.no_grad():
        loss, correct = make_head(7)(*where)
    whole, right = make_head(2048)(*where)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    assert correct.item() == right.item() and not loss.requires_grad


@pytest.mark.parametrize("chunk", [13, 2048])
def test_the_sum_is_fp32_under_autocast(chunk: int) -> None:
    exact = run(make_head(2048), *inputs(100))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = make_head(chunk)(*inputs(100))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact[0], rtol=0.01, atol=0)


class Products(TorchDispatchMode):
    """Counts products with the vocabulary by the number of positions in them."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) and out.shape[-1] == VOCABULARY:
            self.positions.append(len(out))
        return out


@pytest.mark.parametrize(("chunk", "forward", "again"), [(100, [100], []), (40, [40, 40, 20], [20, 40, 40])])
def test_logits_of_the_selected_alone_and_of_one_chunk_once(chunk: int, forward: list[int], again: list[int]) -> None:
    head = make_head(chunk)
    with Products() as seen:
        loss, _ = head(*inputs(100))
    assert seen.positions == forward
    with Products() as seen:
        loss.backward()
    assert [n for n in seen.positions if n != HIDDEN] == again  # the gradient of the decoder has HIDDEN rows


class Live(TorchDispatchMode):
    """Bytes of the storages that operators made and that live, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak(chunk: int, count: int) -> int:
    head, where = make_head(chunk), inputs(count, tokens=16384)
    with Live() as live:
        loss, _ = head(*where)
        loss.backward()
    return live.peak


def test_peak_memory_does_not_grow_with_the_positions() -> None:
    logits = 512 * VOCABULARY * 4
    few, many = peak(512, 1024), peak(512, 16384)
    assert 2 * logits < few < 6 * logits
    assert many < 1.02 * few
    # The measure is not blind: without chunks it grows with them.
    assert peak(4096, 4096) > 6 * peak(4096, 512)


# ---- liger ----


def test_liger_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check_head("torch", cuda=False)
    with pytest.raises(UserError, match=r"model\.head: 'liger' has kernels for CUDA only"):
        check_head("liger", cuda=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "liger_kernel" else sys)
    with pytest.raises(UserError, match=r"pip install 'mlm-dist\[liger\]'"):
        check_head("liger", cuda=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("head", "fused", "model.head: 'fused' is unknown"), ("head_chunk", 0, "model.head_chunk: 0 must be at least 1")],
)
def test_wrong_keys_are_named(key: str, value: Any, message: str) -> None:
    cfg = ModelConfig(config={"hidden_size": 8, "num_attention_heads": 2}, **{key: value})
    with pytest.raises(UserError, match=message):
        load_config(cfg, vocab_size=50, pad_token_id=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [0, 100])
def test_liger_gives_what_torch_gives(count: int) -> None:
    pytest.importorskip("liger_kernel")
    results = []
    for kind in ("torch", "liger"):
        head = Head(stock().cuda(), kind)
        hidden, *where = (x.detach().cuda() for x in inputs(count))
        results.append(run(head, hidden.requires_grad_(), *where))
    (loss, correct, grads), (other, also, others) = results
    torch.testing.assert_close(loss, other, rtol=1e-4, atol=1e-4)
    assert correct.item() == also.item()
    for one, two in zip(grads, others, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3 * max(1.0, float(two.abs().max())))
