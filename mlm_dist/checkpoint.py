"""Checkpoints that know neither the ZeRO stage nor the number of ranks.

A checkpoint is a directory of safetensors and JSON files; nothing in it is executed at load.

    step_00000100/
        part-00000-of-00002.safetensors ...   tensors ``param/NAME`` and ``state/KEY/NAME``, fp32, each in one part
        optimizer.json                        class, scalars, groups by parameter name
        trainer.json                          step, data cursors, ledger, counters, W&B id
        index.json                            size and SHA-256 of every file, and which part holds which tensor
        COMMIT                                SHA-256 of index.json, written last

It is written under a temporary name and renamed when it is whole, so a crash leaves the one before. Each rank writes its part in a
thread; the training step waits only for the copy to host memory.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mlm_dist.errors import UserError
from mlm_dist.files import sync_directory

FORMAT, VERSION = "mlm_dist.checkpoint", 1
# How long rank 0 waits for the other ranks' parts before it gives the checkpoint up.
PARTS_TIMEOUT_S = 1800.0
# Ranks among which tensors are dealt, at most: every rank opens every part that holds one to go on from it.
MOST_OWNERS = 64


@dataclass
class CheckpointConfig:
    """When to write checkpoints and which to keep.

    Attributes:
        every: optimizer steps between checkpoints; one is also written at the end and when the run is stopped.
        keep: how many of the newest to keep.
        keep_every: also keep those whose step is a multiple of this.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int | None = None

    def check(self) -> None:
        """Raises UserError for values that no run can have."""
        for key in ("every", "keep", "keep_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{key}: {value} must be at least 1.")


class CheckpointError(Exception):
    """A checkpoint is damaged, incomplete or could not be written; says which and why."""


def name(step: int) -> str:
    """Directory name of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class Reader:
    """Reads one committed checkpoint; tensors are read one at a time."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            index = (self.path / "index.json").read_bytes()
            if (self.path / "COMMIT").read_text().strip() != hashlib.sha256(index).hexdigest():
                raise CheckpointError(f"{self.path}: COMMIT does not match index.json")
            self.index: dict[str, Any] = json.loads(index)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: not a whole checkpoint ({error})") from error
        if self.index.get("format") != FORMAT or self.index.get("version") != VERSION:
            raise CheckpointError(
                f"{self.path}: format {self.index.get('format')!r} version {self.index.get('version')!r}, this program reads {FORMAT} {VERSION}"
            )
        self.step: int = self.index["step"]

    def verify(self) -> None:
        """Check size and SHA-256 of every file. Raises CheckpointError."""
        for file, facts in self.index["files"].items():
            path = self.path / file
            try:
                if not path.is_file() or path.stat().st_size != facts["size"]:
                    raise CheckpointError(f"{path}: missing or of a wrong size")
                if _sha256(path) != facts["sha256"]:
                    raise CheckpointError(f"{path}: its SHA-256 differs from the index")
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error

    def names(self) -> list[str]:
        """Parameter names, as in the stock BertForMaskedLM; a tied decoder weight is stored once, as the embedding."""
        return sorted(key.removeprefix("param/") for key in self.index["tensors"] if key.startswith("param/"))

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor on the CPU. Raises CheckpointError for a key that the checkpoint has not."""
        file = self.index["tensors"].get(key)
        if file is None:
            raise CheckpointError(f"{self.path}: holds no tensor {key!r}")
        return self._part(file).get_tensor(key)

    def parameter(self, name: str) -> torch.Tensor:
        """The fp32 weight ``name``."""
        return self.tensor(f"param/{name}")

    def state(self, key: str, name: str) -> torch.Tensor:
        """Optimizer state ``key`` (such as exp_avg) of parameter ``name``, fp32."""
        return self.tensor(f"state/{key}/{name}")

    @cached_property
    def optimizer(self) -> dict[str, Any]:
        """What optimizer.json holds."""
        return json.loads((self.path / "optimizer.json").read_text())

    @cached_property
    def trainer(self) -> dict[str, Any]:
        """What trainer.json holds."""
        return json.loads((self.path / "trainer.json").read_text())

    def _part(self, file: str) -> Any:
        if not hasattr(self, "_open"):
            self._open: dict[str, Any] = {}
        if file not in self._open:
            self._open[file] = safe_open(str(self.path / file), framework="pt", device="cpu")
        return self._open[file]


def _directories(run_dir: str | Path) -> list[Path]:
    """Every checkpoint directory of a run, oldest first; names that ``name`` does not give (a copy made by hand, say) are none."""
    found = Path(run_dir).glob("checkpoints/step_*")
    return sorted((p for p in found if re.fullmatch(r"step_\d{8,}", p.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def committed(run_dir: str | Path) -> list[Path]:
    """Checkpoint directories of a run that bear a COMMIT, oldest first."""
    return [p for p in _directories(run_dir) if (p / "COMMIT").exists()]


def newest(run_dir: str | Path, warn: Callable[[str], None] = lambda _message: None) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; damaged ones are passed over and ``warn`` is told why."""
    for path in reversed(_directories(run_dir)):
        try:
            Reader(path).verify()
            return path
        except CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
    return None


