"""Masking: the shares that the rule asks for, special tokens left alone, and draws that belong to a token and nothing else."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mlm_dist.data.block import BlockMaker
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig, mask
from mlm_dist.data.tokenizer import TextTokenizer, load
from mlm_dist.errors import UserError
from tests.corpora import documents, save_corpus, save_tokenizer

KEY = (7, 0, "0", "shard.tar", 3, "mask")
# Words that the vocabulary has not become [UNK].
TEXTS = [text + " zebra [MASK] [PAD] quagga" for text in documents(1500)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def ids(tokenizer: TextTokenizer) -> np.ndarray:
    """About 100,000 tokens, every special token among them."""
    content, offsets = tokenizer.encode(TEXTS)
    cls, sep, pad, mask_id = ([i] for i in (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id))
    parts = [np.concatenate([cls, content[a:b], sep]) for a, b in pairwise(offsets)]
    out = np.concatenate([*parts, pad * 500, mask_id * 500]).astype(tokenizer.dtype)
    unk = tokenizer.backend.token_to_id("[UNK]")
    assert np.isin([*cls, *sep, *pad, *mask_id, unk], out).all() and (out == unk).sum() >= 2 * len(TEXTS)
    return out


def close(count: int, n: int, p: float, sigmas: float = 4.0) -> bool:
    """A binomial count lies within so many standard deviations of its mean."""
    return abs(count - n * p) <= sigmas * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("rate", [0.15, 0.4])
@pytest.mark.parametrize("split", [(0.8, 0.1, 0.1), (0.5, 0.3, 0.2), (0.0, 1.0, 0.0)])
def test_rate_and_split_within_four_sigma(
    ids: np.ndarray, tokenizer: TextTokenizer, rate: float, split: tuple[float, float, float]
) -> None:
    out, selected = mask(ids, tokenizer, MaskConfig(rate=rate, split=split), KEY)
    ordinary = ~np.isin(ids, tokenizer.special)
    n = int(selected.sum())
    assert close(n, int(ordinary.sum()), rate)
    to_mask = int((out[selected] == tokenizer.mask_id).sum())
    same = int((out[selected] == ids[selected]).sum())
    # A random token is the old one by chance now and then.
    by_chance = split[1] / len(tokenizer.ordinary)
    assert to_mask == 0 if split[0] == 0 else close(to_mask, n, split[0])
    assert close(same, n, split[2] + by_chance)
    assert close(n - to_mask - same, n, split[1] - by_chance)


def test_selection_does_not_depend_on_the_token(ids: np.ndarray, tokenizer: TextTokenizer) -> None:
    _, selected = mask(ids, tokenizer, MaskConfig(), KEY)
    for token in tokenizer.ordinary:
        here = ids == token
        assert close(int(selected[here].sum()), int(here.sum()), 0.15, sigmas=5.0), token


@pytest.mark.parametrize("strategy", ["token", "mask_only"])
def test_special_tokens_are_never_selected(ids: np.ndarray, tokenizer: TextTokenizer, strategy: str) -> None:
    out, selected = mask(ids, tokenizer, MaskConfig(strategy=strategy, rate=0.9), KEY)
    special = np.isin(ids, tokenizer.special)
    assert selected.any() and not selected[special].any()
    assert (out[~selected] == ids[~selected]).all()


def test_mask_only_masks_all_that_it_selects(ids: np.ndarray, tokenizer: TextTokenizer) -> None:
    out, selected = mask(ids, tokenizer, MaskConfig(strategy="mask_only"), KEY)
    assert close(int(selected.sum()), int((~np.isin(ids, tokenizer.special)).sum()), 0.15)
    assert (out[selected] == tokenizer.mask_id).all()
    assert (out[~selected] == ids[~selected]).all()


def test_random_replacements_are_ordinary_and_uniform(ids: np.ndarray, tokenizer: TextTokenizer) -> None:
    out, selected = mask(ids, tokenizer, MaskConfig(rate=0.9, split=(0.0, 1.0, 0.0)), KEY)
    counts = np.bincount(out[selected], minlength=tokenizer.vocab_size)
    unused = tokenizer.backend.token_to_id("[unused0]")
    assert counts[tokenizer.special].sum() == 0 and counts[unused] == 0
    n = int(selected.sum())
    assert all(close(int(counts[token]), n, 1 / len(tokenizer.ordinary), sigmas=5.0) for token in tokenizer.ordinary)


def test_ids_given_are_not_changed(ids: np.ndarray, tokenizer: TextTokenizer) -> None:
    before = ids.copy()
    out, _ = mask(ids, tokenizer, MaskConfig(), KEY)
    assert (ids == before).all() and out.dtype == ids.dtype


def test_the_key_alone_decides(ids: np.ndarray, tokenizer: TextTokenizer) -> None:
    first = mask(ids, tokenizer, MaskConfig(), KEY)
    np.random.seed(1)
    again = mask(ids, tokenizer, MaskConfig(), KEY)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for place, value in enumerate((8, 1, "1", "other.tar", 4, "mask2")):
        other = mask(ids, tokenizer, MaskConfig(), (*KEY[:place], value, *KEY[place + 1 :]))
        overlap = (first[1] & other[1]).sum() / first[1].sum()
        assert 0.1 < overlap < 0.2  # independent: two of them share 15%


@pytest.mark.parametrize("strategy", ["token", "mask_only"])
def test_another_rate_keeps_each_tokens_draws(ids: np.ndarray, tokenizer: TextTokenizer, strategy: str) -> None:
    low, chosen_low = mask(ids, tokenizer, MaskConfig(strategy=strategy, rate=0.1), KEY)
    high, chosen_high = mask(ids, tokenizer, MaskConfig(strategy=strategy, rate=0.2), KEY)
    assert chosen_high.sum() > 1.5 * chosen_low.sum()
    assert chosen_high[chosen_low].all()
    assert (high[chosen_low] == low[chosen_low]).all()


@pytest.mark.parametrize("strategy", ["token", "mask_only"])
def test_labels_all_label_every_real_token_and_mask_the_same(
    tmp_path: Path, tokenizer: TextTokenizer, strategy: str
) -> None:
    manifest = Manifest.read(save_corpus(tmp_path, TEXTS[:40], shards=1, per_member=20))

    def rows(labels: str):
        config = MaskConfig(strategy=strategy, labels=labels)
        return BlockMaker(manifest, tokenizer, 64, "split", "chunk", config, seed=7).rows(0, 0)[0]

    masked, every = rows("masked"), rows("all")
    assert (masked.ids == every.ids).all()
    assert (every.selected == every.lengths).all()
    assert (every.positions == np.concatenate([np.arange(n) for n in every.lengths])).all()
    assert (every.labels == masked.original_ids()).all()
    assert 0 < masked.selected.sum() < 0.3 * masked.lengths.sum()
    assert not np.isin(masked.labels, tokenizer.special).any()


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_a_rate_that_is_no_probability(rate: float) -> None:
    with pytest.raises(UserError, match=r"mask\.rate: .*0\.15"):
        MaskConfig(rate=rate).check()


@pytest.mark.parametrize("split", [(0.8, 0.1, 0.2), (1.1, -0.1, 0.0), (0.5, math.nan, 0.5)])
def test_a_split_that_is_no_distribution(split: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match=r"mask\.split: .*sum to 1"):
        MaskConfig(split=split).check()
