"""Work that several processes, perhaps on several machines, do together in one directory and that any of them may leave.

A task is done when its marker is there, a file with its result that is written last and renamed into place. Who works on a
task holds a lock on its claim, which ends with the process, whatever ends it. Tasks give the same files whoever does them and
write them under names of their own before they rename them. So where a file system's locks do not reach other machines, or
there are none, tasks are done twice now and then, never wrong.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlm_dist.data.workers import WorkerPool
from mlm_dist.errors import UserError
from mlm_dist.files import read_json, write_atomically

Task = TypeVar("Task")
Result = dict[str, Any]

_LOCK = "lock"
_JOB = "job.json"
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Share:
    """Which part of a job this process reads: `number` of `count`, from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """`2/8`.

        Raises:
            UserError: Another form, or numbers that cannot be.
        """
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--part is {text!r}; it must be I/N with I from 1 to N, as 1/8 to 8/8 for eight parts")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file, which is made if it is missing.

    Args:
        path: The file.
        wait: Whether to wait for whoever has the lock.

    Yields:
        Whether the lock is held. Where the file system has no locks: True.

    Raises:
        FileNotFoundError: The file's directory is gone.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:
                yield True
                return
            if not _is_at(file, path):  # removed while we waited: its lock keeps nobody out
                continue
            yield True
            return
        finally:
            os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


