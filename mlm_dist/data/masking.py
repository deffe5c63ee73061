"""Masking: which tokens the model must predict, and what it sees in their place.

``token`` is BERT's rule (Devlin et al. 2019, section 3.1): each position by probability ``rate``; of those 80% become [MASK], 10% a random token, 10% stay.
``mask_only`` is the tutorial's: each position by probability ``rate``, all to [MASK].
``whole_word`` is Google's whole word masking (release of May 2019): words, not pieces, until the row's budget is full.
``span`` is SpanBERT's (Joshi et al. 2020, section 3.1): runs of words of geometric length, until the row's budget is full.

The budget of a row is ``rate * maskable tokens``, rounded up or down by a draw so that its mean is exact, and at least 1, as in both originals.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlm_dist.data.rng import keyed_philox, uniforms
from mlm_dist.data.rows import ranges
from mlm_dist.data.tokenizer import TextTokenizer
from mlm_dist.errors import UserError

# What a token is to its word.
CONTINUES, SPECIAL, BREAK = 1, 2, 3
# Starts that a span may try in vain before the free ones are counted out.
MAX_TRIES = 6


@dataclass
class MaskConfig:
    """How tokens are masked.

    Attributes:
        strategy: ``token`` (80/10/10), ``mask_only`` (all to [MASK]), ``whole_word`` or ``span`` (SpanBERT); the last two mask an exact share of every row.
        rate: share of the tokens that is selected, at step 0 if there is a schedule.
        split: shares of [MASK], random token and unchanged, drawn for each token or, with ``span``, each span; ``mask_only`` has none.
        labels: ``masked`` (loss on the selected positions), ``all`` (on every real position, [CLS] and [SEP] too, as the tutorial does at batch 1) or
            ``all_with_padding`` (rows padded to data.seq_len, loss on [PAD] too, as the tutorial does at larger batches; for data.packing none).
        rate_schedule: how the rate moves with the step: ``constant``, or ``linear`` or ``cosine`` from ``rate`` to ``rate_end``.
        rate_end: the rate at ``rate_steps`` and after.
        rate_steps: steps that a schedule takes.
        span_p: for ``span``, parameter of the geometric distribution of a span's words.
        span_max: for ``span``, most words of a span.
    """

    strategy: Literal["token", "mask_only", "whole_word", "span"] = "token"
    rate: float = 0.15
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    labels: Literal["masked", "all", "all_with_padding"] = "masked"
    rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    rate_end: float | None = None
    rate_steps: int | None = None
    span_p: float = 0.2
    span_max: int = 10

    def check(self) -> None:
        """Raises UserError for values that no masking can have."""
        for key in ("rate", "rate_end"):
            value = getattr(self, key)
            if value is not None and not 0.0 < value < 1.0:
                raise UserError(f"mask.{key}: {value} is not a probability between 0 and 1; BERT uses 0.15.")
        if not (min(self.split) >= 0 and abs(sum(self.split) - 1.0) <= 1e-6):
            raise UserError(
                f"mask.split: {list(self.split)} must be three shares >= 0 that sum to 1; BERT uses [0.8, 0.1, 0.1]."
            )
        for key in ("rate_end", "rate_steps"):
            value = getattr(self, key)
            if self.rate_schedule != "constant" and value is None:
                raise UserError(
                    f"mask.{key}: null, but mask.rate_schedule {self.rate_schedule} needs it; give the rate that it ends at (mask.rate_end) "
                    "and the number of steps that it takes (mask.rate_steps)."
                )
            if self.rate_schedule == "constant" and value is not None:
                raise UserError(
                    f"mask.{key}: {value} does nothing with mask.rate_schedule constant; set that to linear or cosine, or mask.{key} to null."
                )
        if self.rate_steps is not None and self.rate_steps < 1:
            raise UserError(f"mask.rate_steps: {self.rate_steps} must be at least 1 step.")
        if not 0.0 < self.span_p <= 1.0:
            raise UserError(f"mask.span_p: {self.span_p} must be above 0 and at most 1; SpanBERT uses 0.2.")
        if not 1 <= self.span_max <= 1000:
            raise UserError(f"mask.span_max: {self.span_max} must be 1 to 1000 words; SpanBERT uses 10.")

    def check_packing(self, packing: str) -> None:
        """Raises UserError for labels that rows of this ``data.packing`` cannot carry."""
        if self.labels == "all_with_padding" and packing != "none":
            raise UserError(
                f"mask.labels: all_with_padding pads each document to a row of its own, which data.packing {packing} does not give; "
                "set data.packing to none, or mask.labels to all."
            )

    def check_tokenizer(self, tokenizer: TextTokenizer) -> None:
        """Raises UserError for a strategy that this tokenizer's tokens cannot follow."""
        if self.strategy in ("whole_word", "span") and tokenizer.continues is None:
            raise UserError(
                f"mask.strategy: {self.strategy} masks whole words, but the tokens of data.tokenizer do not show where a word begins or goes on, as "
                "WordPiece's ## and byte-level BPE's Ġ do; use token, or such a tokenizer."
            )


