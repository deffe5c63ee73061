"""Packing: no token lost or doubled, no row too long, and what each kind promises about its rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_dist.data.packing import Pieces, pack

LENGTHS = st.lists(st.integers(0, 90), max_size=60)
SEQ_LEN = st.integers(8, 40)
KINDS = ("none", "split", "best_fit")
EVERY_CASE = settings(deadline=None, max_examples=150)


def offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def content(pieces: Pieces) -> list[int]:
    """The tokens of all pieces, in row order."""
    spans = zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True)
    return [i for start, n in spans for i in range(start, start + n)]


def row_lengths(pieces: Pieces) -> np.ndarray:
    """Tokens of every row with [CLS] and [SEP] of each piece."""
    return np.bincount(pieces.rows, pieces.lengths + 2).astype(int) if len(pieces.rows) else np.zeros(0, int)


@pytest.mark.parametrize("kind", KINDS)
@EVERY_CASE
@given(lengths=LENGTHS, seq_len=SEQ_LEN, key=st.integers(0, 1000))
def test_each_token_once_and_no_row_too_long(kind: str, lengths: list[int], seq_len: int, key: int) -> None:
    where = offsets(lengths)
    pieces = pack(where, seq_len, kind, "chunk", (key, "packing"))
    assert sorted(content(pieces)) == list(range(where[-1]))
    assert pieces.truncated == 0
    assert (pieces.lengths > 0).all()
    assert (np.diff(pieces.rows) >= 0).all()
    # Rows are numbered without a gap, and none is longer than a row may be.
    rows = row_lengths(pieces)
    assert (rows > 0).all() and (rows <= seq_len).all()
    # No piece has tokens of two documents.
    document = np.searchsorted(where, pieces.starts, side="right")
    assert (document == np.searchsorted(where, pieces.starts + pieces.lengths - 1, side="right")).all()


@pytest.mark.parametrize("kind", KINDS)
@EVERY_CASE
@given(lengths=LENGTHS, seq_len=SEQ_LEN)
def test_truncate_keeps_heads_and_counts_the_rest(kind: str, lengths: list[int], seq_len: int) -> None:
    where = offsets(lengths)
    pieces = pack(where, seq_len, kind, "truncate", (0,))
    heads = [
        i
        for start, n in zip(where[:-1].tolist(), lengths, strict=True)
        for i in range(start, start + min(n, seq_len - 2))
    ]
    assert sorted(content(pieces)) == heads
    assert len(heads) + pieces.truncated == where[-1]
    assert (row_lengths(pieces) <= seq_len).all()


@EVERY_CASE
@given(lengths=LENGTHS, seq_len=SEQ_LEN)
def test_none_is_a_piece_a_row(lengths: list[int], seq_len: int) -> None:
    pieces = pack(offsets(lengths), seq_len, "none", "chunk", (0,))
    assert pieces.rows.tolist() == list(range(sum(-(-n // (seq_len - 2)) for n in lengths)))
    assert content(pieces) == list(range(sum(lengths)))


@EVERY_CASE
@given(lengths=LENGTHS, seq_len=SEQ_LEN)
def test_split_rows_are_full_but_for_the_last(lengths: list[int], seq_len: int) -> None:
    pieces = pack(offsets(lengths), seq_len, "split", "chunk", (0,))
    assert (row_lengths(pieces)[:-1] >= seq_len - 2).all()
    assert content(pieces) == list(range(sum(lengths)))  # documents in the order given


@EVERY_CASE
@given(lengths=LENGTHS, seq_len=SEQ_LEN, key=st.integers(0, 1000))
def test_best_fit_keeps_pieces_whole(lengths: list[int], seq_len: int, key: int) -> None:
    where = offsets(lengths)
    whole = pack(where, seq_len, "none", "chunk", (key,))
    packed = pack(where, seq_len, "best_fit", "chunk", (key,))
    assert sorted(zip(packed.starts, packed.lengths, strict=True)) == sorted(
        zip(whole.starts, whole.lengths, strict=True)
    )
    # No two rows would fit in one: their sum is over seq_len, for best fit opens a row only when none has room.
    rows = np.sort(row_lengths(packed))
    assert len(rows) < 2 or rows[0] + rows[1] > seq_len


def test_best_fit_key_orders_rows_and_nothing_else() -> None:
    lengths = np.random.Generator(np.random.PCG64(0)).integers(1, 60, 200).tolist()
    first, second = (pack(offsets(lengths), 64, "best_fit", "chunk", (key,)) for key in (1, 2))

    def rows(pieces: Pieces) -> list[tuple[int, ...]]:
        return [tuple(pieces.starts[pieces.rows == r].tolist()) for r in range(int(pieces.rows[-1]) + 1)]

    assert rows(first) != rows(second)
    assert sorted(rows(first)) == sorted(rows(second))
    longest = [max(first.lengths[first.rows == r]) for r in range(20)]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_gives_nothing(kind: str, lengths: list[int]) -> None:
    pieces = pack(offsets(lengths), 32, kind, "chunk", (0,))
    assert len(pieces.starts) == len(pieces.lengths) == len(pieces.rows) == pieces.truncated == 0
