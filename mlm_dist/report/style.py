"""How the pictures of a report look, and what they do with long runs."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_dist.report.words import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e8ec"
TRAIN, VAL = "#2f6db5", "#d1495b"
# Okabe and Ito's colours, which colour-blind people tell apart, in an order in which neighbours differ in lightness too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#000000")
TICKS = [1, 2, 2.5, 5, 10]
# Points of a curve beyond which nobody sees them: a picture is about 1700 pixels wide.
MOST_POINTS = 3000

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollars
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.left": False,
}


@contextlib.contextmanager
def picture(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure of so many inches, written to a PNG at the end."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, metadata={"Software": "mlm-dist report"})


def title(axes: "Axes", text: str, right: str = "") -> None:
    """A panel's title, and beside it a number."""
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")
    if right:
        axes.set_title(right, loc="right", fontsize=9, color=MUTED)


def nothing(axes: "Axes") -> None:
    """Says that there is nothing to draw."""
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_yticks([])


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


def smoothed(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """A curve smoothed over a fortieth of it, and less of a long one, and thinned; of a long one without its outermost points, which would be
    means over almost nothing.
    """
    reach = min(len(ys) // 40, max(50, len(ys) // 200))
    ends = reach // 10
    means = smooth(ys, reach)
    return thin(xs[ends : len(xs) - ends], means[ends : len(ys) - ends])


def draw_noisy(
    axes: "Axes", xs: Sequence[float], ys: Sequence[float], width: float = 1.8, label: str | None = None
) -> None:
    """A training curve: pale as it is, and smoothed."""
    marker = "o" if len(xs) == 1 else None
    axes.plot(*thin(xs, ys), color=TRAIN, alpha=0.28, linewidth=0.8)
    axes.plot(*smoothed(xs, ys), color=TRAIN, linewidth=width, marker=marker, markersize=4, label=label)


def few_markers(count: int) -> dict[str, Any]:
    """Marks for the points of a curve, unless they would hide it."""
    return {"marker": "o", "markeredgecolor": "white"} if count <= 60 else {}


def count_steps(axes: "Axes", most: int = 8) -> None:
    """Ticks for steps, or for tokens, below the axes."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, steps=TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}" if abs(v) < 1e4 else short(v)))


def thin(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """A curve with at most about ``most`` points that looks the same: of each stretch its lowest and highest point, and both ends."""
    if len(xs) <= most:
        return list(xs), list(ys)
    kept = {0, len(xs) - 1}
    size = -(-2 * len(xs) // most)
    for start in range(0, len(xs), size):
        stretch = range(start, min(start + size, len(xs)))
        kept |= {min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)}
    order = sorted(kept)
    return [xs[i] for i in order], [ys[i] for i in order]
