"""Masking of single tokens: the shares that the rule asks for, special tokens left alone, draws that belong to a token and nothing else; rates and checks."""

import hashlib
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mlm_dist.data.block import BlockMaker
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig, mask, rates, thresholds
from mlm_dist.data.rng import uniforms
from mlm_dist.data.tokenizer import TextTokenizer, load
from mlm_dist.errors import UserError
from mlm_dist.storage.store import Store
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


def mask_all(
    ids: np.ndarray, tokenizer: TextTokenizer, config: MaskConfig, key: tuple[int | str, ...] = KEY
) -> tuple[np.ndarray, np.ndarray]:
    """``mask`` of one row at the config's rate."""
    return mask(ids, np.asarray([len(ids)], np.int32), tokenizer, config, rates(config, np.zeros(1, np.int64)), key)


def close(count: int, n: int, p: float, sigmas: float = 4.0) -> bool:
    """A binomial count lies within so many standard deviations of its mean."""
    return abs(count - n * p) <= sigmas * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("rate", [0.15, 0.4])
@pytest.mark.parametrize("split", [(0.8, 0.1, 0.1), (0.5, 0.3, 0.2), (0.0, 1.0, 0.0)])
def test_rate_and_split_within_four_sigma(
    ids: np.ndarray, tokenizer: TextTokenizer, rate: float, split: tuple[float, float, float]
) -> None:
    out, selected = mask_all(ids, tokenizer, MaskConfig(rate=rate, split=split))
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
    _, selected = mask_all(ids, tokenizer, MaskConfig())
    for token in tokenizer.ordinary:
        here = ids == token
        assert close(int(selected[here].sum()), int(here.sum()), 0.15, sigmas=5.0), token


@pytest.mark.parametrize("strategy", ["token", "mask_only"])
def test_special_tokens_are_never_selected(ids: np.ndarray, tokenizer: TextTokenizer, strategy: str) -> None:
    out, selected = mask_all(ids, tokenizer, MaskConfig(strategy=strategy, rate=0.9))
    special = np.isin(ids, tokenizer.special)
    assert selected.any() and not selected[special].any()
    assert (out[~selected] == ids[~selected]).all()


def test_mask_only_masks_all_that_it_selects(ids: np.ndarray, tokenizer: TextTokenizer) -> None:
    out, selected = mask_all(ids, tokenizer, MaskConfig(strategy="mask_only"))
    assert close(int(selected.sum()), int((~np.isin(ids, tokenizer.special)).sum()), 0.15)
    assert (out[selected] == tokenizer.mask_id).all()
    assert (out[~selected] == ids[~selected]).all()


def test_random_replacements_are_ordinary_and_uniform(ids: np.ndarray, tokenizer: TextTokenizer) -> None:
    out, selected = mask_all(ids, tokenizer, MaskConfig(rate=0.9, split=(0.0, 1.0, 0.0)))
    counts = np.bincount(out[selected], minlength=tokenizer.vocab_size)
    unused = tokenizer.backend.token_to_id("[unused0]")
    assert counts[tokenizer.special].sum() == 0 and counts[unused] == 0
    n = int(selected.sum())
    assert all(close(int(counts[token]), n, 1 / len(tokenizer.ordinary), sigmas=5.0) for token in tokenizer.ordinary)


def test_ids_given_are_not_changed(ids: np.ndarray, tokenizer: TextTokenizer) -> None:
    before = ids.copy()
    out, _ = mask_all(ids, tokenizer, MaskConfig())
    assert (ids == before).all() and out.dtype == ids.dtype


def test_the_key_alone_decides(ids: np.ndarray, tokenizer: TextTokenizer) -> None:
    first = mask_all(ids, tokenizer, MaskConfig())
    np.random.seed(1)
    again = mask_all(ids, tokenizer, MaskConfig())
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for place, value in enumerate((8, 1, "1", "other.tar", 4, "mask2")):
        other = mask_all(ids, tokenizer, MaskConfig(), (*KEY[:place], value, *KEY[place + 1 :]))
        overlap = (first[1] & other[1]).sum() / first[1].sum()
        assert 0.1 < overlap < 0.2  # independent: two of them share 15%


