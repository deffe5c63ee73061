"""The one picture that sums up a run."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_dist.report.run import Run, series
from mlm_dist.report.style import (
    MUTED,
    TICKS,
    TRAIN,
    VAL,
    count_steps,
    draw_noisy,
    few_markers,
    nothing,
    picture,
    thin,
    title,
)
from mlm_dist.report.words import scientific, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGINS = {"left": 0.055, "right": 0.978, "top": 0.8, "bottom": 0.085, "hspace": 0.5, "wspace": 0.14}


def draw(run: Run, headline: str, path: Path) -> None:
    """Draw loss, accuracy, learning rate and throughput over the steps into a PNG."""
    with picture(path, 10.5, 5.4) as figure:
        grid = figure.add_gridspec(3, 2, width_ratios=(1.9, 1), **_MARGINS)
        loss = figure.add_subplot(grid[:, 0])
        panels = [figure.add_subplot(grid[i, 1], sharex=loss) for i in range(3)]
        _draw_loss(loss, run)
        _draw_panel(panels[0], run, "accuracy", "Accuracy at masked tokens", val=True, percent=True)
        _draw_panel(panels[1], run, "lr", "Learning rate")
        _draw_panel(panels[2], run, "tokens_per_s", "Useful tokens per second", median=True)
        for axes in panels[:2]:
            axes.tick_params(labelbottom=False)
        for axes in (loss, panels[2]):
            axes.set_xlabel("step")
        steps = [r["step"] for r in (*run.train, *run.val)]
        loss.set_xlim(0 if min(steps) <= 0.1 * max(steps) else min(steps), max(max(steps), min(steps) + 1))
        figure.text(0.055, 0.935, run.name, fontsize=15, fontweight="bold", va="center")
        figure.text(0.055, 0.882, headline, fontsize=9.5, color=MUTED, va="center")


def _draw_loss(axes: "Axes", run: Run) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, values = series(run.train, "loss")
    val_steps, val_values = series(run.val, "loss")
    if values:
        draw_noisy(axes, steps, values, label="training (smoothed)")
    if val_values:
        axes.plot(
            val_steps,
            val_values,
            color=VAL,
            linewidth=1.4,
            markersize=4.5,
            **few_markers(len(val_steps)),
            label="validation",
            zorder=4,
            clip_on=False,
        )
        axes.annotate(
            f"{val_values[-1]:.2f}",
            (val_steps[-1], val_values[-1]),
            xytext=(0, -13),
            textcoords="offset points",
            ha="right",
            color=VAL,
            fontweight="bold",
        )
    shown = [*values, *val_values]
    if run.unigram_entropy is not None:
        shown.append(run.unigram_entropy)
        axes.axhline(run.unigram_entropy, color=MUTED, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(
            f"unigram entropy {run.unigram_entropy:.2f}",
            (0.995, run.unigram_entropy),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=MUTED,
        )
    if shown:
        margin = 0.07 * (max(shown) - min(shown)) or 0.5
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    title(axes, "Loss (nats per masked token)")
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=TICKS))
    count_steps(axes)
    _mark_restarts(axes, run, named=True)
    if values or val_values:
        # Where a falling curve leaves room: at the bottom, until it has fallen too early for that.
        early = shown[len(values) // 5] if values else max(shown)
        if early > min(shown) + 0.2 * (max(shown) - min(shown)):
            axes.legend(loc="lower left")
        else:  # below the names of the restarts
            axes.legend(loc="upper right", bbox_to_anchor=(1, 0.95))


def _draw_panel(
    axes: "Axes", run: Run, key: str, name: str, *, val: bool = False, percent: bool = False, median: bool = False
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    title(axes, name)
    steps, values = series(run.train, key)
    if not values:
        nothing(axes)
        return
    if val or median:
        draw_noisy(axes, steps, values, width=1.6)
    else:
        axes.plot(*thin(steps, values), color=TRAIN, linewidth=1.6)
    if val:
        val_steps, val_values = series(run.val, key)
        axes.plot(
            val_steps,
            val_values,
            color=VAL,
            linewidth=1.2,
            markersize=3.5,
            **few_markers(len(val_steps)),
            clip_on=False,
        )
    if median:
        middle = statistics.median(values)
        # One slow step (a first step, a checkpoint) must not flatten the rest; none is far above the median.
        axes.set_ylim(0, 1.35 * max(sorted(values)[int(0.98 * (len(values) - 1))], middle) or 1.0)
        title(axes, name, f"median {short(middle)}")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=TICKS))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif median:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: scientific(v)))
    _mark_restarts(axes, run)


def _mark_restarts(axes: "Axes", run: Run, *, named: bool = False) -> None:
    for step in run.restarts:
        faint = 1.0 if len(run.restarts) <= 8 else 0.4
        axes.axvline(step, color=MUTED, alpha=faint, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    if named and 0 < len(run.restarts) <= 4:
        for step in run.restarts:
            axes.annotate(
                "restart",
                (step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -10),
                textcoords="offset points",
                color=MUTED,
                fontsize=8.5,
            )
