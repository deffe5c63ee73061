"""Packing: which tokens of which documents share a row. Pure functions of lengths; every segment costs two more tokens, [CLS] and [SEP]."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlm_dist.data.rng import permutation

Packing = Literal["none", "split", "best_fit"]
LongDocuments = Literal["chunk", "truncate"]


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents in row order.

    Attributes:
        starts, lengths: int64 [P], the piece's tokens in the block's flat content ids.
        rows: int64 [P], non-decreasing row number of each piece.
        truncated: content tokens left out by ``long_documents: truncate``.
    """

    starts: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    truncated: int


def pack(
    offsets: np.ndarray, seq_len: int, packing: Packing, long_documents: LongDocuments, key: tuple[int | str, ...]
) -> Pieces:
    """Lay out one block's documents in rows of at most ``seq_len`` tokens.

    Args:
        offsets: int64 [D + 1], document d has content ids ``offsets[d]:offsets[d + 1]``; empty documents give nothing.
        key: keys the order of the rows that best-fit made (it makes them longest first).

    Every content token is in exactly one piece, but for what ``truncate`` leaves out.
    """
    starts, lengths = offsets[:-1].astype(np.int64), np.diff(offsets).astype(np.int64)
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    capacity, truncated = seq_len - 2, 0
    if long_documents == "truncate":
        kept = np.minimum(lengths, capacity)
        truncated, lengths = int((lengths - kept).sum()), kept
    if packing == "split":
        return Pieces(*_split(starts, lengths, seq_len), truncated)
    counts = -(-lengths // capacity)
    # Chunks of one document: full ones, then what is left.
    part = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts, lengths = (
        np.repeat(starts, counts) + part * capacity,
        np.minimum(np.repeat(lengths, counts) - part * capacity, capacity),
    )
    if packing == "none":
        return Pieces(starts, lengths, np.arange(len(starts)), truncated)
    rows = _best_fit(lengths, seq_len, key)
    order = np.argsort(rows, kind="stable")
    return Pieces(starts[order], lengths[order], rows[order], truncated)


def _split(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill rows in turn, cutting documents where a row ends. A row's last one or two places stay empty when no segment fits there."""
    out: list[tuple[int, int, int]] = []
    row, room = 0, seq_len
    for start, left in zip(starts.tolist(), lengths.tolist(), strict=True):
        while left:
            if room < 3:
                row, room = row + 1, seq_len
            n = min(left, room - 2)
            out.append((start, n, row))
            start, left, room = start + n, left - n, room - n - 2
    columns = np.asarray(out, np.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def _best_fit(lengths: np.ndarray, seq_len: int, key: tuple[int | str, ...]) -> np.ndarray:
    """Best-fit-decreasing bin packing (Johnson 1973): each piece, longest first, into the fullest row that still holds it. Rows are then shuffled by ``key``.

    Open rows are kept by their free room; the set of rooms that exist is the bits of one integer, so the best fit is a shift and a lowest bit.
    """
    rows_with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms, count = 0, 0
    rows = np.empty(len(lengths), np.int64)
    for piece in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[piece]) + 2
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
        else:
            row, room, count = count, seq_len, count + 1
        rows[piece] = row
        left = room - need
        if left > 2:
            rows_with_room[left].append(row)
            rooms |= 1 << left
    return permutation(count, *key)[rows] if count else rows
