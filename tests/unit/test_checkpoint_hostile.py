"""Checkpoints from elsewhere: nothing in them is executed or believed, and what is odd is passed over with its reason."""

import contextlib
import hashlib
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlm_dist import checkpoint
from mlm_dist.checkpoint import CheckpointError, Reader, newest
from tests.checkpoints import (
    OPTIMIZER,
    as_directory,
    flip,
    part_of,
    place,
    read_all,
    recommit,
    same_bits,
    tensors,
    truncate,
    write,
)


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
