"""What a run directory tells of its run. Files may be torn, damaged or from another version: what cannot be read is left out and counted."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlm_dist.errors import UserError
from mlm_dist.files import read_json
from mlm_dist.lifecycle import EXIT_HUNG
from mlm_dist.redact import redact
from mlm_dist.report import read
from mlm_dist.report.read import Record
from mlm_dist.watch_command import Heart, standing

# What ends an attempt, in the colours of the time line.
ENDS = ("finished", "running", "preempted", "cancelled", "stopped", "failed", "hung", "died")


@dataclass(frozen=True)
class Attempt:
    """One start of the run.

    Attributes:
        begin, end: Unix seconds of its first and last sign of life.
        first, last: the steps that it went on after, and that it got to.
        ended: one of ENDS; ``died``: without a word.
        repeated: steps after ``first`` of the next attempt, which had to be taken again.
    """

    number: int
    begin: float
    end: float
    first: int
    last: int
    ranks: int | None
    ended: str
    reason: str
    repeated: int


@dataclass
class Run:
    """What the report knows of a run.

    Attributes:
        records: metric records in the order they were written, those of steps that were taken again included.
        train, val: by step, of each step the last.
        restarts: the first logged step of each attempt but the first.
        attempts: those of which a time is known.
        checkpoints: (step, Unix seconds) of those kept.
        unigram_entropy: nats a token, the loss of a model that knows only how frequent each token is; None where not
            recorded.
        damaged: lines, or parts, that are not what their file should hold, by file.
    """

    name: str
    train: list[Record]
    val: list[Record]
    records: list[Record] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    checkpoints: list[tuple[int, float]] = field(default_factory=list)
    unigram_entropy: float | None = None
    status: Record = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    environment: Record = field(default_factory=dict)
    events: list[Record] = field(default_factory=list)
    jobs: list[Record] = field(default_factory=list)
    predictions: list[Record] = field(default_factory=list)
    damaged: dict[str, int] = field(default_factory=dict)


def number(value: Any) -> float | None:
    """``value`` where it is a number, and not too large for sums and pictures."""
    plain = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
    return float(value) if plain else None


def moment(record: Record) -> float | None:
    """When a record was written, in Unix seconds, where it tells a time before the year 10000."""
    seconds = number(record.get("time"))
    return seconds if seconds is not None and 0 <= seconds < 253402300800 else None


def whole(value: Any) -> int | None:
    """``value`` where it is a whole number that a float can hold."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def series(records: Iterable[Record], key: str, by: str = "step") -> tuple[list[float], list[float]]:
    """Values of ``by`` and of one metric, without the records that lack either."""
    kept = [(x, y) for r in records if (x := number(r.get(by))) is not None and (y := number(r.get(key))) is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def placed(records: Sequence[Record], key: str, known: Mapping[int, float]) -> list[Record]:
    """The records with ``key``, that of their step: a quantity that grows from 0 before the first step, ``known`` at some and between them
    interpolated; None where it is known at none.
    """
    import numpy as np

    if not known:
        return [{**r, key: None} for r in records]
    steps = sorted({0, *known})
    found = np.interp([r["step"] for r in records], steps, [known.get(step, 0.0) for step in steps])
    return [{**r, key: float(value)} for r, value in zip(records, found, strict=True)]


def load(run_dir: Path) -> Run:
    """Read a run directory; only ``metrics.jsonl`` must be there.

    Raises:
        UserError: not a run directory, or no metrics in it yet.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such directory; give a run directory, such as runs/demo")
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run writes it at its first logged step")
    damaged: dict[str, int] = {}

    def lines(name: str) -> list[Record]:
        found, damaged[name] = read.lines(run_dir / name)
        return found

    def whole_file(name: str) -> Record:
        found, damaged[name] = read.whole_file(run_dir / name)
        return found

    records = [r for r in lines(path.name) if r.get("kind") in ("train", "val") and whole(r.get("step")) is not None]
    if not records:
        raise UserError(f"{path}: no step logged yet")
    events = redact([e for e in lines("events.jsonl") if isinstance(e.get("kind"), str)])
    silence = Heart(run_dir / "lock").silence()  # first: of a run that ends in between, the status tells
    status = whole_file("status.json")
    if status.get("state") == "running" and (code := (now := standing(status, silence)).code) is not None:
        status |= {"state": "hung" if code == EXIT_HUNG else "died", "reason": now.state}
    config, damaged["config.yaml"] = read.config(run_dir)
    identity, damaged["identity.json"] = read.identity(run_dir)
    last = {(r["kind"], r["step"]): r for r in records}
    counted = sorted(last.values(), key=lambda r: r["step"])
    first: dict[int, int] = {}
    for record in counted:
        first.setdefault(whole(record.get("attempt")) or 1, record["step"])
    entropies = [v for r in [status, *counted, *events] if (v := number(r.get("unigram_entropy"))) is not None]
    return Run(
        name=run_dir.resolve().name,
        train=[r for r in counted if r["kind"] == "train"],
        val=[r for r in counted if r["kind"] == "val"],
        records=records,
        restarts=sorted(step for attempt, step in first.items() if attempt != min(first)),
        attempts=_attempts(run_dir, records, events, status),
        checkpoints=_checkpoints(run_dir),
        unigram_entropy=entropies[-1] if entropies else None,
        status=status,
        config=config,
        model=whole_file("model/config.json"),
        identity=identity,
        environment=whole_file("env.json"),
        events=events,
        jobs=redact([j for j in lines("jobs.jsonl") if isinstance(j.get("event"), str)]),
        predictions=[_prediction(p) for p in lines("predictions.jsonl") if isinstance(p.get("rows"), list)],
        damaged={name: count for name, count in damaged.items() if count},
    )


def _prediction(line: Record) -> Record:
    rows = [r for r in line["rows"] if isinstance(r, dict) and isinstance(r.get("predictions", []), list)]
    return {**line, "rows": rows}


def _checkpoints(run_dir: Path) -> list[tuple[int, float]]:
    found = []
    for path in sorted((run_dir / "checkpoints").glob("step_*/COMMIT")):
        trainer = read_json(path.parent / "trainer.json") or {}
        step, time = whole(trainer.get("step")), moment(trainer)
        if step is not None and time is not None:
            found.append((step, time))
    return sorted(found)


def _attempts(run_dir: Path, records: list[Record], events: list[Record], status: Record) -> list[Attempt]:
    by_attempt: dict[int, tuple[list[Record], list[Record]]] = {}
    for place, lines in enumerate((records, events)):
        for line in lines:
            if moment(line) is not None:
                by_attempt.setdefault(whole(line.get("attempt")) or 1, ([], []))[place].append(line)
    drafts = []
    for n, (logged, told) in sorted(by_attempt.items()):
        start: Record = next((e for e in told if e["kind"] == "attempt"), {})
        times = [t for line in (*logged, *told) if (t := moment(line)) is not None]
        first = whole(start.get("step"))
        ranks = whole(start.get("world_size"))
        if ranks is None:
            ranks = next((w for r in logged if (w := whole(r.get("world_size"))) is not None), None)
        ended, reason, step = _end(run_dir, n, told, status, is_last=n == max(by_attempt))
        last = [s for s in (step, logged[-1]["step"] if logged else None) if s is not None]
        first = first if first is not None else max(0, min((r["step"] for r in logged), default=0) - 1)
        drafts.append((n, min(times), max(times), first, max([first, *last]), ranks, ended, reason))
    firsts = [d[3] for d in drafts[1:]]
    return [
        Attempt(*draft, repeated=max(0, draft[4] - firsts[i]) if i < len(firsts) else 0)
        for i, draft in enumerate(drafts)
    ]


def _end(
    run_dir: Path, attempt: int, told: list[Record], status: Record, *, is_last: bool
) -> tuple[str, str, int | None]:
    """How an attempt ended, why, and at which step, as far as it is known."""
    for event in reversed(told):
        step, reason = whole(event.get("step")), str(event.get("reason") or "")
        if event["kind"] == "finished":
            return "finished", reason, step
        if event["kind"] == "hang":
            return "hung", reason, step
        if event["kind"] == "stopped":
            requeue = event.get("requeue")
            return "stopped" if requeue is None else "preempted" if requeue else "cancelled", reason, step
    state = status.get("state") if is_last else None
    known = state in ENDS
    if not known or state == "died":
        try:
            return "failed", redact((run_dir / "logs" / f"attempt_{attempt}.failed").read_text(errors="replace")), None
        except OSError:
            pass
    if known:
        return str(state), str(status.get("reason") or ""), whole(status.get("step"))
    return ("running", "", None) if is_last else ("died", "without a word", None)


@dataclass(frozen=True)
class Span:
    """The steps that a training record is of: those after ``after`` up to its own.

    Attributes:
        seconds: that they took, without pauses for validation and checkpoints.
        repeated: how many of them were taken again later.
    """

    record: Record
    after: int
    seconds: float
    repeated: int

    @property
    def steps(self) -> int:
        """How many."""
        return int(self.record["step"]) - self.after


def spans(run: Run) -> list[Span]:
    """Of all training records that tell how long a step took, in the order they were written."""
    firsts = {a.number: a.first for a in run.attempts}
    back = [(t, to) for e in run.events if e["kind"] == "rollback" and (t := moment(e)) is not None
            and (to := whole(e.get("to"))) is not None]  # fmt: skip
    before: dict[int, int] = {}
    out = []
    for record in run.records:
        seconds, time = number(record.get("step_time")), moment(record)
        if record["kind"] != "train":
            continue
        attempt, step = whole(record.get("attempt")) or 1, record["step"]
        after = before.get(attempt, firsts.get(attempt, step - 1))
        if after >= step:  # a roll-back lies between
            after = max((to for t, to in back if to < step and (time is None or t <= time)), default=step - 1)
        before[attempt] = step
        if seconds is None:
            continue
        floor = [first for n, first in firsts.items() if n > attempt]
        floor += [to for t, to in back if time is not None and t > time]
        repeated = min(step - after, max(0, step - min(floor, default=step)))
        out.append(Span(record, after, seconds * (step - after), repeated))
    return out


def account(run: Run) -> dict[str, float]:
    """Where the wall-clock time between the first and last sign of life went, in seconds; the parts add up to ``wall``.

    ``kept`` and ``repeated``: steps that count, and those that were taken again later; ``gaps``: between attempts; ``rest``: starts, validation,
    checkpoints, ends. Empty where no times are known.
    """
    if not run.attempts:
        return {}
    wall = max(a.end for a in run.attempts) - min(a.begin for a in run.attempts)
    gaps = sum(max(0.0, b.begin - a.end) for a, b in pairwise(run.attempts))
    kept = repeated = 0.0
    for span in spans(run):
        share = span.repeated / span.steps
        kept, repeated = kept + span.seconds * (1 - share), repeated + span.seconds * share
    rest = max(0.0, wall - gaps - kept - repeated)
    return {"wall": wall, "kept": kept, "repeated": repeated, "gaps": gaps, "rest": rest}


# A stall: steps that took this many times the median, or of which this share was waiting for data.
SLOW, WAITING = 2.5, 0.2


@dataclass(frozen=True)
class Stall:
    """Steps after ``first`` up to ``last`` that lost time.

    Attributes:
        cause: ``data`` or ``slow``.
        seconds: lost: waited for data, or beyond the median step.
    """

    first: int
    last: int
    cause: str
    seconds: float


def stalls(found: Sequence[Span]) -> list[Stall]:
    """The stalls of a run, by step; neighbours of one cause are one. An attempt's first record, in which everything warms up, is none."""
    middle = _median([s.seconds / s.steps for s in found])
    seen: set[int] = set()
    out: list[Stall] = []
    for span in found:
        attempt = whole(span.record.get("attempt")) or 1
        if attempt not in seen:
            seen.add(attempt)
            continue
        waited = (number(span.record.get("data_wait")) or 0.0) * span.steps
        if span.seconds > 0 and waited > WAITING * span.seconds:
            stall = Stall(span.after, span.record["step"], "data", waited)
        elif span.seconds > SLOW * middle * span.steps:
            stall = Stall(span.after, span.record["step"], "slow", span.seconds - middle * span.steps)
        else:
            continue
        if out and (out[-1].last, out[-1].cause) == (stall.first, stall.cause):
            stall = Stall(out[-1].first, stall.last, stall.cause, out[-1].seconds + stall.seconds)
            out.pop()
        out.append(stall)
    return out


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    n = len(ordered)
    return 0.0 if not n else (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
