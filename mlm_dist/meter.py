"""How fast it goes and how much memory it takes."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch


class Meter:
    """Time between two logging steps: waiting for data, per step, and useful tokens per second. Pauses do not count."""

    def __init__(self, step: int, tokens: int):
        self._step, self._tokens, self._wait = step, tokens, 0.0
        self._since = self._mark = time.perf_counter()

    def wait_begins(self) -> None:
        """The loop asks for data."""
        self._mark = time.perf_counter()

    def wait_ends(self) -> None:
        """The data is there."""
        self._wait += time.perf_counter() - self._mark

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is not training."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def read(self, step: int, tokens: int) -> tuple[float, float, float]:
        """(seconds waited for data per step, seconds per step, tokens per second) since the last call."""
        now = time.perf_counter()
        steps, span = max(1, step - self._step), max(1e-9, now - self._since)
        out = self._wait / steps, span / steps, (tokens - self._tokens) / span
        self._step, self._tokens, self._wait, self._since = step, tokens, 0.0, now
        return out


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: the device's on CUDA, the process's on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
