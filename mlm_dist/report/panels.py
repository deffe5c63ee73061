"""The pictures of what went on inside a run: its gradients, and where its time went."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_dist.report.run import Run, Span, Stall, number, placed, series, spans, stalls
from mlm_dist.report.style import (
    COLOURS,
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

# Of a step's time: the key of a record, its name, its colour; what is left of the step comes last.
PARTS = (
    ("time_forward", "forward", COLOURS[0]),
    ("time_backward", "backward", COLOURS[4]),
    ("time_optimizer", "optimizer", COLOURS[2]),
    ("time_communication", "communication", COLOURS[3]),
    ("data_wait", "waiting for data", COLOURS[5]),
)
_REST = ("the rest", "#c3c9d0")
_STALLS = {"data": ("waiting for data", COLOURS[5]), "slow": ("slow steps", MUTED)}
# Columns of the stacked step times: stretches of a long run are averaged into one.
_MOST_BARS = 240


def draw_training(run: Run, path: Path) -> bool:
    """Late loss by tokens, gradient norm and loss scale into a PNG; False, and none, where nothing of it was recorded."""
    from matplotlib.ticker import FuncFormatter

    scales = [(s, v) for s, v in zip(*series(run.train, "loss_scale"), strict=True) if v > 0]  # the axis is logarithmic
    has_scale = bool(scales)
    has_norm = bool(series(run.train, "grad_norm")[1])
    late = _late(run)
    if not (has_norm or late):
        return False
    with picture(path, 10.5, 3.3 if not has_scale else 4.6) as figure:
        grid = figure.add_gridspec(
            1 + has_scale, 2, left=0.055, right=0.978, top=0.9, bottom=0.15 if not has_scale else 0.11, hspace=0.6, wspace=0.14
        )  # fmt: skip
        _draw_late(figure.add_subplot(grid[:, 0]), late)
        norm = figure.add_subplot(grid[0, 1])
        _draw_norm(norm, run)
        if has_scale:
            scale = figure.add_subplot(grid[1, 1], sharex=norm)
            scale.step(*thin([s for s, _ in scales], [v for _, v in scales]), where="post", color=TRAIN, linewidth=1.4)
            scale.set_yscale("log", base=2)
            scale.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v < 1e6 else short(v)))
            title(scale, "Loss scale (fp16)")
            scale.set_xlabel("step")
    return True


def _late(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Loss by useful tokens after the first tenth of them, where the drop from the random start no longer hides the rest."""
    tokens = {r["step"]: t for r in run.train if (t := number(r.get("tokens"))) is not None}
    val = placed(run.val, "tokens", tokens)
    curves = {"training": series(run.train, "loss", "tokens"), "validation": series(val, "loss", "tokens")}
    last = max((xs[-1] for xs, _ in curves.values() if xs), default=0.0)
    out = {}
    for name, (xs, ys) in curves.items():
        late = [(x, y) for x, y in zip(xs, ys, strict=True) if x >= 0.1 * last]
        if late:
            out[name] = ([x for x, _ in late], [y for _, y in late])
    return out


def _draw_late(axes: "Axes", curves: dict[str, tuple[list[float], list[float]]]) -> None:

    title(axes, "Loss by useful tokens, without the first tenth")
    if "training" in curves:
        xs, ys = curves["training"]
        draw_noisy(axes, xs, ys, label="training (smoothed)")
    if "validation" in curves:
        xs, ys = curves["validation"]
        axes.plot(xs, ys, color=VAL, markersize=4, label="validation", **few_markers(len(xs)))
    if curves:
        axes.legend(loc="upper right")
    else:
        nothing(axes)
    count_steps(axes, 6)
    axes.set_xlabel("useful tokens")


