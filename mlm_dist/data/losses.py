"""What of a data set could not be read when its manifest was made."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mlm_dist.errors import UserError

MAX_LISTED = 1000


@dataclass(frozen=True)
class Losses:
    """The documents that a manifest does not count, since they were unreadable from the start.

    Attributes:
        documents: How many single documents, exact.
        blocks: How many blocks they lie in, exact.
        listed: The first 1000 of these blocks in the order of the shards: {shard, offset, documents, cause}.
        damaged: Parts of shards that `index --skip-damaged` left out: {shard, offset, bytes, cause}. How many documents
            they held is not known.
    """

    documents: int = 0
    blocks: int = 0
    listed: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, blocks: Iterable[dict[str, Any]], damaged: Iterable[dict[str, Any]] = ()) -> "Losses":
        """The losses that all these blocks have."""
        every = list(blocks)
        return cls(sum(block["documents"] for block in every), len(every), every[:MAX_LISTED], list(damaged))

    def to_json(self) -> dict[str, Any]:
        """The form in a manifest's JSON."""
        return {"documents": self.documents, "blocks": self.blocks, "listed": self.listed, "damaged": self.damaged}

    @classmethod
    def from_json(cls, content: Any) -> "Losses":
        """Check and take the form in a manifest's JSON.

        Raises:
            UserError: It is another.
        """
        if not isinstance(content, dict):
            raise UserError(f"losses is {content!r:.80}; it must be a JSON object")
        documents, blocks = (_count(content, "losses", key) for key in ("documents", "blocks"))
        listed = _entries(content, "listed", "documents")
        if min(blocks, MAX_LISTED) != len(listed) or sum(entry["documents"] for entry in listed) > documents:
            raise UserError(
                f"losses: {len(listed)} blocks are listed, which do not fit {documents} documents in {blocks} blocks"
            )
        return cls(documents, blocks, listed, _entries(content, "damaged", "bytes"))

    def describe(self, most: int = 20) -> list[str]:
        """Lines for people; none when nothing was lost.

        Args:
            most: Blocks, and damaged parts, that are named.
        """
        lines = []
        if self.documents:
            lines.append(f"{self.documents} documents in {self.blocks} blocks cannot be read and are left out:")
            lines += [
                f"  {e['shard']} at byte {e['offset']}: {e['documents']} document(s), {e['cause']}"
                for e in self.listed[:most]
            ]
            lines += [f"  and {self.blocks - most} more blocks"] if self.blocks > most else []
        if self.damaged:
            total = sum(entry["bytes"] for entry in self.damaged)
            lines.append(
                f"{total} bytes of {len({e['shard'] for e in self.damaged})} damaged shards are left out; how many documents they held is not known:"
            )
            lines += [
                f"  {e['shard']} from byte {e['offset']}: {e['bytes']} bytes, {e['cause']}" for e in self.damaged[:most]
            ]
            lines += [f"  and {len(self.damaged) - most} more parts"] if len(self.damaged) > most else []
        return lines


def _entries(content: dict[str, Any], name: str, amount: str) -> list[dict[str, Any]]:
    entries = content.get(name)
    if not isinstance(entries, list):
        raise UserError(f"losses.{name} is {entries!r:.80}; it must be a JSON array")
    for i, entry in enumerate(entries):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("shard"), str)
            or not isinstance(entry.get("cause"), str)
        ):
            raise UserError(f"losses.{name}[{i}] is {entry!r:.80}; it must hold the shard and the cause")
        for key in ("offset", amount):
            _count(entry, f"losses.{name}[{i}]", key)
    return [{key: entry[key] for key in ("shard", "offset", amount, "cause")} for entry in entries]


def _count(content: dict[str, Any], where: str, name: str) -> int:
    value = content.get(name)
    if type(value) is not int or value < 0:
        raise UserError(f"{where}.{name} is {value!r:.80}; it must be a whole number")
    return value
