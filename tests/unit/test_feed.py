"""The feeder: the stream's batches in their order, read ahead by a bounded number, errors in the loop's own thread."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mlm_dist.feed import Feeder

CPU = torch.device("cpu")


class Source:
    """Numbers that stand for batches; knows how many were taken, by which threads, and whether it was closed."""

    def __init__(self, stop: int | None = None):
        self.taken, self.threads, self.closed, self.stop = 0, [], threading.Event(), stop
        self.more = threading.Condition()

    def __call__(self) -> Iterator[Any]:
        try:
            while True:
                if self.taken == self.stop:
                    raise OSError("the disk is gone")
                self.threads.append(threading.current_thread().name)
                with self.more:
                    self.taken += 1
                    self.more.notify_all()
                yield self.taken - 1
        finally:
            self.closed.set()

    def wait_for(self, count: int) -> None:
        with self.more:
            assert self.more.wait_for(lambda: self.taken >= count, timeout=30)


def collate(number: Any) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.full((2, 3), number)}]


def test_all_batches_in_order_with_their_own_tensors() -> None:
    source = Source()
    with Feeder(source(), collate, CPU) as feeder:
        for wanted, (number, micro) in zip(range(50), feeder, strict=False):
            assert number == wanted and (micro[0]["input_ids"] == wanted).all()
    assert source.closed.is_set()
    # The first is read by the caller, so that loader workers are its children; the others while it works.
    assert source.threads[0] == threading.current_thread().name and set(source.threads[1:]) == {"feeder"}


def test_reads_ahead_but_not_without_bound() -> None:
    source = Source()
    with Feeder(source(), collate, CPU) as feeder:
        assert next(feeder)[0] == 0
        source.wait_for(3)  # one in the queue, one in the thread's hand, without being asked
        assert next(feeder)[0] == 1
        source.wait_for(4)
        assert source.taken <= 4
    assert source.closed.is_set()


def test_an_error_comes_where_its_batch_would_have_come() -> None:
    source = Source(stop=3)
    with Feeder(source(), collate, CPU) as feeder:
        assert [next(feeder)[0] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="the disk is gone"):
            next(feeder)
    first = Source(stop=0)
    with Feeder(first(), collate, CPU) as feeder, pytest.raises(OSError, match="the disk is gone"):
        next(feeder)


def test_leaving_early_ends_the_thread() -> None:
    source = Source()
    with pytest.raises(KeyboardInterrupt), Feeder(source(), collate, CPU) as feeder:
        next(feeder)
        raise KeyboardInterrupt
    assert source.closed.is_set()
    assert "feeder" not in {thread.name for thread in threading.enumerate()}