def _draw_norm(axes: "Axes", run: Run) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    title(axes, "Gradient norm before clipping")
    steps, values = series(run.train, "grad_norm")
    axes.set_xlabel("step")
    positive = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0]
    if not positive:
        nothing(axes)
        return
    xs, ys = [s for s, _ in positive], [v for _, v in positive]
    draw_noisy(axes, xs, ys, width=1.6)
    count_steps(axes)
    clip = number((run.config.get("train") or {}).get("clip"))
    if clip and clip > 0:
        axes.axhline(clip, color=VAL, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(f"clipped at {clip:g}", (0.995, clip), xycoords=("axes fraction", "data"), xytext=(0, 4),
                      textcoords="offset points", ha="right", color=VAL)  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if 1e-3 <= v < 1e4 else scientific(v)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    shown = [*ys, clip] if clip and clip > 0 else ys
    low, high = min(shown), max(shown)
    if high / low < 50:  # else decades are enough
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def draw_speed(run: Run, path: Path) -> bool:
    """Throughput with stalls, a step's time by what it was spent on, memory and MFU into a PNG; False where no speed was recorded."""
    found = [s for s in spans(run) if s.seconds > 0]
    if not found:
        return False
    more = [k for k in ("mfu", "memory_gib") if series(run.train, k)[1]]
    counted = [s for s in found if s.repeated < s.steps]
    with picture(path, 10.5, 3.6 + 1.5 * bool(more)) as figure:
        rows = 2 + bool(more)
        grid = figure.add_gridspec(rows, 2, height_ratios=[1, 1.1, 0.7][:rows], left=0.055, right=0.978,
                                   top=0.93, bottom=0.1, hspace=0.6, wspace=0.14)  # fmt: skip
        speed = figure.add_subplot(grid[0, :])
        _draw_throughput(speed, run, stalls(found))
        parts = figure.add_subplot(grid[1, :], sharex=speed)
        _draw_parts(parts, counted or found)
        if not more:
            parts.set_xlabel("step")
        for i, key in enumerate(more):
            axes = figure.add_subplot(grid[2, i] if len(more) == 2 else grid[2, :], sharex=speed)
            _draw_line(axes, run, key)
        first, last = found[0].after, max(s.record["step"] for s in found)
        speed.set_xlim(0 if first <= 0.1 * last else first, max(last, first + 1, 1))
        count_steps(speed)
    return True


def _draw_throughput(axes: "Axes", run: Run, found: Sequence[Stall]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps, values = series(run.train, "tokens_per_s")
    if values:
        draw_noisy(axes, steps, values, width=1.4)
        middle = sorted(values)[len(values) // 2]
        top = 1.25 * sorted(values)[int(0.99 * (len(values) - 1))]
        axes.axhline(middle, color=MUTED, linewidth=0.9, linestyle=(0, (5, 3)))
        axes.set_ylim(0, max(top, 1.25 * middle) or 1.0)
        title(axes, "Useful tokens per second", f"median {short(middle)}")
    else:
        title(axes, "Useful tokens per second")
        nothing(axes)
    last = max((r["step"] for r in run.train), default=1)
    for stall in found:  # at least a pixel or two wide
        axes.axvspan(
            stall.first,
            max(stall.last, stall.first + last / 600),
            color=_STALLS[stall.cause][1],
            alpha=0.35,
            linewidth=0,
        )
    handles = [
        Patch(color=colour, alpha=0.35, label=f"stall: {name}")
        for cause, (name, colour) in _STALLS.items()
        if any(s.cause == cause for s in found)
    ]
    if handles:
        axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.62, 0.97), ncols=2, fontsize=8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=TICKS))


def _draw_parts(axes: "Axes", found: Sequence[Span]) -> None:
    title(axes, "Milliseconds of a step, on rank 0")
    size = -(-len(found) // _MOST_BARS)
    bars = [found[i : i + size] for i in range(0, len(found), size)]
    left = [b[0].after for b in bars]
    width = [b[-1].record["step"] - b[0].after for b in bars]
    steps = [sum(s.steps for s in b) for b in bars]

    def mean(key: str) -> list[float]:
        return [
            1000 * sum((number(s.record.get(key)) or 0.0) * s.steps for s in b) / n
            for b, n in zip(bars, steps, strict=True)
        ]

    whole = [1000 * sum(s.seconds for s in b) / n for b, n in zip(bars, steps, strict=True)]
    bottom = [0.0] * len(bars)
    for key, name, colour in PARTS:
        part = mean(key)
        if any(part):
            axes.bar(left, part, width, bottom, align="edge", color=colour, label=name, linewidth=0)
            bottom = [b + p for b, p in zip(bottom, part, strict=True)]
    rest = [max(0.0, w - b) for w, b in zip(whole, bottom, strict=True)]
    axes.bar(left, rest, width, bottom, align="edge", color=_REST[1], label=_REST[0], linewidth=0)
    # One very slow stretch must not flatten the rest.
    axes.set_ylim(0, 1.3 * sorted(whole)[int(0.97 * (len(whole) - 1))] or 1.0)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.62, 0.97), ncols=6, fontsize=8, handlelength=1.2, columnspacing=1.1
    )


def _draw_line(axes: "Axes", run: Run, key: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    steps, values = series(run.train, key)
    if key == "mfu":
        draw_noisy(axes, steps, values, width=1.3)
    else:
        axes.plot(*thin(steps, values), color=TRAIN, linewidth=1.3, marker="o" if len(steps) == 1 else None)
    axes.set_ylim(0, 1.2 * sorted(values)[int(0.99 * (len(values) - 1))] or 1.0)
    axes.set_xlabel("step")
    if key == "mfu":
        title(axes, "MFU, over useful tokens")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if max(values) > 0.05 else 2))
    else:
        title(axes, "Peak memory of rank 0 (GiB)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=TICKS))
