"""How frequent the words of a data set are, and the bins that scores are told apart by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mlm_dist.data.tokenizer import TextTokenizer

# The last rank of every bin but the last.
BOUNDS = (100, 1_000, 10_000)
BINS = ("1-100", "101-1,000", "1,001-10,000", "above 10,000")


def word_bounds(ids: np.ndarray, tokenizer: TextTokenizer) -> np.ndarray:
    """Where the words of ``ids`` [T] begin, and T: int64 [words + 1].

    A word is a token and those behind it that go on with it. What goes on after a special token (a word cut by the end of a row) is one of its own, and
    where the vocabulary does not show what goes on, every token is.
    """
    starts = np.ones(len(ids), bool)
    if tokenizer.continues is not None:
        starts = ~tokenizer.continues[ids]
        starts[1:] |= np.isin(ids[:-1], tokenizer.special)
    return np.append(np.flatnonzero(starts), len(ids))


def keys(ids: np.ndarray, bounds: np.ndarray) -> Iterable[bytes]:
    """The words between ``bounds``, each as the bytes of its ids."""
    data, size = np.ascontiguousarray(ids).tobytes(), ids.itemsize
    return (data[a * size : b * size] for a, b in pairwise(bounds.tolist()))


def count(ids: np.ndarray, tokenizer: TextTokenizer) -> Counter[bytes]:
    """How often each word is in ``ids`` [T]; special tokens are not counted."""
    bounds = word_bounds(ids, tokenizer)
    ordinary = ~np.isin(ids[bounds[:-1]], tokenizer.special)
    return Counter(key for key, wanted in zip(keys(ids, bounds), ordinary, strict=True) if wanted)


def bins(words: Iterable[bytes], counts: Counter[bytes]) -> dict[bytes, int]:
    """The bin (index into ``BINS``) of each of ``words`` by its rank in ``counts``: one more than the number of different words that are more frequent, so
    that equally frequent words are in one bin and no order among them matters. A word that is not counted comes after all that are."""
    wanted = list(words)
    numbers = np.fromiter((counts[word] for word in wanted), np.int64, len(wanted))
    known = np.sort(np.fromiter(counts.values(), np.int64, len(counts)))
    ranks = len(known) - np.searchsorted(known, numbers, side="right") + 1
    return dict(zip(wanted, np.searchsorted(BOUNDS, ranks).tolist(), strict=True))


def bins_at(ids: np.ndarray, places: np.ndarray, tokenizer: TextTokenizer, of: dict[bytes, int]) -> np.ndarray:
    """The bin of the word at each of ``places`` (int64 [M], ascending) of ``ids`` [T], int64 [M]."""
    bounds = word_bounds(ids, tokenizer)
    word = np.searchsorted(bounds, places, side="right") - 1
    data, size = np.ascontiguousarray(ids).tobytes(), ids.itemsize
    found = (
        of[data[a * size : b * size]] for a, b in zip(bounds[word].tolist(), bounds[word + 1].tolist(), strict=True)
    )
    return np.fromiter(found, np.int64, len(places))
