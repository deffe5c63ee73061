"""MaskedLM against stock BertForMaskedLM, and the isolation of packed documents."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertForMaskedLM

from mlm_dist.errors import UserError
from mlm_dist.model.attention import resolve_attention, segment_mask
from mlm_dist.model.head import MaskedLM
from tests.berts import small_bert

VOCABULARY = 211
BACK_ENDS = ("sdpa", "eager")
Batch = dict[str, Tensor]


def stock(dropout: float = 0.0) -> BertForMaskedLM:
    return small_bert(VOCABULARY, dropout=dropout)


def documents(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in lengths]


def pack(rows: list[list[Tensor]], width: int) -> Batch:
    """One row for each list of documents; nothing selected."""
    shape = (len(rows), width)
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "position_ids", "segment_ids")}
    for r, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, 1):
            place = slice(start, start + len(document))
            batch["input_ids"][r, place] = document
            batch["position_ids"][r, place] = torch.arange(len(document))
            batch["segment_ids"][r, place] = number
            start += len(document)
        assert start <= width
    nothing = torch.empty(0, dtype=torch.int64)
    return {**batch, "selected": nothing, "labels": nothing}


def select(batch: Batch, rate: float, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    real = batch["segment_ids"].flatten() > 0
    chosen = (real & (torch.rand(real.shape, generator=generator) < rate)).nonzero().flatten()
    labels = torch.randint(5, VOCABULARY, chosen.shape, generator=generator)
    return {**batch, "selected": chosen, "labels": labels}


def stock_labels(batch: Batch) -> Tensor:
    labels = torch.full((batch["input_ids"].numel(),), -100)
    labels[batch["selected"]] = batch["labels"]
    return labels.view_as(batch["input_ids"])


def encode(module: MaskedLM, batch: Batch) -> Tensor:
    return module.encode(batch["input_ids"], batch["position_ids"], batch["segment_ids"])


def scores(module: MaskedLM, batch: Batch) -> Tensor:
    return module.model.cls(encode(module, batch).flatten(0, 1)[batch["selected"]])


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("lengths", [[24, 24, 24], [24, 7, 1]], ids=["full", "padded"])
@pytest.mark.parametrize("rate", [0.15, 1.1], ids=["masked", "all"])
def test_equals_stock_bert(back_end: str, lengths: list[int], rate: float) -> None:
    ours, theirs = MaskedLM(stock(), back_end), stock()
    theirs.set_attn_implementation(back_end)
    batch = select(pack([[document] for document in documents(lengths)], 24), rate)
    expected = theirs(batch["input_ids"], attention_mask=(batch["segment_ids"] > 0).long(), labels=stock_labels(batch))
    count = len(batch["selected"])
    loss, correct = ours(**batch)

    assert count > 0
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss / count, expected.loss, atol=1e-6, rtol=1e-6)
    logits = expected.logits.flatten(0, 1)[batch["selected"]]
    torch.testing.assert_close(scores(ours, batch), logits, atol=1e-5, rtol=1e-6)
    assert correct.dtype == torch.int64
    assert correct.item() == (logits.argmax(-1) == batch["labels"]).sum().item()

    (loss / count).backward()
    expected.loss.backward()
    for (name, one), (_, other) in zip(ours.model.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(
            one.grad, other.grad, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("lengths", [[24, 24, 24], [24, 7, 1]], ids=["full", "padded"])
def test_logits_equal_stock_to_1e_6_at_weights_of_the_usual_size(lengths: list[int]) -> None:
    theirs = stock()
    with torch.no_grad():  # BERT's own scale, 0.02; the other tests use ten times that, where rounding is larger too
        for name, parameter in theirs.named_parameters():
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.sub_(centre).mul_(0.1).add_(centre)
    ours = MaskedLM(theirs)
    batch = select(pack([[document] for document in documents(lengths)], 24), 0.15)
    logits = theirs(batch["input_ids"], attention_mask=(batch["segment_ids"] > 0).long()).logits
    expected = logits.flatten(0, 1)[batch["selected"]]
    torch.testing.assert_close(scores(ours, batch), expected, atol=1e-6, rtol=0)


def test_default_back_end_equals_stock_default() -> None:
    ours, theirs = MaskedLM(stock()), stock()
    batch = select(pack([[document] for document in documents([20, 20])], 20), 0.3)
    loss, _ = ours(**batch)
    expected = theirs(batch["input_ids"], labels=stock_labels(batch)).loss
    torch.testing.assert_close(loss / len(batch["selected"]), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("back_end", BACK_ENDS)
@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), padding=st.integers(0, 5), seed=st.integers(0, 99))
def test_packed_documents_are_as_if_alone(back_end: str, lengths: list[int], padding: int, seed: int) -> None:
    module = MaskedLM(stock(), back_end).eval()
    row = documents(lengths, seed)
    with torch.no_grad():
        hidden = encode(module, pack([row], sum(lengths) + padding))[0]
        start = 0
        for document in row:
            alone = module.model.bert(document[None]).last_hidden_state[0]
            torch.testing.assert_close(hidden[start : start + len(document)], alone, atol=1e-5, rtol=1e-5)
            start += len(document)
    assert hidden.isfinite().all()


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("bf16", [False, True])
def test_neighbours_do_not_change_by_a_bit(back_end: str, bf16: bool) -> None:
    module = MaskedLM(stock(), back_end)
    first, second, third = documents([9, 13, 8])
    other = documents([13], seed=7)[0]

    def run(middle: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return encode(module, pack([[first, middle, third]], 36))[0]

    before, after = run(second), run(other)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[22:], after[22:])  # the third document and the padding
    assert not torch.equal(before[9:22], after[9:22])


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_gradient_of_a_document_does_not_reach_its_neighbours(back_end: str) -> None:
    module = MaskedLM(stock(), back_end)
    batch = pack([documents([6, 6])], 14)
    embedded = []
    module.model.bert.embeddings.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    hidden = encode(module, batch)
    embedded[0].retain_grad()
    hidden[0, :6].square().sum().backward()
    assert embedded[0].grad[0, :6].abs().sum() > 0
    assert embedded[0].grad[0, 6:].count_nonzero() == 0


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_nothing_selected_gives_zero_loss_and_zero_gradients(back_end: str) -> None:
    module = MaskedLM(stock(), back_end)
    empty_row = torch.tensor([2, 3])
    loss, correct = module(**pack([[empty_row], [empty_row]], 4))
    assert loss.item() == 0.0 and correct.item() == 0
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() == 0 and parameter.grad.isfinite().all(), name


def test_micro_batches_add_up_to_the_batch() -> None:
    module = MaskedLM(stock())
    rows = [documents([10, 5], 1), documents([7], 2), documents([3, 3, 3], 3)]
    whole = select(pack(rows, 16), 0.4)
    loss, correct = module(**whole)
    parts = []
    for r, row in enumerate(rows):
        mine = whole["selected"] // 16 == r
        parts.append(
            module(**{**pack([row], 16), "selected": whole["selected"][mine] % 16, "labels": whole["labels"][mine]})
        )
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    assert sum(part[1].item() for part in parts) == correct.item()


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bf16_is_near_fp32(back_end: str, how: str) -> None:
    batch = select(pack([documents([12, 9]), documents([20])], 24), 0.5)
    expected, _ = MaskedLM(stock(), back_end)(**batch)
    module = MaskedLM(stock(), back_end)
    if how == "weights":
        module = module.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss, _ = module(**batch)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.0)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_checkpointed_activations_change_no_bit_with_dropout(back_end: str) -> None:
    plain = MaskedLM(stock(dropout=0.1), back_end)
    again = copy.deepcopy(plain)
    again.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    batch = select(pack([documents([12, 9])], 24), 0.5)
    gradients = []
    for module in (plain, again):
        torch.manual_seed(3)
        loss, _ = module(**batch)
        loss.backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_state_is_stock_with_a_prefix_and_the_decoder_is_tied() -> None:
    module = MaskedLM(stock())
    assert set(module.state_dict()) == {f"model.{name}" for name in stock().state_dict()}
    predictions = module.model.cls.predictions
    assert predictions.decoder.weight is module.model.bert.embeddings.word_embeddings.weight
    assert predictions.decoder.bias is predictions.bias


def test_auto_takes_eager_only_for_attention_dropout_on_a_cpu() -> None:
    assert resolve_attention("auto", device_type="cpu", dropout=0.1) == "eager"
    assert resolve_attention("auto", device_type="cpu", dropout=0.0) == "sdpa"
    assert resolve_attention("auto", device_type="cuda", dropout=0.1) == "sdpa"
    assert resolve_attention("eager", device_type="cuda", dropout=0.0) == "eager"
    assert resolve_attention("sdpa", device_type="cpu", dropout=0.1) == "sdpa"
    module = MaskedLM(stock(dropout=0.1))
    batch = select(pack([documents([5])], 6), 1.1)
    used = []
    for training in (True, False, True):
        module.train(training)(**batch)
        used.append(module.model.config._attn_implementation)
    assert used == ["eager", "sdpa", "eager"]


def test_unknown_attention_is_named() -> None:
    with pytest.raises(UserError, match=r"model\.attention: 'flash' is unknown.*auto, varlen, sdpa, eager"):
        MaskedLM(stock(), "flash")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mask_is_block_diagonal(dtype: torch.dtype) -> None:
    mask = segment_mask(torch.tensor([[1, 1, 2, 0, 0]]), dtype)
    assert mask.shape == (1, 1, 5, 5) and mask.dtype == dtype and mask.isfinite().all()
    assert (mask[0, 0] == 0).long().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
    ]
    assert torch.softmax(mask, -1)[0, 0, 0, 2:].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pads_of_a_segment_see_it_and_are_seen_by_none(dtype: torch.dtype) -> None:
    mask = segment_mask(torch.tensor([[1, 1, -1, 2, -2, -2, 0]]), dtype)
    assert mask.shape == (1, 1, 7, 7) and mask.dtype == dtype and mask.isfinite().all()
    assert (mask[0, 0] == 0).long().tolist() == [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
