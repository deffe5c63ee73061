"""The module that is trained: stock BERT, packed segments kept apart, the masked-LM head on selected positions only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlm_dist.model.attention import resolve_attention, score_dtype, segment_mask
from mlm_dist.model.bert import check_attention

if TYPE_CHECKING:
    from transformers import BertForMaskedLM


class MaskedLM(nn.Module):
    """`BertForMaskedLM` that takes a packed micro-batch and gives the sum of its cross-entropies.

    The head (a dense layer, a norm and the product with the whole vocabulary) runs on the selected positions alone, so
    logits of all tokens are never built. The sum, not the mean, is returned because the mean over a global batch needs
    the global count, and a mean over no position is NaN.

    The weights stay stock: state names are those of `BertForMaskedLM` with the prefix `model.`, and every weight is
    used through the module that owns it, so that ZeRO-3 can gather it there.
    """

    def __init__(self, model: BertForMaskedLM, attention: str = "auto") -> None:
        super().__init__()
        self.model = model
        self.attention = check_attention(attention)

    def encode(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Last hidden states [B, S, hidden] of int64 [B, S] inputs; segments do not see each other. See `forward`."""
        device_type = input_ids.device.type
        config = self.model.config
        dropout = config.attention_probs_dropout_prob if self.training else 0.0
        attention = resolve_attention(self.attention, device_type=device_type, dropout=dropout)
        if config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
        mask = segment_mask(segment_ids, score_dtype(self.model.dtype, device_type))
        hidden: Tensor = self.model.bert(input_ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor, selected: Tensor) -> Tensor:
        """Scores [M, vocabulary] of the flat positions `selected` (int64 [M], into B*S) of `hidden` [B, S, hidden]."""
        scores: Tensor = self.model.cls(hidden.flatten(0, 1).index_select(0, selected))
        return scores

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, selected: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies over the selected positions, and how many of them are predicted right.

        Args:
            input_ids: int64 [B, S], masked already.
            position_ids: int64 [B, S], starting again at 0 in each segment.
            segment_ids: int64 [B, S]; 0 is padding, 1.. the documents of a row, -s a [PAD] that document s itself holds (it sees, and is not seen).
            selected: int64 [M], flat indices into B*S. M may be 0: the loss is then exactly 0 and its gradients are
                zeros.
            labels: int64 [M], the tokens to predict there.

        Returns:
            (fp32 scalar with a graph, int64 scalar without one).
        """
        logits = self.logits(self.encode(input_ids, position_ids, segment_ids), selected)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        with torch.no_grad():
            correct = (logits.argmax(-1) == labels).sum()
        return loss, correct
