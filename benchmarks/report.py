"""The data benchmark's JSON lines as Markdown, and what the reports of all benchmarks say alike."""

import contextlib
import json
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import psutil

from benchmarks.cases import CASES, TARGETS

Result = dict[str, Any]


def machine() -> Result:
    """The machine that this runs on."""
    cpu = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def spread(values: Sequence[float], digits: int) -> str:
    """Median (least-most)."""
    if not values:
        return "-"
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return f"{statistics.median(values):.{digits}f}" + (f" ({low}-{high})" if low != high else "")


def render(lines: str) -> str:
    """A paragraph on the machine, one table for each row length, and the targets."""
    header, *results = map(json.loads, lines.splitlines())
    parts = [_machine(header)]
    for length in sorted({r["seq_len"] for r in results}):
        parts.append(_table(length, [r for r in results if r["seq_len"] == length], header))
    parts.append(_targets(results))
    failed = {(r["case"], r["error"]) for r in results if "error" in r}
    parts += [f"{case}: not measured: {error}" for case, error in sorted(failed)]
    return "\n\n".join(parts)


def _machine(header: Result) -> str:
    own = header["versions"].get("mosaicml") or {}
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"]["main"].items())
    if own:
        versions += f"; in an environment of its own mosaicml-streaming {own['mosaicml-streaming']} with transformers {own['transformers']}"
    return (
        f"{header['cpu']}, {header['cores']} cores, {header['memory_gb']} GB; Python {header['python']}, {versions}. "
        f"Text: {header['source']}, cut into {header['documents']:,} documents, {header['bytes'] / 1e6:.1f} MB, {header['tokens'] / 1e6:.1f} M tokens. "
        f"Median (least-most) of {header['rounds']} rounds of {header['seconds']:g} s each."
    )


def _table(length: int, results: list[Result], header: Result) -> str:
    counts = sorted({r["workers"] for r in results})
    names = {0: "in process", 1: "1 worker"}
    columns = [f"{names.get(n, f'{n} workers')}, Mtok/s" for n in counts]
    lines = [
        f"S = {length} | " + " | ".join(columns) + " | useful | text seen | first batch, s | memory, MB",
        " | ".join(["---"] * (len(counts) + 5)),
    ]
    for case in CASES:
        mine = [r for r in results if r["case"] == case.key and "error" not in r]
        if not mine:
            continue
        rates = [spread([r["tokens_per_s"] / 1e6 for r in mine if r["workers"] == n], 2) for n in counts]
        least = [r for r in mine if r["workers"] == min(x["workers"] for x in mine)]
        seen = header["kept_when_cut"][str(length)] if case.cut else 1.0
        cells = [
            case.label,
            *rates,
            f"{100 * statistics.median(r['useful'] for r in mine):.1f}%",
            f"{100 * seen:.0f}%",
            spread([r["first_batch_s"] for r in least], 1),
            spread([r["rss_mb"] for r in least], 0) + " / " + spread([r["pss_mb"] for r in least], 0),
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _ratio(results: list[Result], one: tuple[str, int], other: tuple[str, int], length: int) -> list[float]:
    """Rates of one over the other, round by round."""
    rates = {
        (r["case"], r["workers"], r["round"]): r["tokens_per_s"]
        for r in results
        if r["seq_len"] == length and "error" not in r
    }
    rounds = sorted({key[2] for key in rates})
    return [rates[(*one, k)] / rates[(*other, k)] for k in rounds if (*one, k) in rates and (*other, k) in rates]


def _targets(results: list[Result]) -> str:
    lengths = sorted({r["seq_len"] for r in results})
    lines = [
        "rate against rate | wanted | " + " | ".join(f"S = {n}" for n in lengths),
        " | ".join(["---"] * (len(lengths) + 2)),
    ]
    for target in TARGETS:
        found = [spread(_ratio(results, target.case, target.against, n), 2) for n in lengths]
        lines.append(" | ".join([target.label, f"at least {target.least:g}", *found]))
    return "\n".join(f"| {line} |" for line in lines)
