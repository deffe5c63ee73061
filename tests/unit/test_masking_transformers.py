"""Masking against transformers' ``DataCollatorForLanguageModeling`` on the same tokens: the same in distribution, but for what is noted."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from transformers import DataCollatorForLanguageModeling

from mlm_dist.data.masking import MaskConfig, mask
from mlm_dist.data.tokenizer import TextTokenizer, from_pretrained, load_pretrained
from tests.corpora import WORDS, save_tokenizer

ROWS, WIDTH, RATE = 2000, 64, 0.15


@dataclass
class Masked:
    """What one of the two did: arrays [ROWS, WIDTH]."""

    ids: np.ndarray
    out: np.ndarray
    selected: np.ndarray
    mask_id: int

    def shares(self) -> tuple[float, float, float]:
        """Of the selected tokens: to [MASK], unchanged, to another."""
        seen, truth = self.out[self.selected], self.ids[self.selected]
        to_mask, same = (seen == self.mask_id).mean(), (seen == truth).mean()
        return float(to_mask), float(same), float(1 - to_mask - same)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TextTokenizer]:
    theirs = load_pretrained(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))
    return theirs, from_pretrained(theirs)


@pytest.fixture(scope="module")
def features(pair: tuple[Any, TextTokenizer]) -> list[dict[str, Any]]:
    """Full rows of one text each: words, one in five a number of one to four pieces, one in a hundred not in the vocabulary."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(ROWS):
        words = rng.choice(WORDS, WIDTH).tolist()
        for i in np.flatnonzero(rng.random(WIDTH) < 0.2):
            words[i] = str(rng.integers(0, 10 ** int(rng.integers(1, 5))))
        for i in np.flatnonzero(rng.random(WIDTH) < 0.01):
            words[i] = "quagga"
        encoded = pair[0](" ".join(words), truncation=True, max_length=WIDTH, return_offsets_mapping=True)
        out.append({name: encoded[name] for name in ("input_ids", "offset_mapping")})
    return out


def theirs_on(features: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Masked:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=RATE, seed=0, return_tensors="np", **options)
    keys = ("input_ids", "offset_mapping") if options.get("whole_word_mask") else ("input_ids",)
    batches = [collator([{key: f[key] for key in keys} for f in features[i : i + 100]]) for i in range(0, ROWS, 100)]
    ids = np.asarray([f["input_ids"] for f in features])
    labels = np.concatenate([b["labels"] for b in batches])
    assert (labels[labels != -100] == ids[labels != -100]).all()
    return Masked(ids, np.concatenate([b["input_ids"] for b in batches]), labels != -100, tokenizer.mask_token_id)


def ours_on(features: list[dict[str, Any]], tokenizer: TextTokenizer, config: MaskConfig) -> Masked:
    ids = np.asarray([f["input_ids"] for f in features], tokenizer.dtype)
    lengths, rates = np.full(ROWS, WIDTH, np.int32), np.full(ROWS, RATE)
    out, selected = mask(ids.reshape(-1), lengths, tokenizer, config, rates, (0, "mask"))
    return Masked(ids, out.reshape(ids.shape), selected.reshape(ids.shape), tokenizer.mask_id)


def alike(one: float, other: float, n: int) -> bool:
    """Two shares of n each are within four standard deviations of their difference."""
    p = (one + other) / 2
    return abs(one - other) <= 4 * math.sqrt(p * (1 - p) * 2 / n)


def words_of(features: list[dict[str, Any]], special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [ROWS, WIDTH] number of each token's word, -1 for special tokens; int64 tokens of each word), by transformers' offsets."""
    numbers, sizes = np.full((ROWS, WIDTH), -1), []
    for r, f in enumerate(features):
        before = -1
        for i, (token, (start, stop)) in enumerate(zip(f["input_ids"], f["offset_mapping"], strict=True)):
            if token in special:
                before = -1
                continue
            if start != before:
                sizes.append(0)
            sizes[-1] += 1
            numbers[r, i], before = len(sizes) - 1, stop
    return numbers, np.asarray(sizes)


def test_token_is_their_default(features: list[dict[str, Any]], pair: tuple[Any, TextTokenizer]) -> None:
    theirs, ours = theirs_on(features, pair[0]), ours_on(features, pair[1], MaskConfig())
    ordinary = ~np.isin(ours.ids, pair[1].special)
    assert not theirs.selected[~ordinary].any() and not ours.selected[~ordinary].any()
    assert alike(theirs.selected[ordinary].mean(), ours.selected[ordinary].mean(), int(ordinary.sum()))
    # Their random tokens are drawn from all of the vocabulary, [MASK] and the token itself among it; ours from the ordinary tokens.
    n = int(min(theirs.selected.sum(), ours.selected.sum()))
    assert n > 15_000
    assert all(alike(a, b, n) for a, b in zip(theirs.shares(), ours.shares(), strict=True))
    # Tokens selected in a row: one distribution, by the two-sample chi-square statistic of ten bins.
    counts = [np.bincount(np.clip(m.selected.sum(1), 5, 14), minlength=15)[5:] for m in (theirs, ours)]
    assert counts[0].min() > 20
    assert ((counts[0] - counts[1]) ** 2 / (counts[0] + counts[1])).sum() < 27.9  # 0.999 quantile of 9 degrees


def test_whole_word_takes_words_as_theirs_does(features: list[dict[str, Any]], pair: tuple[Any, TextTokenizer]) -> None:
    """Theirs takes each word by probability and makes all of its tokens [MASK]; ours, as Google's code, fills an exact budget and splits 80/10/10."""
    with pytest.warns(UserWarning, match="Random token replacement is not supported with whole word masking"):
        theirs = theirs_on(features, pair[0], whole_word_mask=True)
    ours = ours_on(features, pair[1], MaskConfig(strategy="whole_word"))
    all_mask = ours_on(features, pair[1], MaskConfig(strategy="whole_word", split=(1.0, 0.0, 0.0)))
    numbers, sizes = words_of(features, pair[1].special)
    inside = numbers >= 0
    assert np.bincount(sizes)[1:5].min() > 4000
    for one in (theirs, ours):
        assert not one.selected[~inside].any()
        tokens = np.bincount(numbers[inside], one.selected[inside], len(sizes))
        assert ((tokens == 0) | (tokens == sizes)).all() and (tokens[sizes > 1] > 0).sum() > 1000
    # The share of tokens: theirs varies by words, ours by less than a token a row.
    assert alike(theirs.selected[inside].mean(), ours.selected[inside].mean(), len(sizes))
    per_row = [one.selected.sum(1) - RATE * inside.sum(1) for one in (theirs, ours)]
    assert per_row[0].std() > 2.5 and np.abs(per_row[1]).max() <= 2
    assert theirs.shares() == all_mask.shares() == (1.0, 0.0, 0.0)
    n = int(ours.selected.sum())
    assert all(alike(a, b, n) for a, b in zip(ours.shares(), (0.8, 0.1, 0.1), strict=True))
