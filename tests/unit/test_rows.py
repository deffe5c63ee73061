"""Rows with labels on their padding: what they hold, how they are collated, and that the loss is stock BERT's on padded batches."""

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

from mlm_dist.data.rows import Rows
from mlm_dist.model.head import MaskedLM
from tests.berts import small_bert

PAD, CLS, SEP, MASK, VOCABULARY = 0, 2, 3, 4, 97
LENGTHS = (20, 9, 3, 14)


def one_segment_rows() -> tuple[Rows, list[np.ndarray]]:
    """Rows of one segment with all of their tokens labelled, as ``labels: all`` gives them, and their tokens before masking."""
    rng = np.random.default_rng(0)
    parts = [np.r_[CLS, rng.integers(5, VOCABULARY, n - 2), SEP].astype(np.uint16) for n in LENGTHS]
    truth = np.concatenate(parts)
    lengths = np.asarray(LENGTHS, np.int32)
    rows = Rows(
        ids=np.where((truth > MASK) & (rng.random(len(truth)) < 0.3), MASK, truth).astype(np.uint16),
        lengths=lengths,
        segment_lengths=lengths,
        segments=np.ones(len(lengths), np.int32),
        positions=np.concatenate([np.arange(n) for n in LENGTHS]).astype(np.int32),
        labels=truth,
        selected=lengths,
    )
    return rows, parts


@pytest.mark.parametrize("width", [20, 24, 29])
def test_padded_rows_hold_and_label_their_pads(width: int) -> None:
    rows, truth = one_segment_rows()
    padded = rows.padded(width, PAD)
    assert padded.ids.dtype == rows.ids.dtype and padded.labels.dtype == rows.labels.dtype
    assert (padded.lengths == width).all() and (padded.segment_lengths == width).all() and (padded.segments == 1).all()
    assert (padded.positions.reshape(4, width) == np.arange(width)).all() and (padded.selected == width).all()
    for r, original in enumerate(truth):
        row = padded.slice(r, r + 1)
        assert row.labels.tolist() == original.tolist() + [PAD] * (width - len(original))
        assert row.ids.tolist() == rows.slice(r, r + 1).ids.tolist() + [PAD] * (width - len(original))
    assert (padded.original_ids() == padded.labels).all()


def test_padding_labels_every_place_of_rows_with_few_labels() -> None:
    rows, truth = one_segment_rows()
    few = Rows(
        ids=rows.ids,
        lengths=rows.lengths,
        segment_lengths=rows.segment_lengths,
        segments=rows.segments,
        positions=np.concatenate([np.flatnonzero(rows.slice(r, r + 1).ids != t) for r, t in enumerate(truth)]),
        labels=np.concatenate(truth)[rows.ids != np.concatenate(truth)],
        selected=np.asarray([(rows.slice(r, r + 1).ids != t).sum() for r, t in enumerate(truth)], np.int32),
    )
    assert 0 < few.selected.sum() < few.lengths.sum()
    assert (few.padded(24, PAD).labels == rows.padded(24, PAD).labels).all()


def test_rows_that_cannot_be_padded() -> None:
    rows, _ = one_segment_rows()
    with pytest.raises(AssertionError):
        rows.padded(max(LENGTHS) - 1, PAD)
    assert len(rows.slice(0, 0).padded(24, PAD)) == 0


def test_collation_marks_the_pads_that_a_row_holds() -> None:
    rows, _ = one_segment_rows()
    micro = rows.padded(22, PAD).collate(PAD)
    assert micro["input_ids"].shape == (4, 24)
    for r, n in enumerate(LENGTHS):
        assert micro["segment_ids"][r].tolist() == [1] * n + [-1] * (22 - n) + [0, 0]
        assert micro["position_ids"][r].tolist() == [*range(22), 0, 0]
    assert micro["selected"].tolist() == [24 * r + i for r in range(4) for i in range(22)]
    # Rows that hold none are collated as ever.
    plain = rows.collate(PAD)
    assert plain["segment_ids"].tolist() == [[1] * n + [0] * (24 - n) for n in LENGTHS]


def stock() -> BertForMaskedLM:
    return small_bert(VOCABULARY, pad_token_id=PAD).eval()


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("width", [20, 24])  # 20 is collated to 24, with padding that nobody sees
def test_the_loss_on_padded_rows_is_stock_berts(back_end: str, width: int) -> None:
    theirs, ours = stock(), MaskedLM(stock(), back_end)
    theirs.set_attn_implementation(back_end)
    rows, truth = one_segment_rows()
    padded = rows.padded(width, PAD)
    input_ids = torch.from_numpy(padded.ids.reshape(4, width).astype(np.int64))
    labels = torch.from_numpy(
        np.stack([np.pad(t, (0, width - len(t)), constant_values=PAD) for t in truth]).astype(np.int64)
    )
    attention_mask = (labels != PAD).long()
    assert (attention_mask == 0).any()
    expected = theirs(input_ids, attention_mask=attention_mask, labels=labels)

    micro = padded.collate(PAD)
    loss, correct = ours(**micro)
    torch.testing.assert_close(loss / labels.numel(), expected.loss, atol=1e-6, rtol=1e-6)
    assert correct.item() == (expected.logits.argmax(-1) == labels).sum().item()
    # Neither pads as keys nor pads that see only each other give that loss.
    for other in (micro["segment_ids"].abs(), micro["segment_ids"].clamp_min(0)):
        wrong, _ = ours(**{**micro, "segment_ids": other})
        assert abs(wrong - loss).item() / labels.numel() > 1e-4

    ours.zero_grad(), theirs.zero_grad()
    (loss / labels.numel()).backward()
    expected.loss.backward()
    for (name, one), (_, theirs_too) in zip(ours.model.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.grad is not None and theirs_too.grad is not None, name
        torch.testing.assert_close(one.grad, theirs_too.grad, atol=1e-6, rtol=1e-5)
