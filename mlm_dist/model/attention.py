"""Attention in which the documents of a packed row never see each other, for stock BERT on any of its back ends."""

from __future__ import annotations

import torch
from torch import Tensor

from mlm_dist.model.bert import check_attention


def resolve_attention(name: str, *, device_type: str, dropout: float) -> str:
    """The transformers back end (`"sdpa"` or `"eager"`) for `model.attention`.

    `dropout` is the attention dropout in force: 0 in evaluation. `"auto"` takes eager on a CPU that drops attention
    weights, where SDPA has no fused kernel and is several times slower (541 against 84 ms a step, 4 layers of 768), and
    SDPA elsewhere.
    """
    if check_attention(name) != "auto":
        return name
    return "eager" if device_type == "cpu" and dropout > 0.0 else "sdpa"


def segment_mask(segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive block-diagonal mask: position i sees position j when both are of one segment.

    Args:
        segment_ids: int64 [B, S]; 0 is padding, 1.. number the documents of a row; -s is a [PAD] of segment s, which sees what s sees and is seen by none (a
            padded position under a two-dimensional attention mask, of use where it carries a label).
        dtype: floating dtype of the attention scores.

    Returns:
        `dtype` [B, 1, S, S], 0 where visible and the dtype's lowest value elsewhere. Padding is a segment of its own,
        so no query is left without a key and no softmax is NaN.

    It is four-dimensional and floating because transformers 5 then passes it on untouched and both back ends add it to
    the scores: a boolean one is silently added as 0/1 by eager, two-dimensional segment ids are read as a padding mask.
    The lowest value, not -inf, keeps a block of keys that is masked throughout free of inf - inf in the kernels'
    running softmax; its weight is exactly 0 all the same.
    """
    visible = segment_ids.abs()[:, None, :, None] == segment_ids[:, None, None, :]
    mask = torch.zeros(visible.shape, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def score_dtype(weights: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype attention scores have: autocast's where it is on, else the weights'.

    A mask of a wider one would overflow to -inf in the cast.
    """
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weights
