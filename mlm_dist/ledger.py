"""The ledger: the documents and steps that a run goes on without. What it holds is part of what the training data is a function of."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlm_dist.files import read_json_lines


class DataLoss(Exception):
    """More documents were lost to faults than ``data.max_bad_fraction`` allows; lists them."""


# The first and the last of consecutive batches, numbered from 0.
Skip = tuple[int, int]


def leaves_out(skips: Iterable[Skip], batch: int) -> bool:
    """Whether ``batch``, numbered from 0, is not trained on."""
    return any(first <= batch <= last for first, last in skips)


def _key(fault: dict[str, Any]) -> tuple[Any, ...]:
    return fault["source"], fault["epoch"], fault["block"], fault["whole"], fault["cause"]


class Ledger:
    """Rank 0's list of what is left out.

    Attributes:
        faults: ``DataFault`` records, as dicts, in the order they were met.
        skips: (first, last) batches, numbered from 0, of each roll-back: read, so that what follows is the same, and not trained on.
        rollbacks: how many of them were this run's own, and not of the one that it branched from.
    """

    def __init__(self, faults: Iterable[dict[str, Any]] = (), skips: Iterable[Sequence[int]] = ()):
        self.faults: list[dict[str, Any]] = []
        self.skips: list[Skip] = []
        self.rollbacks = 0
        self._known: Counter[tuple[Any, ...]] = Counter()
        self.add(faults)
        self.add_skips(skips)

    @classmethod
    def read(cls, events: Path) -> "Ledger":
        """The ledger that a run's ``events.jsonl`` holds: every loss was written there before the step that went on without it."""
        keys = ("source", "epoch", "block", "shard", "offset", "whole", "documents", "cause")
        records = list(read_json_lines(events))
        ledger = cls({k: r[k] for k in keys} for r in records if r.get("kind") == "data_loss")
        for record in records:
            if record.get("kind") == "rollback":
                ledger.rolled_back(record["skip"])
        return ledger

    def rolled_back(self, skip: Sequence[int]) -> None:
        """Count a roll-back of this run."""
        self.rollbacks += 1
        self.add_skips([skip])

    def add_skips(self, skips: Iterable[Sequence[int]]) -> None:
        """Add what is not yet in it, each (first, last)."""
        for first, last in skips:
            if (first, last) not in self.skips:
                self.skips.append((first, last))

    def made_before(self, step: int, skips: Iterable[Sequence[int]]) -> bool:
        """Whether a checkpoint after ``step`` steps, whose own ledger has ``skips``, is of before a roll-back and trained on what that leaves out."""
        known = {(first, last) for first, last in skips}
        return any(first < step and (first, last) not in known for first, last in self.skips)

    def add(self, faults: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add what is not yet in it; returns that. Two equal faults of one block in one report are two documents; a report met again on resume is none."""
        report = list(faults)
        new = []
        met: Counter[tuple[Any, ...]] = Counter()
        for fault in report:
            key = _key(fault)
            met[key] += 1
            if met[key] > self._known[key]:
                self._known[key] = met[key]
                new.append(fault)
        self.faults += new
        return new

    def lost_blocks(self) -> frozenset[tuple[int, int, int]]:
        """(source, epoch, block) of blocks lost whole: a resumed run does not read them, whatever they hold now."""
        return frozenset((f["source"], f["epoch"], f["block"]) for f in self.faults if f["whole"])

    def verdict(self, documents: Sequence[int], max_bad_fraction: float) -> str:
        """What is wrong when an epoch of a corpus has lost more than ``max_bad_fraction`` of its documents; empty when all is well.

        Args:
            documents: of each corpus.
        """
        lost: Counter[tuple[int, int]] = Counter()
        for fault in self.faults:
            lost[fault["source"], fault["epoch"]] += fault["documents"]
        for (source, epoch), count in lost.items():
            if count > max_bad_fraction * documents[source]:
                listing = [
                    f"  {f['shard']} at byte {f['offset']}: {f['documents']} document(s), {f['cause']}"
                    for f in self.faults
                    if (f["source"], f["epoch"]) == (source, epoch)
                ]
                shown = listing[:50] + (
                    [f"  and {len(listing) - 50} more in events.jsonl"] if len(listing) > 50 else []
                )
                corpus = f" of data.sources[{source}]" if len(documents) > 1 else ""
                return (
                    f"{count} of {documents[source]} documents of epoch {epoch}{corpus} are lost, "
                    f"more than data.max_bad_fraction {max_bad_fraction} allows:\n" + "\n".join(shown)
                )
        return ""
