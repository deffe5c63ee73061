"""`mlm-dist prepare --part I/N`: real processes that share one output directory."""

import argparse
import errno
import fcntl
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.data import prepare as command
from mlm_dist.data import reading, sources
from mlm_dist.data.job import Share
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.prepare import prepare_part
from mlm_dist.data.prepare_options import PrepareOptions
from mlm_dist.data.sources import find_sources
from mlm_dist.errors import UserError
from tests.unit.test_prepare import Crash, at_call, crash_at, documents, files, text

OPTIONS = PrepareOptions(split_by="line", shard_size=120_000, val_fraction=0.1, documents_per_member=8, dedup="near")
FLAGS = ["--split-by=line", "--shard-size=120000", "--val-fraction=0.1", "--documents-per-member=8", "--dedup=near"]
PART_BYTES = 80_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 documents in four files; a quarter of them are there again, word for word or with a word changed."""
    root = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    lines = [text(i) + " " + " ".join(str(draw.randrange(10**6)) for _ in range(40)) for i in range(1600)]
    lines += lines[:200] + [line.rpartition(" ")[0] + " changed" for line in lines[200:400]]
    for k in range(4):
        (root / f"{k}.txt").write_text("\n".join(lines[k::4]))
    return root


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PART_BYTES", PART_BYTES)
    monkeypatch.setattr(reading, "_MIN_UNIT_BYTES", PART_BYTES)
    monkeypatch.setattr(reading, "_MAX_UNIT_BYTES", PART_BYTES)


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    output = tmp_path_factory.mktemp("reference")
    prepare_part(find_sources([str(corpus)], split_by="line"), output, OPTIONS)
    return output


def no_locks(*arguments: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def run_part(flags: list[str], log: Path, event: str, call: int) -> None:
    """What a part's process does.

    Args:
        flags: Of the command.
        log: For stdout and stderr.
        event: `kill` or `stop`: what happens to the process at a rename; `unlocked`: the file system has no locks.
        call: The number of the rename.
    """
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(event)
    if number:
        os.replace = at_call(call, os.replace, lambda: os.kill(os.getpid(), number))
    if event == "unlocked":
        fcntl.flock = no_locks
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with log.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(command.run(parser.parse_args(flags)))


class Parts:
    """Starts parts as processes of their own, and ends those that a test leaves."""

    def __init__(self, corpus: Path, output: Path) -> None:
        self.corpus, self.output = corpus, output
        self.logs: dict[BaseProcess, Path] = {}

    def start(self, part: str, *flags: str, event: str = "none", call: int = 0) -> BaseProcess:
        log = self.output.parent / f"log-{len(self.logs)}"
        log.touch()
        flags = (str(self.corpus), "--output", str(self.output), *FLAGS, f"--part={part}", "--workers=1", *flags)
        # Forked, since the imports take seconds.
        process = multiprocessing.get_context("fork").Process(target=run_part, args=([*flags], log, event, call))
        process.start()
        self.logs[process] = log
        return process

    def finish(self, process: BaseProcess, code: int = 0) -> str:
        process.join(timeout=120)
        out = self.logs[process].read_text()
        assert process.exitcode == code, out
        return out

    def run(self, part: str, *flags: str, code: int = 0, event: str = "none", call: int = 0) -> str:
        return self.finish(self.start(part, *flags, event=event, call=call), code)


@pytest.fixture
def parts(corpus: Path, tmp_path: Path) -> Iterator[Parts]:
    parts = Parts(corpus, tmp_path / "out")
    yield parts
    for process in parts.logs:
        process.kill()
        process.join()


def test_one_after_the_other_in_any_order(parts: Parts, reference: Path) -> None:
    assert Manifest.read(reference / "manifest.json").info["duplicates_removed"]["documents"] >= 390
    assert len(files(reference)) >= 5
    out = parts.run("3/3")
    assert "part 3/3 has read its share" in out and "Still to read: 1/3, 2/3" in out
    assert "Still to read: 2/3" in parts.run("1/3")
    assert "Still to read: 2/3" in parts.run("1/3")  # again: nothing is left to do
    assert not (parts.output / "manifest.json").exists()
    assert "manifest.json: " in parts.run("2/3")
    assert files(parts.output) == files(reference)
    assert "already prepared" in parts.run("3/3", "--overwrite")


@pytest.mark.parametrize("event", ["none", "unlocked"])
def test_all_at_once(parts: Parts, reference: Path, event: str) -> None:
    """Also on a file system without locks, where they may do a task twice."""
    started = [parts.start(f"{i}/3", "--wait=2", event=event) for i in (1, 2, 3)]
    for process in started:
        assert "manifest.json: " in parts.finish(process)
    assert files(parts.output) == files(reference) and not (parts.output / ".prepare-tmp").exists()


def test_killed_and_started_again(parts: Parts, reference: Path) -> None:
    parts.run("1/3")
    parts.run("2/3", event="kill", call=4, code=-signal.SIGKILL)  # reading
    parts.run("3/3")
    assert "manifest.json" not in os.listdir(parts.output)
    # Then at the end of reading, comparing, joining, writing and publishing, each time a few renames further.
    kills = 0
    while True:
        process = parts.start("2/3", event="kill", call=4)
        process.join(timeout=120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        assert kills < 100
    assert kills >= 6
    assert files(parts.output) == files(reference)


def until(condition: Callable[[], bool], process: BaseProcess) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and process.exitcode is None
        time.sleep(0.005)


def test_one_dies_while_another_waits_for_its_shard(parts: Parts, reference: Path) -> None:
    for i in (1, 3):
        parts.run(f"{i}/3")
    holder = parts.start("2/3", event="stop", call=count_renames(parts.corpus, parts.output.parent / "count"))
    until(lambda: Path(f"/proc/{holder.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T", holder)
    helper = parts.start("1/3")
    until(lambda: "Writing: waiting for 1 pieces" in parts.logs[helper].read_text(), helper)
    assert helper.exitcode is None
    holder.kill()
    assert "manifest.json: " in parts.finish(helper)
    assert files(parts.output) == files(reference)


def count_renames(corpus: Path, output: Path) -> int:
    """How many renames part 2/3 makes, as the last, until it writes its first shard."""
    found = find_sources([str(corpus)], split_by="line")
    for i in (1, 3):
        prepare_part(found, output, OPTIONS, share=Share(i, 3))
    calls = 0
    rename = os.replace

    def counted(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if str(target).endswith(".tar"):
            raise Crash
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", counted)
        with pytest.raises(Crash):
            prepare_part(found, output, OPTIONS, share=Share(2, 3))
    return calls


def test_a_crash_at_every_rename_of_the_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((sources, "_PART_BYTES"), (reading, "_MIN_UNIT_BYTES"), (reading, "_MAX_UNIT_BYTES")):
        monkeypatch.setattr(module, name, 4000)
    (tmp_path / "few.txt").write_text("\n".join(text(i % 150) for i in range(200)))
    options = PrepareOptions(split_by="line", shard_size=6000, val_fraction=0.1, dedup="exact")
    found = find_sources([str(tmp_path / "few.txt")], split_by="line")
    prepare_part(found, tmp_path / "one", options)
    expected = files(tmp_path / "one")
    prepare_part(found, tmp_path / "begun", options, share=Share(1, 2))
    for call in itertools.count(1):
        output = tmp_path / str(call)
        shutil.copytree(tmp_path / "begun", output)
        crashed = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", crash_at(call, os.replace))
            try:
                prepare_part(found, output, options, share=Share(2, 2))
            except Crash:
                crashed = True
        if crashed:
            assert not (output / "manifest.json").exists()
            # Whoever is there: the part that has read already can go on as well, if all was read.
            again = prepare_part(found, output, options, share=Share(1, 2))
            if again.unread:
                prepare_part(found, output, options, share=Share(2, 2))
        assert files(output) == expected
        if not crashed:
            break
        shutil.rmtree(output)
    assert call > 25


def test_parts_must_agree(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "in")
    output = tmp_path / "out"

    def part(share: Share, overwrite: bool = False, **changes: Any) -> Any:
        found = find_sources([str(tmp_path / "in")], split_by="line")
        options = PrepareOptions(**{**vars(OPTIONS), "dedup": "none", **changes})
        return prepare_part(found, output, options, share=share, overwrite=overwrite)

    assert part(Share(1, 3)).unread == [2, 3]
    with pytest.raises(UserError, match=r"parts of another .* seed was 0, is 1; give all parts the same .*--overwrite"):
        part(Share(2, 3), seed=1)
    with pytest.raises(UserError, match="parts was 3, is 4"):
        part(Share(2, 4))
    with pytest.raises(UserError, match="parts was 3, is 1"):
        part(Share())
    os.utime(tmp_path / "in" / "0.txt", (0, 0))
    os.utime(tmp_path / "in" / "1.txt")
    with pytest.raises(UserError, match=r"inputs last written was '.*', is '"):
        part(Share(2, 3))
    assert part(Share(2, 3), overwrite=True).unread == [1, 3]
    assert part(Share(1, 3), overwrite=True).unread == [3]  # joins: what part 2 has done stays
    assert part(Share(3, 3), overwrite=True).manifests
    # Of the same inputs and options nothing is made again, of others everything.
    assert not part(Share(1, 3), overwrite=True).written
    with pytest.raises(UserError, match="made with other options: seed was 0, is 1"):
        part(Share(1, 2), seed=1)
    assert part(Share(1, 2), overwrite=True, seed=1).unread == [2]
    assert Manifest.read(output / "manifest.json").info["options"]["seed"] == 0
    assert part(Share(2, 2), overwrite=True, seed=1).manifests["train"].info["options"]["seed"] == 1
    train = documents(Manifest.read(output / "manifest.json"))
    assert len(train) + len(documents(Manifest.read(output / "val.json"))) == 2000


def test_a_part_is_at_work_once(corpus: Path, tmp_path: Path) -> None:
    found = find_sources([str(corpus)], split_by="line")
    prepare_part(found, tmp_path, OPTIONS, share=Share(1, 3))
    (job,) = (path for path in (tmp_path / ".prepare-tmp").iterdir() if path.is_dir())
    with (job / "part-2.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `mlm-dist prepare` is at work there as part 2/3"):
            prepare_part(found, tmp_path, OPTIONS, share=Share(2, 3))
        with pytest.raises(UserError, match="another `mlm-dist prepare` is at work there"):
            prepare_part(found, tmp_path, PrepareOptions(**{**vars(OPTIONS), "seed": 3}), overwrite=True)


def test_shares_are_even_and_all(corpus: Path, tmp_path: Path) -> None:
    found = find_sources([str(corpus)], split_by="line")
    corpus_ = reading.Corpus(found, OPTIONS)
    shares: list[list[reading.Unit]] = []
    for i in (1, 2, 3):
        job = reading.Job(tmp_path, Share(i, 3))
        shares.append(reading._share_of(reading.find_units(corpus_, job), job))
    numbers = sorted(unit.number for share in shares for unit in share)
    assert numbers == list(range(len(numbers))) and len(numbers) >= 6
    sizes = [sum(unit.size for unit in share) for share in shares]
    assert max(sizes) < 1.5 * min(sizes) and sum(sizes) == sum(source.size for source in found)


@pytest.mark.parametrize("value", ["0/3", "4/3", "1", "a/b", "1/3/4", "-1/3", ""])
def test_wrong_parts(value: str) -> None:
    with pytest.raises(UserError, match=r"--part is .*; it must be I/N"):
        Share.parse(value)


def test_locks_that_a_file_system_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlm_dist.data.job import locked

    with locked(tmp_path / "a", wait=False) as first, locked(tmp_path / "a", wait=False) as second:
        assert (first, second) == (True, False)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / "a", wait=True) as first, locked(tmp_path / "a", wait=False) as second:
        assert first and second


def test_a_lock_whose_file_was_removed_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlm_dist.data.job import locked

    lock: Callable[..., None] = fcntl.flock
    calls = 0

    def removed_meanwhile(file: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / "a").unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with locked(tmp_path / "a", wait=True) as held:
        assert held and calls == 2 and (tmp_path / "a").exists()
