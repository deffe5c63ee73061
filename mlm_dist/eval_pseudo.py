"""Pseudo-perplexity (Salazar et al. 2020, "Masked Language Model Scoring"): each token of a document masked alone, all others seen."""

from __future__ import annotations

import hashlib
import heapq
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from mlm_dist.errors import UserError
from mlm_dist.evaluate import perplexity

if TYPE_CHECKING:
    from mlm_dist.data.block import BlockMaker
    from mlm_dist.eval_models import Scorer
    from mlm_dist.eval_rows import EvalData
    from mlm_dist.eval_scores import Device, Group


def choose(maker: BlockMaker, most: int, group: Group) -> list[str]:
    """The ``most`` documents with the lowest SHA-256 of their text, in that order. Collective.

    Raises:
        UserError: there are no texts.
    """

    def keyed(text: str) -> tuple[str, str]:
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), text

    blocks = range(group.rank, maker.manifest.num_blocks, group.world_size)
    mine = heapq.nsmallest(most, (keyed(text) for block in blocks for text in maker.texts(block)))
    found = group.gather(mine)
    texts = None if found is None else [text for _, text in heapq.nsmallest(most, (t for part in found for t in part))]
    chosen: list[str] = group.broadcast(texts)
    if not chosen:
        raise UserError(
            "--pseudo-perplexity: the data set holds no text that can be read (token ids have no bytes to count)"
        )
    return chosen


def measure(data: EvalData, texts: list[str], scorer: Scorer, group: Group, device: Device) -> dict[str, Any]:
    """Score ``texts``. Collective: rank 0 gets the numbers, the others an empty dict.

    A text longer than a row is cut into pieces of ``seq_len - 2`` tokens, each scored alone.

    Returns:
        documents, tokens, unknown (of the tokens those that are [UNK]), words (by white space), bytes (UTF-8), pseudo_log_likelihood (nats), and its negative
        by what models with other tokenizers share: nats_per_token, pseudo_perplexity (its exponential), nats_per_word, bits_per_byte.
    """
    ids, offsets = data.tokenizer.encode(texts)
    room = data.settings.seq_len - 2
    pieces = [
        ids[start : min(start + room, end)].astype(np.int64)
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        for start in range(begin, end, room)
    ]
    found = group.gather(
        [_log_likelihood(data, piece, scorer, device) for piece in pieces[group.rank :: group.world_size]]
    )
    if found is None:
        return {}
    total = math.fsum(value for part in found for value in part)
    tokens, words = len(ids), sum(len(text.split()) for text in texts)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    unknown = int(np.isin(ids, data.tokenizer.special).sum())
    per_token = -total / max(1, tokens)
    return {
        "documents": len(texts),
        "tokens": tokens,
        "unknown": unknown,
        "words": words,
        "bytes": size,
        "pseudo_log_likelihood": total,
        "nats_per_token": per_token,
        "pseudo_perplexity": perplexity(per_token),
        "nats_per_word": -total / max(1, words),
        "bits_per_byte": -total / math.log(2) / max(1, size),
    }


def _log_likelihood(data: EvalData, piece: np.ndarray, scorer: Scorer, device: Device) -> float:
    """Sum over the tokens of ``piece`` (int64 [L]) of their log-probability, each behind a mask of its own."""
    tokenizer = data.tokenizer
    row = torch.from_numpy(np.concatenate([[tokenizer.cls_id], piece, [tokenizer.sep_id]]))
    width, total = len(row), 0.0
    copies = max(1, data.batch * data.settings.seq_len // width)
    for places in torch.arange(1, width - 1).split(copies):
        count = torch.arange(len(places))
        ids = row.repeat(len(places), 1)
        ids[count, places] = tokenizer.mask_id
        with device.autocast():
            scores = scorer(
                ids.to(device.device),
                torch.ones_like(ids).to(device.device),
                (count * width + places).to(device.device),
            )
        losses = F.cross_entropy(scores, row[places].to(device.device), reduction="none")
        total -= float(losses.double().sum())
    return total
