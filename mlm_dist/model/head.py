"""The module that is trained: a stock encoder, packed segments kept apart, the masked-LM head on selected positions only."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mlm_dist.errors import UserError
from mlm_dist.model import attention as attentions
from mlm_dist.model import families
from mlm_dist.model.bert import HEAD_CHUNK, check_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_head(name: str, *, cuda: bool) -> None:
    """UserError when `model.head` cannot be `name` here; `cuda`: the run trains on CUDA."""
    if name != "liger":
        return
    if not cuda:
        raise UserError("model.head: 'liger' has kernels for CUDA only, and there is no CUDA device; use torch")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "model.head: 'liger' needs the package liger-kernel: pip install 'mlm-dist[liger]', or use torch"
        )


class Head(nn.Module):
    """A masked-LM head with its loss: dense layer, activation, norm, decoder, all of them the stock model's own.

    The selected positions are taken in chunks, and of more than one chunk the backward pass computes each again, so
    that the logits of one chunk, not of all positions, are in memory. A single chunk is computed once.

    This module owns none of the weights that it uses. Under ZeRO-3 the engine registers `external_parameters`, so that
    DeepSpeed gathers them around its forward and its backward. The parts are used by their `forward`, not called, since
    a hook of theirs would gather once a chunk, and ranks with other numbers of chunks would wait for each other for ever.
    """

    def __init__(self, model: PreTrainedModel, kind: str = "torch", chunk: int = HEAD_CHUNK) -> None:
        """
        Args:
            model: a stock masked-language model of one of `families.FAMILIES`.
            kind: `torch`, or `liger` for liger-kernel's fused product and cross-entropy (see `check_head`).
            chunk: most positions whose logits `torch` holds at a time.
        """
        super().__init__()
        *transform, decoder = families.head_parts(model)
        # In tuples, so that they are not parts of this module too, under names that no checkpoint has.
        self.transform, self.decoder = tuple(transform), (decoder,)
        self.kind, self.chunk = kind, chunk
        self.watch: Callable[[Tensor], None] | None = None
        """Where set, gets the logits [m, V] of each chunk, in order. Only in evaluation: in training a chunk is computed twice."""

    def external_parameters(self) -> list[nn.Parameter]:
        """The weights of other modules that `forward` uses."""
        return [parameter for part in (*self.transform, *self.decoder) for parameter in part.parameters()]

    def forward(self, hidden: Tensor, selected: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies at `selected` (int64 [M], rows of `hidden` [T, H]) against `labels` (int64 [M]),
        and how many are predicted right: (fp32 scalar, fp64 for fp64 weights; int64 scalar).
        """
        if self.kind == "liger" and len(labels) and self.watch is None:
            return self._fused(hidden.index_select(0, selected), labels)
        parts = list(zip(selected.split(self.chunk), labels.split(self.chunk), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            sums = [self._part(hidden, *part) for part in parts]
        else:  # nothing random in the head
            sums = [checkpoint(self._part, hidden, *p, use_reentrant=False, preserve_rng_state=False) for p in parts]
        losses, corrects = zip(*sums, strict=True)
        return torch.stack(losses).sum(), torch.stack(corrects).sum()

    def _part(self, hidden: Tensor, selected: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        (decoder,) = self.decoder
        logits = decoder.forward(self._transformed(hidden.index_select(0, selected)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.watch is not None:
            self.watch(logits)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        # After the loss: a second computation, of a chunk, ends where the backward pass has what it needs.
        with torch.no_grad():
            return loss, (logits.argmax(-1) == labels).sum()

    def _transformed(self, hidden: Tensor) -> Tensor:
        for part in self.transform:
            hidden = part.forward(hidden)
        return hidden

    def _fused(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        (decoder,) = self.decoder
        out = liger_fused_linear_cross_entropy(
            self._transformed(hidden),
            decoder.weight,
            labels,
            bias=decoder.bias,
            reduction="sum",
            return_predicted_tokens=True,
        )
        return out.loss, (out.predicted_tokens == labels).sum()


class MaskedLM(nn.Module):
    """A stock masked-language model that takes a packed micro-batch and gives the sum of its cross-entropies.

    The head (a dense layer, a norm and the product with the whole vocabulary) runs on the selected positions alone, so
    logits of all tokens are never built. The sum, not the mean, is returned because the mean over a global batch needs
    the global count, and a mean over no position is NaN.

    The weights stay stock: state names are those of the model with the prefix `model.`.
    """

    def __init__(
        self, model: PreTrainedModel, attention: str = "auto", head: str = "torch", head_chunk: int = HEAD_CHUNK
    ) -> None:
        """
        Args:
            model: of one of `families.FAMILIES`.
            attention: `model.attention`, or what `attention.choose` made of it.
            head, head_chunk: see `Head`.
        """
        super().__init__()
        attentions.register()
        self.model = model
        self.family = families.of(model.config)
        self.head = Head(model, head, head_chunk)
        self.attention = check_attention(attention)
        self.compiled = False

    def encode(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """Last hidden states [B, S, hidden] of int64 [B, S] inputs; segments do not see each other. See `forward`."""
        device_type = input_ids.device.type
        config = self.model.config
        dropout = self.family.dropouts(config)[0] if self.training else 0.0
        if cu_seqlens is not None:
            attention = attentions.VARLEN
            if self.compiled:  # how many segments there are must not be a reason to compile again
                torch._dynamo.mark_dynamic(cu_seqlens, 0)
            inputs: dict[str, Any] = {
                "cu_seq_lens_q": cu_seqlens,
                "cu_seq_lens_k": cu_seqlens,
                "max_length_q": max_length,
                "max_length_k": max_length,
            }
        else:
            assert segment_ids is not None and self.attention != "varlen"
            attention = attentions.resolve_attention(self.attention, device_type=device_type, dropout=dropout)
            dtype = attentions.score_dtype(self.model.dtype, device_type)
            mask = attentions.segment_mask(segment_ids, dtype)
            inputs = {"attention_mask": attentions.with_windows(mask, config) if self.family.windows else mask}
        if config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
        if self.family.after_padding:  # as stock: a [PAD] has the position of its own id
            pad = config.pad_token_id
            position_ids = (position_ids + self.family.first_position(config)).masked_fill(input_ids == pad, pad)
        hidden: Tensor = self.model.base_model(input_ids, position_ids=position_ids, **inputs).last_hidden_state
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        selected: Tensor,
        labels: Tensor,
        segment_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies over the selected positions, and how many of them are predicted right.

        A micro-batch is padded and has `segment_ids`, or it is flat, of one row (B = 1, S tokens), and has `cu_seqlens`
        and `max_length`; flat ones go through `varlen_attn`.

        Args:
            input_ids: int64 [B, S], masked already.
            position_ids: int64 [B, S], starting again at 0 in each segment.
            selected: int64 [M], flat indices into B*S. M may be 0: the loss is then exactly 0 and its gradients are
                zeros.
            labels: int64 [M], the tokens to predict there.
            segment_ids: int64 [B, S]; 0 is padding, 1.. the documents of a row, -s a [PAD] that document s itself holds
                (it sees, and is not seen).
            cu_seqlens: int32 [N + 1], where the segments begin, and S.
            max_length: tokens of the longest segment, or more.

        Returns:
            (fp32 scalar with a graph, fp64 for fp64 weights; int64 scalar without one).
        """
        hidden = self.encode(input_ids, position_ids, segment_ids, cu_seqlens, max_length)
        result: tuple[Tensor, Tensor] = self.head(hidden.flatten(0, 1), selected, labels)
        return result
