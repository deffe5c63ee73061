"""Which attention is taken, and that documents of a row stay apart in each; what transformers does by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertForMaskedLM

import tests.varlen_cpu  # noqa: F401
from mlm_dist.data.rows import Rows
from mlm_dist.errors import UserError
from mlm_dist.model import attention
from mlm_dist.model.head import MaskedLM
from tests.berts import small_bert

VOCABULARY, PAD = 211, 0
# Tokens of the segments of each row; rows of one segment are what packing `none` gives.
PACKED = [[9, 13, 2], [24], [5, 5, 5, 5]]
SINGLE = [[24], [7], [2]]


def stock(dtype: torch.dtype = torch.float64) -> BertForMaskedLM:
    return small_bert(VOCABULARY, pad_token_id=PAD).to(dtype)


def make_rows(lengths: list[list[int]], rate: float = 0.4, seed: int = 0) -> Rows:
    draw = np.random.default_rng(seed)
    totals = np.asarray([sum(row) for row in lengths], np.int32)
    chosen = draw.random(totals.sum()) < rate
    starts = np.cumsum(totals) - totals
    row_of = np.repeat(np.arange(len(totals)), totals)
    return Rows(
        ids=draw.integers(5, VOCABULARY, totals.sum()).astype(np.uint16),
        lengths=totals,
        segment_lengths=np.concatenate(lengths).astype(np.int32),
        segments=np.asarray([len(row) for row in lengths], np.int32),
        positions=(np.flatnonzero(chosen) - starts[row_of[chosen]]).astype(np.int32),
        labels=draw.integers(5, VOCABULARY, chosen.sum()).astype(np.uint16),
        selected=np.bincount(row_of[chosen], minlength=len(totals)).astype(np.int32),
    )


def collate(rows: Rows, back_end: str, filled: bool = False) -> dict[str, Any]:
    return rows.collate(PAD, flat=back_end == "varlen", shape=(len(rows) + 1, 28) if filled else None)


def alone(rows: Rows, model: BertForMaskedLM) -> tuple[Tensor, int]:
    """The loss and the number right by stock BERT, with the logits of all tokens, each document a batch of its own."""
    labels = np.full(len(rows.ids), -100, np.int64)
    starts = np.cumsum(rows.lengths) - rows.lengths
    labels[np.repeat(starts, rows.selected) + rows.positions] = rows.labels
    ends = np.cumsum(rows.segment_lengths)
    losses, right = [], 0
    for start, end in zip(ends - rows.segment_lengths, ends, strict=True):
        wanted = torch.from_numpy(labels[None, start:end])
        out = model(torch.from_numpy(rows.ids[None, start:end].astype(np.int64)))
        losses.append(torch.nn.functional.cross_entropy(out.logits[0], wanted[0], reduction="sum"))
        right += int((out.logits.argmax(-1) == wanted).sum())
    return torch.stack(losses).sum(), right


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("back_end", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("chunk", [2048, 7], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("lengths", [PACKED, SINGLE], ids=["packed", "single"])
@pytest.mark.parametrize("filled", [False, True], ids=["as it is", "one shape"])
def test_loss_and_gradients_are_those_of_stock_bert_on_each_document_alone(
    dtype: torch.dtype, near: float, back_end: str, chunk: int, lengths: list[list[int]], filled: bool
) -> None:
    theirs, ours = stock(dtype), MaskedLM(stock(dtype), back_end, head_chunk=chunk)
    rows = make_rows(lengths)
    assert rows.selected.sum() > 7
    expected, right = alone(rows, theirs)
    loss, correct = ours(**collate(rows, back_end, filled))
    torch.testing.assert_close(loss, expected, atol=0, rtol=near)
    assert loss.dtype == dtype and correct.item() == right

    loss.backward(), expected.backward()
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters())
    for (name, one), (_, other) in zip(ours.model.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, atol=near * largest, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("filled", [False, True])
def test_a_flat_micro_batch_holds_what_a_padded_one_holds(filled: bool) -> None:
    rows = make_rows(PACKED)
    flat, padded = collate(rows, "varlen", filled), collate(rows, "sdpa", filled)
    tokens, real = int(flat["input_ids"].numel()), len(rows.ids)
    assert tokens == (4 * 28 if filled else real)
    assert padded["input_ids"].shape == ((4, 28) if filled else (3, 24))
    inside = padded["segment_ids"] > 0
    for name in ("input_ids", "position_ids"):
        assert flat[name].shape == (1, tokens) and flat[name].dtype == torch.int64
        assert torch.equal(flat[name][0, :real], padded[name][inside])
        assert not flat[name][0, real:].any()
    for name in ("selected", "labels"):
        assert flat[name].dtype == torch.int64
    assert torch.equal(flat["labels"], padded["labels"])
    picked = [m["input_ids"].flatten()[m["selected"]] for m in (flat, padded)]
    assert torch.equal(*picked) and len(picked[0]) == rows.selected.sum()
    bounds = flat["cu_seqlens"]
    assert bounds.dtype == torch.int32
    assert bounds.diff().tolist()[: len(rows.segment_lengths)] == rows.segment_lengths.tolist()
    assert bounds[0] == 0 and bounds[-1] == tokens
    assert type(flat["max_length"]) is int
    assert flat["max_length"] == (28 if filled else bounds.diff().max())
    assert bounds.diff().max() <= flat["max_length"]


def test_rows_whose_pads_see_are_never_flat() -> None:
    rows = make_rows(SINGLE).padded(24, PAD)
    with pytest.raises(AssertionError, match="PAD"):
        rows.collate(PAD, flat=True)


@pytest.mark.parametrize("back_end", ["varlen", "sdpa", "eager"])
def test_neighbours_and_filling_do_not_change_a_document_by_a_bit(back_end: str) -> None:
    module = MaskedLM(stock(torch.float32), back_end).eval()
    rows, others = make_rows([[9, 11, 8]]), make_rows([[9, 11, 8]], seed=1)
    others.ids[:9] = rows.ids[:9]

    def first(rows: Rows) -> Tensor:
        micro = collate(rows, back_end, filled=True)
        with torch.no_grad():
            return module.encode(**{k: v for k, v in micro.items() if k not in ("selected", "labels")})[0, :9]

    assert torch.equal(first(rows), first(others))


# ---- what transformers 5.23 does by itself, and why `attention.py` does otherwise ----


def hidden(model: BertForMaskedLM, back_end: str, ids: Tensor, **inputs: Any) -> Tensor:
    model.set_attn_implementation(back_end)
    with torch.no_grad():
        return model.bert(ids, **inputs).last_hidden_state[0]


TRAPS = [4, 6]
IDS = torch.arange(10, 20)[None]
POSITIONS = torch.cat([torch.arange(n) for n in TRAPS])[None]
BOUNDS = torch.tensor([0, 4, 10], dtype=torch.int32)
SEGMENTS = torch.tensor([[1] * 4 + [2] * 6])


@pytest.fixture
def apart() -> Tensor:
    """Hidden states of the two documents of `IDS`, each alone."""
    return torch.cat([hidden(stock().eval(), "sdpa", part) for part in IDS.split(TRAPS, 1)])


def leaks(got: Tensor, apart: Tensor) -> bool:
    return not torch.allclose(got, apart, atol=1e-3)


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
def test_positions_alone_leak(back_end: str, apart: Tensor) -> None:
    assert leaks(hidden(stock().eval(), back_end, IDS, position_ids=POSITIONS), apart)


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
def test_bounds_alone_are_ignored_by_sdpa_and_eager(back_end: str, apart: Tensor) -> None:
    bounds = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 6, "max_length_k": 6}
    assert leaks(hidden(stock().eval(), back_end, IDS, position_ids=POSITIONS, **bounds), apart)


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
def test_two_dimensional_segments_are_taken_for_a_padding_mask(back_end: str, apart: Tensor) -> None:
    assert leaks(hidden(stock().eval(), back_end, IDS, position_ids=POSITIONS, attention_mask=SEGMENTS), apart)


def test_a_boolean_mask_is_right_with_sdpa_and_wrong_with_eager(apart: Tensor) -> None:
    mask = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])[:, None]
    got = {b: hidden(stock().eval(), b, IDS, position_ids=POSITIONS, attention_mask=mask) for b in ("sdpa", "eager")}
    assert not leaks(got["sdpa"], apart) and leaks(got["eager"], apart)


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
def test_our_mask_is_right_with_both(back_end: str, apart: Tensor) -> None:
    mask = attention.segment_mask(SEGMENTS, torch.float64)
    got = hidden(stock().eval(), back_end, IDS, position_ids=POSITIONS, attention_mask=mask)
    torch.testing.assert_close(got, apart, atol=1e-12, rtol=0)


def test_a_mask_given_with_varlen_is_refused() -> None:
    module = MaskedLM(stock().eval(), "varlen")
    bounds = {"cu_seq_lens_q": BOUNDS, "max_length_q": 6, "attention_mask": torch.zeros(1, 1, 10, 10)}
    with pytest.raises(AssertionError):
        hidden(module.model, attention.VARLEN, IDS, position_ids=POSITIONS, **bounds)


@pytest.mark.parametrize("back_end", ["varlen", "sdpa", "eager"])
def test_token_types_are_zero_for_every_segment(back_end: str) -> None:
    module = MaskedLM(stock(), back_end)
    seen: list[Tensor] = []
    module.model.bert.embeddings.token_type_embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    micro = collate(make_rows(PACKED), back_end)
    module(**micro)
    assert len(seen) == 1 and seen[0].numel() == micro["input_ids"].numel() and not seen[0].any()


# ---- the choice ----

GOOD: dict[str, Any] = {
    "capability": (9, 0),
    "half_precision": True,
    "dropout": 0.0,
    "head_size": 64,
    "pads_see": False,
}
BAD = {
    "CUDA device": {"capability": None},
    "compute capability 8.0": {"capability": (7, 5)},
    "train.precision": {"half_precision": False},
    "model.attention_dropout is 0.1": {"dropout": 0.1},
    "heads of 12 dimensions": {"head_size": 12},
    "heads of 264 dimensions": {"head_size": 264},
    "mask.labels": {"pads_see": True},
}


def test_varlen_is_taken_where_it_can_be() -> None:
    assert attention.choose("auto", **GOOD) == attention.choose("varlen", **GOOD) == ("varlen", None)
    assert attention.choose("sdpa", **GOOD) == ("sdpa", None)
    assert attention.choose("eager", **GOOD) == ("eager", None)


@pytest.mark.parametrize("reason", BAD)
def test_varlen_is_refused_and_auto_says_what_it_costs(reason: str) -> None:
    with pytest.raises(UserError, match=rf"model\.attention: 'varlen' is not possible: .*{reason}"):
        attention.choose("varlen", **GOOD | BAD[reason])
    name, note = attention.choose("auto", **GOOD | BAD[reason])
    assert name == "auto"
    if BAD[reason].get("capability", 1) is None:  # nothing that a user of a CPU could do about it
        assert note is None
    else:
        assert note is not None and reason in note and "padding" in note


# ---- the real kernel ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("lengths", [PACKED, SINGLE], ids=["packed", "single"])
@pytest.mark.parametrize("filled", [False, True])
def test_the_cuda_kernel_gives_the_loss_and_gradients_of_fp32(lengths: list[list[int]], filled: bool) -> None:
    rows = make_rows(lengths)
    theirs, ours = stock(torch.float32).cuda(), MaskedLM(stock(torch.float32).cuda(), "varlen")
    reference = MaskedLM(theirs, "sdpa")

    def on_device(micro: dict[str, Any]) -> dict[str, Any]:
        return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in micro.items()}

    expected, _ = reference(**on_device(collate(rows, "sdpa")))
    micro = on_device(collate(rows, "varlen", filled))
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = ours(**micro)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    loss.backward(), expected.backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), reference.named_parameters(), strict=True):
        cosine = torch.nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), 0)
        assert cosine > 0.99 or other.grad.norm() < 1e-3, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_flat_forward_and_backward_waits_for_nothing_on_cuda() -> None:
    module = MaskedLM(stock(torch.float32).cuda(), "varlen")
    micro = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in collate(make_rows(PACKED), "varlen").items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = module(**micro)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
