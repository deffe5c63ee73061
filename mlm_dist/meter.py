"""How fast a run goes, how much of its devices it uses, and how much memory it takes."""

import contextlib
import resource
import time
from collections.abc import Callable, Iterator

import torch

from mlm_dist.clock import PHASES, StepClock


class Meter:
    """Time and work between two logging steps. Pauses do not count.

    Args:
        clock: of this rank's phases.
        flops: (tokens, attended pairs, selected tokens) to floating-point operations of training on them.
        world_size: devices that share the work.
        peak: FLOP/s of one device at best, or None where it is not known.
    """

    def __init__(
        self, clock: StepClock, flops: Callable[[int, int, int], float], *, world_size: int, peak: float | None
    ):
        self._clock, self._flops, self._world_size, self._peak = clock, flops, world_size, peak
        self._since = self._begun = time.perf_counter()
        self._wait = self._waited = 0.0  # since the last read, since the beginning
        self._counts = [0, 0, 0, 0]  # steps, tokens, attended pairs, selected tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for data."""
        begun = time.perf_counter()
        with self._clock.position.within("data"):
            yield
        waited = time.perf_counter() - begun
        self._wait, self._waited = self._wait + waited, self._waited + waited

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is not training."""
        begun = time.perf_counter()
        with self._clock.paused():
            yield
        paused = time.perf_counter() - begun
        self._since, self._begun = self._since + paused, self._begun + paused

    def count(self, tokens: int, attended: int, selected: int) -> None:
        """A step was taken, over all ranks on so many tokens without padding, (query, key) pairs of them, and predicted tokens."""
        for i, n in enumerate((1, tokens, attended, selected)):
            self._counts[i] += n

    def so_far(self) -> dict[str, float]:
        """Seconds since the beginning: by phase (see ``StepClock.so_far``), "data", and "span", the whole without pauses. Waits for nothing."""
        return {**self._clock.so_far(), "data": self._waited, "span": time.perf_counter() - self._begun}

    def read(self) -> dict[str, float]:
        """What happened since the last call; waits for the device once.

        Returns:
            tokens_per_s, over all ranks; step_time, and of it this rank's data_wait and ``time_PHASE``, in seconds per
            step; tflops, useful TFLOP/s of one device (no padding, nothing that is computed again); mfu, its share of
            the peak, where that is known.
        """
        phases = self._clock.read()
        span = max(1e-9, time.perf_counter() - self._since)
        steps, tokens, attended, selected = self._counts
        rate = self._flops(tokens, attended, selected) / span / self._world_size
        out = {
            "tokens_per_s": tokens / span,
            "step_time": span / max(1, steps),
            "data_wait": self._wait / max(1, steps),
            **{f"time_{phase}": phases.get(phase, 0.0) / max(1, steps) for phase in PHASES},
            "tflops": rate / 1e12,
        }
        if self._peak is not None:
            out["mfu"] = rate / self._peak
        self._since, self._wait, self._counts = time.perf_counter(), 0.0, [0, 0, 0, 0]
        return out


def restart_peak_memory(device: torch.device) -> None:
    """From here on ``peak_memory_gib`` is of what comes, where the system can tell: not of trials before the run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: the device's on CUDA, the process's on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
