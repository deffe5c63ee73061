"""Checkpoints: what is written is read back to the bit, and whatever is damaged or half-written never counts."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mlm_dist import checkpoint
from mlm_dist.checkpoint import CheckpointConfig, CheckpointError, Reader, Writer, assign, committed, format, newest
from mlm_dist.checkpoint import reader as checkpoint_reader
from mlm_dist.checkpoint import tensors as checkpoint_tensors
from mlm_dist.checkpoint import writer as checkpoint_writer
from mlm_dist.errors import UserError

NAMES = ("bert.embeddings.word.weight", "bert.layer.0.bias", "cls.bias", "scalar")
OPTIMIZER = {"class": "AdamW", "step": 3, "eps": 1e-08, "groups": [{"names": list(NAMES), "weight_decay": 0.1}]}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Values of every awkward kind: subnormal, infinite, not a number, minus zero, no dimension."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in zip(NAMES, [(50, 8), (8,), (3, 1, 2), ()], strict=True):
        for key in (f"param/{name}", f"state/exp_avg/{name}", f"state/exp_avg_sq/{name}"):
            out[key] = torch.randn(shape, generator=g)
    out["param/cls.bias"].view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42, 3e38])
    return out


def write(
    run: Path,
    step: int,
    world: int = 1,
    attempt: int = 1,
    seed: int | None = None,
    config: CheckpointConfig | None = None,
    loss: float | None = None,
) -> list[Writer]:
    """A checkpoint by ``world`` ranks, each with a Writer as its process would have; returns them when it is written."""
    whole = tensors(step if seed is None else seed)
    owners = assign({k: t.numel() for k, t in whole.items()}, world)
    writers = [Writer(run, config or CheckpointConfig(keep=9), rank, world, attempt) for rank in range(world)]
    for rank, writer in enumerate(writers):
        mine = {k: t for k, t in whole.items() if owners[k] == rank}
        trainer: dict[str, Any] = {"step": step, "x": 0.1 + 0.2}
        if loss is not None:
            trainer["validation"] = {"step": step, "loss": loss}
        writer.save(step, mine, owners, OPTIMIZER, trainer if rank == 0 else {})
    for writer in writers:
        writer.wait()
    return writers


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def place(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint.name(step)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_round_trip_to_the_bit(tmp_path: Path, world: int) -> None:
    write(tmp_path, 3, world)
    path = newest(tmp_path)
    assert path == place(tmp_path, 3)
    reader = Reader(path)
    reader.verify()
    expected = tensors(3)
    assert reader.step == 3
    assert reader.names() == sorted(NAMES)
    for name in NAMES:
        assert same_bits(reader.parameter(name), expected[f"param/{name}"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(reader.state(key, name), expected[f"state/{key}/{name}"])
    assert reader.optimizer == OPTIMIZER
    assert reader.trainer == {"step": 3, "x": 0.1 + 0.2}
    assert len(list(path.glob("part-*.safetensors"))) == world
    # Nothing is left lying about, and every file but the marker is in the index.
    assert {p.name for p in path.iterdir()} == {*reader.index["files"], "index.json", "COMMIT"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="holds no tensor 'param/other'"):
        Reader(place(tmp_path, 1)).parameter("other")


# ---- damage ----


def part_of(path: Path) -> Path:
    return sorted(path.glob("part-*.safetensors"))[-1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edit_index(path: Path) -> None:
    index = json.loads((path / "index.json").read_text())
    index["step"] = 77
    (path / "index.json").write_text(json.dumps(index))


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped byte": (lambda p: flip(part_of(p)), "part-00001-of-00002.safetensors: its SHA-256 differs"),
    "a truncated part": (lambda p: truncate(part_of(p)), "part-00001-of-00002.safetensors: missing or of a wrong size"),
    "a missing part": (lambda p: part_of(p).unlink(), "part-00001-of-00002.safetensors: missing"),
    "a directory for a part": (lambda p: as_directory(part_of(p)), "part-00001-of-00002.safetensors: missing"),
    "no trainer.json": (lambda p: (p / "trainer.json").unlink(), "trainer.json: missing"),
    "another optimizer.json": (lambda p: flip(p / "optimizer.json"), "optimizer.json: its SHA-256 differs"),
    "a changed index": (edit_index, "COMMIT does not match index.json"),
    "a torn index": (lambda p: truncate(p / "index.json"), "COMMIT does not match index.json"),
    "no index": (lambda p: (p / "index.json").unlink(), "index.json"),
    "no COMMIT": (lambda p: (p / "COMMIT").unlink(), "COMMIT"),
    "an empty COMMIT": (lambda p: (p / "COMMIT").write_text(""), "COMMIT does not match index.json"),
    "COMMIT of other bytes": (lambda p: (p / "COMMIT").write_bytes(b"\xff\xfe"), "not a whole checkpoint"),
    "an empty directory": (empty, "not a whole checkpoint"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_damaged_is_passed_over_with_its_reason(tmp_path: Path, kind: str) -> None:
    write(tmp_path, 1, 2)
    write(tmp_path, 2, 2)
    damage, reason = DAMAGE[kind]
    damage(place(tmp_path, 2))
    said: list[str] = []
    assert newest(tmp_path, said.append) == place(tmp_path, 1)
    assert len(said) == 1 and "passed over" in said[0]
    assert checkpoint.name(2) in said[0] and reason in said[0]


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    read = checkpoint_reader.sha256

    def broken(path: Path) -> str:
        if checkpoint.name(2) in str(path):
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoint_reader, "sha256", broken)
    said: list[str] = []
    assert newest(tmp_path, said.append) == place(tmp_path, 1)
    assert "Input/output error" in said[0]


def test_none_when_all_are_damaged(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for step in (1, 2):
        write(tmp_path, step)
        flip(part_of(place(tmp_path, step)))
    said: list[str] = []
    assert newest(tmp_path, said.append) is None
    assert len(said) == 2


def test_leftovers_of_a_crash_do_not_count_and_are_cleared(tmp_path: Path) -> None:
    (writer,) = write(tmp_path, 1)
    shutil.copytree(place(tmp_path, 1), tmp_path / "checkpoints" / f".tmp_{checkpoint.name(2)}_1")
    assert newest(tmp_path) == place(tmp_path, 1)
    assert committed(tmp_path) == [place(tmp_path, 1)]
    writer.clear_leftovers()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [checkpoint.name(1)]


def test_a_copy_made_by_hand_is_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for copy in ("step_00000009.bak", "step_best", "step_9"):
        shutil.copytree(place(tmp_path, 1), tmp_path / "checkpoints" / copy)
    assert newest(tmp_path) == place(tmp_path, 1)
    write(tmp_path, 2, config=CheckpointConfig(keep=1))
    assert committed(tmp_path) == [place(tmp_path, 2)]
    assert (tmp_path / "checkpoints" / "step_00000009.bak" / "COMMIT").exists()


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (place(tmp_path, 2) / "COMMIT").unlink()
    write(tmp_path, 2, world=2, attempt=2, seed=8)
    reader = Reader(newest(tmp_path) or "")
    assert reader.path == place(tmp_path, 2)
    assert same_bits(reader.parameter("scalar"), tensors(8)["param/scalar"])


def test_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    recommit(place(tmp_path, 1), version=2)
    with pytest.raises(CheckpointError, match=r"version 2, this program reads mlm_dist\.checkpoint 1"):
        Reader(place(tmp_path, 1))


def recommit(path: Path, **changes: Any) -> None:
    """Make the checkpoint whole again over whatever its files are now."""
    index = json.loads((path / "index.json").read_text())
    for name in index["files"]:
        data = (path / name).read_bytes()
        index["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    data = json.dumps({**index, **changes}).encode()
    (path / "index.json").write_bytes(data)
    (path / "COMMIT").write_text(hashlib.sha256(data).hexdigest())


class Trap:
    """A pickle that writes a file when it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    poison = pickle.dumps(Trap(mark))
    write(tmp_path, 1, 2)
    path = place(tmp_path, 1)
    for name in ("pytorch_model.bin", "optimizer.pt", "trainer.pkl", "part-00000-of-00002.pt"):
        (path / name).write_bytes(poison)
    reader = Reader(newest(tmp_path) or "")
    assert [reader.parameter(n) for n in reader.names()] and reader.optimizer and reader.trainer
    # Not even where a part should be, and with checksums that fit it.
    part_of(path).write_bytes(poison)
    (path / "optimizer.json").write_bytes(poison)
    recommit(path)
    reader = Reader(path)
    reader.verify()
    with pytest.raises(CheckpointError):
        for key in reader.index["tensors"]:
            reader.tensor(key)
    with pytest.raises(CheckpointError):
        _ = reader.optimizer
    assert not mark.exists()
    with pytest.raises(FileNotFoundError):
        mark.stat()
    pickle.loads(poison)  # the trap does work
    assert mark.exists()


