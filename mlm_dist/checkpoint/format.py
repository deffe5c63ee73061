"""What the files of a checkpoint are, when they are written, and which rank writes what."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_dist.errors import UserError
from mlm_dist.files import sync_directory

FORMAT, VERSION = "mlm_dist.checkpoint", 1
# Ranks among which tensors are dealt, at most: every rank opens every part that holds one to go on from it.
MOST_OWNERS = 64


@dataclass
class CheckpointConfig:
    """When to write checkpoints and which to keep.

    Attributes:
        every: optimizer steps between checkpoints; one is also written at the end and when the run is stopped.
        keep: how many of the newest to keep.
        keep_every: also keep those whose step is a multiple of this.
        keep_best: how many to keep of those with the lowest validation loss. What counts is the loss measured at the checkpoint's step or, where
            eval.every and checkpoint.every do not coincide, last since the checkpoint before.
        max_failures: after so many in a row that could not be written the run ends; until then it goes on and tries again at the next.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 1
    max_failures: int = 3

    def check(self) -> None:
        """Raises UserError for values that no run can have."""
        for key in ("every", "keep", "keep_every", "max_failures"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{key}: {value} must be at least 1.")
        if self.keep_best < 0:
            raise UserError(
                f"checkpoint.keep_best: {self.keep_best} must be at least 0, which keeps none for its validation loss."
            )


class CheckpointError(Exception):
    """A checkpoint is damaged, incomplete or could not be written; says which and why."""


def name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a directory name that ``name`` gave."""
    return int(path.name.removeprefix("step_"))


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file to the disk; returns its size and SHA-256, as the index has them."""
    size, digest = 0, hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            digest.update(piece)
            left = memoryview(piece)
            while left:
                left = left[file.write(left) :]
            size += len(piece)
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def commit(directory: Path, index: dict[str, Any]) -> None:
    """The last two files, which make a checkpoint whole."""
    content = json.dumps(index, indent=1).encode()
    write_file(directory / "index.json", [content])
    write_file(directory / "COMMIT", [hashlib.sha256(content).hexdigest().encode()])
    sync_directory(directory)


def assign(numels: dict[str, int], world_size: int) -> dict[str, int]:
    """Which rank writes which tensor: largest first to the rank with least, of the first MOST_OWNERS. A pure function, so all ranks agree."""
    loads = [0] * min(world_size, MOST_OWNERS)
    owner = {}
    for key in sorted(numels, key=lambda k: (-numels[k], k)):
        rank = loads.index(min(loads))
        owner[key], loads[rank] = rank, loads[rank] + numels[key]
    return owner