@pytest.mark.parametrize("strategy", ["token", "mask_only"])
def test_another_rate_keeps_each_tokens_draws(ids: np.ndarray, tokenizer: TextTokenizer, strategy: str) -> None:
    low, chosen_low = mask_all(ids, tokenizer, MaskConfig(strategy=strategy, rate=0.1))
    high, chosen_high = mask_all(ids, tokenizer, MaskConfig(strategy=strategy, rate=0.2))
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
        maker = BlockMaker(manifest, Store(manifest.root), tokenizer, 64, "split", "chunk", config, seed=7)
        return maker.rows(0, 0, lambda n: np.zeros(n, np.int64))[0]

    masked, every = rows("masked"), rows("all")
    assert (masked.ids == every.ids).all()
    assert (every.selected == every.lengths).all()
    assert (every.positions == np.concatenate([np.arange(n) for n in every.lengths])).all()
    assert (every.labels == masked.original_ids()).all()
    assert 0 < masked.selected.sum() < 0.3 * masked.lengths.sum()
    assert not np.isin(masked.labels, tokenizer.special).any()


@pytest.mark.parametrize(
    "strategy, rate, digest",
    [
        ("token", 0.15, "239279730385a08c19585fbb782436341623ef4156d1127383f61ae97b6d7b14"),
        ("mask_only", 0.4, "9b3ca0506bbc5404777011eea246256efe3b557b0e1a36b8ec9730908d014258"),
    ],
)
def test_masks_are_those_of_every_version(tokenizer: TextTokenizer, strategy: str, rate: float, digest: str) -> None:
    ids = (np.arange(20000) * 7919 % tokenizer.vocab_size).astype(tokenizer.dtype)
    out, selected = mask_all(ids, tokenizer, MaskConfig(strategy=strategy, rate=rate))
    assert hashlib.sha256(out.astype("<u4").tobytes() + selected.tobytes()).hexdigest() == digest


def test_thresholds_of_raw_draws_are_exact() -> None:
    rates = np.asarray([0.15, 0.1, 0.5, 1 / 3, 0.999, 1e-12, 2.0**-53, 1 - 2.0**-53])
    bounds = thresholds(rates)
    assert bounds.dtype == np.uint64
    assert (uniforms(bounds - np.uint64(1)) < rates).all() and (uniforms(bounds) >= rates).all()


@pytest.mark.parametrize("strategy", ["token", "mask_only"])
def test_each_row_has_its_own_rate(ids: np.ndarray, tokenizer: TextTokenizer, strategy: str) -> None:
    config = MaskConfig(strategy=strategy)
    cuts = [0, 5000, 5000, 5001, 50000, len(ids)]
    lengths = np.diff(cuts).astype(np.int32)
    given = np.asarray([0.1, 0.5, 0.3, 0.2, 0.9])
    out, selected = mask(ids, lengths, tokenizer, config, given, KEY)
    for (start, stop), rate in zip(pairwise(cuts), given, strict=True):
        alone, chosen = mask_all(ids, tokenizer, replace(config, rate=float(rate)))
        assert (out[start:stop] == alone[start:stop]).all() and (selected[start:stop] == chosen[start:stop]).all()


@pytest.mark.parametrize("strategy", ["token", "mask_only", "whole_word", "span"])
def test_no_rows(tokenizer: TextTokenizer, strategy: str) -> None:
    nothing = np.zeros(0, tokenizer.dtype)
    config = MaskConfig(strategy=strategy)
    out, selected = mask(nothing, np.zeros(0, np.int32), tokenizer, config, np.zeros(0), KEY)
    assert out.dtype == nothing.dtype and len(out) == 0 and selected.dtype == bool and len(selected) == 0


def test_a_constant_rate() -> None:
    assert rates(MaskConfig(rate=0.3), np.asarray([0, 7, 10**9])).tolist() == [0.3, 0.3, 0.3]