# ---- what comes from elsewhere ----

Index = dict[str, Any]


def with_index(change: Callable[[Index], Any]) -> Callable[[Path], None]:
    """Damage that whoever writes a checkpoint can do: the checksums fit."""

    def damage(path: Path) -> None:
        index = json.loads((path / "index.json").read_text())
        change(index)
        recommit_text(path, json.dumps(index))

    return damage


def recommit_text(path: Path, text: str) -> None:
    (path / "index.json").write_text(text)
    (path / "COMMIT").write_text(hashlib.sha256(text.encode()).hexdigest())


def loop(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path)


def another_program(path: Path) -> None:
    shutil.rmtree(path)
    (path / "mp_rank_00").mkdir(parents=True)
    (path / "pytorch_model.bin").write_bytes(b"PK")


FACTS = {"size": 1, "sha256": "0"}
FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "another program's directory": (another_program, "not a whole checkpoint"),
    "a symlink to itself": (loop, "not a whole checkpoint"),
    "a newer version": (with_index(lambda i: i.update(version=2)), "version 2, this program reads"),
    "an index that is a list": (lambda p: recommit_text(p, "[1]"), "this program reads"),
    "an index nested too deep": (lambda p: recommit_text(p, "[" * 200_000), "not a whole checkpoint"),
    "a step that is none": (with_index(lambda i: i.update(step="2")), "step '2'"),
    "another step": (with_index(lambda i: i.update(step=7)), "is the checkpoint of step 7"),
    "files that are a list": (with_index(lambda i: i.update(files=[])), "no files or no tensors"),
    "a file above": (with_index(lambda i: i["files"].update({"../x": FACTS})), "the file name '../x'"),
    "an absolute file": (with_index(lambda i: i["files"].update({"/etc/passwd": FACTS})), "name '/etc/passwd'"),
    "a hidden file": (with_index(lambda i: i["files"].update({"..": FACTS})), "the file name '..'"),
    "a file in a folder": (with_index(lambda i: i["files"].update({"a/b": FACTS})), "the file name 'a/b'"),
    "a file without facts": (with_index(lambda i: i["files"].update({"x": 3})), "no size or no checksum of x"),
    "a tensor in no file": (with_index(lambda i: i["tensors"].update({"param/x": "../x"})), "none of its files"),
    "a tensor in a list": (with_index(lambda i: i["tensors"].update({"param/x": []})), "none of its files"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_foreign_is_passed_over_with_its_reason(tmp_path: Path, kind: str) -> None:
    write(tmp_path, 1, 2)
    write(tmp_path, 2, 2)
    damage, reason = FOREIGN[kind]
    damage(place(tmp_path, 2))
    said: list[str] = []
    assert newest(tmp_path, said.append) == place(tmp_path, 1)
    assert len(said) == 1 and checkpoint.name(2) in said[0] and reason in said[0]


def test_a_checkpoint_can_be_passed_over_for_a_reason_of_the_callers(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    said: list[str] = []
    found = newest(tmp_path, said.append, lambda r: "it is void" if r.trainer["step"] > 1 else None)
    assert found == place(tmp_path, 1)
    assert [("it is void" in s, checkpoint.name(step) in s) for step, s in zip((3, 2), said, strict=True)] == [
        (True, True)
    ] * 2


@pytest.mark.parametrize("name", ["trainer.json", "optimizer.json"])
@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"[" * 200_000])
def test_json_of_the_wrong_shape(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path, 1)
    (place(tmp_path, 1) / name).write_bytes(content)
    recommit(place(tmp_path, 1))
    reader = Reader(newest(tmp_path) or "")
    with pytest.raises(CheckpointError, match=name):
        _ = reader.trainer if name == "trainer.json" else reader.optimizer


