"""The stream as an ``IterableDataset`` of single rows: for transformers' ``Trainer`` and for plain ``DataLoader`` loops."""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import IterableDataset, get_worker_info

from mlm_dist.data.block import DataFault
from mlm_dist.data.rows import Rows
from mlm_dist.data.stream import Stream
from mlm_dist.errors import UserError
from mlm_dist.ledger import DataLoss, Ledger

# What stock BERT's loss leaves out.
IGNORED = -100
# Added to the scores of positions that are not seen. The lowest float16 is finite in every type that a trainer may cast the mask to, and exp of it is 0;
# the lowest float32 would become -inf.
HIDDEN = torch.finfo(torch.float16).min
# Rows that are widened at a time.
ROWS = 64
# The parts of a run's identity that its rows depend on.
IDENTITY = ("run.seed", "data.", "mask.", "train.global_batch", "train.batch_")


def masked_lm_loss(
    outputs: Mapping[str, Any], labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The mean cross-entropy over the labels of the whole global batch, as ``Trainer(compute_loss_func=...)``.

    By itself ``Trainer`` takes it that ``BertForMaskedLM`` divides by ``num_items_in_batch``, which it does not (transformers 5.23): loss and gradients
    come out too large by the number of processes and of accumulated micro-batches. A micro-batch without a label is 0 here, not NaN.

    Args:
        outputs: of the model; ``logits`` [B, S, vocabulary].
        labels: int64 [B, S], -100 for none.
        num_items_in_batch: labels of the global batch; None: those of ``labels``.
    """
    logits = outputs["logits"]
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / max(int(count), 1)


def isolating_mask(lengths: Sequence[int], width: int) -> torch.Tensor:
    """float32 [1, width, width], 0 within each of the segments of ``lengths`` tokens and within the padding after them, HIDDEN elsewhere."""
    mask = np.full((1, width, width), HIDDEN, np.float32)
    start = 0
    for length in [*lengths, width - sum(lengths)]:
        mask[0, start : start + length, start : start + length] = 0
        start += length
    return torch.from_numpy(mask)


@dataclass
class Position:
    """How far an iteration is.

    Attributes:
        cursors: int64 [lanes, 3], the stream's before global batch ``step``.
        row: rows of that batch that are done with.
        given: rows given in this iteration.
        iteration: its number, from 0.
        ended: it is over.
        ledger: what was lost since the beginning.
    """

    cursors: np.ndarray
    step: int = 0
    row: int = 0
    given: int = 0
    iteration: int = 0
    ended: bool = False
    ledger: Ledger = field(default_factory=Ledger)

    def next(self) -> "Position":
        """Where the next iteration begins."""
        return replace(self, given=0, iteration=self.iteration + 1, ended=False)


class MaskedLanguageDataset(IterableDataset[dict[str, torch.Tensor]]):
    """The rows of a run in their global order, as stock ``BertForMaskedLM`` takes them.

    DistilBERT and ELECTRA take them as they are. RoBERTa's positions begin after its padding token's id: add that and 1. ModernBERT's local layers need a
    mask of their own, which only unpacked rows leave to it.

    A row is a dict of tensors of the fixed width S = ``data.seq_len``:

    - ``input_ids``, ``position_ids``: int64 [S]; positions restart in each document of a packed row.
    - ``labels``: int64 [S], -100 where nothing is to be predicted.
    - ``attention_mask``: with ``data.packing: none`` int64 [S] of 1 and 0; with packed rows float32 [1, S, S], 0 where position i sees position j and the
      lowest float16 elsewhere, since any other form lets the documents of a row see each other in transformers 5.

    Order, tokens and masks are those of ``mlm-dist train`` with the same config. Every process that iterates gets all rows; Accelerate, and so ``Trainer``,
    gives each process its share of them.

    One iteration is the whole run, all its epochs; the next goes on from there with new rows or, in a run of epochs, with further epochs. One that was given up
    early begins again. Validation rows are the same in each.

    A ``DataLoader`` may give it one worker. More belong to the dataset itself (``data.workers``), which keeps their rows in order.

    Args:
        stream: the stream of rank 0 of 1.
        steps: end after so many global batches of rows; None: when the stream's epochs end.
        max_bad_fraction: share of an epoch's documents that may be lost to faults.
        identity: ``{key: value}``, part of a state; only a state with the same can be loaded.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        steps: int | None = None,
        max_bad_fraction: float = 0.01,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if stream.world_size != 1:
            raise UserError(
                f"stream: of rank {stream.rank} of {stream.world_size}; the dataset takes that of rank 0 of 1."
            )
        if steps is None and stream.epochs is None:
            raise UserError("steps: None, while the stream is endless; give a number of global batches.")
        self.stream, self.steps, self.max_bad_fraction = stream, steps, max_bad_fraction
        self.identity = json.loads(json.dumps(dict(identity or {})))
        # Shared by a DataLoader's worker and its parent: an iteration came to its end; the rows are read in a worker.
        self._ended, self._elsewhere = torch.zeros(2, dtype=torch.bool).share_memory_()
        self._position = self._begin = Position(stream.start_cursors())
        self._expected = 0

    @classmethod
    def from_config(
        cls, path: str, overrides: Mapping[str, Any] | None = None, *, validation: bool = False
    ) -> "MaskedLanguageDataset":
        """The rows of a run config.

        Args:
            path: YAML file, as for ``mlm-dist train --config``.
            overrides: ``{"section.key": value}``, stronger than the file.
            validation: the rows of ``data.val_manifest``: one epoch, in natural order.

        Raises:
            UserError: what ``mlm-dist train`` would refuse.
        """
        from mlm_dist.config import load
        from mlm_dist.inputs import DataInputs

        flags = [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in (overrides or {}).items()]
        config = load(["--config", str(path), *flags]).config
        inputs = DataInputs(config)
        stream = inputs.val_stream(0, 1) if validation else inputs.stream(0, 1)
        if stream is None:
            raise UserError("data.val_manifest: missing. Give it in the config file or the overrides.")
        for note in inputs.notes:
            warnings.warn(note, stacklevel=2)
        data = [maker.manifest.fingerprint for maker in stream.makers] if validation else inputs.fingerprints()
        identity = config.identity(data, inputs.tokenizer.fingerprint)
        return cls(
            stream,
            steps=None if validation else config.train.steps,
            max_bad_fraction=config.data.max_bad_fraction,
            identity={key: value for key, value in identity.items() if key.startswith(IDENTITY)},
        )

    def __len__(self) -> int:
        """Rows of one iteration.

        Raises:
            TypeError: they are not known, in a run of epochs; ``Trainer`` and ``DataLoader`` take that for a dataset without length.
        """
        if self.steps is None:
            raise TypeError(
                "a dataset that ends after epochs has no length: only reading tells how many rows they hold"
            )
        return self.stream.schedule.first(self.steps)

    def set_epoch(self, epoch: int) -> None:
        """What trainers call before an iteration: it is to be number ``epoch``, from 0."""
        self._expected = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """See the class.

        Raises:
            UserError: a DataLoader with several workers; an iteration that could only repeat rows; a corpus without text.
            DataLoss: more documents are lost than ``max_bad_fraction``.
        """
        stream, worker = copy.copy(self.stream), get_worker_info()
        if worker is not None:
            if worker.num_workers > 1:
                raise UserError(
                    f"num_workers: {worker.num_workers}, and workers of a DataLoader would give the rows in another order, or each of them all rows; "
                    "use 0 or 1, and set data.workers in the config: the dataset then reads with so many processes of its own."
                )
            stream.workers = 0  # a worker is a daemon, which may have no children
        self._elsewhere.fill_(worker is not None)
        at = self._first_position()
        if stream.epochs is not None:
            stream.epochs *= at.iteration + 1
        yield from self._rows(stream, at)
        at.ended = True
        self._ended.fill_(True)

    def _first_position(self) -> Position:
        """Where the iteration that begins now starts; from here on it keeps that up to date."""
        if not self.stream.makers[0].shuffle:
            if self._position.ended or self._ended:
                self._begin = Position(self.stream.start_cursors())
        elif self._position.ended:
            self._begin = self._position.next()
        elif self._ended or self._expected > self._begin.iteration:
            raise UserError(
                f"iteration {max(1, self._expected)} of the dataset would repeat rows, masks included: only the process that read those before knows where "
                "they ended. Set train.steps or train.epochs to the whole length and iterate once, or read with num_workers=0."
            )
        self._position = copy.deepcopy(self._begin)
        return self._position

    def _rows(self, stream: Stream, at: Position) -> Iterator[dict[str, torch.Tensor]]:
        """The live rows from ``at`` on; it is past a row when that is given."""
        end = None if self.steps is None else len(self)
        if at.given == end:
            return
        with closing(stream.batches(at.step, at.cursors, at.ledger.lost_blocks())) as batches:
            for batch in batches:
                self._report(batch.faults, at.ledger)
                if not batch.live.any():
                    if stream.epochs is None:
                        raise UserError("the corpus holds no text: not one row comes of it.")
                    return
                for first in range(at.row, len(batch.rows), ROWS):
                    rows = self._widen(batch.rows.slice(first, first + ROWS))
                    for row, live in zip(rows, batch.live[first:].tolist(), strict=False):
                        at.row += 1
                        if live:
                            at.given += 1
                            yield row
                            if at.given == end:
                                return
                at.step, at.cursors, at.row = batch.step + 1, batch.cursors, 0

    def _widen(self, rows: Rows) -> Iterator[dict[str, torch.Tensor]]:
        maker = self.stream.makers[0]
        wide = rows.collate(self.stream.tokenizer.pad_id, multiple=maker.seq_len)
        labels = torch.full_like(wide["input_ids"], IGNORED)
        labels.view(-1)[wide["selected"]] = wide["labels"]
        lengths = np.split(rows.segment_lengths, np.cumsum(rows.segments)[:-1])
        for i in range(len(rows)):
            if maker.packing == "none":
                mask = (wide["segment_ids"][i] > 0).long()
            else:
                mask = isolating_mask(lengths[i].tolist(), maker.seq_len)
            yield {
                "input_ids": wide["input_ids"][i],
                "position_ids": wide["position_ids"][i],
                "attention_mask": mask,
                "labels": labels[i],
            }

    def _report(self, faults: Sequence[DataFault], ledger: Ledger) -> None:
        for fault in ledger.add(asdict(fault) for fault in faults):
            warnings.warn(
                f"{fault['documents']} document(s) lost in {fault['shard']} at byte {fault['offset']}: {fault['cause']}",
                stacklevel=2,
            )
        documents = [maker.manifest.num_documents for maker in self.stream.makers]
        if verdict := ledger.verdict(documents, self.max_bad_fraction):
            raise DataLoss(verdict)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is, exact to the row, in plain types that JSON holds.

        Raises:
            UserError: a DataLoader's worker reads, so that only it knows.
        """
        if self._elsewhere and get_worker_info() is None:
            raise UserError(
                "state_dict: a worker of a DataLoader reads the rows, and it alone knows how far it is. Use num_workers=0, with data.workers in the config, "
                "or torchdata's StatefulDataLoader, which asks the worker."
            )
        at = self._position
        return {
            "step": at.step,
            "row": at.row,
            "given": at.given,
            "iteration": at.iteration,
            "ended": at.ended,
            "cursors": at.cursors.tolist(),
            "lost": list(at.ledger.faults),
            "identity": self.identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on where ``state_dict`` was taken.

        Raises:
            UserError: the state is of other data, or of another configuration of it.
        """
        for key in sorted(self.identity.keys() | state["identity"].keys()):
            old, new = state["identity"].get(key), self.identity.get(key)
            if old != new:
                raise UserError(
                    f"{key}: {new!r}, while the state was taken with {old!r}; its rows go on only as they began."
                )
        numbers = {key: state[key] for key in ("step", "row", "given", "iteration", "ended")}
        self._position = self._begin = Position(
            np.asarray(state["cursors"], np.int64), ledger=Ledger(state["lost"]), **numbers
        )
        self._ended.fill_(False)
        self._elsewhere.fill_(False)
