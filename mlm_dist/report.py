"""``mlm-dist report RUN``: a picture and a page of how a run went, from the files of its directory alone."""

import argparse
import base64
import html
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mlm_dist.errors import UserError
from mlm_dist.tracking import read_metrics, redact

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
_INK, _MUTED, _GRID = "#1f2933", "#66727f", "#e4e8ec"
_TRAIN, _VAL = "#2f6db5", "#d1495b"
_MARGINS = {"left": 0.055, "right": 0.985, "top": 0.8, "bottom": 0.085, "hspace": 0.5, "wspace": 0.14}


@dataclass
class Run:
    """What the report knows of a run.

    Attributes:
        train, val: metric records by step.
        restarts: the first logged step of each attempt but the first.
        unigram_entropy: nats a token, the loss of a model that knows only how frequent each token is; None where not
            recorded.
    """

    name: str
    train: list[Record]
    val: list[Record]
    restarts: list[int] = field(default_factory=list)
    unigram_entropy: float | None = None
    status: Record = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    environment: Record = field(default_factory=dict)
    events: list[Record] = field(default_factory=list)


def load(run_dir: Path) -> Run:
    """Read a run directory; only ``metrics.jsonl`` must be there.

    Raises:
        UserError: not a run directory, or no metrics in it yet.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such directory; give a run directory, such as runs/demo")
    records = read_metrics(run_dir / "metrics.jsonl")
    if not records:
        raise UserError(f"{run_dir / 'metrics.jsonl'}: no step logged yet")
    status, events = _read_json(run_dir / "status.json"), _read_events(run_dir / "events.jsonl")
    first: dict[int, int] = {}
    for record in records:
        first.setdefault(record.get("attempt", 1), record["step"])
    entropies = [r["unigram_entropy"] for r in [status, *records, *events] if r.get("unigram_entropy") is not None]
    return Run(
        name=run_dir.resolve().name,
        train=[r for r in records if r["kind"] == "train"],
        val=[r for r in records if r["kind"] == "val"],
        restarts=sorted(step for attempt, step in first.items() if attempt != min(first)),
        unigram_entropy=entropies[-1] if entropies else None,
        status=status,
        config=redact(_read_yaml(run_dir / "config.yaml")),
        environment=_read_json(run_dir / "env.json"),
        events=events,
    )


def _read_json(path: Path) -> Record:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_events(path: Path) -> list[Record]:
    events = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            events.append(value)
    return events


def series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, without the records that lack it."""
    kept = [(r["step"], float(r[key])) for r in records if r.get(key) is not None]
    return [s for s, _ in kept], [v for _, v in kept]


