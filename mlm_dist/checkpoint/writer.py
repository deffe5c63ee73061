"""Writing checkpoints beside the training, and what becomes of one that cannot be written."""

import contextlib
import errno
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from mlm_dist.checkpoint.format import FORMAT, VERSION, CheckpointConfig, CheckpointError, commit, name, write_file
from mlm_dist.checkpoint.reader import newest
from mlm_dist.checkpoint.retention import Retention
from mlm_dist.checkpoint.tensors import write_part
from mlm_dist.files import sync_directory

# How long rank 0 waits for the other ranks' parts before it gives the checkpoint up.
PARTS_TIMEOUT_S = 1800.0
_REMEDIES = {
    errno.ENOSPC: "Free space there, or keep fewer checkpoints (checkpoint.keep).",
    errno.EDQUOT: "The quota there is used up: free space, have it raised, or keep fewer checkpoints (checkpoint.keep).",
    errno.EFBIG: "Files of this size are not allowed there (ulimit -f).",
    errno.EROFS: "The file system is mounted read-only, as many are after an error of the disk: look at it.",
    errno.EACCES: "The directory may not be written any more: give the permission back.",
}
_REMEDIES[errno.EPERM] = _REMEDIES[errno.EACCES]


class Control(Protocol):
    """The part of ``distributed.ControlGroup`` that is used here."""

    def sum(self, values: list[int]) -> list[int]: ...

    def gather(self, obj: Any) -> list[Any] | None: ...

    def broadcast(self, obj: Any) -> Any: ...


@dataclass(frozen=True)
class Failure:
    """A checkpoint that could not be written.

    Attributes:
        step: that it was of.
        ranks: that could not write.
        reason: of the first of them.
        in_a_row: how many failed one after the other, with this one.
        remedy: what a user can do about it.
        end: where no other is to be tried, what the run ends with; names the newest checkpoint that is whole.
    """

    step: int
    ranks: list[int]
    reason: str
    in_a_row: int
    remedy: str
    end: str | None

    def __str__(self) -> str:
        return f"the checkpoint of step {self.step} could not be written ({self.reason})"


class _GivenUp(Exception):
    """Another rank cannot write its part."""


