"""The picture of a run in wall-clock time: its attempts, how far each got, and what happened in them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_dist.report.run import Attempt, Record, Run, moment, spans, whole
from mlm_dist.report.style import COLOURS, MUTED, TRAIN, picture, thin, title
from mlm_dist.report.words import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# How an attempt ended, its colour and that of the words on it.
_GOOD, _AWAITED, _STOPPED, _BAD = (
    (COLOURS[2], "white"),
    (COLOURS[4], "black"),
    (COLOURS[1], "black"),
    (COLOURS[5], "white"),
)
_ENDS: Mapping[str, tuple[str, str]] = {
    "finished": _GOOD,
    "running": _AWAITED,
    **dict.fromkeys(("preempted", "cancelled", "stopped"), _STOPPED),
    **dict.fromkeys(("failed", "hung", "died"), _BAD),
}
_NAMES = {_GOOD: "finished", _AWAITED: "running", _STOPPED: "stopped on request", _BAD: "failed, hung or died"}
# Lanes of marks from the top: name, kinds of events, marker, colour. What has no lane here goes to the last.
_LANES: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("checkpoint kept", (), "D", COLOURS[2]),
    ("checkpoint failed", ("checkpoint_failed",), "X", COLOURS[5]),
    ("hang", ("hang",), "X", COLOURS[5]),
    ("roll-back", ("rollback",), "<", COLOURS[5]),
    ("step skipped", ("skipped_step",), "x", COLOURS[5]),
    ("documents lost", ("data_loss", "val_data_loss"), "v", COLOURS[3]),
    ("worker restarted", ("worker_restarted",), "^", COLOURS[1]),
    ("slow rank", ("straggler",), "s", COLOURS[1]),
    ("slow no longer", ("straggler_gone",), "s", COLOURS[4]),
    ("SLURM job", (), "|", MUTED),
    ("other event", (), "o", MUTED),
)
# Shown by the attempts themselves.
_BARS = ("attempt", "finished", "stopped")


def marks(run: Run) -> dict[str, list[float]]:
    """Unix seconds of what is marked, by the lane's name, from the top; lanes without marks are left out."""
    lane = {kind: name for name, kinds, _, _ in _LANES for kind in kinds}
    found: dict[str, list[float]] = {name: [] for name, *_ in _LANES}
    found["checkpoint kept"] = [time for _, time in run.checkpoints]
    for event in run.events:
        if (time := moment(event)) is not None and event["kind"] not in _BARS:
            found[lane.get(event["kind"], "other event")].append(time)
    found["SLURM job"] = [t for j in run.jobs if (t := moment(j)) is not None]
    return {name: times for name, times in found.items() if times}


def draw_timeline(run: Run, path: Path) -> bool:
    """Draw it into a PNG; False, and none, where no times are known."""
    if not run.attempts:
        return False
    lanes = marks(run)
    begin, end = min(a.begin for a in run.attempts), max(a.end for a in run.attempts)
    times = [t for ts in lanes.values() for t in ts]
    begin, end = min([begin, *times]), max([end, begin + 1, *times])
    margin = 0.01 * (end - begin)
    heights = [1.5, 0.36, 0.22 * max(1, len(lanes))]
    height = sum(heights) + 1.25
    with picture(path, 10.5, height) as figure:
        grid = figure.add_gridspec(3, 1, height_ratios=heights, left=0.16, right=0.955, top=1 - 0.36 / height,
                                   bottom=0.42 / height, hspace=0.5 / (sum(heights) / 3))  # fmt: skip
        steps = figure.add_subplot(grid[0])
        bars = figure.add_subplot(grid[1], sharex=steps)
        events = figure.add_subplot(grid[2], sharex=steps)
        _draw_steps(steps, run)
        _draw_attempts(bars, run.attempts, end - begin)
        _draw_marks(events, lanes)
        for axes in (bars, events):
            axes.grid(False)
        for axes in (steps, bars):
            axes.tick_params(labelbottom=False, bottom=False)
        steps.set_xlim(_date(begin - margin), _date(end + margin))  # type: ignore[arg-type]
        _set_clock(events)
    return True


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _set_clock(axes: "Axes") -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(tz=UTC, minticks=4, maxticks=9)
    axes.xaxis.set_major_locator(locator)
    formatter = ConciseDateFormatter(locator, tz=UTC)
    axes.xaxis.set_major_formatter(formatter)