def read_all(path: Path) -> dict[str, torch.Tensor]:
    reader = Reader(path)
    return {key: reader.tensor(key) for key in reader.index["tensors"]}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "SHA-256 differs"),
        (truncate, "wrong size"),
        (Path.unlink, "missing"),
        (as_directory, "missing"),
    ],
)
def test_damage_between_the_check_and_the_reading(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    write(tmp_path, 1, 2)
    path = newest(tmp_path)
    assert path is not None
    reader = Reader(path)
    reader.verify()
    damage(part_of(path))
    with pytest.raises(CheckpointError, match=reason):
        read_all(path)  # as another rank would
    with pytest.raises(CheckpointError, match=r"was changed|cannot be read"):
        for key in reader.index["tensors"]:
            reader.tensor(key)


def test_a_checkpoint_that_is_removed_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    reader = Reader(place(tmp_path, 1))
    first, second, *_ = reader.index["tensors"]
    assert same_bits(reader.tensor(first), tensors(1)[first])
    shutil.rmtree(place(tmp_path, 1))
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.tensor(second)
    with pytest.raises(CheckpointError, match=r"trainer\.json: missing"):
        _ = reader.trainer


def test_the_library_reads_what_is_written_here_and_the_reverse(tmp_path: Path) -> None:
    write(tmp_path, 1)
    part = part_of(place(tmp_path, 1))
    expected = tensors(1)
    loaded = load_file(part)
    assert loaded.keys() == expected.keys() and all(same_bits(loaded[k], expected[k]) for k in expected)
    save_file(expected, part, metadata={"any": "thing"})
    recommit(place(tmp_path, 1))
    assert all(same_bits(t, expected[k]) for k, t in read_all(place(tmp_path, 1)).items())


def header(part: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a part's header and leave its tensors."""
    data = part.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    part.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def moved(entries: dict[str, Any], by: int) -> None:
    entries["param/scalar"]["data_offsets"] = [n + by for n in entries["param/scalar"]["data_offsets"]]


HEADERS: dict[str, Callable[[Path], Any]] = {
    "no bytes": lambda p: p.write_bytes(b""),
    "less than a length": lambda p: p.write_bytes(b"abc"),
    "a huge length": lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]),
    "a length past the end": lambda p: p.write_bytes((1 << 20).to_bytes(8, "little") + p.read_bytes()[8:]),
    "nested too deep": lambda p: p.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000),
    "a list": lambda p: p.write_bytes((2).to_bytes(8, "little") + b"[]"),
    "overlapping tensors": lambda p: header(p, lambda h: moved(h, -4)),
    "a hole": lambda p: header(p, lambda h: h.pop("param/cls.bias")),
    "an offset below 0": lambda p: header(p, lambda h: h["param/scalar"].update(data_offsets=[-4, 0])),
    "an offset past the end": lambda p: header(p, lambda h: moved(h, 1 << 40)),
    "a shape that is too large": lambda p: header(p, lambda h: h["param/scalar"].update(shape=[1 << 40, 1 << 40])),
    "a shape below 0": lambda p: header(p, lambda h: h["param/scalar"].update(shape=[-1, -1])),
    "a shape of words": lambda p: header(p, lambda h: h["param/scalar"].update(shape=["1"])),
    "another type": lambda p: header(p, lambda h: h["param/scalar"].update(dtype="I32")),
    "a tensor that is not there": lambda p: header(p, lambda h: h.update({"param/x": h.pop("param/scalar")})),
    "an entry that is a number": lambda p: header(p, lambda h: h.update({"param/x": 3})),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_part(tmp_path: Path, kind: str) -> None:
    """Its checksum fits, as whoever writes a checkpoint can have it."""
    write(tmp_path, 1)
    HEADERS[kind](part_of(place(tmp_path, 1)))
    recommit(place(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"part-00000-of-00001\.safetensors"):
        read_all(place(tmp_path, 1))


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One of the ways in which bytes go wrong."""
    at, length = draw.randrange(len(data)), draw.randint(1, 40)
    return draw.choice(
        [
            data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :],
            data[:at],
            data[:at] + draw.randbytes(length) + data[at + length :],
            data[:at] + data[at + length :],
            data[:at] + draw.randbytes(length) + data[at:],
            data[at:] + data[:at],
        ]
    )


def test_any_mutation_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Of any file; and with checksums that fit what is there, still nothing but CheckpointError and tensors of the right shape comes out."""
    write(tmp_path, 1, 2)
    path, expected, draw = place(tmp_path, 1), tensors(1), random.Random(26)
    originals = {p: p.read_bytes() for p in sorted(path.iterdir())}
    refused = 0
    for _ in range(400):
        victim = draw.choice([*originals])
        data = mutated(originals[victim], draw)
        victim.write_bytes(data)
        try:
            got = read_all(path)
            reader = Reader(path)
            assert (reader.optimizer, reader.trainer) == (OPTIMIZER, {"step": 1, "x": 0.1 + 0.2})
            assert got.keys() == expected.keys() and all(same_bits(got[k], expected[k]) for k in expected)
        except CheckpointError:
            refused += 1
        if victim.suffix == ".safetensors":
            recommit(path)
            with contextlib.suppress(CheckpointError):
                for key, tensor in read_all(path).items():
                    assert tensor.dtype == torch.float32 and tensor.numel() <= len(data) // 4, key
        for file, content in originals.items():
            file.write_bytes(content)
    assert refused > 350
    assert all(same_bits(t, expected[k]) for k, t in read_all(path).items())


# ---- failure to write ----


class Meeting:
    """Collectives of ranks that are threads of this process."""

    def __init__(self, world: int):
        self.barrier, self.slots, self.world = threading.Barrier(world, timeout=30), [None] * world, world

    def all(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


class Control:
    """One rank's side of it, with what ``distributed.ControlGroup`` offers."""

    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank = meeting, rank

    def sum(self, values: list[int]) -> list[int]:
        return [sum(column) for column in zip(*self.meeting.all(self.rank, values), strict=True)]

    def gather(self, obj: Any) -> list[Any] | None:
        values = self.meeting.all(self.rank, obj)
        return None if self.rank else values

    def broadcast(self, obj: Any) -> Any:
        return self.meeting.all(self.rank, obj)[0]


def settle(writers: list[Writer], last: bool = False) -> Any:
    """All ranks settle; all must hear the same, which is returned."""
    meeting = Meeting(len(writers))
    with ThreadPoolExecutor(len(writers)) as pool:
        heard = list(pool.map(lambda w: w.settle(Control(meeting, w.rank), last=last), writers))
    assert all(h == heard[0] for h in heard)
    return heard[0]


def begin(writers: list[Writer], step: int) -> None:
    whole = tensors(step)
    owners = assign({k: t.numel() for k, t in whole.items()}, len(writers))
    for rank, writer in enumerate(writers):
        writer.save(step, {k: t for k, t in whole.items() if owners[k] == rank}, owners, OPTIMIZER, {"step": step})


def ranks(run: Path, world: int, **config: Any) -> list[Writer]:
    return [Writer(run, CheckpointConfig(keep=9, **config), rank, world, 2) for rank in range(world)]


def fail_at(monkeypatch: pytest.MonkeyPatch, what: str, number: int) -> None:
    """Whatever is written to a file whose name holds ``what`` fails with this errno."""
    write_file, write_part = format.write_file, checkpoint_tensors.write_file

    def failing(path: Path, pieces: Any) -> Any:
        if what in path.name:
            path.write_bytes(b"half of it")
            raise OSError(number, os.strerror(number), str(path))
        return write_file(path, pieces)

    assert write_part is write_file
    for module in (format, checkpoint_tensors, checkpoint_writer):
        monkeypatch.setattr(module, "write_file", failing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize(
    ("what", "rank"),
    [
        ("part-00000-of-00002.safetensors", 0),
        ("part-00001-of-00002.safetensors", 1),
        ("part-00001-of-00002.safetensors.json", 1),
        ("trainer.json", 0),
        ("index.json", 0),
        ("COMMIT", 0),
    ],
)
def test_what_cannot_be_written_is_told_to_all_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, rank: int, number: int
) -> None:
    write(tmp_path, 1, 2)
    writers = ranks(tmp_path, 2)
    with monkeypatch.context() as broken:
        fail_at(broken, what, number)
        begin(writers, 2)
        failure = settle(writers)
    assert (failure.step, failure.ranks, failure.in_a_row, failure.end) == (2, [rank], 1, None)
    assert failure.reason.startswith(f"rank {rank}: ") and os.strerror(number) in failure.reason
    assert bool(failure.remedy) == (number != errno.EIO)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [checkpoint.name(1)]
    assert newest(tmp_path) == place(tmp_path, 1)
    # Told once, and the next one is written.
    assert settle(writers) is None
    begin(writers, 3)
    assert settle(writers) is None
    assert newest(tmp_path) == place(tmp_path, 3)


FORBIDDEN = """
import sys
from pathlib import Path
import torch
from mlm_dist.checkpoint import CheckpointConfig, Writer

class Alone:
    def sum(self, values): return values
    def gather(self, obj): return [obj]
    def broadcast(self, obj): return obj

writer = Writer(Path(sys.argv[1]), CheckpointConfig(keep=9), 0, 1, 2)
whole = {"param/x": torch.ones(3)}
writer.save(2, whole, {"param/x": 0}, {}, {"step": 2})
print(writer.settle(Alone(), last=True))
"""


def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    """Really so: root does without the capability that lets it write everywhere."""
    write(tmp_path, 1)
    root = tmp_path / "checkpoints"
    root.chmod(0o555)
    capabilities = "-dac_override,-dac_read_search"
    drop = ["setpriv", "--bounding-set", capabilities, "--inh-caps", capabilities] if os.geteuid() == 0 else []
    command = [*drop, sys.executable, "-c", FORBIDDEN, str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        pytest.skip("as root this needs setpriv (util-linux)")
    finally:
        root.chmod(0o755)
    assert "step 2 could not be written (rank 0: [Errno 13] Permission denied" in done.stdout, done.stderr
    assert [p.name for p in root.iterdir()] == [checkpoint.name(1)]
    assert newest(tmp_path) == place(tmp_path, 1)


def test_where_no_directory_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no directory")
    writers = ranks(tmp_path, 2)
    begin(writers, 1)
    failure = settle(writers)
    assert failure.ranks == [0, 1] and "Not a directory" in failure.reason


def test_where_the_whole_one_cannot_get_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 2)
    writers = ranks(tmp_path, 2)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target.name == checkpoint.name(2):
            raise OSError(errno.EROFS, "Read-only file system")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    begin(writers, 2)
    assert settle(writers).ranks == [0]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [checkpoint.name(1)]


def test_after_so_many_in_a_row_the_run_is_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 2)
    writers = ranks(tmp_path, 2, max_failures=2)
    ends = []
    for step, broken in ((2, True), (3, False), (4, True), (5, True)):
        with monkeypatch.context() as patch:
            if broken:
                fail_at(patch, "part-00001-of-00002.safetensors", errno.ENOSPC)
            begin(writers, step)
            failure = settle(writers)
        ends.append(failure and (failure.in_a_row, failure.end is not None))
    assert ends == [(1, False), None, (1, False), (2, True)]
    assert f"The newest whole checkpoint is {place(tmp_path, 3)}" in failure.end
    assert "as 2 in a row" in failure.end and "Free space" in failure.end


def test_after_the_last_one_the_run_is_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers = ranks(tmp_path, 2)
    fail_at(monkeypatch, "trainer.json", errno.ENOSPC)
    begin(writers, 2)
    assert "There is no whole checkpoint" in settle(writers, last=True).end


def test_a_failure_is_seen_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no directory")
    (writer,) = ranks(tmp_path, 1)
    assert not writer.failed
    begin([writer], 1)
    with pytest.raises(CheckpointError, match="could not be written"):
        writer.wait()
    begin([writer], 1)
    writer._thread.join()
    assert writer.failed


def test_what_a_failed_try_left_is_no_part_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it could not even be removed, and the step comes again."""
    writers = ranks(tmp_path, 2)
    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        fail_at(broken, "trainer.json", errno.EIO)
        begin(writers, 2)
        assert settle(writers).ranks == [0]
    begin(writers, 2)
    assert settle(writers) is None
    assert newest(tmp_path) == place(tmp_path, 2)


def test_a_rank_that_never_writes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "PARTS_TIMEOUT_S", 0.2)
    whole = tensors()
    writer = Writer(tmp_path, CheckpointConfig(), 0, 2, 1)
    writer.save(1, whole, dict.fromkeys(whole, 0), OPTIMIZER, {})
    with pytest.raises(CheckpointError, match="rank 1 has not written its part"):
        writer.wait()
    assert newest(tmp_path) is None


# ---- retention ----


def steps(run: Path) -> list[int]:
    return [Reader(p).step for p in committed(run)]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, None, [6]), (2, None, [5, 6]), (2, 2, [2, 4, 5, 6]), (1, 3, [3, 6]), (9, None, [1, 2, 3, 4, 5, 6])],
)
def test_retention(tmp_path: Path, keep: int, keep_every: int | None, left: list[int]) -> None:
    for step in range(1, 7):
        write(tmp_path, step, config=CheckpointConfig(keep=keep, keep_every=keep_every))
    assert steps(tmp_path) == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


LOSSES = [9.0, 5.0, 7.0, 5.0, 6.0, math.nan, 8.0]


@pytest.mark.parametrize(
    ("keep_best", "keep_every", "left"),
    [(0, None, [7]), (1, None, [4, 7]), (2, None, [2, 4, 7]), (3, None, [2, 4, 5, 7]), (1, 3, [3, 4, 6, 7])],
)
def test_retention_of_the_best(tmp_path: Path, keep_best: int, keep_every: int | None, left: list[int]) -> None:
    """Of equal losses the later one; one that is not a number is no loss. A Writer of each step's own, as after a restart."""
    config = CheckpointConfig(keep=1, keep_every=keep_every, keep_best=keep_best)
    for step, loss in enumerate(LOSSES, 1):
        write(tmp_path, step, config=config, loss=loss, attempt=step)
    assert steps(tmp_path) == left
    assert checkpoint.best(tmp_path) == (place(tmp_path, 4) if keep_best else place(tmp_path, 7))


def test_retention_of_one_attempt_is_that_of_many(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=2, keep_best=2)
    for run in ("one", "many"):
        writer = Writer(tmp_path / run, config, 0, 1, 1)
        for step, loss in enumerate(LOSSES, 1):
            if run == "many":
                writer = Writer(tmp_path / run, config, 0, 1, step)
            whole = tensors(step)
            trainer = {"step": step, "validation": {"step": step, "loss": loss}}
            writer.save(step, whole, dict.fromkeys(whole, 0), OPTIMIZER, trainer)
            writer.wait()
    assert steps(tmp_path / "one") == steps(tmp_path / "many") == [2, 4, 6, 7]


def test_a_step_that_comes_again_is_judged_by_its_new_loss(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=1, keep_best=1)
    writer = Writer(tmp_path, config, 0, 1, 1)
    for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (2, 6.0), (4, 7.0)):
        whole = tensors(step)
        trainer = {"step": step, "validation": {"step": step, "loss": loss}}
        writer.save(step, whole, dict.fromkeys(whole, 0), OPTIMIZER, trainer)
        writer.wait()
    assert steps(tmp_path) == [3, 4]