def locate(path: str | Path, warn: Callable[[str], None] = lambda _message: None) -> Path:
    """The checkpoint that a run directory (its newest whole one) or a checkpoint directory stands for, absolute, every byte of it checked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a run directory or one of its checkpoints")
    if path.parent.name == "checkpoints" or (path / "index.json").exists():
        Reader(path).verify()
        return path.resolve()
    found = newest(path, warn)
    if found is None:
        raise CheckpointError(f"{path}: holds no whole checkpoint; give a run directory in which checkpoints/ has one")
    return found.resolve()


def adopt(reader: Reader, run_dir: Path, trainer: dict[str, Any]) -> Path:
    """Copy a checkpoint into another run directory, with another trainer.json; returns the copy, which is whole.

    Raises:
        CheckpointError: a file was not whole when it was copied.
        OSError: it was gone, or the copy cannot be written.
    """
    root = run_dir / "checkpoints"
    temporary, final = root / f".tmp_{name(reader.step)}_adopted", root / name(reader.step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = dict(reader.index["files"])
    for file in files.keys() - {"trainer.json"}:
        shutil.copyfile(reader.path / file, temporary / file)
        with (temporary / file).open("rb") as copy:
            os.fsync(copy.fileno())
    files["trainer.json"] = _write(temporary / "trainer.json", json.dumps(trainer).encode())
    _commit(temporary, {**reader.index, "files": files})
    Reader(temporary).verify()
    temporary.rename(final)
    sync_directory(root)
    return final


def _commit(directory: Path, index: dict[str, Any]) -> None:
    """The last two files, which make a checkpoint whole."""
    content = json.dumps(index, indent=1).encode()
    _write(directory / "index.json", content)
    _write(directory / "COMMIT", hashlib.sha256(content).hexdigest().encode())
    sync_directory(directory)


def assign(numels: dict[str, int], world_size: int) -> dict[str, int]:
    """Which rank writes which tensor: largest first to the rank with least, of the first MOST_OWNERS. A pure function, so all ranks agree."""
    loads = [0] * min(world_size, MOST_OWNERS)
    owner = {}
    for key in sorted(numels, key=lambda k: (-numels[k], k)):
        rank = loads.index(min(loads))
        owner[key], loads[rank] = rank, loads[rank] + numels[key]
    return owner


class Writer:
    """Writes checkpoints of one attempt. ``save`` is called by every rank at the same step boundary."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, rank: int, world_size: int, attempt: int):
        self.root, self.config, self.rank, self.world_size, self.attempt = (
            run_dir / "checkpoints",
            config,
            rank,
            world_size,
            attempt,
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
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
        """Start writing the checkpoint after ``step`` steps; returns when the data is safe from being changed by training.

        Args:
            tensors: this rank's tensors on the CPU, by key; must not be changed afterwards.
            keys: every tensor's rank, as ``assign`` gave it.
            optimizer, trainer: JSON-able; rank 0's are written.

        Raises:
            CheckpointError: the checkpoint before could not be written.
        """
        self.wait()
        self._thread = threading.Thread(
            target=self._run, args=(step, tensors, keys, optimizer, trainer), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write in progress. Raises CheckpointError when it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"the checkpoint could not be written: {error}") from error

    def _run(self, step: int, *args: Any) -> None:
        temporary = self.root / f".tmp_{name(step)}_{self.attempt}"
        try:
            temporary.mkdir(exist_ok=True)
            self._write(step, temporary, *args)
        except BaseException as error:  # a thread's error is raised by the next wait()
            self._error = error
            with contextlib.suppress(OSError):
                (temporary / f"error-{self.rank}").write_text(str(error))

    def _part_name(self, rank: int) -> str:
        return f"part-{rank:05d}-of-{self.world_size:05d}.safetensors"

    def _write(
        self,
        step: int,
        temporary: Path,
        tensors: dict[str, torch.Tensor],
        keys: dict[str, int],
        optimizer: dict,
        trainer: dict,
    ) -> None:
        part = temporary / self._part_name(self.rank)
        save_file(tensors, str(part))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        facts = {"size": part.stat().st_size, "sha256": _sha256(part)}
        staged = temporary / f"{part.name}.json.tmp"
        _write(staged, json.dumps(facts).encode())
        staged.rename(temporary / f"{part.name}.json")
        if self.rank == 0:
            files = dict(self._parts(temporary))
            files["optimizer.json"] = _write(temporary / "optimizer.json", json.dumps(optimizer, indent=1).encode())
            files["trainer.json"] = _write(temporary / "trainer.json", json.dumps(trainer).encode())
            tensor_files = {key: self._part_name(rank) for key, rank in keys.items()}
            _commit(
                temporary, {"format": FORMAT, "version": VERSION, "step": step, "files": files, "tensors": tensor_files}
            )
            final = self.root / name(step)
            if final.exists():  # only one that was passed over as damaged
                shutil.rmtree(final)
            temporary.rename(final)
            sync_directory(self.root)
            self._retain(step)

    def _parts(self, temporary: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Wait for every rank's part; (file name, size and checksum) of each."""
        deadline = time.monotonic() + PARTS_TIMEOUT_S
        for rank in range(self.world_size):
            facts = temporary / f"{self._part_name(rank)}.json"
            while not facts.exists():
                error = temporary / f"error-{rank}"
                if error.exists():
                    raise CheckpointError(f"rank {rank}: {error.read_text()}")
                if time.monotonic() > deadline:
                    raise CheckpointError(f"rank {rank} has not written its part within {PARTS_TIMEOUT_S:.0f} s")
                time.sleep(0.02)
            yield self._part_name(rank), json.loads(facts.read_text())
            facts.unlink()

    def _retain(self, newest_step: int) -> None:
        # A later one was passed over as damaged, or this one would not be written: it must not count as kept.
        paths = [p for p in committed(self.root.parent) if _step(p) <= newest_step]
        for path in paths[: -self.config.keep]:
            if self.config.keep_every is None or _step(path) % self.config.keep_every:
                # Renamed it no longer counts, and is cleared by the next attempt however far the removal comes.
                doomed = path.rename(self.root / f".tmp_old_{path.name}")
                shutil.rmtree(doomed, ignore_errors=True)
