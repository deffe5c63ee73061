"""How a run stands, and how that looks: the same on rank 0's terminal, in a log, and in ``mlm-dist watch``.

``view_of`` makes a ``View`` of records, and knows no terminal; ``line`` and ``panel`` show one, and know no records.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlm_dist.records import Record
from mlm_dist.report.words import duration

WINDOW = 100  # the last records, whose pace tells the time that is left
BLOCKS = "▁▂▃▄▅▆▇█"
SPARK = 48
# Kinds of events that a person should see, and how they are told.
_EVENTS = {
    "rollback": "back to step {to}: {why}",
    "skipped_step": "skipped: {why}",
    "data_loss": "lost {documents} document(s) of {shard}: {cause}",
    "checkpoint_failed": "the checkpoint could not be written: {reason}",
    "straggler": "rank {rank} on {host} is slow in {cause}",
    "straggler_gone": "rank {rank} on {host} is no longer slow in {cause}",
    "replay_differs": "replayed with another loss",
    "worker_restarted": "rank {rank}: {what}",
    "hang": "{reason}",
    "wandb": "{message}",
    "tensorboard": "{message}",
    "stopped": "stopped: {reason}",
}


@dataclass(frozen=True)
class View:
    """How a run stands. What is not known is None.

    Attributes:
        progress: share that is done, in [0, 1]; ``left``: seconds until the end.
        losses: of the logged steps, the oldest first.
        data_share: of a step's time that rank 0 waits for data, in [0, 1].
        memory: GiB, peak on rank 0.
        slowest: the host, or rank, whose own time is longest, and by how many seconds a step.
        validation: the last one, as a record.
        checkpoint_in: steps to the next checkpoint.
        event: the last one that a person should see: (step or None, what happened).
        age: seconds since the last logged step.
    """

    step: int
    steps: int | None
    attempt: int | None
    epoch: float | None
    progress: float
    left: float | None
    loss: float | None
    losses: Sequence[float]
    lr: float | None
    tokens_per_s: float | None
    mfu: float | None
    data_share: float | None
    memory: float | None
    slowest: tuple[str, float] | None
    validation: Record | None
    checkpoint_in: int | None
    event: tuple[int | None, str] | None
    age: float | None


def view_of(
    train: Sequence[Record],
    *,
    losses: Sequence[float],
    validation: Record | None = None,
    event: Record | None = None,
    steps: int | None = None,
    checkpoint_every: int | None = None,
    now: float | None = None,
) -> View:
    """The view of a run.

    Args:
        train: its last training records, by step; at least one.
        losses: of all of them, for the curve.
        event: the last one that ``worth_showing``.
        now: Unix seconds.
    """
    last = train[-1]
    step, data, each = last["step"], last.get("data_wait"), last.get("step_time")
    excess, who = last.get("slowest_excess"), last.get("slowest_host")
    ends = steps is not None and step >= steps
    return View(
        step=step,
        steps=steps,
        attempt=last.get("attempt"),
        epoch=last.get("epoch"),
        progress=last.get("progress") or 0.0,
        left=_left(train[-WINDOW:], steps),
        loss=last.get("loss"),
        losses=losses,
        lr=last.get("lr"),
        tokens_per_s=last.get("tokens_per_s"),
        mfu=last.get("mfu"),
        data_share=None if data is None or not each else min(1.0, data / each),
        memory=last.get("memory_gib"),
        slowest=None if excess is None or who is None else (f"{who} rank {last.get('slowest_rank')}", excess),
        validation=validation,
        checkpoint_in=checkpoint_every - step % checkpoint_every if checkpoint_every and not ends else None,
        event=None if event is None else (event.get("step"), told(event)),
        age=None if now is None or "time" not in last else max(0.0, now - last["time"]),
    )


def _left(train: Sequence[Record], steps: int | None) -> float | None:
    """Seconds until the end, at the pace of the last records of this attempt, with its validations and checkpoints."""
    last = train[-1]
    progress = last.get("progress") or 0.0
    if progress >= 1:
        return 0.0
    first = next(r for r in train if r.get("attempt") == last.get("attempt"))
    done = progress - (first.get("progress") or 0.0)
    if done > 0:
        return float((last["time"] - first["time"]) * (1 - progress) / done)
    if steps is not None and last.get("step_time"):
        return float(last["step_time"] * (steps - last["step"]))
    return None


def worth_showing(event: Record) -> bool:
    """Whether a person who looks at a run should see the event."""
    return event.get("kind") in _EVENTS


def told(event: Record) -> str:
    """An event in one line of printable characters."""

    class Known(dict[str, Any]):
        def __missing__(self, _key: str) -> str:
            return "?"

    return printable(_EVENTS[event["kind"]].format_map(Known(event)))


def printable(text: str) -> str:
    """In one line, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def sparkline(values: Sequence[float], width: int = SPARK) -> str:
    """A curve of at most ``width`` characters, each the mean of as many values (give or take one)."""
    if not values:
        return ""
    n = min(width, len(values))
    cuts = [i * len(values) // n for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((m - low) * scale)] for m in means)


def line(view: View) -> str:
    """For a log: one line of plain characters."""
    parts = [
        f"epoch {view.epoch:6.2f}" if view.epoch is not None else None,
        f"step {view.step}" + (f"/{view.steps}" if view.steps else ""),
        "loss nan" if view.loss is None else f"loss {view.loss:.4f}",
        None if view.lr is None else f"lr {view.lr:.2e}",
        None if view.tokens_per_s is None else f"{view.tokens_per_s:,.0f} tokens/s",
        None if view.mfu is None else f"MFU {view.mfu:.1%}",
        None if view.left is None else f"left {duration(view.left)}",
        f"done {view.progress:.0%}",
        None if view.data_share is None else f"data wait {view.data_share:.0%}",
        None if view.memory is None else f"memory {view.memory:.1f} GiB",
        None if view.slowest is None else f"slowest {view.slowest[0][-30:]} +{view.slowest[1]:.3f} s",
        None if view.checkpoint_in is None else f"checkpoint in {view.checkpoint_in}",
    ]
    return "  ".join(part for part in parts if part)


def panel(view: View, title: str, *, state: str = "", trouble: bool = False) -> RenderableType:
    """For a terminal.

    Args:
        title: the run's name.
        state: how it stands beyond its numbers, such as finished or without heartbeat; ``trouble``: that is bad.
    """
    head = Text(f"step {view.step:,}" + (f" / {view.steps:,}" if view.steps else ""), style="bold")
    head.append(f"   {view.progress:.1%}", style="bold")
    if view.epoch is not None:
        head.append(f"   epoch {view.epoch:.2f}")
    if view.left:
        head.append(f"   left {duration(view.left)}")
    bar = Table.grid(expand=True)  # by itself it does not end its line
    bar.add_row(ProgressBar(total=1.0, completed=view.progress))
    grid = Table.grid(padding=(0, 2))
    for label, value in _facts(view):
        grid.add_row(Text(label, style="dim"), value)
    lines: list[RenderableType] = [head, bar, grid]
    if state:
        lines.append(Text(state, style="bold red" if trouble else "bold green"))
    attempt = "" if view.attempt is None else f"attempt {view.attempt}"
    return Panel(
        Group(*lines),
        title=Text(title),
        title_align="left",
        subtitle=attempt,
        subtitle_align="right",
        border_style="red" if trouble else "cyan",
    )


def _facts(view: View) -> list[tuple[str, Text]]:
    loss = Text("nan" if view.loss is None else f"{view.loss:.4f}", style="bold")
    loss.append(f"  {sparkline(view.losses)}", style="cyan")
    loss.append("" if view.lr is None else f"  lr {view.lr:.2e}", style="dim")
    facts = [("loss", loss)]
    if view.validation is not None and view.validation.get("loss") is not None:
        v = view.validation
        facts.append(
            ("validation", Text(f"{v['loss']:.4f}  accuracy {v.get('accuracy') or 0:.1%}  at step {v['step']:,}"))
        )
    speed = [
        None if view.tokens_per_s is None else f"{view.tokens_per_s:,.0f} useful tokens/s",
        None if view.mfu is None else f"MFU {view.mfu:.1%}",
        None if view.data_share is None else f"data wait {view.data_share:.1%}",
    ]
    facts.append(("speed", Text("   ".join(part for part in speed if part))))
    if view.memory is not None:
        facts.append(("memory", Text(f"{view.memory:.2f} GiB peak on rank 0")))
    if view.slowest is not None:
        facts.append(("slowest", Text(f"{view.slowest[0]}, {view.slowest[1]:.3f} s a step more than the median")))
    if view.checkpoint_in is not None:
        facts.append(("checkpoint", Text(f"in {view.checkpoint_in:,} steps")))
    if view.age is not None and view.age > 10:
        facts.append(("last step", Text(f"{duration(view.age)} ago")))
    if view.event is not None:
        step, what = view.event
        at = "" if step is None else f"step {step}: "
        facts.append(("event", Text(f"{at}{what}", style="yellow", overflow="ellipsis", no_wrap=True)))
    return facts


class History:
    """What a view is made of, taken in line by line, with what a restart replays in the place of what it was.

    Attributes:
        train: the last training records, by step.
        losses: of all logged steps, NaN left out.
    """

    def __init__(self) -> None:
        self.train: list[Record] = []
        self.losses: list[float] = []
        self._steps: list[int] = []  # of losses
        self._validation: Record | None = None
        self._event: Record | None = None

    def add(self, record: Record) -> None:
        """A line of ``metrics.jsonl``."""
        if record["kind"] == "val":
            self._validation = record
        if record["kind"] != "train":
            return
        # New lists, for a thread may be making a view of the old ones.
        self.train = [*(r for r in self.train[-2 * WINDOW :] if r["step"] < record["step"]), record]
        if self._steps and self._steps[-1] >= record["step"]:
            kept = bisect_left(self._steps, record["step"])
            self._steps, self.losses = self._steps[:kept], self.losses[:kept]
        if record.get("loss") is not None:
            self._steps.append(record["step"])
            self.losses.append(record["loss"])

    def add_event(self, event: Record) -> None:
        """A line of ``events.jsonl``."""
        if worth_showing(event):
            self._event = event

    def view(self, *, steps: int | None, checkpoint_every: int | None) -> View | None:
        """How the run stands now; None before its first logged step."""
        if not self.train:
            return None
        return view_of(
            self.train,
            losses=self.losses,
            validation=self._validation,
            event=self._event,
            steps=steps,
            checkpoint_every=checkpoint_every,
            now=time.time(),
        )


class Cadence:
    """When a log gets its next line: each at first, then fewer, from 25 minutes on one in 30 s."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._last = -30.0 + self._begun

    def due(self) -> bool:
        """Whether it is time; then the next one's time begins."""
        now = time.monotonic()
        if now - self._last < min(30.0, (now - self._begun) / 50):
            return False
        self._last = now
        return True
