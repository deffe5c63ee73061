"""The picture of several runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_dist.report.run import Record, Run, number, placed, series, spans
from mlm_dist.report.style import COLOURS, count_steps, few_markers, nothing, picture, smoothed, title
from mlm_dist.report.words import plural, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)))


def names(runs: Sequence[Run], paths: Sequence[Path]) -> list[str]:
    """What to call each: its name, or where that is not its own, its path."""
    plain = [run.name for run in runs]
    return [n if plain.count(n) == 1 else str(p) for n, p in zip(plain, paths, strict=True)]


def timed(run: Run) -> list[Record]:
    """The run's records with ``tokens`` and ``minutes``: training time up to each step, without pauses between attempts and steps taken again."""
    seconds, at = 0.0, dict[int, float]()
    for span in spans(run):
        seconds += span.seconds * (1 - span.repeated / span.steps)
        at[span.record["step"]] = seconds / 60
    tokens = {r["step"]: t for r in run.train if (t := number(r.get("tokens"))) is not None}
    return placed(placed([*run.train, *run.val], "minutes", at), "tokens", tokens)


def draw_comparison(runs: Sequence[Run], labels: Sequence[str], path: Path) -> None:
    """Validation and training loss of each by step, by tokens and by training time, and throughput, into a PNG."""
    with picture(path, 10.5, 7.2) as figure:
        legend = 0.045 * -(-len(runs) // 3)
        grid = figure.add_gridspec(
            2, 6, left=0.055, right=0.978, top=0.945 - legend, bottom=0.07, hspace=0.35, wspace=1.1
        )
        top = [figure.add_subplot(grid[0, 0:3]), figure.add_subplot(grid[0, 3:6])]
        low = [figure.add_subplot(grid[1, 2 * i : 2 * i + 2]) for i in range(3)]
        _draw_losses(top[0], runs, "step", "Validation loss by step", "val")
        _draw_losses(top[1], runs, "step", "Training loss by step (smoothed)", "train")
        _draw_losses(low[0], runs, "tokens", "Loss by useful tokens", None)
        _draw_losses(low[1], runs, "minutes", "Loss by training time", None)
        _draw_speeds(low[2], runs)
        figure.legend(_handles(len(runs)), [_cut(n) for n in labels], loc="upper left", bbox_to_anchor=(0.045, 0.995),
                      ncols=min(3, len(runs)), frameon=False, fontsize=9)  # fmt: skip


def _cut(name: str) -> str:
    return name if len(name) <= 42 else f"…{name[-41:]}"


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": _DASHES[i // len(COLOURS) % len(_DASHES)]}


def _handles(count: int) -> "list[Line2D]":
    from matplotlib.lines import Line2D

    return [Line2D([], [], linewidth=2.2, **_look(i)) for i in range(count)]


def _draw_losses(axes: "Axes", runs: Sequence[Run], by: str, name: str, kind: str | None) -> None:
    """``kind`` None: of each run the validation, where it has any, else the training loss."""
    missing = 0
    records_of = [timed(run) for run in runs]
    longest = max((x for records in records_of for x in series(records, "loss", "minutes")[0]), default=0.0)
    unit, scale = ("hours", 60) if by == "minutes" and longest > 180 else ("minutes", 1)
    for i, (run, records) in enumerate(zip(runs, records_of, strict=True)):
        shown = kind or ("val" if any(number(r.get("loss")) is not None for r in run.val) else "train")
        xs, ys = series([r for r in records if r["kind"] == shown], "loss", by)
        if not xs:
            missing += 1
            continue
        xs = [x / scale for x in xs]
        if shown == "val":
            axes.plot(xs, ys, linewidth=1.5, markersize=3.5, **few_markers(len(xs)), **_look(i))
        else:
            axes.plot(*smoothed(xs, ys), linewidth=1.4, **_look(i))
    title(axes, name, f"{plural(missing, 'run')} not recorded" if 0 < missing < len(runs) else "")
    if missing == len(runs):
        nothing(axes)
    axes.set_xlabel({"step": "step", "tokens": "useful tokens", "minutes": f"{unit} of steps that count"}[by])
    if by != "minutes":
        count_steps(axes, 4 if kind is None else 6)


def _draw_speeds(axes: "Axes", runs: Sequence[Run]) -> None:
    from matplotlib.ticker import FuncFormatter

    title(axes, "Useful tokens per second")
    tops = []
    for i, run in enumerate(runs):
        xs, ys = series(run.train, "tokens_per_s")
        if ys:
            axes.plot(*smoothed(xs, ys), linewidth=1.2, **_look(i))
            tops.append(sorted(ys)[int(0.98 * (len(ys) - 1))])
    axes.set_ylim(0, 1.2 * max(tops, default=1.0) or 1.0)
    axes.set_xlabel("step")
    count_steps(axes, 4)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
