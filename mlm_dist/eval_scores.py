"""What a masked LM scores on a whole data set: exact sums, the same to the bit on any number of ranks.

The data set is cut into parts, whoever takes them; each part's sums are made in one order in fp64, and `math.fsum` adds the parts without rounding in between.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from mlm_dist import eval_words
from mlm_dist.errors import UserError
from mlm_dist.evaluate import perplexity, unigram_entropy

if TYPE_CHECKING:
    from mlm_dist.data.rows import Rows
    from mlm_dist.eval_models import Scorer
    from mlm_dist.eval_rows import EvalData

TOP = 5


class Group(Protocol):
    """The part of ``distributed.ControlGroup`` that is used here."""

    rank: int
    world_size: int

    def gather(self, obj: Any) -> list[Any] | None: ...

    def broadcast(self, obj: Any) -> Any: ...


class Alone:
    """A group of one."""

    rank, world_size = 0, 1

    def gather(self, obj: Any) -> list[Any]:
        """Itself."""
        return [obj]

    def broadcast(self, obj: Any) -> Any:
        """Itself."""
        return obj


@dataclass(frozen=True)
class Device:
    """Where a model computes, and how.

    Attributes:
        precision: ``fp32``, or ``bf16`` or ``fp16`` through autocast.
    """

    device: torch.device
    precision: str = "fp32"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the model computes."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)


@dataclass(frozen=True)
class Census:
    """What a data set is made of as one tokenizer cuts it.

    Attributes:
        bins: index into ``eval_words.BINS`` of each word.
        words: different words of each bin.
        unigram_entropy: nats a token, see ``evaluate.validate``.
        lost_documents: how many could not be read, and so count in nothing.
        lost_frequencies: the same of another data set that tells how frequent words are.
    """

    bins: dict[bytes, int]
    words: list[int]
    unigram_entropy: float
    lost_documents: int
    lost_frequencies: int


def take_census(data: EvalData, group: Group, frequencies: EvalData | None = None) -> Census:
    """Read the whole data set once. Collective.

    Args:
        frequencies: whose words tell how frequent a word is, if not the data set's own.

    Raises:
        UserError: none of the documents of ``frequencies`` can be read.
    """
    found = group.gather(_count(data, group))
    others = None if frequencies is None else group.gather(_count(frequencies, group))
    census = None
    if found is not None:
        words = _merged(counter for counter, _, _ in found)
        counts = words if others is None else _merged(counter for counter, _, _ in others)
        bins = eval_words.bins(words, counts)
        sizes = Counter(bins.values())
        census = Census(
            bins,
            [sizes[i] for i in range(len(eval_words.BINS))],
            unigram_entropy(sum(tokens for _, tokens, _ in found), data.tokenizer.special),
            sum(lost for _, _, lost in found),
            sum(lost for _, _, lost in others or ()),
        )
    whole: Census = group.broadcast(census)
    if frequencies is not None and whole.lost_frequencies == frequencies.maker.manifest.num_documents:
        raise UserError(
            f"--frequencies: none of its {whole.lost_frequencies:,} documents can be read "
            f"(of JSON members the field {frequencies.settings.text_field!r})"
        )
    return whole


def _count(data: EvalData, group: Group) -> tuple[Counter[bytes], np.ndarray, int]:
    """This rank's words, tokens by id (int64 [vocab_size]) and lost documents."""
    words: Counter[bytes] = Counter()
    tokens, lost = np.zeros(data.tokenizer.vocab_size, np.int64), 0
    for number in range(group.rank, data.num_parts, group.world_size):
        part = data.part(number)
        ids = part.rows.original_ids()
        words.update(eval_words.count(ids, data.tokenizer))
        tokens += np.bincount(ids, minlength=len(tokens))
        lost += sum(fault.documents for fault in part.faults)
    return words, tokens, lost


def _merged(counters: Iterable[Counter[bytes]]) -> Counter[bytes]:
    whole: Counter[bytes] = Counter()
    for counter in counters:
        whole.update(counter)
    return whole


def measure(data: EvalData, census: Census, scorer: Scorer, group: Group, device: Device) -> dict[str, Any]:
    """Score the whole data set. Collective: rank 0 gets the numbers, the others an empty dict.

    Returns:
        loss (nats per masked token), perplexity, accuracy, top5_accuracy, selected (masked tokens), unigram_entropy, lost_documents, lost_frequencies, and
        by_frequency: for each of ``eval_words.BINS`` its ranks, words (different ones), selected, loss, accuracy and top5_accuracy; null of a bin without a
        masked token.
    """
    numbers = range(group.rank, data.num_parts, group.world_size)
    found = group.gather([_part_sums(data, census, scorer, device, data.part(number).rows) for number in numbers])
    if found is None:
        return {}
    parts = np.stack([sums for of_rank in found for sums in of_rank])
    rows = [
        {"ranks": name, "words": census.words[i], **_means(parts[:, :, i])} for i, name in enumerate(eval_words.BINS)
    ]
    overall = _means(parts.transpose(0, 2, 1).reshape(-1, parts.shape[1]))
    return {
        **overall,
        "perplexity": None if overall["loss"] is None else perplexity(overall["loss"]),
        "unigram_entropy": census.unigram_entropy,
        "lost_documents": census.lost_documents,
        "lost_frequencies": census.lost_frequencies,
        "by_frequency": rows,
    }


def _part_sums(data: EvalData, census: Census, scorer: Scorer, device: Device, rows: Rows) -> np.ndarray:
    """fp64 [4, bins]: masked tokens, sum of their cross-entropies, number right, number among the first ``TOP``."""
    sums = np.zeros((4, len(eval_words.BINS)))
    for batch in data.batches(rows.take(np.flatnonzero(rows.selected))):
        micro = batch.collate(data.tokenizer.pad_id, data.multiple)
        ids, labels = micro["input_ids"], micro["labels"].to(device.device)
        with device.autocast():
            scores = scorer(
                ids.to(device.device),
                (micro["segment_ids"] != 0).long().to(device.device),
                micro["selected"].to(device.device),
            )
        places = np.repeat(np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths, batch.selected) + batch.positions
        bins = eval_words.bins_at(batch.original_ids(), places, data.tokenizer, census.bins)
        for i, values in enumerate((torch.ones_like(labels), *judge(scores, labels))):
            sums[i] += np.bincount(bins, values.double().cpu().numpy(), sums.shape[1])
    return sums


def judge(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of fp32 scores [M, V] against labels int64 [M]: cross-entropies fp32 [M], whether right, and whether among the first ``TOP``, bool [M]."""
    losses = F.cross_entropy(scores, labels, reduction="none")
    # Counted by what is not at most the label's, so that among NaNs nothing is right.
    top = (~(scores <= scores.gather(1, labels[:, None]))).sum(1) < TOP
    return losses, (scores.argmax(1) == labels) & top, top


def _means(parts: np.ndarray) -> dict[str, Any]:
    """Of fp64 [n, 4], as ``_part_sums`` makes them."""
    selected, loss, right, top = (math.fsum(column) for column in parts.T)
    means: Sequence[float | None] = [total / selected if selected else None for total in (loss, right, top)]
    return {"selected": int(selected), **dict(zip(("loss", "accuracy", "top5_accuracy"), means, strict=True))}
