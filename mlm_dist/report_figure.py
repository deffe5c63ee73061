"""The picture of ``mlm-dist report``."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mlm_dist.report import Run

_INK, _MUTED, _GRID = "#1f2933", "#66727f", "#e4e8ec"
_TRAIN, _VAL = "#2f6db5", "#d1495b"
_TICKS = [1, 2, 2.5, 5, 10]
_MARGINS = {"left": 0.055, "right": 0.978, "top": 0.8, "bottom": 0.085, "hspace": 0.5, "wspace": 0.14}


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without the records that lack it."""
    kept = [(r["step"], float(r[key])) for r in records if r.get(key) is not None]
    return [s for s, _ in kept], [v for _, v in kept]


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean over the ``reach`` values on each side, fewer near the ends but as many on both: no lag, unlike an
    exponential average, so that training and validation compare.
    """
    sums = [0.0, *itertools.accumulate(values)]
    out = []
    for i in range(len(values)):
        k = min(reach, i, len(values) - 1 - i)
        out.append((sums[i + k + 1] - sums[i - k]) / (2 * k + 1))
    return out


def draw(run: "Run", headline: str, path: Path) -> None:
    """Draw loss, accuracy, learning rate and throughput over the steps into a PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _MUTED,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": _GRID,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "ytick.left": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(10.5, 5.4), dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
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
        figure.text(0.055, 0.882, headline, fontsize=9.5, color=_MUTED, va="center")
        figure.savefig(path, metadata={"Software": "mlm-dist report"})


def _draw_loss(axes: "Axes", run: "Run") -> None:
    from matplotlib.ticker import MaxNLocator

    steps, values = series(run.train, "loss")
    val_steps, val_values = series(run.val, "loss")
    if values:
        axes.plot(steps, values, color=_TRAIN, alpha=0.28, linewidth=0.8)
        axes.plot(
            steps, smooth(values, min(50, len(values) // 40)), color=_TRAIN, linewidth=1.8, label="training (smoothed)"
        )
    if val_values:
        axes.plot(
            val_steps,
            val_values,
            color=_VAL,
            linewidth=1.4,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
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
            color=_VAL,
            fontweight="bold",
        )
    shown = [*values, *val_values]
    if run.unigram_entropy is not None:
        shown.append(run.unigram_entropy)
        axes.axhline(run.unigram_entropy, color=_MUTED, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(
            f"unigram entropy {run.unigram_entropy:.2f}",
            (0.995, run.unigram_entropy),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=_MUTED,
        )
    if shown:
        margin = 0.07 * (max(shown) - min(shown)) or 0.5
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_title("Loss (nats per masked token)", loc="left", fontsize=10, fontweight="bold")
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=_TICKS))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=_TICKS))
    _mark_restarts(axes, run, named=True)
    if values or val_values:
        axes.legend(frameon=False, loc="lower left")


def _draw_panel(
    axes: "Axes", run: "Run", key: str, title: str, *, val: bool = False, percent: bool = False, median: bool = False
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    steps, values = series(run.train, key)
    if not values:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=_MUTED)
        axes.set_yticks([])
        return
    if val or median:
        axes.plot(steps, values, color=_TRAIN, alpha=0.28, linewidth=0.8)
        axes.plot(steps, smooth(values, min(50, len(values) // 40)), color=_TRAIN, linewidth=1.6)
    else:
        axes.plot(steps, values, color=_TRAIN, linewidth=1.6)
    if val:
        val_steps, val_values = series(run.val, key)
        axes.plot(
            val_steps,
            val_values,
            color=_VAL,
            linewidth=1.2,
            marker="o",
            markersize=3.5,
            markeredgecolor="white",
            clip_on=False,
        )
    if median:
        middle = statistics.median(values)
        # One slow step (a first step, a checkpoint) must not flatten the rest; none is far above the median.
        axes.set_ylim(0, 1.35 * max(sorted(values)[int(0.98 * (len(values) - 1))], middle) or 1.0)
        axes.set_title(f"median {short(middle)}", loc="right", fontsize=9, color=_MUTED)
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=_TICKS))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif median:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _scientific(v)))
    _mark_restarts(axes, run)


def _mark_restarts(axes: "Axes", run: "Run", *, named: bool = False) -> None:
    for step in run.restarts:
        axes.axvline(step, color=_MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    if named and 0 < len(run.restarts) <= 4:
        for step in run.restarts:
            axes.annotate(
                "restart",
                (step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -10),
                textcoords="offset points",
                color=_MUTED,
                fontsize=8.5,
            )


def short(value: float) -> str:
    """1234567 -> 1.23 M."""
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _scientific(value: float) -> str:
    """0.00025 -> 2.5e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"