def rates(config: MaskConfig, steps: np.ndarray) -> np.ndarray:
    """The masking rate at each of ``steps`` (int64 [R], global steps from 0), float64 [R]."""
    if config.rate_schedule == "constant":
        return np.full(len(steps), config.rate)
    assert config.rate_end is not None and config.rate_steps is not None
    done = np.minimum(steps / config.rate_steps, 1.0)
    if config.rate_schedule == "cosine":
        done = 0.5 - 0.5 * np.cos(np.pi * done)
    return config.rate * (1.0 - done) + config.rate_end * done


def mask(
    ids: np.ndarray,
    lengths: np.ndarray,
    tokenizer: TextTokenizer,
    config: MaskConfig,
    rates: np.ndarray,
    key: tuple[int | str, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Mask the tokens of one block.

    Args:
        ids: uint16|uint32 [T] token ids of all rows, one after the other.
        lengths: int32 [R], tokens of each row; sums to T.
        rates: float64 [R], the masking rate of each row, in (0, 1).
        key: keys the draws. ``token`` and ``mask_only`` take two of each token whatever is selected, so that another rate keeps them.

    Returns:
        (input ids [T] as the model sees them, bool [T] selected). A special token is never selected and never a random replacement. With ``token`` and
        ``mask_only`` a higher rate selects a superset.
    """
    generator = keyed_philox(*key)
    if config.strategy in ("token", "mask_only"):
        raw = generator.random_raw(2 * len(ids)).reshape(2, -1)
        chosen = _independent(ids, lengths, tokenizer, rates, raw[0])
        action = pick = raw[1][chosen]
    else:
        words = Words.find(ids, lengths, tokenizer)
        budgets = words.budgets(rates, uniforms(generator.random_raw(len(lengths))))
        if config.strategy == "whole_word":
            starts, counts = whole_words(words, budgets, generator.random_raw(len(ids)))
            chosen = ranges(starts, counts)
            action = pick = generator.random_raw(len(chosen))
        else:
            starts, counts = spans(words, budgets, config.span_p, config.span_max, generator)
            chosen = ranges(starts, counts)
            action, pick = np.repeat(generator.random_raw(len(starts)), counts), generator.random_raw(len(chosen))
    out = ids.copy()
    if config.strategy == "mask_only":
        out[chosen] = tokenizer.mask_id
    else:
        _replace(out, chosen, action, pick, tokenizer, config.split)
    selected = np.zeros(len(ids), bool)
    selected[chosen] = True
    return out, selected


def thresholds(probabilities: np.ndarray) -> np.ndarray:
    """uint64 bounds with ``raw < bound`` exactly where ``uniforms(raw) < probability``, for probabilities in [0, 1)."""
    return np.ceil(probabilities * 2.0**53).astype(np.uint64) << np.uint64(11)


def _independent(
    ids: np.ndarray, lengths: np.ndarray, tokenizer: TextTokenizer, rates: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """Places of the ordinary tokens whose draw is below their row's rate, int64."""
    bounds = thresholds(rates)
    alike = len(bounds) > 0 and (bounds == bounds[0]).all()
    chosen = np.flatnonzero(draws < (bounds[0] if alike else np.repeat(bounds, lengths)))
    is_special = np.zeros(max(tokenizer.vocab_size, int(tokenizer.special.max()) + 1), bool)
    is_special[tokenizer.special] = True
    return chosen[~is_special[ids[chosen]]]


def _replace(
    out: np.ndarray,
    chosen: np.ndarray,
    action: np.ndarray,
    pick: np.ndarray,
    tokenizer: TextTokenizer,
    split: tuple[float, float, float],
) -> None:
    """Put [MASK], a random token or nothing in place of the tokens of ``out`` at ``chosen``: a draw's high half decides what, its low half which token."""
    shares = (action >> np.uint64(32)).astype(np.float64) * 2.0**-32
    to_mask = shares < split[0]
    out[chosen[to_mask]] = tokenizer.mask_id
    to_random = np.flatnonzero(~to_mask & (shares < split[0] + split[1]))
    which = ((pick[to_random] & np.uint64(0xFFFFFFFF)) * np.uint64(len(tokenizer.ordinary))) >> np.uint64(32)
    out[chosen[to_random]] = tokenizer.ordinary[which.astype(np.int64)]


@dataclass(frozen=True)
class Words:
    """The words of R rows: runs of a token with those that continue it.

    A word ends at [CLS] and [SEP], so that it lies in one segment (a piece of a document may begin within a word). One with a special token such as [UNK] in
    it is not masked.

    Attributes:
        starts: int64 [W + 1], first token of each word, and T.
        first: int64 [R + 1], first word of each row, and W.
        blocked: bool [T], tokens that are special; one begins a word, so a word holds one only there.
        tokens: int64 [R], tokens of each row in words that may be masked.
    """

    starts: np.ndarray
    first: np.ndarray
    blocked: np.ndarray
    tokens: np.ndarray

    @staticmethod
    def find(ids: np.ndarray, lengths: np.ndarray, tokenizer: TextTokenizer) -> "Words":
        """The words of ``ids`` [T], rows of ``lengths`` [R] one after the other."""
        continues = tokenizer.continues
        assert continues is not None, "MaskConfig.check_tokenizer comes first"
        kinds = np.zeros(max(len(continues), int(tokenizer.special.max()) + 1), np.uint8)
        kinds[: len(continues)] = continues
        kinds[tokenizer.special] = SPECIAL
        kinds[[tokenizer.cls_id, tokenizer.sep_id]] = BREAK
        kind = np.take(kinds, ids)
        rows = np.append(0, np.cumsum(lengths, dtype=np.int64))
        begins = np.ones(len(ids) + 1, bool)
        np.not_equal(kind, CONTINUES, out=begins[:-1])
        begins[1:-1] |= kind[:-1] == BREAK
        begins[rows] = True
        starts = np.flatnonzero(begins)
        blocked = kind >= SPECIAL
        special = np.flatnonzero(blocked)
        lost = np.diff(np.searchsorted(special, rows))
        longer = special[~begins[special + 1]]  # their words' other tokens are lost too; no tokenizer makes such words
        more = starts[np.searchsorted(starts, longer) + 1] - longer - 1
        np.add.at(lost, np.searchsorted(rows, longer, side="right") - 1, more)
        return Words(starts, np.searchsorted(starts, rows), blocked, lengths - lost)

    def budgets(self, rates: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Tokens to mask in each row, int64 [R]: ``floor(rate * tokens + draw)``, with draws in [0, 1), and at least 1 where any can be."""
        budgets = np.floor(rates * self.tokens + draws).astype(np.int64)
        return np.clip(budgets, np.minimum(self.tokens, 1), self.tokens)


def whole_words(words: Words, budgets: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words that fill each row's budget, taken in the order of their draws.

    As in Google's ``create_pretraining_data``, a word that no longer fits is passed over; a row ends below its budget only if no word that is left fits.

    Args:
        budgets: int64 [R], tokens to mask in each row.
        draws: uint64 [T]; a word's draw is that of its first token.

    Returns:
        First token and number of tokens of each word taken, int64.
    """
    room = budgets.copy()
    # A row is full long before its last word, nearly always, so the words of low draws come first: to sort them all would take longer than all the rest.
    mean = budgets.sum() / max(1, len(budgets))
    share = (mean + 2.0 * math.sqrt(mean) + 3.0) * len(budgets) / max(1, words.tokens.sum())
    low = draws < thresholds(np.asarray(min(share, 1.0 - 2.0**-53)))
    early = np.flatnonzero(np.take(low > words.blocked, words.starts[:-1]))
    chosen = _fill(words, early, room, draws)
    short = np.flatnonzero(room)
    late = ranges(words.first[short], words.first[short + 1] - words.first[short])
    late = late[~(low | words.blocked)[words.starts[late]]]
    chosen += _fill(words, late, room, draws)
    return np.concatenate([c[0] for c in chosen]), np.concatenate([c[1] for c in chosen])


def _fill(words: Words, left: np.ndarray, room: np.ndarray, draws: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Take the words ``left`` (numbers, ascending) in the order of their draws into the ``room`` of their rows (int64 [R], changed), passing over what does
    not fit. Each pass takes, in all rows at once, up to the first that does not fit; there are no more passes than the longest word has tokens."""
    rows = np.arange(len(room))
    counts = np.diff(np.searchsorted(left, words.first))
    token = words.starts[left]
    order = _order(np.repeat(rows, counts), draws[token], len(room))
    token, size = token[order], (words.starts[left + 1] - token)[order]
    chosen = [(token[:0], size[:0])]
    while len(token):
        used = np.append(0, np.cumsum(size))
        stop = np.cumsum(counts)
        bound = used[stop - counts] + room[rows]
        # Sizes are positive, so ``used`` ascends from row to row.
        end = np.minimum(np.searchsorted(used, bound, side="right") - 1, stop)
        taken = ranges(stop - counts, end - stop + counts)
        chosen.append((token[taken], size[taken]))
        room[rows] = bound - used[end]
        short = np.flatnonzero((used[end] < bound) & (end < stop))
        rows, counts = rows[short], (stop - end)[short]
        left_over = ranges(end[short], counts)
        token, size = token[left_over], size[left_over]
        fits = size <= np.repeat(room[rows], counts)
        counts = np.bincount(np.repeat(np.arange(len(rows)), counts)[fits], minlength=len(rows))
        token, size = token[fits], size[fits]
    return chosen


def _order(rows: np.ndarray, draws: np.ndarray, num_rows: int) -> np.ndarray:
    """``np.lexsort((draws, rows))`` for ascending rows, several times faster: row, draw and place share the bits of one integer, and these are sorted."""
    place_bits = max(1, (len(rows) - 1).bit_length())
    row_bits = max(1, (num_rows - 1).bit_length())
    keys = draws >> np.uint64(row_bits)
    keys |= rows.astype(np.uint64) << np.uint64(64 - row_bits)
    keys &= ~np.uint64((1 << place_bits) - 1)
    keys |= np.arange(len(rows), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64((1 << place_bits) - 1)).astype(np.int64)


def spans(
    words: Words, budgets: np.ndarray, p: float, longest: int, generator: np.random.Philox
) -> tuple[np.ndarray, np.ndarray]:
    """Spans that fill each row's budget exactly, drawn one after the other in each row.

    A span's length in words comes from the geometric distribution of ``p`` restricted to 1 .. ``longest`` (mean 3.8 for 0.2 and 10, as in the paper); then its
    start is uniform among the words at which that many are free, side by side and in one segment. Where there is no such place it takes the longest that there
    is. The last span of a row ends where the budget does, within a word if need be, as in the authors' code.

    Args:
        budgets: int64 [R], tokens to mask in each row, at most those that can be.
        generator: gives one draw for each try of each row.

    Returns:
        First token and number of tokens of each span, int64; those of a row in the order drawn.
    """
    # Sums in order, which every machine rounds alike.
    cdf = np.cumsum(np.cumprod(np.append(1.0, np.full(longest - 1, 1.0 - p))))
    cdf /= cdf[-1]
    room, taken = budgets.copy(), words.blocked[words.starts[:-1]]
    first, counts = words.first, np.diff(words.first).astype(np.uint64)
    want = np.zeros(len(room), np.int64)  # words of the span that the row seeks a place for; 0 for a new one
    tries = np.zeros(len(room), np.int64)
    found = [(want[:0], want[:0])]
    rows = np.flatnonzero(room)
    while len(rows):
        raw = generator.random_raw(len(rows))
        high, low = raw >> np.uint64(32), raw & np.uint64(0xFFFFFFFF)
        drawn = np.searchsorted(cdf, low.astype(np.float64) * 2.0**-32, side="right") + 1
        size = np.where(want[rows], want[rows], drawn)
        start = first[rows] + ((high * counts[rows]) >> np.uint64(32)).astype(np.int64)
        stuck = np.flatnonzero(tries[rows] >= MAX_TRIES)
        if len(stuck):
            start[stuck], size[stuck] = _free_places(words, taken, rows[stuck], size[stuck], high[stuck])
        stop = np.minimum(start + size, first[rows + 1])
        each = start[:, None] + np.arange((stop - start).max())
        busy = taken[np.minimum(each, len(taken) - 1)] & (each < stop[:, None])
        ok = (stop - start == size) & ~busy.any(1)
        want[rows], tries[rows] = np.where(ok, 0, size), np.where(ok, 0, tries[rows] + 1)
        start, stop, row = start[ok], stop[ok], rows[ok]
        taken[ranges(start, stop - start)] = True
        tokens = np.minimum(words.starts[stop] - words.starts[start], room[row])
        room[row] -= tokens
        found.append((words.starts[start], tokens))
        rows = rows[room[rows] > 0]
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def _free_places(
    words: Words, taken: np.ndarray, rows: np.ndarray, sizes: np.ndarray, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A uniform place for a span in each of ``rows``, by counting out all of them.

    Args:
        taken: bool [W], words that are in spans already, or blocked.
        rows, sizes: int64 [K]; each row has a free word; words wanted.
        draws: uint64 [K] below 2^32.

    Returns:
        int64 [K]: the first word, and how many words: those wanted or, if nowhere so many are free, the most that are.
    """
    counts = np.diff(words.first)[rows]
    word = ranges(words.first[rows], counts)
    begins = np.cumsum(counts) - counts
    place, busy, last = np.arange(len(word)), taken[word], begins + counts - 1
    # The end of the free run at each place: the next busy word, or the end of the row.
    end = np.where(busy, place, len(word))
    end[last] = last + ~busy[last]
    free = np.minimum.accumulate(end[::-1])[::-1] - place
    sizes = np.minimum(sizes, np.maximum.reduceat(free, begins))
    fits = np.flatnonzero(free >= np.repeat(sizes, counts))
    fitting = np.diff(np.searchsorted(fits, np.append(begins, len(word))))
    nth = ((draws * fitting.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
    return word[fits[np.cumsum(fitting) - fitting + nth]], sizes
