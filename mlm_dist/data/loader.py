"""Loader workers: the processes that make a rank's rows. One that is killed is started again where it was.

Each has a pipe of its own. The workers of torch's ``DataLoader`` share one, whose lock stays taken for ever when a worker is killed
while it writes, which is what a worker does most of the time.
"""

import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np

from mlm_dist.data.lanes import Chunk, Plan, read_lanes, rounds_in_message

# Messages that a worker holds ready besides the one in its pipe.
PREFETCH = 1
# A worker that dies once more than so often in so many seconds is not started again.
RESTARTS, WITHIN_S = 3, 600.0
# One that is killed while it waits for a disk that is gone ends when that answers.
END_S = 5.0
# A process that another thread forks between these steps would hold the pipe open, and its worker's death would go unheard.
_FORKING = threading.Lock()
_CAUSES = {
    signal.SIGKILL: "the kernel does that when memory runs out, and says so in its log (dmesg)",
    signal.SIGBUS: "a file that it had mapped became shorter, or a disk or /dev/shm is full",
    signal.SIGSEGV: "a library crashed",
}


class WorkerLost(RuntimeError):
    """A loader worker died again and again, or could not be started again."""


def chunks_of_workers(
    plan: Plan,
    lanes: Sequence[int],
    first_row: int,
    cursors: np.ndarray,
    workers: int,
    died: Callable[[str], None],
) -> Iterator[Chunk]:
    """Endless chunks of all the lanes, as ``read_lanes`` gives them, made by so many processes. Worker j owns every n-th lane from the j-th on.

    Args:
        died: told, in words, of each worker that died and was started again.

    Raises:
        WorkerLost: one died more than RESTARTS times within WITHIN_S seconds, or no new one could be started.
        Exception: what a worker raised.
    """
    rounds = rounds_in_message(plan, -(-len(lanes) // workers))
    started: list[_Worker] = []
    try:
        for j in range(workers):
            started.append(_Worker(j, plan, lanes[j::workers], first_row, cursors, rounds, died))
        while True:
            yield Chunk.merge([worker.receive() for worker in started])
    finally:
        for worker in started:
            worker.end()


class _Worker:
    """One process and how far the rows are that came from it."""

    def __init__(
        self,
        number: int,
        plan: Plan,
        lanes: Sequence[int],
        first_row: int,
        cursors: np.ndarray,
        rounds: int,
        died: Callable[[str], None],
    ) -> None:
        self._number, self._plan, self._lanes, self._rounds, self._died = number, plan, lanes, rounds, died
        self._first_row, self._cursors = first_row, cursors.copy()
        self._deaths: deque[float] = deque(maxlen=RESTARTS + 1)
        self._start()

    def receive(self) -> Chunk:
        """Its next message."""
        while True:
            try:
                answer = self._pipe.recv()
                break
            except (EOFError, OSError):  # also in the middle of a message
                self._restart()
        if isinstance(answer, BaseException):
            raise answer
        total = self._plan.order.lanes
        self._first_row = (self._first_row // total + self._rounds) * total
        self._cursors[answer.index % total] = answer.cursors  # rows are in order, so a lane's last stays
        chunk: Chunk = answer
        return chunk

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join(END_S)
        self._pipe.close()

    def _start(self) -> None:
        context = get_context("fork")
        with _FORKING:
            pipe, theirs = context.Pipe(duplex=False)
            args = (theirs, self._plan, self._lanes, self._first_row, self._cursors, self._rounds)
            process = context.Process(target=_work, args=args, name=f"loader-{self._number}", daemon=True)
            try:
                process.start()
            except BaseException:
                pipe.close()
                raise
            finally:
                theirs.close()
        self._pipe, self._process = pipe, process

    def _restart(self) -> None:
        self._process.join()
        what = f"loader worker {self._number} (process {self._process.pid}) {_how(self._process.exitcode)}"
        self._pipe.close()
        self._deaths.append(time.monotonic())
        if len(self._deaths) > RESTARTS and self._deaths[-1] - self._deaths[0] < WITHIN_S:
            raise WorkerLost(
                f"{what}, for the {len(self._deaths)}th time within {WITHIN_S:g} s. Fewer data.workers, or none, need less memory."
            )
        try:
            self._start()
        except OSError as error:
            raise WorkerLost(f"{what}, and no new one could be started: {error.strerror}") from error
        self._died(what)


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    number = signal.Signals(-code)
    cause = f" ({_CAUSES[number]})" if number in _CAUSES else ""
    return f"was killed by {number.name}{cause}"


def _work(pipe: Connection, plan: Plan, lanes: Sequence[int], first_row: int, cursors: np.ndarray, rounds: int) -> None:
    """A worker's life: makes chunks while a thread hands them over."""
    _leave_signals_to_the_rank()
    ready: queue.Queue[Chunk | BaseException] = queue.Queue(PREFETCH)
    sender = threading.Thread(target=_send, args=(pipe, ready))
    sender.start()
    try:
        for chunk in read_lanes(plan, lanes, first_row, cursors, rounds):
            ready.put(chunk)
    except BaseException as error:
        ready.put(_portable(error))
    sender.join()


def _send(pipe: Connection, ready: "queue.Queue[Chunk | BaseException]") -> None:
    message: Chunk | BaseException | None = None
    try:
        while not isinstance(message, BaseException):
            message = ready.get()
            pipe.send(message)
    except BrokenPipeError:  # nobody wants more
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # else the rank would wait for ever; in the place of a worker that ended it starts another


def _portable(error: BaseException) -> BaseException:
    """The error as it can be raised in another process, with the traceback that it has here."""
    trace = traceback.format_exc()
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # some cannot be made again from what they were made of
        return RuntimeError(trace)
    error.add_note(f"In a loader worker:\n{trace}")
    return error


def _leave_signals_to_the_rank() -> None:
    """Signals that reach all processes of a job are for the rank, which may need its workers to come to a checkpoint."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with(parent: int) -> None:
    """Ends this worker when the rank says so, or is gone: left to itself it would wait for ever to hand over its messages."""
    told = None
    while os.getppid() == parent and (told is None or told.si_pid != parent):
        told = signal.sigtimedwait({signal.SIGTERM}, 1.0)
    os._exit(128 + signal.SIGTERM)