def _smoothed(values: Sequence[float]) -> list[float]:
    return smooth(values, max(1, min(50, len(values) // 12)))


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average with the weight of a mean over ``span`` values, corrected for its start (Adam's bias
    correction, Kingma & Ba 2015).
    """
    keep, total, weight, out = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


# The picture


def draw(run: Run, path: Path) -> None:
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
        figure.text(0.055, 0.882, _headline(run), fontsize=9.5, color=_MUTED, va="center")
        figure.savefig(path, metadata={"Software": "mlm-dist report"})


def _draw_loss(axes: "Axes", run: Run) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, values = series(run.train, "loss")
    val_steps, val_values = series(run.val, "loss")
    if values:
        axes.plot(steps, values, color=_TRAIN, alpha=0.28, linewidth=0.8)
        axes.plot(steps, _smoothed(values), color=_TRAIN, linewidth=1.8, label="training (smoothed)")
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
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _mark_restarts(axes, run, named=True)
    if values or val_values:
        axes.legend(frameon=False, loc="lower left")


def _draw_panel(
    axes: "Axes", run: Run, key: str, title: str, *, val: bool = False, percent: bool = False, median: bool = False
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    steps, values = series(run.train, key)
    if not values:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=_MUTED)
    elif val or median:
        axes.plot(steps, values, color=_TRAIN, alpha=0.28, linewidth=0.8)
        axes.plot(steps, _smoothed(values), color=_TRAIN, linewidth=1.6)
    else:
        axes.plot(steps, values, color=_TRAIN, linewidth=1.6)
    if val:
        val_steps, val_values = series(run.val, key)
        axes.plot(val_steps, val_values, color=_VAL, linewidth=1.2, marker="o", markersize=3.5, markeredgecolor="white")
    if median and values:
        middle = statistics.median(values)
        # One slow step (a first step, a checkpoint) must not flatten the rest; none is far above the median.
        axes.set_ylim(0, 1.35 * max(sorted(values)[int(0.98 * (len(values) - 1))], middle))
        axes.set_title(f"median {_short(middle)}", loc="right", fontsize=9, color=_MUTED)
    elif values:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif median:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}".replace("e-0", "e-")))
    _mark_restarts(axes, run)


def _mark_restarts(axes: "Axes", run: Run, *, named: bool = False) -> None:
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


def _short(value: float) -> str:
    """1234567 -> 1.23 M."""
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _headline(run: Run) -> str:
    facts = dict(_facts(run))
    words = {
        "Steps": "{} steps",
        "Useful tokens": "{} tokens",
        "Ranks": "{} ranks",
        "Best validation loss": "best validation loss {}",
    }
    parts = [form.format(facts[key]) for key, form in words.items() if key in facts]
    if run.restarts:
        parts.append(f"{len(run.restarts)} restart" + "s" * (len(run.restarts) > 1))
    return "   ·   ".join(parts)


# The page


def _facts(run: Run) -> list[tuple[str, str]]:
    """What is worth a line in a table; what the run did not record is left out."""
    last_train, last_val = (run.train or [{}])[-1], (run.val or [{}])[-1]
    steps = [r["step"] for r in (*run.train, *run.val)]
    facts: list[tuple[str, str]] = []
    if run.status.get("state"):
        reason = f" ({run.status['reason']})" if run.status.get("reason") else ""
        facts.append(("State", f"{run.status['state']}{reason}"))
    facts.append(("Steps", f"{max(steps):,}"))
    if run.restarts:
        facts.append(("Restarts at steps", ", ".join(map(str, run.restarts))))
    if last_train.get("epoch") is not None:
        facts.append(("Epoch", f"{last_train['epoch']:.3g}"))
    if last_train.get("tokens") is not None:
        facts.append(("Useful tokens", _short(last_train["tokens"])))
    if last_train.get("world_size") is not None:
        facts.append(("Ranks", str(last_train["world_size"])))
    scored = [r for r in run.val if r.get("loss") is not None]
    if scored:
        best = min(scored, key=lambda r: float(r["loss"]))
        facts.append(("Best validation loss", f"{best['loss']:.3f} at step {best['step']:,}"))
    for key, label, form in (
        ("loss", "loss", ".3f"),
        ("perplexity", "perplexity", ".2f"),
        ("accuracy", "accuracy", ".1%"),
    ):
        if last_val.get(key) is not None:
            facts.append((f"Last validation {label}", format(last_val[key], form)))
    if run.unigram_entropy is not None:
        facts.append(("Unigram entropy", f"{run.unigram_entropy:.3f} nats"))
    if last_train.get("loss") is not None:
        facts.append(("Last training loss", f"{last_train['loss']:.3f}"))
    speeds = series(run.train, "tokens_per_s")[1]
    if speeds:
        facts.append(("Median throughput", f"{_short(statistics.median(speeds))} useful tokens/s"))
    skipped = sum(bool(r.get("skipped")) for r in run.train)
    if skipped:
        facts.append(("Skipped steps", str(skipped)))
    times = [r["time"] for r in (*run.train, *run.val) if r.get("time") is not None]
    if times:
        facts.append(("First and last record", f"{_when(min(times))} to {_when(max(times))}"))
    if run.environment.get("commit"):
        facts.append(("Commit", str(run.environment["commit"])))
    packages = run.environment.get("packages") or {}
    if isinstance(packages, dict) and packages:
        facts.append(("Software", ", ".join(f"{k} {v}" for k, v in packages.items())))
    return facts


def _rest(event: Record) -> str:
    return json.dumps({k: v for k, v in event.items() if k not in ("time", "kind")}, ensure_ascii=False)


def _when(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
img { width: 100%; height: auto; border: 1px solid #e4e8ec; border-radius: 6px; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid #e4e8ec; }
th { font-weight: 600; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
pre { background: #f6f8fa; padding: 1rem; border-radius: 6px; overflow-x: auto; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .5rem; }
"""


def page(run: Run, png: bytes) -> str:
    """The report as one HTML file that needs no other."""
    title = html.escape(run.name)
    picture = base64.b64encode(png).decode()
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
        f"<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{title}</h1>",
        f'<img alt="Loss, accuracy, learning rate and throughput of {title}" src="data:image/png;base64,{picture}">',
        _table(_facts(run)),
    ]
    if run.val:
        header = ("Step", "Validation loss", "Perplexity", "Accuracy")
        forms = (("loss", ".4f"), ("perplexity", ".2f"), ("accuracy", ".1%"))
        rows = [[f"{r['step']:,}", *(_cell(r, key, form) for key, form in forms)] for r in run.val]
        parts.append(_details("Validations", _grid(header, rows)))
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False)
        parts.append(_details("Configuration", f"<pre>{html.escape(text)}</pre>"))
    if run.events:
        rows = [[_when(e.get("time")), str(e.get("kind", "")), _rest(e)] for e in redact(run.events[-200:])]
        parts.append(_details("Events", _grid(("Time", "Kind", "What"), rows)))
    return "\n".join([*parts, "</body>\n</html>\n"])


def _cell(record: Record, key: str, form: str) -> str:
    return format(record[key], form) if record.get(key) is not None else ""


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{body}</table>"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def report(run_dir: str | Path, output: str | Path | None = None) -> tuple[Path, Path]:
    """Write ``report.png`` and ``report.html`` into ``output`` (by default the run directory); returns their paths.

    Raises:
        UserError: no run there, or the output directory cannot be written.
    """
    run = load(Path(run_dir))
    directory = Path(output) if output is not None else Path(run_dir)
    png, page_path = directory / "report.png", directory / "report.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        draw(run, png)
        page_path.write_text(page(run, png.read_bytes()), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--output: {str(directory)!r} cannot be written ({error.strerror}); give a directory that you may write to"
        ) from error
    return png, page_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist report``."""
    parser.description = (
        "Draw loss, accuracy, learning rate and throughput of a run, running or ended, into report.png and report.html."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, such as runs/demo")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: the run directory)")


def run(args: argparse.Namespace) -> int:
    """``mlm-dist report``."""
    for path in report(args.run, args.output):
        print(path)
    return 0
