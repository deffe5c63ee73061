"""Rows: training rows as flat ragged arrays, from the block that makes them to the tensors that a micro-batch is."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The concatenation of ``arange(starts[i], starts[i] + lengths[i])``, int64 [lengths.sum()]."""
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) + np.repeat(
        np.asarray(starts, np.int64) - ends + lengths, lengths
    )


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts, dtype=np.int64) - counts


@dataclass
class Rows:
    """R rows. Each of three ragged groups is one flat array of values and one of counts per row.

    Attributes:
        ids: uint16|uint32 [T], input ids after masking, [CLS] and [SEP] of each segment included; ``lengths`` int32 [R] sums to T.
        segment_lengths: int32 [G], tokens of each segment, in order; ``segments`` int32 [R] sums to G.
        positions: int32 [M], places within the row that carry a label; ``labels`` (dtype of ids) [M], the token there; ``selected`` int32 [R] sums to M.
    """

    ids: np.ndarray
    lengths: np.ndarray
    segment_lengths: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    selected: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def original_ids(self) -> np.ndarray:
        """The ids before masking, [T]."""
        ids = self.ids.copy()
        ids[np.repeat(_starts(self.lengths), self.selected) + self.positions] = self.labels
        return ids

    def take(self, index: np.ndarray) -> "Rows":
        """The rows ``index`` (int64 [K]) in that order."""
        token = ranges(_starts(self.lengths)[index], self.lengths[index])
        segment = ranges(_starts(self.segments)[index], self.segments[index])
        label = ranges(_starts(self.selected)[index], self.selected[index])
        return Rows(
            ids=self.ids[token],
            lengths=self.lengths[index],
            segment_lengths=self.segment_lengths[segment],
            segments=self.segments[index],
            positions=self.positions[label],
            labels=self.labels[label],
            selected=self.selected[index],
        )

    def slice(self, start: int, stop: int) -> "Rows":
        """Rows ``start:stop`` as views."""
        t, g, m = (
            slice(int(c[:start].sum()), int(c[:stop].sum())) for c in (self.lengths, self.segments, self.selected)
        )
        return Rows(
            ids=self.ids[t],
            lengths=self.lengths[start:stop],
            segment_lengths=self.segment_lengths[g],
            segments=self.segments[start:stop],
            positions=self.positions[m],
            labels=self.labels[m],
            selected=self.selected[start:stop],
        )

    @staticmethod
    def concat(parts: Sequence["Rows"]) -> "Rows":
        """The rows of all parts (at least one), in order."""
        return Rows(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Rows)})

    @staticmethod
    def empty(n: int, cls_id: int, sep_id: int, dtype: np.dtype) -> "Rows":
        """n harmless rows: [CLS] [SEP] and no label."""
        return Rows(
            ids=np.tile(np.asarray([cls_id, sep_id], dtype), n),
            lengths=np.full(n, 2, np.int32),
            segment_lengths=np.full(n, 2, np.int32),
            segments=np.ones(n, np.int32),
            positions=np.zeros(0, np.int32),
            labels=np.zeros(0, dtype),
            selected=np.zeros(n, np.int32),
        )

    def padded(self, width: int, pad_id: int) -> "Rows":
        """The rows, of one segment each, filled up with [PAD] to ``width`` tokens and labelled in every place, with the token that was there before masking.

        The pads belong to the row's segment: they have its next positions, and ``collate`` marks them.
        """
        assert (self.segments == 1).all() and self.lengths.max(initial=0) <= width
        place = ranges(np.arange(len(self), dtype=np.int64) * width, self.lengths)
        ids = np.full(len(self) * width, pad_id, self.ids.dtype)
        labels = ids.copy()
        ids[place], labels[place] = self.ids, self.original_ids()
        lengths = np.full(len(self), width, np.int32)
        return Rows(
            ids=ids,
            lengths=lengths,
            segment_lengths=lengths,
            segments=self.segments,
            positions=np.tile(np.arange(width, dtype=np.int32), len(self)),
            labels=labels,
            selected=lengths,
        )

    def collate(
        self, pad_id: int, multiple: int = 8, *, flat: bool = False, shape: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """One micro-batch.

        Args:
            multiple: a padded one is as wide as the longest row, rounded up to this.
            flat: all tokens in one row, without padding.
            shape: (rows, tokens of a row) that every micro-batch is filled up to with [PAD], for who wants one shape.

        Returns:
            padded: input_ids, position_ids, segment_ids: int64 [R, S] (segment 0 is padding, 1.. the row's segments, -1.. the [PAD] tokens that a row itself
            holds in them; positions restart in each segment); selected: int64 [M] indices into the flattened [R * S]; labels: int64 [M];
            flat: input_ids, position_ids: int64 [1, T]; cu_seqlens: int32 [N + 1], bounds of the segments; max_length: tokens of the longest, an int;
            selected: int64 [M] indices into T; labels: int64 [M]. Filling is cut into segments of its own, max_length is the row's.
        """
        labels = torch.from_numpy(self.labels.astype(np.int64))
        position = np.arange(len(self.ids)) - np.repeat(_starts(self.segment_lengths), self.segment_lengths)
        if flat:
            return self._flat(pad_id, position, shape) | {"labels": labels}
        rows, width = shape or (len(self), -(-int(self.lengths.max()) // multiple) * multiple)
        lengths = np.zeros(rows, np.int64)
        lengths[: len(self)] = self.lengths
        inside = np.arange(width) < lengths[:, None]
        segment = np.repeat(ranges(np.ones(len(self), np.int64), self.segments), self.segment_lengths)
        pads = self.ids == pad_id
        if pads.any():
            segment[pads] *= -1

        def filled(values: np.ndarray, rest: int) -> torch.Tensor:
            out = np.full((rows, width), rest, np.int64) if rest else np.zeros((rows, width), np.int64)
            out[inside] = values
            return torch.from_numpy(out)

        selected = self.positions + np.repeat(np.arange(len(self), dtype=np.int64) * width, self.selected)
        return {
            "input_ids": filled(self.ids, pad_id),
            "position_ids": filled(position, 0),
            "segment_ids": filled(segment, 0),
            "selected": torch.from_numpy(selected),
            "labels": labels,
        }

    def _flat(self, pad_id: int, position: np.ndarray, shape: tuple[int, int] | None) -> dict[str, Any]:
        assert not (self.ids == pad_id).any(), "a [PAD] that sees its row cannot be told from the row in flat arrays"
        tokens, longest = (shape[0] * shape[1], shape[1]) if shape else (len(self.ids), int(self.segment_lengths.max()))
        fill = tokens - len(self.ids)
        pieces = np.full(-(-fill // longest), longest, np.int64)
        if fill:
            pieces[-1] = fill - longest * (len(pieces) - 1)
        ends = np.cumsum(np.concatenate([[0], self.segment_lengths, pieces]), dtype=np.int32)
        selected = self.positions + np.repeat(_starts(self.lengths), self.selected)
        return {
            "input_ids": torch.from_numpy(np.pad(self.ids.astype(np.int64), (0, fill), constant_values=pad_id)[None]),
            "position_ids": torch.from_numpy(np.pad(position, (0, fill))[None]),
            "cu_seqlens": torch.from_numpy(ends),
            "max_length": longest,
            "selected": torch.from_numpy(selected),
        }