@pytest.mark.parametrize("start, end", [(0.4, 0.15), (0.1, 0.3)])
def test_a_rate_schedule(start: float, end: float) -> None:
    steps = np.arange(0, 301)
    curve = {}
    for schedule in ("linear", "cosine"):
        config = MaskConfig(rate=start, rate_schedule=schedule, rate_end=end, rate_steps=200)
        config.check()
        curve[schedule] = values = rates(config, steps)
        assert values.dtype == np.float64 and values[0] == start and (values[200:] == end).all()
        assert values[100] == pytest.approx((start + end) / 2, abs=1e-15)
        assert (np.sign(np.diff(values[:201])) == np.sign(end - start)).all()
        assert (rates(config, steps[::-1]) == values[::-1]).all()
    assert curve["linear"][50] == pytest.approx(start + (end - start) / 4, abs=1e-15)
    assert curve["cosine"][50] == pytest.approx(start + (end - start) * (1 - math.cos(math.pi / 4)) / 2, abs=1e-15)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_a_rate_that_is_no_probability(rate: float) -> None:
    with pytest.raises(UserError, match=r"mask\.rate: .*0\.15"):
        MaskConfig(rate=rate).check()
    with pytest.raises(UserError, match=rf"mask\.rate_end: {rate} .*0\.15"):
        MaskConfig(rate_schedule="linear", rate_end=rate, rate_steps=9).check()


@pytest.mark.parametrize("split", [(0.8, 0.1, 0.2), (1.1, -0.1, 0.0), (0.5, math.nan, 0.5)])
def test_a_split_that_is_no_distribution(split: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match=r"mask\.split: .*sum to 1"):
        MaskConfig(split=split).check()


@pytest.mark.parametrize(
    "message, wrong",
    [
        (r"mask\.rate_end: null, .*linear", {"rate_schedule": "linear", "rate_steps": 9}),
        (r"mask\.rate_steps: null, .*cosine", {"rate_schedule": "cosine", "rate_end": 0.1}),
        (r"mask\.rate_end: 0\.1 does nothing .*null", {"rate_end": 0.1}),
        (r"mask\.rate_steps: 9 does nothing .*null", {"rate_steps": 9}),
        (r"mask\.rate_steps: 0 must be at least 1", {"rate_schedule": "linear", "rate_end": 0.1, "rate_steps": 0}),
        (r"mask\.span_p: 0\.0 .*0\.2", {"span_p": 0.0}),
        (r"mask\.span_p: 1\.5 .*0\.2", {"span_p": 1.5}),
        (r"mask\.span_p: nan .*0\.2", {"span_p": math.nan}),
        (r"mask\.span_max: 0 .*10", {"span_max": 0}),
        (r"mask\.span_max: 1001 .*1000", {"span_max": 1001}),
    ],
)
def test_a_key_that_is_wrong_is_named(message: str, wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=message):
        MaskConfig(**wrong).check()


def test_what_is_right_passes(tokenizer: TextTokenizer) -> None:
    for config in (
        MaskConfig(),
        MaskConfig(strategy="span", span_p=1.0, span_max=1),
        MaskConfig(strategy="whole_word"),
    ):
        config.check()
        config.check_tokenizer(tokenizer)
    for packing in ("none", "split", "best_fit"):
        MaskConfig(labels="all").check_packing(packing)
    MaskConfig(labels="all_with_padding").check_packing("none")


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_labels_on_padding_need_a_row_for_each_document(packing: str) -> None:
    with pytest.raises(UserError, match=rf"mask\.labels: all_with_padding .*data\.packing {packing}.*none"):
        MaskConfig(labels="all_with_padding").check_packing(packing)


@pytest.mark.parametrize("strategy", ["whole_word", "span"])
def test_words_need_a_tokenizer_that_shows_them(tokenizer: TextTokenizer, strategy: str) -> None:
    without = replace(tokenizer, continues=None)
    MaskConfig().check_tokenizer(without)
    with pytest.raises(UserError, match=rf"mask\.strategy: {strategy} .*data\.tokenizer.*WordPiece"):
        MaskConfig(strategy=strategy).check_tokenizer(without)
