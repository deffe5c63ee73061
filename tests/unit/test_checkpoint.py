"""Checkpoints: what is written is read back to the bit, whatever is damaged or half-written never counts, and the right ones stay."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_dist import checkpoint
from mlm_dist.checkpoint import CheckpointConfig, CheckpointError, Reader, Writer, assign, committed, newest
from mlm_dist.checkpoint import reader as checkpoint_reader
from mlm_dist.errors import UserError
from tests.checkpoints import (
    NAMES,
    OPTIMIZER,
    as_directory,
    flip,
    part_of,
    place,
    recommit,
    same_bits,
    steps,
    tensors,
    truncate,
    write,
)


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


def edit_index(path: Path) -> None:
    index = json.loads((path / "index.json").read_text())
    index["step"] = 77
    (path / "index.json").write_text(json.dumps(index))


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


# ---- retention ----


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
