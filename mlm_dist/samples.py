"""What the model puts in place of some masks of the validation set, seen while the set is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mlm_dist.micro_batch import MicroBatch

BEST = 3  # predictions kept of each place
AROUND = 24  # tokens shown on each side of it

Forward = Callable[[MicroBatch], tuple[Tensor, Tensor]]


class Tokenizer(Protocol):
    """The part of transformers' tokenizer that is used here."""

    mask_token_id: int

    def decode(self, token_ids: list[int]) -> str: ...


class Watched(Protocol):
    """A head that shows its logits, see ``model.head.Head``."""

    watch: Callable[[Tensor], None] | None


class Sampler:
    """A ``forward`` that keeps a prediction of each of the first texts that go through it, in the middle of its masks.

    It runs nothing itself and talks to no other rank: under ZeRO-3 every forward is one of all ranks.

    Args:
        forward: of the model with ``head``, in evaluation.
        most: texts.

    Attributes:
        rows: what was kept, see ``records.read_predictions``.
    """

    def __init__(self, forward: Forward, head: Watched, tokenizer: Tokenizer, most: int) -> None:
        self._forward, self._head, self._tokenizer, self._most = forward, head, tokenizer, most
        self.rows: list[dict[str, Any]] = []

    def __call__(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """``forward(micro_batch)``."""
        chosen = self._choose(micro_batch) if len(self.rows) < self._most else []
        if not chosen:
            return self._forward(micro_batch)
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        labels, first = micro_batch["labels"], 0

        def watch(logits: Tensor) -> None:
            nonlocal first
            mine = [i - first for i in chosen if first <= i < first + len(logits)]
            first += len(logits)
            if mine:
                at = torch.tensor(mine, device=logits.device)
                shares = logits.index_select(0, at).float().softmax(-1)
                truth = labels[torch.tensor(mine) + first - len(logits)].to(logits.device)
                best = shares.topk(min(BEST, shares.shape[-1]))
                seen.append((shares.gather(1, truth[:, None])[:, 0], best.values, best.indices))

        self._head.watch = watch
        try:
            result = self._forward(micro_batch)
        finally:
            self._head.watch = None
        truths, values, indices = (torch.cat(parts).tolist() for parts in zip(*seen, strict=True))
        for place, truth, shares, tokens in zip(chosen, truths, values, indices, strict=True):
            self.rows.append(
                self._text(micro_batch, place)
                | {"truth_probability": truth}
                | {"predictions": [[self._word(t), p] for t, p in zip(tokens, shares, strict=True)]}
            )
        return result

    def _choose(self, micro_batch: MicroBatch) -> list[int]:
        """Indices into the selected places, ascending: one of each segment that has any, up to what is wanted."""
        selected = micro_batch["selected"]
        ids, segment = micro_batch["input_ids"].flatten(), _segments(micro_batch)
        is_mask = (ids[selected] == self._tokenizer.mask_token_id).tolist()
        groups: dict[int, list[int]] = {}
        for i, s in enumerate(segment[selected].tolist()):
            groups.setdefault(s, []).append(i)
        out = []
        for members in groups.values():
            masks = [i for i in members if is_mask[i]] or members
            out.append(masks[len(masks) // 2])
        return sorted(out)[: self._most - len(self.rows)]

    def _text(self, micro_batch: MicroBatch, place: int) -> dict[str, Any]:
        ids, segment = micro_batch["input_ids"].flatten(), _segments(micro_batch)
        at = int(micro_batch["selected"][place])
        inside = (segment == segment[at]).nonzero()[1:-1, 0]  # without [CLS] and [SEP]
        first, last = max(int(inside[0]), at - AROUND), min(int(inside[-1]), at + AROUND)
        decode = self._tokenizer.decode
        before, after = decode(ids[first:at].tolist()), decode(ids[at + 1 : last + 1].tolist())
        text = f"{before} «{self._word(int(ids[at]))}» {after}".strip()
        return {"text": text, "truth": self._word(int(micro_batch["labels"][place]))}

    def _word(self, token: int) -> str:
        return self._tokenizer.decode([token]).strip()


def _segments(micro_batch: MicroBatch) -> Tensor:
    """Of each flat place a number that tells its segment from all others, int64."""
    if "cu_seqlens" in micro_batch:
        lengths = micro_batch["cu_seqlens"].diff().long()
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    segments = micro_batch["segment_ids"]
    rows, width = segments.shape
    return (segments.abs() + (width + 1) * torch.arange(rows)[:, None]).flatten()