class Job:
    """One job's directory, as one of its processes sees it. Made by `open_job`.

    Attributes:
        directory: For whatever its tasks write.
        share: This process' part.
    """

    def __init__(self, directory: Path, share: Share) -> None:
        self.directory = directory
        self.share = share

    def exists(self) -> bool:
        """Whether it has not been published yet."""
        return (self.directory / _JOB).exists()

    def run(
        self,
        pool: WorkerPool,
        function: Callable[[Task], Result],
        tasks: Mapping[str, Task],
        weights: Sequence[int],
        title: str,
    ) -> list[Result]:
        """Do tasks together with whoever else is at work on them; comes back when all are done.

        Args:
            pool: Does them.
            function: What a task is; its result is what its marker holds, and is JSON.
            tasks: By names that are the same in all processes.
            weights: Of the tasks, for the progress bar.
            title: Of the progress bar.

        Returns:
            The tasks' results, whoever did them.
        """
        items = [
            (self._marker(name), self.directory / f"{name}.claim", task, weight)
            for (name, task), weight in zip(tasks.items(), weights, strict=True)
        ]
        # The parts begin at different places, so that they meet late.
        first = (self.share.number - 1) * len(items) // self.share.count
        left = [item for item in items[first:] + items[:first] if not item[0].exists()]
        for wait in (False, True):
            if not left:
                break
            if wait:
                print(f"{title}: waiting for {len(left)} pieces that other parts are at", file=sys.stderr, flush=True)
            done = pool.map(partial(_attempt, function, wait), left, [item[3] for item in left], title)
            left = [item for item, mine in zip(left, done, strict=True) if not mine]
        return [json.loads(marker.read_bytes()) for marker, *_ in items]

    def result(self, name: str) -> Result:
        """The result of a task that is done."""
        result: Result = json.loads(self._marker(name).read_bytes())
        return result

    def mark_read(self) -> None:
        """Note that this part has read its share."""
        write_atomically(self.directory / _read_marker(self.share), b"{}\n")

    def unread(self) -> list[int]:
        """The parts that have not read their shares."""
        # A network file system may answer from a listing of some time ago, unless this machine has changed the directory.
        probe = self.directory / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
        there = set(os.listdir(self.directory))
        count = self.share.count
        return [i for i in range(1, count + 1) if _read_marker(Share(i, count)) not in there]

    def wait_for_readers(self, seconds: float) -> list[int]:
        """Wait so long at most, and give the parts that have not read their shares then."""
        deadline = time.monotonic() + seconds
        while (unread := self.unread()) and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(_POLL_SECONDS, left))
        return unread

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Publish the result in here, with nobody else doing so; then the job's files are removed.

        Raises:
            FileNotFoundError: Somebody else has done it.
        """
        with locked(self.directory.parent / _LOCK, wait=True):
            if not self.exists():
                raise FileNotFoundError(self.directory)
            yield
            self._remove()

    def abandon(self) -> None:
        """Remove the job's files: there is nothing in them to go on with."""
        with locked(self.directory.parent / _LOCK, wait=True):
            self._remove()

    def sweep(self) -> None:
        """Remove what this process has written since another one removed the job's files."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if not any(path.is_dir() for path in self.directory.parent.glob("*")):
            shutil.rmtree(self.directory.parent, ignore_errors=True)

    def _remove(self) -> None:
        (self.directory / _JOB).unlink(missing_ok=True)  # from here on there is no such job
        shutil.rmtree(self.directory.parent, ignore_errors=True)

    def _marker(self, name: str) -> Path:
        return self.directory / f"{name}.done"


def _read_marker(share: Share) -> str:
    return f"part-{share.number}-of-{share.count}.read"


def _attempt(function: Callable[[Task], Result], wait: bool, item: tuple[Path, Path, Task, int]) -> bool:
    """Do a task unless it is done or another is at it; say whether it is done now."""
    marker, claim, task, _ = item
    with locked(claim, wait=wait) as mine:
        if not mine:
            return False
        if not marker.exists():
            write_atomically(marker, json.dumps(function(task)).encode())
    return True


@contextmanager
def open_job(
    root: Path,
    description: Result,
    share: Share,
    *,
    overwrite: bool,
    needless: Callable[[bool], bool],
) -> Iterator[Job | None]:
    """Begin a job, or join the one that other parts, or a process that was killed, have begun.

    Args:
        root: Directory for jobs; there is one at a time.
        description: What makes the job this one, JSON: parts of one job have the same.
        share: This process' part.
        overwrite: Whether to throw away what other parts have done of another job.
        needless: Called before a job is begun, with whether the remains of another one were thrown away; says whether
            there is nothing to do, and may raise.

    Yields:
        The job, or None if there is nothing to do.

    Raises:
        UserError: Another job is at work there, or parts of another one have been read.
    """
    described = json.dumps({**description, "parts": share.count}, sort_keys=True).encode()
    directory = root / hashlib.sha256(described).hexdigest()[:16]
    with ExitStack() as mine:
        with _root_locked(root):
            others = [path for path in root.iterdir() if path.is_dir() and path != directory]
            for other in others:
                _check_replaceable(other, json.loads(described), overwrite)
                shutil.rmtree(other, ignore_errors=True)
            nothing_to_do = False
            if not (directory / _JOB).exists():
                nothing_to_do = True
                try:
                    nothing_to_do = needless(bool(others))
                finally:
                    if nothing_to_do:
                        shutil.rmtree(root, ignore_errors=True)
            if not nothing_to_do:
                directory.mkdir(exist_ok=True)
                if not (directory / _JOB).exists():
                    write_atomically(directory / _JOB, described)
                if not mine.enter_context(locked(directory / f"part-{share.number}.lock", wait=False)):
                    raise UserError(
                        f"--output {root.parent}: another `mlm-dist prepare` is at work there{_as_part(share)}"
                    )
        yield None if nothing_to_do else Job(directory, share)


@contextmanager
def _root_locked(root: Path) -> Iterator[None]:
    """Make the directory for jobs and hold its lock."""
    with ExitStack() as stack:
        while True:
            root.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(root / _LOCK, wait=True))
                break
            except FileNotFoundError:  # a job that ended has taken the directory with it
                continue
        yield


def _as_part(share: Share) -> str:
    return f" as part {share}" if share.count > 1 else ""


def _check_replaceable(other: Path, wanted: Result, overwrite: bool) -> None:
    """Check that nobody works, or means to go on, with what another job left."""
    where = f"--output {other.parent.parent}"
    for lock in other.glob("part-*.lock"):
        with locked(lock, wait=False) as free:
            if not free:
                raise UserError(f"{where}: another `mlm-dist prepare` is at work there")
    found = read_json(other / _JOB)
    if found is not None and found.get("parts", 1) > 1 and not overwrite:
        raise UserError(
            f"{where}: parts of another `mlm-dist prepare` have been read there: {difference(found, wanted)}; give all parts the same "
            "inputs and options, or --overwrite to begin anew"
        )


def difference(found: Any, wanted: Result) -> str:
    """How one description differs from another, in words."""
    if not isinstance(found, dict):
        return "none recorded"
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    return ", ".join(
        f"{name}: {difference(found[name], wanted[name])}"
        if isinstance(found.get(name), dict) and isinstance(wanted.get(name), dict)
        else f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}"
        for name in names
    )
