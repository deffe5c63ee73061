"""Masking of whole words and of spans: exact budgets, whole words, spans of the paper's lengths, and the replacements that each rule asks for."""

import math
from itertools import pairwise

import numpy as np
import pytest

from mlm_dist.data.masking import MaskConfig, Words, mask, spans, whole_words
from mlm_dist.data.rng import keyed_philox, uniforms
from mlm_dist.data.tokenizer import TextTokenizer, load
from tests.corpora import save_tokenizer

KEY = (7, 0, "0", "shard.tar", 3, "mask")
STRATEGIES = ("whole_word", "span")
Ragged = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def make_rows(tokenizer: TextTokenizer, num_rows: int, width: int, seed: int, pieces: float = 0.2) -> Ragged:
    """Rows of one to three segments, in which a token goes on with a word by probability ``pieces`` and some are [UNK]; the last third is shorter."""
    rng = np.random.default_rng(seed)
    assert tokenizer.continues is not None
    going_on, first = (
        np.flatnonzero(tokenizer.continues),
        np.setdiff1d(tokenizer.ordinary, np.flatnonzero(tokenizer.continues)),
    )
    lengths = np.full(num_rows, width, np.int32)
    lengths[-(num_rows // 3) :] = rng.integers(3, width + 1, num_rows // 3)
    parts = []
    for length in lengths.tolist():
        row = np.where(rng.random(length) < pieces, rng.choice(going_on, length), rng.choice(first, length))
        row[rng.random(length) < 0.01] = tokenizer.backend.token_to_id("[UNK]")
        for cut in rng.integers(1, length, rng.integers(0, 3)):
            row[cut - 1 : cut + 1] = tokenizer.sep_id, tokenizer.cls_id
        row[0], row[-1] = tokenizer.cls_id, tokenizer.sep_id
        parts.append(row)
    return np.concatenate(parts).astype(tokenizer.dtype), lengths


@pytest.fixture(scope="module")
def rows(tokenizer: TextTokenizer) -> Ragged:
    return make_rows(tokenizer, 2400, 64, seed=1)


def spell(text: str, tokenizer: TextTokenizer) -> np.ndarray:
    """The ids of tokens spelled out."""
    return np.asarray([tokenizer.backend.token_to_id(name) for name in text.split()], tokenizer.dtype)


def words_of(ids: np.ndarray, lengths: np.ndarray, tokenizer: TextTokenizer) -> list[list[list[int]]]:
    """The maskable words of each row as lists of places, by the definition, one token after the other."""
    assert tokenizer.continues is not None
    special, continues = set(tokenizer.special.tolist()), tokenizer.continues.tolist()
    out, place = [], 0
    for length in lengths.tolist():
        found: list[list[int]] = []
        before = None
        for i, token in enumerate(ids[place : place + length].tolist(), place):
            if continues[token] and before not in (None, tokenizer.cls_id, tokenizer.sep_id):
                found[-1].append(i)
            else:
                found.append([i])
            before = token
        out.append([word for word in found if not special.intersection(ids[word].tolist())])
        place += length
    return out


@pytest.fixture(scope="module")
def words(rows: Ragged, tokenizer: TextTokenizer) -> list[list[list[int]]]:
    return words_of(*rows, tokenizer)


def mask_at(
    rows: Ragged, tokenizer: TextTokenizer, config: MaskConfig, rate: float = 0.15, key: tuple[int | str, ...] = KEY
) -> tuple[np.ndarray, np.ndarray]:
    return mask(*rows, tokenizer, config, np.full(len(rows[1]), rate), key)


def per_row(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1])


def close(count: float, n: int, p: float, sigmas: float = 4.0) -> bool:
    """A binomial count lies within so many standard deviations of its mean."""
    return abs(count - n * p) <= sigmas * math.sqrt(n * p * (1 - p))


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    expected = counts.sum() * shares
    return float(((counts - expected) ** 2 / expected).sum())


def test_words_end_at_segments_and_rows_and_take_a_special_token_with_them(tokenizer: TextTokenizer) -> None:
    text = "[CLS] ##1 ##2 the 1 ##0 [SEP] [CLS] ##3 [UNK] ##4 ##5 of [SEP] [CLS] and the ##6 ##7 [PAD]"
    ids, names = spell(text, tokenizer), text.split()
    found = Words.find(ids, np.asarray([14, 0, 3, 3], np.int32), tokenizer)
    spelled = [" ".join(names[a:b]) for a, b in pairwise(found.starts)]
    assert spelled == [
        "[CLS]", "##1 ##2", "the", "1 ##0", "[SEP]", "[CLS]", "##3", "[UNK] ##4 ##5", "of", "[SEP]", "[CLS]", "and", "the", "##6 ##7", "[PAD]",
    ]  # fmt: skip
    assert found.first.tolist() == [0, 10, 10, 13, 15]
    assert found.tokens.tolist() == [7, 0, 2, 2]
    assert [w for w, start in zip(spelled, found.starts, strict=False) if found.blocked[start]] == [
        "[CLS]", "[SEP]", "[CLS]", "[UNK] ##4 ##5", "[SEP]", "[CLS]", "[PAD]",
    ]  # fmt: skip


def test_words_of_many_rows(rows: Ragged, tokenizer: TextTokenizer, words: list[list[list[int]]]) -> None:
    found = Words.find(*rows, tokenizer)
    expected = [(word[0], len(word)) for row in words for word in row]
    free = ~found.blocked[found.starts[:-1]]
    assert list(zip(found.starts[:-1][free].tolist(), np.diff(found.starts)[free].tolist(), strict=True)) == expected
    assert found.tokens.tolist() == [sum(map(len, row)) for row in words]
    assert {len(word) for row in words for word in row} >= {1, 2, 3, 4}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rate", [0.02, 0.15, 0.5, 0.9])
def test_the_budget_of_every_row_is_exact_and_its_mean_is_the_rate(
    tokenizer: TextTokenizer, strategy: str, rate: float
) -> None:
    rows = make_rows(tokenizer, 1500, 64, seed=2, pieces=0.0)  # words of one token: each budget can be filled
    _, selected = mask_at(rows, tokenizer, MaskConfig(strategy=strategy), rate)
    special = np.isin(rows[0], tokenizer.special)
    counts = np.asarray([part.sum() for part in per_row(selected, rows[1])])
    wanted = rate * np.asarray([part.sum() for part in per_row(~special, rows[1])])
    assert ((counts == np.maximum(np.floor(wanted), wanted > 0)) | (counts == np.ceil(wanted))).all()
    # Rows that the least budget of 1 does not touch have exactly the rate in the mean.
    free = wanted >= 1
    chance = wanted[free] % 1
    assert free.sum() > 400
    assert abs((counts - wanted)[free].sum()) <= 4 * math.sqrt((chance * (1 - chance)).sum())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_have_their_own_rates(rows: Ragged, tokenizer: TextTokenizer, strategy: str) -> None:
    given = np.tile([0.1, 0.3, 0.6], len(rows[1]) // 3)
    _, selected = mask(*rows, tokenizer, MaskConfig(strategy=strategy), given, KEY)
    found = Words.find(*rows, tokenizer)
    counts = np.asarray([part.sum() for part in per_row(selected, rows[1])])
    for rate in (0.1, 0.3, 0.6):
        here = (given == rate) & (found.tokens > 40)
        assert counts[here].sum() / found.tokens[here].sum() == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_has_at_least_one_if_it_can(tokenizer: TextTokenizer, strategy: str) -> None:
    ids = spell("[CLS] the [SEP] [CLS] [UNK] [SEP] [CLS] 1 ##2 ##3 [SEP]", tokenizer)
    _, selected = mask_at((ids, np.asarray([3, 3, 5], np.int32)), tokenizer, MaskConfig(strategy=strategy), 1e-9)
    # A word of three does not fit a budget of one; a span is cut there.
    assert np.flatnonzero(selected).tolist() == ([1] if strategy == "whole_word" else [1, 7])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rate", [0.15, 0.9])
def test_special_tokens_stay_and_nothing_else_changes(
    rows: Ragged, tokenizer: TextTokenizer, strategy: str, rate: float
) -> None:
    ids = rows[0].copy()
    out, selected = mask_at(rows, tokenizer, MaskConfig(strategy=strategy), rate)
    assert (rows[0] == ids).all() and out.dtype == ids.dtype
    special = np.isin(ids, tokenizer.special)
    assert selected.any() and not selected[special].any()
    assert (out[~selected] == ids[~selected]).all()
    assert np.isin(out[selected], [*tokenizer.ordinary, tokenizer.mask_id]).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pads_in_a_row_are_left_alone(rows: Ragged, tokenizer: TextTokenizer, strategy: str) -> None:
    parts = [np.append(part, [tokenizer.pad_id] * 5) for part in per_row(*rows)]
    padded = np.concatenate(parts).astype(rows[0].dtype), (rows[1] + 5).astype(np.int32)
    out, selected = mask_at(padded, tokenizer, MaskConfig(strategy=strategy), 0.5)
    pads = padded[0] == tokenizer.pad_id
    assert pads.sum() == 5 * len(rows[1]) and not selected[pads].any() and (out[pads] == tokenizer.pad_id).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_key_alone_decides(rows: Ragged, tokenizer: TextTokenizer, strategy: str) -> None:
    config = MaskConfig(strategy=strategy)
    first = mask_at(rows, tokenizer, config)
    np.random.seed(1)
    again = mask_at(rows, tokenizer, config)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for place, value in enumerate((8, 1, "1", "other.tar", 4, "mask2")):
        _, other = mask_at(rows, tokenizer, config, key=(*KEY[:place], value, *KEY[place + 1 :]))
        assert (
            0.12 < (first[1] & other).sum() / first[1].sum() < 0.21
        )  # independent; single tokens of short rows are alike more often


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_whole_words_are_whole(
    rows: Ragged, tokenizer: TextTokenizer, words: list[list[list[int]]], rate: float
) -> None:
    _, selected = mask_at(rows, tokenizer, MaskConfig(strategy="whole_word"), rate)
    for row in words:
        shares = {selected[word].mean() for word in row}
        assert shares <= {0.0, 1.0}
        # Below its budget only if no word that is left fits.
        used, wanted = sum(selected[word[0]] * len(word) for word in row), rate * sum(map(len, row))
        assert used <= max(1, math.ceil(wanted))
        room = max(1, math.floor(wanted)) - used
        assert all(len(word) > room for word in row if not selected[word[0]]) or room <= 0


@pytest.mark.parametrize("seed", range(12))
def test_whole_words_are_those_that_one_after_the_other_gives(tokenizer: TextTokenizer, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids, lengths = make_rows(tokenizer, 60, int(rng.integers(8, 90)), seed, pieces=float(rng.random()))
    found = Words.find(ids, lengths, tokenizer)
    budgets = found.budgets(rng.random(len(lengths)) * rng.random(), rng.random(len(lengths)))
    draws = keyed_philox("test", seed).random_raw(len(ids))
    expected = set()
    for row, budget in zip(words_of(ids, lengths, tokenizer), budgets.tolist(), strict=True):
        for word in sorted(row, key=lambda word: draws[word[0]]):
            if len(word) <= budget:
                expected.update(word)
                budget -= len(word)
    starts, counts = whole_words(found, budgets, draws)
    got = [
        place for start, n in zip(starts.tolist(), counts.tolist(), strict=True) for place in range(start, start + n)
    ]
    assert len(got) == len(set(got)) and set(got) == expected


def test_every_word_of_a_length_is_as_likely(tokenizer: TextTokenizer) -> None:
    ids = np.asarray([tokenizer.cls_id, *tokenizer.ordinary[:20], tokenizer.sep_id] * 400, tokenizer.dtype)
    lengths = np.full(400, 22, np.int32)
    counts = np.zeros(22)
    for key in range(10):
        counts += (
            mask_at((ids, lengths), tokenizer, MaskConfig(strategy="whole_word"), key=(key,))[1].reshape(400, 22).sum(0)
        )
    assert counts[[0, -1]].sum() == 0
    # 15% of 20 is 3 of each row; without replacement the statistic is a chi-square of 19 degrees times 17/19.
    assert counts.sum() == 3 * 4000
    assert chi_square(counts[1:-1], np.full(20, 1 / 20)) * 19 / 17 < 43.8  # 0.999 quantile


def test_whole_words_replace_token_by_token(rows: Ragged, tokenizer: TextTokenizer) -> None:
    ids = rows[0]
    out, selected = mask_at(rows, tokenizer, MaskConfig(strategy="whole_word", split=(0.7, 0.2, 0.1)), 0.4)
    n = int(selected.sum())
    by_chance = 0.2 / len(tokenizer.ordinary)
    to_mask, same = out[selected] == tokenizer.mask_id, out[selected] == ids[selected]
    assert close(to_mask.sum(), n, 0.7) and close(same.sum(), n, 0.1 + by_chance)
    assert close(n - to_mask.sum() - same.sum(), n, 0.2 - by_chance)
    # The second token of a word is masked whatever happened to the first.
    assert tokenizer.continues is not None
    second = np.flatnonzero(selected[1:] & tokenizer.continues[ids[1:]] & selected[:-1]) + 1
    both = (out[second] == tokenizer.mask_id) & (out[second - 1] == tokenizer.mask_id)
    assert close(both.sum(), len(second), 0.49)


def drawn_spans(
    rows: Ragged, tokenizer: TextTokenizer, rate: float, p: float = 0.2, longest: int = 10, key: str = "spans"
) -> tuple[Words, np.ndarray, np.ndarray, np.ndarray]:
    """(words, row, first token and number of tokens of each span in the order drawn)."""
    found = Words.find(*rows, tokenizer)
    generator = keyed_philox("test", key)
    budgets = found.budgets(np.full(len(rows[1]), rate), uniforms(generator.random_raw(len(rows[1]))))
    starts, counts = spans(found, budgets, p, longest, generator)
    row = np.searchsorted(np.cumsum(rows[1]), starts, side="right")
    assert (np.bincount(row, counts, len(budgets)) == budgets).all()
    return found, row, starts, counts


@pytest.mark.parametrize("rate", [0.15, 0.5, 0.95])
@pytest.mark.parametrize("p, longest", [(0.2, 10), (1.0, 10), (0.01, 1000), (0.2, 1)])
def test_spans_are_disjoint_runs_of_whole_words(
    rows: Ragged, tokenizer: TextTokenizer, rate: float, p: float, longest: int
) -> None:
    found, row, starts, counts = drawn_spans(rows, tokenizer, rate, p, longest)
    covered = np.zeros(len(rows[0]), int)
    for start, n in zip(starts.tolist(), counts.tolist(), strict=True):
        covered[start : start + n] += 1
    assert covered.max() == 1 and not covered[np.isin(rows[0], tokenizer.special)].any()
    assert np.isin(starts, found.starts).all()
    cut = ~np.isin(starts + counts, found.starts)
    last = np.zeros(len(row), bool)
    last[[len(row) - 1 - np.argmax(row[::-1] == r) for r in np.unique(row)]] = True
    assert not (cut & ~last).any()
    size = np.searchsorted(found.starts, starts + counts) - np.searchsorted(found.starts, starts)
    assert size.min() >= 1 and size.max() <= longest


def geometric(p: float, longest: int) -> np.ndarray:
    weights = p * (1 - p) ** np.arange(longest)
    return weights / weights.sum()


@pytest.mark.parametrize("p, longest, bound", [(0.2, 10, 27.9), (0.5, 4, 16.3)])  # 0.999 quantiles of 9 and 3 degrees
def test_span_lengths_are_geometric(tokenizer: TextTokenizer, p: float, longest: int, bound: float) -> None:
    # At 40% of 126 words the first four spans of a row are never cut, and there is always room for the longest.
    ids = np.tile(np.r_[tokenizer.cls_id, np.resize(tokenizer.ordinary[:50], 126), tokenizer.sep_id], 1500)
    rows = ids.astype(tokenizer.dtype), np.full(1500, 128, np.int32)
    _, row, starts, counts = drawn_spans(rows, tokenizer, 0.4, p, longest)
    order = np.argsort(row, kind="stable")
    number = np.arange(len(row)) - np.searchsorted(row[order], row[order])
    early = counts[order[number < 4]]
    assert len(early) == 6000
    assert chi_square(np.bincount(early, minlength=longest + 1)[1:], geometric(p, longest)) < bound
    if (p, longest) == (0.2, 10):
        assert early.mean() == pytest.approx(3.8, abs=0.15)  # the paper's figure
    # Where a first span of one word begins is uniform.
    first = np.unique(row, return_index=True)[1]
    first = starts[first[counts[first] == 1]] % 128 - 1
    assert chi_square(np.bincount(first // 14, minlength=9), np.full(9, 1 / 9)) < 26.1  # 8 degrees


def test_a_span_is_as_long_as_there_is_room(tokenizer: TextTokenizer) -> None:
    ids = spell("[CLS] the of [SEP] [CLS] 1 ##2 ##3 and [SEP] [CLS] [UNK] to [SEP]", tokenizer)
    rows = np.tile(ids, 300), np.full(300, len(ids), np.int32)
    # The lengths drawn are about uniform over 1 .. 1000, and two words are the most that are free: one of the two pairs comes first.
    _, row, starts, counts = drawn_spans(rows, tokenizer, 0.99, 1e-6, 1000)
    first = np.unique(row, return_index=True)[1]
    place, size = starts[first] % len(ids), counts[first]
    one, other = (place == 1) & (size == 2), (place == 5) & (size == 4)
    assert len(first) == 300 and one.sum() + other.sum() >= 297 and close(one.sum(), 300, 0.5)


def test_a_span_does_not_leave_its_row(tokenizer: TextTokenizer) -> None:
    rows = np.resize(tokenizer.ordinary[:50], 300 * 12).astype(tokenizer.dtype), np.full(300, 12, np.int32)
    _, row, starts, counts = drawn_spans(rows, tokenizer, 0.9, 1e-6, 1000)
    # Nearly all of the lengths drawn are above 12, so that the span is the row.
    first = np.unique(row, return_index=True)[1]
    assert (starts[first] == np.arange(300) * 12).sum() >= 290
    assert ((starts + counts - 1) // 12 == row).all()


def test_a_span_is_replaced_as_one(rows: Ragged, tokenizer: TextTokenizer) -> None:
    ids = rows[0]
    config = MaskConfig(strategy="span")
    found = Words.find(*rows, tokenizer)
    out, selected = mask_at(rows, tokenizer, config, 0.15)
    generator = keyed_philox(*KEY)
    budgets = found.budgets(np.full(len(rows[1]), 0.15), uniforms(generator.random_raw(len(rows[1]))))
    starts, counts = spans(found, budgets, config.span_p, config.span_max, generator)
    assert selected.sum() == counts.sum() and all(
        selected[a : a + n].all() for a, n in zip(starts, counts, strict=True)
    )
    fate = {"mask": 0, "same": 0, "random": 0}
    for start, n in zip(starts.tolist(), counts.tolist(), strict=True):
        if n > 1:  # one random token is the old one by chance too often
            seen, truth = out[start : start + n], ids[start : start + n]
            masked = seen == tokenizer.mask_id
            assert masked.all() or not masked.any()
            fate["mask" if masked.all() else "same" if (seen == truth).all() else "random"] += 1
    total = sum(fate.values())
    assert total > 3500
    assert close(fate["mask"], total, 0.8) and close(fate["same"], total, 0.1) and close(fate["random"], total, 0.1)


def test_random_tokens_of_a_span_are_uniform_and_differ(rows: Ragged, tokenizer: TextTokenizer) -> None:
    out, selected = mask_at(rows, tokenizer, MaskConfig(strategy="span", split=(0.0, 1.0, 0.0)), 0.5)
    counts = np.bincount(out[selected], minlength=tokenizer.vocab_size)[tokenizer.ordinary]
    assert counts.sum() == selected.sum() > 40_000
    assert chi_square(counts, np.full(len(counts), 1 / len(counts))) < 113.5  # 0.999 quantile of 73 degrees
    pairs = selected[1:] & selected[:-1]
    assert close((out[1:] == out[:-1])[pairs].sum(), int(pairs.sum()), 1 / len(tokenizer.ordinary))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ids_wider_than_16_bits(rows: Ragged, tokenizer: TextTokenizer, strategy: str) -> None:
    config = MaskConfig(strategy=strategy)
    narrow = mask_at(rows, tokenizer, config)
    wide = mask_at((rows[0].astype(np.uint32), rows[1]), tokenizer, config)
    assert wide[0].dtype == np.uint32 and all((a == b).all() for a, b in zip(narrow, wide, strict=True))
