"""What the output of `mlm-dist prepare` depends on besides the text."""

from dataclasses import dataclass
from typing import Any, Literal

from mlm_dist.data.sources import SplitBy
from mlm_dist.errors import UserError

Side = Literal["train", "val"]
SIDES: tuple[Side, ...] = ("train", "val")

_NEAR_ONLY = ("dedup_threshold", "dedup_ngram", "dedup_permutations")


@dataclass(frozen=True)
class PrepareOptions:
    """The command's help says what each means.

    Raises:
        UserError: A value out of its range.
    """

    split_by: SplitBy = "auto"
    field: str = "text"
    documents_per_member: int = 64
    shard_size: int = 256 << 20
    block_size: int | None = None
    val_fraction: float = 0.05
    seed: int = 0
    compress: Literal["none", "zst"] = "none"
    tokenizer: str | None = None
    dedup: Literal["none", "exact", "near"] = "none"
    dedup_threshold: float = 0.7
    dedup_ngram: int = 5
    dedup_permutations: int = 128

    def __post_init__(self) -> None:
        for name in ("documents_per_member", "dedup_ngram"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"--val-fraction is {self.val_fraction}; it must be at least 0 (no held-out part) and below 1"
            )
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed is {self.seed}; it must be from 0 to 2^64 - 1")
        if not 0 < self.dedup_threshold < 1:
            raise UserError(
                f"--dedup-threshold is {self.dedup_threshold}; it must be above 0 and below 1, a Jaccard similarity"
            )
        if not 8 <= self.dedup_permutations <= 1024:
            raise UserError(f"--dedup-permutations is {self.dedup_permutations}; it must be from 8 to 1024")

    def recorded(self) -> dict[str, Any]:
        """What a manifest keeps of them: those of features that are not in use are left out."""
        options = dict(vars(self))
        for name in ("tokenizer", "dedup"):
            if options[name] in (None, "none"):
                del options[name]
        if self.dedup != "near":
            for name in _NEAR_ONLY:
                del options[name]
        return options
