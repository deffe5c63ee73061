"""What every contestant of the step benchmark does alike: train in turns, count what it trained on, and take note of its memory."""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch


class Counts(NamedTuple):
    """What a step trained on.

    Attributes:
        tokens: that are no padding, the useful ones.
        places: tokens with padding.
        attended: pairs of a useful token and a token that it sees.
        selected: tokens to predict.
    """

    tokens: int
    places: int
    attended: int
    selected: int

    def __add__(self, other: "Counts") -> "Counts":  # type: ignore[override]
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def counts_of(batch: Any) -> Counts:
    """Of a transformers batch on the host, whose rows see all of themselves; without an attention mask nothing is padding."""
    ids = batch["input_ids"]
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
    lengths = mask.sum(1)
    return Counts(int(lengths.sum()), ids.numel(), int((lengths * lengths).sum()), int((batch["labels"] != -100).sum()))


def is_near(total: int, last: int, target: int) -> bool:
    """Whether ``total`` tokens are as near to ``target`` as steps of ``last`` tokens come."""
    return target - total <= last / 2


class Memory:
    """Peak memory of this process since ``begin``, in MB.

    On CUDA the device's, by torch's count; else what the resident set grew by, and what the loader workers hold for themselves.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._before = 0

    def begin(self) -> None:
        """Before the model is built: imports and the data are there and do not count."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
            self._before = _status_kb("VmRSS")

    def peak_mb(self) -> float:
        """See the class."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        workers = sum(child.memory_full_info().uss for child in psutil.Process().children(recursive=True))
        return (_status_kb("VmHWM") - self._before) / 2**10 + workers / 2**20


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Turns:
    """The contestant's side of the benchmark. ``begin`` when all is ready for the first step, ``trained`` after each.

    Both wait until it is this contestant's turn; at the end ``memory_mb`` is the peak until then. An order is a line of JSON: {"steps": N},
    {"tokens": N} (go on until N useful tokens have been trained on in all) or {"end": true}. The answer to a turn: seconds, those of this
    process on CPUs, steps, the counts, and the seconds of each part of the steps.

    Args:
        orders: gives the next order.
        answer: takes what came of it.
    """

    def __init__(
        self, device: torch.device, orders: Callable[[], dict[str, Any]], answer: Callable[[dict[str, Any]], None]
    ):
        self.memory = Memory(device)
        self.total = Counts(0, 0, 0, 0)
        self._device, self._orders, self._answer = device, orders, answer
        self._created = time.perf_counter()

    def begin(self) -> None:
        """Everything is set up."""
        self._answer({"set_up_s": time.perf_counter() - self._created})
        self._next()

    def trained(self, counts: Counts) -> bool:
        """A step is done. Returns whether to take another one."""
        self.total += counts
        if self._cold:
            self._synchronize()
            self._restart()
            return True
        self._turn, self._steps = self._turn + counts, self._steps + 1
        if "steps" in self._order:
            over = self._steps >= self._order["steps"]
        else:
            over = is_near(self.total.tokens, counts.tokens, self._order["tokens"])
        if over:
            self._synchronize()
            seconds = time.perf_counter() - self._since
            for name, begun, ended in self._events:
                self._spans[name] += begun.elapsed_time(ended) / 1000
            cpu = time.process_time() - self._cpu_since
            self._answer(
                {"seconds": seconds, "cpu_s": cpu, "steps": self._steps, **self._turn._asdict(), "parts": self._spans}
            )
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # others share the device
            return self._next()
        return True

    @contextlib.contextmanager
    def span(self, name: str, on_host: bool = False) -> Iterator[None]:
        """A part of the step; on CUDA its time on the device, unless it is the host's that counts."""
        if self._device.type == "cuda" and not on_host:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            yield
            ended.record()
            self._events.append((name, begun, ended))
        else:
            since = time.perf_counter()
            yield
            self._spans[name] += time.perf_counter() - since

    def timed(self, owner: Any, method: str, name: str) -> None:
        """Make calls of ``owner.method`` a span."""
        inner = getattr(owner, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)

    def _next(self) -> bool:
        self._order = self._orders()
        self._restart()
        # The first step of a turn allocates again what was given to the others, so it is not timed.
        self._cold = self._device.type == "cuda"
        if "end" not in self._order:
            return True
        self.memory_mb = self.memory.peak_mb()
        return False

    def _restart(self) -> None:
        """The time and the counts of a turn begin here."""
        self._cold = False
        self._turn, self._steps = Counts(0, 0, 0, 0), 0
        self._spans: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since, self._cpu_since = time.perf_counter(), time.process_time()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def pipes(orders: Any, answers: Any) -> tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]]:
    """Orders and answers over two text files; when the first ends, so does the training."""

    def read() -> dict[str, Any]:
        return json.loads(orders.readline() or '{"end": true}')

    def write(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    return read, write
