"""The doctor's answer, for people and as JSON."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlm_dist.doctor.findings import Finding, Report, worst
from mlm_dist.doctor.judge_network import table

SCHEMA = 1
_COLOURS = {"green": "green", "yellow": "yellow", "red": "bold red"}
_HOSTS_SHOWN = 8
_SLOWEST_SHOWN = 3
# Of what is not a terminal: nothing is cut, and a log's lines stay readable.
_PIPE_WIDTH = 160


def document(findings: Sequence[Finding], report: Report | None) -> dict[str, Any]:
    """What ``--json`` prints; plain types."""
    return {
        "schema": SCHEMA,
        "level": worst(findings),
        "findings": [vars(finding) for finding in findings],
        "hosts": report.hosts if report else {},
        "collectives": table(report) if report else [],
        "facts": {"local": report.local, "network": report.network} if report else {},
    }


def show_json(content: dict[str, Any]) -> None:
    """One document."""
    print(json.dumps(content, indent=1))


def show(content: dict[str, Any]) -> None:
    """The table of collectives and the findings."""
    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console = Console(highlight=False, no_color=True, width=_PIPE_WIDTH)
    if content["collectives"]:
        console.print("all-reduce: latency of 8 bytes, and bus bandwidth in GB/s by size", soft_wrap=True)
        console.print(_collectives(content["collectives"]))
    findings = Table(show_lines=False)
    findings.add_column("", no_wrap=True)
    findings.add_column("check", no_wrap=True)
    findings.add_column("found, and what to do", overflow="fold")
    for finding in content["findings"]:
        text = escape(finding["message"]) + (f"\n-> {escape(finding['remedy'])}" if finding["remedy"] else "")
        level = finding["level"]
        findings.add_row(f"[{_COLOURS[level]}]{level}[/]", escape(finding["check"]), text)
    console.print(findings)
    level = content["level"]
    said = {
        "green": "nothing stands in the way",
        "yellow": "it will run; see what is yellow",
        "red": "it will not run as meant; see what is red",
    }
    console.print(f"[{_COLOURS[level]}]{level}[/]: {said[level]}")


def _collectives(rows: Sequence[dict[str, Any]]) -> Table:
    """Latency and bus bandwidth; of many hosts the slowest and the median."""
    sizes = sorted({size for row in rows for size in row["gb_s"]}, key=int)
    shown = Table()
    for name in ("group", "backend", "ranks", "us", *map(_size, sizes)):
        shown.add_column(name, justify="left" if name in ("group", "backend") else "right")
    for backend in dict.fromkeys(row["backend"] for row in rows):
        inner = [row for row in rows if row["backend"] == backend and row["host"] is not None]
        outer = [row for row in rows if row["backend"] == backend and row["host"] is None]
        if len(inner) > _HOSTS_SHOWN:
            last = sizes[0]
            inner.sort(key=lambda row: row["gb_s"].get(last, 0.0))
            lines = [(f"within {row['host']}", row) for row in inner[:_SLOWEST_SHOWN]]
            lines.append((f"within a host, median of {len(inner)}", _median(inner)))
        else:
            lines = [(f"within {row['host']}", row) for row in inner]
        lines += [(row["group"], row) for row in outer]
        for name, row in lines:
            cells = [f"{row['gb_s'][size]:.3g}" if size in row["gb_s"] else "-" for size in sizes]
            shown.add_row(name, backend, str(row["ranks"]), f"{row['latency_us']:.0f}", *cells)
    return shown


def _median(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    common = set.intersection(*(set(row["gb_s"]) for row in rows))
    return {
        "ranks": int(statistics.median(row["ranks"] for row in rows)),
        "latency_us": statistics.median(row["latency_us"] for row in rows),
        "gb_s": {size: statistics.median(row["gb_s"][size] for row in rows) for size in common},
    }


def _size(size: str) -> str:
    n = int(size)
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"
