"""How the pictures of a report look, and what they do with long runs."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    "legend.frameon": False,
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


def reach(count: int) -> int:
    """Over how many values on each side a curve of ``count`` is smoothed."""
    return min(count // 40, max(50, count // 200))


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