class Writer:
    """Writes checkpoints of one attempt. ``save`` is called by every rank at the same step boundary."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, rank: int, world_size: int, attempt: int):
        self.root, self.rank, self.world_size, self.attempt = run_dir / "checkpoints", rank, world_size, attempt
        self._most_failures, self._retention = config.max_failures, Retention(self.root, config)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._give_up = threading.Event()
        self._begun = self._failed_in_a_row = 0
        self._step: int | None = None
        with contextlib.suppress(OSError):  # what is wrong is told by the first save
            self.root.mkdir(parents=True, exist_ok=True)
        # Not later: nothing of a run directory that was removed is to come back.

    def clear_leftovers(self) -> None:
        """Remove what attempts before left half-written. Rank 0 calls it before the others can write."""
        for path in self.root.glob(".tmp_*"):
            shutil.rmtree(path, ignore_errors=True)

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        keys: dict[str, int],
        optimizer: dict[str, Any],
        trainer: dict[str, Any],
    ) -> None:
        """Start writing the checkpoint after ``step`` steps in a thread.

        Args:
            tensors: this rank's fp32 tensors, contiguous and on the CPU, by key; must not be changed before ``wait`` or ``settle`` returned.
            keys: every tensor's rank, as ``assign`` gave it.
            optimizer, trainer: JSON-able; rank 0's are written.

        Raises:
            CheckpointError: the checkpoint before could not be written.
        """
        self.wait()
        self._step, self._begun = step, self._begun + 1
        self._give_up.clear()
        # A name of its own for each try: what a failed one may have left must not be taken for a part of this one.
        self._temporary = self.root / f".tmp_{name(step)}_{self.attempt}_{self._begun}"
        self._thread = threading.Thread(
            target=self._run, args=(step, tensors, keys, optimizer, trainer), name=f"checkpoint-{step}"
        )
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank could not write what it has to. Does not wait."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for this rank's write in progress. Raises CheckpointError when it failed."""
        self._join()
        self._step = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"the checkpoint could not be written: {error}") from error

    def settle(self, control: Control, *, last: bool = False) -> Failure | None:
        """Wait for the checkpoint in progress on all ranks: the same answer on each, None where it is written or there is none. Collective.

        Of one that failed nothing is left, and the ones before are as they were. After the ``last`` no other is to be tried.
        """
        if self._step is None:  # on all ranks alike
            return None
        if self.rank:
            self._join()
        if control.sum([int(self.failed)])[0]:
            self._give_up.set()  # else rank 0's thread would wait for a part that does not come
        self._join()
        errors = control.gather(_told(self._error))
        failure = None if errors is None else self._judge(errors, last)
        failure = control.broadcast(failure)
        self._failed_in_a_row = failure.in_a_row if failure else 0
        self._step = self._error = None
        return failure

    def _judge(self, errors: list[tuple[int, str] | None], last: bool) -> Failure | None:
        """Rank 0 has heard of all ranks, none of which is writing any more."""
        ranks = [rank for rank, error in enumerate(errors) if error is not None]
        if not ranks:
            return None
        assert self._step is not None
        shutil.rmtree(self._temporary, ignore_errors=True)
        number, why = errors[ranks[0]] or (0, "")
        in_a_row = self._failed_in_a_row + 1
        failure = Failure(self._step, ranks, f"rank {ranks[0]}: {why}", in_a_row, _REMEDIES.get(number, ""), None)
        if not last and in_a_row < self._most_failures:
            return failure
        whole = newest(self.root.parent)
        words = [
            f"{failure}, " + ("and it was the last." if last else f"as {in_a_row} in a row (checkpoint.max_failures)."),
            failure.remedy,
            f"The newest whole checkpoint is {whole}." if whole else "There is no whole checkpoint.",
        ]
        return replace(failure, end=" ".join(filter(None, words)))

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, *args: Any) -> None:
        try:
            self._temporary.mkdir(exist_ok=True)
            self._write(self._temporary, *args)
        except BaseException as error:  # a thread's error is told by the next settle() or wait()
            self._error = error

    def _part_name(self, rank: int) -> str:
        return f"part-{rank:05d}-of-{self.world_size:05d}.safetensors"

    def _write(
        self,
        temporary: Path,
        step: int,
        tensors: dict[str, torch.Tensor],
        keys: dict[str, int],
        optimizer: dict[str, Any],
        trainer: dict[str, Any],
    ) -> None:
        part = self._part_name(self.rank)
        facts = write_part(temporary / part, tensors)
        staged = temporary / f"{part}.json.tmp"
        write_file(staged, [json.dumps(facts).encode()])
        staged.rename(temporary / f"{part}.json")
        if self.rank == 0:
            files = dict(self._parts(temporary))
            for file, content in (
                ("optimizer.json", json.dumps(optimizer, indent=1)),
                ("trainer.json", json.dumps(trainer)),
            ):
                files[file] = write_file(temporary / file, [content.encode()])
            tensor_files = {key: self._part_name(rank) for key, rank in keys.items()}
            commit(
                temporary, {"format": FORMAT, "version": VERSION, "step": step, "files": files, "tensors": tensor_files}
            )
            final = self.root / name(step)
            if final.exists():  # one that was passed over
                final.rename(self.root / f".tmp_old_{final.name}_{self.attempt}_{self._begun}")
            temporary.rename(final)
            with contextlib.suppress(OSError):  # it is there; what is not removed now is at the next checkpoint
                sync_directory(self.root)
                self._retention.apply(step)

    def _parts(self, temporary: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Wait for every rank's part; (file name, size and checksum) of each."""
        deadline = time.monotonic() + PARTS_TIMEOUT_S
        for rank in range(self.world_size):
            facts = temporary / f"{self._part_name(rank)}.json"
            while not facts.exists():
                if time.monotonic() > deadline:
                    raise CheckpointError(f"rank {rank} has not written its part within {PARTS_TIMEOUT_S:.0f} s")
                if self._give_up.wait(0.02):
                    raise _GivenUp
            yield self._part_name(rank), json.loads(facts.read_text())
            facts.unlink()


def _told(error: BaseException | None) -> tuple[int, str] | None:
    """An error of this rank's own, as other ranks can read it: (errno or 0, what it says)."""
    if error is None or isinstance(error, _GivenUp):
        return None
    return (error.errno or 0 if isinstance(error, OSError) else 0), str(error) or type(error).__name__
