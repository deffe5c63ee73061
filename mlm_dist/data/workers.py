"""A pool of processes for the commands that prepare data, with one progress bar a pass."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from mlm_dist.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


class WorkerPool:
    """Runs module-level functions over tasks in spawned processes; with one worker or one task, in this process.

    Args:
        workers: Number of processes.

    Raises:
        UserError: Fewer than one worker.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UserError(f"--workers is {workers}; it must be at least 1 (this machine offers {default_workers()})")
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self._strangers = set(multiprocessing.active_children())

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is None:
            return
        if kind is not None:  # do not wait for tasks whose results nobody wants
            for process in set(multiprocessing.active_children()) - self._strangers:
                process.terminate()
        self._executor.shutdown(cancel_futures=True)

    def map(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], weights: Sequence[int], title: str
    ) -> list[Result]:
        """The results in the tasks' order. `weights` (bytes, say) are what the progress bar counts.

        Raises:
            Whatever `function` raises first.
            UserError: A process was killed from outside.
        """
        results: dict[int, Result] = {}
        with _progress(title, sum(weights)) as advance:
            for i, result in self._run(function, tasks):
                results[i] = result
                advance(weights[i])
        return [results[i] for i in range(len(tasks))]

    def _run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        if self._workers == 1 or len(tasks) <= 1:
            for i, task in enumerate(tasks):
                yield i, function(task)
            return
        if self._executor is None:
            # spawn, since a fork would copy whatever threads hold here (the progress bar has one).
            context = multiprocessing.get_context("spawn")
            try:
                self._executor = ProcessPoolExecutor(self._workers, context, initializer=_start_worker)
            except OSError as error:  # where their locks are
                raise UserError(
                    f"--workers {self._workers}: no room for what worker processes share ({error.strerror}): free some of /dev/shm, or give --workers 1"
                ) from error
        futures: dict[Future[Result], int] = {self._executor.submit(function, task): i for i, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely for lack of memory: try fewer --workers"
            ) from error


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # A worker waits for tasks on a pipe that it holds open itself, so the death of the parent does not wake it.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda amount: progress.advance(bar, amount)
