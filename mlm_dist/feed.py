"""Batches one step ahead: while the device works on one, a thread collates the next, pins it and begins its copy."""

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

import torch

from mlm_dist.data.stream import Batch
from mlm_dist.micro_batch import MicroBatch, on_device

# A thread that waits for slow storage when the run stops is left behind after this long; it ends with the process.
JOIN_S = 5.0


class Fed(NamedTuple):
    """A batch and its tensors on the device.

    Attributes:
        ready: on CUDA, the event behind its copies; None elsewhere.
    """

    batch: Batch
    micro_batches: list[MicroBatch]
    ready: "torch.cuda.Event | None"


class Feeder:
    """Iterates over (batch, micro-batches on ``device``), in the order of ``batches``, which it reads one ahead.

    Args:
        batches: the stream's; the first is read by the caller's thread, so that loader workers are forked by it.
        collate: a batch to its micro-batches on the host.
    """

    def __init__(
        self, batches: Iterator[Batch], collate: Callable[[Batch], list[MicroBatch]], device: torch.device
    ) -> None:
        self._batches, self._collate, self._device = batches, collate, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queue: queue.Queue[Fed | BaseException] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread is not None:
            while self._thread.is_alive() and not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(JOIN_S)
        if self._thread is None or not self._thread.is_alive():
            getattr(self._batches, "close", lambda: None)()

    def __iter__(self) -> "Feeder":
        return self

    def __next__(self) -> tuple[Batch, list[MicroBatch]]:
        if self._thread is None:
            fed: Fed | BaseException = self._prepare(next(self._batches))
            self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
            self._thread.start()
        else:
            fed = self._queue.get()
        if isinstance(fed, BaseException):
            raise fed
        if fed.ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(fed.ready)
            for micro_batch in fed.micro_batches:
                for value in micro_batch.values():
                    if isinstance(value, torch.Tensor):  # else its memory could be given away while it is read here
                        value.record_stream(current)
        return fed.batch, fed.micro_batches

    def _prepare(self, batch: Batch) -> Fed:
        micro_batches = self._collate(batch)
        if self._copies is None:
            return Fed(batch, micro_batches, None)
        with torch.cuda.stream(self._copies):
            micro_batches = [on_device(micro_batch, self._device, pin=True) for micro_batch in micro_batches]
            return Fed(batch, micro_batches, self._copies.record_event())

    def _run(self) -> None:
        try:
            if self._copies is not None:
                # A new thread stands on device 0, where it would make a context of its own for every rank of the node.
                torch.cuda.set_device(self._device)
                torch.set_num_threads(1)
            while not self._closed.is_set():
                self._put(self._prepare(next(self._batches)))
        except BaseException as error:  # the loop raises it, in its own thread
            self._put(error)

    def _put(self, fed: Fed | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(fed, timeout=0.1)
                return
            except queue.Full:
                continue
