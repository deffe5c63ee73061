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
from typing import Any

import yaml

from mlm_dist.errors import UserError
from mlm_dist.files import read_json, read_json_lines, read_yaml
from mlm_dist.redact import redact
from mlm_dist.report_figure import draw, series, short
from mlm_dist.tracking import read_metrics

Record = dict[str, Any]


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
    status, events = read_json(run_dir / "status.json") or {}, list(read_json_lines(run_dir / "events.jsonl"))
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
        config=redact(read_yaml(run_dir / "config.yaml")),
        environment=read_json(run_dir / "env.json") or {},
        events=events,
    )


def headline(run: Run) -> str:
    """One line of what matters most."""
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
        facts.append(("Useful tokens", short(last_train["tokens"])))
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
        facts.append(("Median throughput", f"{short(statistics.median(speeds))} useful tokens/s"))
    uses = series(run.train, "mfu")[1]
    if uses:
        facts.append(("Median MFU", f"{statistics.median(uses):.1%} of the devices' dense peak, over useful tokens"))
    if shares := _shares_of_a_step(run.train):
        facts.append(("A step's time", ", ".join(f"{name} {share:.0%}" for name, share in shares.items())))
    if last_train.get("skipped"):  # a count since the start of the run
        facts.append(("Skipped steps", str(int(last_train["skipped"]))))
    times = [r["time"] for r in (*run.train, *run.val) if r.get("time") is not None]
    if times:
        facts.append(("First and last record", f"{_when(min(times))} to {_when(max(times))}"))
    if run.environment.get("commit"):
        facts.append(("Commit", str(run.environment["commit"])))
    packages = run.environment.get("packages") or {}
    if isinstance(packages, dict) and packages:
        facts.append(("Software", ", ".join(f"{k} {v}" for k, v in packages.items())))
    return facts


def _shares_of_a_step(train: Sequence[Record]) -> dict[str, float]:
    """Share of the step time by what rank 0 did in it, largest first; medians over the records that have it."""
    timed = [r for r in train if r.get("step_time") and r.get("data_wait") is not None]
    names = {"data_wait": "waiting for data"} | {
        k: k.removeprefix("time_") for r in timed for k in r if k.startswith("time_")
    }
    shares = {
        name: statistics.median(r.get(key, 0.0) / r["step_time"] for r in timed) for key, name in names.items() if timed
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


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
        draw(run, headline(run), png)
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