def _draw_steps(axes: "Axes", run: Run) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    title(axes, "Step", "times in UTC")

    def key(r: Record) -> tuple[int, int, float | None]:
        return whole(r.get("attempt")) or 1, r["step"], moment(r)

    again = {key(s.record) for s in spans(run) if s.repeated}
    by_attempt: dict[int, list[Record]] = {}
    for r in run.records:
        if r["kind"] == "train" and moment(r) is not None:
            by_attempt.setdefault(whole(r.get("attempt")) or 1, []).append(r)
    lost = None
    for records in by_attempt.values():
        flags = [key(r) in again for r in records]
        begin = 0
        for is_lost, stretch in groupby(flags):  # of steps that count or not; each joins the one before
            end = begin + len(list(stretch))
            shown = records[max(0, begin - 1) : end]
            xs, ys = thin([float(r["time"]) for r in shown], [float(r["step"]) for r in shown])
            colour, marker = COLOURS[5] if is_lost else TRAIN, "o" if len(xs) == 1 else None
            (line,) = axes.plot([_date(x) for x in xs], ys, color=colour, linewidth=1.8, marker=marker, markersize=4)  # type: ignore[arg-type]
            lost, begin = line if is_lost else lost, end
    if lost is not None:
        axes.legend([lost], ["steps taken again later"], loc="upper left")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v < 1e5 else short(v)))


def _draw_attempts(axes: "Axes", attempts: list[Attempt], wall: float) -> None:
    from matplotlib.dates import date2num
    from matplotlib.patches import Patch

    title(axes, "Attempts")
    ends = {_ENDS[a.ended][0]: Patch(color=_ENDS[a.ended][0], label=_NAMES[_ENDS[a.ended]]) for a in attempts}
    axes.legend(handles=list(ends.values()), loc="lower right", bbox_to_anchor=(1.0, 0.9), ncols=4, fontsize=8,
                handlelength=1.2)  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    for a in attempts:
        colour, ink = _ENDS[a.ended]
        left, right = date2num(_date(a.begin)), date2num(_date(max(a.end, a.begin + 0.002 * wall)))
        axes.barh(0.5, right - left, height=0.9, left=left, color=colour, edgecolor="white", linewidth=0.6)
        again = f", {a.repeated} steps again" if a.repeated else ""
        room = (a.end - a.begin) / wall * 140  # characters that the bar has room for
        texts = (f"{a.number}: {a.ended}{again}", f"{a.number}: {a.ended}", str(a.number))
        text = next((t for t in texts if len(t) + 2 <= room), "")
        axes.text((left + right) / 2, 0.48, text, ha="center", va="center", fontsize=8, color=ink, clip_on=True)


def _draw_marks(axes: "Axes", lanes: Mapping[str, list[float]]) -> None:
    from matplotlib.dates import date2num

    title(axes, "Events" if lanes else "No events")
    names = list(lanes)
    axes.set_ylim(len(names) - 0.4 if names else 1, -0.6)
    axes.set_yticks(range(len(names)), [f"{n} ({len(lanes[n]):,})" for n in names])
    looks = {name: (marker, colour) for name, _, marker, colour in _LANES}
    for i, name in enumerate(names):
        marker, colour = looks[name]
        axes.axhline(i, color="#eef1f4", linewidth=0.8, zorder=0)
        times = date2num([_date(t) for t in lanes[name]])
        thick = 1.4 if marker in "x|" else 0.4
        edge = {} if marker in "x|" else {"edgecolor": "white"}
        axes.scatter(times, [i] * len(times), marker=marker, s=26, color=colour, linewidth=thick, **edge)  # type: ignore[arg-type]
