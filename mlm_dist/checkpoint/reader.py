"""Reading checkpoints, and finding the one to read. Nothing in a checkpoint is believed before it was checked."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mlm_dist.checkpoint.format import FORMAT, VERSION, CheckpointError, commit, name, step_of, write_file
from mlm_dist.checkpoint.tensors import Part
from mlm_dist.files import sync_directory

# Of index.json: 512 ranks and 10,000 tensors make 2 MB.
MOST_INDEX_BYTES = 1 << 28
# What tells a file from itself at another time.
_State = tuple[int, int, int]


def silent(_message: str) -> None:
    """For who does not want to be warned."""


class Reader:
    """Reads one committed checkpoint; tensors are read one at a time.

    Of each file that is read, every byte is checked first, unless ``verify`` has done so and the file is as it was then.

    Raises:
        CheckpointError: it is not whole, of another format, or (from every method) what is read is damaged or gone.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            if (self.path / "index.json").stat().st_size > MOST_INDEX_BYTES:
                raise CheckpointError(f"{self.path}: index.json is longer than any can be")
            content = (self.path / "index.json").read_bytes()
            if (self.path / "COMMIT").read_text().strip() != hashlib.sha256(content).hexdigest():
                raise CheckpointError(f"{self.path}: COMMIT does not match index.json")
            index = json.loads(content)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: not a whole checkpoint ({error})") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
            told = {key: index.get(key) for key in ("format", "version")} if isinstance(index, dict) else {}
            raise CheckpointError(
                f"{self.path}: format {told.get('format')!r} version {told.get('version')!r}, this program reads {FORMAT} {VERSION}"
            )
        if wrong := _odd(index):
            raise CheckpointError(f"{self.path}: index.json has {wrong}")
        self.index: dict[str, Any] = index
        self.step: int = index["step"]
        self._checked: dict[str, _State] = {}
        self._parts: dict[str, Part] = {}

    def verify(self) -> None:
        """Check size and SHA-256 of every file."""
        for file in self.index["files"]:
            self._check(file)

    def names(self) -> list[str]:
        """Parameter names, as in the stock BertForMaskedLM; a tied decoder weight is stored once, as the embedding."""
        return sorted(key.removeprefix("param/") for key in self.index["tensors"] if key.startswith("param/"))

    def tensor(self, key: str) -> torch.Tensor:
        """One fp32 tensor on the CPU."""
        file = self.index["tensors"].get(key)
        if file is None:
            raise CheckpointError(f"{self.path}: holds no tensor {key!r}")
        try:
            self._still_whole(file)
            if file not in self._parts:
                self._parts[file] = Part(self.path / file)
            tensor = self._parts[file].tensor(key)
            self._still_whole(file)
            return tensor
        except OSError as error:
            raise CheckpointError(f"{self.path / file}: cannot be read ({error.strerror or error})") from error

    def parameter(self, name: str) -> torch.Tensor:
        """The fp32 weight ``name``."""
        return self.tensor(f"param/{name}")

    def state(self, key: str, name: str) -> torch.Tensor:
        """Optimizer state ``key`` (such as exp_avg) of parameter ``name``, fp32."""
        return self.tensor(f"state/{key}/{name}")

    @cached_property
    def optimizer(self) -> dict[str, Any]:
        """What optimizer.json holds."""
        return self._object("optimizer.json")

    @cached_property
    def trainer(self) -> dict[str, Any]:
        """What trainer.json holds."""
        return self._object("trainer.json")

    def _object(self, file: str) -> dict[str, Any]:
        if file not in self.index["files"]:
            raise CheckpointError(f"{self.path}: index.json has no {file}")
        self._check(file)
        try:
            value = json.loads((self.path / file).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path / file}: cannot be read ({error})") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path / file}: is no JSON object")
        return value

    def _still_whole(self, file: str) -> None:
        if file not in self._checked:
            self._check(file)
        elif self._checked[file] != _state(self.path / file):
            raise CheckpointError(f"{self.path / file}: was changed while the checkpoint is read")

    def _check(self, file: str) -> None:
        path, facts = self.path / file, self.index["files"][file]
        try:
            if not path.is_file() or path.stat().st_size != facts["size"]:
                raise CheckpointError(f"{path}: missing or of a wrong size")
            before = _state(path)
            if sha256(path) != facts["sha256"]:
                raise CheckpointError(f"{path}: its SHA-256 differs from the index")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        self._checked[file] = before


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> _State:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _odd(index: dict[str, Any]) -> str | None:
    """What is wrong with an index, whoever wrote it."""
    step, files, tensors = index.get("step"), index.get("files"), index.get("tensors")
    if type(step) is not int or step < 0:
        return f"step {step!r}"
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        return "no files or no tensors"
    for file, facts in files.items():
        # Names of this program's files; none leads out of the directory.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", file):
            return f"the file name {file!r}"
        match facts:
            case {"size": int(), "sha256": str()}:
                pass
            case _:
                return f"no size or no checksum of {file}"
    for key, file in tensors.items():
        if not isinstance(file, str) or file not in files:
            return f"tensor {key!r} in {file!r}, which is none of its files"
    return None


def directories(run_dir: str | Path) -> list[Path]:
    """Every checkpoint directory of a run, oldest first; names that ``name`` does not give (a copy made by hand, say) are none."""
    found = Path(run_dir).glob("checkpoints/step_*")
    return sorted((p for p in found if re.fullmatch(r"step_\d{8,}", p.name)), key=step_of)


def committed(run_dir: str | Path) -> list[Path]:
    """Checkpoint directories of a run that bear a COMMIT, oldest first."""
    return [p for p in directories(run_dir) if (p / "COMMIT").exists()]


def readers(run_dir: str | Path, warn: Callable[[str], None] = silent) -> list[Reader]:
    """The committed checkpoints of a run, oldest first, whose index and trainer.json can be read; nothing else of them is."""
    found = []
    for path in committed(run_dir):
        try:
            reader = Reader(path)
            _ = reader.trainer
            found.append(reader)
        except CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
    return found


def newest(
    run_dir: str | Path,
    warn: Callable[[str], None] = silent,
    usable: Callable[[Reader], str | None] = lambda _reader: None,
) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; others are passed over and ``warn`` is told why.

    Args:
        usable: says why a checkpoint, not read yet but for its index, is to be passed over all the same; None where it is not.
    """
    for path in reversed(directories(run_dir)):
        try:
            reader = Reader(path)
            if reader.step != step_of(path):
                raise CheckpointError(f"{path}: is the checkpoint of step {reader.step}")
            if why := usable(reader):
                raise CheckpointError(f"{path}: {why}")
            reader.verify()
            return path
        except CheckpointError as error:
            warn(f"checkpoint passed over: {error}")
    return None


def locate(path: str | Path, warn: Callable[[str], None] = silent) -> Path:
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
    files["trainer.json"] = write_file(temporary / "trainer.json", [json.dumps(trainer).encode()])
    commit(temporary, {**reader.index, "files": files})
    Reader(temporary).verify()
    temporary.rename(final)
    sync_directory(root)
    return final