def test_the_damaged_best_is_passed_over_and_does_not_count(tmp_path: Path) -> None:
    for step, loss in enumerate(LOSSES[:4], 1):
        write(tmp_path, step, loss=loss)
    flip(part_of(place(tmp_path, 4)))
    said: list[str] = []
    assert checkpoint.best(tmp_path, said.append) == place(tmp_path, 2)
    assert len(said) == 1 and checkpoint.name(4) in said[0]
    (place(tmp_path, 4) / "trainer.json").write_text("{}")
    write(tmp_path, 5, config=CheckpointConfig(keep=1, keep_best=1), loss=9.0)
    assert steps(tmp_path) == [2, 5]
    assert checkpoint.best(tmp_path / "nothing") is None


def test_retention_keeps_the_one_just_written_under_a_damaged_later_one(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        write(tmp_path, step)
    flip(part_of(place(tmp_path, 9)))
    # The run goes on after 6 with another `every`.
    write(tmp_path, 8, attempt=2, config=CheckpointConfig(keep=1))
    assert newest(tmp_path) == place(tmp_path, 8)


@pytest.mark.parametrize(
    ("key", "value"), [("every", 0), ("keep", 0), ("keep_every", -1), ("keep_best", -1), ("max_failures", 0)]
)
def test_wrong_settings(key: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"checkpoint\.{key}: {value} must be at least [01]"):
        CheckpointConfig(**{key: value}).check()


# ---- who writes what ----


@settings(deadline=None, max_examples=80)
@given(numels=st.dictionaries(st.text("abc/", max_size=6), st.integers(0, 1000), max_size=40), world=st.integers(1, 9))
def test_assign_is_balanced_and_the_same_on_all_ranks(numels: dict[str, int], world: int) -> None:
    owners = assign(numels, world)
    assert owners.keys() == numels.keys()
    assert assign(dict(reversed(numels.items())), world) == owners
    loads = [sum(n for k, n in numels.items() if owners[k] == rank) for rank in range(world)]
    assert max(loads) - min(loads) <= max(numels.values(), default=0)


def test_of_many_ranks_a_part_holds_tensors() -> None:
    owners = assign({str(i): 10 for i in range(1000)}, 512)
    assert set(owners.values()) == set(range(checkpoint.MOST_OWNERS))
