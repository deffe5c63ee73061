"""A checkpoint that cannot be written: all ranks hear the same, nothing of it is left, and those before stay."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlm_dist import checkpoint
from mlm_dist.checkpoint import CheckpointConfig, CheckpointError, Writer, assign, format, newest
from mlm_dist.checkpoint import tensors as checkpoint_tensors
from mlm_dist.checkpoint import writer as checkpoint_writer
from tests.checkpoints import (
    OPTIMIZER,
    place,
    tensors,
    write,
)


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
