"""Predictions of the validation set: the model's own, and nothing else of the validation changes."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from mlm_dist.data.rows import Rows
from mlm_dist.model.head import Head, MaskedLM
from mlm_dist.samples import BEST, Sampler
from tests.corpora import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return BertTokenizerFast.from_pretrained(path)


@pytest.fixture(scope="module")
def stock(tokenizer: Any) -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)
    return BertForMaskedLM(config).eval()


@pytest.fixture(scope="module")
def model(stock: BertForMaskedLM) -> MaskedLM:
    return MaskedLM(copy.deepcopy(stock), head_chunk=3).eval()


def rows(tokenizer: Any) -> Rows:
    """Two rows: of two pieces, and of one; in each piece the second and fourth words are labelled, the fourth is masked."""
    words = tokenizer.convert_tokens_to_ids(["the", "of", "in", "a", "is"])
    piece = np.asarray([tokenizer.cls_token_id, *words, tokenizer.sep_token_id], np.uint16)
    masked = piece.copy()
    masked[4] = tokenizer.mask_token_id
    labels = piece[[2, 4]]
    return Rows(
        ids=np.tile(masked, 3),
        lengths=np.asarray([14, 7], np.int32),
        segment_lengths=np.full(3, 7, np.int32),
        segments=np.asarray([2, 1], np.int32),
        positions=np.asarray([2, 4, 9, 11, 2, 4], np.int32),
        labels=np.tile(labels, 3),
        selected=np.asarray([4, 2], np.int32),
    )


def head_of(model: MaskedLM) -> Head:
    return next(part for part in model.modules() if isinstance(part, Head))


def forward(model: MaskedLM) -> Any:
    @torch.no_grad()
    def run(micro: dict[str, Any]) -> Any:
        if "cu_seqlens" in micro:  # varlen needs a GPU: here the same numbers for what is one row
            ids, at = micro["input_ids"], torch.repeat_interleave(micro["cu_seqlens"].diff())
            micro = {k: micro[k] for k in ("selected", "labels", "position_ids")} | {"input_ids": ids}
            micro["segment_ids"] = at[None] + 1
        return model(**micro)

    return run


@pytest.mark.parametrize("flat", [False, True])
def test_predictions_are_the_models_own(tokenizer: Any, stock: BertForMaskedLM, model: MaskedLM, flat: bool) -> None:
    micro = rows(tokenizer).collate(tokenizer.pad_token_id, flat=flat)
    sampler = Sampler(forward(model), head_of(model), tokenizer, most=2)
    expected = forward(model)(micro)
    assert [torch.equal(a, b) for a, b in zip(sampler(micro), expected, strict=True)] == [True, True]
    assert head_of(model).watch is None
    piece = tokenizer("the of in [MASK] is", return_tensors="pt")
    with torch.no_grad():
        shares = stock(**piece).logits[0, 4].softmax(-1)
    truth = tokenizer.convert_tokens_to_ids("a")
    for row in sampler.rows:
        assert (row["text"], row["truth"]) == ("the of in «[MASK]» is", "a")
        assert row["truth_probability"] == pytest.approx(float(shares[truth]), abs=1e-6)
        words = [tokenizer.decode([i]) for i in shares.topk(BEST).indices.tolist()]
        assert [word for word, _ in row["predictions"]] == words
        assert [p for _, p in row["predictions"]] == pytest.approx(shares.topk(BEST).values.tolist(), abs=1e-6)
    assert len(sampler.rows) == 2


def test_what_was_wanted_is_not_looked_for_any_more(tokenizer: Any, model: MaskedLM) -> None:
    micro = rows(tokenizer).collate(tokenizer.pad_token_id)
    empty = Rows.empty(1, tokenizer.cls_token_id, tokenizer.sep_token_id, np.dtype(np.uint16)).collate(0)
    sampler = Sampler(forward(model), head_of(model), tokenizer, most=4)
    losses = [float(sampler(part)[0]) for part in (empty, micro, micro, micro)]
    assert losses == [0.0, *[float(forward(model)(micro)[0])] * 3] and len(sampler.rows) == 4
