"""Checkpoints: what is written is read back to the bit, and whatever is damaged or half-written never counts."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_dist import checkpoint
from mlm_dist.checkpoint import CheckpointConfig, CheckpointError, Reader, Writer, assign, committed, newest
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
) -> list[Writer]:
    """A checkpoint by ``world`` ranks, each with a Writer as its process would have; returns them when it is written."""
    whole = tensors(step if seed is None else seed)
    owners = assign({k: t.numel() for k, t in whole.items()}, world)
    writers = [Writer(run, config or CheckpointConfig(keep=9), rank, world, attempt) for rank in range(world)]
    for rank, writer in enumerate(writers):
        mine = {k: t for k, t in whole.items() if owners[k] == rank}
        writer.save(step, mine, owners, OPTIMIZER, {"step": step, "x": 0.1 + 0.2} if rank == 0 else {})
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
    read = checkpoint._sha256

    def broken(path: Path) -> str:
        if checkpoint.name(2) in str(path):
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoint, "_sha256", broken)
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
    with pytest.raises(Exception):  # noqa: B017  whatever safetensors says of it
        for key in reader.index["tensors"]:
            reader.tensor(key)
    with pytest.raises(ValueError):
        _ = reader.optimizer
    assert not mark.exists()
    with pytest.raises(FileNotFoundError):
        mark.stat()
    pickle.loads(poison)  # the trap does work
    assert mark.exists()


# ---- failure to write ----


def test_an_unwritable_place_is_told_by_wait_and_the_one_before_stays(tmp_path: Path) -> None:
    (writer,) = write(tmp_path, 1)
    (tmp_path / "checkpoints" / f".tmp_{checkpoint.name(2)}_1").write_text("a file where the directory should be")
    whole = tensors(2)
    owners = dict.fromkeys(whole, 0)
    writer.save(2, whole, owners, OPTIMIZER, {})
    with pytest.raises(CheckpointError, match=r"could not be written: .*File exists"):
        writer.wait()
    assert newest(tmp_path) == place(tmp_path, 1)
    # Told once; the next one is written.
    writer.wait()
    writer.save(3, whole, owners, OPTIMIZER, {})
    writer.wait()
    assert newest(tmp_path) == place(tmp_path, 3)


def test_the_next_save_tells_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no directory")
    writer = Writer(tmp_path, CheckpointConfig(), 0, 1, 1)
    whole = tensors()
    writer.save(1, whole, dict.fromkeys(whole, 0), OPTIMIZER, {})
    with pytest.raises(CheckpointError, match="could not be written"):
        writer.save(2, whole, dict.fromkeys(whole, 0), OPTIMIZER, {})


def test_a_rank_that_fails_fails_the_checkpoint_on_rank_0(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    whole = tensors(2)
    owners = assign({k: t.numel() for k, t in whole.items()}, 2)
    first, second = (Writer(tmp_path, CheckpointConfig(), rank, 2, 1) for rank in range(2))
    first.save(2, {k: t for k, t in whole.items() if owners[k] == 0}, owners, OPTIMIZER, {})
    second.save(2, {"param/x": torch.zeros(4, 4).t()[:2]}, owners, {}, {})  # safetensors takes no such view
    with pytest.raises(CheckpointError, match="could not be written"):
        second.wait()
    with pytest.raises(CheckpointError, match="could not be written: rank 1: "):
        first.wait()
    assert newest(tmp_path) == place(tmp_path, 1)
    assert not place(tmp_path, 2).exists()


def test_a_rank_that_never_writes_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PARTS_TIMEOUT_S", 0.2)
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


def test_retention_keeps_the_one_just_written_under_a_damaged_later_one(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        write(tmp_path, step)
    flip(part_of(place(tmp_path, 9)))
    # The run goes on after 6 with another `every`.
    write(tmp_path, 8, attempt=2, config=CheckpointConfig(keep=1))
    assert newest(tmp_path) == place(tmp_path, 8)


@pytest.mark.parametrize(("key", "value"), [("every", 0), ("keep", 0), ("keep_every", -1)])
def test_wrong_settings(key: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"checkpoint\.{key}: {value} must be at least 1"):
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
