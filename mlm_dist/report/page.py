"""The page of a report: one HTML file that needs no other, on paper and on a telephone too."""

import base64
import html
from collections.abc import Mapping, Sequence

import yaml

from mlm_dist.report import facts
from mlm_dist.report.run import Run, moment, number
from mlm_dist.report.words import plural, when

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
p { margin: .3rem 0 .8rem; color: #4b5763; }
img { width: 100%; height: auto; border: 1px solid #e4e8ec; border-radius: 6px; margin: .4rem 0; }
.wide { overflow-x: auto; }
.wide table { min-width: 44rem; }
table { border-collapse: collapse; margin: .6rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid #e4e8ec; }
th { font-weight: 600; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
pre { background: #f6f8fa; padding: 1rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .5rem; }
.state { display: inline-block; border-radius: 4px; padding: 0 .5rem; color: #fff; background: #5b6672; }
.finished { background: #00795a; } .failed, .died, .hung { background: #b54a00; } .running { background: #1f6f9f; }
.preempted, .cancelled { background: #8a6100; }
@media (max-width: 600px) { body { margin: 1rem auto; font-size: 14px; } th, td { padding-right: .7rem; } .wide img { min-width: 48rem; } }
@media print { body { max-width: none; margin: 0; font-size: 11px; } img, tr { break-inside: avoid; } h2 { break-after: avoid; } .wide { overflow: visible; }
  .wide table { min-width: 0; } }
"""
_NONE = "<p>Nothing recorded.</p>"


def page(run: Run, pictures: Mapping[str, bytes]) -> str:
    """The report of one run.

    Args:
        pictures: PNGs, by ``summary``, ``training``, ``speed``, ``timeline``; those that there was nothing for are left out.
    """
    e = html.escape
    state = str(run.status.get("state") or "")
    badge = f' <span class="state {e(state)}">{e(state)}</span>' if state else ""
    reason = str(run.status.get("reason") or "")
    parts = [
        _head(run.name),
        f"<h1>{e(run.name)}</h1>",
        f"<p>{e(facts.headline(run))}{badge}</p>",
        f"<p>{e(' '.join(reason.split())[:1000])}</p>" if reason else "",
        _picture(pictures, "summary", f"Loss, accuracy, learning rate and throughput of {run.name}"),
        _section("Result", _table(facts.facts(run)), _validations(run), _predictions(run)),
        _section("Training", _picture(pictures, "training", "Late loss and gradient norm")),
        _section(
            "Speed and stalls",
            _picture(pictures, "speed", "Throughput, stalls and step time"),
            _table(facts.time_account(run)),
        ),
        _section("Time line", _picture(pictures, "timeline", "Attempts and events over time"), _attempts(run)),
        _section("Data delivered and lost", _table(facts.data(run)), _losses(run)),
        _section("What the run is", _table(facts.recipe(run)), _config(run)),
        _section("Events", _damaged(run), _events(run)),
        _foot(moment(run.records[-1])),
    ]
    return "\n".join(part for part in parts if part)


def comparison(runs: Sequence[Run], names: Sequence[str], picture: bytes) -> str:
    """The report of several runs side by side."""
    header = ["", *names]
    differing = facts.differing(runs)
    title = f"{len(runs)} runs compared"
    newest = max((t for run in runs for r in run.records[-1:] if (t := moment(r)) is not None), default=None)
    parts = [
        _head(title),
        f"<h1>{title}</h1>",
        _picture({"all": picture}, "all", "Losses and throughput of the runs"),
        _section("Result", _grid(header, facts.compared(runs))),
        _section("Settings that differ", _grid(["Key", *names], differing) if differing else "<p>None.</p>"),
        _foot(newest),
    ]
    return "\n".join(parts)


def _head(title: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>"
    )


def _foot(last: float | None) -> str:
    return f"<p>From the files of the run directory, up to {when(last) or 'an unknown time'}; mlm-dist report.</p>\n</body>\n</html>\n"


def _section(title: str, *parts: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n" + ("\n".join(p for p in parts if p) or _NONE)


def _picture(pictures: Mapping[str, bytes], name: str, alt: str) -> str:
    if name not in pictures:
        return ""
    source = f"data:image/png;base64,{base64.b64encode(pictures[name]).decode()}"
    return f'<div class="wide"><img alt="{html.escape(alt)}" src="{source}"></div>'


def _validations(run: Run) -> str:
    if not run.val:
        return ""
    forms = (("loss", ".4f"), ("perplexity", ".2f"), ("accuracy", ".1%"))
    rows = [[f"{r['step']:,}", *("" if (v := number(r.get(key))) is None else format(v, form) for key, form in forms)]
            for r in run.val[-100:]]  # fmt: skip
    title = "Validations" if len(run.val) <= 100 else "The last 100 validations"
    return _details(title, _grid(("Step", "Validation loss", "Perplexity", "Accuracy"), rows))


def _predictions(run: Run) -> str:
    """The last table of masked predictions, where the run kept any."""
    if not run.predictions:
        return ""
    last = run.predictions[-1]
    rows = []
    for row in last["rows"][:40]:
        guesses = [g for g in row.get("predictions", []) if isinstance(g, list) and len(g) == 2]
        shown = ", ".join(f"{token} {p:.0%}" for token, value in guesses if (p := number(value)) is not None)
        rows.append([str(row.get("text", "")), str(row.get("truth", "")), shown])
    title = f"Masked tokens and what the model gave for them at step {last.get('step', '')}"
    return _details(html.escape(title), _grid(("Text", "Truth", "Predictions"), rows))


def _attempts(run: Run) -> str:
    header = ("Attempt", "Ranks", "Steps", "Began", "Lasted", "Pause before", "Ended", "Lost")
    jobs = _details("SLURM jobs", _grid(("Time", "Job", "Event", "What"), facts.jobs(run))) if run.jobs else ""
    return (_grid(header, facts.attempts(run)) if run.attempts else "<p>No times recorded.</p>") + jobs


def _losses(run: Run) -> str:
    rows = facts.losses(run)
    if not rows:
        return ""
    note = f"<p>The {facts.MOST_LOSSES} largest; events.jsonl has all.</p>" if len(rows) == facts.MOST_LOSSES else ""
    return _grid(("Shard", "Cause", "Places", "Documents", "At steps"), rows) + note


def _config(run: Run) -> str:
    if not run.config:
        return ""
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return _details("Configuration", f"<pre>{html.escape(text)}</pre>")


def _damaged(run: Run) -> str:
    told = [f"{plural(n, 'line' if name.endswith('.jsonl') else 'part')} of {name}" for name, n in run.damaged.items()]
    return f"<p>Not readable, and left out here: {html.escape(', '.join(told))}.</p>" if told else ""


def _events(run: Run) -> str:
    if not run.events:
        return _NONE
    rows, left_out = facts.events(run)
    note = f"<p>{left_out:,} older ones are left out here; events.jsonl has all.</p>" if left_out else ""
    table = _grid(("Time", "Attempt", "Step", "Kind", "What"), rows)
    return _grid(("Kind", "Meaning", "Count", "At steps"), facts.kinds(run)) + _details("Each event", note + table)


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{body}</table>" if rows else ""


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    wide = ' class="wide"' if len(header) > 4 else ""
    return f"<div{wide}><table><tr>{head}</tr>{body}</table></div>"
