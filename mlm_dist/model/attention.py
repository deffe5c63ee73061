"""Attention in which the documents of a packed row never see each other, for stock models on any of its back ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlm_dist.errors import UserError
from mlm_dist.model import families
from mlm_dist.model.bert import check_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Under this name `varlen` stands in transformers' attention interface.
VARLEN = "mlm_varlen"


def choose(
    name: str,
    *,
    capability: tuple[int, int] | None,
    half_precision: bool,
    dropout: float,
    head_size: int,
    pads_see: bool,
    windows: bool = False,
) -> tuple[str, str | None]:
    """What `model.attention` comes to on this device, and what the user should hear of it.

    Args:
        name: `model.attention`.
        capability: compute capability of the CUDA device, None without one.
        half_precision: products are computed in bf16 or fp16, by autocast or since the weights are.
        dropout: of the attention weights in training.
        head_size: dimensions of an attention head.
        pads_see: the rows hold [PAD] tokens that see a document and are not seen (`mask.labels: all_with_padding`).
        windows: some layers see a window of positions only.

    Returns:
        (`"varlen"`, or `name` for `resolve_attention` to look at again; a note or None).

    Raises:
        UserError: `varlen` is asked for and cannot be.
    """
    reasons = (
        (capability is None, "there is no CUDA device"),
        (
            capability is not None and capability < (8, 0),
            f"flash attention needs compute capability 8.0, not {capability}",
        ),
        (not half_precision, "train.precision is fp32, and flash attention computes in bf16 and fp16 only"),
        (dropout > 0, f"it drops no attention weights, and model.attention_dropout is {dropout}; set it to 0.0"),
        (head_size % 8 != 0 or head_size > 256, f"heads of {head_size} dimensions: it takes multiples of 8 up to 256"),
        (pads_see, "mask.labels is all_with_padding, whose [PAD]s see tokens that do not see them"),
        (windows, "some layers of this model see a window only, which has not been tried with it"),
    )
    reason = next((text for holds, text in reasons if holds), None)
    if check_attention(name) == "varlen" and reason is not None:
        raise UserError(f"model.attention: 'varlen' is not possible: {reason}. Or use auto, which falls back to SDPA")
    if name not in ("auto", "varlen") or (reason is not None and capability is None):
        return name, None
    if reason is None:
        return "varlen", None
    return name, (
        f"attention goes through SDPA with a mask, which computes padding and pairs of tokens of different documents "
        f"too; model.attention varlen would not, but {reason}"
    )


def choose_for(
    name: str, config: PreTrainedConfig, *, capability: tuple[int, int] | None, precision: str, labels: str
) -> tuple[str, str | None]:
    """`choose` for a model, `train.precision` and `mask.labels`.

    Raises:
        UserError: also for labels on padding that layers with windows would leave without anything to see.
    """
    family, pads_see = families.of(config), labels == "all_with_padding"
    if family.windows and pads_see:
        raise UserError(
            f"mask.labels: all_with_padding is not possible with a {config.model_type}: a [PAD] farther from the text than "
            "half a window sees nothing in its local layers; use masked or all"
        )
    return choose(
        name,
        capability=capability,
        half_precision=precision != "fp32",
        dropout=family.dropouts(config)[0],
        head_size=config.hidden_size // config.num_attention_heads,
        pads_see=pads_see,
        windows=family.windows,
    )


def register() -> None:
    """Make `VARLEN` known to transformers. It takes no mask, so none is registered, and transformers makes none."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """`torch.nn.attention.varlen.varlen_attn` as transformers' attention interface calls it.

    Args:
        query, key, value: [1, heads, T, dim], one row of all tokens; bf16 or fp16.
        cu_seq_lens_q: int32 [N + 1], bounds of the segments; tokens see those of their own only.
        max_length_q: tokens of the longest segment, or more.

    Returns:
        ([1, T, heads, dim], no weights).
    """
    from torch.nn.attention.varlen import varlen_attn

    assert attention_mask is None and dropout == 0.0 and len(query) == 1
    q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling)
    assert isinstance(out, Tensor)
    return out[None], None


def resolve_attention(name: str, *, device_type: str, dropout: float) -> str:
    """The transformers back end (`"sdpa"` or `"eager"`) of a padded micro-batch for `model.attention`.

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


def with_windows(mask: Tensor, config: PreTrainedConfig) -> dict[str, Tensor]:
    """The mask of each kind of layer of a model some of whose layers see a window only: `sliding_window` positions to each side.

    Places in the row will do for positions, since the tokens of a segment lie side by side.
    """
    place = torch.arange(mask.shape[-1], device=mask.device)
    outside = (place[:, None] - place).abs() > config.sliding_window
    return {"full_attention": mask, "sliding_attention": mask.masked_fill(outside, torch.finfo(mask.dtype).min)}


def score_dtype(weights: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype attention scores have: autocast's where it is on, else the weights'.

    A mask of a wider one would overflow to -inf in the cast.
    """
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weights
