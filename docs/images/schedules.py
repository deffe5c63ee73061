"""Draws schedules.png beside this file, from the functions that training uses: ``python docs/images/schedules.py``."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlm_dist.data.batches import BatchSchedule, BatchWarmup
from mlm_dist.schedule import ScheduleConfig, lr_factor

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e8ec"
COLOURS = {"linear": "#2f6db5", "cosine": "#3a9d76", "inverse_sqrt": "#8a63b5", "constant": "#66727f", "wsd": "#d1495b"}
STEPS, WARMUP, DECAY = 1000, 50.0, 200.0
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def curve(config: ScheduleConfig, steps: int, start: int = 0) -> tuple[list[int], list[float]]:
    """Steps from ``start`` on and the factor at each, in a run of ``steps``."""
    config.check_schedule()
    x = list(range(start, steps + 1))
    return x, [lr_factor(step, step / steps, config) for step in x]


def main() -> None:
    """Two panels: learning rates, and growing batches."""
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9.6, 3.1), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        rates, batches = figure.subplots(1, 2, width_ratios=(2, 1))
        for schedule, colour in COLOURS.items():
            config = ScheduleConfig(
                warmup=WARMUP,
                schedule=schedule,  # type: ignore[arg-type]
                decay=DECAY if schedule == "wsd" else None,
                decay_shape="sqrt" if schedule == "wsd" else "linear",
            )
            rates.plot(*curve(config, STEPS), color=colour, label=schedule, linewidth=1.8)
        for begin in (300, 500):
            steps = begin + int(DECAY)
            branch = ScheduleConfig(warmup=WARMUP, schedule="wsd", decay=DECAY, decay_shape="sqrt")
            label = "branches of wsd" if begin == 300 else None
            rates.plot(*curve(branch, steps, begin), color=COLOURS["wsd"], linestyle=":", label=label)
        rates.set(title="learning rate, share of the peak", xlabel="step", ylim=(0, 1.04), xlim=(0, STEPS))
        rates.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        growing = BatchSchedule.growing(BatchWarmup(start=32, tokens=10_000_000), 256, seq_len=128)
        steps = range(1000)
        batches.step(steps, [growing.size(k) for k in steps], where="post", color=COLOURS["linear"], linewidth=1.8)
        batches.set(title="rows of a step", xlabel="step", ylim=(0, 270), xlim=(0, 1000))
        figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
